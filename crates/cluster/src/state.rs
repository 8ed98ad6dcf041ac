//! The replicated state and what may be asked of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use planner::{NodeId, ShardPlan};

use crate::{Deployment, NodeInfo};

/// A group's number; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct GroupId(pub u64);

/// The number of a group's incarnation; carried by every step and every collective frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Epoch(pub u64);

/// A machine that has joined.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// What it said when it joined.
    pub info: NodeInfo,
    /// False once it was lost; the same machine comes back under another number.
    pub alive: bool,
}

/// Where a group stands. Phases only move forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Its ranks load.
    Forming,
    /// Every rank is ready.
    Serving,
    /// It will never serve again.
    Retired,
}

/// A set of ranks that together hold one copy of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Its incarnation.
    pub epoch: Epoch,
    /// Who holds what.
    pub plan: ShardPlan,
    /// Where it stands.
    pub phase: Phase,
    /// Ranks that have reported ready.
    pub ready: BTreeSet<usize>,
    /// Why it was retired; empty before.
    pub reason: String,
}

/// Where requests for a model go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The group.
    pub group: GroupId,
    /// Its incarnation; the leader refuses requests for another.
    pub epoch: Epoch,
    /// `host:port` of the Worker service of rank 0.
    pub leader_address: String,
}

/// Everything the coordinators agree on. Changed by [`ClusterState::apply`] alone.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClusterState {
    pub(crate) deployment: Option<Deployment>,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) groups: BTreeMap<GroupId, Group>,
    /// Greatest node number ever given.
    pub(crate) last_node: u64,
    /// Greatest group number ever placed.
    pub(crate) last_group: GroupId,
    /// Greatest epoch ever placed.
    pub(crate) last_epoch: Epoch,
    /// Log index of the last command that was accepted.
    pub(crate) index: u64,
    /// Commands accepted so far.
    pub(crate) revision: u64,
}

impl Group {
    /// Forming or serving: it owns its devices.
    pub fn live(&self) -> bool {
        self.phase != Phase::Retired
    }

    /// The nodes that hold a rank of it.
    pub fn nodes(&self) -> BTreeSet<NodeId> {
        self.plan.ranks.iter().map(|rank| rank.node).collect()
    }
}

impl ClusterState {
    /// An empty cluster.
    pub fn new() -> Self {
        Self::default()
    }

    /// What shall be served, where anything shall.
    pub fn deployment(&self) -> Option<&Deployment> {
        self.deployment.as_ref()
    }

    /// Nodes by number: all that are alive and some that were lost lately.
    pub fn nodes(&self) -> &BTreeMap<NodeId, Node> {
        &self.nodes
    }

    /// Groups by number: all that are live and some that were retired lately.
    pub fn groups(&self) -> &BTreeMap<GroupId, Group> {
        &self.groups
    }

    /// Number of commands accepted; grows with every change.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Log index of the last command that was accepted.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// Where requests for `model` go: the serving group of the greatest epoch.
    pub fn route(&self, model: &str) -> Option<Route> {
        self.deployment.as_ref().filter(|deployment| deployment.model == model)?;
        let serving = self.groups.iter().filter(|(_, group)| group.phase == Phase::Serving);
        let (&id, group) = serving.max_by_key(|(_, group)| group.epoch)?;
        let leader = self.nodes.get(&group.plan.ranks.first()?.node)?;
        let leader_address = leader.info.worker_address.clone();
        Some(Route { group: id, epoch: group.epoch, leader_address })
    }

    /// Devices that live groups own.
    pub(crate) fn taken(&self) -> BTreeSet<(NodeId, usize)> {
        let live = self.groups.values().filter(|group| group.live());
        live.flat_map(|group| &group.plan.ranks).map(|rank| (rank.node, rank.device)).collect()
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forming => "forming",
            Self::Serving => "serving",
            Self::Retired => "retired",
        })
    }
}
