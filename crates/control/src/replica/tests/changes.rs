//! Changes of members.

use super::*;

#[test]
fn one_grows_to_three_to_five_and_shrinks_to_three() {
    let mut group = Group::of_one(config);
    let mut expected = Vec::new();
    let mut say = |group: &mut Group, word: &str| {
        let leader = group.elect();
        applied(group.propose(leader, word).1);
        expected.push(word.to_owned());
        expected.clone()
    };
    say(&mut group, "one");
    for id in 2..=5 {
        group.add(id);
        say(&mut group, &format!("with {id}"));
    }
    assert_eq!(group.voters(5), [1, 2, 3, 4, 5]);
    for id in [2, 4] {
        let leader = group.elect();
        group.change(leader, MemberChange::Remove(NodeId(id))).unwrap();
        say(&mut group, &format!("without {id}"));
    }
    let expected = say(&mut group, "end");
    group.ticks(5);
    for id in [1, 3, 5] {
        assert_eq!(group.voters(id), [1, 3, 5]);
        assert_eq!(group.words(id), expected);
        assert_eq!(group.nodes[&id].status().joint_ticks, 0);
    }
}

#[test]
fn a_learner_counts_for_nothing_until_it_is_promoted() {
    let mut group = Group::of(1);
    group.join(2);
    group.ticks(5);
    group.isolate(2);
    // One voter of one decides.
    applied(group.propose(1, "a").1);
    group.heal();
    group.change(1, MemberChange::Promote(NodeId(2))).unwrap();
    group.isolate(2);
    assert_eq!(group.propose(1, "b").1, None);
}

#[test]
fn changes_happen_one_at_a_time() {
    let mut group = Group::of(3);
    group.isolate(1);
    let first = group.request();
    group.put(1, Input::Change { request: first, change: MemberChange::AddLearner(NodeId(4)) });
    let second = group.change(1, MemberChange::AddLearner(NodeId(5)));
    assert_eq!(second, Err(ProposeError::ChangePending));
    group.heal();
    group.ticks(3);
    assert!(matches!(group.answer(1, first), Some(Output::Changed { .. })));
}

#[test]
fn changes_that_make_no_sense_are_refused() {
    let mut group = Group::of(2);
    group.change(1, MemberChange::Remove(NodeId(2))).unwrap();
    let bad = |group: &mut Group, change| match group.change(1, change) {
        Err(ProposeError::BadChange(bad)) => bad,
        other => panic!("{other:?}"),
    };
    assert_eq!(bad(&mut group, MemberChange::AddLearner(NodeId(1))), BadChange::Member);
    assert_eq!(bad(&mut group, MemberChange::AddLearner(NodeId(2))), BadChange::Reused);
    assert_eq!(bad(&mut group, MemberChange::AddLearner(NodeId(0))), BadChange::Zero);
    assert_eq!(bad(&mut group, MemberChange::Promote(NodeId(1))), BadChange::NotLearner);
    assert_eq!(bad(&mut group, MemberChange::Remove(NodeId(9))), BadChange::NotMember);
    assert_eq!(bad(&mut group, MemberChange::Remove(NodeId(1))), BadChange::LastVoter);
}

/// The trap of the library's own example: entries without data are skipped before anyone looks at
/// their kind, and the one that leaves joint consensus has none.
#[test]
fn the_empty_change_that_leaves_joint_consensus_is_applied() {
    let mut group = Group::of(2);
    let image = &group.nodes[&1].store().image;
    let empty = |entry: &&LogEntry| entry.kind == EntryKind::Change && entry.data.is_empty();
    assert_eq!(image.entries.iter().filter(empty).count(), 1);
    for id in [1, 2] {
        assert!(!group.nodes[&id].members.is_joint(), "node {id} stays in joint consensus");
    }
    // One of the two may go now; in joint consensus it could not.
    group.change(1, MemberChange::Remove(NodeId(2))).unwrap();
    applied(group.propose(1, "alone").1);
}

/// Consensus forgets to leave when the leader that entered falls before it applied the entrance.
#[test]
fn a_new_leader_leaves_joint_consensus_that_another_entered() {
    let mut group = Group::of(3);
    group.join(4);
    group.ticks(5);
    let request = group.request();
    group.put(1, Input::Change { request, change: MemberChange::Promote(NodeId(4)) });
    // The entrance reaches everyone and the leader falls before it hears so.
    let queue: Vec<_> = group.queue.drain(..).collect();
    for (from, to, message) in queue {
        if from == 1 {
            group.put(to, Input::Message { from: NodeId(from), message });
        }
    }
    group.queue.clear();
    group.isolate(1);
    group.ticks(30);
    let second = group.elect();
    assert_ne!(second, 1);
    assert!(!group.nodes[&second].members.is_joint(), "it never leaves");
    assert_eq!(group.voters(second), [1, 2, 3, 4]);
    group.heal();
    group.ticks(30);
    assert_eq!(refused(group.answer(1, request)), ProposeError::Unknown);
    assert_eq!(group.voters(1), [1, 2, 3, 4]);
}

