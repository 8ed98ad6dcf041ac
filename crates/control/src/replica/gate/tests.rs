//! Each trap of the consensus library, by name. Where the library ends the process or believes a
//! stranger, a test beside it shows that it does, so that the gate's check is known to be needed.

use std::panic::AssertUnwindSafe;

use raft::storage::MemStorage;
use raft::{Config, RawNode};

use super::*;
use crate::replica::payload::{Body, Origin, Payload};

const CLUSTER: ClusterId = ClusterId([5; 16]);
const US: u64 = 1;
const LEADER: u64 = 2;
const PEER: u64 = 3;
const STRANGER: u64 = 9;
const GONE: u64 = 8;
const TERM: u64 = 5;
const LAST: u64 = 20;

fn ids(list: &[u64]) -> BTreeSet<NodeId> {
    list.iter().copied().map(NodeId).collect()
}

fn members() -> MemberSet {
    MemberSet { voters: ids(&[1, 2, 3]), ..MemberSet::default() }
}

/// Looks at a message as a follower of node 2 in term 5 whose log ends at 20.
fn follower(message: pb::RaftMessage) -> Result<rb::Message, GateError> {
    with(message, |_| {})
}

fn with(
    message: pb::RaftMessage,
    change: impl FnOnce(&mut Context<'_>),
) -> Result<rb::Message, GateError> {
    let (members, removed) = (members(), ids(&[GONE]));
    let mut context = Context {
        id: NodeId(US),
        cluster: CLUSTER,
        members: &members,
        removed: &removed,
        term: TERM,
        leader: Some(NodeId(LEADER)),
        lease: true,
        last: LAST,
    };
    change(&mut context);
    let from = NodeId(message.from);
    match check(message, from, &context)?.0 {
        Passed::Raft(message) => Ok(*message),
        Passed::Removed => Ok(rb::Message::default()),
    }
}

fn leading(message: pb::RaftMessage) -> Result<rb::Message, GateError> {
    with(message, |context| context.leader = Some(NodeId(US)))
}

fn message(kind: RaftKind, from: u64) -> pb::RaftMessage {
    pb::RaftMessage {
        cluster: CLUSTER.0.to_vec().into(),
        from,
        to: US,
        kind: kind as i32,
        term: TERM,
        ..pb::RaftMessage::default()
    }
}

fn append(entries: Vec<pb::RaftEntry>) -> pb::RaftMessage {
    pb::RaftMessage { index: LAST, log_term: TERM, entries, ..message(RaftKind::Append, LEADER) }
}

fn entry(index: u64, term: u64) -> pb::RaftEntry {
    pb::RaftEntry {
        index,
        term,
        kind: pb::RaftEntryKind::Normal as i32,
        data: Payload::Command(b"a".to_vec()).encode().into(),
        context: Origin { node: NodeId(2), boot: 1, request: 1 }.encode().into(),
    }
}

fn read_entry(node: u64) -> pb::RaftEntry {
    let context: Vec<u8> = [node, 1, 1].iter().flat_map(|part| part.to_be_bytes()).collect();
    pb::RaftEntry {
        kind: pb::RaftEntryKind::Normal as i32,
        data: context.into(),
        ..pb::RaftEntry::default()
    }
}

fn snapshot() -> pb::RaftMessage {
    let body = Body { state: b"state".to_vec(), hash: [1; 32], removed: vec![NodeId(GONE)] };
    let members = convert::members_to_wire(&members());
    let snapshot =
        pb::RaftSnapshot { index: 30, term: 4, members: Some(members), body: body.encode().into() };
    pb::RaftMessage { snapshot: Some(snapshot), ..message(RaftKind::Snapshot, LEADER) }
}

fn changed(change: impl FnOnce(&mut pb::RaftMembers)) -> pb::RaftMessage {
    let mut message = snapshot();
    change(message.snapshot.as_mut().unwrap().members.as_mut().unwrap());
    message
}

fn library_entry(index: u64) -> rb::Entry {
    rb::Entry { index, term: TERM, ..rb::Entry::default() }
}

/// A library node in the place of [`follower`]; what it does with a message without the gate.
struct Library(RawNode<MemStorage>);

impl Library {
    fn new() -> Self {
        let store = MemStorage::new_with_conf_state((vec![1, 2, 3], vec![]));
        let entries: Vec<_> = (1..=LAST).map(library_entry).collect();
        store.wl().append(&entries).unwrap_or_else(|_| panic!());
        let state = rb::HardState { term: TERM, commit: 1, ..rb::HardState::default() };
        store.wl().set_hardstate(state);
        let config = Config { check_quorum: true, pre_vote: true, ..Config::new(US) };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let mut node = RawNode::new(&config, store, &logger).unwrap();
        node.raft.become_follower(TERM, LEADER);
        Self(node)
    }

    fn leading() -> Self {
        let mut node = Self::new();
        node.0.raft.become_pre_candidate();
        node.0.raft.become_candidate();
        node.0.raft.become_leader();
        node
    }

    /// Whether the process ends.
    fn panics(mut self, message: rb::Message) -> bool {
        let step = || {
            let _ = self.0.step(message);
            while self.0.has_ready() {
                let ready = self.0.ready();
                self.0.mut_store().wl().append(ready.entries()).unwrap();
                self.0.advance(ready);
                self.0.advance_apply();
            }
        };
        std::panic::catch_unwind(AssertUnwindSafe(step)).is_err()
    }
}

fn raw(kind: rb::MessageType, from: u64) -> rb::Message {
    let mut out = rb::Message::default();
    out.set_msg_type(kind);
    out.from = from;
    out.to = US;
    out.term = TERM;
    out
}

#[test]
fn what_peers_send_comes_through() {
    let ok = |message: pb::RaftMessage| drop(follower(message).unwrap());
    ok(append(vec![entry(21, 4 + 1), entry(22, TERM)]));
    ok(message(RaftKind::Heartbeat, LEADER));
    ok(snapshot());
    ok(message(RaftKind::TimeoutNow, LEADER));
    ok(pb::RaftMessage { term: 6, index: 20, log_term: 5, ..message(RaftKind::PreVote, PEER) });
    ok(pb::RaftMessage {
        term: 6,
        index: 20,
        log_term: 5,
        context: TRANSFER_CONTEXT.into(),
        ..message(RaftKind::Vote, PEER)
    });
    for kind in [RaftKind::VoteResponse, RaftKind::PreVoteResponse, RaftKind::HeartbeatResponse] {
        ok(message(kind, PEER));
    }
    let answer = pb::RaftMessage { index: LAST, ..message(RaftKind::AppendResponse, PEER) };
    leading(answer).unwrap();
    let read = pb::RaftMessage {
        term: 0,
        entries: vec![read_entry(PEER)],
        ..message(RaftKind::ReadIndex, PEER)
    };
    leading(read).unwrap();
    ok(pb::RaftMessage {
        entries: vec![read_entry(US)],
        ..message(RaftKind::ReadIndexResponse, LEADER)
    });
    ok(message(RaftKind::Removed, PEER));
}

#[test]
fn trap_unknown_kinds_of_messages() {
    for kind in [0, 14, 99, -1, i32::MAX] {
        let message = pb::RaftMessage { kind, ..message(RaftKind::Append, LEADER) };
        assert_eq!(follower(message), Err(GateError::UnknownKind { kind }));
    }
}

/// Kinds that the library means for itself (hup, beat, check quorum, unreachable, snapshot status)
/// and those that only an operator may ask for (propose, transfer) have no number at all.
#[test]
fn trap_local_kinds_and_transfers_cannot_be_expressed() {
    use rb::MessageType as T;
    let never = [
        T::MsgHup,
        T::MsgBeat,
        T::MsgCheckQuorum,
        T::MsgUnreachable,
        T::MsgSnapStatus,
        T::MsgPropose,
        T::MsgTransferLeader,
    ];
    let reachable: Vec<_> = (0..64)
        .filter_map(|n| RaftKind::try_from(n).ok())
        .filter_map(convert::kind_to_raft)
        .collect();
    assert_eq!(reachable.len(), 12);
    for kind in never {
        assert!(!reachable.contains(&kind));
        assert_eq!(convert::message_to_wire(CLUSTER, false, &raw(kind, US)), None);
    }
    // An empty proposal ends a library that leads.
    let mut propose = raw(T::MsgPropose, PEER);
    propose.term = 0;
    assert!(Library::leading().panics(propose), "the library has mended this");
}

/// Once in a majority's log, an entry of unknown kind ends every process that applies it.
#[test]
fn trap_unknown_kinds_of_entries() {
    for kind in [0, 3, 99, -1] {
        let entry = pb::RaftEntry { kind, ..entry(21, TERM) };
        let error = GateError::UnknownEntryKind { index: 21, kind };
        assert_eq!(follower(append(vec![entry])), Err(error));
    }
}

#[test]
fn trap_entries_that_cannot_be_read_when_they_are_applied() {
    let bad = |change: fn(&mut pb::RaftEntry)| {
        let mut entry = entry(21, TERM);
        change(&mut entry);
        follower(append(vec![entry]))
    };
    let payload = Err(GateError::BadPayload { index: 21 });
    assert_eq!(bad(|entry| entry.data = vec![0xff, 0xff].into()), payload);
    // A payload of a kind that a later release knows.
    assert_eq!(bad(|entry| entry.data = vec![0x1a, 1, 7].into()), payload);
    assert_eq!(bad(|entry| entry.context = vec![0xff].into()), payload);
    let checkpoint = pb::RaftCheckpoint { index: 1, hash: vec![1; 31].into() };
    let body = Some(pb::raft_payload::Body::Checkpoint(checkpoint));
    let short = wire::message_to_bytes(&pb::RaftPayload { body });
    let entry = pb::RaftEntry { data: short.into(), ..entry(21, TERM) };
    assert_eq!(follower(append(vec![entry])), payload);
}

#[test]
fn trap_changes_of_unknown_kind() {
    let change = |kind: i32, node: u64, transition: i32| {
        let changes = vec![pb::RaftChangeSingle { kind, node }];
        let change = pb::RaftChange { transition, changes, context: Vec::new().into() };
        let entry = pb::RaftEntry {
            kind: pb::RaftEntryKind::Change as i32,
            data: wire::message_to_bytes(&change).into(),
            ..entry(21, TERM)
        };
        follower(append(vec![entry])).map(drop)
    };
    let bad = Err(GateError::BadChange { index: 21 });
    assert_eq!(change(1, 3, 1), Ok(()));
    assert_eq!(change(3, 3, 1), bad);
    assert_eq!(change(-1, 3, 1), bad);
    assert_eq!(change(1, 0, 1), bad, "node 0");
    assert_eq!(change(1, 3, 2), bad, "a transition that nobody ends");
    assert_eq!(change(1, 3, 7), bad);
}

#[test]
fn trap_the_empty_change_is_a_change() {
    let leave = pb::RaftEntry {
        kind: pb::RaftEntryKind::Change as i32,
        data: Vec::new().into(),
        context: Vec::new().into(),
        ..entry(21, TERM)
    };
    let message = follower(append(vec![leave])).unwrap();
    let entry = &message.get_entries()[0];
    assert_eq!(entry.get_entry_type(), rb::EntryType::EntryConfChangeV2);
    assert!(entry.data.is_empty());
}

#[test]
fn trap_a_heartbeat_that_commits_beyond_the_log() {
    let beat =
        |term, commit| pb::RaftMessage { term, commit, ..message(RaftKind::Heartbeat, LEADER) };
    follower(beat(TERM, LAST)).unwrap();
    let error = GateError::BeyondLog { commit: LAST + 1, last: LAST };
    assert_eq!(follower(beat(TERM, LAST + 1)), Err(error));
    // What an older term says is only answered.
    follower(beat(TERM - 1, LAST + 1)).unwrap();
    let mut message = raw(rb::MessageType::MsgHeartbeat, LEADER);
    message.commit = LAST + 1;
    assert!(Library::new().panics(message), "the library has mended this");
}

#[test]
fn trap_entries_out_of_step() {
    let sequence = |index| Err(GateError::Sequence { index });
    assert_eq!(follower(append(vec![entry(22, TERM)])), sequence(22));
    assert_eq!(follower(append(vec![entry(20, TERM)])), sequence(20));
    assert_eq!(follower(append(vec![entry(21, TERM), entry(23, TERM)])), sequence(23));
    let mut message = raw(rb::MessageType::MsgAppend, LEADER);
    message.index = LAST;
    message.log_term = TERM;
    message.set_entries(vec![library_entry(LAST + 5)].into());
    assert!(Library::new().panics(message), "the library has mended this");
}

#[test]
fn trap_terms_that_go_down_or_beyond_the_message() {
    let mut down = append(vec![entry(21, TERM), entry(22, TERM - 1)]);
    assert_eq!(follower(down.clone()), Err(GateError::Sequence { index: 22 }));
    down.entries = vec![entry(21, TERM + 1)];
    assert_eq!(follower(down.clone()), Err(GateError::Sequence { index: 21 }));
    down.entries = vec![entry(21, 0)];
    assert_eq!(follower(down), Err(GateError::Sequence { index: 21 }));
    let message = pb::RaftMessage { log_term: TERM + 1, ..append(vec![]) };
    assert_eq!(follower(message), Err(GateError::BadTerm));
}

/// Beyond its log the library takes the term for 0, so that a position without one matches there.
#[test]
fn trap_an_append_far_beyond_the_log_that_has_no_term() {
    let far = pb::RaftMessage {
        index: LAST + 100,
        log_term: 0,
        entries: vec![entry(LAST + 101, TERM)],
        ..append(vec![])
    };
    assert!(matches!(follower(far), Err(GateError::BadIndex { .. })));
    let mut message = raw(rb::MessageType::MsgAppend, LEADER);
    message.index = LAST + 100;
    message.set_entries(vec![library_entry(LAST + 101)].into());
    assert!(Library::new().panics(message), "the library has mended this");
}

#[test]
fn trap_positions_that_overflow() {
    for term in [POSITION_MAX, u64::MAX] {
        let message = pb::RaftMessage { term, ..message(RaftKind::Heartbeat, LEADER) };
        assert_eq!(follower(message), Err(GateError::BadTerm));
    }
    let message = pb::RaftMessage { index: u64::MAX, ..append(vec![]) };
    assert!(matches!(follower(message), Err(GateError::BadIndex { .. })));
}

/// Term 0 is how the library knows a message of its own.
#[test]
fn trap_messages_without_a_term() {
    for kind in
        [RaftKind::Append, RaftKind::Vote, RaftKind::TimeoutNow, RaftKind::HeartbeatResponse]
    {
        let message = pb::RaftMessage { term: 0, ..message(kind, LEADER) };
        assert_eq!(follower(message), Err(GateError::BadTerm));
    }
    // And it believes one: a follower starts an election on it.
    let mut message = raw(rb::MessageType::MsgTimeoutNow, STRANGER);
    message.term = 0;
    let mut library = Library::new();
    library.0.step(message).unwrap();
    assert_eq!(library.0.raft.state, raft::StateRole::Candidate);
}

#[test]
fn trap_a_stranger_that_leads_or_asks_for_an_election() {
    for kind in [RaftKind::Append, RaftKind::Heartbeat, RaftKind::TimeoutNow, RaftKind::Vote] {
        let message = pb::RaftMessage { term: TERM + 1, ..message(kind, STRANGER) };
        let message = pb::RaftMessage { index: 20, log_term: 5, ..message };
        let message = match kind {
            RaftKind::Append | RaftKind::Vote => message,
            _ => pb::RaftMessage { index: 0, log_term: 0, ..message },
        };
        let error = GateError::NotMember { from: NodeId(STRANGER) };
        assert_eq!(follower(message), Err(error), "{kind:?}");
    }
    let mut message = raw(rb::MessageType::MsgHeartbeat, STRANGER);
    message.term = TERM + 1;
    let mut library = Library::new();
    library.0.step(message).unwrap();
    assert_eq!(library.0.raft.leader_id, STRANGER, "the library has mended this");
}

/// A node that lags must hear a leader that joined since; but only where no other is heard.
#[test]
fn a_stranger_is_heard_where_nobody_leads() {
    let alone = |kind| {
        let message = pb::RaftMessage { term: TERM + 1, ..message(kind, STRANGER) };
        with(message, |context| {
            context.leader = None;
            context.lease = false;
        })
    };
    alone(RaftKind::Heartbeat).unwrap();
    alone(RaftKind::PreVote).unwrap();
    let error = Err(GateError::NotMember { from: NodeId(STRANGER) });
    assert_eq!(alone(RaftKind::HeartbeatResponse), error);
    assert_eq!(alone(RaftKind::TimeoutNow), error);
}

#[test]
fn trap_a_removed_node() {
    for lease in [true, false] {
        let message = pb::RaftMessage { term: 9, ..message(RaftKind::PreVote, GONE) };
        let refused = with(message, |context| context.lease = lease);
        assert_eq!(refused, Err(GateError::Removed { from: NodeId(GONE) }));
    }
}

#[test]
fn trap_an_election_or_a_read_that_another_than_the_leader_grants() {
    let error = Err(GateError::NotLeader { from: NodeId(PEER) });
    assert_eq!(follower(message(RaftKind::TimeoutNow, PEER)), error);
    let old = pb::RaftMessage { term: TERM - 1, ..message(RaftKind::TimeoutNow, LEADER) };
    assert_eq!(follower(old), Err(GateError::NotLeader { from: NodeId(LEADER) }));
    let read = pb::RaftMessage {
        entries: vec![read_entry(US)],
        ..message(RaftKind::ReadIndexResponse, PEER)
    };
    assert_eq!(follower(read), error);
}

#[test]
fn trap_two_leaders_in_a_term() {
    let error = Err(GateError::SecondLeader { from: NodeId(PEER) });
    assert_eq!(follower(message(RaftKind::Heartbeat, PEER)), error);
    assert_eq!(leading(message(RaftKind::Heartbeat, PEER)), error);
    follower(pb::RaftMessage { term: TERM + 1, ..message(RaftKind::Heartbeat, PEER) }).unwrap();
}

#[test]
fn trap_a_message_for_another_node_or_cluster_or_in_anothers_name() {
    let beat = || message(RaftKind::Heartbeat, LEADER);
    let error = GateError::NotForUs { to: NodeId(PEER) };
    assert_eq!(follower(pb::RaftMessage { to: PEER, ..beat() }), Err(error));
    for cluster in [vec![6; 16], vec![5; 15], vec![]] {
        let message = pb::RaftMessage { cluster: cluster.into(), ..beat() };
        assert_eq!(follower(message), Err(GateError::OtherCluster));
    }
    let (members, removed) = (members(), BTreeSet::new());
    let context = Context {
        id: NodeId(US),
        cluster: CLUSTER,
        members: &members,
        removed: &removed,
        term: TERM,
        leader: None,
        lease: false,
        last: LAST,
    };
    let claimed = check(beat(), NodeId(PEER), &context).unwrap_err();
    assert_eq!(claimed, GateError::NotFromPeer { claimed: NodeId(LEADER) });
    let ours = message(RaftKind::Heartbeat, US);
    assert!(matches!(check(ours, NodeId(US), &context), Err(GateError::NotFromPeer { .. })));
}

/// The library reads a read's first entry without asking whether there is one.
#[test]
fn trap_a_read_without_its_entry() {
    let read = |entries| pb::RaftMessage { term: 0, entries, ..message(RaftKind::ReadIndex, PEER) };
    assert_eq!(leading(read(vec![])), Err(GateError::BadContext));
    assert_eq!(leading(read(vec![read_entry(PEER); 2])), Err(GateError::BadContext));
    let mut message = raw(rb::MessageType::MsgReadIndex, PEER);
    message.term = 0;
    let mut library = Library::leading();
    while library.0.has_ready() {
        let ready = library.0.ready();
        library.0.mut_store().wl().append(ready.entries()).unwrap();
        library.0.advance(ready);
        library.0.advance_apply();
    }
    // With its own entry committed it answers reads.
    let mut answer = raw(rb::MessageType::MsgAppendResponse, PEER);
    answer.term = TERM + 1;
    answer.index = LAST + 1;
    library.0.step(answer).unwrap();
    assert!(library.panics(message), "the library has mended this");
}

/// A follower would hand a read on in its sender's name.
#[test]
fn trap_a_read_for_another_leader() {
    let read = pb::RaftMessage {
        term: 0,
        entries: vec![read_entry(PEER)],
        ..message(RaftKind::ReadIndex, PEER)
    };
    assert_eq!(follower(read), Err(GateError::NotLeading));
}

/// Two reads with one context would be one to the library.
#[test]
fn trap_a_read_in_anothers_name() {
    let read = pb::RaftMessage {
        term: 0,
        entries: vec![read_entry(LEADER)],
        ..message(RaftKind::ReadIndex, PEER)
    };
    assert_eq!(leading(read), Err(GateError::BadContext));
}

#[test]
fn trap_an_answer_for_entries_never_sent() {
    let answer = pb::RaftMessage { index: LAST + 1, ..message(RaftKind::AppendResponse, PEER) };
    assert!(matches!(leading(answer), Err(GateError::BadIndex { .. })));
}

#[test]
fn trap_a_vote_before_joining() {
    let nobody = MemberSet::default();
    let vote = pb::RaftMessage { index: 20, log_term: 5, ..message(RaftKind::Vote, PEER) };
    let (members, removed) = (&nobody, BTreeSet::new());
    let context = Context {
        id: NodeId(US),
        cluster: CLUSTER,
        members,
        removed: &removed,
        term: 0,
        leader: None,
        lease: false,
        last: 0,
    };
    assert_eq!(check(vote, NodeId(PEER), &context).unwrap_err(), GateError::Joining);
    let append = append(vec![]);
    assert!(check(append, NodeId(LEADER), &context).is_ok());
}

#[test]
fn trap_snapshots_whose_members_cannot_be() {
    let bad = |change: fn(&mut pb::RaftMembers)| {
        assert_eq!(follower(changed(change)), Err(GateError::BadSnapshot { what: "members" }));
    };
    bad(|members| members.voters.clear());
    bad(|members| members.voters.retain(|id| *id != US));
    bad(|members| members.voters.push(0));
    bad(|members| members.voters.push(2));
    bad(|members| members.learners.push(2));
    bad(|members| members.learners_next.push(4));
    bad(|members| members.auto_leave = true);
    bad(|members| members.voters.extend(10..200));
    let joint = changed(|members| {
        members.outgoing = vec![1, 2, 4];
        members.learners_next = vec![4];
        members.auto_leave = true;
    });
    follower(joint).unwrap();
}

/// The library takes members in two places for a defect of its own, and ends the process.
#[test]
fn the_library_ends_the_process_over_such_members() {
    let mut message = raw(rb::MessageType::MsgSnapshot, LEADER);
    let mut state = rb::ConfState::default();
    state.set_voters(vec![1, 2]);
    state.set_learners(vec![2]);
    let meta = message.mut_snapshot().mut_metadata();
    meta.index = 30;
    meta.term = 4;
    meta.set_conf_state(state);
    assert!(Library::new().panics(message), "the library has mended this");
}

#[test]
fn trap_snapshots_out_of_place_or_damaged() {
    let place = |index, term| {
        let mut message = snapshot();
        let snapshot = message.snapshot.as_mut().unwrap();
        (snapshot.index, snapshot.term) = (index, term);
        follower(message)
    };
    for (index, term) in [(0, 4), (30, 0), (30, TERM + 1), (u64::MAX, 4)] {
        assert_eq!(place(index, term), Err(GateError::BadSnapshot { what: "position" }));
    }
    let body = snapshot().snapshot.unwrap().body;
    for at in 0..body.len() {
        let mut message = snapshot();
        let mut flipped = body.to_vec();
        flipped[at] ^= 1;
        message.snapshot.as_mut().unwrap().body = flipped.into();
        let outcome = follower(message);
        // The hash is compared when the state is restored; the rest is checked here.
        if at < 8 {
            assert_eq!(outcome, Err(GateError::BadSnapshot { what: "checksum" }), "byte {at}");
        }
    }
    let none = pb::RaftMessage { snapshot: None, ..snapshot() };
    assert!(matches!(follower(none), Err(GateError::BadSnapshot { .. })));
}

#[test]
fn trap_sizes() {
    let data = Payload::Command(vec![0; ENTRY_MAX]).encode();
    let large = pb::RaftEntry { data: data.into(), ..entry(21, TERM) };
    assert_eq!(follower(append(vec![large])), Err(GateError::TooLarge { what: "entry" }));
    let data = Payload::Command(vec![0; 3 << 20]).encode();
    let large = |index| pb::RaftEntry { data: data.clone().into(), ..entry(index, TERM) };
    let message = append(vec![large(21), large(22), large(23)]);
    assert_eq!(follower(message), Err(GateError::TooLarge { what: "entries" }));
    let many = append((21..22 + ENTRIES_MAX as u64).map(|index| entry(index, TERM)).collect());
    assert_eq!(follower(many), Err(GateError::TooLarge { what: "number of entries" }));
    let (members, removed) = (members(), BTreeSet::new());
    let context = Context {
        id: NodeId(US),
        cluster: CLUSTER,
        members: &members,
        removed: &removed,
        term: TERM,
        leader: None,
        lease: false,
        last: LAST,
    };
    let bytes = vec![0; MESSAGE_MAX + 1];
    let error = decode_and_check(&bytes, NodeId(PEER), &context).unwrap_err();
    assert_eq!(error, GateError::TooLarge { what: "message" });
    let error = decode_and_check(&[0xff; 9], NodeId(PEER), &context).unwrap_err();
    assert_eq!(error, GateError::Undecodable);
}

#[test]
fn fields_that_a_kind_does_not_have_must_be_empty() {
    let surplus = |field| Err(GateError::Surplus { field });
    let beat = || message(RaftKind::Heartbeat, LEADER);
    let with_entry = pb::RaftMessage { entries: vec![entry(21, TERM)], ..beat() };
    assert_eq!(follower(with_entry), surplus("entries"));
    let with_snapshot = pb::RaftMessage { snapshot: snapshot().snapshot, ..beat() };
    assert_eq!(follower(with_snapshot), surplus("snapshot"));
    assert_eq!(follower(pb::RaftMessage { reject: true, ..beat() }), surplus("reject"));
    let context = pb::RaftMessage { context: vec![1].into(), ..append(vec![]) };
    assert_eq!(follower(context), surplus("context"));
    let context = pb::RaftMessage { context: vec![1].into(), ..beat() };
    assert_eq!(follower(context), Err(GateError::BadContext));
}

/// Any bytes at all: an answer, never a panic; and what comes through ends no library either.
#[test]
fn random_messages_end_no_process() {
    let mut state = 7u64;
    let mut next = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut through = 0;
    for _ in 0..20_000 {
        let from = 2 + next(2);
        let kind = 1 + next(13);
        let mut message = message(RaftKind::Append, from);
        message.kind = i32::try_from(kind).unwrap();
        message.term = TERM + next(3) - 1;
        if next(2) == 0 {
            message.index = next(40);
            message.log_term = next(7);
        }
        if next(3) == 0 {
            message.commit = next(40);
            message.commit_term = next(7);
            message.reject_hint = next(40);
            message.reject = next(2) == 0;
        }
        if next(3) == 0 {
            let first = message.index + next(3);
            message.entries = (0..next(3)).map(|n| entry(first + n, TERM + next(2) - 1)).collect();
        }
        if next(3) == 0 {
            message.snapshot = snapshot().snapshot;
        }
        if let Ok(message) = follower(message) {
            through += 1;
            assert!(!Library::new().panics(message.clone()), "{message:?}");
        }
    }
    assert!(through > 500, "{through}");
}
