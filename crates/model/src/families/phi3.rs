//! Phi-3: Llama with one matrix for query, key and value and one for gate and up.

use super::mistral::no_biases;
use super::{Defaults, base, grouped, limits};
use crate::config::{ConfigError, Fields};
use crate::spec::{Activation, Attention, Family, LayerSpec, ModelSpec};

/// Training, and the original context, which only the refused rope type `longrope` reads.
/// `auto_map` names the publisher's own model code, which is not executed.
pub(super) const WITHOUT_EFFECT: &[&str] =
    &["auto_map", "embd_pdrop", "original_max_position_embeddings", "resid_pdrop"];

pub(super) fn spec(fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = Defaults {
        norm_eps: 1e-5,
        bos: Some(1),
        eos: Some(32_000),
        rope_types: &["default"],
        ..Defaults::USUAL
    };
    let base = base(Family::Phi3, fields, &defaults)?;
    let mut attention = grouped(fields, &base.spec, &defaults)?;
    no_biases(fields)?;
    attention.window = fields.count_given("sliding_window", 1..=limits::CONTEXT)?.value();
    let layer = LayerSpec {
        attention: Attention::Grouped(attention),
        feed_forward: base.dense(false, Activation::Silu),
        post_norms: false,
    };
    Ok(base.with_layers(|_| layer.clone()))
}
