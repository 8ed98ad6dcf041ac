//! What goes into a replica and what comes out of it.

use std::collections::BTreeMap;
use std::fmt;

use planner::NodeId;
use wire::pb::RaftMessage;

use super::gate::GateError;
use super::members::{MemberChange, MemberSet};
use super::store::StoreError;

/// Which cluster a node belongs to; no two clusters share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(pub [u8; 16]);

impl fmt::Display for ClusterId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

/// How a replica behaves. Times are in ticks; the caller decides how long one is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaConfig {
    /// This node. Not 0.
    pub id: NodeId,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Silence of the leader after which an election may start; the timeout is drawn from
    /// `[election_ticks, 2 * election_ticks)`. More than `heartbeat_ticks`.
    pub election_ticks: usize,
    /// Between two heartbeats of the leader. Not 0.
    pub heartbeat_ticks: usize,
    /// Election timeouts are drawn from this, the node, its term and a count: the same inputs give
    /// the same run.
    pub seed: u64,
    /// Applied entries between two snapshots. Not 0.
    pub snapshot_entries: u64,
    /// Entries before a snapshot that stay in the log, for followers that lag a little.
    pub keep_entries: u64,
    /// Applied entries between two comparisons of state hashes; 0 for none.
    pub check_entries: u64,
    /// Most bytes of one proposed command.
    pub proposal_max: usize,
    /// Between two attempts to write while the disk is full. Not 0.
    pub probe_ticks: usize,
}

impl ReplicaConfig {
    /// What suits a local network with a tick of 20 ms: heartbeats each 40 ms, elections after 300
    /// to 600 ms of silence.
    pub fn new(id: NodeId, cluster: ClusterId, seed: u64) -> Self {
        Self {
            id,
            cluster,
            election_ticks: 15,
            heartbeat_ticks: 2,
            seed,
            snapshot_entries: 4096,
            keep_entries: 512,
            check_entries: 256,
            proposal_max: 256 << 10,
            probe_ticks: 50,
        }
    }
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "messages are most of them; a box each is no gain")]
pub enum Input {
    /// A tick of the clock.
    Tick,
    /// A message arrived over a connection whose peer is proved to be `from`.
    Message {
        /// The peer of the connection.
        from: NodeId,
        /// What it sent.
        message: RaftMessage,
    },
    /// Put a command into the log. Answered once: `Applied` or `Refused` with this number.
    Propose {
        /// The caller's number for it; unique among those not yet answered.
        request: u64,
        /// The command, encoded.
        command: Vec<u8>,
    },
    /// Wait until the local state contains everything that was acknowledged anywhere before now.
    /// Answered by `ReadReady`, on any member, or never: the deadline is the caller's.
    Read {
        /// The caller's number for it.
        request: u64,
    },
    /// Change the members. Answered once: `Changed` or `Refused`.
    Change {
        /// The caller's number for it.
        request: u64,
        /// The change.
        change: MemberChange,
    },
    /// If this node leads, hand over to that voter. Nothing answers; `Role` tells.
    Transfer {
        /// Who is to lead.
        to: NodeId,
    },
    /// Start an election now if nobody leads, as far as this node knows.
    Campaign,
    /// A message could not be delivered.
    Unreachable {
        /// To whom.
        peer: NodeId,
    },
    /// What became of a message that carried a snapshot. Must follow each one.
    SnapshotSent {
        /// To whom.
        peer: NodeId,
        /// Whether it was handed over whole.
        ok: bool,
    },
    /// The caller no longer waits for this number; nothing answers it any more.
    Forget {
        /// The number.
        request: u64,
    },
}

/// Something to do or to know.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "messages are most of them; a box each is no gain")]
pub enum Output<O> {
    /// Send this. Loss, delay, repetition and any order are fine. After a message with a snapshot
    /// ([`super::carries_snapshot`]) `Input::SnapshotSent` must follow.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        message: RaftMessage,
    },
    /// A command was applied here.
    Applied {
        /// Its entry.
        index: u64,
        /// The number under which it was proposed here, if that is still waited for.
        request: Option<u64>,
        /// What the state machine said.
        outcome: O,
    },
    /// The change of members was applied here.
    Changed {
        /// Its entry.
        index: u64,
        /// The number under which it was asked for here, if that is still waited for.
        request: Option<u64>,
    },
    /// A proposal or a change was not accepted, or its outcome is unknown.
    Refused {
        /// Its number.
        request: u64,
        /// Why.
        why: ProposeError,
    },
    /// A read may be answered from the state as it is now.
    ReadReady {
        /// Its number.
        request: u64,
        /// The state contains at least this entry.
        index: u64,
    },
    /// The term, the leader or this node's part changed.
    Role {
        /// Current term.
        term: u64,
        /// Who leads, if known.
        leader: Option<NodeId>,
        /// Whether this node leads and its state contains everything committed before its term.
        leading: bool,
    },
    /// The members, at the start and after every change.
    Members(MemberSet),
    /// The state machine was replaced by a snapshot.
    Restored {
        /// The last entry it contains.
        index: u64,
    },
    /// Whether there is room on the disk; while there is not, proposals are refused.
    Room {
        /// Whether there is.
        room: bool,
    },
    /// This node is no longer a member. From now on it only answers, which its process should let
    /// it do for a while: a member that does not know yet that the removal is committed may need
    /// its vote to learn so.
    Removed,
}

