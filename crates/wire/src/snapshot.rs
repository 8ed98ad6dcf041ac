//! The whole state as bytes: what a snapshot holds, and what its hash is taken over.

use cluster::{
    Alias, ClusterState, Code, Done, Epoch, Group, GroupId, Node, Outcome, Phase, Refusal,
    RequestId, Snapshot, Standing, Token, TokenId,
};
use planner::NodeId;
use prost::Message;

use crate::commands::{
    coordinator_from_wire, coordinator_to_wire, model_from_wire, model_to_wire, role_from_wire,
    role_to_wire,
};
use crate::error::{bounded, id16, known, narrow, required, size};
use crate::orders::{deployment_to_wire, plan_to_wire, shape_from_wire, wish_from_wire};
use crate::pb::group_record::Phase as WirePhase;
use crate::pb::node_record::Standing as WireStanding;
use crate::pb::outcome_record::Outcome as WireOutcome;
use crate::pb::write_refused::Code as WireCode;
use crate::reports::{info_from_wire, join_to_wire};
use crate::{STRIPES_MAX, WireError, pb};

/// Most bytes of a snapshot that are read. The bounds of the state keep it below.
pub const STATE_MAX: usize = 64 << 20;
/// The only form of a snapshot so far.
const FORMAT: u32 = 1;
/// Most entries of one list of a snapshot.
const LIST_MAX: usize = 1 << 13;

/// The bytes of a state; equal states give equal bytes.
pub fn encode_state(state: &ClusterState) -> Vec<u8> {
    let Snapshot {
        index,
        revision,
        generation,
        last_node,
        last_group,
        models,
        deployments,
        draining,
        aliases,
        nodes,
        tokens,
        groups,
        outcomes,
    } = state.snapshot();
    let wire = pb::StateSnapshot {
        format: FORMAT,
        index,
        revision,
        generation,
        last_node,
        last_group: last_group.0,
        models: models.iter().map(model_to_wire).collect(),
        deployments: deployments.iter().map(deployment_to_wire).collect(),
        nodes: nodes.iter().map(|(id, node)| node_to_wire(*id, node)).collect(),
        tokens: tokens.iter().map(|(id, token)| token_to_wire(*id, token)).collect(),
        groups: groups.iter().map(|(id, group)| group_to_wire(*id, group)).collect(),
        outcomes: outcomes.iter().map(|(id, outcome)| outcome_to_wire(*id, outcome)).collect(),
        aliases: aliases.into_iter().map(|(alias, meant)| alias_to_wire(alias, meant)).collect(),
        draining,
    };
    wire.encode_to_vec()
}

/// The state of these bytes, every part checked.
///
/// # Errors
/// [`WireError`] names the field that cannot be.
pub fn decode_state(bytes: &[u8]) -> Result<ClusterState, WireError> {
    bounded("snapshot", bytes.len(), STATE_MAX)?;
    let wire = pb::StateSnapshot::decode(bytes);
    let wire = wire.map_err(|_| WireError::Malformed { field: "snapshot" })?;
    if wire.format != FORMAT {
        return Err(WireError::OutOfRange { field: "format" });
    }
    let snapshot = Snapshot {
        index: wire.index,
        revision: wire.revision,
        generation: wire.generation,
        last_node: wire.last_node,
        last_group: GroupId(wire.last_group),
        models: list("models", wire.models, model_from_wire)?,
        deployments: list("deployments", wire.deployments, wish_from_wire)?,
        draining: list("draining", wire.draining, Ok)?,
        aliases: list("aliases", wire.aliases, |one| Ok(alias_from_wire(one)))?,
        nodes: list("nodes", wire.nodes, node_from_wire)?,
        tokens: list("tokens", wire.tokens, token_from_wire)?,
        groups: list("groups", wire.groups, group_from_wire)?,
        outcomes: list("outcomes", wire.outcomes, outcome_from_wire)?,
    };
    Ok(ClusterState::restore(snapshot)?)
}

/// blake3 of the state's bytes: equal on all replicas at the same log position.
pub fn state_hash(state: &ClusterState) -> [u8; 32] {
    *blake3::hash(&encode_state(state)).as_bytes()
}

fn list<W, T>(
    field: &'static str,
    wire: Vec<W>,
    read: impl Fn(W) -> Result<T, WireError>,
) -> Result<Vec<T>, WireError> {
    bounded(field, wire.len(), LIST_MAX)?;
    wire.into_iter().map(read).collect()
}

fn alias_to_wire(alias: String, meant: Alias) -> pb::AliasRecord {
    let Alias { deployment, before } = meant;
    pb::AliasRecord { alias, deployment, before: before.unwrap_or_default() }
}

fn alias_from_wire(wire: pb::AliasRecord) -> (String, Alias) {
    let before = Some(wire.before).filter(|before| !before.is_empty());
    (wire.alias, Alias { deployment: wire.deployment, before })
}

fn node_to_wire(id: NodeId, node: &Node) -> pb::NodeRecord {
    let standing = match node.standing {
        Standing::Enrolled => WireStanding::Enrolled,
        Standing::Ready => WireStanding::Ready,
        Standing::Suspect => WireStanding::Suspect,
        Standing::Lost => WireStanding::Lost,
        Standing::Left => WireStanding::Left,
    };
    pb::NodeRecord {
        node: id.0,
        role: role_to_wire(node.role).into(),
        name: node.name.clone(),
        token: node.token.map_or(Vec::new(), |token| token.0.to_vec()).into(),
        standing: standing.into(),
        draining: node.draining,
        incarnation: node.incarnation,
        info: node.info.as_ref().map(join_to_wire),
        coordinator: node.coordinator.as_ref().map(coordinator_to_wire),
    }
}

