//! Llama 1, 2 and 3.x: grouped attention over everything before, one gated network.

use super::{Base, Defaults, base};
use crate::config::{ConfigError, Fields};
use crate::spec::{Dense, Family, FeedForward, ModelSpec};

/// Left in early conversions; superseded by `max_position_embeddings`.
pub(super) const WITHOUT_EFFECT: &[&str] = &["max_sequence_length"];

pub(super) fn spec(fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = Defaults { kv_heads: None, norm_eps: 1e-6, theta: 10_000.0 };
    let mut base: Base = base(Family::Llama, fields, &defaults)?;
    // In this family one switch covers the output projection, too.
    let bias = fields.flag("attention_bias")?;
    base.attention.qkv_bias = bias;
    base.attention.out_bias = bias;
    let feed_forward =
        FeedForward::Dense(Dense { width: base.width, bias: fields.flag("mlp_bias")? });
    Ok(base.with_layers(feed_forward))
}
