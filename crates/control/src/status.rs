//! What an operator sees: the state, how far ranks have loaded, how consensus stands.

use std::collections::BTreeSet;

use cluster::{
    Alias, ClusterState, Deployment, Group, GroupId, Node, Phase, Progress, degraded, waiting_for,
};
use planner::NodeId;
use wire::pb;

use crate::leader::Leader;
use crate::replica::{ReplicaStatus, RoleKind};

/// The answer to a status request; whether it is current is for whoever asks to find out.
pub(crate) fn reply(
    state: &ClusterState,
    leader: &Leader,
    replica: &ReplicaStatus,
) -> pb::StatusReply {
    let nodes = state.nodes().iter().map(|(&id, node)| node_status(id, node));
    let progress = leader.progress();
    let groups = state.groups().iter().map(|(&id, group)| group_status(id, group, progress));
    let deployments = state.deployments().values().map(|one| deployment_status(state, one));
    let models = state.models().values().map(|model| pb::ModelStatus {
        name: model.name.clone(),
        digest: model.digest.clone(),
        family: model.spec.family.name().to_owned(),
        parameters: model.spec.parameters(),
        context: model.spec.context as u64,
    });
    pb::StatusReply {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        nodes: nodes.collect(),
        deployments: deployments.collect(),
        groups: groups.collect(),
        revision: state.revision(),
        models: models.collect(),
        control: Some(control_status(state, replica, leader.stale_reports())),
        current: false,
        generation: state.generation(),
        aliases: state.aliases().iter().map(|(name, meant)| alias_status(name, meant)).collect(),
    }
}

fn alias_status(name: &str, meant: &Alias) -> pb::AliasStatus {
    pb::AliasStatus {
        name: name.to_owned(),
        deployment: meant.deployment.clone(),
        before: meant.before.clone().unwrap_or_default(),
    }
}

fn node_status(id: NodeId, node: &Node) -> pb::NodeStatus {
    let (info, at) = (node.info.as_ref(), node.coordinator.as_ref());
    let worker = info.into_iter().flat_map(|info| &info.model_digests);
    let gateway = at.into_iter().flat_map(|at| &at.model_digests);
    let models: BTreeSet<&String> = worker.chain(gateway).collect();
    pb::NodeStatus {
        node: id.0,
        name: node.name.clone(),
        worker_address: info.map(|info| info.worker_address.clone()).unwrap_or_default(),
        devices: node.devices().iter().map(wire::device_to_wire).collect(),
        kernel_class: info.map(|info| info.kernel_class.clone()).unwrap_or_default(),
        standing: node.word().to_owned(),
        role: node.role.to_string(),
        incarnation: node.incarnation,
        version: info.map(|info| info.version.clone()).unwrap_or_default(),
        cluster_address: at.map(|at| at.cluster_address.clone()).unwrap_or_default(),
        http_address: at.map(|at| at.http_address.clone()).unwrap_or_default(),
        model_digests: models.into_iter().cloned().collect(),
    }
}

fn deployment_status(state: &ClusterState, deployment: &Deployment) -> pb::DeploymentStatus {
    let groups = state.groups_of(&deployment.name);
    let serving = groups.filter(|(_, group)| group.phase == Phase::Serving).count();
    pb::DeploymentStatus {
        deployment: Some(wire::deployment_to_wire(deployment)),
        serving: u32::try_from(serving).unwrap_or(u32::MAX),
        waiting_for: waiting_for(state, &deployment.name).unwrap_or_default(),
        degraded: degraded(state, &deployment.name).unwrap_or_default(),
        draining: state.draining().contains(&deployment.name),
    }
}

fn group_status(id: GroupId, group: &Group, progress: &Progress) -> pb::GroupStatus {
    let ranks = group.plan.ranks.iter().map(|rank| {
        let (bytes_read, bytes_total) = progress.get(&(id, rank.rank)).copied().unwrap_or_default();
        pb::RankProgress {
            rank: u32::try_from(rank.rank).unwrap_or(u32::MAX),
            bytes_read,
            bytes_total,
            ready: group.live() && group.ready.contains(&rank.rank),
        }
    });
    pb::GroupStatus {
        group: id.0,
        epoch: group.epoch.0,
        phase: group.phase.to_string(),
        plan: Some(wire::plan_to_wire(&group.plan)),
        progress: ranks.collect(),
        reason: group.reason.clone(),
        deployment: group.deployment.clone(),
        load: None,
    }
}

fn control_status(
    state: &ClusterState,
    replica: &ReplicaStatus,
    stale_reports: u64,
) -> pb::ControlStatus {
    let members = &replica.members;
    let member = |node: NodeId| {
        let peer = replica.peers.get(&node);
        let own = node == replica.id;
        let voter = members.is_voter(node);
        pb::MemberStatus {
            node: node.0,
            part: if voter { "voter" } else { "learner" }.to_owned(),
            matched: peer.map_or(if own { replica.last } else { 0 }, |peer| peer.matched),
            active: own || peer.is_some_and(|peer| peer.recent_active),
        }
    };
    let leader = match replica.role {
        RoleKind::Leader => Some(replica.id),
        _ => replica.leader,
    };
    pb::ControlStatus {
        node: replica.id.0,
        term: replica.term,
        leader: leader.map_or(0, |leader| leader.0),
        commit: replica.commit,
        applied: replica.applied,
        last: replica.last,
        snapshot: replica.snapshot,
        members: members.all().into_iter().map(member).collect(),
        storage_full: replica.storage_full,
        state_hash: wire::state_hash(state).to_vec().into(),
        joint: members.is_joint(),
        stale_reports,
    }
}
