//! Granite 3: Llama with four multipliers.

use super::{Defaults, base, grouped};
use crate::config::{ConfigError, Fields};
use crate::spec::{Activation, Attention, Family, LayerSpec, ModelSpec};

pub(super) fn spec(fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = Defaults::LLAMA;
    let mut base = base(Family::Granite, fields, &defaults)?;
    let mut attention = grouped(fields, &base.spec, &defaults)?;
    let bias = fields.flag("attention_bias")?;
    (attention.qkv_bias, attention.out_bias) = (bias, bias);
    // Takes the place of the usual scale. One where the field is absent.
    attention.scale = multiplier(fields, "attention_multiplier")?.unwrap_or(1.0);
    base.spec.embedding_scale = multiplier(fields, "embedding_multiplier")?;
    base.spec.branch_scale = multiplier(fields, "residual_multiplier")?;
    // The only one that divides.
    base.spec.logit_scale = multiplier(fields, "logits_scaling")?.map(f32::recip);
    let layer = LayerSpec {
        attention: Attention::Grouped(attention),
        feed_forward: base.dense(fields.flag("mlp_bias")?, Activation::Silu),
        post_norms: false,
    };
    Ok(base.with_layers(|_| layer.clone()))
}

fn multiplier(fields: &mut Fields<'_>, field: &'static str) -> Result<Option<f32>, ConfigError> {
    let positive = |value: f64| (value as f32) > 0.0 && (1.0 / value as f32).is_normal();
    let given = fields.number_given(field, "a positive number", positive)?.value();
    Ok(given.map(|value| value as f32))
}
