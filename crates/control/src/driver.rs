//! The loop: one thread that owns the replica and the leader's duties; everything else sends it
//! events and gets answers.
//!
//! A thread rather than a task, because a write to disk takes as long as it takes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::{ClusterState, Event as Change, NodeInfo, Progress, Proposal, Rejected};
use planner::NodeId;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use wire::{Held, Report, pb};

use crate::leader::{self, Leader, SessionId, Sight, Timing};
use crate::machine::{ClusterMachine, Outcome};
use crate::peers::Peers;
use crate::replica::{
    Fatal, Input, LogStore, MemberSet, Output, ProposeError, Replica, RoleKind, carries_snapshot,
    heir,
};
use crate::status;

/// Events that are taken together, so that proposals share a write to disk.
const BATCH: usize = 256;
/// Orders that may wait for a worker to read them. One that leaves so many unread is not served
/// by more.
const ORDERS: usize = 256;
/// Requests of clients are numbered from here, those of the leader from 1.
const CLIENTS: u64 = 1 << 62;
/// How long a leader that shuts down waits for another to take over.
const HANDOVER: Duration = Duration::from_secs(1);

/// What a session's worker reads.
pub(crate) type Orders = mpsc::Receiver<Result<pb::Order, Status>>;

/// How a worker's session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Closing {
    /// It said goodbye.
    Left,
    /// Its stream broke.
    Broke,
    /// Its connection ended without a word, as it does when its process does.
    Died,
}

/// Everything that can happen to the driver.
pub(crate) enum Event {
    /// Time has passed.
    Tick,
    /// A coordinator sent a message of Raft.
    Raft { from: NodeId, message: pb::RaftMessage },
    /// A message could not be delivered.
    Unreachable { peer: NodeId },
    /// A snapshot was handed over, or not.
    SnapshotSent { peer: NodeId, ok: bool },
    /// A coordinator says where it is reached.
    Address { peer: NodeId, address: String },
    /// Another coordinator says that this one was removed from the cluster.
    Removed,
    /// A worker opened a session.
    Open { node: NodeId, info: NodeInfo, held: Vec<Held>, reply: oneshot::Sender<Opened> },
    /// A worker said something.
    Report { session: SessionId, report: Report },
    /// A session is over.
    Closed { session: SessionId, how: Closing },
    /// Somebody wants a change.
    Write { proposal: Proposal, reply: oneshot::Sender<Result<Written, NotWritten>> },
    /// Somebody wants the state as of now.
    Read { reply: oneshot::Sender<Arc<ClusterState>> },
    /// Somebody looks at what is known here.
    Status { reply: oneshot::Sender<pb::StatusReply> },
    /// Leadership shall go to another node, or to whichever is fit.
    Transfer { to: Option<NodeId>, reply: oneshot::Sender<bool> },
    /// Hand over and end.
    Shutdown,
}

/// A session's start.
pub(crate) struct Opened {
    pub(crate) session: SessionId,
    pub(crate) orders: Orders,
    /// Cancelled when the driver has ended the session.
    pub(crate) ended: CancellationToken,
}

/// The driver's end of a session.
struct Line {
    orders: mpsc::Sender<Result<pb::Order, Status>>,
    ended: CancellationToken,
}

/// A change that is in the log.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Written {
    /// Its entry.
    pub(crate) index: u64,
    /// What applying it changed; a refusal is an outcome, too.
    pub(crate) result: Result<Vec<Change>, Rejected>,
}

/// Why a change is not known to be in the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotWritten {
    /// Consensus did not take it.
    #[error(transparent)]
    Refused(#[from] ProposeError),
    /// No majority answered in time. It may still happen; ask again with the same request id.
    #[error("no majority answered in time")]
    Late,
    /// This coordinator is shutting down.
    #[error("the coordinator is shutting down")]
    Ending,
}

/// Who leads, as this coordinator knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leadership {
    /// The term of Raft.
    pub term: u64,
    /// The leader, if known.
    pub leader: Option<NodeId>,
    /// Whether it is this coordinator, and its state is current.
    pub leading: bool,
}

/// What others see of the driver without asking it.
pub(crate) struct Published {
    pub(crate) view: watch::Sender<Arc<ClusterState>>,
    pub(crate) leadership: watch::Sender<Leadership>,
    /// How far ranks have loaded, as far as they said so here.
    pub(crate) progress: watch::Sender<Progress>,
    /// Set when this node is removed from the cluster.
    pub(crate) removed: watch::Sender<bool>,
}

