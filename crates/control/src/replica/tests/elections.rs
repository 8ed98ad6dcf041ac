//! Elections, reads, transfers: who leads, and what a leader may claim.

use super::*;

#[test]
fn a_group_of_one_leads_and_applies() {
    let mut group = Group::of_one(config);
    let (_, answer) = group.propose(1, "a");
    let index = applied(answer);
    let (_, read) = group.read(1);
    assert!(matches!(read, Some(Output::ReadReady { index: at, .. }) if at >= index));
    assert_eq!(group.words(1), ["a"]);
}

#[test]
fn it_leads_after_a_timeout_without_being_told_to() {
    let node = Node::bootstrap(config(1), Disk::default(), Words::default()).unwrap();
    let mut group = Group::of_one(config);
    group.nodes.insert(1, node);
    group.ticks(19);
    assert_eq!(group.leader(), Some(1));
}

#[test]
fn a_dead_leader_is_replaced_and_nothing_acknowledged_is_lost() {
    let mut group = Group::of(3);
    applied(group.propose(1, "a").1);
    let disk = group.kill(1);
    let second = group.elect();
    assert_ne!(second, 1);
    applied(group.propose(second, "b").1);
    group.start(1, disk);
    group.ticks(30);
    for id in 1..=3 {
        assert_eq!(group.words(id), ["a", "b"], "node {id}");
    }
}

#[test]
fn all_may_die_at_once_and_come_back_the_same() {
    let mut group = Group::of(3);
    for word in ["a", "b", "c"] {
        applied(group.propose(1, word).1);
    }
    group.ticks(5);
    let disks: Vec<_> = (1..=3).map(|id| (id, group.kill(id))).collect();
    group.queue.clear();
    for (id, disk) in disks {
        group.start(id, disk);
        // What was acknowledged is there before anybody leads.
        assert_eq!(group.words(id), ["a", "b", "c"], "node {id}");
    }
    let leader = group.elect();
    applied(group.propose(leader, "d").1);
    assert_eq!(group.words(leader), ["a", "b", "c", "d"]);
}

#[test]
fn a_leader_that_hears_no_majority_steps_down_and_serves_no_stale_read() {
    let mut group = Group::of(3);
    applied(group.propose(1, "old").1);
    group.isolate(1);
    let (stale, answer) = group.read(1);
    assert_eq!(answer, None);
    let (lost, _) = group.propose(1, "lost");
    group.ticks(30);
    assert!(!group.nodes[&1].role.2, "it still leads");
    assert_eq!(refused(group.answer(1, lost)), ProposeError::Unknown);
    let second = group.leader().unwrap();
    assert_ne!(second, 1);
    applied(group.propose(second, "new").1);
    assert_eq!(group.answer(1, stale), None, "a stale read was served");
    group.heal();
    group.ticks(30);
    // The read is answered at last, and from a state that has the new word.
    assert!(matches!(group.answer(1, stale), Some(Output::ReadReady { .. })));
    assert_eq!(group.words(1), ["old", "new"]);
    assert_eq!(refused(group.answer(1, lost)), ProposeError::Unknown);
}

#[test]
fn an_isolated_node_deposes_nobody_when_it_comes_back() {
    let mut group = Group::of(3);
    let term = group.nodes[&1].status().term;
    group.isolate(3);
    group.ticks(200);
    group.heal();
    group.ticks(30);
    assert_eq!(group.leader(), Some(1));
    assert_eq!(group.nodes[&1].status().term, term, "an election was held");
}

#[test]
fn a_follower_reads_through_the_leader() {
    let mut group = Group::of(3);
    let index = applied(group.propose(1, "a").1);
    let (_, read) = group.read(2);
    assert!(matches!(read, Some(Output::ReadReady { index: at, .. }) if at >= index));
    assert_eq!(group.words(2), ["a"]);
}

#[test]
fn a_lost_read_is_asked_again() {
    let mut group = Group::of(3);
    group.cut.insert((2, 1));
    let (request, answer) = group.read(2);
    assert_eq!(answer, None);
    group.heal();
    group.ticks(5);
    assert!(matches!(group.answer(2, request), Some(Output::ReadReady { .. })));
}

#[test]
fn a_forgotten_request_is_never_answered() {
    let mut group = Group::of(3);
    group.isolate(1);
    let (read, _) = group.read(1);
    let (write, _) = group.propose(1, "a");
    for request in [read, write] {
        group.put(1, Input::Forget { request });
    }
    group.heal();
    group.ticks(30);
    assert_eq!(group.answer(1, read), None);
    assert_eq!(group.answer(1, write), None);
}

#[test]
fn leadership_is_handed_over_without_a_timeout() {
    let mut group = Group::of(3);
    group.put(1, Input::Transfer { to: NodeId(3) });
    group.run();
    assert_eq!(group.leader(), Some(3));
    applied(group.propose(3, "a").1);
    assert!(!group.nodes[&1].role.2);
}

#[test]
fn while_leadership_is_handed_over_proposals_are_dropped_not_lost() {
    let mut group = Group::of(3);
    group.cut.insert((1, 3));
    group.put(1, Input::Transfer { to: NodeId(3) });
    group.run();
    assert_eq!(group.nodes[&1].status().transfer, Some(NodeId(3)));
    assert_eq!(refused(group.propose(1, "a").1), ProposeError::Dropped);
    // The attempt ends after an election timeout.
    group.ticks(11);
    assert_eq!(group.nodes[&1].status().transfer, None);
    applied(group.propose(1, "b").1);
}

#[test]
fn a_follower_names_the_leader() {
    let mut group = Group::of(3);
    let why = refused(group.propose(2, "a").1);
    assert_eq!(why, ProposeError::NotLeader { leader: Some(NodeId(1)) });
}

#[test]
fn a_run_is_a_function_of_its_seed() {
    let run = || {
        let mut group = Group::of(5);
        for round in 0..20 {
            let leader = group.elect();
            group.propose(leader, &round.to_string());
            group.isolate(leader);
            group.ticks(40);
            group.heal();
            group.ticks(10);
        }
        format!("{:?}", group.heard)
    };
    assert_eq!(run(), run());
}

/// Asked to, the library lets a node without a vote stand, and one that has not joined yet wins:
/// nobody is a majority of no voters.
#[test]
fn who_has_no_vote_does_not_stand() {
    let mut joining = Node::join(config(2), Disk::default(), Words::default()).unwrap();
    let outputs = joining.handle(Input::Campaign).unwrap();
    assert!(!outputs.iter().any(|output| matches!(output, Output::Role { leading: true, .. })));
    let mut group = Group::of(1);
    group.join(2);
    group.ticks(5);
    group.isolate(2);
    for _ in 0..100 {
        group.put(2, Input::Tick);
    }
    group.put(2, Input::Campaign);
    assert_eq!(group.nodes[&2].status().role, RoleKind::Follower);
}
