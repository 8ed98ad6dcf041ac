//! Mixtral: Mistral's attention, a softmax router and gated experts.

use super::mistral::no_biases;
use super::{Base, Defaults, base, limits};
use crate::config::{ConfigError, Fields};
use crate::spec::{Experts, Family, FeedForward, ModelSpec};
use crate::tensors::Part;

/// Of use in training only.
pub(super) const WITHOUT_EFFECT: &[&str] =
    &["output_router_logits", "router_aux_loss_coef", "router_jitter_noise"];

pub(super) fn spec(fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = Defaults { kv_heads: Some(8), norm_eps: 1e-5, theta: 1_000_000.0 };
    let mut base: Base = base(Family::Mixtral, fields, &defaults)?;
    no_biases(fields)?;
    // Unlike Mistral's, this config class has no window unless one is given.
    base.attention.window = fields.count_given("sliding_window", 1..=limits::CONTEXT)?.value();
    let count = fields.count("num_local_experts", limits::EXPERTS)?;
    // At most all of them.
    let chosen = fields.count("num_experts_per_tok", count)?;
    // The reference takes the softmax over all experts, the largest, and divides by their sum.
    let experts = Experts { count, chosen, width: base.width, renormalise: true };
    Ok(base.with_layers(FeedForward::Experts(experts)))
}

/// Names within a layer; `w1` is the gate, `w3` up, `w2` down.
pub(super) fn expert_tensor(part: Part) -> String {
    let expert = |id: usize, matrix: &str| format!("block_sparse_moe.experts.{id}.{matrix}.weight");
    match part {
        Part::ExpertGate(id) => expert(id, "w1"),
        Part::ExpertUp(id) => expert(id, "w3"),
        Part::ExpertDown(id) => expert(id, "w2"),
        _ => "block_sparse_moe.gate.weight".to_owned(),
    }
}
