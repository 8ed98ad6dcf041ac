//! What a coordinator sends to a worker: its number, groups to form and to let go.

use std::collections::BTreeSet;
use std::sync::Arc;

use cluster::{Deployment, Epoch, GroupId, check_address};
use model::{ComputeType, ModelSpec};
use planner::{ExpertCut, NodeId, RankPlan, ShardPlan};

use crate::error::{bounded, narrow, required, size};
use crate::{NODES_MAX, REASON_MAX, STRIPES_MAX, WireError, pb};

/// An order to a worker.
#[derive(Debug, Clone, PartialEq)]
pub enum Order {
    /// The worker has joined under this number.
    Welcome {
        /// Its number.
        node: NodeId,
        /// Milliseconds between two heartbeats.
        heartbeat_ms: u64,
        /// Milliseconds of silence after which it is lost and fences itself.
        lease_ms: u64,
        /// Certificates of a generation before shall be replaced.
        generation: u64,
    },
    /// A heartbeat was heard: the lease begins anew.
    Lease,
    /// Certificates before this generation shall be replaced.
    Certificate {
        /// The generation.
        generation: u64,
    },
    /// Nodes were removed, if not now then before: they are to be refused.
    Roll {
        /// The greatest number that was ever given.
        given: u64,
        /// Who of those was not removed.
        present: BTreeSet<NodeId>,
    },
    /// Load what the plan gives this node.
    Form(Box<FormGroup>),
    /// Load what the plan gives this node, and keep it for an order to form.
    Prepare(Box<FormGroup>),
    /// Let go of a group.
    Retire {
        /// The group.
        group: GroupId,
        /// Its incarnation.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
}

/// Everything a node needs to take its ranks in a group.
#[derive(Debug, Clone, PartialEq)]
pub struct FormGroup {
    /// The group.
    pub group: GroupId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// What is served.
    pub deployment: Deployment,
    /// Who holds what.
    pub plan: ShardPlan,
    /// Where the ranks are, by rank.
    pub addresses: Vec<RankAddress>,
}

/// Where a rank is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankAddress {
    /// Its node.
    pub node: NodeId,
    /// `host:port` of the node's Worker service.
    pub worker_address: String,
    /// `host:port` of the rank's tensor plane.
    pub collective_address: String,
}

impl Order {
    /// The message for this order.
    pub fn to_wire(&self) -> pb::Order {
        let order = match self {
            Self::Welcome { node, heartbeat_ms, lease_ms, generation } => {
                pb::order::Order::Welcome(pb::Welcome {
                    node: node.0,
                    heartbeat_ms: u32::try_from(*heartbeat_ms).unwrap_or(u32::MAX),
                    lease_ms: u32::try_from(*lease_ms).unwrap_or(u32::MAX),
                    generation: *generation,
                })
            }
            Self::Lease => pb::order::Order::Lease(pb::Lease {}),
            Self::Certificate { generation } => {
                pb::order::Order::Certificate(pb::CertificateOrder { generation: *generation })
            }
            Self::Roll { given, present } => pb::order::Order::Roll(pb::Roll {
                given: *given,
                present: present.iter().map(|node| node.0).collect(),
            }),
            Self::Form(form) => pb::order::Order::Form(form.to_wire()),
            Self::Prepare(form) => pb::order::Order::Prepare(form.to_wire()),
            Self::Retire { group, epoch, reason } => pb::order::Order::Retire(pb::RetireGroup {
                group: group.0,
                epoch: epoch.0,
                reason: reason.clone(),
            }),
        };
        pb::Order { order: Some(order) }
    }

    /// The order of this message, for a worker that has the models of which `spec` knows the
    /// digests.
    ///
    /// # Errors
    /// [`WireError`] names the field that cannot be; [`WireError::UnknownModel`] where a group is
    /// to serve a model that the worker does not have.
    pub fn from_wire(
        wire: pb::Order,
        spec: impl Fn(&str) -> Option<Arc<ModelSpec>>,
    ) -> Result<Self, WireError> {
        Ok(match required("order", wire.order)? {
            pb::order::Order::Welcome(welcome) => {
                if welcome.heartbeat_ms == 0 {
                    return Err(WireError::OutOfRange { field: "heartbeat_ms" });
                }
                Self::Welcome {
                    node: NodeId(welcome.node),
                    heartbeat_ms: welcome.heartbeat_ms.into(),
                    lease_ms: welcome.lease_ms.into(),
                    generation: welcome.generation,
                }
            }
            pb::order::Order::Lease(pb::Lease {}) => Self::Lease,
            pb::order::Order::Certificate(order) => {
                Self::Certificate { generation: order.generation }
            }
            pb::order::Order::Roll(pb::Roll { given, present }) => {
                bounded("present", present.len(), NODES_MAX)?;
                let ascending = present.windows(2).all(|pair| pair[0] < pair[1]);
                if !ascending || present.last().is_some_and(|last| *last > given) {
                    return Err(WireError::OutOfRange { field: "present" });
                }
                Self::Roll { given, present: present.into_iter().map(NodeId).collect() }
            }
            pb::order::Order::Form(form) => Self::Form(Box::new(FormGroup::from_wire(form, spec)?)),
            pb::order::Order::Prepare(form) => {
                Self::Prepare(Box::new(FormGroup::from_wire(form, spec)?))
            }
            pb::order::Order::Retire(retire) => {
                bounded("reason", retire.reason.len(), REASON_MAX)?;
                let (group, epoch) = (GroupId(retire.group), Epoch(retire.epoch));
                Self::Retire { group, epoch, reason: retire.reason }
            }
        })
    }
}

