//! The gate: what a peer sent is looked at here, whole, before consensus sees any of it.
//!
//! The consensus library trusts its messages: an unknown number, an index out of step or a commit
//! beyond the log ends the process, and an entry that cannot be read ends every process that ever
//! applies it. So each message is rebuilt field by field, and a field that its kind does not have
//! must be empty.

mod entries;
mod snapshot;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use planner::NodeId;
use raft::eraftpb as rb;
use wire::pb::{self, RaftKind};

use super::api::ClusterId;
use super::convert;
use super::members::MemberSet;

/// Most bytes of a message as it travels.
pub const MESSAGE_MAX: usize = super::payload::SNAPSHOT_MAX + (1 << 20);
// What passes the gate passes the connection.
const _: () = assert!(MESSAGE_MAX < wire::transport::CONTROL_MESSAGE_MAX);
/// Most bytes of one entry's content.
pub const ENTRY_MAX: usize = 4 << 20;
/// Most bytes of all entries of a message.
pub const ENTRIES_BYTES_MAX: usize = 8 << 20;
/// Most entries of a message.
pub const ENTRIES_MAX: usize = 1 << 16;
/// Terms and indexes stay below this, so that adding to them cannot overflow.
pub const POSITION_MAX: u64 = 1 << 62;
/// Bytes of a read's context: node, life and number.
pub(super) const READ_CONTEXT: usize = 24;
/// What consensus writes into a vote that the leader asked for.
const TRANSFER_CONTEXT: &[u8] = b"CampaignTransfer";

/// What the gate knows about this node while it looks at a message.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// This node.
    pub id: NodeId,
    /// Its cluster.
    pub cluster: ClusterId,
    /// The members as far as this node has applied the log; empty for one that waits to join.
    pub members: &'a MemberSet,
    /// Those that were members once.
    pub removed: &'a BTreeSet<NodeId>,
    /// Current term.
    pub term: u64,
    /// Who leads in it, if known; this node itself when it does.
    pub leader: Option<NodeId>,
    /// The leader was heard within the shortest election timeout, or is this node.
    pub lease: bool,
    /// The last entry of the log.
    pub last: u64,
}

impl Context<'_> {
    fn leading(&self) -> bool {
        self.leader == Some(self.id)
    }

    fn joining(&self) -> bool {
        self.members.voters.is_empty()
    }
}

/// Why a message was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GateError {
    /// Not a message at all.
    #[error("not a message")]
    Undecodable,
    /// Something is larger than it may be.
    #[error("{what} too large")]
    TooLarge {
        /// What.
        what: &'static str,
    },
    /// A message of another cluster.
    #[error("a message of another cluster")]
    OtherCluster,
    /// It is addressed to another node.
    #[error("a message to node {to}")]
    NotForUs {
        /// To which.
        to: NodeId,
    },
    /// It names another sender than the node at the other end of the connection.
    #[error("a message in the name of node {claimed}")]
    NotFromPeer {
        /// Whom it names.
        claimed: NodeId,
    },
    /// A kind that this release does not know, or that may not travel.
    #[error("a message of unknown kind {kind}")]
    UnknownKind {
        /// The number.
        kind: i32,
    },
    /// The sender was a member once.
    #[error("node {from} was removed")]
    Removed {
        /// The sender.
        from: NodeId,
    },
    /// The sender is not a member as far as this node knows.
    #[error("node {from} is not a member")]
    NotMember {
        /// The sender.
        from: NodeId,
    },
    /// This node has not joined yet and has no say.
    #[error("this node has not joined yet")]
    Joining,
    /// A term that cannot be.
    #[error("a term that cannot be")]
    BadTerm,
    /// An index that cannot be.
    #[error("{what} cannot be")]
    BadIndex {
        /// Which.
        what: &'static str,
    },
    /// A heartbeat commits what this node does not have: its log is not what it acknowledged.
    #[error("a heartbeat commits {commit}, the log ends at {last}")]
    BeyondLog {
        /// What the leader takes for committed here.
        commit: u64,
        /// The last entry here.
        last: u64,
    },
    /// Only the leader of the term may say this.
    #[error("node {from} does not lead")]
    NotLeader {
        /// The sender.
        from: NodeId,
    },
    /// Somebody else leads in this term.
    #[error("node {from} leads in a term that has a leader")]
    SecondLeader {
        /// The sender.
        from: NodeId,
    },
    /// Only a leader answers this, and this node is none.
    #[error("this node does not lead")]
    NotLeading,
    /// An entry's kind that this release does not know.
    #[error("entry {index} of unknown kind {kind}")]
    UnknownEntryKind {
        /// The entry.
        index: u64,
        /// The number.
        kind: i32,
    },
    /// Entries that are not consecutive, or whose terms go down.
    #[error("entry {index} does not follow the one before")]
    Sequence {
        /// The entry.
        index: u64,
    },
    /// An entry whose content this release cannot read.
    #[error("entry {index} cannot be read")]
    BadPayload {
        /// The entry.
        index: u64,
    },
    /// A change of members that cannot be.
    #[error("the change in entry {index} cannot be read")]
    BadChange {
        /// The entry.
        index: u64,
    },
    /// A snapshot that cannot be.
    #[error("a snapshot whose {what} cannot be")]
    BadSnapshot {
        /// What of it.
        what: &'static str,
    },
    /// A context that cannot be.
    #[error("a context that cannot be")]
    BadContext,
    /// A field that this kind of message does not have.
    #[error("{field} in a message that has none")]
    Surplus {
        /// The field.
        field: &'static str,
    },
}

