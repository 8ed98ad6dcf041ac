//! `apply`: the one way in which anything changes.

use std::collections::BTreeSet;

use planner::{NodeId, PlanError, RankPlan, ShardPlan};

use crate::{BadField, ClusterState, Deployment, Epoch, Group, GroupId, Node, NodeInfo, Phase};

/// Retired groups that are kept for whoever asks what happened.
pub(crate) const RETIRED_KEPT: usize = 8;
/// Lost nodes that are kept likewise.
pub(crate) const LOST_KEPT: usize = 32;
/// Most nodes that may be alive at a time.
const NODES_MAX: usize = 1024;
/// Most bytes of a reason; longer ones are cut.
const REASON_MAX: usize = 512;

/// A change that somebody proposes.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Serve this model.
    Deploy(Deployment),
    /// A worker has come.
    Join(NodeInfo),
    /// A node's lease ran out or its session ended.
    Lost {
        /// The node.
        node: NodeId,
    },
    /// Form a group by this finished plan.
    Place {
        /// A number greater than every group's before.
        group: GroupId,
        /// An epoch greater than every one before.
        epoch: Epoch,
        /// Who holds what.
        plan: ShardPlan,
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
    /// A group shall serve no longer.
    Retire {
        /// The group.
        group: GroupId,
        /// Its incarnation.
        epoch: Epoch,
        /// Why, for operators.
        reason: String,
    },
}

/// What a command changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// There is something to serve.
    Deployed {
        /// Its name.
        model: String,
    },
    /// A node has joined under this number.
    NodeJoined {
        /// The node.
        node: NodeId,
    },
    /// A node is gone for good.
    NodeLost {
        /// The node.
        node: NodeId,
    },
    /// A group's ranks shall load.
    GroupPlaced {
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
    /// A group's ranks shall let go of it.
    GroupRetired {
        /// The group.
        group: GroupId,
        /// Its incarnation.
        epoch: Epoch,
        /// Nodes that held a rank of it.
        nodes: BTreeSet<NodeId>,
        /// Why.
        reason: String,
    },
}

/// Why a command was refused. A refused command has changed nothing.
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
    /// Another deployment stands already.
    #[error("model {model} is deployed already")]
    AlreadyDeployed {
        /// Its name.
        model: String,
    },
    /// Nothing is deployed.
    #[error("no model is deployed")]
    NotDeployed,
    /// A deployment that no group could serve.
    #[error("the deployment's {0}")]
    BadDeployment(BadField),
    /// A worker's description that no plan could use.
    #[error("the node's {0}")]
    BadNode(BadField),
    /// The worker holds another model.
    #[error("the worker's model has digest {got}, the deployment's has {expected}")]
    WrongDigest {
        /// The deployment's.
        expected: String,
        /// The worker's.
        got: String,
    },
    /// A node that is alive has that address.
    #[error("node {} has the address {address} already", node.0)]
    AddressTaken {
        /// The node that has it.
        node: NodeId,
        /// The address.
        address: String,
    },
    /// There are as many nodes as may be.
    #[error("{limit} nodes have joined already")]
    TooManyNodes {
        /// The limit.
        limit: usize,
    },
    /// No node of that number is known.
    #[error("node {} is unknown", node.0)]
    UnknownNode {
        /// The node.
        node: NodeId,
    },
    /// The node was lost before.
    #[error("node {} was lost", node.0)]
    NodeGone {
        /// The node.
        node: NodeId,
    },
    /// A group's number was used before.
    #[error("group {group} is not after group {last}")]
    StaleGroup {
        /// The number proposed.
        group: GroupId,
        /// The greatest so far.
        last: GroupId,
    },
    /// An epoch was used before.
    #[error("epoch {epoch} is not after epoch {last}")]
    StaleEpoch {
        /// The epoch proposed.
        epoch: Epoch,
        /// The greatest so far.
        last: Epoch,
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
    /// The plan names a device that its node does not have.
    #[error("node {} has no device {device}", node.0)]
    UnknownDevice {
        /// The node.
        node: NodeId,
        /// The device.
        device: usize,
    },
    /// The plan gives a device twice, or one that a live group owns.
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
    /// The group has no such rank.
    #[error("group {group} has no rank {rank}")]
    UnknownRank {
        /// The group.
        group: GroupId,
        /// The rank.
        rank: usize,
    },
}

