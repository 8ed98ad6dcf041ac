//! Whose steps a rank runs.

use super::*;

#[test]
fn only_the_node_that_leads_a_group_sends_it_steps() {
    let groups = Groups::default();
    let (steps, _inbox) = mpsc::channel();
    let hosted = Hosted {
        epoch: Epoch(4),
        leads: Some(NodeId(7)),
        leader: None,
        steps: BTreeMap::from([(1, steps)]),
        ranks: BTreeMap::new(),
        pulses: BTreeMap::new(),
        stop: Stop::default(),
        threads: Vec::new(),
    };
    let group = GroupId(3);
    groups.lock().insert(group, hosted);
    assert!(groups.steps(group, Epoch(4), 1, NodeId(7)).is_ok());
    let other = groups.steps(group, Epoch(4), 1, NodeId(8)).map(|_| ());
    assert_eq!(other, Err(NoGroup::OtherLeader { group, caller: NodeId(8) }));
}
