//! Plans over real specs: even, by weight, by memory, refused, checked and printed.

#![allow(clippy::unwrap_used, reason = "a test may stop at once")]

use model::{ComputeType, ModelSpec};
use planner::{
    DeviceSpec, ExpertCut, Limits, NodeId, NodeSpec, PlanError, RankPlan, ShardPlan, Shortage,
    plan, stripes,
};

const GIB: u64 = 1 << 30;

/// Mixtral with 8 query heads, 4 KV heads, 8 experts of 160 columns.
fn mixtral() -> ModelSpec {
    ModelSpec::from_config(
        r#"{"architectures": ["MixtralForCausalLM"], "hidden_size": 256, "head_dim": 32,
            "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
            "max_position_embeddings": 1024, "vocab_size": 2048}"#,
    )
    .unwrap()
}

/// Llama 3.1 8B.
fn llama() -> ModelSpec {
    ModelSpec::from_config(
        r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "max_position_embeddings": 131072, "vocab_size": 128256,
            "rms_norm_eps": 1e-05, "rope_theta": 500000.0}"#,
    )
    .unwrap()
}

/// One node per (memory, weight), numbered from 1.
fn nodes(devices: &[(u64, f64)]) -> Vec<NodeSpec> {
    let node = |(at, &(memory_bytes, weight)): (usize, &(u64, f64))| NodeSpec {
        id: NodeId(at as u64 + 1),
        devices: vec![DeviceSpec { memory_bytes, weight }],
    };
    devices.iter().enumerate().map(node).collect()
}

fn limits(ranks: Option<usize>) -> Limits {
    Limits {
        stripes: None,
        ranks,
        experts: ExpertCut::Stripe,
        compute: ComputeType::Bf16,
        kv_blocks: 64,
        block_tokens: 16,
    }
}

fn shares(plan: &ShardPlan) -> Vec<usize> {
    plan.ranks.iter().map(|rank| rank.stripes.len()).collect()
}

