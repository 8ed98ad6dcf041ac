//! Steps that do not fit the model or the cache are refused by name before anything is computed,
//! and the decoder goes on.

use collective::{Membership, TreeCollective, local};
use compute::CpuDevice;
use decoder::{CacheSize, Decoder, ForwardError, LoadError, RankShape};
use engine::{BlockId, SeqId, Step, StepEntry, Want};
use model::ComputeType;
use planner::{ExpertCut, NodeId, RankPlan};
use tests::golden::{self, Golden};
use tests::group::reads_its_stripes_only;

fn load(golden: &Golden, stripes: usize, own: Vec<usize>) -> Result<Decoder<CpuDevice>, LoadError> {
    let device = CpuDevice::new(1, None).expect("a CPU device");
    let node = NodeId(1);
    let plan = RankPlan { rank: 0, node, device: 0, stripes: own, weight_bytes: 0, kv_bytes: 0 };
    let cache = CacheSize { blocks: 4, block_tokens: 16, context: 64 };
    let shape = RankShape {
        stripes,
        plan: &plan,
        experts: ExpertCut::Stripe,
        compute: ComputeType::F32,
        cache,
    };
    Decoder::load(device, golden.spec.clone(), shape, &golden.checkpoint, &mut |_| true)
}

fn step(start: usize, tokens: &[u32], blocks: &[u32]) -> Step {
    let entry = StepEntry {
        seq: SeqId(0),
        start,
        tokens: tokens.to_vec(),
        blocks: blocks.iter().copied().map(BlockId).collect(),
        want: Want::Last,
    };
    Step { number: 1, entries: vec![entry] }
}

#[test]
fn a_step_that_does_not_fit_is_refused_and_the_next_one_runs() {
    for name in ["llama3", "deepseek-v3", "gpt-oss", "gemma3"] {
        refused_and_runs_on(name);
    }
}

fn refused_and_runs_on(name: &str) {
    let golden = golden::load(name);
    let mut decoder = load(&golden, 8, (0..8).collect()).expect("a decoder");
    let link = local::links(1, Membership { group: 1, epoch: 1 }).remove(0);
    let mut tree =
        TreeCollective::new(Box::new(link), 8, vec![(0..8).collect()]).expect("a partition");
    let wrong = [
        (step(0, &[], &[0]), "no tokens"),
        (step(0, &[512], &[0]), "vocabulary"),
        (step(0, &[1], &[4]), "block 4"),
        (step(0, &[1], &[]), "too few blocks"),
        (step(16, &[1], &[0]), "too few blocks"),
        (step(64, &[1], &[0, 1, 2, 3, 0]), "context"),
        (step(usize::MAX, &[1], &[0]), "context"),
    ];
    for (step, named) in wrong {
        let mut rows = 0;
        let error = decoder.forward(&step, &mut tree, &mut |_| rows += 1).expect_err(named);
        assert!(matches!(error, ForwardError::BadStep { .. }), "{error}");
        assert!(error.to_string().contains(named), "{named:?} is not named: {error}");
        assert_eq!(rows, 0);
    }
    let mut rows = 0;
    let empty = Step { number: 2, entries: Vec::new() };
    decoder.forward(&empty, &mut tree, &mut |_| rows += 1).expect("an empty step");
    assert_eq!(rows, 0);
    decoder.forward(&step(0, &[1, 2], &[3]), &mut tree, &mut |_| rows += 1).expect("a step");
    assert_eq!(rows, 1);
}

#[test]
fn stripes_that_are_no_selection_are_refused() {
    let golden = golden::load("llama3");
    for own in [vec![], vec![1, 0], vec![0, 0], vec![8]] {
        let error = load(&golden, 8, own.clone()).err();
        assert!(matches!(error, Some(LoadError::Stripes { .. })), "{own:?}");
    }
    assert!(matches!(load(&golden, 9, vec![0]).err(), Some(LoadError::Plan(_))));
    assert!(matches!(load(&golden, 0, vec![]).err(), Some(LoadError::Plan(_))));
}

#[test]
fn a_rank_reads_its_stripes_only() {
    let golden = golden::load("mixtral");
    reads_its_stripes_only(&golden.spec, &golden.checkpoint);
}
