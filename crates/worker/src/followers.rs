//! The step plane from the leader's side: one channel per rank in this process, one long-lived
//! gRPC stream per rank elsewhere.

use std::sync::mpsc;

use cluster::{Epoch, GroupId};
use engine::Step;
use identity::{Expect, Tls};
use planner::NodeId;
use tokio::sync::mpsc as channel;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use wire::{FormGroup, StepOrder, pb};

use crate::group::Steps;
use crate::leader::{Command, Followers, GroupGone};
use crate::rank::{Failure, Formation, StepDone};

/// Steps that may be on their way to a rank. A rank can be one step behind the leader at most,
/// since each step meets in collectives.
const STEPS_AHEAD: usize = 4;

/// The node that leads.
pub(crate) struct Here<'a> {
    pub(crate) node: NodeId,
    pub(crate) tls: &'a Tls,
    /// Where tasks that talk to remote ranks run.
    pub(crate) runtime: &'a tokio::runtime::Handle,
}

/// Every rank but the leader's own.
pub(crate) struct Fanout {
    group: GroupId,
    epoch: Epoch,
    local: Vec<Steps>,
    remote: Vec<(usize, channel::Sender<pb::StepPlan>)>,
    done: channel::UnboundedSender<StepDone>,
}

impl Fanout {
    /// Opens a stream to each remote rank. A stream that breaks fails the group.
    pub(crate) fn new(
        formation: &Formation,
        &Here { node, tls, runtime }: &Here<'_>,
        local: Vec<Steps>,
        leader: mpsc::Sender<Command>,
    ) -> Self {
        let (done, mut finished) = channel::unbounded_channel::<StepDone>();
        let failed = leader.clone();
        runtime.spawn(async move {
            while let Some(step) = finished.recv().await {
                if let Some(Failure { reason, blames }) = step.failure {
                    let _ = failed.send(Command::Failed { reason, blames });
                }
            }
        });
        let FormGroup { group, epoch, plan, addresses, .. } = &formation.order;
        let elsewhere = plan.ranks.iter().filter(|r| r.node != node && r.rank != 0);
        let remote = elsewhere
            .map(|plan| {
                let (steps, outgoing) = channel::channel(STEPS_AHEAD);
                let address = addresses[plan.rank].worker_address.clone();
                let (leader, rank) = (leader.clone(), plan.rank);
                let (expect, tls) = (Expect::Node(plan.node.0), tls.clone());
                runtime.spawn(async move {
                    let Failure { reason, blames } = stream(&address, expect, &tls, outgoing).await;
                    let (reason, blames) =
                        (format!("rank {rank}: {reason}"), blames.or(Some(rank)));
                    let _ = leader.send(Command::Failed { reason, blames });
                });
                (plan.rank, steps)
            })
            .collect();
        Self { group: *group, epoch: *epoch, local, remote, done }
    }
}

/// Carries steps to one remote rank until the stream ends; returns why it did, and which other
/// rank is at fault where the rank says so.
async fn stream(
    address: &str,
    expect: Expect,
    tls: &Tls,
    mut outgoing: channel::Receiver<pb::StepPlan>,
) -> Failure {
    // Nothing is opened before there is a step: by then the rank has loaded.
    let Some(first) = outgoing.recv().await else { return Failure::own("not needed any more") };
    let steps = tokio_stream::once(first).chain(ReceiverStream::new(outgoing));
    let channel = match wire::transport::connect(address, expect, tls).await {
        Ok(channel) => channel,
        Err(error) => return Failure::own(error),
    };
    let mut client = wire::transport::worker_client(channel);
    let mut reports = match client.steps(steps).await {
        Ok(response) => response.into_inner(),
        Err(status) => return Failure::own(wire::transport::reason(&status)),
    };
    loop {
        match reports.next().await {
            Some(Ok(report)) if report.error.is_empty() => {}
            Some(Ok(report)) => {
                let blames = report.blames.and_then(|rank| usize::try_from(rank).ok());
                return Failure { reason: report.error, blames };
            }
            Some(Err(status)) => return Failure::own(wire::transport::reason(&status)),
            None => return Failure::own("its step stream ended"),
        }
    }
}

impl Followers for Fanout {
    fn launch(&mut self, step: &Step) -> Result<(), GroupGone> {
        for steps in &self.local {
            let sent = steps.send((step.clone(), self.done.clone()));
            sent.map_err(|_| GroupGone::because("a rank of this process ended"))?;
        }
        for (rank, steps) in &self.remote {
            let (group, epoch, step) = (self.group, self.epoch, step.clone());
            let order = StepOrder { group, epoch, rank: *rank, step };
            steps.blocking_send(order.to_wire()).map_err(|_| GroupGone {
                reason: format!("rank {rank}: its step stream ended"),
                blames: Some(*rank),
            })?;
        }
        Ok(())
    }
}
