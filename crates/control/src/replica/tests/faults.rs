//! Disks and orders that must not be: each test fails when a step is taken too early or not at all.

use super::*;

#[test]
fn no_vote_goes_out_before_it_is_durable() {
    let mut group = Group::of(3);
    group.ticks(2);
    group.nodes.get_mut(&2).unwrap().store_mut().full = true;
    group.kill(1);
    // Node 2 no longer counts on node 1. Node 3 stands; node 2 cannot write its vote, so it says
    // nothing at all.
    for _ in 0..10 {
        group.put(2, Input::Tick);
    }
    for _ in 0..40 {
        group.put(3, Input::Tick);
        for (from, to, message) in std::mem::take(&mut group.queue) {
            if (from, to) == (3, 2) {
                group.put(2, Input::Message { from: NodeId(3), message });
            } else if (from, to) == (2, 3) {
                let kind = message.kind();
                assert_ne!(kind, pb::RaftKind::VoteResponse, "a vote that no disk holds");
                group.put(3, Input::Message { from: NodeId(2), message });
            }
        }
    }
    assert_eq!(group.leader(), None);
    assert!(group.nodes[&2].status().storage_full);
    group.nodes.get_mut(&2).unwrap().store_mut().full = false;
    let leader = group.elect();
    applied(group.propose(leader, "a").1);
}

#[test]
fn a_vote_is_remembered_over_a_restart() {
    let mut group = Group::of(3);
    let status = group.nodes[&2].status();
    let (term, last) = (status.term + 1, status.last);
    let log_term = group.nodes[&2].store().image.last().term;
    let ask = |group: &mut Group, from: u64| {
        let message = pb::RaftMessage {
            cluster: CLUSTER.0.to_vec().into(),
            from,
            to: 2,
            kind: pb::RaftKind::Vote as i32,
            term,
            index: last,
            log_term,
            context: b"CampaignTransfer".as_slice().into(),
            ..pb::RaftMessage::default()
        };
        group.queue.clear();
        group.put(2, Input::Message { from: NodeId(from), message });
        let (_, to, answer) = group.queue.pop_front().unwrap();
        assert_eq!((to, answer.kind()), (from, pb::RaftKind::VoteResponse));
        !answer.reject
    };
    assert!(ask(&mut group, 3), "no vote at all");
    group.restart(2);
    assert!(!ask(&mut group, 1), "two votes in one term");
    assert!(ask(&mut group, 3), "the same vote again");
}

/// An acknowledged entry is on the disk of whoever acknowledged it.
#[test]
fn no_entry_is_acknowledged_before_it_is_durable() {
    let mut group = Group::of(3);
    group.isolate(3);
    group.nodes.get_mut(&2).unwrap().store_mut().full = true;
    let (request, answer) = group.propose(1, "a");
    assert_eq!(answer, None, "committed with one disk of three");
    assert!(group.nodes[&2].store().image.entries.iter().all(|entry| !entry.data.ends_with(b"a")));
    group.nodes.get_mut(&2).unwrap().store_mut().full = false;
    group.ticks(8);
    applied(group.answer(1, request));
}

#[test]
fn any_other_disk_error_ends_the_process() {
    let mut group = Group::of(1);
    let node = group.nodes.get_mut(&1).unwrap();
    node.store_mut().broken = true;
    let outcome = node.handle(Input::Propose { request: 1, command: b"a".to_vec() });
    assert!(matches!(outcome, Err(Fatal::Store(StoreError::Io(_)))), "{outcome:?}");
    node.store_mut().broken = false;
    assert!(matches!(node.handle(Input::Tick), Err(Fatal::Failed)), "it went on");
}

#[test]
fn a_leader_without_room_refuses_hands_over_and_recovers() {
    let mut group = Group::of(3);
    applied(group.propose(1, "a").1);
    group.nodes.get_mut(&1).unwrap().store_mut().full = true;
    // This one meets the full disk: whether the others keep it is not known here.
    let (met, _) = group.propose(1, "b");
    assert_eq!(refused(group.answer(1, met)), ProposeError::Unknown);
    assert!(group.heard[&1].contains(&Output::Room { room: false }));
    // No tick has passed, and somebody else leads.
    let second = group.leader().unwrap();
    assert_ne!(second, 1);
    assert_eq!(refused(group.propose(1, "c").1), ProposeError::Full);
    applied(group.propose(second, "d").1);
    group.nodes.get_mut(&1).unwrap().store_mut().full = false;
    group.ticks(30);
    assert!(group.heard[&1].contains(&Output::Room { room: true }));
    assert!(!group.nodes[&1].status().storage_full);
    assert_eq!(group.words(1), group.words(second));
    group.put(second, Input::Transfer { to: NodeId(1) });
    group.run();
    applied(group.propose(1, "e").1);
}

#[test]
fn a_leader_on_its_reserve_hands_over_in_order() {
    let mut group = Group::of(3);
    group.nodes.get_mut(&1).unwrap().store_mut().low = true;
    let (request, _) = group.propose(1, "a");
    applied(group.answer(1, request));
    assert_ne!(group.leader(), Some(1));
    assert!(group.nodes[&1].status().storage_full);
    group.nodes.get_mut(&1).unwrap().store_mut().low = false;
    group.ticks(6);
    assert!(!group.nodes[&1].status().storage_full);
}

