//! Llama 1, 2 and 3.x: grouped attention over everything before, one gated network.

use super::{Defaults, base, grouped};
use crate::config::{ConfigError, Fields};
use crate::spec::{Activation, Attention, Family, LayerSpec, ModelSpec};

/// Left in early conversions; superseded by `max_position_embeddings`.
pub(super) const WITHOUT_EFFECT: &[&str] = &["max_sequence_length"];

pub(super) fn spec(fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = Defaults::LLAMA;
    let base = base(Family::Llama, fields, &defaults)?;
    let mut attention = grouped(fields, &base.spec, &defaults)?;
    // In this family one switch covers the output projection, too.
    let bias = fields.flag("attention_bias")?;
    attention.qkv_bias = bias;
    attention.out_bias = bias;
    let layer = LayerSpec {
        attention: Attention::Grouped(attention),
        feed_forward: base.dense(fields.flag("mlp_bias")?, Activation::Silu),
        post_norms: false,
    };
    Ok(base.with_layers(|_| layer.clone()))
}
