//! The numerics contract: the digest of every logit of a sequence is the same however it is run.

use compute::KernelClass;
use engine::Request;
use model::ComputeType;
use planner::ExpertCut;
use tests::golden::{self, Golden};
use tests::group::{Setup, Trace, greedy, run};

/// Tokens each watched sequence generates.
const GENERATE: usize = 12;

/// The sequence that is watched: long enough for several chunks, blocks and windows.
const WATCHED: &str = "long";
/// A shorter one where many runs are needed: still several blocks, and windows.
const SHORTER: &str = "medium";

fn alone(golden: &Golden, prompt: &str, setup: &Setup) -> Trace {
    let request = greedy(&golden.prompts[prompt].ids, GENERATE);
    run(&golden.spec, &golden.checkpoint, setup, &[request])
}

/// A golden model with the watched sequence on one rank, one thread, alone, in one chunk.
struct Base {
    name: &'static str,
    golden: Golden,
    prompt: &'static str,
    compute: ComputeType,
    want: Trace,
}

impl Base {
    fn new(name: &'static str, compute: ComputeType) -> Self {
        Self::of(name, WATCHED, compute)
    }

    fn of(name: &'static str, prompt: &'static str, compute: ComputeType) -> Self {
        let golden = golden::load(name);
        let want = alone(&golden, prompt, &Setup { compute, ..Setup::even(1) });
        Self { name, golden, prompt, compute, want }
    }

    /// Runs it as a setup says and compares.
    fn same(&self, how: &str, setup: Setup) {
        let got = alone(&self.golden, self.prompt, &Setup { compute: self.compute, ..setup });
        let what = format!("{} {:?} {how}", self.name, self.compute);
        assert_eq!(self.want.generated, got.generated, "{what}: other tokens");
        assert_eq!(self.want.logits.len(), got.logits.len(), "{what}: other positions");
        assert_eq!(self.want.digest(0), got.digest(0), "{what}: other bits");
    }
}

/// Experts, KV heads shared by stripes, and what each of the other families brings: latent
/// attention with and without a query latent, groups and shared experts, sinks and MXFP4, post
/// norms and windows, head norms.
const MODELS: [&str; 7] = [
    "mixtral",
    "llama-kv2-oddvocab",
    "deepseek-v3",
    "deepseek-v2-lite",
    "gpt-oss-mxfp4",
    "gemma3",
    "qwen3-moe",
];

/// One of grouped and one of latent attention, for what depends on no model.
const TWO: [&str; 2] = ["mixtral", "deepseek-v3"];

#[test]
fn any_number_of_ranks_gives_the_same_bits() {
    for name in golden::NAMES {
        let base = Base::new(name, ComputeType::F32);
        let more: &[usize] = if MODELS.contains(&name) { &[5, 7] } else { &[] };
        for ranks in [2, 3, 4, 8].iter().chain(more) {
            base.same(&format!("on {ranks} ranks"), Setup::even(*ranks));
        }
    }
}

#[test]
fn any_split_of_stripes_gives_the_same_bits() {
    let by_weight = vec![(0..6).collect(), vec![6, 7]];
    let scattered = vec![vec![1, 4, 6], vec![0, 2, 7], vec![3, 5]];
    for name in MODELS {
        let base = Base::new(name, ComputeType::F32);
        base.same("at 3:1", Setup::owned(by_weight.clone()));
        base.same("scattered", Setup::owned(scattered.clone()));
    }
}

/// Golden checkpoints with experts.
const WITH_EXPERTS: [&str; 8] = [
    "mixtral",
    "deepseek-v2-lite",
    "deepseek-v2",
    "deepseek-v3",
    "deepseek-v3-fp8",
    "qwen3-moe",
    "gpt-oss",
    "gpt-oss-mxfp4",
];

#[test]
fn whole_experts_are_as_exact_as_cut_ones() {
    for name in WITH_EXPERTS {
        let golden = golden::load(name);
        let whole = |setup: Setup| {
            let setup = Setup { experts: ExpertCut::Whole, ..setup };
            alone(&golden, SHORTER, &setup)
        };
        let want = whole(Setup::even(1));
        for ranks in 2..=8 {
            let got = whole(Setup::even(ranks));
            assert_eq!(want.digest(0), got.digest(0), "{name} on {ranks} ranks");
        }
        let scattered = vec![vec![1, 4, 6], vec![0, 2, 7], vec![3, 5]];
        let got = whole(Setup { chunk: 7, threads: 2, ..Setup::owned(scattered) });
        assert_eq!(want.digest(0), got.digest(0), "{name} scattered, in chunks of 7");
        // Sums are made of other parts, so the other way has bits of its own.
        let cut = alone(&golden, SHORTER, &Setup::even(1));
        assert_ne!(want.digest(0), cut.digest(0), "{name}: both ways are one");
    }
}

