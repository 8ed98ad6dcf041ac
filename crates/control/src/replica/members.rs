//! Who takes part in consensus, and how that changes.

use std::collections::BTreeSet;

use planner::NodeId;

/// Most members of a cluster's consensus group, learners included.
pub const MEMBERS_MAX: usize = 64;

/// The members as of one entry of the log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemberSet {
    /// Those whose votes count.
    pub voters: BTreeSet<NodeId>,
    /// While joint: the voters of the configuration being left, whose majority is needed too.
    pub outgoing: BTreeSet<NodeId>,
    /// Those that receive the log and do not vote.
    pub learners: BTreeSet<NodeId>,
    /// Voters that become learners once joint consensus is left.
    pub learners_next: BTreeSet<NodeId>,
    /// Whether the leader leaves joint consensus by itself.
    pub auto_leave: bool,
}

impl MemberSet {
    /// A group of one.
    pub fn of_one(id: NodeId) -> Self {
        Self { voters: BTreeSet::from([id]), ..Self::default() }
    }

    /// Whether two configurations decide together at the moment.
    pub fn is_joint(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether this node takes part in any way.
    pub fn contains(&self, id: NodeId) -> bool {
        [&self.voters, &self.outgoing, &self.learners, &self.learners_next]
            .iter()
            .any(|set| set.contains(&id))
    }

    /// Whether this node's vote counts.
    pub fn is_voter(&self, id: NodeId) -> bool {
        self.voters.contains(&id) || self.outgoing.contains(&id)
    }

    /// Every node that takes part in any way.
    pub fn all(&self) -> BTreeSet<NodeId> {
        let sets = [&self.voters, &self.outgoing, &self.learners, &self.learners_next];
        sets.into_iter().flatten().copied().collect()
    }
}

/// One change of members. Changes happen one at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberChange {
    /// A node that is not a member, and never was, receives the log from now on.
    AddLearner(NodeId),
    /// A learner gets a vote. The caller asks once it has caught up ([`super::ReplicaStatus`]).
    Promote(NodeId),
    /// A member takes no further part; its number is never used again.
    Remove(NodeId),
}

impl MemberChange {
    /// The node it is about.
    pub fn node(self) -> NodeId {
        match self {
            Self::AddLearner(id) | Self::Promote(id) | Self::Remove(id) => id,
        }
    }
}
