//! A small deployment, nodes, and a picture of the state.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::sync::Arc;

use cluster::{ClusterState, Command, Deployment, NodeInfo};
use model::{ComputeType, ModelSpec};
use planner::{DeviceSpec, NodeId, NodeSpec, ShardPlan, plan};

pub fn spec() -> ModelSpec {
    ModelSpec::from_config(
        r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4,
            "max_position_embeddings": 128, "vocab_size": 256, "rms_norm_eps": 1e-5,
            "bos_token_id": null, "eos_token_id": 0}"#,
    )
    .expect("a Llama config")
}

pub fn deployment(ranks: usize) -> Deployment {
    Deployment {
        model: "tiny".to_owned(),
        digest: "abc123".to_owned(),
        spec: Arc::new(spec()),
        experts: planner::ExpertCut::Stripe,
        compute: ComputeType::F32,
        stripes: Some(8),
        ranks,
        kv_blocks: 16,
        block_tokens: 16,
        max_sequences: 4,
        step_tokens: 64,
        context: 128,
    }
}

/// A node whose addresses carry `number`.
pub fn node(number: u64, devices: usize) -> NodeInfo {
    let device = DeviceSpec { memory_bytes: 64 << 20, weight: 1.0 };
    NodeInfo {
        name: format!("w{number}"),
        worker_address: format!("host-{number}:9000"),
        collective_addresses: (0..devices)
            .map(|device| format!("host-{number}:{}", 9100 + device))
            .collect(),
        devices: vec![device; devices],
        model_digest: "abc123".to_owned(),
        kernel_class: "avx2".to_owned(),
        version: "0.0.0".to_owned(),
    }
}

/// The planner's plan for as many ranks as `ids`, moved to those nodes, sensible or not.
pub fn plan_on(ids: &[u64]) -> ShardPlan {
    let numbers = 1..=ids.len() as u64;
    let spec_of = |id| NodeSpec { id: NodeId(id), devices: node(id, 1).devices };
    let nodes: Vec<NodeSpec> = numbers.map(spec_of).collect();
    let limits = planner::Limits {
        stripes: Some(8),
        ranks: Some(ids.len()),
        compute: ComputeType::F32,
        kv_blocks: 16,
        block_tokens: 16,
    };
    let mut plan = plan(&spec(), &nodes, &limits).unwrap();
    for (rank, &id) in plan.ranks.iter_mut().zip(ids) {
        rank.node = NodeId(id);
    }
    plan
}

/// Applies at the next index and checks every invariant; a refusal must leave no trace.
pub fn apply(
    state: &mut ClusterState,
    command: Command,
) -> Result<Vec<cluster::Event>, cluster::Rejected> {
    let before = state.clone();
    let result = state.apply(before.index() + 1, command);
    if result.is_err() {
        assert_eq!(before, *state, "a refused command changed the state");
    } else {
        assert_eq!(state.revision(), before.revision() + 1);
    }
    state.check_integrity().unwrap();
    result
}

/// A state with the deployment and `nodes` one-device nodes, numbered from 1.
pub fn joined(ranks: usize, nodes: u64) -> ClusterState {
    let mut state = ClusterState::new();
    apply(&mut state, Command::Deploy(deployment(ranks))).unwrap();
    for number in 1..=nodes {
        apply(&mut state, Command::Join(node(number, 1))).unwrap();
    }
    state
}

/// Nodes, groups and what is waited for, one line each.
pub fn picture(state: &ClusterState) -> String {
    let mut text = String::new();
    for (id, node) in state.nodes() {
        let alive = if node.alive { "alive" } else { "lost" };
        text += &format!("node {} {} {alive}\n", id.0, node.info.name);
    }
    for (id, group) in state.groups() {
        let ranks: Vec<String> =
            group.plan.ranks.iter().map(|r| format!("{}@{}", r.stripes.len(), r.node.0)).collect();
        text += &format!("group {id} epoch {} {} [{}]", group.epoch, group.phase, ranks.join(" "));
        text += &format!(" ready {}", group.ready.len());
        if !group.reason.is_empty() {
            text += &format!(" ({})", group.reason);
        }
        text += "\n";
    }
    match state.route("tiny") {
        Some(route) => text += &format!("route {}\n", route.leader_address),
        None => text += &format!("{}\n", cluster::waiting_for(state).unwrap()),
    }
    text
}
