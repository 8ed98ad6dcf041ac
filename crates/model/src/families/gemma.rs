//! Gemma 2 and the text part of Gemma 3: norms around both branches, windows in most layers,
//! scaled embeddings; Gemma 3 has per-head norms and a rope of its own for windowed layers.

use serde_json::json;

use super::rope::{self, RopeDefaults, Turns};
use super::{Base, Defaults, base, grouped, grouped_with, limits, sliding_layers};
use crate::config::{ConfigError, Fields};
use crate::spec::{Activation, Attention, Family, Grouped, LayerSpec, ModelSpec, Rope};

/// How the library keeps its cache.
pub(super) const WITHOUT_EFFECT: &[&str] = &["cache_implementation"];

/// The config classes' values where fields are absent.
const DEFAULT_WINDOW: usize = 4096;
const DEFAULT_QUERY_SCALAR: f64 = 256.0;
const DEFAULT_PATTERN: usize = 6;
const DEFAULT_LOCAL_THETA: f64 = 10_000.0;
const DEFAULT_SCORE_CAP: f64 = 50.0;
const DEFAULT_LOGIT_CAP: f64 = 30.0;

const GEMMA2: Defaults = Defaults {
    kv_heads: Some(4),
    head_dim: Some(256),
    tied: true,
    bos: Some(2),
    eos: Some(1),
    activation: "gelu_pytorch_tanh",
    ..Defaults::USUAL
};
const GEMMA3: Defaults = Defaults { theta: 1_000_000.0, ..GEMMA2 };

pub(super) fn gemma2(fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let mut base = base(Family::Gemma2, fields, &GEMMA2)?;
    let mut attention = grouped(fields, &base.spec, &GEMMA2)?;
    let caps = (Some(DEFAULT_SCORE_CAP), Some(DEFAULT_LOGIT_CAP));
    let window = shared(fields, &mut base, &mut attention, caps)?;
    let sliding = sliding_layers(fields, base.layers)?
        .unwrap_or_else(|| (0..base.layers).map(|layer| layer % 2 == 0).collect());
    let local = attention.rope.clone();
    layers(fields, base, Kinds { global: attention, local, window, sliding })
}

pub(super) fn gemma3(fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let mut base = base(Family::Gemma3Text, fields, &GEMMA3)?;
    fields.only("partial_rotary_factor", &json!(1.0))?;
    let (global, local) = ropes(fields, base.spec.context)?;
    let mut attention = grouped_with(fields, &base.spec, &GEMMA3, global)?;
    attention.qk_norm = true;
    let window = shared(fields, &mut base, &mut attention, (None, None))?;
    // Of every so many layers the last sees everything. The list of types counts where it stands.
    let mut pattern = DEFAULT_PATTERN;
    for name in ["_sliding_window_pattern", "sliding_window_pattern"] {
        if let Some(given) = fields.count_given(name, 1..=limits::LAYERS)?.value() {
            pattern = given;
        }
    }
    let sliding = sliding_layers(fields, base.layers)?.unwrap_or_else(|| {
        (0..base.layers).map(|layer| !(layer + 1).is_multiple_of(pattern)).collect()
    });
    let local = Rope { theta: local.theta, scaling: local.scaling, ..attention.rope.clone() };
    layers(fields, base, Kinds { global: attention, local, window, sliding })
}

