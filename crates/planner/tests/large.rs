//! DeepSeek-V3 in its real shape on many ranks.

#![allow(clippy::unwrap_used, reason = "a test may stop at once")]

use model::{ComputeType, ModelSpec, Part};
use planner::stripes::{self, Slice};
use planner::{Cut, DeviceSpec, ExpertCut, Limits, NodeId, NodeSpec, PlanError, plan};

const GIB: u64 = 1 << 30;
const STRIPES: usize = 32;

fn deepseek_v3() -> ModelSpec {
    ModelSpec::from_config(
        r#"{"architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 3,
            "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
            "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "n_group": 8,
            "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
            "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
            "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "rope_theta": 10000, "routed_scaling_factor": 2.5,
            "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096},
            "quantization_config": {"fmt": "e4m3", "quant_method": "fp8",
                "weight_block_size": [128, 128]},
            "topk_group": 4, "v_head_dim": 128, "vocab_size": 129280}"#,
    )
    .unwrap()
}

fn nodes(count: u64, memory_bytes: u64) -> Vec<NodeSpec> {
    let devices = vec![DeviceSpec { memory_bytes, weight: 1.0 }];
    (0..count).map(|id| NodeSpec { id: NodeId(id), devices: devices.clone() }).collect()
}

fn limits(stripes: usize, ranks: usize) -> Limits {
    let (stripes, ranks, compute) = (Some(stripes), Some(ranks), ComputeType::Int8);
    Limits {
        stripes,
        ranks,
        compute,
        kv_blocks: 1024,
        block_tokens: 32,
        experts: ExpertCut::Stripe,
    }
}

#[test]
fn sixteen_and_thirty_two_ranks() {
    let spec = deepseek_v3();
    // 1.125 bytes per parameter, what every rank keeps, and a cache of 2.1 GiB.
    for (ranks, memory) in [(16, 52 * GIB), (32, 26 * GIB)] {
        let plan = plan(&spec, &nodes(ranks, memory), &limits(STRIPES, ranks as usize)).unwrap();
        assert_eq!(plan.check(&spec), Ok(()));
        assert_eq!(plan.ranks.len(), ranks as usize);
        for rank in &plan.ranks {
            assert_eq!(rank.stripes.len(), STRIPES / ranks as usize);
            // 61 layers of 576 bf16 numbers per token, whoever holds how many heads.
            assert_eq!(rank.kv_bytes, 70_272 * 1024 * 32);
        }
    }
}

#[test]
fn a_stripe_of_deepseek_v3() {
    let spec = deepseek_v3();
    let slice = |layer, part, stripe| {
        stripes::slice(&spec.tensor(Some(layer), part).unwrap(), &spec, STRIPES, stripe)
    };
    for stripe in 0..STRIPES {
        let run = |each: usize| each * stripe..each * (stripe + 1);
        // Four of 128 heads.
        assert_eq!(slice(60, Part::QueryUp, stripe), Slice::Rows(run(4 * 192)));
        assert_eq!(slice(60, Part::LatentUp, stripe), Slice::Rows(run(4 * 256)));
        assert_eq!(slice(60, Part::Output, stripe), Slice::Columns(run(4 * 128)));
        assert_eq!(slice(60, Part::LatentDown, stripe), Slice::Whole);
        assert_eq!(slice(60, Part::Router, stripe), Slice::Whole);
        assert_eq!(slice(60, Part::ExpertUp(255), stripe), Slice::Rows(run(64)));
        assert_eq!(slice(60, Part::ExpertDown(255), stripe), Slice::Columns(run(64)));
        assert_eq!(slice(60, Part::SharedGate, stripe), Slice::Rows(run(64)));
        assert_eq!(slice(60, Part::SharedDown, stripe), Slice::Columns(run(64)));
        // 144 blocks of 128: four or five each, none of them cut. An expert has 16 blocks only.
        let block = |stripe: usize| stripe * 144 / 32 * 128;
        let dense = block(stripe)..block(stripe + 1);
        assert!([4 * 128, 5 * 128].contains(&dense.len()));
        assert_eq!(slice(0, Part::Up, stripe), Slice::Rows(dense.clone()));
        assert_eq!(slice(0, Part::Down, stripe), Slice::Columns(dense));
    }
}

#[test]
fn whole_experts_of_deepseek_v3() {
    let spec = deepseek_v3();
    let cut = Cut { stripes: STRIPES, experts: ExpertCut::Whole };
    let slice =
        |part, stripe| stripes::slice(&spec.tensor(Some(60), part).unwrap(), &spec, cut, stripe);
    for expert in 0..256 {
        for stripe in 0..STRIPES {
            // Eight experts each.
            let own = expert / 8 == stripe;
            let expected = if own { Slice::Whole } else { Slice::Rows(0..0) };
            assert_eq!(slice(Part::ExpertDown(expert), stripe), expected);
        }
    }
    assert_eq!(slice(Part::SharedDown, 1), Slice::Columns(64..128));
    let bytes =
        |held: &[usize], cut: Cut| stripes::weight_bytes(&spec, cut, held, ComputeType::Int8);
    // All of it weighs the same either way, and here each stripe does, too.
    for held in [(0..32).collect::<Vec<_>>(), vec![7], vec![0, 31]] {
        assert_eq!(bytes(&held, cut), bytes(&held, STRIPES.into()));
    }
    let limits = Limits { experts: ExpertCut::Whole, ..limits(STRIPES, 32) };
    assert_eq!(plan(&spec, &nodes(32, 26 * GIB), &limits).unwrap().check(&spec), Ok(()));
}

#[test]
fn too_small_or_too_many() {
    let spec = deepseek_v3();
    let error = plan(&spec, &nodes(16, 30 * GIB), &limits(STRIPES, 16)).unwrap_err();
    let PlanError::DoesNotFit { shortages, .. } = error else { panic!("{error}") };
    assert_eq!(shortages.len(), 16);
    let error = plan(&spec, &nodes(129, GIB), &limits(129, 129)).unwrap_err();
    assert_eq!(error, PlanError::Stripes { stripes: 129, max: 128 });
}

/// What all ranks hold together: every parameter once, and the replicated ones once per rank.
#[test]
fn weights_add_up() {
    let spec = deepseek_v3();
    let whole =
        stripes::weight_bytes(&spec, STRIPES, &(0..32).collect::<Vec<_>>(), ComputeType::F32);
    assert_eq!(whole, 4 * spec.parameters());
    let parts: u64 =
        (0..32).map(|s| stripes::weight_bytes(&spec, STRIPES, &[s], ComputeType::F32)).sum();
    let replicated: u64 = spec
        .tensors()
        .iter()
        .filter(|tensor| tensor.sharding == model::Sharding::Replicated)
        .map(|tensor| 4 * tensor.elements())
        .sum();
    assert_eq!(parts, whole + 31 * replicated);
}
