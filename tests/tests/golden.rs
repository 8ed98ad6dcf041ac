//! Against the reference: every golden checkpoint, every prompt, logits, logprobs, continuation;
//! and each mistake that the reference tried is noticed, and moves the results as far as there.

mod mistakes;

use std::sync::Arc;

use decoder::{Checkpoint, sample};
use model::{FeedForward, ModelSpec};
use planner::ExpertCut;
use tests::golden::{self, Distance, Golden, Prompt};
use tests::group::{Setup, Trace, greedy, run};

/// Largest difference of a logit or logprob from the reference.
fn tolerance(spec: &ModelSpec) -> f32 {
    if spec.layers.iter().any(has_experts) { 2e-3 } else { 1e-3 }
}

fn has_experts(layer: &model::LayerSpec) -> bool {
    matches!(layer.feed_forward, FeedForward::Experts(_))
}

/// The largest difference of one prompt's results from the reference, and whether the
/// continuation is the reference's up to the first near-tie.
fn compare(prompt: &Prompt, number: usize, trace: &Trace, spec: &ModelSpec) -> (f32, bool) {
    let mut worst = 0f32;
    let mut see = |got: f32, want: f32| {
        let difference = (got - want).abs();
        worst = if difference.is_nan() { f32::INFINITY } else { worst.max(difference) };
    };
    let last = prompt.ids.len() - 1;
    for (got, want) in trace.logits[&(number, last)].iter().zip(&prompt.last_logits) {
        see(*got, *want);
    }
    if let Some(all) = &prompt.all_logits {
        for (position, want) in all.chunks_exact(spec.vocab).enumerate() {
            for (got, want) in trace.logits[&(number, position)].iter().zip(want) {
                see(*got, *want);
            }
        }
    }
    for (step, want) in prompt.greedy_ids.iter().enumerate() {
        let logits = &trace.logits[&(number, last + step)];
        for (id, logprob) in &prompt.top[step] {
            see(sample::logprobs(logits, *id, 0).logprob, *logprob);
        }
        if trace.generated[number][step] != *want {
            // From here on the contexts differ. Below this margin the reference itself may choose
            // otherwise.
            let near_tie = 2.0 * f64::from(tolerance(spec));
            return (worst, prompt.margins[step] < near_tie);
        }
    }
    (worst, true)
}

/// The largest difference over all prompts, and whether every continuation agrees.
fn differ(golden: &Golden, spec: &Arc<ModelSpec>, setup: &Setup) -> (f32, bool) {
    let prompts = golden.prompts.values();
    let requests: Vec<_> = prompts.map(|p| greedy(&p.ids, golden.generate)).collect();
    let trace = run(spec, &golden.checkpoint, setup, &requests);
    let mut result = (0f32, true);
    for (number, prompt) in golden.prompts.values().enumerate() {
        let (worst, same) = compare(prompt, number, &trace, spec);
        result = (result.0.max(worst), result.1 && same);
    }
    result
}

#[test]
fn every_golden_checkpoint_agrees_with_the_reference() {
    for name in golden::NAMES {
        let golden = golden::load(name);
        for experts in ExpertCut::ALL {
            let cut = golden.spec.layers.iter().all(|layer| !has_experts(layer));
            if cut && experts == ExpertCut::Whole {
                continue;
            }
            let setup = Setup { experts, ..Setup::even(1) };
            let (worst, same) = differ(&golden, &golden.spec, &setup);
            println!("{name}, experts by {experts}: largest difference {worst:.2e}");
            assert!(worst <= tolerance(&golden.spec), "{name}: a logit is off by {worst}");
            assert!(same, "{name}: a greedy continuation differs");
        }
    }
}

