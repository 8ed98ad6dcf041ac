//! Coordinators that come and go.

use super::*;

#[test]
fn coordinators_become_learners_then_voters_and_leave_one_at_a_time() {
    let mut bench = Bench::new(1, 0);
    bench.enrol(1, Role::Coordinator);
    bench.enrol(2, Role::Coordinator);
    bench.coordinators(3);
    bench.wait(10);
    assert_eq!(bench.changes, [(1, MemberChange::AddLearner(NodeId(2)))]);
    bench.wait(10);
    assert_eq!(bench.changes.len(), 1, "one at a time");
    bench.replica.members.learners.insert(NodeId(2));
    bench.replica.last = 500;
    let far = peer(10, false);
    bench.replica.peers.insert(NodeId(2), far);
    bench.input(Input::Decided { number: 1, outcome: Some(Ok(Vec::new())) });
    assert_eq!(bench.changes.pop().unwrap().1, MemberChange::AddLearner(NodeId(3)));
    bench.input(Input::Decided { number: 2, outcome: None });
    bench.wait(500);
    assert_eq!(bench.changes.len(), 1, "a refused change is not repeated at once");
    bench.replica.peers.get_mut(&NodeId(2)).unwrap().matched = 450;
    bench.wait(300);
    bench.wait(300);
    assert_eq!(bench.changes.pop().unwrap().1, MemberChange::Promote(NodeId(2)));
    bench.replica.members.learners = BTreeSet::from([NodeId(3)]);
    bench.replica.members.voters.insert(NodeId(2));
    bench.replica.peers.get_mut(&NodeId(2)).unwrap().voter = true;
    bench.input(Input::Decided { number: 3, outcome: Some(Ok(Vec::new())) });
    // The leader itself is taken out: it hands over first.
    bench.changes.clear();
    bench.apply(Command::Leave { node: NodeId(1) }).unwrap();
    bench.wait(10);
    assert_eq!((bench.transfers.clone(), bench.changes.len()), (vec![NodeId(2)], 0));
}

#[test]
fn a_leader_that_left_alone_first_makes_a_voter_of_another() {
    let mut bench = Bench::new(1, 0);
    bench.enrol(1, Role::Coordinator);
    bench.coordinators(2);
    bench.apply(Command::Leave { node: NodeId(1) }).unwrap();
    bench.wait(10);
    assert_eq!(bench.changes.pop(), Some((1, MemberChange::AddLearner(NodeId(2)))));
    bench.replica.members.learners.insert(NodeId(2));
    let near = peer(9, false);
    bench.replica.peers.insert(NodeId(2), near);
    bench.input(Input::Decided { number: 1, outcome: Some(Ok(Vec::new())) });
    bench.wait(300);
    assert_eq!(bench.changes.pop(), Some((2, MemberChange::Promote(NodeId(2)))));
    bench.replica.members.learners.clear();
    bench.replica.members.voters.insert(NodeId(2));
    bench.replica.peers.get_mut(&NodeId(2)).unwrap().voter = true;
    bench.input(Input::Decided { number: 2, outcome: Some(Ok(Vec::new())) });
    assert_eq!((bench.transfers.clone(), bench.changes.len()), (vec![NodeId(2)], 0));
}

#[test]
fn one_that_has_just_ended_gets_no_vote() {
    let mut bench = Bench::new(1, 0);
    bench.enrol(1, Role::Coordinator);
    bench.coordinators(2);
    bench.replica.members.learners.insert(NodeId(2));
    bench.replica.peers.insert(NodeId(2), peer(9, false));
    bench.wait(100);
    bench.replica.peers.get_mut(&NodeId(2)).unwrap().answers = false;
    bench.wait(100);
    bench.wait(500);
    assert_eq!(bench.changes, []);
    bench.replica.peers.get_mut(&NodeId(2)).unwrap().answers = true;
    bench.wait(10);
    bench.wait(200);
    assert_eq!(bench.changes, [(1, MemberChange::Promote(NodeId(2)))]);
}

#[test]
fn with_a_coordinator_lost_no_other_is_taken_out_before_it() {
    let mut bench = Bench::new(1, 0);
    bench.enrol(1, Role::Coordinator);
    bench.enrol(2, Role::Coordinator);
    bench.coordinators(3);
    bench.replica.members.voters.extend([NodeId(2), NodeId(3)]);
    bench.replica.peers.insert(NodeId(2), peer(9, true));
    bench.replica.peers.insert(NodeId(3), PeerProgress { answers: false, ..peer(9, true) });
    bench.apply(Command::Leave { node: NodeId(2) }).unwrap();
    bench.wait(10);
    assert_eq!(bench.changes, [], "1 and 3 could not decide: 3 is lost");
    bench.apply(Command::Leave { node: NodeId(3) }).unwrap();
    bench.wait(10);
    assert_eq!(bench.changes, [(1, MemberChange::Remove(NodeId(3)))]);
    bench.replica.members.voters.remove(&NodeId(3));
    bench.replica.peers.remove(&NodeId(3));
    bench.input(Input::Decided { number: 1, outcome: Some(Ok(Vec::new())) });
    assert_eq!(bench.changes[1..], [(2, MemberChange::Remove(NodeId(2)))]);
}
