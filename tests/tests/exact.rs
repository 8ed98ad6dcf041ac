//! The numerics contract: the digest of every logit of a sequence is the same however it is run.

use compute::KernelClass;
use engine::Request;
use model::ComputeType;
use tests::golden::{self, Golden};
use tests::group::{Setup, Trace, greedy, run};

/// Tokens each watched sequence generates.
const GENERATE: usize = 12;

/// The sequence that is watched: long enough for several chunks, blocks and windows.
fn watched(golden: &Golden) -> Request {
    greedy(&golden.prompts["long"].ids, GENERATE)
}

fn alone(golden: &Golden, setup: &Setup) -> Trace {
    run(&golden.spec, &golden.checkpoint, setup, &[watched(golden)])
}

/// Runs a setup and compares it with one rank, one thread, one sequence, one chunk.
fn same(golden: &Golden, what: &str, setup: &Setup) {
    let base = Setup { compute: setup.compute, ..Setup::even(1) };
    let (want, got) = (alone(golden, &base), alone(golden, setup));
    assert_eq!(want.generated, got.generated, "{what}: other tokens");
    assert_eq!(want.logits.len(), got.logits.len(), "{what}: other positions");
    assert_eq!(want.digest(0), got.digest(0), "{what}: other bits");
}

/// A model with experts, and one whose KV heads are shared by stripes.
const MODELS: [&str; 2] = ["mixtral", "llama-kv2-oddvocab"];

#[test]
fn any_number_of_ranks_gives_the_same_bits() {
    for name in MODELS {
        let golden = golden::load(name);
        for ranks in [2, 3, 4, 5, 7, 8] {
            same(&golden, &format!("{name} on {ranks} ranks"), &Setup::even(ranks));
        }
    }
}

#[test]
fn any_split_of_stripes_gives_the_same_bits() {
    let by_weight = vec![(0..6).collect(), vec![6, 7]];
    let scattered = vec![vec![1, 4, 6], vec![0, 2, 7], vec![3, 5]];
    for name in MODELS {
        let golden = golden::load(name);
        same(&golden, &format!("{name} at 3:1"), &Setup::owned(by_weight.clone()));
        same(&golden, &format!("{name} scattered"), &Setup::owned(scattered.clone()));
    }
}

#[test]
fn tcp_gives_the_same_bits_as_local() {
    for name in MODELS {
        let golden = golden::load(name);
        for ranks in [2, 3, 8] {
            let setup = Setup { tcp: true, ..Setup::even(ranks) };
            same(&golden, &format!("{name} on {ranks} ranks over TCP"), &setup);
        }
    }
}

#[test]
fn chunks_give_the_same_bits_as_whole_prompts() {
    for name in golden::NAMES {
        let golden = golden::load(name);
        for chunk in [1, 7, 64] {
            let setup = Setup { chunk, ..Setup::even(1) };
            same(&golden, &format!("{name} in chunks of {chunk}"), &setup);
        }
    }
}

#[test]
fn threads_give_the_same_bits_as_one() {
    for name in golden::NAMES {
        let golden = golden::load(name);
        let setup = Setup { threads: 2, ..Setup::even(1) };
        same(&golden, &format!("{name} with 2 threads"), &setup);
    }
}

#[test]
fn every_kernel_class_gives_the_same_bits() {
    let best = KernelClass::detect();
    for class in [KernelClass::Portable, KernelClass::Avx2, KernelClass::Avx512] {
        if class > best {
            println!("{class} is not had by this processor: skipped");
            continue;
        }
        for compute in [ComputeType::F32, ComputeType::Bf16, ComputeType::Int8] {
            for name in MODELS {
                let golden = golden::load(name);
                let setup = Setup { kernels: Some(class), compute, ..Setup::even(1) };
                same(&golden, &format!("{name} {compute:?} with {class} kernels"), &setup);
            }
        }
    }
}

#[test]
fn bf16_and_int8_are_as_exact_as_f32() {
    for compute in [ComputeType::Bf16, ComputeType::Int8] {
        for name in MODELS {
            let golden = golden::load(name);
            for ranks in [3, 8] {
                let setup = Setup { compute, chunk: 7, threads: 2, ..Setup::even(ranks) };
                same(&golden, &format!("{name} {compute:?} on {ranks} ranks"), &setup);
            }
        }
    }
}

/// The watched sequence and fifteen others of all lengths.
fn crowd(golden: &Golden, generate: usize) -> Vec<Request> {
    let mut requests = vec![greedy(&golden.prompts["long"].ids, generate)];
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
    for name in golden::NAMES {
        let golden = golden::load(name);
        let want = alone(&golden, &Setup::even(1));
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
    for name in MODELS {
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
        let (want, got) = (alone(&golden, &Setup::even(1)), alone(&golden, &wrong));
        assert_ne!(want.digest(0), got.digest(0), "{name}: the digest would not notice");
    }
}