enum Waiting {
    Write(oneshot::Sender<Result<Written, NotWritten>>),
    Read(oneshot::Sender<Arc<ClusterState>>),
}

impl Waiting {
    fn is_abandoned(&self) -> bool {
        match self {
            Self::Write(reply) => reply.is_closed(),
            Self::Read(reply) => reply.is_closed(),
        }
    }
}

/// The leader's clock. It stands still while nobody looks at it: a silence that this process has
/// slept through, because it was stopped or others had the processor, says nothing about workers
/// whose heartbeats wait to be read. Leases get longer by that here and end at the workers first.
struct Clock {
    time: Duration,
    looked: Instant,
}

impl Clock {
    /// Longest time between two looks that counts. Ticks come far more often.
    const GAP: Duration = Duration::from_millis(250);

    /// Milliseconds now.
    fn look(&mut self, now: Instant) -> u64 {
        let away = now.saturating_duration_since(self.looked);
        self.looked = now;
        self.time += away.min(Self::GAP);
        u64::try_from(self.time.as_millis()).unwrap_or(u64::MAX)
    }
}

/// The owner of everything that decides.
pub(crate) struct Driver<S: LogStore> {
    replica: Replica<S, ClusterMachine>,
    leader: Leader,
    peers: Peers,
    published: Published,
    clock: Clock,
    waiting: BTreeMap<u64, Waiting>,
    next_request: u64,
    sessions: BTreeMap<SessionId, Line>,
    next_session: u64,
    /// Inputs for the replica that its own outputs led to.
    queue: Vec<Input>,
    /// Until when it hands over.
    ending: Option<Instant>,
}

impl<S: LogStore> Driver<S> {
    pub(crate) fn new(
        replica: Replica<S, ClusterMachine>,
        timing: Timing,
        peers: Peers,
        published: Published,
    ) -> Self {
        Self {
            replica,
            leader: Leader::new(timing, 1),
            peers,
            published,
            clock: Clock { time: Duration::ZERO, looked: Instant::now() },
            waiting: BTreeMap::new(),
            next_request: CLIENTS,
            sessions: BTreeMap::new(),
            next_session: 1,
            queue: Vec::new(),
            ending: None,
        }
    }

    /// Takes events until told to shut down, or until something is fatal: then the process must
    /// end, for nobody knows what the disk holds.
    pub(crate) fn run(mut self, mut events: mpsc::Receiver<Event>) -> Result<(), Fatal> {
        let status = self.replica.status();
        if status.members == MemberSet::of_one(status.id) {
            // There is nobody whose leadership could be disturbed.
            self.queue.push(Input::Campaign);
            self.settle()?;
        }
        while let Some(event) = events.blocking_recv() {
            self.take(event);
            for _ in 1..BATCH {
                match events.try_recv() {
                    Ok(event) => self.take(event),
                    Err(_) => break,
                }
            }
            self.settle()?;
            if self.ended() {
                break;
            }
        }
        Ok(())
    }

