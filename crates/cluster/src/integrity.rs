//! What must hold after every command, whatever the commands were.

use std::collections::BTreeSet;

use planner::NodeId;

use crate::apply::{LOST_KEPT, RETIRED_KEPT};
use crate::{ClusterState, Group, GroupId, Phase};

/// A broken invariant: a bug, never the fault of a command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IntegrityError {
    /// Two live groups, or two ranks of one, share a device.
    #[error("device {device} of node {} belongs to two ranks", node.0)]
    SharedDevice {
        /// The node.
        node: NodeId,
        /// The device.
        device: usize,
    },
    /// A live group stands on a node that is gone.
    #[error("group {group} needs node {}, which is gone", node.0)]
    DeadNode {
        /// The group.
        group: GroupId,
        /// The node.
        node: NodeId,
    },
    /// A group's phase contradicts the ranks that are ready.
    #[error("group {group} is {phase} with {ready} of {ranks} ranks ready")]
    WrongPhase {
        /// The group.
        group: GroupId,
        /// Its phase.
        phase: Phase,
        /// Ranks that are ready.
        ready: usize,
        /// Ranks of the plan.
        ranks: usize,
    },
    /// A number was given that is greater than the greatest, or epochs do not follow numbers.
    #[error("numbers and epochs do not grow together")]
    Order,
    /// More is kept for information than should be.
    #[error("{kept} entries are kept where {limit} may be")]
    Unbounded {
        /// Entries.
        kept: usize,
        /// The limit.
        limit: usize,
    },
}

impl ClusterState {
    /// Checks every invariant of the state; costs one walk over nodes and groups.
    ///
    /// # Errors
    /// [`IntegrityError`] names the first one that is broken.
    pub fn check_integrity(&self) -> Result<(), IntegrityError> {
        let mut taken = BTreeSet::new();
        for (&id, group) in &self.groups {
            self.check_group(id, group)?;
            for rank in group.plan.ranks.iter().filter(|_| group.live()) {
                let (node, device) = (rank.node, rank.device);
                if !taken.insert((node, device)) {
                    return Err(IntegrityError::SharedDevice { node, device });
                }
            }
        }
        self.check_order()?;
        let retired = self.groups.values().filter(|group| !group.live()).count();
        let lost = self.nodes.values().filter(|node| !node.alive).count();
        for (kept, limit) in [(retired, RETIRED_KEPT), (lost, LOST_KEPT)] {
            if kept > limit {
                return Err(IntegrityError::Unbounded { kept, limit });
            }
        }
        Ok(())
    }

    fn check_group(&self, group: GroupId, entry: &Group) -> Result<(), IntegrityError> {
        let (ready, ranks) = (entry.ready.len(), entry.plan.ranks.len());
        let inside = entry.ready.iter().all(|&rank| rank < ranks);
        let matches = match entry.phase {
            Phase::Forming => ready < ranks,
            Phase::Serving => ready == ranks,
            Phase::Retired => true,
        };
        if !inside || !matches {
            return Err(IntegrityError::WrongPhase { group, phase: entry.phase, ready, ranks });
        }
        for rank in entry.plan.ranks.iter().filter(|_| entry.live()) {
            if !self.nodes.get(&rank.node).is_some_and(|node| node.alive) {
                return Err(IntegrityError::DeadNode { group, node: rank.node });
            }
        }
        Ok(())
    }

    fn check_order(&self) -> Result<(), IntegrityError> {
        let epochs: Vec<_> = self.groups.values().map(|group| group.epoch).collect();
        let growing = epochs.is_sorted_by(|a, b| a < b);
        let groups = self.groups.keys().all(|&id| id <= self.last_group);
        let below = epochs.iter().all(|&epoch| epoch <= self.last_epoch);
        let nodes = self.nodes.keys().all(|id| id.0 <= self.last_node);
        if growing && groups && below && nodes { Ok(()) } else { Err(IntegrityError::Order) }
    }
}
