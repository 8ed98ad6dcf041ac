//! What an operator sees: the state, and how far ranks have loaded.

use std::collections::BTreeMap;

use cluster::{ClusterState, Group, GroupId, Node, waiting_for};
use planner::NodeId;
use wire::pb;

/// Bytes read and bytes to read of the ranks of living groups.
pub(crate) type Progress = BTreeMap<(GroupId, usize), (u64, u64)>;

/// The answer to a status request.
pub(crate) fn reply(state: &ClusterState, progress: &Progress) -> pb::StatusReply {
    let nodes = state.nodes().iter().map(|(&id, node)| node_status(id, node));
    let groups = state.groups().iter().map(|(&id, group)| group_status(id, group, progress));
    pb::StatusReply {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        nodes: nodes.collect(),
        deployment: state.deployment().map(wire::deployment_to_wire),
        groups: groups.collect(),
        revision: state.revision(),
        waiting_for: waiting_for(state).unwrap_or_default(),
    }
}

fn node_status(id: NodeId, node: &Node) -> pb::NodeStatus {
    pb::NodeStatus {
        node: id.0,
        name: node.info.name.clone(),
        worker_address: node.info.worker_address.clone(),
        devices: node.info.devices.iter().map(wire::device_to_wire).collect(),
        kernel_class: node.info.kernel_class.clone(),
        alive: node.alive,
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
    }
}
