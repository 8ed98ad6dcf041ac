//! What is inside entries and snapshots: our own envelope, so that consensus carries bytes and a
//! new kind of entry is never a new kind to consensus.

use planner::NodeId;
use wire::{message_from_bytes, message_to_bytes, pb};

use super::members::MEMBERS_MAX;

/// Most bytes of the state within a snapshot.
pub const SNAPSHOT_MAX: usize = 64 << 20;
/// Most removed members that a snapshot names.
const REMOVED_MAX: usize = 1 << 16;

/// Who waits for an entry's outcome: one process' life of one node, and its number for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) node: NodeId,
    pub(super) boot: u64,
    pub(super) request: u64,
}

impl Origin {
    pub(super) fn encode(self) -> Vec<u8> {
        let Self { node, boot, request } = self;
        message_to_bytes(&pb::RaftOrigin { node: node.0, boot, request })
    }

    /// `Ok(None)` for no bytes: nobody waits.
    pub(super) fn decode(bytes: &[u8]) -> Result<Option<Self>, Unreadable> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let pb::RaftOrigin { node, boot, request } = message_from_bytes(bytes).ok_or(Unreadable)?;
        Ok(Some(Self { node: NodeId(node), boot, request }))
    }
}

/// Bytes that are not what they must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unreadable;

/// The content of a normal entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Payload {
    /// Consensus' own entry: the first of a leader's term, or a change that it dropped.
    Empty,
    /// A command of the state machine.
    Command(Vec<u8>),
    /// The leader's state hash after an entry.
    Checkpoint { index: u64, hash: [u8; 32] },
}

impl Payload {
    pub(super) fn encode(&self) -> Vec<u8> {
        let body = match self {
            Self::Empty => return Vec::new(),
            Self::Command(bytes) => pb::raft_payload::Body::Command(bytes.clone().into()),
            Self::Checkpoint { index, hash } => {
                let hash = hash.to_vec().into();
                pb::raft_payload::Body::Checkpoint(pb::RaftCheckpoint { index: *index, hash })
            }
        };
        message_to_bytes(&pb::RaftPayload { body: Some(body) })
    }

    /// A body of an unknown kind is unreadable: it must not be skipped, because the newer replica
    /// that proposed it will not skip it.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Unreadable> {
        if bytes.is_empty() {
            return Ok(Self::Empty);
        }
        let payload: pb::RaftPayload = message_from_bytes(bytes).ok_or(Unreadable)?;
        match payload.body.ok_or(Unreadable)? {
            pb::raft_payload::Body::Command(command) => Ok(Self::Command(command.to_vec())),
            pb::raft_payload::Body::Checkpoint(checkpoint) => {
                let hash = checkpoint.hash.as_ref().try_into().map_err(|_| Unreadable)?;
                Ok(Self::Checkpoint { index: checkpoint.index, hash })
            }
        }
    }
}

/// The change that an entry asks for; the empty entry is the one that leaves joint consensus.
pub(super) fn decode_change(bytes: &[u8]) -> Result<raft::eraftpb::ConfChangeV2, Unreadable> {
    use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2};

    let change: pb::RaftChange = message_from_bytes(bytes).ok_or(Unreadable)?;
    if change.changes.len() > MEMBERS_MAX || !change.context.is_empty() {
        return Err(Unreadable);
    }
    let mut out = ConfChangeV2::default();
    out.set_transition(match pb::RaftTransition::try_from(change.transition) {
        Ok(pb::RaftTransition::Auto) => ConfChangeTransition::Auto,
        Ok(pb::RaftTransition::Implicit) => ConfChangeTransition::Implicit,
        // Leaves joint consensus only when asked to: nothing here ever asks.
        Ok(pb::RaftTransition::Explicit) | Err(_) => return Err(Unreadable),
    });
    let mut singles = Vec::with_capacity(change.changes.len());
    for one in &change.changes {
        // Consensus takes node 0 for "decided not to": here nobody decides so.
        if one.node == 0 {
            return Err(Unreadable);
        }
        let mut single = ConfChangeSingle { node_id: one.node, ..ConfChangeSingle::default() };
        single.set_change_type(match pb::RaftChangeType::try_from(one.kind) {
            Ok(pb::RaftChangeType::AddVoter) => ConfChangeType::AddNode,
            Ok(pb::RaftChangeType::Remove) => ConfChangeType::RemoveNode,
            Ok(pb::RaftChangeType::AddLearner) => ConfChangeType::AddLearnerNode,
            Err(_) => return Err(Unreadable),
        });
        singles.push(single);
    }
    // An implicit change of nothing would enter joint consensus for nothing.
    if singles.is_empty() && change.transition != pb::RaftTransition::Auto as i32 {
        return Err(Unreadable);
    }
    out.set_changes(singles.into());
    Ok(out)
}

/// The content of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Body {
    pub(super) state: Vec<u8>,
    pub(super) hash: [u8; 32],
    pub(super) removed: Vec<NodeId>,
}

impl Body {
    pub(super) fn encode(self) -> Vec<u8> {
        let checksum = blake3::hash(&self.state).as_bytes().to_vec().into();
        message_to_bytes(&pb::RaftSnapshotBody {
            state: self.state.into(),
            state_hash: self.hash.to_vec().into(),
            checksum,
            removed: self.removed.iter().map(|id| id.0).collect(),
        })
    }

    /// Checks the checksum too.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Unreadable> {
        let body: pb::RaftSnapshotBody = message_from_bytes(bytes).ok_or(Unreadable)?;
        let fits = body.state.len() <= SNAPSHOT_MAX && body.removed.len() <= REMOVED_MAX;
        if !fits || body.checksum.as_ref() != blake3::hash(&body.state).as_bytes() {
            return Err(Unreadable);
        }
        Ok(Self {
            state: body.state.to_vec(),
            hash: body.state_hash.as_ref().try_into().map_err(|_| Unreadable)?,
            removed: body.removed.into_iter().map(NodeId).collect(),
        })
    }
}
