//! A snapshot: whole, and with members that can be.

use raft::eraftpb as rb;
use wire::pb;

use super::{GateError, POSITION_MAX};
use crate::replica::convert;
use crate::replica::members::{MEMBERS_MAX, MemberSet};
use crate::replica::payload::{Body, SNAPSHOT_MAX};
use crate::replica::store::{LogId, Snapshot};

/// The snapshot as consensus has it.
pub(super) fn check(message: &pb::RaftMessage) -> Result<rb::Snapshot, GateError> {
    let bad = |what| GateError::BadSnapshot { what };
    let snapshot = message.snapshot.as_ref().ok_or(bad("content"))?;
    if snapshot.body.len() > SNAPSHOT_MAX + (1 << 20) {
        return Err(GateError::TooLarge { what: "snapshot" });
    }
    let id = LogId { index: snapshot.index, term: snapshot.term };
    let placed = id.index > 0 && id.index < POSITION_MAX && id.term > 0 && id.term <= message.term;
    if !placed {
        return Err(bad("position"));
    }
    let members = members(snapshot.members.as_ref().ok_or(bad("members"))?)?;
    // Consensus would ignore it and the leader would send it again.
    if !members.all().iter().any(|id| id.0 == message.to) {
        return Err(bad("members"));
    }
    Body::decode(&snapshot.body).map_err(|_| bad("checksum"))?;
    let body = snapshot.body.to_vec();
    Ok(convert::snapshot_to_raft(&Snapshot { id, members, body }))
}

/// What consensus would end the process over: members in two places, or nobody who votes.
fn members(wire: &pb::RaftMembers) -> Result<MemberSet, GateError> {
    let bad = Err(GateError::BadSnapshot { what: "members" });
    let lists = [&wire.voters, &wire.outgoing, &wire.learners, &wire.learners_next];
    let members = convert::members_from_wire(wire);
    let distinct = [&members.voters, &members.outgoing, &members.learners, &members.learners_next]
        .iter()
        .zip(lists)
        .all(|(set, list)| set.len() == list.len());
    let named = lists.iter().all(|list| !list.contains(&0));
    if !distinct || !named || members.voters.is_empty() || members.all().len() > MEMBERS_MAX {
        return bad;
    }
    let apart = members.learners.is_disjoint(&members.voters)
        && members.learners.is_disjoint(&members.outgoing)
        && members.learners.is_disjoint(&members.learners_next)
        && members.learners_next.is_disjoint(&members.voters)
        && members.learners_next.is_subset(&members.outgoing);
    let plain = members.is_joint() || (members.learners_next.is_empty() && !members.auto_leave);
    if apart && plain { Ok(members) } else { bad }
}
