//! Commands as the log holds them.
//!
//! Reading one checks what would cost memory or could not be represented. Whether it makes sense is
//! `ClusterState::apply`'s to say, which refuses by name.

use std::sync::Arc;

use cluster::{Command, Coordinator, Epoch, GroupId, Model, Proposal, RequestId, Role, TokenId};
use model::ModelSpec;
use planner::NodeId;
use prost::Message;

use crate::error::{bounded, id16, known, narrow, required, size};
use crate::orders::{deployment_to_wire, plan_to_wire, shape_from_wire, wish_from_wire};
use crate::pb::proposal::Command as Wire;
use crate::reports::{digests_from_wire, info_from_wire, join_to_wire};
use crate::{REASON_MAX, WireError, pb};

/// Most bytes of one command, written or read: what the log takes at most.
pub const COMMAND_MAX: usize = 256 << 10;

/// The bytes of a command; the same command gives the same bytes.
pub fn encode_command(proposal: &Proposal) -> Vec<u8> {
    let request = proposal.request.map_or(Vec::new(), |id| id.0.to_vec());
    let command = Some(command_to_wire(&proposal.command));
    pb::Proposal { request: request.into(), command }.encode_to_vec()
}

/// The command of these bytes.
///
/// # Errors
/// [`WireError`] names the field that cannot be.
pub fn decode_command(bytes: &[u8]) -> Result<Proposal, WireError> {
    bounded("command", bytes.len(), COMMAND_MAX)?;
    let wire = pb::Proposal::decode(bytes);
    let wire = wire.map_err(|_| WireError::Malformed { field: "command" })?;
    let request = match wire.request.is_empty() {
        true => None,
        false => Some(RequestId(id16("request", &wire.request)?)),
    };
    let command = command_from_wire(required("command", wire.command)?)?;
    Ok(Proposal { request, command })
}

fn command_to_wire(command: &Command) -> Wire {
    let process = |node: &NodeId, incarnation: &u64| pb::NodeProcess {
        node: node.0,
        incarnation: *incarnation,
    };
    let end = |group: &GroupId, epoch: &Epoch, reason: &String| pb::EndGroup {
        group: group.0,
        epoch: epoch.0,
        reason: reason.clone(),
    };
    match command {
        Command::Found { name } => Wire::Found(pb::Found { name: name.clone() }),
        Command::Enrol { token, uses_max, expires, now, role, name } => Wire::Enrol(pb::Enrol {
            token: token.0.to_vec().into(),
            uses_max: *uses_max,
            expires: *expires,
            now: *now,
            role: role_to_wire(*role).into(),
            name: name.clone(),
        }),
        Command::Join { node, info } => {
            Wire::Join(pb::NodeJoin { node: node.0, info: Some(join_to_wire(info)) })
        }
        Command::Suspect { node, incarnation } => Wire::Suspect(process(node, incarnation)),
        Command::Recover { node, incarnation } => Wire::Recover(process(node, incarnation)),
        Command::Lost { node, incarnation } => Wire::Lost(process(node, incarnation)),
        Command::Drain { node } => Wire::Drain(node.0),
        Command::Undrain { node } => Wire::Undrain(node.0),
        Command::Leave { node } => Wire::Leave(node.0),
        Command::SetCoordinator { node, at } => Wire::SetCoordinator(pb::SetCoordinator {
            node: node.0,
            at: Some(coordinator_to_wire(at)),
        }),
        Command::RegisterModel(model) => Wire::RegisterModel(model_to_wire(model)),
        Command::ForgetModel { digest } => Wire::ForgetModel(digest.clone()),
        Command::Deploy(deployment) => Wire::Deploy(deployment_to_wire(deployment)),
        Command::Undeploy { name } => Wire::Undeploy(name.clone()),
        Command::DrainDeployment { name } => Wire::DrainDeployment(name.clone()),
        Command::Point { alias, deployment } => {
            Wire::Point(pb::PointAlias { alias: alias.clone(), deployment: deployment.clone() })
        }
        Command::Unpoint { alias } => Wire::Unpoint(alias.clone()),
        Command::Place { group, deployment, epoch, plan } => Wire::Place(pb::PlaceGroup {
            group: group.0,
            deployment: deployment.clone(),
            epoch: epoch.0,
            plan: Some(plan_to_wire(plan)),
        }),
        Command::Loading { group, epoch } => {
            Wire::Loading(pb::GroupIncarnation { group: group.0, epoch: epoch.0 })
        }
        Command::RankReady { group, epoch, rank } => {
            Wire::RankReady(pb::RankReady { group: group.0, epoch: epoch.0, rank: narrow(*rank) })
        }
        Command::Fence { group, epoch, reason } => Wire::Fence(end(group, epoch, reason)),
        Command::Retire { group, epoch, reason } => Wire::Retire(end(group, epoch, reason)),
        Command::RotateCertificates => Wire::RotateCertificates(pb::RotateCertificates {}),
    }
}