#[test]
fn eight_stripes_on_three_ranks() {
    let spec = mixtral();
    let plan = plan(&spec, &nodes(&[(GIB, 1.0); 3]), &limits(None)).unwrap();
    assert_eq!(plan.check(&spec), Ok(()));
    insta::assert_snapshot!(plan.table(&spec, ExpertCut::Stripe), @"
    rank  node  device  stripes  Q heads  KV heads  FFN columns  vocab rows   weights          KV
       0     1       0      0-2      0-2       0-1         0-47       0-767  3.65 MiB    1.00 MiB
       1     2       0      3-5      3-5       1-2       48-111    768-1535  4.40 MiB    1.00 MiB
       2     3       0      6-7      6-7         3      112-159   1536-2047  3.15 MiB  512.00 KiB
    ");
    insta::assert_snapshot!(plan.to_string(), @"
    rank  node  device  stripes   weights          KV
       0     1       0      0-2  3.65 MiB    1.00 MiB
       1     2       0      3-5  4.40 MiB    1.00 MiB
       2     3       0      6-7  3.15 MiB  512.00 KiB
    ");
}

#[test]
fn whole_experts_on_three_ranks() {
    let spec = mixtral();
    let limits = Limits { experts: ExpertCut::Whole, ..limits(None) };
    let plan = plan(&spec, &nodes(&[(GIB, 1.0); 3]), &limits).unwrap();
    assert_eq!(plan.check(&spec), Ok(()));
    let table = plan.table(&spec, ExpertCut::Whole);
    let cells: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
        .collect();
    let columns = ["stripes", "FFN columns", "experts", "weights"];
    let at = columns.map(|name| cells[0].iter().position(|cell| *cell == name).unwrap());
    let rank = |rank: usize| at.map(|at| cells[rank + 1][at]);
    // No dense columns, and three, three and two experts.
    assert_eq!(rank(0), ["0-2", "-", "0-2", "4.21 MiB"]);
    assert_eq!(rank(1), ["3-5", "-", "3-5", "4.21 MiB"]);
    assert_eq!(rank(2), ["6-7", "-", "6-7", "2.77 MiB"]);
    // Nothing is divided whole where there are no experts.
    assert_eq!(plan.table(&llama(), ExpertCut::Whole), plan.table(&llama(), ExpertCut::Stripe));
}

#[test]
fn by_weight_and_by_count() {
    let spec = llama();
    let plan = |devices: &[(u64, f64)], ranks| {
        shares(&plan(&spec, &nodes(devices), &limits(ranks)).unwrap())
    };
    assert_eq!(plan(&[(64 * GIB, 3.0), (64 * GIB, 1.0)], None), [6, 2]);
    assert_eq!(plan(&[(64 * GIB, 1.0), (64 * GIB, 3.0)], None), [2, 6]);
    for ranks in 1..=8 {
        let shares = plan(&[(64 * GIB, 1.0); 9], Some(ranks));
        assert_eq!((shares.len(), shares.iter().sum::<usize>()), (ranks, 8));
        let (most, least) = (shares.iter().max().unwrap(), shares.iter().min().unwrap());
        assert!(most - least <= 1, "{shares:?}");
    }
    // All devices, but no more than stripes.
    assert_eq!(plan(&[(64 * GIB, 1.0); 9], None), [1; 8]);
}

#[test]
fn devices_are_taken_in_the_order_of_nodes() {
    let device = DeviceSpec { memory_bytes: 64 * GIB, weight: 1.0 };
    let node = |id, devices| NodeSpec { id: NodeId(id), devices: vec![device.clone(); devices] };
    let places = |nodes: &[NodeSpec], ranks| {
        let plan = plan(&llama(), nodes, &limits(ranks)).unwrap();
        let place = |rank: &RankPlan| (rank.rank, rank.node.0, rank.device);
        plan.ranks.iter().map(place).collect::<Vec<_>>()
    };
    let nodes = [node(7, 2), node(9, 1), node(2, 1), node(4, 0)];
    assert_eq!(places(&nodes, None), [(0, 2, 0), (1, 7, 0), (2, 7, 1), (3, 9, 0)]);
    assert_eq!(places(&nodes, Some(2)), [(0, 2, 0), (1, 7, 0)]);
}

/// Numbers worked out by hand from the published shape of Llama 3.1 8B.
#[test]
fn bytes_of_a_known_model() {
    let spec = llama();
    let all: Vec<usize> = (0..8).collect();
    let matrices = 8_030_261_248 - 65 * 4096;
    let norms = 65 * 4096 * 4;
    let bytes = |held: &[usize], compute| stripes::weight_bytes(&spec, 8, held, compute);
    assert_eq!(bytes(&all, ComputeType::Bf16), 2 * matrices + norms);
    assert_eq!(bytes(&all, ComputeType::F32), 4 * matrices + norms);
    // Embedding and head stay bf16; the others take 36 bytes per 32.
    let ends = 2 * 128_256 * 4096;
    assert_eq!(bytes(&all, ComputeType::Int8), 2 * ends + (matrices - ends) / 32 * 36 + norms);
    // Everything but norms divides evenly by 8.
    assert_eq!(bytes(&[5], ComputeType::Bf16), 2 * matrices / 8 + norms);
    // 128 KiB per token in bf16.
    let cache = |held: &[usize], compute| stripes::kv_bytes(&spec, 8, held, compute, 10, 16);
    assert_eq!(cache(&all, ComputeType::Bf16), 160 * (128 << 10));
    assert_eq!(cache(&all, ComputeType::F32), 160 * (256 << 10));
    assert_eq!(cache(&[0, 7], ComputeType::Int8), 160 * (32 << 10));
}

#[test]
fn stripes_move_to_where_there_is_room() {
    let spec = llama();
    // A stripe takes about 1.9 GiB; the fast device has room for two.
    let devices = [(4 * GIB, 4.0), (64 * GIB, 1.0), (64 * GIB, 1.0)];
    let plan = plan(&spec, &nodes(&devices), &limits(None)).unwrap();
    assert_eq!(shares(&plan), [2, 3, 3]);
    for (rank, (memory, _)) in plan.ranks.iter().zip(devices) {
        assert!(rank.weight_bytes + rank.kv_bytes <= memory);
    }
}

#[test]
fn the_roomiest_devices_are_taken_where_the_first_do_not_fit() {
    let spec = mixtral();
    let small = (1 << 20, 1.0);
    let large = (1 << 40, 1.0);
    let devices = nodes(&[small, large, small, large, large]);
    let chosen = plan(&spec, &devices, &limits(Some(2))).unwrap();
    let taken: Vec<NodeId> = chosen.ranks.iter().map(|rank| rank.node).collect();
    assert_eq!(taken, [devices[1].id, devices[3].id]);
    // Where the first ones do, nothing is sought.
    let chosen = plan(&spec, &nodes(&[large, large, large]), &limits(Some(1))).unwrap();
    assert_eq!(chosen.ranks[0].node, devices[0].id);
    // Where not even the roomiest do, the shortages are the first ones'.
    let refused = plan(&spec, &nodes(&[small, small, small]), &limits(Some(1))).unwrap_err();
    let PlanError::DoesNotFit { shortages, .. } = refused else { panic!("{refused}") };
    assert_eq!(shortages[0].node, devices[0].id);
}

#[test]
fn what_does_not_fit_says_how_much_is_missing() {
    let spec = llama();
    let devices = nodes(&[(4 * GIB, 1.0), (64 * GIB, 1.0), (123_456_789, 1.0)]);
    let refused = plan(&spec, &devices, &limits(None)).unwrap_err();
    let lines = refused.to_string().replace(": ", ":\n").replace("), ", "),\n");
    insta::assert_snapshot!(lines, @"
    8 stripes do not fit on 3 ranks:
    device 0 of node 1 needs 5.66 GiB (6073892864 bytes),
    offers 4.00 GiB (4294967296 bytes),
    lacks 1.66 GiB (1778925568 bytes); device 0 of node 3 needs 3.77 GiB (4049616896 bytes),
    offers 117.74 MiB (123456789 bytes),
    lacks 3.66 GiB (3926160107 bytes)
    ");
    let PlanError::DoesNotFit { stripes: 8, ranks: 3, shortages } = refused else {
        panic!("{refused}");
    };
    let held = [0, 1, 2];
    let needed = stripes::weight_bytes(&spec, 8, &held, ComputeType::Bf16)
        + stripes::kv_bytes(&spec, 8, &held, ComputeType::Bf16, 64, 16);
    let (available, missing) = (4 * GIB, needed - 4 * GIB);
    let first = Shortage { node: NodeId(1), device: 0, needed, available, missing };
    assert_eq!((shortages.len(), &shortages[0]), (2, &first));
    // The same devices hold it with the missing bytes added.
    let more = |memory: u64, at: usize| memory + shortages[at].missing;
    let devices = nodes(&[(more(4 * GIB, 0), 1.0), (64 * GIB, 1.0), (more(123_456_789, 1), 1.0)]);
    assert_eq!(shares(&plan(&spec, &devices, &limits(None)).unwrap()), [3, 3, 2]);
}

#[test]
fn absurd_caches_do_not_fit() {
    let limits = Limits { kv_blocks: usize::MAX, block_tokens: usize::MAX, ..limits(None) };
    let refused = plan(&llama(), &nodes(&[(u64::MAX - 1, 1.0)]), &limits);
    assert!(matches!(refused, Err(PlanError::DoesNotFit { .. })));
}

/// The largest cut and the most ranks, with a device so small that all splits are looked at.
#[test]
fn the_largest_plan_takes_little_time() {
    let spec = ModelSpec::from_config(
        r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "head_dim": 2,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 1024,
            "max_position_embeddings": 1024, "vocab_size": 32000}"#,
    )
    .unwrap();
    let devices = vec![(GIB, 1.0); 128];
    let limits = Limits { stripes: Some(256), ..limits(None) };
    let even = plan(&spec, &nodes(&devices), &limits).unwrap();
    assert_eq!(shares(&even), [2; 128]);
    let mut devices = devices;
    devices[0].0 = even.ranks[0].weight_bytes + even.ranks[0].kv_bytes - 1;
    let moved = plan(&spec, &nodes(&devices), &limits).unwrap();
    assert_eq!((moved.ranks[0].stripes.len(), moved.check(&spec)), (1, Ok(())));
    assert_eq!(shares(&moved).iter().max(), Some(&3));
    assert_eq!(
        plan(&spec, &nodes(&devices), &Limits { stripes: Some(257), ..limits }),
        Err(PlanError::Stripes { stripes: 257, max: 256 })
    );
}

#[test]
fn impossible_wishes() {
    let spec = llama();
    let refused = |devices: &[(u64, f64)], stripes: Option<usize>, ranks: Option<usize>| {
        let limits = Limits { stripes, ..limits(ranks) };
        plan(&spec, &nodes(devices), &limits).unwrap_err()
    };
    let three = [(64 * GIB, 1.0); 3];
    assert_eq!(refused(&three, Some(0), None), PlanError::Stripes { stripes: 0, max: 32 });
    assert_eq!(refused(&three, Some(33), None), PlanError::Stripes { stripes: 33, max: 32 });
    assert_eq!(refused(&three, None, Some(0)), PlanError::NoRanks);
    assert_eq!(refused(&[], None, None), PlanError::NoDevices);
    assert_eq!(refused(&[], None, Some(2)), PlanError::NoDevices);
    let few = PlanError::TooFewDevices { ranks: 4, devices: 3 };
    assert_eq!(refused(&three, None, Some(4)), few);
    let many = PlanError::TooManyRanks { ranks: 3, stripes: 2 };
    assert_eq!(refused(&three, Some(2), Some(3)), many);
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let refused = refused(&[(GIB, 1.0), (GIB, weight)], None, None);
        let weight = weight.to_string();
        assert_eq!(refused, PlanError::Weight { node: NodeId(2), device: 0, weight });
    }
    let mut twice = nodes(&three);
    twice[2].id = NodeId(1);
    let refused = plan(&spec, &twice, &limits(None));
    assert_eq!(refused, Err(PlanError::NodeTwice { node: NodeId(1) }));
}

#[test]
fn plans_from_elsewhere_are_checked() {
    use PlanError::*;
    let spec = mixtral();
    let good = plan(&spec, &nodes(&[(GIB, 1.0); 3]), &limits(None)).unwrap();
    let refused = |change: &dyn Fn(&mut ShardPlan)| {
        let mut plan = good.clone();
        change(&mut plan);
        plan.check(&spec).unwrap_err()
    };
    assert_eq!(refused(&|p| p.stripes = 9), Stripes { stripes: 9, max: 8 });
    assert_eq!(refused(&|p| p.stripes = 0), Stripes { stripes: 0, max: 8 });
    assert_eq!(refused(&|p| p.ranks.clear()), NoRanks);
    assert_eq!(refused(&|p| p.ranks.swap(0, 1)), RankNumber { rank: 1, expected: 0 });
    assert_eq!(refused(&|p| p.ranks[1].rank = 7), RankNumber { rank: 7, expected: 1 });
    let twice = DeviceTwice { rank: 1, node: NodeId(1), device: 0 };
    assert_eq!(refused(&|p| p.ranks[1].node = NodeId(1)), twice);
    assert_eq!(refused(&|p| p.ranks[2].stripes.clear()), EmptyRank { rank: 2 });
    let stray = NoSuchStripe { rank: 2, stripe: 8, stripes: 8 };
    assert_eq!(refused(&|p| p.ranks[2].stripes.push(8)), stray);
    assert_eq!(refused(&|p| p.ranks[0].stripes.swap(0, 2)), Order { rank: 0, stripe: 1 });
    assert_eq!(refused(&|p| p.ranks[0].stripes[1] = 0), Order { rank: 0, stripe: 0 });
    assert_eq!(refused(&|p| p.ranks[0].stripes[2] = 4), HeldTwice { stripe: 4, rank: 1 });
    assert_eq!(refused(&|p| drop(p.ranks.pop())), Unheld { stripe: 6 });
    assert_eq!(refused(&|p| p.ranks[1].stripes.truncate(2)), Unheld { stripe: 5 });
    // Any set of stripes will do, contiguous or not.
    let mut scattered = good.clone();
    scattered.ranks[0].stripes = vec![0, 2, 4];
    scattered.ranks[1].stripes = vec![1, 3, 5];
    assert_eq!(scattered.check(&spec), Ok(()));
    assert!(scattered.table(&spec, ExpertCut::Stripe).contains("0,2,4"));
}
