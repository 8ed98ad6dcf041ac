//! Why a command was refused.

use planner::{NodeId, PlanError};

use crate::{BadField, Epoch, GroupId, Refusal, Role, TokenId};

/// The kind of a refusal, for whoever has to answer in another protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Code {
    /// The command could never be accepted.
    Invalid,
    /// It names what is not known.
    Unknown,
    /// What it asks for exists already, in another form.
    Exists,
    /// It does not fit where things stand.
    Conflict,
    /// There is no room.
    Full,
    /// The proposer has no right to it.
    Denied,
}

impl Code {
    const ALL: [Self; 6] =
        [Self::Invalid, Self::Unknown, Self::Exists, Self::Conflict, Self::Full, Self::Denied];

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Unknown => "unknown",
            Self::Exists => "exists",
            Self::Conflict => "conflict",
            Self::Full => "full",
            Self::Denied => "denied",
        }
    }

    /// The code of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.name() == name)
    }
}

/// Why a command was refused. A refused command has changed nothing; where it carried a request
/// id, its outcome is remembered.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Rejected {
    /// The log went backwards.
    #[error("log index {index} is not after {applied}")]
    StaleIndex {
        /// The command's index.
        index: u64,
        /// The last accepted one.
        applied: u64,
    },
    /// The bytes are no command that this release knows.
    #[error("the command cannot be read")]
    Unreadable,
    /// The request was refused before.
    #[error(transparent)]
    Repeated(Refusal),
    /// The first coordinator has not let itself in yet.
    #[error("the cluster has no node yet")]
    NotFounded,
    /// Nodes are known already.
    #[error("the cluster was founded before")]
    Founded,
    /// A name that cannot be one.
    #[error("the {0}")]
    BadName(BadField),
    /// A token that lets in nobody.
    #[error("the token's {0}")]
    BadToken(BadField),
    /// The token was used as often as it may be.
    #[error("token {token} was used {uses} times, as often as it may be")]
    TokenSpent {
        /// The token.
        token: TokenId,
        /// Its uses.
        uses: u32,
    },
    /// The token was used with another role or another limit before.
    #[error("token {token} was another one before")]
    TokenChanged {
        /// The token.
        token: TokenId,
    },
    /// There are as many as may be.
    #[error("there are {limit} {what} already")]
    Full {
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// A worker's description that no plan could use.
    #[error("the node's {0}")]
    BadNode(BadField),
    /// The worker holds a model that nobody knows.
    #[error("the worker's model has digest {got}, the deployment's has {expected}")]
    WrongDigest {
        /// Those that are known.
        expected: String,
        /// The worker's.
        got: String,
    },
    /// A node that is present has that address.
    #[error("node {} has the address {address} already", node.0)]
    AddressTaken {
        /// The node that has it.
        node: NodeId,
        /// The address.
        address: String,
    },
    /// No node of that number is known.
    #[error("node {} is unknown", node.0)]
    UnknownNode {
        /// The node.
        node: NodeId,
    },
    /// The node was removed.
    #[error("node {} has left", node.0)]
    NodeGone {
        /// The node.
        node: NodeId,
    },
    /// The node is not where the command takes it to be.
    #[error("node {} is {standing}", node.0)]
    WrongStanding {
        /// The node.
        node: NodeId,
        /// Where it stands, in a word.
        standing: &'static str,
    },
    /// The command means another process of the node.
    #[error("node {} has incarnation {expected}, not {got}", node.0)]
    WrongIncarnation {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        expected: u64,
        /// The command's.
        got: u64,
    },
    /// The node was let in for something else.
    #[error("node {} is a {role}", node.0)]
    WrongRole {
        /// The node.
        node: NodeId,
        /// What it is.
        role: Role,
    },
    /// Without it nobody could decide anything.
    #[error("node {} is the last coordinator", node.0)]
    LastCoordinator {
        /// The node.
        node: NodeId,
    },
    /// A model that no plan could use.
    #[error("the model's {0}")]
    BadModel(BadField),
    /// Another model has that digest.
    #[error("the model with digest {digest} was registered with another description")]
    OtherModel {
        /// The digest.
        digest: String,
    },
    /// No model of that digest is registered.
    #[error("no model with digest {digest} is registered")]
    UnknownModel {
        /// The digest.
        digest: String,
    },
    /// A deployment needs the model.
    #[error("deployment {deployment} needs the model")]
    ModelInUse {
        /// The deployment.
        deployment: String,
    },
    /// A deployment that no group could serve.
    #[error("the deployment's {0}")]
    BadDeployment(BadField),
    /// Another deployment has that name.
    #[error("model {name} is deployed already, with other options")]
    AlreadyDeployed {
        /// Its name.
        name: String,
    },
    /// A name means one thing.
    #[error("{name} is the name of {by}")]
    NameTaken {
        /// The name.
        name: String,
        /// Whose it is.
        by: &'static str,
    },
    /// An alias means the deployment: requests under that name would have nowhere to go.
    #[error("the alias {alias} points at {deployment}")]
    PointedAt {
        /// The deployment.
        deployment: String,
        /// The alias.
        alias: String,
    },
    /// The deployment gets no new requests.
    #[error("{deployment} is being drained")]
    Draining {
        /// The deployment.
        deployment: String,
    },
    /// No alias has that name.
    #[error("no alias has the name {alias}")]
    UnknownAlias {
        /// The name.
        alias: String,
    },
    /// Nothing of that name is deployed.
    #[error("{name} is not deployed")]
    NotDeployed {
        /// The name.
        name: String,
    },
    /// A number that is neither a group's nor one of the next.
    #[error("group {group} is not one of the next after {last}")]
    WrongGroup {
        /// The number proposed.
        group: GroupId,
        /// The greatest so far.
        last: GroupId,
    },
    /// The group is a replica of something else.
    #[error("group {group} belongs to {deployment}")]
    OtherDeployment {
        /// The group.
        group: GroupId,
        /// Its deployment.
        deployment: String,
    },
    /// The deployment has as many groups as it wishes for.
    #[error("{deployment} has {replicas} groups, as many as it shall")]
    EnoughReplicas {
        /// The deployment.
        deployment: String,
        /// Its groups.
        replicas: usize,
    },
    /// The plan contradicts itself.
    #[error("the plan is wrong: {0}")]
    BadPlan(PlanError),
    /// The plan has another shape than the deployment asks for.
    #[error(
        "the plan has {stripes} stripes on {ranks} ranks, which the deployment does not ask for"
    )]
    OtherPlan {
        /// The plan's stripes.
        stripes: usize,
        /// The plan's ranks.
        ranks: usize,
    },
    /// The plan names a node that may not hold a rank of this deployment.
    #[error("the deployment does not allow node {}", node.0)]
    NodeNotAllowed {
        /// The node.
        node: NodeId,
    },
    /// The plan names a device that its node does not have.
    #[error("node {} has no device {device}", node.0)]
    UnknownDevice {
        /// The node.
        node: NodeId,
        /// The device.
        device: usize,
    },
    /// The plan gives a device that a live group owns.
    #[error("device {device} of node {} is taken", node.0)]
    DeviceTaken {
        /// The node.
        node: NodeId,
        /// The device.
        device: usize,
    },
    /// The plan puts more on a device than it holds.
    #[error("device {device} of node {} holds {available} bytes, the plan needs {needed}", node.0)]
    TooSmall {
        /// The node.
        node: NodeId,
        /// The device.
        device: usize,
        /// Bytes of weights and KV blocks.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// No group of that number is known.
    #[error("group {group} is unknown")]
    UnknownGroup {
        /// The group.
        group: GroupId,
    },
    /// The group has another incarnation.
    #[error("group {group} has epoch {expected}, not {got}")]
    WrongEpoch {
        /// The group.
        group: GroupId,
        /// Its epoch.
        expected: Epoch,
        /// The command's.
        got: Epoch,
    },
    /// The group was retired before.
    #[error("group {group} was retired")]
    GroupGone {
        /// The group.
        group: GroupId,
    },
    /// The group waits to be placed; nobody can speak for its next incarnation yet.
    #[error("group {group} is being repaired and has no ranks")]
    NotPlaced {
        /// The group.
        group: GroupId,
    },
    /// The group has no such rank.
    #[error("group {group} has no rank {rank}")]
    UnknownRank {
        /// The group.
        group: GroupId,
        /// The rank.
        rank: usize,
    },
}

