//! Mistral: Llama without biases, with a sliding window.

use serde_json::json;

use super::{Base, Defaults, base, limits};
use crate::config::{ConfigError, Fields};
use crate::spec::{Dense, Family, FeedForward, ModelSpec};

/// The config class' window where the field is absent; null switches it off.
const DEFAULT_WINDOW: usize = 4096;

pub(super) fn spec(fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = Defaults { kv_heads: Some(8), norm_eps: 1e-6, theta: 10_000.0 };
    let mut base: Base = base(Family::Mistral, fields, &defaults)?;
    no_biases(fields)?;
    base.attention.window =
        fields.count_given("sliding_window", 1..=limits::CONTEXT)?.or_absent(Some(DEFAULT_WINDOW));
    let feed_forward = FeedForward::Dense(Dense { width: base.width, bias: false });
    Ok(base.with_layers(feed_forward))
}

/// The Mistral classes have no biases; a config that asks for them means another class.
pub(super) fn no_biases(fields: &mut Fields<'_>) -> Result<(), ConfigError> {
    fields.only("attention_bias", &json!(false))?;
    fields.only("mlp_bias", &json!(false))
}