impl GateError {
    /// A stable name, for counting.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Undecodable => "undecodable",
            Self::TooLarge { .. } => "too_large",
            Self::OtherCluster => "other_cluster",
            Self::NotForUs { .. } => "not_for_us",
            Self::NotFromPeer { .. } => "not_from_peer",
            Self::UnknownKind { .. } => "unknown_kind",
            Self::Removed { .. } => "removed",
            Self::NotMember { .. } => "not_member",
            Self::Joining => "joining",
            Self::BadTerm => "bad_term",
            Self::BadIndex { .. } => "bad_index",
            Self::BeyondLog { .. } => "beyond_log",
            Self::NotLeader { .. } => "not_leader",
            Self::SecondLeader { .. } => "second_leader",
            Self::NotLeading => "not_leading",
            Self::UnknownEntryKind { .. } => "unknown_entry_kind",
            Self::Sequence { .. } => "sequence",
            Self::BadPayload { .. } => "bad_payload",
            Self::BadChange { .. } => "bad_change",
            Self::BadSnapshot { .. } => "bad_snapshot",
            Self::BadContext => "bad_context",
            Self::Surplus { .. } => "surplus",
        }
    }
}

/// What came through.
#[derive(Debug, Clone)]
pub struct Checked(pub(super) Passed);

/// What a checked message is.
#[derive(Debug, Clone)]
pub(super) enum Passed {
    /// For consensus.
    Raft(Box<rb::Message>),
    /// This node was removed, says a member that has applied it.
    Removed,
}

/// Decodes and checks: the whole way of bytes from a peer.
///
/// # Errors
/// [`GateError`].
pub fn decode_and_check(
    bytes: &[u8],
    from: NodeId,
    context: &Context<'_>,
) -> Result<Checked, GateError> {
    if bytes.len() > MESSAGE_MAX {
        return Err(GateError::TooLarge { what: "message" });
    }
    let message = wire::message_from_bytes(bytes).ok_or(GateError::Undecodable)?;
    check(message, from, context)
}

/// Checks a message that arrived over a connection whose peer is proved to be `from`.
///
/// # Errors
/// [`GateError`].
pub fn check(
    message: pb::RaftMessage,
    from: NodeId,
    context: &Context<'_>,
) -> Result<Checked, GateError> {
    if message.cluster.as_ref() != context.cluster.0 {
        return Err(GateError::OtherCluster);
    }
    if message.from != from.0 || message.from == 0 || from == context.id {
        return Err(GateError::NotFromPeer { claimed: NodeId(message.from) });
    }
    if message.to != context.id.0 {
        return Err(GateError::NotForUs { to: NodeId(message.to) });
    }
    let unknown = GateError::UnknownKind { kind: message.kind };
    let kind = RaftKind::try_from(message.kind).map_err(|_| unknown)?;
    if kind == RaftKind::Unspecified {
        return Err(unknown);
    }
    standing(kind, from, &message, context)?;
    positions(kind, &message)?;
    surplus(kind, &message)?;
    if kind == RaftKind::Removed {
        return Ok(Checked(Passed::Removed));
    }
    leadership(kind, from, &message, context)?;
    reach(kind, &message, context)?;
    contexts(kind, from, &message, context)?;
    let out = rebuild(kind, &message)?;
    Ok(Checked(Passed::Raft(Box::new(out))))
}

