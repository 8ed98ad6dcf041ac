//! Mixtral: Mistral's attention, a softmax router and gated experts.

use super::mistral::no_biases;
use super::{Defaults, base, grouped, limits};
use crate::config::{ConfigError, Fields};
use crate::spec::{
    Activation, Attention, Experts, Family, FeedForward, LayerSpec, ModelSpec, Router, Score,
};

/// Of use in training only.
pub(super) const WITHOUT_EFFECT: &[&str] =
    &["output_router_logits", "router_aux_loss_coef", "router_jitter_noise"];

pub(super) fn spec(fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults =
        Defaults { kv_heads: Some(8), norm_eps: 1e-5, theta: 1_000_000.0, ..Defaults::LLAMA };
    let base = base(Family::Mixtral, fields, &defaults)?;
    let mut attention = grouped(fields, &base.spec, &defaults)?;
    no_biases(fields)?;
    // Unlike Mistral's, this config class has no window unless one is given.
    attention.window = fields.count_given("sliding_window", 1..=limits::CONTEXT)?.value();
    let count = fields.count("num_local_experts", limits::EXPERTS)?;
    // At most all of them.
    let chosen = fields.count("num_experts_per_tok", count)?;
    let experts = Experts {
        count,
        chosen,
        width: base.width,
        bias: false,
        activation: Activation::Silu,
        // The reference takes the softmax over all experts, the largest, and divides by their sum.
        router: Router { renormalise: true, ..Router::plain(Score::Softmax) },
        shared: None,
    };
    let layer = LayerSpec {
        attention: Attention::Grouped(attention),
        feed_forward: FeedForward::Experts(experts),
        post_norms: false,
    };
    Ok(base.with_layers(|_| layer.clone()))
}
