//! Whose steps a rank runs, and for how long.

use super::*;

const GROUP: GroupId = GroupId(3);

/// A worker with rank 1 of a group at epoch 4, which node 7 leads; where the rank gets its steps.
fn following() -> (Groups, mpsc::Receiver<(Step, channel::UnboundedSender<StepDone>)>) {
    let groups = Groups::default();
    let (steps, inbox) = mpsc::channel();
    let hosted = Hosted {
        epoch: Epoch(4),
        leads: Some(NodeId(7)),
        leader: None,
        steps: BTreeMap::from([(1, steps)]),
        ranks: BTreeMap::new(),
        pulses: BTreeMap::new(),
        devices: BTreeSet::new(),
        stop: Stop::default(),
        threads: Vec::new(),
    };
    groups.lock().insert(GROUP, hosted);
    (groups, inbox)
}

#[test]
fn a_rank_does_not_wait_for_steps_that_nobody_will_send() {
    let (groups, inbox) = following();
    groups.left_alone(GROUP, Epoch(3), 1);
    assert_eq!(inbox.try_recv().map(|_| ()), Err(mpsc::TryRecvError::Empty), "another epoch");
    groups.left_alone(GROUP, Epoch(4), 1);
    assert_eq!(inbox.try_recv().map(|_| ()), Err(mpsc::TryRecvError::Disconnected));
}

#[test]
fn only_the_node_that_leads_a_group_sends_it_steps() {
    let (groups, _inbox) = following();
    let group = GROUP;
    assert!(groups.steps(group, Epoch(4), 1, NodeId(7)).is_ok());
    let other = groups.steps(group, Epoch(4), 1, NodeId(8)).map(|_| ());
    assert_eq!(other, Err(NoGroup::OtherLeader { group, caller: NodeId(8) }));
}

impl Groups {
    /// Takes in a group whose thread does `work`, whatever it is told.
    pub(crate) fn take_in(
        &self,
        group: GroupId,
        epoch: Epoch,
        work: impl FnOnce() + Send + 'static,
    ) {
        let hosted = Hosted {
            epoch,
            leads: None,
            leader: None,
            steps: BTreeMap::new(),
            ranks: BTreeMap::new(),
            pulses: BTreeMap::new(),
            devices: BTreeSet::new(),
            stop: Stop::default(),
            threads: vec![std::thread::spawn(work)],
        };
        self.lock().insert(group, hosted);
    }
}