fn from_leader(kind: RaftKind) -> bool {
    matches!(kind, RaftKind::Append | RaftKind::Heartbeat | RaftKind::Snapshot)
}

fn is_vote(kind: RaftKind) -> bool {
    matches!(kind, RaftKind::Vote | RaftKind::PreVote)
}

/// Whether the sender may say anything of this kind.
///
/// A node that lags behind does not know its newest members yet, and one of those may lead by now:
/// refusing all strangers would shut it out for ever. So a stranger of this cluster (which its
/// certificate proves) may lead or stand for election where no leader is heard, as Raft's own
/// rules have it; where one is, nobody unknown gets a word in.
fn standing(
    kind: RaftKind,
    from: NodeId,
    message: &pb::RaftMessage,
    context: &Context<'_>,
) -> Result<(), GateError> {
    let leads = context.leader == Some(from) && message.term == context.term;
    if context.members.contains(from) || leads {
        if context.joining() && is_vote(kind) {
            return Err(GateError::Joining);
        }
        return Ok(());
    }
    if context.removed.contains(&from) {
        return Err(GateError::Removed { from });
    }
    // Without a member there is no vote: an answer from here would be in term 0.
    if context.joining() && is_vote(kind) {
        return Err(GateError::Joining);
    }
    let may = from_leader(kind) || is_vote(kind);
    if may && !context.lease { Ok(()) } else { Err(GateError::NotMember { from }) }
}

/// Terms and indexes within what can be added to, and each position whole or absent.
fn positions(kind: RaftKind, message: &pb::RaftMessage) -> Result<(), GateError> {
    // Consensus takes term 0 for a message to itself; only a read on its way to the leader has it.
    let needs_term = kind != RaftKind::ReadIndex;
    if (message.term == 0) == needs_term || message.term >= POSITION_MAX {
        return Err(GateError::BadTerm);
    }
    if message.log_term > message.term || message.commit_term > message.term {
        return Err(GateError::BadTerm);
    }
    let indexes = [message.index, message.commit, message.reject_hint];
    if indexes.iter().any(|index| *index >= POSITION_MAX) {
        return Err(GateError::BadIndex { what: "an index" });
    }
    // Beyond its log, consensus takes the term for 0: a position without a term matches there.
    let paired = matches!(kind, RaftKind::Append | RaftKind::Vote | RaftKind::PreVote);
    if paired && (message.index == 0) != (message.log_term == 0) {
        return Err(GateError::BadIndex { what: "a position with half its parts" });
    }
    if is_vote(kind) && message.commit > message.index {
        return Err(GateError::BadIndex { what: "a commit beyond the candidate's log" });
    }
    if kind == RaftKind::AppendResponse && message.reject && message.reject_hint > message.index {
        return Err(GateError::BadIndex { what: "a hint beyond what was refused" });
    }
    Ok(())
}

/// Fields that the kind does not have.
fn surplus(kind: RaftKind, message: &pb::RaftMessage) -> Result<(), GateError> {
    use RaftKind as K;
    let responses = matches!(kind, K::AppendResponse | K::VoteResponse | K::PreVoteResponse);
    let has_context = is_vote(kind) || matches!(kind, K::Heartbeat | K::HeartbeatResponse);
    let reads = matches!(kind, K::ReadIndex | K::ReadIndexResponse);
    let position = matches!(kind, K::Append | K::AppendResponse) || is_vote(kind);
    let votes = is_vote(kind) || matches!(kind, K::VoteResponse | K::PreVoteResponse);
    let fields = [
        ("entries", !message.entries.is_empty(), kind == K::Append || reads),
        ("snapshot", message.snapshot.is_some(), kind == K::Snapshot),
        ("context", !message.context.is_empty(), has_context),
        ("reject", message.reject, responses),
        ("reject_hint", message.reject_hint != 0, kind == K::AppendResponse && message.reject),
        ("log_term", message.log_term != 0, position),
        (
            "index",
            message.index != 0,
            position || matches!(kind, K::ReadIndexResponse | K::Removed),
        ),
        ("commit_term", message.commit_term != 0, votes),
    ];
    match fields.iter().find(|(_, there, may)| *there && !may) {
        Some((field, ..)) => Err(GateError::Surplus { field }),
        None => Ok(()),
    }
}