/// Nothing waits for this write, so nothing is lost by it; and only another one shows that there
/// is room again.
#[test]
fn a_commit_that_finds_no_room_is_noticed() {
    let mut group = Group::of(1);
    applied(group.propose(1, "a").1);
    group.nodes.get_mut(&1).unwrap().store_mut().full = true;
    group.ticks(20);
    let rooms = |group: &Group| {
        let heard = group.heard[&1].iter();
        heard.filter(|event| matches!(event, Output::Room { .. })).count()
    };
    assert_eq!(rooms(&group), 1, "said once");
    assert_eq!(refused(group.propose(1, "b").1), ProposeError::Full);
    group.nodes.get_mut(&1).unwrap().store_mut().full = false;
    group.ticks(6);
    assert_eq!(rooms(&group), 2);
    applied(group.propose(1, "c").1);
}

#[test]
fn alone_without_room_it_refuses_and_recovers() {
    let mut group = Group::of(1);
    group.nodes.get_mut(&1).unwrap().store_mut().full = true;
    let (met, _) = group.propose(1, "a");
    assert_eq!(refused(group.answer(1, met)), ProposeError::Unknown);
    assert_eq!(refused(group.propose(1, "b").1), ProposeError::Full);
    let (read, answer) = group.read(1);
    assert_eq!(answer, None);
    group.nodes.get_mut(&1).unwrap().store_mut().full = false;
    group.ticks(6);
    assert!(matches!(group.answer(1, read), Some(Output::ReadReady { .. })));
    applied(group.propose(1, "c").1);
    assert_eq!(group.words(1), ["a", "c"]);
}

/// Loses, repeats and reorders, kills and restarts, from a seed; everyone agrees in the end.
#[test]
fn a_bad_network_and_dying_nodes_lose_nothing_acknowledged() {
    for seed in 0..60 {
        storm(seed);
    }
}

fn storm(seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let short = |id| ReplicaConfig { snapshot_entries: 8, keep_entries: 2, ..config(id) };
    let mut group = Group::of_one(short);
    group.add(2);
    group.add(3);
    let (mut acknowledged, mut asked) = (Vec::new(), Vec::new());
    for step in 0..400 {
        let id = 1 + next(3);
        match next(20) {
            0 => group.restart(id),
            1..=4 => {
                let request = group.request();
                let word = format!("{step}");
                asked.push((id, request, word.clone()));
                group.put(id, Input::Propose { request, command: word.into() });
            }
            5..=8 => group.put(id, Input::Tick),
            _ => {
                let Some((from, to, message)) = (match group.queue.len() as u64 {
                    0 => None,
                    len => group.queue.remove(next(len) as usize),
                }) else {
                    group.put(id, Input::Tick);
                    continue;
                };
                if from == to {
                    group.put(from, Input::SnapshotSent { peer: NodeId(message.to), ok: true });
                    continue;
                }
                if next(10) == 0 {
                    group.queue.push_back((from, to, message.clone()));
                }
                if next(10) != 0 {
                    group.put(to, Input::Message { from: NodeId(from), message });
                }
            }
        }
        asked.retain(|(id, request, word)| match group.answer(*id, *request) {
            Some(Output::Applied { .. }) => {
                acknowledged.push(word.clone());
                false
            }
            answer => answer.is_none(),
        });
    }
    group.run();
    group.ticks(80);
    let leader = group.elect();
    applied(group.propose(leader, "end").1);
    group.ticks(10);
    for id in 1..=3 {
        assert_eq!(group.words(id), group.words(leader), "seed {seed} node {id}");
    }
    let words = group.words(leader);
    for word in &acknowledged {
        assert!(words.contains(word), "seed {seed}: {word} was acknowledged and is gone");
    }
}

#[test]
fn with_every_disk_full_leadership_stays_where_it_is() {
    let mut group = Group::of(3);
    group.ticks(5);
    for node in group.nodes.values_mut() {
        (node.store_mut().low, node.store_mut().full) = (true, true);
    }
    // One command meets the full disk; whoever leads afterwards goes on to.
    let leader = group.leader().unwrap();
    group.propose(leader, "a");
    group.ticks(60);
    let term = group.nodes.values().map(|node| node.status().term).max();
    group.ticks(200);
    assert_eq!(group.nodes.values().map(|node| node.status().term).max(), term);
    for node in group.nodes.values_mut() {
        (node.store_mut().low, node.store_mut().full) = (false, false);
    }
    group.ticks(30);
    let leader = group.elect();
    applied(group.propose(leader, "b").1);
}

#[test]
fn on_their_reserves_leaders_hand_over_to_who_has_room_or_to_nobody() {
    let mut group = Group::of(3);
    for id in [1, 2] {
        group.nodes.get_mut(&id).unwrap().store_mut().low = true;
    }
    // A write shows it to each.
    applied(group.propose(1, "a").1);
    group.ticks(60);
    assert_eq!(group.leader(), Some(3), "1 and 2 have no room");
    group.nodes.get_mut(&3).unwrap().store_mut().low = true;
    group.ticks(60);
    let term = group.nodes[&3].status().term;
    group.ticks(200);
    assert_eq!((group.leader(), group.nodes[&3].status().term), (Some(3), term));
}
