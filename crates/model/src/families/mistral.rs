//! Mistral: Llama without biases, with a sliding window.

use serde_json::json;

use super::{Defaults, base, grouped, limits};
use crate::config::{ConfigError, Fields};
use crate::spec::{Activation, Attention, Family, LayerSpec, ModelSpec};

/// The config class' window where the field is absent; null switches it off.
const DEFAULT_WINDOW: usize = 4096;

pub(super) fn spec(fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = Defaults { kv_heads: Some(8), ..Defaults::LLAMA };
    let base = base(Family::Mistral, fields, &defaults)?;
    let mut attention = grouped(fields, &base.spec, &defaults)?;
    no_biases(fields)?;
    attention.window =
        fields.count_given("sliding_window", 1..=limits::CONTEXT)?.or_absent(Some(DEFAULT_WINDOW));
    let layer = LayerSpec {
        attention: Attention::Grouped(attention),
        feed_forward: base.dense(false, Activation::Silu),
        post_norms: false,
    };
    Ok(base.with_layers(|_| layer.clone()))
}

/// The Mistral classes have no biases; a config that asks for them means another class.
pub(super) fn no_biases(fields: &mut Fields<'_>) -> Result<(), ConfigError> {
    fields.only("attention_bias", &json!(false))?;
    fields.only("mlp_bias", &json!(false))
}