/// What only the leader may say.
fn leadership(
    kind: RaftKind,
    from: NodeId,
    message: &pb::RaftMessage,
    context: &Context<'_>,
) -> Result<(), GateError> {
    let leads = context.leader == Some(from) && message.term == context.term;
    match kind {
        RaftKind::TimeoutNow | RaftKind::ReadIndexResponse if !leads => {
            Err(GateError::NotLeader { from })
        }
        _ if from_leader(kind) => {
            let other = context.leader.is_some_and(|leader| leader != from);
            let second = other && message.term == context.term;
            if second { Err(GateError::SecondLeader { from }) } else { Ok(()) }
        }
        // A follower would hand it on in the name of its sender, which nobody would believe.
        RaftKind::ReadIndex if !context.leading() => Err(GateError::NotLeading),
        _ => Ok(()),
    }
}

/// Indexes that must lie within this node's log.
fn reach(
    kind: RaftKind,
    message: &pb::RaftMessage,
    context: &Context<'_>,
) -> Result<(), GateError> {
    // What an older term says is only answered, and the log may have been shortened since.
    let current = message.term >= context.term;
    if kind == RaftKind::Heartbeat && current && message.commit > context.last {
        return Err(GateError::BeyondLog { commit: message.commit, last: context.last });
    }
    let answered = kind == RaftKind::AppendResponse && message.term == context.term;
    if answered && context.leading() && message.index > context.last {
        return Err(GateError::BadIndex { what: "an answer for entries never sent" });
    }
    Ok(())
}

/// Contexts, which consensus hands through.
fn contexts(
    kind: RaftKind,
    from: NodeId,
    message: &pb::RaftMessage,
    context: &Context<'_>,
) -> Result<(), GateError> {
    let bytes = message.context.as_ref();
    let fits = match kind {
        _ if is_vote(kind) => bytes.is_empty() || bytes == TRANSFER_CONTEXT,
        RaftKind::Heartbeat | RaftKind::HeartbeatResponse => {
            bytes.is_empty() || bytes.len() == READ_CONTEXT
        }
        // The reader's own number: it must be the sender's, and come back to whom it names.
        RaftKind::ReadIndex => reader(message) == Some(from),
        RaftKind::ReadIndexResponse => reader(message) == Some(context.id),
        _ => true,
    };
    if fits { Ok(()) } else { Err(GateError::BadContext) }
}

/// Which node a read's only entry names. Consensus reads its first entry without asking whether
/// there is one.
fn reader(message: &pb::RaftMessage) -> Option<NodeId> {
    let [entry] = message.entries.as_slice() else { return None };
    let plain = entry.index == 0 && entry.term == 0 && entry.context.is_empty();
    if !plain || entry.kind != pb::RaftEntryKind::Normal as i32 || entry.data.len() != READ_CONTEXT
    {
        return None;
    }
    let node = entry.data.first_chunk::<8>()?;
    Some(NodeId(u64::from_be_bytes(*node)))
}

/// The message as consensus has it.
fn rebuild(kind: RaftKind, message: &pb::RaftMessage) -> Result<rb::Message, GateError> {
    let unknown = GateError::UnknownKind { kind: message.kind };
    let mut out = rb::Message::default();
    out.set_msg_type(convert::kind_to_raft(kind).ok_or(unknown)?);
    out.from = message.from;
    out.to = message.to;
    out.term = message.term;
    out.log_term = message.log_term;
    out.index = message.index;
    out.commit = message.commit;
    out.commit_term = message.commit_term;
    out.reject = message.reject;
    out.reject_hint = message.reject_hint;
    out.context = message.context.to_vec().into();
    match kind {
        RaftKind::Append => out.set_entries(entries::check(message)?.into()),
        RaftKind::ReadIndex | RaftKind::ReadIndexResponse => {
            let mut entry = rb::Entry::default();
            entry.data =
                message.entries.first().map(|entry| entry.data.to_vec()).unwrap_or_default().into();
            out.set_entries(vec![entry].into());
        }
        RaftKind::Snapshot => out.set_snapshot(snapshot::check(message)?),
        _ => {}
    }
    Ok(out)
}
