//! A rank that takes over stripes: what its device held is not read again, and the bits are those
//! of a rank that read everything.

use std::sync::Arc;

use compute::CpuDevice;
use decoder::{CacheSize, Decoder, LoadError, RankShape};
use model::ComputeType;
use planner::{ExpertCut, NodeId, RankPlan};
use tests::golden;
use tests::group::{Setup, greedy, load, run};

/// One of each: dense, experts, latent attention, shared experts, sinks and MXFP4, FP8.
const MODELS: [&str; 6] =
    ["llama3", "llama-kv2-oddvocab", "mixtral", "deepseek-v3", "deepseek-v2-lite", "gpt-oss-mxfp4"];

#[test]
fn only_what_is_missing_is_read() {
    for name in MODELS {
        let golden = golden::load(name);
        let setup = Setup { blocks: 16, ..Setup::even(1) };
        let read = |stripes: &[usize], before| {
            load(&golden.spec, &golden.checkpoint, &setup, stripes, before)
        };
        let (had, had_bytes) = read(&[0, 1, 2], None);
        let (_, lost_bytes) = read(&[5, 6], None);
        let (_, whole) = read(&[0, 1, 2, 5, 6], None);
        let (now, more) = read(&[0, 1, 2, 5, 6], Some(had.into_weights()));
        assert_eq!(more, whole - had_bytes, "{name}");
        assert!(more > 0 && more < lost_bytes, "{name}: what all ranks hold is there already");
        // Whatever it gives away, the rest needs nothing; and it does not come back by itself.
        let (fewer, none) = read(&[1, 6], Some(now.into_weights()));
        assert_eq!(none, 0, "{name}");
        let (_, again) = read(&[0, 1, 6], Some(fewer.into_weights()));
        assert!(again > 0, "{name}");
    }
}

#[test]
fn a_repaired_group_has_the_bits_of_any_other() {
    for name in MODELS {
        let golden = golden::load(name);
        let request = [greedy(&golden.prompts["medium"].ids, 6)];
        for compute in [ComputeType::F32, ComputeType::Int8] {
            let base = Setup { compute, blocks: 64, ..Setup::even(1) };
            let gold = run(&golden.spec, &golden.checkpoint, &base, &request);
            let repaired = Setup {
                held: vec![vec![0, 1, 2], vec![5, 6, 7]],
                compute,
                blocks: 64,
                ..Setup::owned(vec![vec![0, 1, 2, 3], vec![4, 5, 6, 7]])
            };
            let got = run(&golden.spec, &golden.checkpoint, &repaired, &request);
            assert_eq!(gold.generated, got.generated, "{name} {compute:?}");
            assert_eq!(gold.digest(0), got.digest(0), "{name} {compute:?}: other bits");
        }
    }
}

#[test]
fn weights_of_another_form_or_a_load_that_is_stopped() {
    let golden = golden::load("llama3");
    let setup = Setup { blocks: 16, ..Setup::even(1) };
    let read = |setup: &Setup, stripes: &[usize], before| {
        load(&golden.spec, &golden.checkpoint, setup, stripes, before)
    };
    let (had, whole) = read(&setup, &[0, 1], None);
    let other = Setup { compute: ComputeType::Bf16, ..setup.clone() };
    assert_eq!(read(&other, &[0, 1], Some(had.into_weights())).1, whole, "read anew");

    // Stopped after the first layer: nothing that was there or was read is lost.
    let mut before = Some(read(&setup, &[0, 1], None).0.into_weights());
    let plan = RankPlan {
        rank: 0,
        node: NodeId(1),
        device: 0,
        stripes: vec![0, 1, 2],
        weight_bytes: 0,
        kv_bytes: 0,
    };
    let cache = CacheSize { blocks: 16, block_tokens: 16, context: golden.spec.context };
    let (experts, compute) = (ExpertCut::Stripe, ComputeType::F32);
    let shape = RankShape { stripes: 8, plan: &plan, experts, compute, cache };
    let device = CpuDevice::new(1, None).expect("a CPU device");
    let spec = Arc::clone(&golden.spec);
    let stopped =
        Decoder::load_after(&mut before, device, spec, shape, &golden.checkpoint, &mut |_| false);
    assert!(matches!(stopped, Err(LoadError::Stopped)));
    let kept = before.expect("what it had");
    let (_, rest) = read(&setup, &[0, 1, 2], Some(kept));
    let (_, all) = read(&setup, &[0, 1, 2], None);
    assert!(rest < all - whole, "the first layer of stripe 2 is there: {rest} of {}", all - whole);
}
