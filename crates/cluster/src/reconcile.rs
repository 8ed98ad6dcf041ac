//! What to propose next, and why the deployment is not served: pure looks at the state.

use planner::{Limits, NodeSpec, PlanError, ShardPlan, plan};

use crate::{ClusterState, Command, Deployment, Epoch, GroupId, Phase};

/// Commands that bring the cluster nearer to its deployment; empty when there is nothing to do.
///
/// Where no group lives and the free devices suffice: a group by the planner's finished plan, under
/// the next number and the next epoch. Spare devices stay idle until a group needs them. (A group
/// that loses a node is retired by `apply` itself.)
pub fn reconcile(state: &ClusterState) -> Vec<Command> {
    let Some(deployment) = state.deployment() else { return Vec::new() };
    if state.groups().values().any(|group| group.live()) {
        return Vec::new();
    }
    let group = state.last_group.0.checked_add(1).map(GroupId);
    let epoch = state.last_epoch.0.checked_add(1).map(Epoch);
    match (group, epoch, next_plan(state, deployment)) {
        (Some(group), Some(epoch), Ok(plan)) => vec![Command::Place { group, epoch, plan }],
        _ => Vec::new(),
    }
}

/// Why the deployment is not served, in words for an operator; `None` when it is served.
pub fn waiting_for(state: &ClusterState) -> Option<String> {
    let Some(deployment) = state.deployment() else {
        return Some("no model is deployed".to_owned());
    };
    if state.groups().values().any(|group| group.phase == Phase::Serving) {
        return None;
    }
    if let Some((id, group)) = state.groups().iter().find(|(_, group)| group.live()) {
        let (ready, ranks) = (group.ready.len(), group.plan.ranks.len());
        return Some(format!("group {id} forms: {ready} of {ranks} ranks are ready"));
    }
    let (joined, ranks) = (free_devices(state), deployment.ranks);
    if joined < ranks {
        return Some(format!("{joined} of {ranks} ranks have joined"));
    }
    Some(match next_plan(state, deployment) {
        Ok(_) => "a group is about to be placed".to_owned(),
        Err(error) => error.to_string(),
    })
}

fn free_devices(state: &ClusterState) -> usize {
    let alive = state.nodes().values().filter(|node| node.alive);
    alive.map(|node| node.info.devices.len()).sum()
}

/// Both callers have seen that no group lives, so every device of a living node is free.
fn next_plan(state: &ClusterState, deployment: &Deployment) -> Result<ShardPlan, PlanError> {
    let alive = state.nodes().iter().filter(|(_, node)| node.alive);
    let nodes = alive.map(|(&id, node)| NodeSpec { id, devices: node.info.devices.clone() });
    let nodes: Vec<NodeSpec> = nodes.collect();
    let limits = Limits {
        stripes: Some(deployment.stripe_count()),
        ranks: Some(deployment.ranks),
        experts: deployment.experts,
        compute: deployment.compute,
        kv_blocks: deployment.kv_blocks,
        block_tokens: deployment.block_tokens,
    };
    plan(&deployment.spec, &nodes, &limits)
}