#[test]
fn a_replica_that_starts_in_joint_consensus_leaves_it() {
    let mut group = Group::of(3);
    group.join(4);
    group.ticks(5);
    group.isolate(4);
    group.cut.insert((3, 1));
    group.cut.insert((1, 3));
    let request = group.request();
    group.put(1, Input::Change { request, change: MemberChange::Remove(NodeId(3)) });
    group.run();
    let disks: Vec<_> = (1..=4).map(|id| (id, group.kill(id))).collect();
    group.queue.clear();
    group.heal();
    for (id, disk) in disks {
        group.start(id, disk);
    }
    let leader = group.elect();
    group.ticks(10);
    assert!(!group.nodes[&leader].members.is_joint());
    assert_eq!(group.voters(leader), [1, 2]);
}

#[test]
fn a_removed_leader_names_its_successor() {
    let mut group = Group::of(3);
    applied(group.propose(1, "a").1);
    let request = group.request();
    group.put(1, Input::Change { request, change: MemberChange::Remove(NodeId(1)) });
    group.run();
    // No tick has passed.
    let leader = group.leader().unwrap();
    assert_ne!(leader, 1);
    assert_eq!(group.voters(leader), [2, 3]);
    assert!(matches!(group.answer(1, request), Some(Output::Changed { .. })));
    assert!(group.heard[&1].contains(&Output::Removed));
    applied(group.propose(leader, "b").1);
    assert_eq!(refused(group.propose(1, "c").1), ProposeError::Removed);
}

#[test]
fn a_removed_member_cannot_disturb_and_is_told() {
    let mut group = Group::of(3);
    group.isolate(3);
    group.change(1, MemberChange::Remove(NodeId(3))).unwrap();
    let term = group.nodes[&1].status().term;
    group.ticks(100);
    assert_eq!(group.nodes[&3].status().role, RoleKind::PreCandidate);
    group.heal();
    group.ticks(40);
    assert_eq!(group.leader(), Some(1));
    assert_eq!(group.nodes[&1].status().term, term, "it deposed the leader");
    assert!(group.heard[&3].contains(&Output::Removed), "nobody told it");
    assert!(group.nodes[&3].status().removed);
    assert!(group.nodes[&1].status().refused["removed"] > 0);
}

/// A node that was away while everyone else was replaced knows none of the members there are.
#[test]
fn a_node_that_lags_behind_every_change_comes_back() {
    let mut group = Group::of(3);
    group.isolate(3);
    for id in 4..=6 {
        group.cut.insert((3, id));
        group.cut.insert((id, 3));
        let leader = group.leader().unwrap();
        let node = Node::join(config(id), Disk::default(), Words::default()).unwrap();
        group.nodes.insert(id, node);
        group.change(leader, MemberChange::AddLearner(NodeId(id))).unwrap();
        group.ticks(10);
        group.change(leader, MemberChange::Promote(NodeId(id))).unwrap();
    }
    for id in [1, 2] {
        let leader = group.elect();
        group.change(leader, MemberChange::Remove(NodeId(id))).unwrap();
        group.ticks(3);
        group.kill(id);
    }
    let leader = group.elect();
    applied(group.propose(leader, "new").1);
    group.heal();
    group.ticks(60);
    assert_eq!(group.voters(3), [3, 4, 5, 6]);
    assert_eq!(group.words(3), ["new"]);
}

#[test]
fn a_replaced_disk_joins_again_as_a_learner_under_a_new_number() {
    let mut group = Group::of(3);
    applied(group.propose(1, "a").1);
    group.kill(3);
    group.ticks(5);
    group.change(1, MemberChange::Remove(NodeId(3))).unwrap();
    group.add(4);
    assert_eq!(group.voters(4), [1, 2, 4]);
    assert_eq!(group.words(4), ["a"]);
}

/// A snapshot that was made in joint consensus says so, and whoever starts from it leaves it. By
/// itself consensus does so only if the members say that it shall.
#[test]
fn a_snapshot_carries_joint_members_and_every_leader_leaves_them() {
    for auto_leave in [true, false] {
        starts_joint(auto_leave);
    }
}

fn starts_joint(auto_leave: bool) {
    let mut group = Group::of(3);
    let ids = |list: &[u64]| list.iter().copied().map(NodeId).collect::<BTreeSet<_>>();
    let members = MemberSet {
        voters: ids(&[1, 2]),
        outgoing: ids(&[1, 2, 3]),
        auto_leave,
        ..MemberSet::default()
    };
    let disks: Vec<_> = (1..=3).map(|id| (id, group.kill(id))).collect();
    group.queue.clear();
    let body = disks[0].1.image.snapshot.clone().unwrap().body;
    for (id, mut disk) in disks {
        let id_of = LogId { index: 3, term: 2 };
        disk.image.entries.clear();
        disk.image.snapshot =
            Some(Snapshot { id: id_of, members: members.clone(), body: body.clone() });
        disk.image.base = id_of;
        disk.image.hard_state.commit = 3;
        group.start(id, disk);
        assert!(group.nodes[&id].members.is_joint());
    }
    group.isolate(3);
    let leader = group.elect();
    group.ticks(5);
    assert_eq!(group.voters(leader), [1, 2]);
    assert_eq!(group.nodes[&leader].status().joint_ticks, 0);
    applied(group.propose(leader, "a").1);
}

