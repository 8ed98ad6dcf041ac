//! DeepSeek V2, V2-Lite, V3 and R1: latent attention, experts in groups and a shared one.

use serde_json::{Value, json};

use super::{Base, Defaults, PAIRS, base, channels, limits, not_divisible, rope};
use crate::config::{ConfigError, Fields, Given};
use crate::spec::{
    Activation, Attention, Experts, Family, FeedForward, Format, GroupScore, Groups, Latent,
    LatentUp, LayerSpec, ModelSpec, Pairs, Rope, Router, Score, Shared,
};

/// Training and expert placement; `auto_map` names the publisher's own model code, which is not
/// executed.
pub(super) const WITHOUT_EFFECT: &[&str] = &[
    "auto_map",
    "aux_loss_alpha",
    "ep_size",
    "output_router_logits",
    "router_aux_loss_coef",
    "seq_aux",
];

const DEFAULTS: Defaults =
    Defaults { quantised: Some(Format::Fp8Blocks), rope_types: rope::WITH_YARN, ..Defaults::USUAL };
/// The config classes' width of the query's latent where the field is absent; null means none.
const DEFAULT_QUERY_RANK: usize = 1536;

pub(super) fn spec(family: Family, fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let v3 = family == Family::DeepseekV3;
    // The older class kept the ids it began with.
    let (bos, eos) = if v3 { (Some(0), Some(1)) } else { (Some(1), Some(2)) };
    let mut base = base(family, fields, &Defaults { bos, eos, ..DEFAULTS })?;
    let attention = Attention::Latent(latent(fields, &base)?);
    fields.only("attention_bias", &json!(false))?;
    fields.only("mlp_bias", &json!(false))?;
    fields.only("rope_interleave", &json!(true))?;
    fields.only("moe_layer_freq", &json!(1))?;
    let default_dense = if v3 { 3 } else { 0 };
    let dense_layers = fields.count_given("first_k_dense_replace", 0..=limits::LAYERS)?;
    let dense_layers = dense_layers.value().unwrap_or(default_dense);
    let experts = FeedForward::Experts(mixture(v3, fields)?);
    let dense = base.dense(false, Activation::Silu);
    if v3 {
        // One unless the config says otherwise, as in its class.
        let further = fields.count_given("num_nextn_predict_layers", 0..=limits::LAYERS)?;
        let further = base.layers..base.layers + further.value().unwrap_or(1);
        let prefix = |layer: usize| format!("model.layers.{layer}.");
        base.spec.ignored_prefixes = further.map(prefix).collect();
    }
    Ok(base.with_layers(|layer| LayerSpec {
        attention: attention.clone(),
        feed_forward: if layer < dense_layers { dense.clone() } else { experts.clone() },
        post_norms: false,
    }))
}

fn latent(fields: &mut Fields<'_>, base: &Base) -> Result<Latent, ConfigError> {
    let heads = fields.count("num_attention_heads", limits::HEADS)?;
    // Keys and values come from the latent; there are as many as query heads.
    fields.only("num_key_value_heads", &json!(heads))?;
    let query_rank =
        fields.count_given("q_lora_rank", 1..=limits::WIDTH)?.or_absent(Some(DEFAULT_QUERY_RANK));
    let kv_rank = fields.count("kv_lora_rank", limits::WIDTH)?;
    let nope_dim = fields.count("qk_nope_head_dim", limits::HEAD_DIM)?;
    let rope_dim = fields.count("qk_rope_head_dim", limits::HEAD_DIM)?;
    let value_dim = fields.count("v_head_dim", limits::HEAD_DIM)?;
    if rope_dim % 2 != 0 {
        return Err(not_divisible("qk_rope_head_dim", rope_dim, PAIRS, 2));
    }
    channels(heads, nope_dim + rope_dim)?;
    channels(heads, nope_dim + value_dim)?;
    // Some versions write these out.
    fields.only("qk_head_dim", &json!(nope_dim + rope_dim))?;
    fields.only("head_dim", &json!(rope_dim))?;
    fields.only("partial_rotary_factor", &json!(1.0))?;
    let turns = rope::rope(fields, DEFAULTS.rope(base.spec.context))?;
    let scale = turns.query_scale.powi(2) / ((nope_dim + rope_dim) as f64).sqrt();
    Ok(Latent {
        heads,
        query_rank,
        kv_rank,
        nope_dim,
        rope_dim,
        value_dim,
        scale: scale as f32,
        rope: Rope {
            theta: turns.theta,
            dims: rope_dim,
            pairs: Pairs::Interleaved,
            scaling: turns.scaling,
        },
        up: LatentUp::Joined,
    })
}

