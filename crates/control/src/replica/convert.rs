//! Field by field between consensus' types, ours, and those on the wire. Nothing is decoded or
//! encoded by the consensus library but its own proposals.

use std::collections::BTreeSet;

use planner::NodeId;
use raft::eraftpb as rb;
use wire::pb;

use super::api::ClusterId;
use super::members::MemberSet;
use super::store::{EntryKind, HardState, LogEntry, LogId, Snapshot};

fn ids(list: &[u64]) -> BTreeSet<NodeId> {
    list.iter().copied().map(NodeId).collect()
}

fn numbers(set: &BTreeSet<NodeId>) -> Vec<u64> {
    set.iter().map(|id| id.0).collect()
}

pub(super) fn members_from_raft(state: &rb::ConfState) -> MemberSet {
    MemberSet {
        voters: ids(state.get_voters()),
        outgoing: ids(state.get_voters_outgoing()),
        learners: ids(state.get_learners()),
        learners_next: ids(state.get_learners_next()),
        auto_leave: state.auto_leave,
    }
}

pub(super) fn members_to_raft(members: &MemberSet) -> rb::ConfState {
    let mut state = rb::ConfState::default();
    state.set_voters(numbers(&members.voters));
    state.set_voters_outgoing(numbers(&members.outgoing));
    state.set_learners(numbers(&members.learners));
    state.set_learners_next(numbers(&members.learners_next));
    state.auto_leave = members.auto_leave;
    state
}

pub(super) fn members_to_wire(members: &MemberSet) -> pb::RaftMembers {
    pb::RaftMembers {
        voters: numbers(&members.voters),
        learners: numbers(&members.learners),
        outgoing: numbers(&members.outgoing),
        learners_next: numbers(&members.learners_next),
        auto_leave: members.auto_leave,
    }
}

pub(super) fn members_from_wire(members: &pb::RaftMembers) -> MemberSet {
    MemberSet {
        voters: ids(&members.voters),
        outgoing: ids(&members.outgoing),
        learners: ids(&members.learners),
        learners_next: ids(&members.learners_next),
        auto_leave: members.auto_leave,
    }
}

pub(super) fn hard_state_from_raft(state: &rb::HardState) -> HardState {
    HardState { term: state.term, vote: state.vote, commit: state.commit }
}

pub(super) fn hard_state_to_raft(state: &HardState) -> rb::HardState {
    let HardState { term, vote, commit } = *state;
    rb::HardState { term, vote, commit, ..rb::HardState::default() }
}

/// `None` for the kind of change that this release never writes.
pub(super) fn entry_from_raft(entry: &rb::Entry) -> Option<LogEntry> {
    let kind = match entry.get_entry_type() {
        rb::EntryType::EntryNormal => EntryKind::Normal,
        rb::EntryType::EntryConfChangeV2 => EntryKind::Change,
        rb::EntryType::EntryConfChange => return None,
    };
    Some(LogEntry {
        id: LogId { index: entry.index, term: entry.term },
        kind,
        data: entry.data.to_vec(),
        context: entry.context.to_vec(),
    })
}

pub(super) fn entry_to_raft(entry: &LogEntry) -> rb::Entry {
    let mut out = rb::Entry {
        index: entry.id.index,
        term: entry.id.term,
        data: entry.data.clone().into(),
        context: entry.context.clone().into(),
        ..rb::Entry::default()
    };
    out.set_entry_type(match entry.kind {
        EntryKind::Normal => rb::EntryType::EntryNormal,
        EntryKind::Change => rb::EntryType::EntryConfChangeV2,
    });
    out
}

pub(super) fn snapshot_from_raft(snapshot: &rb::Snapshot) -> Snapshot {
    let meta = snapshot.get_metadata();
    Snapshot {
        id: LogId { index: meta.index, term: meta.term },
        members: members_from_raft(meta.get_conf_state()),
        body: snapshot.data.to_vec(),
    }
}

pub(super) fn snapshot_to_raft(snapshot: &Snapshot) -> rb::Snapshot {
    let data = snapshot.body.clone().into();
    let mut out = rb::Snapshot { data, ..rb::Snapshot::default() };
    let meta = out.mut_metadata();
    meta.index = snapshot.id.index;
    meta.term = snapshot.id.term;
    meta.set_conf_state(members_to_raft(&snapshot.members));
    out
}