    /// Whether it was told to end and has nothing more to hand over.
    fn ended(&self) -> bool {
        let Some(until) = self.ending else { return false };
        let leads = self.replica.status().role == RoleKind::Leader;
        !leads || Instant::now() >= until
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Tick => {
                self.queue.push(Input::Tick);
                self.drop_abandoned();
                self.lead(leader::Input::Tick);
            }
            Event::Raft { from, message } => self.queue.push(Input::Message { from, message }),
            Event::Unreachable { peer } => self.queue.push(Input::Unreachable { peer }),
            Event::SnapshotSent { peer, ok } => self.queue.push(Input::SnapshotSent { peer, ok }),
            Event::Address { peer, address } => self.peers.learn(peer, address),
            Event::Removed => self.removed(),
            Event::Open { node, info, held, reply } => self.open(node, info, held, reply),
            Event::Report { session, report } => {
                self.lead(leader::Input::Report { session, report });
            }
            Event::Closed { session, how } => {
                self.sessions.remove(&session);
                self.lead(match how {
                    Closing::Left => leader::Input::Closed { session, left: true },
                    Closing::Broke => leader::Input::Closed { session, left: false },
                    Closing::Died => leader::Input::Died { session },
                });
            }
            Event::Write { proposal, reply } => {
                let request = self.request(Waiting::Write(reply));
                let command = wire::encode_command(&proposal);
                self.queue.push(Input::Propose { request, command });
            }
            Event::Read { reply } => {
                let request = self.request(Waiting::Read(reply));
                self.queue.push(Input::Read { request });
            }
            Event::Status { reply } => {
                let status = self.replica.status();
                // Whoever asked may have gone since.
                let _ = reply.send(status::reply(
                    self.replica.machine().state(),
                    &self.leader,
                    &status,
                ));
            }
            Event::Transfer { to, reply } => {
                let status = self.replica.status();
                let target = to.or_else(|| heir(&status.peers));
                let target = target.filter(|to| *to != status.id && status.members.is_voter(*to));
                self.queue.extend(target.map(|to| Input::Transfer { to }));
                let _ = reply.send(target.is_some());
            }
            Event::Shutdown => {
                let target = heir(&self.replica.status().peers);
                self.queue.extend(target.map(|to| Input::Transfer { to }));
                let patience = if target.is_some() { HANDOVER } else { Duration::ZERO };
                self.ending = Some(Instant::now() + patience);
            }
        }
    }

    fn request(&mut self, waiting: Waiting) -> u64 {
        let request = self.next_request;
        self.next_request += 1;
        self.waiting.insert(request, waiting);
        request
    }

    /// Forgets requests whose askers have gone.
    fn drop_abandoned(&mut self) {
        let gone = self.waiting.iter().filter(|(_, waiting)| waiting.is_abandoned());
        let gone: Vec<u64> = gone.map(|(&request, _)| request).collect();
        for request in gone {
            self.waiting.remove(&request);
            self.queue.push(Input::Forget { request });
        }
    }

    fn open(
        &mut self,
        node: NodeId,
        info: NodeInfo,
        held: Vec<Held>,
        reply: oneshot::Sender<Opened>,
    ) {
        let session = SessionId(self.next_session);
        self.next_session += 1;
        let (sender, orders) = mpsc::channel(ORDERS);
        let ended = CancellationToken::new();
        self.sessions.insert(session, Line { orders: sender, ended: ended.clone() });
        if reply.send(Opened { session, orders, ended }).is_ok() {
            self.lead(leader::Input::Open { session, node, info, held });
        } else {
            self.sessions.remove(&session);
        }
    }

    /// Runs the replica over what is queued, and over what that leads to.
    fn settle(&mut self) -> Result<(), Fatal> {
        while !self.queue.is_empty() {
            let inputs = std::mem::take(&mut self.queue);
            let outputs = self.replica.handle_all(inputs)?;
            // First, so that whoever is told of a change finds it.
            self.publish();
            outputs.into_iter().for_each(|output| self.perform(output));
        }
        Ok(())
    }

    fn publish(&self) {
        let state = self.replica.machine().state();
        if self.published.view.borrow().revision() != state.revision() {
            self.published.view.send_replace(Arc::new(state.clone()));
        }
    }

    fn perform(&mut self, output: Output<Outcome>) {
        match output {
            Output::Send { to, message } => {
                let snapshot = carries_snapshot(&message);
                if !self.peers.send(to, message) {
                    self.queue.push(Input::Unreachable { peer: to });
                    if snapshot {
                        self.queue.push(Input::SnapshotSent { peer: to, ok: false });
                    }
                }
            }
            Output::Applied { index, request, outcome } => self.applied(index, request, outcome),
            Output::Changed { request, .. } => self.decide(request, Some(Ok(Vec::new()))),
            Output::Refused { request, why } => self.refused(request, why),
            Output::ReadReady { request, .. } => {
                if let Some(Waiting::Read(reply)) = self.waiting.remove(&request) {
                    let _ = reply.send(Arc::new(self.replica.machine().state().clone()));
                }
            }
            Output::Role { term, leader, leading } => self.role(term, leader, leading),
            Output::Members(members) => self.members(&members),
            Output::Restored { index } => {
                tracing::info!(index, "the state was replaced by a snapshot");
                self.know_addresses();
            }
            Output::Room { room } => {
                if room {
                    tracing::info!("there is room on the disk again");
                } else {
                    tracing::error!("no room on the disk: changes are refused");
                }
            }
            Output::Removed => self.removed(),
        }
    }

    fn removed(&self) {
        if !self.published.removed.send_replace(true) {
            tracing::warn!("this coordinator is no longer a member of the cluster");
        }
    }

    fn applied(&mut self, index: u64, request: Option<u64>, outcome: Outcome) {
        if let Ok(events) = &outcome {
            if events.iter().any(|event| matches!(event, Change::CoordinatorSet { .. })) {
                self.know_addresses();
            }
            self.lead(leader::Input::Changed { events: events.clone() });
        }
        let Some(request) = request else { return };
        if let Some(waiting) = self.waiting.remove(&request) {
            if let Waiting::Write(reply) = waiting {
                let _ = reply.send(Ok(Written { index, result: outcome }));
            }
        } else {
            self.decide(Some(request), Some(outcome));
        }
    }

    fn decide(&mut self, request: Option<u64>, outcome: Option<Outcome>) {
        if let Some(number) = request {
            self.lead(leader::Input::Decided { number, outcome });
        }
    }

    fn refused(&mut self, request: u64, why: ProposeError) {
        match self.waiting.remove(&request) {
            Some(Waiting::Write(reply)) => {
                let _ = reply.send(Err(why.into()));
            }
            Some(Waiting::Read(_)) => {}
            None => self.decide(Some(request), None),
        }
    }

    fn role(&mut self, term: u64, leader: Option<NodeId>, leading: bool) {
        let now = Leadership { term, leader, leading };
        let before = self.published.leadership.send_replace(now);
        if before.leader != leader {
            let leader = leader.map(|node| node.0);
            tracing::info!(term, leader, "leadership has changed");
        }
        match (before.leading, leading) {
            (false, true) => self.lead(leader::Input::Lead),
            (true, false) => self.lead(leader::Input::Follow),
            _ => {}
        }
    }

    fn members(&mut self, members: &MemberSet) {
        let count = (members.voters.len(), members.learners.len());
        tracing::info!(voters = count.0, learners = count.1, "the members of the control plane");
        self.peers.keep(&members.all());
        self.know_addresses();
    }

    fn know_addresses(&mut self) {
        for (node, coordinator) in self.replica.machine().state().coordinators() {
            self.peers.learn(node, coordinator.cluster_address.clone());
        }
    }

    /// Hands an input to the leader's duties and does what they say.
    fn lead(&mut self, input: leader::Input) {
        let now = self.clock.look(Instant::now());
        let status = self.replica.status();
        let sight = Sight { now, cluster: self.replica.machine().state(), replica: &status };
        let outputs = self.leader.handle(sight, input);
        self.published.progress.send_if_modified(|known| {
            let changed = known != self.leader.progress();
            if changed {
                known.clone_from(self.leader.progress());
            }
            changed
        });
        outputs.into_iter().for_each(|output| self.obey(output));
    }

    fn obey(&mut self, output: leader::Output) {
        match output {
            leader::Output::Propose { number, command } => {
                let command = wire::encode_command(&command.into());
                self.queue.push(Input::Propose { request: number, command });
            }
            leader::Output::Change { number, change } => {
                self.queue.push(Input::Change { request: number, change });
            }
            leader::Output::Transfer { to } => self.queue.push(Input::Transfer { to }),
            leader::Output::Order { session, order } => {
                let Some(line) = self.sessions.get(&session) else { return };
                // A worker that does not read is as good as gone.
                if line.orders.try_send(Ok(order.to_wire())).is_err() {
                    self.end(session, Status::resource_exhausted("orders were left unread"));
                    self.lead(leader::Input::Closed { session, left: false });
                }
            }
            leader::Output::Refuse { session, why } => {
                tracing::warn!(%why, "a worker was refused");
                self.end(session, refusal(&why));
            }
            leader::Output::End { session, why } => {
                tracing::info!(why, "a session has ended");
                self.end(session, Status::unavailable(why));
            }
        }
    }

    /// Ends a session from this side.
    fn end(&mut self, session: SessionId, why: Status) {
        if let Some(line) = self.sessions.remove(&session) {
            // A full queue ends the stream as well, only without the reason.
            let _ = line.orders.try_send(Err(why));
            line.ended.cancel();
        }
    }
}

/// What a worker is told whose join was refused. One that comes back before its old session is
/// known to be dead, or while there is no room, shall try again; everything else it cannot mend by
/// waiting.
fn refusal(why: &Rejected) -> Status {
    let text = why.to_string();
    match why {
        Rejected::BadNode(_) => Status::invalid_argument(text),
        Rejected::AddressTaken { .. } => Status::already_exists(text),
        Rejected::Full { .. } => Status::resource_exhausted(text),
        _ => Status::failed_precondition(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_nobody_saw_does_not_count() {
        let began = Instant::now();
        let mut clock = Clock { time: Duration::ZERO, looked: began };
        let ms = Duration::from_millis;
        assert_eq!(clock.look(began + ms(20)), 20);
        assert_eq!(clock.look(began + ms(120)), 120);
        assert_eq!(clock.look(began + ms(5_120)), 370, "it was away");
        assert_eq!(clock.look(began + ms(5_140)), 390);
    }
}
