//! The owner of the state: one task, a closed set of events, every change through `apply`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use cluster::{
    ClusterState, Command, Deployment, Epoch, Group, GroupId, NodeInfo, Rejected, reconcile,
};
use planner::NodeId;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use wire::{FormGroup, Order, RankAddress, Report, pb};

use crate::service::ending;
use crate::status::{self, Progress};

/// Orders that may wait for a worker to read them. A worker needs three at most at a time; one
/// that leaves so many unread is not served by more.
const ORDERS: usize = 32;
/// Pause before a group is formed again after a rank failed; doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What a session's worker reads.
pub(crate) type Orders = mpsc::Receiver<Result<pb::Order, Status>>;

/// Everything that can happen to the owner, time and shutdown aside.
pub(crate) enum Event {
    /// A worker wants to join.
    Join { info: NodeInfo, reply: oneshot::Sender<Result<Joined, Rejected>> },
    /// A worker that has joined says something.
    Report { node: NodeId, report: Report },
    /// A session is over.
    Ended { node: NodeId, why: Status },
    /// An operator looks.
    Status { reply: oneshot::Sender<pb::StatusReply> },
}

/// What a session gets when its worker has joined.
pub(crate) struct Joined {
    pub(crate) node: NodeId,
    pub(crate) orders: Orders,
    /// Cancelled when the owner ends the session.
    pub(crate) ended: CancellationToken,
}

/// The owner's end of a session.
struct Session {
    orders: mpsc::Sender<Result<pb::Order, Status>>,
    ended: CancellationToken,
}

/// The state, its sessions, and what is known of ranks that load.
pub(crate) struct Owner {
    state: ClusterState,
    view: watch::Sender<Arc<ClusterState>>,
    sessions: BTreeMap<NodeId, Session>,
    /// Nodes whose session is gone and whose loss is still to be applied.
    gone: BTreeSet<NodeId>,
    /// Soft: seen by operators, decided upon by nobody.
    progress: Progress,
    /// No group is placed before this time.
    not_before: Option<Instant>,
    pause: Duration,
    /// Since when the latest group serves.
    serving_since: Option<Instant>,
}

impl Owner {
    pub(crate) fn new(
        deployment: Deployment,
    ) -> Result<(Self, watch::Receiver<Arc<ClusterState>>), Rejected> {
        let mut state = ClusterState::new();
        state.apply(1, Command::Deploy(deployment))?;
        let (view, seen) = watch::channel(Arc::new(state.clone()));
        let owner = Self {
            state,
            view,
            sessions: BTreeMap::new(),
            gone: BTreeSet::new(),
            progress: Progress::new(),
            not_before: None,
            pause: FIRST_PAUSE,
            serving_since: None,
        };
        Ok((owner, seen))
    }

