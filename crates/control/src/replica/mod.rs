//! One member of the group of coordinators that agrees on a log: Raft, driven without I/O.
//!
//! ```text
//!            Input ──> gate ──> raft ──> ready: send · write (one durable batch) · answer · apply
//!                                                                     │                  │
//!                                                                 LogStore            Machine
//! ```
//! [`Replica::handle`] takes one thing that happened and returns what to do about it. There is no
//! clock, thread, socket or randomness in here: the same inputs give the same outputs, which is
//! how the simulation replays a run from its seed.

mod api;
mod apply;
mod changes;
mod checks;
mod convert;
mod cycle;
mod disk;
mod drain;
pub mod gate;
mod inputs;
mod members;
mod mistake;
mod payload;
mod proposals;
mod reads;
mod shelf;
mod snapshots;
mod start;
mod store;
#[cfg(test)]
mod tests;
mod timeouts;

use std::collections::{BTreeMap, BTreeSet};

use planner::NodeId;
use raft::{ProgressState, RawNode, StateRole};
use wire::pb;

pub use api::{
    BadChange, ClusterId, Fatal, Input, Machine, Output, PeerProgress, ProposeError, ReplicaConfig,
    ReplicaStatus, RestoreError, RoleKind,
};
pub use disk::{Disk, RedbStore, recover};
pub use gate::GateError;
pub use members::{MEMBERS_MAX, MemberChange, MemberSet};
#[doc(hidden)]
pub use mistake::Mistake;
pub use payload::SNAPSHOT_MAX;
pub use store::{
    Batch, EntryKind, HardState, LogEntry, LogId, LogImage, LogStore, Snapshot, StoreError,
};

use self::checks::Checks;
use self::cycle::Stall;
use self::proposals::Proposals;
use self::reads::Reads;
use self::shelf::Shelf;
use self::timeouts::Timeouts;

/// Whether `Input::SnapshotSent` must follow the sending of this message.
pub fn carries_snapshot(message: &pb::RaftMessage) -> bool {
    message.snapshot.is_some()
}

/// What is known of a node from its messages.
#[derive(Debug, Clone, Copy)]
struct Heard {
    /// When the last one came.
    ticks: u64,
    /// Its disk was full then.
    full: bool,
}

/// One member of the group.
pub struct Replica<S: LogStore, M: Machine> {
    config: ReplicaConfig,
    raw: RawNode<Shelf<S>>,
    machine: M,
    boot: u64,
    outputs: Vec<Output<M::Outcome>>,
    /// The newest hard state; durable but for its commit.
    hard_state: HardState,
    /// Since when the durable commit has lagged behind, in ticks.
    commit_lags: Option<u64>,
    /// Changes of members that were applied, and whose commit may not be durable: nobody is told
    /// yet.
    news: Vec<Output<M::Outcome>>,
    /// When their commit was last to be written, in ticks.
    news_tried: u64,
    /// The members as of `applied`.
    members: MemberSet,
    removed: BTreeSet<NodeId>,
    applied: u64,
    proposals: Proposals,
    reads: Reads,
    checks: Checks,
    timeouts: Timeouts,
    ticks: u64,
    /// The last message of each node that was let in.
    heard: BTreeMap<NodeId, Heard>,
    joint_since: Option<u64>,
    /// Up to where followers were told of entries during joint consensus.
    nudged: u64,
    /// A ready that could not be written for want of room.
    stall: Option<Box<Stall>>,
    full: bool,
    told_full: bool,
    /// The part this node was last known to play.
    role: (u64, Option<NodeId>, bool),
    /// Snapshots on their way, and since when.
    snapshots_sent: BTreeMap<NodeId, u64>,
    gone: bool,
    failed: bool,
    refused: BTreeMap<&'static str, u64>,
    last_refusal: Option<GateError>,
    #[cfg(feature = "mutations")]
    mistake: Option<Mistake>,
}

impl<S: LogStore, M: Machine> std::fmt::Debug for Replica<S, M> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (term, leader, leading) = self.role;
        out.debug_struct("Replica")
            .field("id", &self.config.id)
            .field("term", &term)
            .field("leader", &leader)
            .field("leading", &leading)
            .field("applied", &self.applied)
            .finish_non_exhaustive()
    }
}

impl<S: LogStore, M: Machine> Replica<S, M> {
    /// Takes one input and says what to do.
    ///
    /// # Errors
    /// [`Fatal`]: the process must end, and nothing of what this call began may be used.
    pub fn handle(&mut self, input: Input) -> Result<Vec<Output<M::Outcome>>, Fatal> {
        self.handle_all([input])
    }

