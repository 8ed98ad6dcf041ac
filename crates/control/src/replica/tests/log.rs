//! The log: snapshots, catching up, state hashes, and whose outcome is whose.

use super::*;

fn short(id: u64) -> ReplicaConfig {
    ReplicaConfig { snapshot_entries: 10, keep_entries: 3, ..config(id) }
}

fn three(config: fn(u64) -> ReplicaConfig) -> Group {
    let mut group = Group::of_one(config);
    group.add(2);
    group.add(3);
    group
}

#[test]
fn the_log_stays_short_and_restarts_from_its_snapshot() {
    let mut group = three(short);
    for n in 0..50 {
        applied(group.propose(1, &n.to_string()).1);
    }
    let status = group.nodes[&1].status();
    assert!(status.snapshot > 40, "{status:?}");
    assert!(status.first >= status.snapshot - 3, "{status:?}");
    let before = group.words(1);
    group.restart(1);
    assert_eq!(group.words(1), before);
    let leader = group.elect();
    applied(group.propose(leader, "on").1);
}

#[test]
fn a_follower_that_is_too_far_behind_gets_a_snapshot() {
    let mut group = three(short);
    group.isolate(3);
    for n in 0..50 {
        applied(group.propose(1, &n.to_string()).1);
    }
    group.heal();
    group.ticks(10);
    assert_eq!(group.words(3), group.words(1));
    assert!(group.heard[&3].iter().any(|event| matches!(event, Output::Restored { .. })));
    // Its own disk holds it too.
    group.restart(3);
    assert_eq!(group.words(3), group.words(1));
    applied(group.propose(1, "on").1);
    group.ticks(3);
    assert_eq!(group.words(3), group.words(1));
}

#[test]
fn a_snapshot_that_is_never_reported_on_counts_as_lost() {
    let mut group = three(short);
    group.isolate(3);
    for n in 0..50 {
        applied(group.propose(1, &n.to_string()).1);
    }
    group.heal();
    group.no_snapshots = true;
    group.ticks(10);
    assert!(group.nodes[&1].status().peers[&NodeId(3)].snapshot);
    group.no_snapshots = false;
    group.ticks(60);
    assert_eq!(group.words(3), group.words(1));
}

/// Each life of a node has a number, so that no other one takes the outcome for its own.
#[test]
fn a_restarted_node_does_not_answer_for_its_life_before() {
    let mut group = Group::of(3);
    let request = group.request();
    group.put(1, Input::Propose { request, command: "a".into() });
    // It reached the others' logs; the proposer dies before it learns that it was committed.
    group.run();
    group.restart(1);
    let again = group.request();
    assert_ne!(request, again);
    group.ticks(30);
    let leader = group.elect();
    applied(group.propose(leader, "b").1);
    group.ticks(3);
    let answered = group.heard[&1]
        .iter()
        .filter(|event| matches!(event, Output::Applied { request: Some(_), .. }));
    let own = usize::from(leader == 1);
    assert_eq!(answered.count(), own);
    assert_eq!(group.words(1), ["a", "b"]);
}

#[test]
fn a_displaced_proposal_is_refused_once_and_its_displacer_is_not_its_outcome() {
    let mut group = Group::of(3);
    group.isolate(1);
    let (lost, answer) = group.propose(1, "lost");
    assert_eq!(answer, None);
    group.ticks(30);
    let second = group.leader().unwrap();
    applied(group.propose(second, "kept").1);
    group.heal();
    group.ticks(30);
    assert_eq!(refused(group.answer(1, lost)), ProposeError::Unknown);
    for id in 1..=3 {
        assert_eq!(group.words(id), ["kept"]);
    }
}

#[test]
fn a_command_that_is_too_long_is_refused_before_it_is_proposed() {
    let mut group = Group::of(1);
    let limit = group.nodes[&1].config().proposal_max;
    let word = "x".repeat(limit + 1);
    let last = group.nodes[&1].status().last;
    let why = refused(group.propose(1, &word).1);
    assert_eq!(why, ProposeError::TooLarge { got: limit + 1, limit });
    assert_eq!(group.nodes[&1].status().last, last);
    applied(group.propose(1, &"x".repeat(limit)).1);
}

/// The library's default takes any number of bytes that nobody has acknowledged.
#[test]
fn what_nobody_acknowledges_is_bounded() {
    let mut group = Group::of(3);
    group.isolate(1);
    let word = "x".repeat(256 << 10);
    let mut dropped = None;
    for _ in 0..100 {
        if let Some(answer) = group.propose(1, &word).1 {
            dropped = Some(refused(Some(answer)));
            break;
        }
    }
    assert_eq!(dropped, Some(ProposeError::Dropped));
}

#[test]
fn proposals_next_to_each_other_share_one_write() {
    let mut group = Group::of(1);
    let before = group.nodes[&1].store().writes;
    let inputs = (100..110).map(|request| Input::Propose { request, command: b"a".to_vec() });
    let outputs = group.nodes.get_mut(&1).unwrap().handle_all(inputs).unwrap();
    group.take(1, outputs);
    assert_eq!(group.words(1).len(), 10);
    // One for the entries; the leader's state hash may come on top.
    assert!(group.nodes[&1].store().writes - before <= 3);
}

#[test]
fn a_state_that_differs_from_the_leaders_ends_the_process() {
    let mut group = Group::of(3);
    applied(group.propose(1, "a").1);
    group.nodes.get_mut(&3).unwrap().machine.0[0].1 = b"b".to_vec();
    let mut fatal = None;
    'words: for n in 0..10 {
        let request = group.request();
        group.put(1, Input::Propose { request, command: n.to_string().into() });
        while let Some((from, to, message)) = group.queue.pop_front() {
            let node = group.nodes.get_mut(&to).unwrap();
            match node.handle(Input::Message { from: NodeId(from), message }) {
                Ok(outputs) => group.take(to, outputs),
                Err(error) => {
                    assert_eq!(to, 3);
                    fatal = Some(error);
                    break 'words;
                }
            }
        }
    }
    assert!(matches!(fatal, Some(Fatal::StateDiverged { .. })), "{fatal:?}");
    let node = group.nodes.get_mut(&3).unwrap();
    assert!(matches!(node.handle(Input::Tick), Err(Fatal::Failed)));
}

#[test]
fn how_a_node_starts_must_fit_its_store() {
    let start = |what: Result<Node, Fatal>| match what {
        Err(Fatal::Start { what }) => what,
        other => panic!("{other:?}"),
    };
    let fresh = || Disk::default();
    assert_eq!(start(Node::open(config(1), fresh(), Words::default())), "the store is empty");
    let disk = Node::bootstrap(config(1), fresh(), Words::default()).unwrap().into_store();
    let again = Node::bootstrap(config(1), disk.clone(), Words::default());
    assert_eq!(start(again), "the store is not empty");
    let again = Node::join(config(1), disk.clone(), Words::default());
    assert_eq!(start(again), "the store is not empty");
    assert_eq!(Node::open(config(1), disk, Words::default()).unwrap().status().boot, 2);
}