/// How far results are from the reference's, its continuations being fed.
fn distance(golden: &Golden, spec: &Arc<ModelSpec>, checkpoint: &Arc<Checkpoint>) -> Distance {
    let fed = |p: &Prompt| [&p.ids[..], &p.greedy_ids[..golden.generate - 1]].concat();
    let requests: Vec<_> = golden.prompts.values().map(|p| greedy(&fed(p), 1)).collect();
    let trace = run(spec, checkpoint, &Setup::even(1), &requests);
    let mut all = Vec::new();
    for (number, prompt) in golden.prompts.values().enumerate() {
        for (step, top) in prompt.top.iter().enumerate() {
            let logits = &trace.logits[&(number, prompt.ids.len() - 1 + step)];
            for (id, want) in top {
                let got = sample::logprobs(logits, *id, 0).logprob;
                all.push(f64::from((got - want).abs()));
            }
        }
    }
    let max = all.iter().copied().fold(0.0, f64::max);
    Distance { max, mean: all.iter().sum::<f64>() / all.len() as f64 }
}

/// Each mistake must be noticed, or the check above proves nothing; and it must do here what it
/// does in the reference, or the right value is only right by luck.
fn mistakes_are_noticed(names: &[&str]) {
    for name in names {
        let golden = golden::load(name);
        assert!(golden.mistakes.len() >= 3, "{name}: too few mistakes are listed");
        for (mistake, want) in &golden.mistakes {
            let (spec, checkpoint) = mistakes::make(&golden, mistake);
            let got = distance(&golden, &spec, &checkpoint);
            println!("{name} with {mistake}: max {:.4}, mean {:.4}", got.max, got.mean);
            let tolerance = f64::from(tolerance(&spec));
            assert!(got.max > 10.0 * tolerance, "{name}: {mistake} is off by {} only", got.max);
            let near = |got: f64, want: f64| (got - want).abs() <= 0.01 * want + tolerance;
            assert!(near(got.max, want.max), "{name}: {mistake}: {got:?} instead of {want:?}");
            assert!(near(got.mean, want.mean), "{name}: {mistake}: {got:?} instead of {want:?}");
        }
    }
}

const LLAMA: [&str; 4] = ["llama3", "llama-tied-f32", "llama-kv2-oddvocab", "phi3"];
const MISTRAL: [&str; 3] = ["mistral-window", "mixtral", "granite"];
const DEEPSEEK: [&str; 4] = ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "deepseek-v3-fp8"];
const QWEN: [&str; 4] = ["qwen2", "qwen2-moe", "qwen3", "qwen3-moe"];
const OTHERS: [&str; 4] = ["gpt-oss", "gpt-oss-mxfp4", "gemma2", "gemma3"];

#[test]
fn mistakes_in_llama_mistral_and_phi_are_noticed() {
    mistakes_are_noticed(&LLAMA);
    mistakes_are_noticed(&MISTRAL);
}

#[test]
fn mistakes_in_deepseek_are_noticed() {
    mistakes_are_noticed(&DEEPSEEK);
}

#[test]
fn mistakes_in_qwen_are_noticed() {
    mistakes_are_noticed(&QWEN);
}

#[test]
fn mistakes_in_gpt_oss_and_gemma_are_noticed() {
    mistakes_are_noticed(&OTHERS);
}

#[test]
fn every_golden_checkpoint_has_its_mistakes_tried() {
    let mut tried = [&LLAMA[..], &MISTRAL, &DEEPSEEK, &QWEN, &OTHERS].concat();
    let mut all = golden::NAMES.to_vec();
    tried.sort_unstable();
    all.sort_unstable();
    assert_eq!(tried, all);
}

/// Mistakes that the reference did not try.
#[test]
fn other_mistakes_are_noticed() {
    let others: [(&str, &str); 7] = [
        ("mistral-window", "window_one_less"),
        ("mixtral", "no_norm_topk"),
        ("gpt-oss", "no_sinks"),
        ("gpt-oss", "no_cosine_magnitude"),
        ("deepseek-v3", "no_correction"),
        ("deepseek-v3", "no_shared"),
        ("gemma3", "no_embedding_scale"),
    ];
    for (name, mistake) in others {
        let golden = golden::load(name);
        let (spec, checkpoint) = mistakes::make(&golden, mistake);
        let got = distance(&golden, &spec, &checkpoint);
        println!("{name} with {mistake}: max {:.4}, mean {:.4}", got.max, got.mean);
        let tolerance = f64::from(tolerance(&spec));
        assert!(got.max > 10.0 * tolerance, "{name}: {mistake} is off by {} only", got.max);
    }
}
