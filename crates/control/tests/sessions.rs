//! Workers come, form a group, fail and leave; every session is a real gRPC stream over loopback.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use cluster::{Epoch, GroupId, Phase};
use control::{ControlConfig, ControlError};
use support::{Coordinator, Worker, coordinator, deployment, info};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use wire::{Order, Report, pb};

/// Long enough that no test meets it by accident.
const LONG: Duration = Duration::from_secs(60);

/// `ranks` workers, their group serving.
async fn serving(ranks: usize) -> (Coordinator, Vec<Worker>) {
    let coordinator = coordinator(ranks, LONG).await;
    let mut workers = Vec::new();
    for number in 1..=ranks as u64 {
        workers.push(coordinator.join(number).await);
    }
    for worker in &mut workers {
        let form = worker.form().await;
        worker.ready(&form).await;
    }
    coordinator.until(|state| state.route("tiny").is_some()).await;
    (coordinator, workers)
}

#[tokio::test]
async fn three_workers_form_a_group_and_serve() {
    let coordinator = coordinator(3, LONG).await;
    let mut workers = vec![coordinator.join(1).await, coordinator.join(2).await];
    assert_eq!(coordinator.status().await.waiting_for, "2 of 3 ranks have joined");
    workers.push(coordinator.join(3).await);
    let mut forms = Vec::new();
    for worker in &mut workers {
        forms.push(worker.form().await);
    }
    assert!(forms.windows(2).all(|pair| pair[0] == pair[1]));
    let form = &forms[0];
    let held: Vec<usize> = form.plan.ranks.iter().map(|rank| rank.stripes.len()).collect();
    assert_eq!((form.plan.stripes, held.iter().sum(), held.len()), (8, 8, 3));
    assert_eq!(form.addresses[2].worker_address, "host-3:9000");
    assert_eq!(form.addresses[2].collective_address, "host-3:9100");
    assert_eq!(form.deployment, deployment(3));

    let (group, epoch) = (form.group, form.epoch);
    let progress = Report::Progress { group, epoch, rank: 1, bytes_read: 5, bytes_total: 9 };
    workers[1].report(progress).await;
    workers[1].ready(form).await;
    coordinator.until(|state| state.groups()[&group].ready.len() == 1).await;
    let status = coordinator.status().await;
    assert_eq!(status.waiting_for, "group 1 forms: 1 of 3 ranks are ready");
    let rank = &status.groups[0].progress[1];
    assert_eq!((rank.bytes_read, rank.bytes_total, rank.ready), (5, 9, true));
    assert_eq!(status.groups[0].phase, "forming");

    workers[0].ready(form).await;
    workers[2].ready(form).await;
    coordinator.until(|state| state.route("tiny").is_some()).await;
    let route = coordinator.handle.view.borrow().route("tiny").unwrap();
    assert_eq!((route.group, route.epoch), (group, epoch));
    assert_eq!(route.leader_address, "host-1:9000");
    let status = coordinator.status().await;
    assert_eq!((status.groups[0].phase.as_str(), status.waiting_for.as_str()), ("serving", ""));
    assert_eq!(status.deployment.unwrap().model, "tiny");
    assert_eq!(status.nodes.iter().filter(|node| node.alive).count(), 3);
}

#[tokio::test]
async fn refusals_name_the_cause_and_the_coordinator_goes_on() {
    let coordinator = coordinator(1, LONG).await;
    let mut other = info(1);
    other.model_digest = "def456".to_owned();
    let (code, text) = coordinator.refused(Report::Join(other).to_wire()).await;
    assert_eq!(code, Code::FailedPrecondition);
    assert_eq!(text, "the worker's model has digest def456, the deployment's has abc123");

    let (code, text) = coordinator.refused(Report::Heartbeat.to_wire()).await;
    assert_eq!((code, text.as_str()), (Code::InvalidArgument, "the first report must be a join"));
    let (code, text) = coordinator.refused(pb::WorkerReport::default()).await;
    assert_eq!((code, text.as_str()), (Code::InvalidArgument, "report is missing"));

    let mut nowhere = info(1);
    nowhere.worker_address = "nowhere".to_owned();
    let (code, text) = coordinator.refused(Report::Join(nowhere).to_wire()).await;
    assert_eq!(code, Code::InvalidArgument);
    assert_eq!(text, "worker_address is not host:port");
    let mut nameless = info(1);
    nameless.name = "x".repeat(1000);
    let (code, _) = coordinator.refused(Report::Join(nameless).to_wire()).await;
    assert_eq!(code, Code::InvalidArgument);

    let mut good = coordinator.join(1).await;
    assert_eq!(good.form().await.group, GroupId(1));
    let (code, _) = coordinator.refused(Report::Join(info(1)).to_wire()).await;
    assert_eq!(code, Code::AlreadyExists, "it may try again once the old session is gone");
    assert_eq!(coordinator.handle.view.borrow().nodes().len(), 1);
}