impl FormGroup {
    /// The message for this group.
    pub fn to_wire(&self) -> pb::FormGroup {
        let addresses = self.addresses.iter().map(|address| pb::RankAddress {
            node: address.node.0,
            worker_address: address.worker_address.clone(),
            collective_address: address.collective_address.clone(),
        });
        pb::FormGroup {
            group: self.group.0,
            epoch: self.epoch.0,
            deployment: Some(deployment_to_wire(&self.deployment)),
            plan: Some(plan_to_wire(&self.plan)),
            addresses: addresses.collect(),
        }
    }

    /// The group of this message, its plan checked against the model that `spec` knows by its
    /// digest, and its own addresses.
    ///
    /// # Errors
    /// As of [`Order::from_wire`].
    pub fn from_wire(
        wire: pb::FormGroup,
        spec: impl Fn(&str) -> Option<Arc<ModelSpec>>,
    ) -> Result<Self, WireError> {
        let deployment = required("deployment", wire.deployment)?;
        let spec = spec(&deployment.digest).ok_or(WireError::UnknownModel { field: "digest" })?;
        let deployment = deployment_from_wire(deployment, &spec)?;
        let plan = plan_from_wire(required("plan", wire.plan)?, &spec)?;
        // A group that lost ranks may go on with fewer.
        if plan.ranks.len() > deployment.ranks || plan.stripes != deployment.stripe_count(&spec) {
            return Err(WireError::Mismatch { field: "plan", other: "deployment" });
        }
        let nodes = plan.ranks.iter().map(|rank| rank.node.0);
        if !nodes.eq(wire.addresses.iter().map(|address| address.node)) {
            return Err(WireError::Mismatch { field: "addresses", other: "plan" });
        }
        for address in &wire.addresses {
            check_address("worker_address", &address.worker_address)?;
            check_address("collective_address", &address.collective_address)?;
        }
        let addresses = wire.addresses.into_iter().map(|address| RankAddress {
            node: NodeId(address.node),
            worker_address: address.worker_address,
            collective_address: address.collective_address,
        });
        Ok(Self {
            group: GroupId(wire.group),
            epoch: Epoch(wire.epoch),
            deployment,
            plan,
            addresses: addresses.collect(),
        })
    }
}

/// The protocol's value for a compute type.
pub fn compute_to_wire(compute: ComputeType) -> pb::ComputeType {
    match compute {
        ComputeType::F32 => pb::ComputeType::F32,
        ComputeType::Bf16 => pb::ComputeType::Bf16,
        ComputeType::Int8 => pb::ComputeType::Int8,
        ComputeType::Int4 => pb::ComputeType::Int4,
    }
}

/// The compute type of this value.
///
/// # Errors
/// [`WireError::UnknownEnum`].
pub fn compute_from_wire(value: i32) -> Result<ComputeType, WireError> {
    match pb::ComputeType::try_from(value) {
        Ok(pb::ComputeType::F32) => Ok(ComputeType::F32),
        Ok(pb::ComputeType::Bf16) => Ok(ComputeType::Bf16),
        Ok(pb::ComputeType::Int8) => Ok(ComputeType::Int8),
        Ok(pb::ComputeType::Int4) => Ok(ComputeType::Int4),
        Ok(pb::ComputeType::Unspecified) | Err(_) => {
            Err(WireError::UnknownEnum { field: "compute", value })
        }
    }
}

fn experts_to_wire(experts: ExpertCut) -> pb::ExpertCut {
    match experts {
        ExpertCut::Stripe => pb::ExpertCut::Stripe,
        ExpertCut::Whole => pb::ExpertCut::Whole,
    }
}

fn experts_from_wire(value: i32) -> Result<ExpertCut, WireError> {
    match pb::ExpertCut::try_from(value) {
        // Written before there was a choice.
        Ok(pb::ExpertCut::Unspecified | pb::ExpertCut::Stripe) => Ok(ExpertCut::Stripe),
        Ok(pb::ExpertCut::Whole) => Ok(ExpertCut::Whole),
        Err(_) => Err(WireError::UnknownEnum { field: "experts", value }),
    }
}

