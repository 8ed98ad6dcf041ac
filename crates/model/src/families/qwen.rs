//! Qwen 2 and 2.5 (biases on query, key and value), Qwen 3 (per-head norms instead), and both
//! with experts.

use serde_json::json;

use super::rope::{WITH_YARN, agree};
use super::{Base, Defaults, base, grouped, limits, sliding_layers};
use crate::config::{ConfigError, Fields};
use crate::spec::{
    Activation, Attention, Experts, Family, FeedForward, Format, Grouped, LayerSpec, ModelSpec,
    Router, Score, Shared,
};

/// Of use in training only.
pub(super) const MOE_WITHOUT_EFFECT: &[&str] = &["output_router_logits", "router_aux_loss_coef"];

/// The config classes' window where the field is absent and windows are switched on.
const DEFAULT_WINDOW: usize = 4096;
/// The config classes' first layer with a window.
const DEFAULT_FIRST: usize = 28;

fn defaults(family: Family) -> Defaults {
    let usual = Defaults { rope_types: WITH_YARN, ..Defaults::USUAL };
    let quantised = Some(Format::Fp8Blocks);
    match family {
        Family::Qwen2Moe => Defaults { kv_heads: Some(16), ..usual },
        Family::Qwen3 => Defaults { kv_heads: Some(32), head_dim: Some(128), quantised, ..usual },
        Family::Qwen3Moe => Defaults { kv_heads: Some(4), quantised, ..usual },
        _ => Defaults { kv_heads: Some(32), ..usual },
    }
}

/// Qwen 2 and Qwen 3.
pub(super) fn dense(family: Family, fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = defaults(family);
    let base = base(family, fields, &defaults)?;
    let attention = attention(family, fields, &base, &defaults)?;
    let (windowed, window) = windows(fields, base.layers)?;
    let feed_forward = base.dense(false, Activation::Silu);
    Ok(base.with_layers(|layer| {
        let window = window.filter(|_| windowed.get(layer) == Some(&true));
        LayerSpec {
            attention: Attention::Grouped(Grouped { window, ..attention.clone() }),
            feed_forward: feed_forward.clone(),
            post_norms: false,
        }
    }))
}

fn attention(
    family: Family,
    fields: &mut Fields<'_>,
    base: &Base,
    defaults: &Defaults,
) -> Result<Grouped, ConfigError> {
    let mut attention = grouped(fields, &base.spec, defaults)?;
    // Text positions in one dimension only.
    fields.only("use_mrope", &json!(false))?;
    match family {
        Family::Qwen3 | Family::Qwen3Moe => {
            attention.qk_norm = true;
            let bias = fields.flag("attention_bias")?;
            (attention.qkv_bias, attention.out_bias) = (bias, bias);
        }
        _ => attention.qkv_bias = fields.truth("qkv_bias")?.value().unwrap_or(true),
    }
    Ok(attention)
}

/// Which layers have a window, and the window.
fn windows(
    fields: &mut Fields<'_>,
    layers: usize,
) -> Result<(Vec<bool>, Option<usize>), ConfigError> {
    let on = fields.flag("use_sliding_window")?;
    // Switched off, some versions write zero.
    let least = usize::from(on);
    let window = fields
        .count_given("sliding_window", least..=limits::CONTEXT)?
        .or_absent(Some(DEFAULT_WINDOW))
        .filter(|_| on);
    let first = fields.count_given("max_window_layers", 0..=limits::LAYERS)?.value();
    let first = first.unwrap_or(DEFAULT_FIRST);
    let listed = sliding_layers(fields, layers)?;
    if window.is_none() && listed.as_ref().is_some_and(|listed| listed.contains(&true)) {
        return Err(ConfigError::Conflict {
            field: "layer_types".to_owned(),
            other: "use_sliding_window".to_owned(),
        });
    }
    Ok((listed.unwrap_or_else(|| (0..layers).map(|layer| layer >= first).collect()), window))
}

/// Qwen2-MoE and Qwen3-MoE.
pub(super) fn experts(family: Family, fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = defaults(family);
    let base = base(family, fields, &defaults)?;
    let attention = attention(family, fields, &base, &defaults)?;
    // Model codes disagree on which layers a window would concern.
    fields.only("use_sliding_window", &json!(false))?;
    windows(fields, base.layers)?;
    let experts = FeedForward::Experts(mixture(family, fields)?);
    let step = fields.count_given("decoder_sparse_step", 1..=limits::LAYERS)?.value().unwrap_or(1);
    let dense_only = fields.counts("mlp_only_layers")?.value().unwrap_or_default();
    let dense = base.dense(false, Activation::Silu);
    Ok(base.with_layers(|layer| {
        let sparse = !dense_only.contains(&(layer as u64)) && (layer + 1) % step == 0;
        LayerSpec {
            attention: Attention::Grouped(attention.clone()),
            feed_forward: if sparse { experts.clone() } else { dense.clone() },
            post_norms: false,
        }
    }))
}

fn mixture(family: Family, fields: &mut Fields<'_>) -> Result<Experts, ConfigError> {
    let mut count = None;
    // Two names of one number.
    for name in ["num_experts", "num_local_experts"] {
        if let Some(given) = fields.count_given(name, 1..=limits::EXPERTS)?.value() {
            agree(&mut count, name, given)?;
        }
    }
    let count = count.map(|(_, count)| count).ok_or_else(|| fields.missing("num_experts"))?;
    let chosen = fields.count("num_experts_per_tok", count)?;
    let width = fields.count("moe_intermediate_size", limits::WIDTH)?;
    let shared = match family {
        Family::Qwen2Moe => {
            let width = fields.count("shared_expert_intermediate_size", limits::WIDTH)?;
            Some(Shared { width, gated: true })
        }
        _ => None,
    };
    let renormalise = fields.flag("norm_topk_prob")?;
    let router = Router { renormalise, ..Router::plain(Score::Softmax) };
    Ok(Experts { count, chosen, width, bias: false, activation: Activation::Silu, router, shared })
}