fn node_from_wire(wire: pb::NodeRecord) -> Result<(NodeId, Node), WireError> {
    let (field, value) = ("standing", wire.standing);
    let standing = match known(field, value)? {
        WireStanding::Enrolled => Standing::Enrolled,
        WireStanding::Ready => Standing::Ready,
        WireStanding::Suspect => Standing::Suspect,
        WireStanding::Lost => Standing::Lost,
        WireStanding::Left => Standing::Left,
        WireStanding::Unspecified => return Err(WireError::UnknownEnum { field, value }),
    };
    let token = match wire.token.is_empty() {
        true => None,
        false => Some(TokenId(id16("token", &wire.token)?)),
    };
    let node = Node {
        role: role_from_wire(wire.role)?,
        name: wire.name,
        token,
        standing,
        draining: wire.draining,
        incarnation: wire.incarnation,
        info: wire.info.map(info_from_wire).transpose()?,
        coordinator: wire.coordinator.map(coordinator_from_wire).transpose()?,
    };
    Ok((NodeId(wire.node), node))
}

fn token_to_wire(id: TokenId, token: &Token) -> pb::TokenRecord {
    pb::TokenRecord {
        token: id.0.to_vec().into(),
        role: role_to_wire(token.role).into(),
        uses: token.uses,
        uses_max: token.uses_max,
        expires: token.expires,
    }
}

fn token_from_wire(wire: pb::TokenRecord) -> Result<(TokenId, Token), WireError> {
    let pb::TokenRecord { uses, uses_max, expires, .. } = wire;
    let role = role_from_wire(wire.role)?;
    Ok((TokenId(id16("token", &wire.token)?), Token { role, uses, uses_max, expires }))
}

fn group_to_wire(id: GroupId, group: &Group) -> pb::GroupRecord {
    let phase = match group.phase {
        Phase::Forming => WirePhase::Forming,
        Phase::Loading => WirePhase::Loading,
        Phase::Serving => WirePhase::Serving,
        Phase::Repairing => WirePhase::Repairing,
        Phase::Retired => WirePhase::Retired,
    };
    pb::GroupRecord {
        group: id.0,
        deployment: group.deployment.clone(),
        epoch: group.epoch.0,
        plan: Some(plan_to_wire(&group.plan)),
        phase: phase.into(),
        ready: group.ready.iter().map(|&rank| narrow(rank)).collect(),
        reason: group.reason.clone(),
    }
}

fn group_from_wire(wire: pb::GroupRecord) -> Result<(GroupId, Group), WireError> {
    let (field, value) = ("phase", wire.phase);
    let phase = match known(field, value)? {
        WirePhase::Forming => Phase::Forming,
        WirePhase::Loading => Phase::Loading,
        WirePhase::Serving => Phase::Serving,
        WirePhase::Repairing => Phase::Repairing,
        WirePhase::Retired => Phase::Retired,
        WirePhase::Unspecified => return Err(WireError::UnknownEnum { field, value }),
    };
    bounded("ready", wire.ready.len(), STRIPES_MAX)?;
    let ready = wire.ready.into_iter().map(|rank| size("ready", rank));
    let group = Group {
        deployment: wire.deployment,
        epoch: Epoch(wire.epoch),
        plan: shape_from_wire(required("plan", wire.plan)?)?,
        phase,
        ready: ready.collect::<Result<_, _>>()?,
        reason: wire.reason,
    };
    Ok((GroupId(wire.group), group))
}

fn outcome_to_wire(id: RequestId, outcome: &Outcome) -> pb::OutcomeRecord {
    let outcome = match outcome {
        Ok(done) => WireOutcome::Done(pb::WriteDone {
            index: done.index,
            node: done.node.map(|node| node.0),
        }),
        Err(Refusal { code, message }) => WireOutcome::Refused(pb::WriteRefused {
            code: code_to_wire(*code).into(),
            message: message.clone(),
        }),
    };
    pb::OutcomeRecord { request: id.0.to_vec().into(), outcome: Some(outcome) }
}

fn outcome_from_wire(wire: pb::OutcomeRecord) -> Result<(RequestId, Outcome), WireError> {
    let outcome = match required("outcome", wire.outcome)? {
        WireOutcome::Done(done) => Ok(Done { index: done.index, node: done.node.map(NodeId) }),
        WireOutcome::Refused(refused) => {
            Err(Refusal { code: code_from_wire(refused.code)?, message: refused.message })
        }
    };
    Ok((RequestId(id16("request", &wire.request)?), outcome))
}

fn code_to_wire(code: Code) -> WireCode {
    match code {
        Code::Invalid => WireCode::Invalid,
        Code::Unknown => WireCode::Unknown,
        Code::Exists => WireCode::Exists,
        Code::Conflict => WireCode::Conflict,
        Code::Full => WireCode::Full,
        Code::Denied => WireCode::Denied,
    }
}

fn code_from_wire(value: i32) -> Result<Code, WireError> {
    Ok(match known("code", value)? {
        WireCode::Invalid => Code::Invalid,
        WireCode::Unknown => Code::Unknown,
        WireCode::Exists => Code::Exists,
        WireCode::Conflict => Code::Conflict,
        WireCode::Full => Code::Full,
        WireCode::Denied => Code::Denied,
        WireCode::Unspecified => return Err(WireError::UnknownEnum { field: "code", value }),
    })
}
