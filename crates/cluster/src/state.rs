//! The replicated state and what may be asked of it.

use std::collections::{BTreeMap, BTreeSet};

use planner::NodeId;

use crate::outcome::Outcomes;
use crate::{
    Alias, Coordinator, Deployment, Group, GroupId, Model, Node, Outcome, Phase, RequestId, Route,
    Standing, Token, TokenId,
};

/// Everything the coordinators agree on. Changed by [`ClusterState::apply`] alone.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClusterState {
    /// By digest.
    pub(crate) models: BTreeMap<String, Model>,
    /// By name.
    pub(crate) deployments: BTreeMap<String, Deployment>,
    /// Deployments that get no new requests.
    pub(crate) draining: BTreeSet<String>,
    /// By the name that clients use.
    pub(crate) aliases: BTreeMap<String, Alias>,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) tokens: BTreeMap<TokenId, Token>,
    pub(crate) groups: BTreeMap<GroupId, Group>,
    pub(crate) outcomes: Outcomes,
    /// Greatest node number ever given.
    pub(crate) last_node: u64,
    /// Greatest group number ever placed.
    pub(crate) last_group: GroupId,
    /// How often certificates were rotated.
    pub(crate) generation: u64,
    /// Log index of the last command that was accepted.
    pub(crate) index: u64,
    /// Commands accepted so far.
    pub(crate) revision: u64,
}

impl ClusterState {
    /// An empty cluster.
    pub fn new() -> Self {
        Self::default()
    }

    /// Models by digest.
    pub fn models(&self) -> &BTreeMap<String, Model> {
        &self.models
    }

    /// What shall be served, by name.
    pub fn deployments(&self) -> &BTreeMap<String, Deployment> {
        &self.deployments
    }

    /// Deployments that get no new requests, until they are undeployed or deployed again.
    pub fn draining(&self) -> &BTreeSet<String> {
        &self.draining
    }

    /// Names that clients use beside those of deployments. None is also a deployment's.
    pub fn aliases(&self) -> &BTreeMap<String, Alias> {
        &self.aliases
    }

    /// Nodes by number: all that may come back and some that left lately.
    pub fn nodes(&self) -> &BTreeMap<NodeId, Node> {
        &self.nodes
    }

    /// Join tokens that were used and are not known to have expired.
    pub fn tokens(&self) -> &BTreeMap<TokenId, Token> {
        &self.tokens
    }

    /// Groups by number: all that shall serve and some that were retired lately.
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

    /// How often certificates were rotated: nodes whose certificate is of a generation before
    /// shall ask for another.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The coordinators that have said where they are reached.
    pub fn coordinators(&self) -> impl Iterator<Item = (NodeId, &Coordinator)> {
        let present = self.nodes.iter().filter(|(_, node)| node.standing != Standing::Left);
        present.filter_map(|(&id, node)| Some((id, node.coordinator.as_ref()?)))
    }

    /// Whether a node of this number was let in once and is so no longer. Its certificate is
    /// worth nothing, however long it is valid.
    pub fn removed(&self, node: NodeId) -> bool {
        let given = node.0 > 0 && node.0 <= self.last_node;
        given && self.nodes.get(&node).is_none_or(|node| node.standing == Standing::Left)
    }

    /// The greatest node number that was ever given, and who of those was not removed.
    pub fn roll(&self) -> (u64, BTreeSet<NodeId>) {
        let present = self.nodes.iter().filter(|(_, node)| node.standing != Standing::Left);
        (self.last_node, present.map(|(&id, _)| id).collect())
    }

    /// What a client's write was answered, while that is remembered.
    pub fn outcome(&self, request: &RequestId) -> Option<&Outcome> {
        self.outcomes.get(request)
    }

    /// Where requests for a deployment go: its serving groups, by number.
    pub fn routes(&self, name: &str) -> Vec<Route> {
        self.serving(name).collect()
    }

    /// One of [`ClusterState::routes`].
    pub fn route(&self, name: &str) -> Option<Route> {
        self.serving(name).next()
    }

    fn serving<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Route> + 'a {
        let serving = self.groups_of(name).filter(|(_, group)| group.phase == Phase::Serving);
        serving.filter_map(|(id, group)| {
            let leader = group.plan.ranks.first()?.node;
            let leader_address = self.nodes.get(&leader)?.info.as_ref()?.worker_address.clone();
            Some(Route { group: id, epoch: group.epoch, leader, leader_address })
        })
    }

    /// A deployment's groups that shall serve, in whatever phase.
    pub fn groups_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (GroupId, &'a Group)> {
        let groups = self.groups.iter().map(|(&id, group)| (id, group));
        groups.filter(move |(_, group)| group.phase != Phase::Retired && group.deployment == name)
    }

    /// Live groups that have a rank on this node. A node that drains may be stopped once there are
    /// none.
    pub fn groups_on(&self, node: NodeId) -> impl Iterator<Item = (GroupId, &Group)> {
        let live = self.groups.iter().filter(|(_, group)| group.live());
        let holds = move |group: &Group| group.plan.ranks.iter().any(|rank| rank.node == node);
        live.filter(move |(_, group)| holds(group)).map(|(&id, group)| (id, group))
    }

    /// Devices that live groups own, but for those of `except`.
    pub(crate) fn taken(&self, except: Option<GroupId>) -> BTreeSet<(NodeId, usize)> {
        let live = self.groups.iter().filter(|(id, group)| group.live() && Some(**id) != except);
        let ranks = live.flat_map(|(_, group)| &group.plan.ranks);
        ranks.map(|rank| (rank.node, rank.device)).collect()
    }
}