/// Why a proposal or a change was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Somebody else decides.
    #[error("this node does not lead")]
    NotLeader {
        /// Who does, if known.
        leader: Option<NodeId>,
    },
    /// It is in nobody's log: leadership is being handed over or too much is under way. Try again.
    #[error("dropped; try again")]
    Dropped,
    /// Leadership was lost before the outcome was known: it may or may not happen. Ask again with
    /// the same request id.
    #[error("leadership was lost before the outcome was known")]
    Unknown,
    /// The command is longer than a proposal may be.
    #[error("a command of {got} bytes where at most {limit} may be")]
    TooLarge {
        /// Its length.
        got: usize,
        /// The limit.
        limit: usize,
    },
    /// Another change of members is under way, or may be.
    #[error("another change of members is under way")]
    ChangePending,
    /// The change makes no sense for the members there are.
    #[error("the change does not fit the members: {0}")]
    BadChange(BadChange),
    /// There is no room on the disk.
    #[error("no room on the disk")]
    Full,
    /// This node was removed.
    #[error("this node is no longer a member")]
    Removed,
}

/// Why a change of members makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadChange {
    /// Numbers start at 1.
    #[error("0 is no node")]
    Zero,
    /// It is a member already.
    #[error("it is a member already")]
    Member,
    /// It was a member once; numbers are never used again.
    #[error("it was removed before; its number is never used again")]
    Reused,
    /// Only a learner can be promoted.
    #[error("it is not a learner")]
    NotLearner,
    /// It has none of the log yet, as far as this leader knows: with a vote it could not use, it
    /// might keep the others from deciding anything.
    #[error("it has not caught up")]
    NotCaughtUp,
    /// Only a member can be removed.
    #[error("it is not a member")]
    NotMember,
    /// Somebody must vote.
    #[error("it is the last voter")]
    LastVoter,
    /// There are as many members as there may be.
    #[error("there are as many members as there may be")]
    TooMany,
}

/// Why the process must end. Nothing may be tried again.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// The disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store or the configuration is not what this way of starting asks for.
    #[error("cannot start: {what}")]
    Start {
        /// Why.
        what: &'static str,
    },
    /// This replica's state is not the leader's.
    #[error("the state after entry {index} differs from the leader's")]
    StateDiverged {
        /// The entry.
        index: u64,
    },
    /// A snapshot that the state machine cannot take.
    #[error("the snapshot at entry {index} cannot be restored: {source}")]
    Restore {
        /// Its last entry.
        index: u64,
        /// What the state machine said.
        source: RestoreError,
    },
    /// An entry that this release cannot read.
    #[error("entry {index} cannot be read")]
    Payload {
        /// The entry.
        index: u64,
    },
    /// The consensus library refused something that it must not refuse.
    #[error("consensus: {0}")]
    Raft(String),
    /// A fatal error came before.
    #[error("it failed before")]
    Failed,
}

/// Why a state machine cannot take a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RestoreError(pub String);

/// What is replicated: a state that only commands change, the same way everywhere.
pub trait Machine {
    /// What a command leads to; goes to whoever proposed it.
    type Outcome;

    /// Does what the entry says. Must not depend on anything but the state and the command, and
    /// must take any bytes: a command that makes no sense has an outcome too.
    fn apply(&mut self, index: u64, command: &[u8]) -> Self::Outcome;

    /// The whole state, encoded.
    fn snapshot(&self) -> Vec<u8>;

    /// Replaces the state.
    ///
    /// # Errors
    /// [`RestoreError`]; the state is as before then.
    fn restore(&mut self, bytes: &[u8]) -> Result<(), RestoreError>;

    /// A hash of the whole state; equal on every replica after the same entry.
    fn hash(&self) -> [u8; 32];
}

/// What a replica is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoleKind {
    /// Follows, or waits for a leader.
    Follower,
    /// Asks whether an election could be won.
    PreCandidate,
    /// Asks for votes.
    Candidate,
    /// Leads.
    Leader,
}

/// How far a peer is, as the leader knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerProgress {
    /// Its log agrees with the leader's up to here.
    pub matched: u64,
    /// It answered within the last election timeout.
    pub recent_active: bool,
    /// It was heard within the last three heartbeats: it is there now.
    pub answers: bool,
    /// Its disk was full when it was last heard.
    pub full: bool,
    /// A snapshot is on its way to it.
    pub snapshot: bool,
    /// Its vote counts.
    pub voter: bool,
}

/// Where a replica stands.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplicaStatus {
    /// This node.
    pub id: NodeId,
    /// What it is doing.
    pub role: RoleKind,
    /// Current term.
    pub term: u64,
    /// Who leads, if known.
    pub leader: Option<NodeId>,
    /// Known to be committed.
    pub commit: u64,
    /// Applied to the state machine.
    pub applied: u64,
    /// The last entry of the log.
    pub last: u64,
    /// The first entry still in the log.
    pub first: u64,
    /// The last entry of the newest snapshot.
    pub snapshot: u64,
    /// The members as of `applied`.
    pub members: MemberSet,
    /// Every other member, when this node leads.
    pub peers: BTreeMap<NodeId, PeerProgress>,
    /// For how many ticks the configuration has been joint; 0 when it is not.
    pub joint_ticks: u64,
    /// Whom leadership is being handed to.
    pub transfer: Option<NodeId>,
    /// There is no room on the disk.
    pub storage_full: bool,
    /// This node is no longer a member.
    pub removed: bool,
    /// How often this node has started.
    pub boot: u64,
    /// Messages refused at the gate, by kind ([`GateError::kind`]).
    pub refused: BTreeMap<&'static str, u64>,
    /// Why the last one was.
    pub last_refusal: Option<GateError>,
}
