//! What may be proposed, and what came of it.

use std::collections::BTreeSet;

use planner::{NodeId, ShardPlan};

use crate::{
    Coordinator, Deployment, Done, Epoch, GroupId, Model, NodeInfo, RequestId, Role, TokenId,
};

/// A command, and who asked for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Proposal {
    /// The client's number for this write. Whatever carries it again changes nothing and gets the
    /// first one's outcome. The control plane's own commands need none: they name what they expect.
    pub request: Option<RequestId>,
    /// The change.
    pub command: Command,
}

impl From<Command> for Proposal {
    fn from(command: Command) -> Self {
        Self { request: None, command }
    }
}

/// A change that somebody proposes.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// The first coordinator lets itself in, as node 1. Only an empty cluster accepts it.
    Found {
        /// A name for people.
        name: String,
    },
    /// A node with a join token shall get its identity.
    Enrol {
        /// The token.
        token: TokenId,
        /// How often it may be used.
        uses_max: u32,
        /// Second (since 1970) after which no certificate check accepts the token any more; a
        /// later one will do. The token is remembered until then.
        expires: u64,
        /// The proposer's clock, in seconds since 1970: forgets tokens that nobody can use.
        now: u64,
        /// What the token lets nodes in for.
        role: Role,
        /// A name for people.
        name: String,
    },
    /// A node offers its devices. The same process may say so again, to another leader: that
    /// changes nothing.
    Join {
        /// The node, by its certificate.
        node: NodeId,
        /// What it says of itself.
        info: NodeInfo,
    },
    /// A node's lease is late.
    Suspect {
        /// The node.
        node: NodeId,
        /// The incarnation that is meant.
        incarnation: u64,
    },
    /// A suspect node was heard again.
    Recover {
        /// The node.
        node: NodeId,
        /// The incarnation that is meant.
        incarnation: u64,
    },
    /// A node's lease ran out or its process is known to have ended.
    Lost {
        /// The node.
        node: NodeId,
        /// The incarnation that is meant.
        incarnation: u64,
    },
    /// A node shall hold no ranks; they move where there is room for them.
    Drain {
        /// The node.
        node: NodeId,
    },
    /// A node may hold ranks again.
    Undrain {
        /// The node.
        node: NodeId,
    },
    /// A node is removed. Its number is refused for ever.
    Leave {
        /// The node.
        node: NodeId,
    },
    /// A coordinator says where it is reached.
    SetCoordinator {
        /// The coordinator.
        node: NodeId,
        /// Where.
        at: Coordinator,
    },
    /// Deployments may name this model.
    RegisterModel(Model),
    /// A model that no deployment names shall be forgotten.
    ForgetModel {
        /// Its digest.
        digest: String,
    },
    /// Serve this; or, of a deployment that stands, change replicas and nodes.
    Deploy(Deployment),
    /// Serve it no longer.
    Undeploy {
        /// The deployment.
        name: String,
    },
    /// No new request goes to it; what it has begun goes on. Deploying it again takes that back.
    DrainDeployment {
        /// The deployment.
        name: String,
    },
    /// A name that clients use means this deployment from now on.
    Point {
        /// The name.
        alias: String,
        /// The deployment.
        deployment: String,
    },
    /// The name means nothing any more.
    Unpoint {
        /// The name.
        alias: String,
    },
    /// Form a group's next incarnation by this finished plan; one that lives is replaced by it.
    Place {
        /// The group, or one of the next numbers.
        group: GroupId,
        /// The deployment whose replica it is.
        deployment: String,
        /// The group's next epoch.
        epoch: Epoch,
        /// Who holds what.
        plan: ShardPlan,
    },
    /// A rank has begun to read its stripes.
    Loading {
        /// The group.
        group: GroupId,
        /// Its incarnation.
        epoch: Epoch,
    },
    /// A rank has loaded its stripes and reached its peers.
    RankReady {
        /// The group.
        group: GroupId,
        /// Its incarnation.
        epoch: Epoch,
        /// The rank.
        rank: usize,
    },
    /// A group's incarnation cannot go on: a rank failed.
    Fence {
        /// The group.
        group: GroupId,
        /// The incarnation that ends.
        epoch: Epoch,
        /// Why, for operators.
        reason: String,
    },
    /// A group shall serve no longer.
    Retire {
        /// The group.
        group: GroupId,
        /// Its incarnation.
        epoch: Epoch,
        /// Why, for operators.
        reason: String,
    },
    /// Every node shall get a new certificate.
    RotateCertificates,
}

/// What a command changed, in the order in which it did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The request was answered before; nothing has changed.
    Repeated(Done),
    /// A node has its number.
    NodeEnrolled {
        /// The node.
        node: NodeId,
    },
    /// A new process offers the node's devices.
    NodeJoined {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        incarnation: u64,
    },
    /// The same process is there as before; it holds what it held.
    NodeResumed {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        incarnation: u64,
    },
    /// A node's lease is late.
    NodeSuspect {
        /// The node.
        node: NodeId,
    },
    /// A node's process is gone.
    NodeLost {
        /// The node.
        node: NodeId,
    },
    /// A node shall lose its ranks, or may hold some again.
    NodeDraining {
        /// The node.
        node: NodeId,
        /// Which of the two.
        draining: bool,
    },
    /// A node is gone for ever.
    NodeLeft {
        /// The node.
        node: NodeId,
    },
    /// A coordinator is reached elsewhere.
    CoordinatorSet {
        /// The coordinator.
        node: NodeId,
    },
    /// Deployments may name a model.
    ModelRegistered {
        /// Its digest.
        digest: String,
    },
    /// Deployments may no longer name it.
    ModelForgotten {
        /// Its digest.
        digest: String,
    },
    /// There is something to serve, or it changed in scale.
    Deployed {
        /// The deployment.
        name: String,
    },
    /// It shall no longer be served.
    Undeployed {
        /// The deployment.
        name: String,
    },
    /// A deployment gets no new requests, or gets them again.
    DeploymentDraining {
        /// The deployment.
        name: String,
        /// Which of the two.
        draining: bool,
    },
    /// A name means a deployment.
    AliasPointed {
        /// The name.
        alias: String,
        /// The deployment.
        deployment: String,
    },
    /// A name means nothing any more.
    AliasRemoved {
        /// The name.
        alias: String,
    },
    /// A group's ranks shall load.
    GroupPlaced {
        /// The group.
        group: GroupId,
        /// Its incarnation.
        epoch: Epoch,
    },
    /// A rank at least has begun.
    GroupLoading {
        /// The group.
        group: GroupId,
        /// Its incarnation.
        epoch: Epoch,
    },
    /// Every rank is ready.
    GroupServing {
        /// The group.
        group: GroupId,
        /// Its incarnation.
        epoch: Epoch,
    },
    /// A group's incarnation is over; its ranks shall let go of it.
    GroupFenced {
        /// The group.
        group: GroupId,
        /// The incarnation that is over.
        epoch: Epoch,
        /// The number of the next one.
        next: Epoch,
        /// Nodes that held a rank of it.
        nodes: BTreeSet<NodeId>,
        /// Why.
        reason: String,
    },
    /// A group is over.
    GroupRetired {
        /// The group.
        group: GroupId,
        /// Its last incarnation.
        epoch: Epoch,
        /// Nodes that held a rank of it; none where it had been fenced before.
        nodes: BTreeSet<NodeId>,
        /// Why.
        reason: String,
    },
    /// Every node shall get a new certificate.
    CertificatesRotated {
        /// The number of the generation that begins.
        generation: u64,
    },
}
