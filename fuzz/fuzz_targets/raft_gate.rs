//! Messages between coordinators: whatever the bytes are, the gate answers, and what it lets
//! through can be written down again.
#![no_main]

use std::collections::BTreeSet;

use control::replica::gate::{Context, decode_and_check};
use control::replica::{ClusterId, MemberSet};
use libfuzzer_sys::fuzz_target;
use planner::NodeId;

fuzz_target!(|data: &[u8]| {
    let Some((&[which, term, last], bytes)) = data.split_first_chunk::<3>() else { return };
    let mut members = MemberSet::of_one(NodeId(1));
    members.voters.extend([NodeId(2), NodeId(3)]);
    if which & 1 == 1 {
        members.outgoing.extend([NodeId(1), NodeId(4)]);
    }
    let removed = BTreeSet::from([NodeId(9)]);
    let context = Context {
        id: NodeId(1),
        cluster: ClusterId([7; 16]),
        members: &members,
        removed: &removed,
        term: term.into(),
        leader: [None, Some(NodeId(1)), Some(NodeId(2))][usize::from(which >> 1) % 3],
        lease: which & 32 == 32,
        last: last.into(),
    };
    let from = NodeId((which >> 3 & 3).into());
    let _ = decode_and_check(bytes, from, &context);
});