impl ClusterState {
    /// Applies the command at log position `index` and says what changed.
    ///
    /// Every check stands before the first change, so a refused command leaves no trace: neither
    /// `index` nor `revision` moves.
    ///
    /// # Errors
    /// [`Rejected`] says why the command was refused.
    pub fn apply(&mut self, index: u64, command: Command) -> Result<Vec<Event>, Rejected> {
        if index <= self.index {
            return Err(Rejected::StaleIndex { index, applied: self.index });
        }
        let events = match command {
            Command::Deploy(deployment) => self.deploy(deployment)?,
            Command::Join(info) => self.join(info)?,
            Command::Lost { node } => self.lose(node)?,
            Command::Place { group, epoch, plan } => self.place(group, epoch, plan)?,
            Command::RankReady { group, epoch, rank } => self.rank_ready(group, epoch, rank)?,
            Command::Retire { group, epoch, reason } => {
                self.live_group(group, epoch)?;
                vec![self.retire(group, reason)]
            }
        };
        self.prune();
        self.index = index;
        self.revision += 1;
        Ok(events)
    }

    fn deploy(&mut self, deployment: Deployment) -> Result<Vec<Event>, Rejected> {
        deployment.check().map_err(Rejected::BadDeployment)?;
        match &self.deployment {
            // A coordinator that starts again proposes what it is told to serve again.
            Some(standing) if *standing == deployment => Ok(Vec::new()),
            Some(standing) => Err(Rejected::AlreadyDeployed { model: standing.model.clone() }),
            None => {
                let model = deployment.model.clone();
                self.deployment = Some(deployment);
                Ok(vec![Event::Deployed { model }])
            }
        }
    }

    fn join(&mut self, info: NodeInfo) -> Result<Vec<Event>, Rejected> {
        let deployment = self.deployment.as_ref().ok_or(Rejected::NotDeployed)?;
        info.check().map_err(Rejected::BadNode)?;
        // Hexadecimal digits mean the same in either case.
        if !info.model_digest.eq_ignore_ascii_case(&deployment.digest) {
            let (expected, got) = (deployment.digest.clone(), info.model_digest);
            return Err(Rejected::WrongDigest { expected, got });
        }
        if self.nodes.values().filter(|node| node.alive).count() >= NODES_MAX {
            return Err(Rejected::TooManyNodes { limit: NODES_MAX });
        }
        // Two nodes behind one address would each be sent the other's steps and frames.
        for (&node, other) in self.nodes.iter().filter(|(_, other)| other.alive) {
            let addresses = &other.info.collective_addresses;
            let shared = info.collective_addresses.iter().find(|one| addresses.contains(one));
            let worker = Some(&info.worker_address);
            let same = worker.filter(|one| **one == other.info.worker_address).or(shared);
            if let Some(address) = same.cloned() {
                return Err(Rejected::AddressTaken { node, address });
            }
        }
        self.last_node += 1;
        let node = NodeId(self.last_node);
        self.nodes.insert(node, Node { info, alive: true });
        Ok(vec![Event::NodeJoined { node }])
    }

    /// A lost node takes its groups with it in the same change: no state in between shows a
    /// serving group that cannot serve.
    fn lose(&mut self, node: NodeId) -> Result<Vec<Event>, Rejected> {
        let entry = self.nodes.get_mut(&node).ok_or(Rejected::UnknownNode { node })?;
        if !entry.alive {
            return Err(Rejected::NodeGone { node });
        }
        entry.alive = false;
        let reason = format!("node {} ({}) was lost", node.0, entry.info.name);
        let live = self.groups.iter().filter(|(_, group)| group.live());
        let hit = live.filter(|(_, group)| group.plan.ranks.iter().any(|rank| rank.node == node));
        let hit: Vec<GroupId> = hit.map(|(&id, _)| id).collect();
        let mut events = vec![Event::NodeLost { node }];
        events.extend(hit.into_iter().map(|group| self.retire(group, reason.clone())));
        Ok(events)
    }

