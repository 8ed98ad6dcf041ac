//! A small model, deployments of it, nodes, and a picture of the state.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::Arc;

use cluster::{
    ClusterState, Command, Deployment, Event, Model, NodeInfo, Observation, Proposal, Rejected,
    Role, TokenId, reconcile, waiting_for,
};
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

pub const DIGEST: &str = "abc123";

pub fn model() -> Model {
    Model { name: "tiny".to_owned(), digest: DIGEST.to_owned(), spec: Arc::new(spec()) }
}

pub fn deployment(ranks: usize) -> Deployment {
    Deployment {
        name: "tiny".to_owned(),
        digest: DIGEST.to_owned(),
        experts: planner::ExpertCut::Stripe,
        compute: ComputeType::F32,
        stripes: Some(8),
        ranks,
        replicas: 1,
        nodes: BTreeSet::new(),
        kv_blocks: 16,
        block_tokens: 16,
        max_sequences: 4,
        step_tokens: 64,
        context: 128,
    }
}

/// The first process of a worker whose addresses carry `number`.
pub fn node(number: u64, devices: usize) -> NodeInfo {
    let device = DeviceSpec { memory_bytes: 64 << 20, weight: 1.0 };
    NodeInfo {
        boot: 1,
        name: format!("w{number}"),
        worker_address: format!("host-{number}:9000"),
        collective_addresses: (0..devices)
            .map(|device| format!("host-{number}:{}", 9100 + device))
            .collect(),
        devices: vec![device; devices],
        model_digests: BTreeSet::from([DIGEST.to_owned()]),
        kernel_class: "avx2".to_owned(),
        version: "0.0.0".to_owned(),
    }
}

/// Another process on the same machine.
pub fn restarted(number: u64, boot: u64) -> NodeInfo {
    NodeInfo { boot, ..node(number, 1) }
}

/// The planner's plan for as many ranks as `ids`, moved to those nodes, sensible or not.
pub fn plan_on(ids: &[u64]) -> ShardPlan {
    let numbers = 1..=ids.len() as u64;
    let spec_of = |id| NodeSpec { id: NodeId(id), devices: node(id, 1).devices };
    let nodes: Vec<NodeSpec> = numbers.map(spec_of).collect();
    let limits = planner::Limits {
        experts: planner::ExpertCut::Stripe,
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

pub fn enrol(token: u8, uses_max: u32, role: Role, name: &str) -> Command {
    let (token, name) = (TokenId([token; 16]), name.to_owned());
    Command::Enrol { token, uses_max, expires: 1_000_000, now: 900_000, role, name }
}

/// Applies at the next index and checks every invariant; a refusal must leave no trace but the
/// outcome of its request, and the state must survive being written down.
pub fn apply(
    state: &mut ClusterState,
    proposal: impl Into<Proposal>,
) -> Result<Vec<Event>, Rejected> {
    let proposal = proposal.into();
    let before = state.clone();
    let request = proposal.request;
    let repeated = request.is_some_and(|id| before.outcome(&id).is_some());
    let result = state.apply(before.index() + 1, proposal);
    if result.is_err() || repeated {
        assert_eq!((before.index(), before.revision()), (state.index(), state.revision()));
        let mut trace = state.snapshot();
        trace.outcomes.retain(|(id, _)| repeated || Some(*id) != request);
        assert_eq!(before.snapshot(), trace, "a refused command changed the state");
    } else {
        assert_eq!(state.revision(), before.revision() + 1);
    }
    state.check_integrity().unwrap();
    assert_eq!(ClusterState::restore(state.snapshot()).as_ref(), Ok(&*state));
    result
}

/// A new node that has joined as the worker `number`.
pub fn join(state: &mut ClusterState, number: u64, devices: usize) -> NodeId {
    let events = apply(state, enrol(7, u32::MAX, Role::Worker, &format!("w{number}"))).unwrap();
    let [Event::NodeEnrolled { node: id }] = events[..] else { panic!("{events:?}") };
    apply(state, Command::Join { node: id, info: node(number, devices) }).unwrap();
    id
}

/// A state with the model, the deployment and `nodes` one-device nodes, numbered from 1.
pub fn joined(ranks: usize, nodes: u64) -> ClusterState {
    let mut state = ClusterState::new();
    apply(&mut state, Command::RegisterModel(model())).unwrap();
    apply(&mut state, Command::Deploy(deployment(ranks))).unwrap();
    for number in 1..=nodes {
        join(&mut state, number, 1);
    }
    state
}

/// Applies what reconciliation wants of a leader that sees all.
pub fn settle(state: &mut ClusterState) {
    for command in reconcile(state, &Observation::default()) {
        apply(state, command).unwrap();
    }
    assert_eq!(reconcile(state, &Observation::default()), [], "reconcile does not settle");
}

/// Every live group's ranks report ready.
pub fn ready(state: &mut ClusterState) {
    let live: Vec<_> = state.groups().iter().filter(|(_, group)| group.live()).collect();
    let ranks = live.iter().flat_map(|(id, group)| {
        let (group_id, epoch) = (**id, group.epoch);
        (0..group.plan.ranks.len()).map(move |rank| Command::RankReady {
            group: group_id,
            epoch,
            rank,
        })
    });
    for command in ranks.collect::<Vec<_>>() {
        apply(state, command).unwrap();
    }
}

/// Nodes, groups, and of each deployment its routes and what is waited for, one line each.
pub fn picture(state: &ClusterState) -> String {
    let mut text = String::new();
    for (id, node) in state.nodes() {
        let draining = if node.draining { ", draining" } else { "" };
        text += &format!("node {} {} {:?}{draining}", id.0, node.name, node.standing);
        text += &format!(" incarnation {}\n", node.incarnation);
    }
    for (name, meant) in state.aliases() {
        let before = meant.before.as_ref().map_or(String::new(), |one| format!(", before {one}"));
        text += &format!("{name} means {}{before}\n", meant.deployment);
    }
    for name in state.draining() {
        text += &format!("{name} gets no new requests\n");
    }
    for (id, group) in state.groups() {
        let ranks: Vec<String> =
            group.plan.ranks.iter().map(|r| format!("{}@{}", r.stripes.len(), r.node.0)).collect();
        text += &format!("group {id} {} epoch {} ", group.deployment, group.epoch);
        text += &format!("{} [{}] ready {}", group.phase, ranks.join(" "), group.ready.len());
        if !group.reason.is_empty() {
            text += &format!(" ({})", group.reason);
        }
        text += "\n";
    }
    for name in state.deployments().keys() {
        for route in state.routes(name) {
            text += &format!("{name} -> group {} epoch {}", route.group, route.epoch);
            text += &format!(" on node {} at {}\n", route.leader.0, route.leader_address);
        }
        if let Some(why) = waiting_for(state, name) {
            text += &format!("{name} waits: {why}\n");
        }
    }
    text
}