#[tokio::test]
async fn a_dropped_session_retires_the_group_and_a_new_worker_brings_another() {
    let (coordinator, mut workers) = serving(3).await;
    drop(workers.remove(1));
    for worker in &mut workers {
        let (group, epoch, reason) = worker.retire().await;
        assert_eq!((group, epoch), (GroupId(1), Epoch(1)));
        assert_eq!(reason, "node 2 (w2) was lost");
    }
    coordinator.until(|state| state.route("tiny").is_none()).await;
    assert_eq!(coordinator.status().await.waiting_for, "2 of 3 ranks have joined");

    workers.push(coordinator.join(2).await);
    for worker in &mut workers {
        let form = worker.form().await;
        assert_eq!((form.group, form.epoch), (GroupId(2), Epoch(2)));
        // A report of the old incarnation changes nothing.
        worker.report(Report::Ready { group: GroupId(1), epoch: Epoch(1), rank: 0 }).await;
        worker.ready(&form).await;
    }
    coordinator.until(|state| state.route("tiny").is_some()).await;
    let route = coordinator.handle.view.borrow().route("tiny").unwrap();
    assert_eq!(route.epoch, Epoch(2));
}

#[tokio::test]
async fn a_spare_is_idle_until_a_rank_is_lost() {
    let (coordinator, mut workers) = serving(2).await;
    let mut spare = coordinator.join(3).await;
    assert_eq!(coordinator.status().await.groups.len(), 1);
    drop(workers.remove(0));
    workers[0].retire().await;
    let form = spare.form().await;
    assert_eq!(form.epoch, Epoch(2));
    assert_eq!(workers[0].form().await, form);
}

#[tokio::test]
async fn a_failed_rank_retires_the_group_which_forms_again() {
    let (coordinator, mut workers) = serving(2).await;
    let (group, epoch) = (GroupId(1), Epoch(1));
    let failed = |rank| Report::Failed { group, epoch, rank, reason: "no memory".to_owned() };
    // Another's rank is not this worker's to give up.
    workers[0].report(failed(1)).await;
    workers[1].report(failed(1)).await;
    for worker in &mut workers {
        let (_, _, reason) = worker.retire().await;
        assert_eq!(reason, "rank 1 on node 2 failed: no memory");
    }
    for worker in &mut workers {
        assert_eq!(worker.form().await.epoch, Epoch(2));
    }
    let state = coordinator.handle.view.borrow().clone();
    assert_eq!(state.groups()[&group].phase, Phase::Retired);
    state.check_integrity().unwrap();
}

#[tokio::test]
async fn silence_beyond_the_lease_is_loss() {
    let coordinator = coordinator(2, Duration::from_secs(1)).await;
    let mut lively = coordinator.join(1).await;
    let reports = lively.reports.clone();
    let beating = tokio::spawn(async move {
        while reports.send(Report::Heartbeat.to_wire()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let mut silent = coordinator.join(2).await;
    lively.form().await;
    silent.form().await;
    let (_, _, reason) = lively.retire().await;
    assert_eq!(reason, "node 2 (w2) was lost");
    let end = silent.next().await.unwrap_err();
    assert_eq!(end.code(), Code::DeadlineExceeded);
    let nodes = coordinator.handle.view.borrow().clone();
    let alive: Vec<bool> = nodes.nodes().values().map(|node| node.alive).collect();
    assert_eq!(alive, [true, false]);
    beating.abort();
}

#[tokio::test]
async fn a_worker_that_breaks_the_protocol_is_lost() {
    let (coordinator, mut workers) = serving(2).await;
    workers[0].report(Report::Join(info(1))).await;
    let end = loop {
        match workers[0].next().await {
            Ok(Order::Retire { .. }) => {}
            Ok(other) => panic!("unexpected {other:?}"),
            Err(end) => break end,
        }
    };
    assert_eq!(end.code(), Code::InvalidArgument);
    workers[1].retire().await;
    coordinator.until(|state| state.nodes().values().filter(|node| node.alive).count() == 1).await;
}

#[tokio::test]
async fn shutdown_ends_every_session_and_the_task() {
    let (coordinator, mut workers) = serving(2).await;
    coordinator.shutdown.cancel();
    for worker in &mut workers {
        assert_eq!(worker.next().await.unwrap_err().code(), Code::Unavailable);
    }
    coordinator.handle.task.await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_served_does_not_start() {
    let listener = || async { TcpListener::bind("127.0.0.1:0").await.unwrap() };
    let token = CancellationToken::new();
    let config = ControlConfig { lease: Duration::ZERO };
    let refused = control::start(listener().await, deployment(1), config, token.clone());
    assert!(matches!(refused, Err(ControlError::Lease)));
    let config = ControlConfig { lease: LONG };
    let refused = control::start(listener().await, deployment(9), config, token);
    assert!(matches!(refused, Err(ControlError::Deployment(_))));
}