#[test]
fn tcp_gives_the_same_bits_as_local() {
    for name in TWO {
        let base = Base::new(name, ComputeType::F32);
        for ranks in [2, 3, 8] {
            let setup = Setup { tcp: true, ..Setup::even(ranks) };
            base.same(&format!("on {ranks} ranks over TCP"), setup);
        }
    }
}

#[test]
fn chunks_and_threads_change_no_bit() {
    for name in golden::NAMES {
        let base = Base::new(name, ComputeType::F32);
        for chunk in [1, 7, 64] {
            base.same(&format!("in chunks of {chunk}"), Setup { chunk, ..Setup::even(1) });
        }
        base.same("with 2 threads", Setup { threads: 2, ..Setup::even(1) });
    }
}

#[test]
fn every_kernel_class_gives_the_same_bits() {
    let best = KernelClass::detect();
    for compute in ComputeType::ALL {
        for name in MODELS {
            let base = Base::of(name, SHORTER, compute);
            for class in [KernelClass::Portable, KernelClass::Avx2, KernelClass::Avx512] {
                if class > best {
                    println!("{class} is not had by this processor: skipped");
                    continue;
                }
                let setup = Setup { kernels: Some(class), ..Setup::even(1) };
                base.same(&format!("with {class} kernels"), setup);
            }
        }
    }
}

#[test]
fn bf16_and_int8_are_as_exact_as_f32() {
    for compute in [ComputeType::Bf16, ComputeType::Int8, ComputeType::Int4] {
        for name in MODELS {
            let base = Base::new(name, compute);
            for ranks in [3, 8] {
                let setup = Setup { chunk: 7, threads: 2, ..Setup::even(ranks) };
                base.same(&format!("on {ranks} ranks"), setup);
            }
        }
    }
}

/// The watched sequence and fifteen others of all lengths.
fn crowd(golden: &Golden, generate: usize) -> Vec<Request> {
    let mut requests = vec![greedy(&golden.prompts[WATCHED].ids, generate)];
    let prompts: Vec<_> = golden.prompts.values().collect();
    for i in 0..15 {
        let ids = &prompts[i % prompts.len()].ids;
        let start = (i * 3) % ids.len();
        requests.push(greedy(&ids[start..], generate + i));
    }
    requests
}

#[test]
fn a_crowd_changes_no_bit() {
    for name in MODELS {
        let golden = golden::load(name);
        let want = alone(&golden, WATCHED, &Setup::even(1));
        for ranks in [1, 3] {
            let setup = Setup { chunk: 64, ..Setup::even(ranks) };
            let got = run(&golden.spec, &golden.checkpoint, &setup, &crowd(&golden, GENERATE));
            assert_eq!(want.digest(0), got.digest(0), "{name} among 15 others on {ranks} ranks");
            assert_eq!(want.generated[0], got.generated[0]);
        }
    }
}

#[test]
fn preemption_changes_no_bit() {
    for name in TWO {
        let golden = golden::load(name);
        let requests = crowd(&golden, 60);
        let free = run(&golden.spec, &golden.checkpoint, &Setup::even(1), &requests);
        assert_eq!(free.preemptions, 0);
        let tight = Setup { blocks: 26, chunk: 64, ..Setup::even(2) };
        let got = run(&golden.spec, &golden.checkpoint, &tight, &requests);
        assert!(got.preemptions > 0, "{name}: 26 blocks are enough; the test tests nothing");
        for request in 0..requests.len() {
            assert_eq!(free.digest(request), got.digest(request), "{name}: request {request}");
        }
    }
}

#[test]
fn another_order_of_summation_is_noticed() {
    for name in MODELS {
        let golden = golden::load(name);
        let wrong = Setup { wrong_order: true, ..Setup::even(1) };
        let (want, got) =
            (alone(&golden, WATCHED, &Setup::even(1)), alone(&golden, WATCHED, &wrong));
        assert_ne!(want.digest(0), got.digest(0), "{name}: the digest would not notice");
    }
}