/// The message for a deployment. The digest says which model it means.
pub fn deployment_to_wire(deployment: &Deployment) -> pb::Deployment {
    pb::Deployment {
        model: deployment.name.clone(),
        digest: deployment.digest.clone(),
        compute: compute_to_wire(deployment.compute).into(),
        experts: experts_to_wire(deployment.experts).into(),
        stripes: deployment.stripes.map(narrow),
        ranks: narrow(deployment.ranks),
        kv_blocks: deployment.kv_blocks as u64,
        block_tokens: narrow(deployment.block_tokens),
        max_sequences: narrow(deployment.max_sequences),
        step_tokens: narrow(deployment.step_tokens),
        context: deployment.context as u64,
        replicas: narrow(deployment.replicas),
        nodes: deployment.nodes.iter().map(|node| node.0).collect(),
    }
}

/// The deployment of this message, checked for the model `spec`.
///
/// # Errors
/// [`WireError`] names the field that cannot be.
pub fn deployment_from_wire(
    wire: pb::Deployment,
    spec: &ModelSpec,
) -> Result<Deployment, WireError> {
    let deployment = wish_from_wire(wire)?;
    deployment.check(spec)?;
    Ok(deployment)
}

/// The same where the cluster checks it, which knows the model.
///
/// # Errors
/// [`WireError`] names the field that cannot be.
pub fn wish_from_wire(wire: pb::Deployment) -> Result<Deployment, WireError> {
    bounded("nodes", wire.nodes.len(), NODES_MAX)?;
    let ascending = wire.nodes.is_sorted_by(|a, b| a < b);
    if !ascending {
        return Err(WireError::OutOfRange { field: "nodes" });
    }
    Ok(Deployment {
        name: wire.model,
        digest: wire.digest,
        compute: compute_from_wire(wire.compute)?,
        experts: experts_from_wire(wire.experts)?,
        stripes: wire.stripes.map(|stripes| size("stripes", stripes)).transpose()?,
        ranks: size("ranks", wire.ranks)?,
        replicas: size("replicas", wire.replicas)?,
        nodes: wire.nodes.into_iter().map(NodeId).collect(),
        kv_blocks: size("kv_blocks", wire.kv_blocks)?,
        block_tokens: size("block_tokens", wire.block_tokens)?,
        max_sequences: size("max_sequences", wire.max_sequences)?,
        step_tokens: size("step_tokens", wire.step_tokens)?,
        context: size("context", wire.context)?,
    })
}

/// The message for a plan.
pub fn plan_to_wire(plan: &ShardPlan) -> pb::ShardPlan {
    let ranks = plan.ranks.iter().map(|rank| pb::RankPlan {
        rank: narrow(rank.rank),
        node: rank.node.0,
        device: narrow(rank.device),
        stripes: rank.stripes.iter().map(|&stripe| narrow(stripe)).collect(),
        weight_bytes: rank.weight_bytes,
        kv_bytes: rank.kv_bytes,
    });
    pb::ShardPlan { stripes: narrow(plan.stripes), ranks: ranks.collect() }
}

/// The plan of this message, checked for the model `spec`.
///
/// # Errors
/// [`WireError`] names the field that cannot be.
pub fn plan_from_wire(wire: pb::ShardPlan, spec: &ModelSpec) -> Result<ShardPlan, WireError> {
    let plan = shape_from_wire(wire)?;
    plan.check(spec)?;
    Ok(plan)
}

/// The same where the cluster checks it, which knows the model.
///
/// # Errors
/// [`WireError`] names the field that cannot be.
pub(crate) fn shape_from_wire(wire: pb::ShardPlan) -> Result<ShardPlan, WireError> {
    bounded("ranks", wire.ranks.len(), STRIPES_MAX)?;
    let stripes = size("stripes", wire.stripes)?;
    bounded("stripes", stripes, STRIPES_MAX)?;
    let ranks = wire.ranks.into_iter().map(rank_from_wire);
    Ok(ShardPlan { stripes, ranks: ranks.collect::<Result<_, _>>()? })
}

fn rank_from_wire(wire: pb::RankPlan) -> Result<RankPlan, WireError> {
    bounded("stripes", wire.stripes.len(), STRIPES_MAX)?;
    let stripes = wire.stripes.into_iter().map(|stripe| size("stripes", stripe));
    Ok(RankPlan {
        rank: size("rank", wire.rank)?,
        node: NodeId(wire.node),
        device: size("device", wire.device)?,
        stripes: stripes.collect::<Result<_, _>>()?,
        weight_bytes: wire.weight_bytes,
        kv_bytes: wire.kv_bytes,
    })
}