fn mixture(v3: bool, fields: &mut Fields<'_>) -> Result<Experts, ConfigError> {
    let count = fields.count("n_routed_experts", limits::EXPERTS)?;
    let chosen = fields.count("num_experts_per_tok", count)?;
    let width = fields.count("moe_intermediate_size", limits::WIDTH)?;
    let shared = match fields.count_given("n_shared_experts", 0..=limits::EXPERTS)? {
        Given::Absent => return Err(fields.missing("n_shared_experts")),
        Given::Null | Given::Value(0) => None,
        Given::Value(number) => {
            let (total, limit) = (number as u128 * width as u128, limits::WIDTH as u128);
            if total > limit {
                let what = "shared feed-forward columns per layer";
                return Err(ConfigError::TooBig { what, count: total, limit });
            }
            Some(Shared { width: number * width, gated: false })
        }
    };
    let scale = fields.number_given("routed_scaling_factor", "a positive number", |scale| {
        scale as f32 > 0.0 && (scale as f32).is_finite()
    })?;
    let scale = scale.value().unwrap_or(if v3 { 2.5 } else { 1.0 }) as f32;
    let score = if v3 { Score::Sigmoid } else { Score::Softmax };
    let (renormalise, groups) = if v3 {
        fields.only("scoring_func", &json!("sigmoid"))?;
        fields.only("topk_method", &json!("noaux_tc"))?;
        let renormalise = fields.truth("norm_topk_prob")?.value().unwrap_or(true);
        (renormalise, groups(fields, GroupScore::TopTwoSum, count, chosen)?)
    } else {
        fields.only("scoring_func", &json!("softmax"))?;
        // The model codes disagree on what true means.
        fields.only("norm_topk_prob", &json!(false))?;
        (false, v2_groups(fields, count, chosen)?)
    };
    let router = Router { score, renormalise, scale, groups, bias: false, correction: v3 };
    Ok(Experts { count, chosen, width, bias: false, activation: Activation::Silu, router, shared })
}

fn v2_groups(
    fields: &mut Fields<'_>,
    count: usize,
    chosen: usize,
) -> Result<Option<Groups>, ConfigError> {
    match fields.text("topk_method")?.value().unwrap_or("greedy") {
        "greedy" => {
            // Given all the same, and without a meaning for this method.
            fields.count_given("n_group", 0..=limits::EXPERTS)?;
            fields.count_given("topk_group", 0..=limits::EXPERTS)?;
            Ok(None)
        }
        "group_limited_greedy" => groups(fields, GroupScore::Max, count, chosen),
        other => {
            let understood = "greedy or group_limited_greedy".to_owned();
            Err(fields.unsupported("topk_method", &Value::from(other), understood))
        }
    }
}

/// `None` where every group stays.
fn groups(
    fields: &mut Fields<'_>,
    by: GroupScore,
    experts: usize,
    chosen: usize,
) -> Result<Option<Groups>, ConfigError> {
    let count = fields.count("n_group", experts)?;
    if !experts.is_multiple_of(count) {
        return Err(not_divisible("n_routed_experts", experts, "n_group", count));
    }
    let kept = fields.count("topk_group", count)?;
    if kept == count {
        return Ok(None);
    }
    let each = experts / count;
    if by == GroupScore::TopTwoSum && each < 2 {
        // Two experts make a group's score.
        return Err(out_of_range("n_group", count, experts / 2));
    }
    if chosen > kept * each {
        return Err(out_of_range("num_experts_per_tok", chosen, kept * each));
    }
    Ok(Some(Groups { count, chosen: kept, by }))
}

fn out_of_range(field: &str, value: usize, most: usize) -> ConfigError {
    let (field, value) = (field.to_owned(), value.to_string());
    ConfigError::OutOfRange { field, value, allowed: format!("1 to {most}") }
}