/// The other one has the entry of the removal and does not know that it is committed: in the
/// configuration it knows, it needs the removed node's vote.
#[test]
fn a_removed_node_still_votes_for_who_does_not_know_it_yet() {
    let mut group = Group::of(2);
    let request = group.request();
    group.put(1, Input::Change { request, change: MemberChange::Remove(NodeId(1)) });
    // Everything arrives until node 1 is gone; nothing of it after.
    while let Some((from, to, message)) = group.queue.pop_front() {
        let gone = group.nodes[&1].status().removed;
        if !(gone && from == 1) {
            group.put(to, Input::Message { from: NodeId(from), message });
        }
    }
    assert!(group.nodes[&1].status().removed);
    assert!(group.nodes[&2].members.is_joint(), "it knows already");
    let leader = group.elect();
    assert_eq!(leader, 2);
    assert_eq!(group.voters(2), [2]);
    applied(group.propose(2, "alone").1);
    assert!(!group.nodes[&1].role.2);
}

/// The one that is out cannot vote, for its log is too long, and is in a term that is over for the
/// other; what it knows to be committed is so all the same.
#[test]
fn a_removed_node_that_refuses_its_vote_is_heeded() {
    let mut group = Group::of(2);
    let request = group.request();
    group.put(1, Input::Change { request, change: MemberChange::Remove(NodeId(1)) });
    let late = |message: &pb::RaftMessage| {
        message.entries.iter().any(|entry| entry.data.windows(4).any(|piece| piece == b"late"))
    };
    let mut proposed = false;
    while let Some((from, to, message)) = group.queue.pop_front() {
        let gone = group.nodes[&1].status().removed;
        if !(from == 1 && (gone || late(&message))) {
            group.put(to, Input::Message { from: NodeId(from), message });
        }
        if !proposed && group.nodes[&1].members.is_joint() {
            proposed = true;
            let request = group.request();
            group.put(1, Input::Propose { request, command: b"late".to_vec() });
        }
    }
    let [first, second] = [1, 2].map(|id| group.nodes[&id].status());
    assert!(first.removed && second.members.is_joint() && first.last > second.last);
    // It stood for election once, and nobody heard of it.
    let message = pb::RaftMessage {
        cluster: CLUSTER.0.to_vec().into(),
        from: 1,
        to: 2,
        kind: pb::RaftKind::TimeoutNow as i32,
        term: second.term,
        ..pb::RaftMessage::default()
    };
    group.put(2, Input::Message { from: NodeId(1), message });
    group.queue.clear();
    assert_eq!(group.nodes[&2].status().term, first.term + 1);
    assert_eq!(group.elect(), 2);
    assert_eq!(group.voters(2), [2]);
    applied(group.propose(2, "alone").1);
}

/// Whoever said that a node is out says so after a restart too, without asking that node.
#[test]
fn a_change_that_was_told_is_durable() {
    // No entry follows the change whose write would take the commit along.
    let mut group = Group::of_one(|id| ReplicaConfig { check_entries: 0, ..config(id) });
    group.add(2);
    group.change(1, MemberChange::Remove(NodeId(2))).unwrap();
    group.kill(2);
    group.restart(1);
    assert_eq!(group.voters(1), [1]);
    assert!(!group.nodes[&1].members.is_joint());
    group.elect();
    applied(group.propose(1, "alone").1);
}

/// The entries of a change are durable, and then there is no room for their commit.
#[test]
fn without_room_nobody_is_told_of_a_change_before_it_is_durable() {
    let mut group = Group::of(2);
    let request = group.request();
    group.put(1, Input::Change { request, change: MemberChange::Remove(NodeId(1)) });
    let told = |group: &Group| {
        let alone = Output::Members(MemberSet::of_one(NodeId(2)));
        group.heard[&2].contains(&alone)
    };
    while let Some((from, to, message)) = group.queue.pop_front() {
        group.put(to, Input::Message { from: NodeId(from), message });
        if group.nodes[&1].status().removed {
            group.nodes.get_mut(&2).unwrap().store_mut().full = true;
        }
    }
    group.ticks(3);
    let node = &group.nodes[&2];
    assert!(node.members == MemberSet::of_one(NodeId(2)) && node.status().storage_full);
    assert!(!told(&group), "it is told, and would be forgotten");
    group.nodes.get_mut(&2).unwrap().store_mut().full = false;
    group.ticks(10);
    assert!(told(&group));
    group.restart(2);
    assert_eq!(group.voters(2), [2]);
}

#[test]
fn a_learner_that_has_nothing_yet_gets_no_vote() {
    let mut group = Group::of(1);
    group.change(1, MemberChange::AddLearner(NodeId(2))).unwrap();
    let early = group.change(1, MemberChange::Promote(NodeId(2)));
    assert_eq!(early, Err(ProposeError::BadChange(BadChange::NotCaughtUp)));
    applied(group.propose(1, "alone still").1);
}