/// Each kind that may travel, once.
const KINDS: [(rb::MessageType, pb::RaftKind); 12] = [
    (rb::MessageType::MsgAppend, pb::RaftKind::Append),
    (rb::MessageType::MsgAppendResponse, pb::RaftKind::AppendResponse),
    (rb::MessageType::MsgRequestVote, pb::RaftKind::Vote),
    (rb::MessageType::MsgRequestVoteResponse, pb::RaftKind::VoteResponse),
    (rb::MessageType::MsgRequestPreVote, pb::RaftKind::PreVote),
    (rb::MessageType::MsgRequestPreVoteResponse, pb::RaftKind::PreVoteResponse),
    (rb::MessageType::MsgSnapshot, pb::RaftKind::Snapshot),
    (rb::MessageType::MsgHeartbeat, pb::RaftKind::Heartbeat),
    (rb::MessageType::MsgHeartbeatResponse, pb::RaftKind::HeartbeatResponse),
    (rb::MessageType::MsgTimeoutNow, pb::RaftKind::TimeoutNow),
    (rb::MessageType::MsgReadIndex, pb::RaftKind::ReadIndex),
    (rb::MessageType::MsgReadIndexResp, pb::RaftKind::ReadIndexResponse),
];

pub(super) fn kind_to_raft(kind: pb::RaftKind) -> Option<rb::MessageType> {
    KINDS.iter().find(|(_, ours)| *ours == kind).map(|(theirs, _)| *theirs)
}

/// `None` for a kind that never travels: consensus would mean it for itself.
pub(super) fn message_to_wire(
    cluster: ClusterId,
    full: bool,
    message: &rb::Message,
) -> Option<pb::RaftMessage> {
    let theirs = message.get_msg_type();
    let kind = KINDS.iter().find(|(kind, _)| *kind == theirs).map(|(_, ours)| *ours)?;
    let snapshot = (kind == pb::RaftKind::Snapshot).then(|| {
        let meta = message.get_snapshot().get_metadata();
        pb::RaftSnapshot {
            index: meta.index,
            term: meta.term,
            members: Some(members_to_wire(&members_from_raft(meta.get_conf_state()))),
            body: message.get_snapshot().data.to_vec().into(),
        }
    });
    Some(pb::RaftMessage {
        cluster: cluster.0.to_vec().into(),
        from: message.from,
        to: message.to,
        kind: kind as i32,
        term: message.term,
        log_term: message.log_term,
        index: message.index,
        entries: message.get_entries().iter().filter_map(entry_to_wire).collect(),
        commit: message.commit,
        commit_term: message.commit_term,
        snapshot,
        reject: message.reject,
        reject_hint: message.reject_hint,
        context: message.context.to_vec().into(),
        full,
    })
}

fn entry_to_wire(entry: &rb::Entry) -> Option<pb::RaftEntry> {
    let entry = entry_from_raft(entry)?;
    Some(stored_entry(entry))
}

/// An entry as it travels and as it is stored.
pub(super) fn stored_entry(entry: LogEntry) -> pb::RaftEntry {
    let kind = match entry.kind {
        EntryKind::Normal => pb::RaftEntryKind::Normal,
        EntryKind::Change => pb::RaftEntryKind::Change,
    };
    pb::RaftEntry {
        index: entry.id.index,
        term: entry.id.term,
        kind: kind as i32,
        data: entry.data.into(),
        context: entry.context.into(),
    }
}

/// `None` for a kind that this release does not know.
pub(super) fn entry_from_wire(entry: &pb::RaftEntry) -> Option<LogEntry> {
    let kind = match pb::RaftEntryKind::try_from(entry.kind) {
        Ok(pb::RaftEntryKind::Normal) => EntryKind::Normal,
        Ok(pb::RaftEntryKind::Change) => EntryKind::Change,
        Ok(pb::RaftEntryKind::Unspecified) | Err(_) => return None,
    };
    Some(LogEntry {
        id: LogId { index: entry.index, term: entry.term },
        kind,
        data: entry.data.to_vec(),
        context: entry.context.to_vec(),
    })
}
