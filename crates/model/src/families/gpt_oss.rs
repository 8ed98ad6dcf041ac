//! gpt-oss: windows in every other layer, attention sinks, biases everywhere, clamped experts.

use super::rope::{WITH_YARN, agree};
use super::{Defaults, base, grouped, limits, not_divisible, sliding_layers};
use crate::config::{ConfigError, Fields, Given};
use crate::spec::{
    Activation, Attention, Experts, Family, FeedForward, Format, Grouped, LayerSpec, ModelSpec,
    Router, Score,
};
use crate::stored::MXFP4_BLOCK;

/// Training; the first context's length stands in the rope entry, too.
pub(super) const WITHOUT_EFFECT: &[&str] =
    &["initial_context_length", "output_router_logits", "router_aux_loss_coef"];

/// The config class' values where fields are absent.
const DEFAULT_WINDOW: usize = 128;
const DEFAULT_ALPHA: f64 = 1.702;
const DEFAULT_LIMIT: f64 = 7.0;

pub(super) fn spec(fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = Defaults {
        kv_heads: Some(8),
        head_dim: Some(64),
        norm_eps: 1e-5,
        theta: 150_000.0,
        quantised: Some(Format::Mxfp4),
        rope_types: WITH_YARN,
        ..Defaults::USUAL
    };
    let base = base(Family::GptOss, fields, &defaults)?;
    let mut attention = grouped(fields, &base.spec, &defaults)?;
    // The class would scale by its own default where neither is given.
    let given = (fields.object("rope_scaling")?, fields.object("rope_parameters")?);
    if given == (Given::Absent, Given::Absent) {
        return Err(fields.missing("rope_scaling"));
    }
    let bias = fields.truth("attention_bias")?.value().unwrap_or(true);
    (attention.qkv_bias, attention.out_bias, attention.sinks) = (bias, bias, true);
    let window = fields.count_given("sliding_window", 1..=limits::CONTEXT)?;
    let window = window.or_absent(Some(DEFAULT_WINDOW));
    let sliding = sliding_layers(fields, base.layers)?
        .unwrap_or_else(|| (0..base.layers).map(|layer| layer % 2 == 0).collect());
    if window.is_none() && sliding.contains(&true) {
        return Err(fields.missing("sliding_window"));
    }
    if base.spec.format == Format::Mxfp4 {
        for (field, value) in [("hidden_size", base.spec.hidden), ("intermediate_size", base.width)]
        {
            if !value.is_multiple_of(MXFP4_BLOCK) {
                return Err(not_divisible(field, value, "columns of an MXFP4 block", MXFP4_BLOCK));
            }
        }
    }
    let feed_forward = FeedForward::Experts(mixture(fields, base.width)?);
    Ok(base.with_layers(|layer| {
        let window = window.filter(|_| sliding.get(layer) == Some(&true));
        LayerSpec {
            attention: Attention::Grouped(Grouped { window, ..attention.clone() }),
            feed_forward: feed_forward.clone(),
            post_norms: false,
        }
    }))
}

fn mixture(fields: &mut Fields<'_>, width: usize) -> Result<Experts, ConfigError> {
    let count = fields.count("num_local_experts", limits::EXPERTS)?;
    let mut chosen = Some(("num_experts_per_tok", fields.count("num_experts_per_tok", count)?));
    // An older name of the same.
    if let Some(given) = fields.count_given("experts_per_token", 1..=count)?.value() {
        agree(&mut chosen, "experts_per_token", given)?;
    }
    let chosen = chosen.map_or(1, |(_, chosen)| chosen);
    let positive = |value: f64| value as f32 > 0.0 && (value as f32).is_finite();
    let mut number = |field, default| {
        let given = fields.number_given(field, "a positive number", positive)?;
        Ok::<f32, ConfigError>(given.value().unwrap_or(default) as f32)
    };
    let alpha = number("swiglu_alpha", DEFAULT_ALPHA)?;
    let limit = number("swiglu_limit", DEFAULT_LIMIT)?;
    Ok(Experts {
        count,
        chosen,
        width,
        bias: true,
        activation: Activation::ClampedSwiglu { alpha, limit },
        router: Router { bias: true, ..Router::plain(Score::SoftmaxOfChosen) },
        shared: None,
    })
}