    fn place(
        &mut self,
        group: GroupId,
        epoch: Epoch,
        plan: ShardPlan,
    ) -> Result<Vec<Event>, Rejected> {
        if group <= self.last_group {
            return Err(Rejected::StaleGroup { group, last: self.last_group });
        }
        if epoch <= self.last_epoch {
            return Err(Rejected::StaleEpoch { epoch, last: self.last_epoch });
        }
        self.check_plan(&plan)?;
        self.last_group = group;
        self.last_epoch = epoch;
        let (ready, reason) = (BTreeSet::new(), String::new());
        self.groups.insert(group, Group { epoch, plan, phase: Phase::Forming, ready, reason });
        Ok(vec![Event::GroupPlaced { group, epoch }])
    }

    fn check_plan(&self, plan: &ShardPlan) -> Result<(), Rejected> {
        let deployment = self.deployment.as_ref().ok_or(Rejected::NotDeployed)?;
        plan.check(&deployment.spec).map_err(Rejected::BadPlan)?;
        let (stripes, ranks) = (plan.stripes, plan.ranks.len());
        if stripes != deployment.stripe_count() || ranks != deployment.ranks {
            return Err(Rejected::OtherPlan { stripes, ranks });
        }
        let mut taken = self.taken();
        for rank in &plan.ranks {
            self.check_rank(rank)?;
            if !taken.insert((rank.node, rank.device)) {
                return Err(Rejected::DeviceTaken { node: rank.node, device: rank.device });
            }
        }
        Ok(())
    }

    fn check_rank(&self, rank: &RankPlan) -> Result<(), Rejected> {
        let (node, device) = (rank.node, rank.device);
        let entry = self.nodes.get(&node).ok_or(Rejected::UnknownNode { node })?;
        if !entry.alive {
            return Err(Rejected::NodeGone { node });
        }
        let spec = entry.info.devices.get(device);
        let spec = spec.ok_or(Rejected::UnknownDevice { node, device })?;
        let needed = rank.weight_bytes.saturating_add(rank.kv_bytes);
        let available = spec.memory_bytes;
        if needed > available {
            return Err(Rejected::TooSmall { node, device, needed, available });
        }
        Ok(())
    }

    fn rank_ready(
        &mut self,
        group: GroupId,
        epoch: Epoch,
        rank: usize,
    ) -> Result<Vec<Event>, Rejected> {
        let entry = self.live_group(group, epoch)?;
        let ranks = entry.plan.ranks.len();
        if rank >= ranks {
            return Err(Rejected::UnknownRank { group, rank });
        }
        let first = entry.ready.insert(rank);
        if !first || entry.ready.len() < ranks {
            return Ok(Vec::new());
        }
        entry.phase = Phase::Serving;
        Ok(vec![Event::GroupServing { group, epoch }])
    }

    fn live_group(&mut self, group: GroupId, epoch: Epoch) -> Result<&mut Group, Rejected> {
        let entry = self.groups.get_mut(&group).ok_or(Rejected::UnknownGroup { group })?;
        if entry.epoch != epoch {
            return Err(Rejected::WrongEpoch { group, expected: entry.epoch, got: epoch });
        }
        if !entry.live() {
            return Err(Rejected::GroupGone { group });
        }
        Ok(entry)
    }

    /// The caller has found the group live.
    fn retire(&mut self, group: GroupId, mut reason: String) -> Event {
        reason.truncate(reason.floor_char_boundary(REASON_MAX));
        let entry = self.groups.get_mut(&group).expect("the caller found the group");
        entry.phase = Phase::Retired;
        entry.reason = reason.clone();
        Event::GroupRetired { group, epoch: entry.epoch, nodes: entry.nodes(), reason }
    }

    /// Forgets the oldest of what is only kept for information, so that the state stays bounded
    /// however long workers come and go.
    fn prune(&mut self) {
        let retired = self.groups.iter().filter(|(_, group)| !group.live()).map(|(&id, _)| id);
        let retired: Vec<GroupId> = retired.collect();
        for id in &retired[..retired.len().saturating_sub(RETIRED_KEPT)] {
            self.groups.remove(id);
        }
        let lost = self.nodes.iter().filter(|(_, node)| !node.alive).map(|(&id, _)| id);
        let lost: Vec<NodeId> = lost.collect();
        for id in &lost[..lost.len().saturating_sub(LOST_KEPT)] {
            self.nodes.remove(id);
        }
    }
}