    /// As [`Self::handle`] for several inputs; proposals and reads next to each other share one
    /// write to the disk.
    ///
    /// # Errors
    /// [`Fatal`]: the process must end.
    pub fn handle_all(
        &mut self,
        inputs: impl IntoIterator<Item = Input>,
    ) -> Result<Vec<Output<M::Outcome>>, Fatal> {
        if self.failed {
            return Err(Fatal::Failed);
        }
        let done = self.take_all(inputs);
        self.failed = done.is_err();
        done?;
        Ok(std::mem::take(&mut self.outputs))
    }

    /// Anything but a proposal or a read meets a replica that has nothing left to do: consensus
    /// ends the process over, say, entries that it has yet to write when it learns that it was
    /// removed.
    fn take_all(&mut self, inputs: impl IntoIterator<Item = Input>) -> Result<(), Fatal> {
        let mut open = false;
        for input in inputs {
            let shares =
                matches!(input, Input::Propose { .. } | Input::Read { .. } | Input::Forget { .. });
            if open && !shares {
                self.settle()?;
            }
            self.take(input)?;
            open = shares;
            if !shares {
                self.settle()?;
            }
        }
        if open { self.settle() } else { Ok(()) }
    }

    /// The state machine.
    pub fn machine(&self) -> &M {
        &self.machine
    }

    /// How this replica behaves.
    pub fn config(&self) -> &ReplicaConfig {
        &self.config
    }

    /// The store.
    pub fn store(&self) -> &S {
        self.raw.store().store()
    }

    /// The store, for a simulation that changes the disk under it.
    pub fn store_mut(&mut self) -> &mut S {
        self.raw.mut_store().store_mut()
    }

    /// Where it stands.
    pub fn status(&self) -> ReplicaStatus {
        let raft = &self.raw.raft;
        let image = self.raw.store().image();
        let (term, leader, _) = self.role;
        ReplicaStatus {
            id: self.config.id,
            role: match raft.state {
                StateRole::Follower => RoleKind::Follower,
                StateRole::PreCandidate => RoleKind::PreCandidate,
                StateRole::Candidate => RoleKind::Candidate,
                StateRole::Leader => RoleKind::Leader,
            },
            term,
            leader,
            commit: raft.raft_log.committed,
            applied: self.applied,
            last: raft.raft_log.last_index(),
            first: image.base.index + 1,
            snapshot: image.snapshot.as_ref().map_or(0, |snapshot| snapshot.id.index),
            members: self.members.clone(),
            peers: self.peers(),
            joint_ticks: self.joint_since.map_or(0, |since| (self.ticks - since).max(1)),
            transfer: raft.lead_transferee.map(NodeId),
            storage_full: self.full,
            removed: self.gone,
            boot: self.boot,
            refused: self.refused.clone(),
            last_refusal: self.last_refusal,
        }
    }

    fn peers(&self) -> BTreeMap<NodeId, PeerProgress> {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader {
            return BTreeMap::new();
        }
        let patience = 3 * self.config.heartbeat_ticks as u64;
        let answers =
            |id| self.heard.get(&id).is_some_and(|heard| self.ticks - heard.ticks <= patience);
        let others = raft.prs().iter().filter(|(id, _)| **id != raft.id);
        others
            .map(|(id, progress)| {
                let id = NodeId(*id);
                let peer = PeerProgress {
                    matched: progress.matched,
                    recent_active: progress.recent_active,
                    answers: answers(id),
                    full: self.heard.get(&id).is_some_and(|heard| heard.full),
                    snapshot: progress.state == ProgressState::Snapshot,
                    voter: self.members.is_voter(id),
                };
                (id, peer)
            })
            .collect()
    }

    /// The voter that would take over best.
    fn heir(&self) -> Option<NodeId> {
        heir(&self.peers())
    }

    fn leads(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    fn id(&self) -> NodeId {
        self.config.id
    }
}

/// The voter that would take over best: heard of lately, with room on its disk, and furthest.
pub(crate) fn heir(peers: &BTreeMap<NodeId, PeerProgress>) -> Option<NodeId> {
    let fit = peers.iter().filter(|(_, peer)| peer.voter && peer.recent_active && !peer.full);
    fit.max_by_key(|(id, peer)| (peer.matched, std::cmp::Reverse(**id))).map(|(id, _)| *id)
}