impl Rejected {
    /// The kind of this refusal.
    pub fn code(&self) -> Code {
        match self {
            Self::Repeated(refusal) => refusal.code,
            Self::Unreadable
            | Self::BadName(_)
            | Self::BadToken(_)
            | Self::BadNode(_)
            | Self::BadModel(_)
            | Self::BadDeployment(_)
            | Self::BadPlan(_)
            | Self::OtherPlan { .. }
            | Self::UnknownDevice { .. }
            | Self::UnknownRank { .. } => Code::Invalid,
            Self::UnknownNode { .. }
            | Self::UnknownModel { .. }
            | Self::NotDeployed { .. }
            | Self::UnknownAlias { .. }
            | Self::UnknownGroup { .. } => Code::Unknown,
            Self::Founded
            | Self::AddressTaken { .. }
            | Self::OtherModel { .. }
            | Self::NameTaken { .. }
            | Self::AlreadyDeployed { .. } => Code::Exists,
            Self::NotFounded
            | Self::StaleIndex { .. }
            | Self::WrongDigest { .. }
            | Self::WrongStanding { .. }
            | Self::WrongIncarnation { .. }
            | Self::LastCoordinator { .. }
            | Self::ModelInUse { .. }
            | Self::PointedAt { .. }
            | Self::Draining { .. }
            | Self::WrongGroup { .. }
            | Self::OtherDeployment { .. }
            | Self::EnoughReplicas { .. }
            | Self::NodeNotAllowed { .. }
            | Self::DeviceTaken { .. }
            | Self::TooSmall { .. }
            | Self::WrongEpoch { .. }
            | Self::GroupGone { .. }
            | Self::NotPlaced { .. } => Code::Conflict,
            Self::Full { .. } => Code::Full,
            Self::TokenSpent { .. }
            | Self::TokenChanged { .. }
            | Self::NodeGone { .. }
            | Self::WrongRole { .. } => Code::Denied,
        }
    }
}
