//! The coordinator's port: workers come, form a group, fail and leave; nodes get identities;
//! operators change and watch. Every call is real gRPC over mutual TLS on loopback.

#![allow(clippy::unwrap_used)]

mod support;

use cluster::{Command, Phase, Proposal, Standing};
use identity::{KeyRequest, Peer, Role};
use planner::NodeId;
use support::{coordinator, deployment, draw, info};
use tonic::Code;
use wire::{Order, Report, pb};

#[tokio::test(flavor = "multi_thread")]
async fn three_workers_form_a_group_and_serve() {
    let coordinator = coordinator(3).await;
    let mut workers = vec![coordinator.join(1).await, coordinator.join(2).await];
    let waiting = coordinator.status().await.deployments[0].waiting_for.clone();
    assert!(waiting.contains("2 of 3"), "{waiting}");
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
    let rank = &status.groups[0].progress[1];
    assert_eq!((rank.bytes_read, rank.bytes_total, rank.ready), (5, 9, true));
    assert_eq!(status.groups[0].phase, "loading");
    workers[0].ready(form).await;
    workers[2].ready(form).await;
    coordinator.until(|state| state.route("tiny").is_some()).await;
    let route = coordinator.handle.view.borrow().route("tiny").unwrap();
    assert_eq!((route.group, route.epoch, route.leader), (group, epoch, workers[0].node));
    let status = coordinator.status().await;
    assert_eq!(status.deployments[0].serving, 1);
    assert!(status.current);
    assert_eq!(status.nodes.iter().filter(|node| node.standing == "ready").count(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_fails_leaves_or_breaks_off_costs_its_group_an_epoch() {
    let coordinator = coordinator(1).await;
    let mut worker = coordinator.join(1).await;
    let form = worker.form().await;
    worker.ready(&form).await;
    coordinator.until(|state| state.route("tiny").is_some()).await;
    let (group, epoch) = (form.group, form.epoch);
    let reason = "broken".to_owned();
    worker.report(Report::Failed { group, epoch, rank: 0, reason, blames: None }).await;
    assert!(matches!(worker.next().await, Ok(Order::Retire { .. })));
    let again = worker.form().await;
    assert_eq!((again.group, again.epoch), (group, epoch.next()));
    // A goodbye.
    drop(worker.reports);
    coordinator.until(|state| state.groups()[&group].phase == Phase::Repairing).await;
    coordinator.until(|state| state.nodes()[&NodeId(2)].standing == Standing::Lost).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_broke_is_resumed_with_what_the_worker_holds() {
    let coordinator = coordinator(1).await;
    let who = coordinator.worker().await;
    let join = |held| Report::Join(info(1), held).to_wire();
    let mut worker = coordinator.open(&who, join(Vec::new())).await.unwrap();
    let form = worker.form().await;
    let held = worker.ready(&form).await;
    coordinator.until(|state| state.route("tiny").is_some()).await;
    // A newer session of the same worker takes the place of the one before.
    let again = coordinator.open(&who, join(vec![held])).await.unwrap();
    assert_eq!(worker.next().await.unwrap_err().code(), Code::Unavailable);
    let state = coordinator.handle.view.borrow().clone();
    assert_eq!(
        (state.groups()[&form.group].epoch, state.nodes()[&NodeId(2)].incarnation),
        (form.epoch, 1)
    );
    again.report(Report::Heartbeat(Vec::new())).await;
    // Another process under the same identity is turned away as long as this one is heard. Once it
    // has ended, the other is its next life and holds nothing: its group moves on.
    let other = Report::Join(cluster::NodeInfo { boot: 77, ..info(1) }, Vec::new()).to_wire();
    let (code, why) = coordinator.refused(&who, other.clone()).await;
    assert!(code == Code::Unavailable && why.contains("another process"), "{code}: {why}");
    drop(again);
    let mut tries = 0;
    let mut other = loop {
        tries += 1;
        match coordinator.open(&who, other.clone()).await {
            Ok(other) => break other,
            Err(status) => assert!(tries < 500, "{status}"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    };
    assert_eq!(other.form().await.epoch, form.epoch.next());
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_name_the_cause_and_the_coordinator_goes_on() {
    let coordinator = coordinator(1).await;
    let who = coordinator.worker().await;
    let other = cluster::NodeInfo { model_digests: ["def456".to_owned()].into(), ..info(1) };
    let join = |info| Report::Join(info, Vec::new()).to_wire();
    let (code, text) = coordinator.refused(&who, join(other)).await;
    assert_eq!(code, Code::FailedPrecondition);
    assert!(text.contains("def456") && text.contains("abc123"), "{text}");
    let nowhere = cluster::NodeInfo { worker_address: "nowhere".to_owned(), ..info(1) };
    let (code, text) = coordinator.refused(&who, join(nowhere)).await;
    assert_eq!(code, Code::InvalidArgument);
    assert!(text.contains("worker_address"), "{text}");
    let (code, _) = coordinator.refused(&who, Report::Heartbeat(Vec::new()).to_wire()).await;
    assert_eq!(code, Code::InvalidArgument);
    let (code, _) = coordinator.refused(&who, pb::WorkerReport { report: None }).await;
    assert_eq!(code, Code::InvalidArgument);
    coordinator.open(&who, join(info(1))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_call_is_for_those_whose_it_is() {
    let coordinator = coordinator(1).await;
    let (worker, operator) = (coordinator.worker().await, coordinator.operator());
    let token = coordinator.token(Role::Worker, 1);
    let join = Report::Join(info(1), Vec::new()).to_wire();
    for stranger in [&operator, &token] {
        let (code, _) = coordinator.refused(stranger, join.clone()).await;
        assert_eq!(code, Code::PermissionDenied);
    }
    let change = |command| {
        let command = wire::encode_command(&Proposal { request: draw(), command });
        pb::ChangeRequest { command: command.into(), forwarded: false }
    };
    let drain = || change(Command::Drain { node: NodeId(2) });
    for stranger in [&worker, &token] {
        let mut client = coordinator.client(stranger).await;
        let status = pb::StatusRequest { local: true, load: false };
        assert_eq!(client.status(status).await.unwrap_err().code(), Code::PermissionDenied);
        assert_eq!(client.change(drain()).await.unwrap_err().code(), Code::PermissionDenied);
        let room = pb::RoomRequest::default();
        assert_eq!(client.room(room).await.unwrap_err().code(), Code::PermissionDenied);
        let transfer = pb::TransferRequest { node: 0, forwarded: false };
        assert_eq!(client.transfer(transfer).await.unwrap_err().code(), Code::PermissionDenied);
        let watched = client.watch(pb::WatchRequest { after: 0 }).await;
        assert_eq!(watched.unwrap_err().code(), Code::PermissionDenied);
        let raft = client.messages(tokio_stream::iter([])).await;
        assert_eq!(raft.unwrap_err().code(), Code::PermissionDenied);
    }
    let mut client = coordinator.client(&operator).await;
    // Operators do not decide what the leader observes.
    let lost = Command::Lost { node: NodeId(2), incarnation: 1 };
    let refused = client.change(change(lost)).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let id = identity::random().unwrap();
    let enrolled = coordinator.enrol(&operator, id).await.unwrap_err();
    assert_eq!(enrolled.code(), Code::PermissionDenied);
    assert!(client.change(drain()).await.is_ok());
    let nonsense = pb::ChangeRequest { command: vec![1, 2, 3].into(), forwarded: false };
    assert_eq!(client.change(nonsense).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_lets_in_as_many_nodes_as_it_says() {
    let coordinator = coordinator(1).await;
    let token = coordinator.token(Role::Worker, 2);
    let (first, _) = coordinator.enrol(&token, [1; 16]).await.unwrap();
    // The answer was lost, and the node asks again.
    let (again, credential) = coordinator.enrol(&token, [1; 16]).await.unwrap();
    assert_eq!((first.node, again.node), (2, 2));
    assert_eq!(*credential.peer(), Peer::Node { id: 2, role: Role::Worker });
    assert!(again.authority_key.is_empty(), "a worker does not sign certificates");
    assert_eq!(coordinator.enrol(&token, [2; 16]).await.unwrap().0.node, 3);
    let spent = coordinator.enrol(&token, [3; 16]).await.unwrap_err();
    assert_eq!(spent.code(), Code::FailedPrecondition);
    assert!(spent.message().contains("used 2 times"), "{}", spent.message());
    let token = coordinator.token(Role::Coordinator, 1);
    let (reply, credential) = coordinator.enrol(&token, [4; 16]).await.unwrap();
    assert_eq!(*credential.peer(), Peer::Node { id: 4, role: Role::Coordinator });
    assert!(!reply.authority_key.is_empty());
    assert_eq!(reply.coordinators, std::slice::from_ref(&coordinator.address));
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_until_their_node_is_removed() {
    let coordinator = coordinator(1).await;
    let who = coordinator.worker().await;
    let join = Report::Join(info(1), Vec::new()).to_wire();
    let mut worker = coordinator.open(&who, join).await.unwrap();
    worker.form().await;
    coordinator.put(Command::RotateCertificates).await;
    assert_eq!(worker.next().await.unwrap(), Order::Certificate { generation: 1 });
    let renew = |client: wire::pb::coordinator_client::CoordinatorClient<_>| async move {
        let mut client = client;
        let key = KeyRequest::generate().unwrap();
        let request = pb::RenewRequest { certificate_request: key.request().to_vec().into() };
        client.renew(request).await.map(|reply| (key, reply.into_inner()))
    };
    let client = coordinator.client(&who).await;
    let (key, reply) = renew(client.clone()).await.unwrap();
    assert_eq!(reply.generation, 1);
    let roots: Vec<Vec<u8>> = reply.roots.iter().map(|root| root.to_vec()).collect();
    let fresh = key.complete(reply.certificate.to_vec(), roots).unwrap();
    assert_eq!(fresh.peer(), who.peer());
    coordinator.put(Command::Leave { node: worker.node }).await;
    assert_eq!(renew(client).await.unwrap_err().code(), Code::PermissionDenied);
    while worker.next().await.is_ok() {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_sees_every_later_revision() {
    let coordinator = coordinator(1).await;
    let mut client = coordinator.client(&coordinator.operator()).await;
    let now = coordinator.status().await.revision;
    let mut watched = client.watch(pb::WatchRequest { after: now }).await.unwrap().into_inner();
    let mut last = now;
    for _ in 0..3 {
        coordinator.put(Command::RotateCertificates).await;
        let next = tokio::time::timeout(support::PATIENCE, watched.message()).await;
        let status = next.unwrap().unwrap().unwrap();
        assert!(status.revision > last);
        last = status.revision;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn room_is_looked_for_and_nothing_is_changed() {
    let coordinator = coordinator(1).await;
    let mut worker = coordinator.join(1).await;
    let form = worker.form().await;
    worker.ready(&form).await;
    coordinator.until(|state| state.route("tiny").is_some()).await;
    let mut client = coordinator.client(&coordinator.operator()).await;
    let before = coordinator.status().await;
    let room = async |client: &mut pb::coordinator_client::CoordinatorClient<_>, name: &str| {
        let wish = cluster::Deployment { name: name.to_owned(), ..deployment(1) };
        let deployment = Some(wire::deployment_to_wire(&wish));
        client.room(pb::RoomRequest { deployment }).await.unwrap().into_inner().missing
    };
    assert_eq!(room(&mut client, "tiny").await, "");
    assert_eq!(room(&mut client, "next").await, "0 of 1 devices with the model are free");
    let _second = coordinator.join(2).await;
    assert_eq!(room(&mut client, "next").await, "");
    assert_eq!(coordinator.status().await.deployments, before.deployments);
    let nothing = client.room(pb::RoomRequest::default()).await.unwrap_err();
    assert_eq!(nothing.code(), Code::InvalidArgument);
    // This leader is none, and has no counts to tell: nothing is known of its load.
    let status = client.status(pb::StatusRequest { local: false, load: true }).await.unwrap();
    assert_eq!(status.into_inner().groups[0].load, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_is_asked_for_twice_happens_once() {
    let coordinator = coordinator(1).await;
    let mut client = coordinator.client(&coordinator.operator()).await;
    let proposal = Proposal { request: draw(), command: Command::RotateCertificates };
    let request =
        pb::ChangeRequest { command: wire::encode_command(&proposal).into(), forwarded: false };
    let first = client.change(request.clone()).await.unwrap().into_inner();
    let second = client.change(request).await.unwrap().into_inner();
    assert_eq!(first, second);
    assert_eq!(coordinator.status().await.generation, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_ends_sessions_and_the_control_plane() {
    let coordinator = coordinator(1).await;
    let mut worker = coordinator.join(1).await;
    worker.form().await;
    coordinator.shutdown.cancel();
    while worker.next().await.is_ok() {}
    let ended = tokio::time::timeout(support::PATIENCE, coordinator.handle.task).await;
    ended.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_with_a_whole_snapshot_passes_and_a_larger_one_does_not() {
    let coordinator = coordinator(1).await;
    let token = coordinator.token(Role::Coordinator, 1);
    let (_, peer) = coordinator.enrol(&token, identity::random().unwrap()).await.unwrap();
    let mut client = coordinator.client(&peer).await;
    let of_size = |bytes: usize| {
        let context = vec![1; bytes].into();
        let message = Some(pb::RaftMessage { context, ..Default::default() });
        tokio_stream::iter([pb::RaftEnvelope { message, ..Default::default() }])
    };
    // What it says is refused behind this; here it is a matter of room.
    client.messages(of_size(control::replica::SNAPSHOT_MAX)).await.unwrap();
    // The stream may be reset before its status arrives.
    assert!(client.messages(of_size(wire::transport::CONTROL_MESSAGE_MAX)).await.is_err());
    coordinator.join(1).await;
}
