//! What must hold after every command, whatever the commands were.

use std::collections::BTreeSet;

use planner::NodeId;

use crate::apply::{
    ALIASES_MAX, DEPLOYMENTS_MAX, GROUPS_MAX, LEFT_KEPT, MODELS_MAX, NODES_MAX, RETIRED_KEPT,
    TOKENS_MAX,
};
use crate::{ClusterState, Epoch, Group, GroupId, Phase, Standing};

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
    /// A stripe of a group is held by no rank, or by two.
    #[error("stripe {stripe} of group {group} is not held exactly once")]
    Stripe {
        /// The group.
        group: GroupId,
        /// The stripe.
        stripe: usize,
    },
    /// A live group stands on a device that its node does not offer, or on a node that is gone.
    #[error("group {group} needs device {device} of node {}, which is not there", node.0)]
    NoDevice {
        /// The group.
        group: GroupId,
        /// The node.
        node: NodeId,
        /// The device.
        device: usize,
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
    /// A group that shall serve what nobody wishes for, or a wish for a model that is not known.
    #[error("{needed} is needed and not there")]
    Dangling {
        /// What is missing.
        needed: String,
    },
    /// An alias that means what is not deployed or gets no requests, or has a deployment's name.
    #[error("the alias {alias} contradicts the deployments")]
    Alias {
        /// The alias.
        alias: String,
    },
    /// A number was given that is greater than the greatest, or none at all.
    #[error("a number is in use that was never given")]
    Order,
    /// More is kept than should be.
    #[error("{kept} {what} are kept where {limit} may be")]
    Unbounded {
        /// Of what.
        what: &'static str,
        /// Entries.
        kept: usize,
        /// The limit.
        limit: usize,
    },
    /// Remembered outcomes contradict their order, or one is longer than any that is made.
    #[error("remembered outcomes are out of order or too long")]
    Outcomes,
}

impl ClusterState {
    /// Checks every invariant of the state; costs one walk over nodes and groups.
    ///
    /// # Errors
    /// [`IntegrityError`] names the first one that is broken.
    pub fn check_integrity(&self) -> Result<(), IntegrityError> {
        self.check_bounds()?;
        self.check_order()?;
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
        for deployment in self.deployments.values() {
            if !self.models.contains_key(&deployment.digest) {
                let needed = format!("the model of {}", deployment.name);
                return Err(IntegrityError::Dangling { needed });
            }
        }
        self.check_names()?;
        if self.outcomes.sound() { Ok(()) } else { Err(IntegrityError::Outcomes) }
    }

    fn check_group(&self, group: GroupId, entry: &Group) -> Result<(), IntegrityError> {
        let mut held = BTreeSet::new();
        for &stripe in entry.plan.ranks.iter().flat_map(|rank| &rank.stripes) {
            if stripe >= entry.plan.stripes || !held.insert(stripe) {
                return Err(IntegrityError::Stripe { group, stripe });
            }
        }
        if let Some(stripe) = (0..entry.plan.stripes).find(|stripe| !held.contains(stripe)) {
            return Err(IntegrityError::Stripe { group, stripe });
        }
        let (ready, ranks) = (entry.ready.len(), entry.plan.ranks.len());
        let inside = entry.ready.iter().all(|&rank| rank < ranks);
        let matches = match entry.phase {
            Phase::Forming | Phase::Repairing => ready == 0,
            Phase::Loading => ready < ranks,
            Phase::Serving => ready == ranks,
            Phase::Retired => true,
        };
        if !inside || !matches {
            return Err(IntegrityError::WrongPhase { group, phase: entry.phase, ready, ranks });
        }
        if entry.phase != Phase::Retired && !self.deployments.contains_key(&entry.deployment) {
            return Err(IntegrityError::Dangling { needed: entry.deployment.clone() });
        }
        for rank in entry.plan.ranks.iter().filter(|_| entry.live()) {
            let (node, device) = (rank.node, rank.device);
            let devices = self.nodes.get(&node).map_or(0, |node| node.devices().len());
            if device >= devices {
                return Err(IntegrityError::NoDevice { group, node, device });
            }
        }
        Ok(())
    }

    fn check_names(&self) -> Result<(), IntegrityError> {
        let deployed = |name: &String| self.deployments.contains_key(name);
        if let Some(name) = self.draining.iter().find(|name| !deployed(name)) {
            return Err(IntegrityError::Dangling { needed: name.clone() });
        }
        for (alias, meant) in &self.aliases {
            let served = deployed(&meant.deployment) && !self.draining.contains(&meant.deployment);
            let before = meant.before.as_ref();
            let kept = before.is_none_or(|before| deployed(before) && *before != meant.deployment);
            if deployed(alias) || !served || !kept {
                return Err(IntegrityError::Alias { alias: alias.clone() });
            }
        }
        Ok(())
    }

    fn check_order(&self) -> Result<(), IntegrityError> {
        let groups = self.groups.iter().all(|(id, group)| {
            (1..=self.last_group.0).contains(&id.0) && group.epoch >= Epoch::FIRST
        });
        let nodes = self.nodes.keys().all(|id| (1..=self.last_node).contains(&id.0));
        if groups && nodes { Ok(()) } else { Err(IntegrityError::Order) }
    }

    fn check_bounds(&self) -> Result<(), IntegrityError> {
        let retired = self.groups.values().filter(|group| group.phase == Phase::Retired).count();
        let left = self.nodes.values().filter(|node| node.standing == Standing::Left).count();
        let wished = self.deployments.values().map(|deployment| deployment.replicas).sum();
        for (what, kept, limit) in [
            ("retired groups", retired, RETIRED_KEPT),
            ("groups", self.groups.len() - retired, GROUPS_MAX),
            ("groups wished for", wished, GROUPS_MAX),
            ("nodes that left", left, LEFT_KEPT),
            ("nodes", self.nodes.len() - left, NODES_MAX),
            ("tokens", self.tokens.len(), TOKENS_MAX),
            ("models", self.models.len(), MODELS_MAX),
            ("deployments", self.deployments.len(), DEPLOYMENTS_MAX),
            ("aliases", self.aliases.len(), ALIASES_MAX),
        ] {
            if kept > limit {
                return Err(IntegrityError::Unbounded { what, kept, limit });
            }
        }
        Ok(())
    }
}
