//! Against the reference: every golden checkpoint, every prompt, logits, logprobs, continuation;
//! and each wrong field of a config is noticed.

use std::sync::Arc;

use decoder::sample;
use model::{Attention, FeedForward, LayerSpec, ModelSpec, RopeScaling};
use tests::golden::{self, Golden, Prompt};
use tests::group::{Setup, Trace, greedy, run};

/// Largest difference of a logit or logprob from the reference.
const TOLERANCE: f32 = 1e-3;
/// Below this margin the reference itself may choose otherwise.
const NEAR_TIE: f64 = 2.0 * TOLERANCE as f64;

/// Runs all prompts of a golden checkpoint, alone and whole, as a config says.
fn traces(golden: &Golden, spec: &Arc<ModelSpec>) -> Trace {
    let prompts = golden.prompts.values();
    let requests: Vec<_> = prompts.map(|p| greedy(&p.ids, golden.generate)).collect();
    run(spec, &golden.checkpoint, &Setup::even(1), &requests)
}

/// The largest difference of one prompt's results from the reference, and whether the
/// continuation is the reference's up to the first near-tie.
fn compare(prompt: &Prompt, number: usize, trace: &Trace, vocab: usize) -> (f32, bool) {
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
        for (position, want) in all.chunks_exact(vocab).enumerate() {
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
            // From here on the contexts differ.
            return (worst, prompt.margins[step] < NEAR_TIE);
        }
    }
    (worst, true)
}

/// The largest difference over all prompts, and whether every continuation agrees.
fn differ(golden: &Golden, spec: &Arc<ModelSpec>) -> (f32, bool) {
    let trace = traces(golden, spec);
    let mut result = (0f32, true);
    for (number, prompt) in golden.prompts.values().enumerate() {
        let (worst, same) = compare(prompt, number, &trace, spec.vocab);
        result = (result.0.max(worst), result.1 && same);
    }
    result
}

#[test]
fn every_golden_checkpoint_agrees_with_the_reference() {
    for name in golden::NAMES {
        let golden = golden::load(name);
        let (worst, same) = differ(&golden, &golden.spec);
        println!("{name}: largest difference {worst:.2e}");
        assert!(worst <= TOLERANCE, "{name}: a logit is off by {worst}");
        assert!(same, "{name}: a greedy continuation differs");
    }
}

/// A config with one field wrong must be noticed, or the check above proves nothing.
fn must_notice(name: &str, what: &str, change: impl FnOnce(&mut ModelSpec)) {
    let golden = golden::load(name);
    let mut spec = ModelSpec::clone(&golden.spec);
    change(&mut spec);
    assert_ne!(spec, *golden.spec, "{name}: {what} changes nothing");
    let (worst, _) = differ(&golden, &Arc::new(spec));
    println!("{name} with a wrong {what}: off by {worst:.2e}");
    assert!(worst > 10.0 * TOLERANCE, "{name}: a wrong {what} is off by {worst} only");
}

fn each_attention(spec: &mut ModelSpec, change: impl Fn(&mut model::Grouped)) {
    for LayerSpec { attention: Attention::Grouped(attention), .. } in &mut spec.layers {
        change(attention);
    }
}

#[test]
fn a_wrong_rope_theta_is_noticed() {
    for name in golden::NAMES {
        must_notice(name, "rope theta", |s| each_attention(s, |a| a.rope.theta /= 2.0));
    }
}

#[test]
fn a_wrong_norm_epsilon_is_noticed() {
    for name in golden::NAMES {
        must_notice(name, "norm epsilon", |s| s.norm_eps = 1e-3);
    }
}

#[test]
fn a_wrong_window_is_noticed() {
    let window = |window| move |s: &mut ModelSpec| each_attention(s, |a| a.window = window);
    must_notice("mistral-window", "window (none)", window(None));
    must_notice("mistral-window", "window (one more)", window(Some(25)));
    must_notice("mistral-window", "window (one less)", window(Some(23)));
}

#[test]
fn a_wrong_router_is_noticed() {
    let experts = |change: fn(&mut model::Experts)| {
        move |s: &mut ModelSpec| {
            for layer in &mut s.layers {
                if let FeedForward::Experts(experts) = &mut layer.feed_forward {
                    change(experts);
                }
            }
        }
    };
    must_notice("mixtral", "router normalisation", experts(|e| e.renormalise = false));
    must_notice("mixtral", "number of chosen experts", experts(|e| e.chosen = 1));
}

#[test]
fn a_wrong_rope_scaling_is_noticed() {
    let scaling = |change: fn(&mut RopeScaling)| {
        move |s: &mut ModelSpec| each_attention(s, |a| change(&mut a.rope.scaling))
    };
    must_notice("llama3", "rope scaling (none)", scaling(|r| *r = RopeScaling::None));
    let halve = |r: &mut RopeScaling| {
        if let RopeScaling::Llama3 { factor, .. } = r {
            *factor /= 2.0;
        }
    };
    must_notice("llama3", "rope scaling factor", scaling(halve));
}
