//! Members of Raft follow the coordinators of the state: learner first, voter once caught up, one
//! change at a time.

use std::collections::BTreeSet;

use planner::NodeId;

use super::{Leader, Output, Sight, Subject};
use crate::replica::{MemberChange, MemberSet, ReplicaStatus, heir};

/// A learner may be so many entries behind when it gets its vote.
const LAG: u64 = 100;
/// For how long it must have been that near.
const STEADY: u64 = 200;

impl Leader {
    pub(super) fn members(&mut self, sight: Sight<'_>) {
        let members = &sight.replica.members;
        self.watch_learners(sight.replica);
        if members.is_joint() || self.is_pending(Subject::Members) {
            return;
        }
        if self.now < self.members_after {
            return;
        }
        match self.next_change(sight, members) {
            Some(MemberChange::Remove(node)) if node == sight.replica.id => {
                self.hand_over(sight.replica);
            }
            Some(change) => {
                let number = self.number(Subject::Members, None);
                self.out.push(Output::Change { number, change });
            }
            None => {}
        }
    }

    fn next_change(&self, sight: Sight<'_>, members: &MemberSet) -> Option<MemberChange> {
        let cluster = sight.cluster;
        // The leader's own removal waits until another can lead: its learners come first.
        let me = sight.replica.id;
        let may_go = |node: &NodeId| match *node == me {
            true => heir(&sight.replica.peers).is_some(),
            false => decides_without(sight.replica, *node),
        };
        let mut removed = members.all().into_iter().filter(|node| cluster.removed(*node));
        if let Some(node) = removed.find(may_go) {
            return Some(MemberChange::Remove(node));
        }
        let wished: BTreeSet<NodeId> = cluster.coordinators().map(|(node, _)| node).collect();
        let ready = |node: &&NodeId| {
            let since = self.caught_up.get(node);
            since.is_some_and(|since| self.now - since >= STEADY)
        };
        let learners: BTreeSet<NodeId> = members.learners.intersection(&wished).copied().collect();
        if let Some(&node) = learners.iter().find(ready) {
            return Some(MemberChange::Promote(node));
        }
        let known = members.all();
        wished.into_iter().find(|node| !known.contains(node)).map(MemberChange::AddLearner)
    }

    fn watch_learners(&mut self, replica: &ReplicaStatus) {
        let now = self.now;
        let near = |node: &NodeId| {
            let peer = replica.peers.get(node);
            // A vote for one that has just ended could be one too many for those that stay.
            peer.is_some_and(|peer| peer.answers && peer.matched + LAG >= replica.last)
        };
        let near: BTreeSet<NodeId> =
            replica.members.learners.iter().copied().filter(|node| near(node)).collect();
        self.caught_up.retain(|node, _| near.contains(node));
        for node in near {
            self.caught_up.entry(node).or_insert(now);
        }
    }

    /// Who is to be removed cannot lead its own removal: it hands over to the voter whose log is
    /// nearest to its own.
    fn hand_over(&mut self, replica: &ReplicaStatus) {
        if let Some(to) = heir(&replica.peers).filter(|_| replica.transfer.is_none()) {
            self.members_after = self.now + 1_000;
            self.out.push(Output::Transfer { to });
        }
    }
}

/// Whether those that vote once `node` does not are there to decide. With one of three lost, the
/// removal of another waits for that of the lost one.
fn decides_without(replica: &ReplicaStatus, node: NodeId) -> bool {
    let answers = |voter: &NodeId| {
        *voter == replica.id || replica.peers.get(voter).is_some_and(|peer| peer.answers)
    };
    let staying: Vec<&NodeId> = replica.members.voters.iter().filter(|v| **v != node).collect();
    let there = staying.iter().filter(|voter| answers(voter)).count();
    !replica.members.is_voter(node) || 2 * there > staying.len()
}