/// What both versions share; gives the window of the windowed layers.
fn shared(
    fields: &mut Fields<'_>,
    base: &mut Base,
    attention: &mut Grouped,
    (score_cap, logit_cap): (Option<f64>, Option<f64>),
) -> Result<Option<usize>, ConfigError> {
    const POSITIVE: &str = "a positive number";
    let positive = |value: f64| value as f32 > 0.0 && (value as f32).is_finite();
    fields.only("hidden_activation", &json!(GEMMA2.activation))?;
    fields.only("use_bidirectional_attention", &json!(false))?;
    let bias = fields.flag("attention_bias")?;
    (attention.qkv_bias, attention.out_bias) = (bias, bias);
    let scalar = fields.number_given("query_pre_attn_scalar", POSITIVE, positive)?;
    let scalar = scalar.value().unwrap_or(DEFAULT_QUERY_SCALAR);
    attention.scale = (1.0 / scalar.sqrt()) as f32;
    let cap = fields.number_given("attn_logit_softcapping", POSITIVE, positive)?;
    attention.softcap = cap.or_absent(score_cap).map(|cap| cap as f32);
    let cap = fields.number_given("final_logit_softcapping", POSITIVE, positive)?;
    base.spec.logit_softcap = cap.or_absent(logit_cap).map(|cap| cap as f32);
    base.spec.norm_plus_one = true;
    base.spec.embedding_scale = Some((base.spec.hidden as f32).sqrt());
    let window = fields.count_given("sliding_window", 1..=limits::CONTEXT)?;
    let window = window.or_absent(Some(DEFAULT_WINDOW));
    // Published beside the other in some configs of Gemma 2.
    let again = fields.count_given("sliding_window_size", 1..=limits::CONTEXT)?.value();
    if again.is_some() && again != window {
        let (field, other) = ("sliding_window_size".to_owned(), "sliding_window".to_owned());
        return Err(ConfigError::Conflict { field, other });
    }
    Ok(window)
}

/// Rope of the layers that see everything, and of those with a window. The older style scales the
/// former only; the newer has an object for each.
fn ropes(fields: &mut Fields<'_>, context: usize) -> Result<(Turns, Turns), ConfigError> {
    const LOCAL: &str = "rope_local_base_freq";
    let global_defaults = GEMMA3.rope(context);
    let local = fields.number_given(LOCAL, "a number of at least 1", |theta| theta >= 1.0)?;
    let local =
        RopeDefaults { theta: local.value().unwrap_or(DEFAULT_LOCAL_THETA), ..global_defaults };
    let nested = fields.object("rope_parameters")?.value();
    let Some(nested) = nested.filter(|map| map.values().any(serde_json::Value::is_object)) else {
        let scaling = crate::spec::RopeScaling::None;
        let local = Turns { theta: local.theta, scaling, query_scale: 1.0 };
        return Ok((rope::rope(fields, global_defaults)?, local));
    };
    // One place for each value.
    for field in ["rope_theta", "rope_scaling", LOCAL] {
        if fields.stands(field) {
            let (field, other) = (field.to_owned(), "rope_parameters".to_owned());
            return Err(ConfigError::Conflict { field, other });
        }
    }
    let mut types = Fields::new(fields.family(), "rope_parameters.", nested);
    let mut turns = |field, prefix, defaults| match types.object(field)?.value() {
        Some(map) => rope::turns(types.family(), prefix, map, defaults),
        None => Err(types.missing(field)),
    };
    let global = turns("full_attention", "rope_parameters.full_attention.", global_defaults)?;
    let local = turns("sliding_attention", "rope_parameters.sliding_attention.", local)?;
    types.finish(&[])?;
    Ok((global, local))
}

/// The two kinds of layers.
struct Kinds {
    /// Attention of the layers that see everything.
    global: Grouped,
    /// Rope of those with a window.
    local: Rope,
    window: Option<usize>,
    /// By layer.
    sliding: Vec<bool>,
}

fn layers(fields: &Fields<'_>, base: Base, kinds: Kinds) -> Result<ModelSpec, ConfigError> {
    let Kinds { global, local, window, sliding } = kinds;
    if window.is_none() && sliding.contains(&true) {
        return Err(fields.missing("sliding_window"));
    }
    let windowed = Grouped { window, rope: local, ..global.clone() };
    let feed_forward = base.dense(false, Activation::GeluTanh);
    Ok(base.with_layers(|layer| LayerSpec {
        attention: Attention::Grouped(match sliding.get(layer) {
            Some(true) => windowed.clone(),
            _ => global.clone(),
        }),
        feed_forward: feed_forward.clone(),
        post_norms: true,
    }))
}