    /// Handles events until shutdown, then ends every session.
    pub(crate) async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        shutdown: CancellationToken,
    ) {
        loop {
            let not_before = self.not_before;
            let due = async move {
                match not_before {
                    Some(time) => tokio::time::sleep_until(time).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                event = events.recv() => match event {
                    Some(event) => self.handle(event),
                    None => break,
                },
                () = due => self.not_before = None,
            }
            self.settle();
        }
        for node in self.sessions.keys().copied().collect::<Vec<_>>() {
            self.end_session(node, ending());
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Join { info, reply } => self.join(info, reply),
            Event::Report { node, report } => self.report(node, report),
            Event::Ended { node, why } => {
                tracing::info!(node = node.0, why = why.message(), "a session has ended");
                self.end_session(node, why);
            }
            Event::Status { reply } => {
                // Whoever asked may have gone since.
                let _ = reply.send(status::reply(&self.state, &self.progress));
            }
        }
    }

    fn join(&mut self, info: NodeInfo, reply: oneshot::Sender<Result<Joined, Rejected>>) {
        let name = info.name.clone();
        let events = match self.apply(Command::Join(info)) {
            Ok(events) => events,
            Err(why) => {
                tracing::warn!(name, %why, "a worker was refused");
                // Whoever asked may have gone since.
                let _ = reply.send(Err(why));
                return;
            }
        };
        for event in events {
            if let cluster::Event::NodeJoined { node } = event {
                tracing::info!(node = node.0, name, "a worker has joined");
                let (sender, orders) = mpsc::channel(ORDERS);
                let ended = CancellationToken::new();
                self.sessions.insert(node, Session { orders: sender, ended: ended.clone() });
                self.order(node, &Order::Welcome { node });
                if reply.send(Ok(Joined { node, orders, ended })).is_err() {
                    self.end_session(node, Status::cancelled("the worker left"));
                }
                return;
            }
        }
    }

    fn report(&mut self, node: NodeId, report: Report) {
        let (group, epoch, rank) = match report {
            Report::Progress { group, epoch, rank, .. }
            | Report::Ready { group, epoch, rank }
            | Report::Failed { group, epoch, rank, .. } => (group, epoch, rank),
            Report::Join(_) | Report::Heartbeat => return,
        };
        if !self.owns(node, group, epoch, rank) {
            // Usual while a group is being retired: the worker has not heard of it yet.
            tracing::debug!(node = node.0, %group, %epoch, rank, "a report for another's rank");
            return;
        }
        match report {
            Report::Progress { bytes_read, bytes_total, .. } => {
                self.progress.insert((group, rank), (bytes_read, bytes_total));
            }
            Report::Ready { .. } => self.propose(Command::RankReady { group, epoch, rank }),
            Report::Failed { reason, .. } => {
                let reason = format!("rank {rank} on node {} failed: {reason}", node.0);
                // A group that served for long failed for a new reason; one that fails as soon as
                // it serves would be formed over and over.
                if self.serving_since.take().is_some_and(|since| since.elapsed() > LONGEST_PAUSE) {
                    self.pause = FIRST_PAUSE;
                }
                self.not_before = Some(Instant::now() + self.pause);
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                self.propose(Command::Retire { group, epoch, reason });
            }
            Report::Join(_) | Report::Heartbeat => {}
        }
    }

    /// Whether `node` holds that rank of that living incarnation.
    fn owns(&self, node: NodeId, group: GroupId, epoch: Epoch, rank: usize) -> bool {
        let group = self.state.groups().get(&group);
        let group = group.filter(|group| group.live() && group.epoch == epoch);
        group.and_then(|group| group.plan.ranks.get(rank)).is_some_and(|rank| rank.node == node)
    }

    /// Applies what follows from the last event: losses first, then what reconciliation wants.
    fn settle(&mut self) {
        loop {
            if let Some(node) = self.gone.pop_first() {
                self.propose(Command::Lost { node });
                continue;
            }
            if self.not_before.is_some() {
                break;
            }
            let commands = reconcile(&self.state);
            if commands.is_empty() {
                break;
            }
            let before = self.state.revision();
            commands.into_iter().for_each(|command| self.propose(command));
            if self.state.revision() == before {
                // The log has said why; proposing the same again would not change it.
                break;
            }
        }
        if self.view.borrow().revision() != self.state.revision() {
            self.view.send_replace(Arc::new(self.state.clone()));
        }
    }

    /// A change that nobody waits for an answer to.
    fn propose(&mut self, command: Command) {
        if let Err(why) = self.apply(command) {
            tracing::error!(%why, "the control plane's own command was refused");
        }
    }

    /// The one place where the state changes.
    fn apply(&mut self, command: Command) -> Result<Vec<cluster::Event>, Rejected> {
        let events = self.state.apply(self.state.index() + 1, command)?;
        events.iter().for_each(|event| self.carry_out(event));
        debug_assert_eq!(self.state.check_integrity(), Ok(()));
        Ok(events)
    }

    fn carry_out(&mut self, event: &cluster::Event) {
        match event {
            cluster::Event::GroupPlaced { group, .. } => self.form(*group),
            cluster::Event::GroupServing { group, epoch } => {
                tracing::info!(%group, %epoch, "a group serves");
                self.serving_since = Some(Instant::now());
            }
            cluster::Event::GroupRetired { group, epoch, nodes, reason } => {
                tracing::warn!(%group, %epoch, reason, "a group is retired");
                self.progress.retain(|(of, _), _| of != group);
                let reason = reason.clone();
                let order = Order::Retire { group: *group, epoch: *epoch, reason };
                nodes.iter().for_each(|&node| self.order(node, &order));
            }
            // A rank fails when its peer dies. Now that the peer is known to be gone, there is
            // nothing to wait for: a spare may take its place at once.
            cluster::Event::NodeLost { .. } => self.not_before = None,
            cluster::Event::Deployed { .. } | cluster::Event::NodeJoined { .. } => {}
        }
    }

    /// Tells every node of a group that was just placed to form it.
    fn form(&mut self, id: GroupId) {
        let Some((group, deployment)) = self.state.groups().get(&id).zip(self.state.deployment())
        else {
            return;
        };
        tracing::info!(group = %id, epoch = %group.epoch, "a group is placed");
        let form = FormGroup {
            group: id,
            epoch: group.epoch,
            deployment: deployment.clone(),
            plan: group.plan.clone(),
            addresses: addresses(&self.state, group),
        };
        let nodes = group.nodes();
        let order = Order::Form(Box::new(form));
        nodes.into_iter().for_each(|node| self.order(node, &order));
    }

    /// Sends an order without waiting: a worker that does not read is as good as gone.
    fn order(&mut self, node: NodeId, order: &Order) {
        let Some(session) = self.sessions.get(&node) else { return };
        if session.orders.try_send(Ok(order.to_wire())).is_err() {
            self.end_session(node, Status::resource_exhausted("orders were left unread"));
        }
    }

    /// Ends a session from this side; the node's loss is applied by the next `settle`.
    fn end_session(&mut self, node: NodeId, why: Status) {
        if let Some(session) = self.sessions.remove(&node) {
            session.ended.cancel();
            if why.code() != tonic::Code::Ok {
                // A full or closed queue ends the stream as well, only without the reason.
                let _ = session.orders.try_send(Err(why));
            }
            self.gone.insert(node);
        }
    }
}

/// Where the ranks of a group are, by rank.
fn addresses(state: &ClusterState, group: &Group) -> Vec<RankAddress> {
    let ranks = group.plan.ranks.iter().filter_map(|rank| {
        let info = &state.nodes().get(&rank.node)?.info;
        Some(RankAddress {
            node: rank.node,
            worker_address: info.worker_address.clone(),
            collective_address: info.collective_addresses.get(rank.device)?.clone(),
        })
    });
    ranks.collect()
}

#[cfg(test)]
#[path = "owner_tests.rs"]
mod tests;
