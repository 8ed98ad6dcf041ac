//! Deliberate mistakes in a spec or in weights, by the names that the golden references give them.

use std::sync::Arc;

use decoder::Checkpoint;
use model::{Attention, Experts, FeedForward, Grouped, Latent, ModelSpec, Pairs, Rope};
use model::{RopeScaling, Score};
use tests::files::Files;
use tests::golden::Golden;

/// A golden model with one mistake.
pub(crate) fn make(golden: &Golden, mistake: &str) -> (Arc<ModelSpec>, Arc<Checkpoint>) {
    if let Some(checkpoint) = spoilt_weights(golden, mistake) {
        return (Arc::clone(&golden.spec), Arc::new(checkpoint));
    }
    let mut spec = ModelSpec::clone(&golden.spec);
    // The checkpoint was opened as the right spec says; a wrong one asks for nothing more of it.
    spoil(&mut spec, mistake);
    assert_ne!(spec, *golden.spec, "{mistake} changes nothing");
    (Arc::new(spec), Arc::clone(&golden.checkpoint))
}

fn spoil(spec: &mut ModelSpec, mistake: &str) {
    match mistake {
        "rope_theta" => each_rope(spec, |r| r.theta = 5000.0),
        "norm_eps" => spec.norm_eps = 1e-3,
        "no_embedding_scale" => spec.embedding_scale = None,
        "embedding_multiplier" => spec.embedding_scale = Some(1.0),
        "residual_multiplier" => spec.branch_scale = Some(1.0),
        "logits_scaling" => spec.logit_scale = Some(1.0),
        "attention_multiplier" => each_grouped(spec, |a| a.scale = 0.25),
        "final_softcap" => spec.logit_softcap = None,
        "no_rope_scaling" => each_rope(spec, |r| r.scaling = RopeScaling::None),
        "rope_factor" => each_rope(spec, |r| {
            if let RopeScaling::Llama3 { factor, .. } = &mut r.scaling {
                *factor = 4.0;
            }
        }),
        "yarn_truncate" => each_rope(spec, |r| {
            if let RopeScaling::Yarn { truncate, .. } = &mut r.scaling {
                *truncate = true;
            }
        }),
        "no_cosine_magnitude" => each_rope(spec, |r| {
            if let RopeScaling::Yarn { magnitude, .. } = &mut r.scaling {
                *magnitude = 1.0;
            }
        }),
        "global_rope" => each_grouped(spec, |a| {
            if a.window.is_none() {
                a.rope.scaling = RopeScaling::None;
            }
        }),
        "no_window" => each_grouped(spec, |a| a.window = None),
        "window_off_by_one" => each_grouped(spec, |a| a.window = a.window.map(|w| w + 1)),
        "window_one_less" => each_grouped(spec, |a| a.window = a.window.map(|w| w - 1)),
        "attn_softcap" => each_grouped(spec, |a| a.softcap = None),
        "query_scalar" => each_grouped(spec, |a| a.scale = 1.0 / 24f32.sqrt()),
        "no_sinks" => each_grouped(spec, |a| a.sinks = false),
        "no_yarn" => each_latent(spec, |a| {
            a.rope.scaling = RopeScaling::None;
            a.scale = plain_scale(a);
        }),
        "yarn_mscale_all_dim" => each_latent(spec, |a| {
            a.scale = plain_scale(a);
            if let RopeScaling::Yarn { factor, magnitude, .. } = &mut a.rope.scaling {
                *magnitude = (0.1 * factor.ln() + 1.0) as f32;
            }
        }),
        "rope_half_split" => each_latent(spec, |a| a.rope.pairs = Pairs::Halves),
        other => each_experts(spec, |e| spoil_experts(e, other)),
    }
}

fn spoil_experts(experts: &mut Experts, mistake: &str) {
    match mistake {
        "top_k" => experts.chosen -= 1,
        "norm_topk" => experts.router.renormalise = true,
        "routed_scaling_factor" => experts.router.scale = 1.0,
        "no_groups" => experts.router.groups = None,
        "no_correction" => experts.router.correction = false,
        "no_shared" => experts.shared = None,
        "no_norm_topk" => {
            // Softmax over the chosen is softmax over all, normalised again.
            experts.router.score = match experts.router.score {
                Score::SoftmaxOfChosen => Score::Softmax,
                score => score,
            };
            experts.router.renormalise = false;
        }
        other => panic!("{other} is no known mistake"),
    }
}

fn plain_scale(attention: &Latent) -> f32 {
    1.0 / ((attention.nope_dim + attention.rope_dim) as f32).sqrt()
}

fn each_rope(spec: &mut ModelSpec, change: impl Fn(&mut Rope)) {
    for layer in &mut spec.layers {
        match &mut layer.attention {
            Attention::Grouped(attention) => change(&mut attention.rope),
            Attention::Latent(attention) => change(&mut attention.rope),
        }
    }
}

fn each_grouped(spec: &mut ModelSpec, change: impl Fn(&mut Grouped)) {
    for layer in &mut spec.layers {
        if let Attention::Grouped(attention) = &mut layer.attention {
            change(attention);
        }
    }
}

fn each_latent(spec: &mut ModelSpec, change: impl Fn(&mut Latent)) {
    for layer in &mut spec.layers {
        if let Attention::Latent(attention) = &mut layer.attention {
            change(attention);
        }
    }
}

fn each_experts(spec: &mut ModelSpec, change: impl Fn(&mut Experts)) {
    for layer in &mut spec.layers {
        if let FeedForward::Experts(experts) = &mut layer.feed_forward {
            change(experts);
        }
    }
}

/// A checkpoint whose norms are wrong, for the mistakes that are in the weights.
fn spoilt_weights(golden: &Golden, mistake: &str) -> Option<Checkpoint> {
    let mut files = Files::read(&golden.directory);
    match mistake {
        "swap_two_norms" => {
            let last = golden.spec.layers.len() - 1;
            let [a, b] = ["input", "post_attention"]
                .map(|which| format!("model.layers.{last}.{which}_layernorm.weight"));
            let (was_a, was_b) = (files.tensor(&a).to_vec(), files.tensor(&b).to_vec());
            files.tensor(&a).copy_from_slice(&was_b);
            files.tensor(&b).copy_from_slice(&was_a);
        }
        "no_final_norm_weight" => {
            let stored = files.tensor("model.norm.weight");
            let one: &[u8] = match (golden.spec.norm_plus_one, stored.len() / golden.spec.hidden) {
                (true, _) => &[0],
                (false, 2) => &[0x80, 0x3f],
                (false, _) => &[0, 0, 0x80, 0x3f],
            };
            stored.chunks_exact_mut(one.len()).for_each(|element| element.copy_from_slice(one));
        }
        _ => return None,
    }
    let directory = tempfile::tempdir().expect("a directory");
    files.write(directory.path());
    Some(Checkpoint::open(directory.path(), &golden.spec).expect("a whole checkpoint"))
}