fn command_from_wire(wire: Wire) -> Result<Command, WireError> {
    Ok(match wire {
        Wire::Found(pb::Found { name }) => Command::Found { name },
        Wire::Enrol(enrol) => enrol_from_wire(enrol)?,
        Wire::Join(join) => {
            let info = info_from_wire(required("info", join.info)?)?;
            Command::Join { node: NodeId(join.node), info }
        }
        Wire::Suspect(pb::NodeProcess { node, incarnation }) => {
            Command::Suspect { node: NodeId(node), incarnation }
        }
        Wire::Recover(pb::NodeProcess { node, incarnation }) => {
            Command::Recover { node: NodeId(node), incarnation }
        }
        Wire::Lost(pb::NodeProcess { node, incarnation }) => {
            Command::Lost { node: NodeId(node), incarnation }
        }
        Wire::Drain(node) => Command::Drain { node: NodeId(node) },
        Wire::Undrain(node) => Command::Undrain { node: NodeId(node) },
        Wire::Leave(node) => Command::Leave { node: NodeId(node) },
        Wire::SetCoordinator(set) => {
            let at = coordinator_from_wire(required("at", set.at)?)?;
            Command::SetCoordinator { node: NodeId(set.node), at }
        }
        Wire::RegisterModel(model) => Command::RegisterModel(model_from_wire(model)?),
        Wire::ForgetModel(digest) => Command::ForgetModel { digest },
        Wire::Deploy(deployment) => Command::Deploy(wish_from_wire(deployment)?),
        Wire::Undeploy(name) => Command::Undeploy { name },
        Wire::DrainDeployment(name) => Command::DrainDeployment { name },
        Wire::Point(pb::PointAlias { alias, deployment }) => Command::Point { alias, deployment },
        Wire::Unpoint(alias) => Command::Unpoint { alias },
        Wire::Place(place) => Command::Place {
            group: GroupId(place.group),
            deployment: place.deployment,
            epoch: Epoch(place.epoch),
            plan: shape_from_wire(required("plan", place.plan)?)?,
        },
        Wire::Loading(pb::GroupIncarnation { group, epoch }) => {
            Command::Loading { group: GroupId(group), epoch: Epoch(epoch) }
        }
        Wire::RankReady(pb::RankReady { group, epoch, rank }) => {
            let rank = size("rank", rank)?;
            Command::RankReady { group: GroupId(group), epoch: Epoch(epoch), rank }
        }
        Wire::Fence(end) => {
            let (group, epoch, reason) = end_from_wire(end)?;
            Command::Fence { group, epoch, reason }
        }
        Wire::Retire(end) => {
            let (group, epoch, reason) = end_from_wire(end)?;
            Command::Retire { group, epoch, reason }
        }
        Wire::RotateCertificates(pb::RotateCertificates {}) => Command::RotateCertificates,
    })
}

fn enrol_from_wire(wire: pb::Enrol) -> Result<Command, WireError> {
    Ok(Command::Enrol {
        token: TokenId(id16("token", &wire.token)?),
        uses_max: wire.uses_max,
        expires: wire.expires,
        now: wire.now,
        role: role_from_wire(wire.role)?,
        name: wire.name,
    })
}

fn end_from_wire(wire: pb::EndGroup) -> Result<(GroupId, Epoch, String), WireError> {
    bounded("reason", wire.reason.len(), REASON_MAX)?;
    Ok((GroupId(wire.group), Epoch(wire.epoch), wire.reason))
}

pub(crate) fn role_to_wire(role: Role) -> pb::NodeRole {
    match role {
        Role::Worker => pb::NodeRole::Worker,
        Role::Coordinator => pb::NodeRole::Coordinator,
    }
}

pub(crate) fn role_from_wire(value: i32) -> Result<Role, WireError> {
    Ok(match known("role", value)? {
        pb::NodeRole::Worker => Role::Worker,
        pb::NodeRole::Coordinator => Role::Coordinator,
        pb::NodeRole::Unspecified => return Err(WireError::UnknownEnum { field: "role", value }),
    })
}

pub(crate) fn coordinator_to_wire(at: &Coordinator) -> pb::CoordinatorAddresses {
    pb::CoordinatorAddresses {
        cluster_address: at.cluster_address.clone(),
        http_address: at.http_address.clone(),
        model_digests: at.model_digests.iter().cloned().collect(),
    }
}

pub(crate) fn coordinator_from_wire(
    wire: pb::CoordinatorAddresses,
) -> Result<Coordinator, WireError> {
    Ok(Coordinator {
        cluster_address: wire.cluster_address,
        http_address: wire.http_address,
        model_digests: digests_from_wire(wire.model_digests)?,
    })
}

pub(crate) fn model_to_wire(model: &Model) -> pb::ModelRecord {
    pb::ModelRecord {
        name: model.name.clone(),
        digest: model.digest.clone(),
        spec: model.spec.to_json(),
    }
}

pub(crate) fn model_from_wire(wire: pb::ModelRecord) -> Result<Model, WireError> {
    let spec = Arc::new(ModelSpec::from_json(&wire.spec)?);
    Ok(Model { name: wire.name, digest: wire.digest, spec })
}
