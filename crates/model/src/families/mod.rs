//! The architecture families: how each one's config maps to the spec and what its tensors are
//! called. The parts that families share stand here.

mod llama;
mod mistral;
mod mixtral;

use serde_json::{Map, Value, json};

use crate::config::{ConfigError, Fields, Given};
use crate::spec::{Attention, Family, Grouped, LayerSpec, ModelSpec, Rope, RopeScaling};
use crate::tensors::Part;

/// Caps on single fields; products are capped once the spec stands.
pub(crate) mod limits {
    pub(crate) const WIDTH: usize = 1 << 24;
    pub(crate) const LAYERS: usize = 4096;
    pub(crate) const HEADS: usize = 1 << 16;
    pub(crate) const HEAD_DIM: usize = 1 << 16;
    pub(crate) const VOCAB: usize = 1 << 28;
    pub(crate) const CONTEXT: usize = 1 << 30;
    pub(crate) const EXPERTS: usize = 1 << 16;
}

impl Family {
    /// All families.
    pub const ALL: [Family; 3] = [Family::Llama, Family::Mistral, Family::Mixtral];

    /// Its name, as `model_type` gives it.
    pub fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Mixtral => "mixtral",
        }
    }

    /// Its class, as `architectures` gives it.
    pub fn architecture(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Mixtral => "MixtralForCausalLM",
        }
    }

    /// The family that an `architectures` entry names.
    pub fn from_architecture(name: &str) -> Option<Family> {
        Self::ALL.into_iter().find(|family| family.architecture() == name)
    }

    /// The family that a `model_type` names.
    pub fn from_model_type(name: &str) -> Option<Family> {
        Self::ALL.into_iter().find(|family| family.name() == name)
    }

    /// What a tensor is called in this family's checkpoints. The layer counts for parts of a
    /// layer only.
    pub fn tensor_name(self, layer: usize, part: Part) -> String {
        let part = match part {
            Part::Embedding => return "model.embed_tokens.weight".to_owned(),
            Part::FinalNorm => return "model.norm.weight".to_owned(),
            Part::Head => return "lm_head.weight".to_owned(),
            Part::AttentionNorm => "input_layernorm.weight",
            Part::Query => "self_attn.q_proj.weight",
            Part::QueryBias => "self_attn.q_proj.bias",
            Part::Key => "self_attn.k_proj.weight",
            Part::KeyBias => "self_attn.k_proj.bias",
            Part::Value => "self_attn.v_proj.weight",
            Part::ValueBias => "self_attn.v_proj.bias",
            Part::Output => "self_attn.o_proj.weight",
            Part::OutputBias => "self_attn.o_proj.bias",
            Part::FeedForwardNorm => "post_attention_layernorm.weight",
            Part::Gate => "mlp.gate_proj.weight",
            Part::GateBias => "mlp.gate_proj.bias",
            Part::Up => "mlp.up_proj.weight",
            Part::UpBias => "mlp.up_proj.bias",
            Part::Down => "mlp.down_proj.weight",
            Part::DownBias => "mlp.down_proj.bias",
            Part::Router | Part::ExpertGate(_) | Part::ExpertUp(_) | Part::ExpertDown(_) => {
                return format!("model.layers.{layer}.{}", mixtral::expert_tensor(part));
            }
        };
        format!("model.layers.{layer}.{part}")
    }
}

/// Reads the family's fields into a spec.
pub(crate) fn spec(family: Family, fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    match family {
        Family::Llama => llama::spec(fields),
        Family::Mistral => mistral::spec(fields),
        Family::Mixtral => mixtral::spec(fields),
    }
}

/// The fields of the family that do not change an inference result.
pub(crate) fn without_effect(family: Family) -> &'static [&'static [&'static str]] {
    match family {
        Family::Llama => &[COMMON_WITHOUT_EFFECT, llama::WITHOUT_EFFECT],
        Family::Mistral => &[COMMON_WITHOUT_EFFECT],
        Family::Mixtral => &[COMMON_WITHOUT_EFFECT, mixtral::WITHOUT_EFFECT],
    }
}

/// Training, bookkeeping, library switches and sampling defaults (requests bring their own) that
/// every family's config may carry.
const COMMON_WITHOUT_EFFECT: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "attention_dropout",
    "do_sample",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "max_length",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
];

/// Switches of the config base class of which only the "off" value is implemented.
fn only_causal(fields: &mut Fields<'_>) -> Result<(), ConfigError> {
    if let Given::Value(_) = fields.object("quantization_config")? {
        let what = Value::Object(Map::new());
        return Err(fields.unsupported("quantization_config", &what, "no quantisation".to_owned()));
    }
    fields.only("hidden_act", &json!("silu"))?;
    // Above 1, Llama's projections are summed in slices, which rounds differently.
    fields.only("pretraining_tp", &json!(1))?;
    fields.only("add_cross_attention", &json!(false))?;
    fields.only("is_decoder", &json!(false))?;
    fields.only("is_encoder_decoder", &json!(false))?;
    fields.only("chunk_size_feed_forward", &json!(0))?;
    fields.only("pruned_heads", &json!({}))
}

/// What the config class of a family assumes where a field is absent.
pub(crate) struct Defaults {
    pub(crate) kv_heads: Option<usize>,
    pub(crate) norm_eps: f64,
    pub(crate) theta: f64,
}

/// The fields that all families share, before the family adds layers.
pub(crate) struct Base {
    /// A spec without layers.
    pub(crate) spec: ModelSpec,
    /// Attention without biases and window.
    pub(crate) attention: Grouped,
    pub(crate) layers: usize,
    /// `intermediate_size`.
    pub(crate) width: usize,
}

impl Base {
    /// `layers` times the same layer.
    pub(crate) fn with_layers(mut self, feed_forward: crate::FeedForward) -> ModelSpec {
        let layer = LayerSpec { attention: Attention::Grouped(self.attention), feed_forward };
        self.spec.layers = vec![layer; self.layers];
        self.spec
    }
}

/// Reads the fields that all families share.
pub(crate) fn base(
    family: Family,
    fields: &mut Fields<'_>,
    defaults: &Defaults,
) -> Result<Base, ConfigError> {
    only_causal(fields)?;
    let hidden = fields.count("hidden_size", limits::WIDTH)?;
    let width = fields.count("intermediate_size", limits::WIDTH)?;
    let layers = fields.count("num_hidden_layers", limits::LAYERS)?;
    let vocab = fields.count("vocab_size", limits::VOCAB)?;
    let context = fields.count("max_position_embeddings", limits::CONTEXT)?;
    let norm_eps = fields
        .number_given("rms_norm_eps", "a positive number up to 1", |eps| {
            // The decoder adds it in f32, where a tiny one would be zero.
            eps as f32 > 0.0 && eps <= 1.0
        })?
        .value()
        .unwrap_or(defaults.norm_eps) as f32;
    let tied = fields.flag("tie_word_embeddings")?;
    let attention = attention(fields, hidden, defaults)?;
    // The config classes of all families default to ids 1 and 2; explicit null means none.
    let small = |id: u32| Some(vec![id]).filter(|_| (id as usize) < vocab);
    let bos = fields.tokens("bos_token_id", vocab)?.or_absent(small(1));
    let eos = fields.tokens("eos_token_id", vocab)?.or_absent(small(2)).unwrap_or_default();
    let bos = bos.and_then(|ids| ids.first().copied());
    let spec =
        ModelSpec { family, hidden, vocab, context, norm_eps, tied, layers: vec![], bos, eos };
    Ok(Base { spec, attention, layers, width })
}

fn attention(
    fields: &mut Fields<'_>,
    hidden: usize,
    defaults: &Defaults,
) -> Result<Grouped, ConfigError> {
    let not_divisible = |field: &str, value, by: &str, divisor| ConfigError::NotDivisible {
        field: field.to_owned(),
        value,
        by: by.to_owned(),
        divisor,
    };
    let heads = fields.count("num_attention_heads", limits::HEADS)?;
    let kv_heads = fields
        .count_given("num_key_value_heads", 1..=limits::HEADS)?
        .or_absent(defaults.kv_heads)
        .unwrap_or(heads);
    if heads % kv_heads != 0 {
        let (field, by) = ("num_attention_heads", "num_key_value_heads");
        return Err(not_divisible(field, heads, by, kv_heads));
    }
    let head_dim = fields.count_given("head_dim", 1..=limits::HEAD_DIM)?.value();
    if head_dim.is_none() && !hidden.is_multiple_of(heads) {
        return Err(not_divisible("hidden_size", hidden, "num_attention_heads", heads));
    }
    let head_dim = head_dim.unwrap_or(hidden / heads);
    if head_dim % 2 != 0 {
        // Rotary embedding turns pairs.
        return Err(not_divisible("head_dim", head_dim, "pairs of the rotary embedding", 2));
    }
    if heads * head_dim > limits::WIDTH {
        return Err(ConfigError::TooBig {
            what: "query channels per layer",
            count: heads as u128 * head_dim as u128,
            limit: limits::WIDTH as u128,
        });
    }
    let rope = rope(fields, defaults.theta)?;
    let (qkv_bias, out_bias, window) = (false, false, None);
    Ok(Grouped { heads, kv_heads, head_dim, qkv_bias, out_bias, window, rope })
}

/// Rope from either style: `rope_theta` with `rope_scaling`, or `rope_parameters` holding both.
fn rope(fields: &mut Fields<'_>, default_theta: f64) -> Result<Rope, ConfigError> {
    fields.only("partial_rotary_factor", &json!(1.0))?;
    let mut theta = theta_of(fields)?.map(|theta| ("rope_theta", theta));
    let mut scaling: Option<(&str, RopeScaling)> = None;
    for (name, prefix) in
        [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")]
    {
        let Some(map) = fields.object(name)?.value() else {
            continue;
        };
        let (inner_theta, inner) = rope_object(fields.family(), prefix, map)?;
        if let Some(inner_theta) = inner_theta {
            agree(&mut theta, name, inner_theta)?;
        }
        agree(&mut scaling, name, inner)?;
    }
    Ok(Rope {
        theta: theta.map_or(default_theta, |(_, theta)| theta),
        scaling: scaling.map_or(RopeScaling::None, |(_, scaling)| scaling),
    })
}

/// Keeps the value that two places give, if it is the same.
fn agree<T: PartialEq>(
    known: &mut Option<(&'static str, T)>,
    name: &'static str,
    value: T,
) -> Result<(), ConfigError> {
    match known {
        Some((other, before)) if *before != value => {
            Err(ConfigError::Conflict { field: name.to_owned(), other: (*other).to_owned() })
        }
        _ => {
            *known = Some((name, value));
            Ok(())
        }
    }
}

fn theta_of(fields: &mut Fields<'_>) -> Result<Option<f64>, ConfigError> {
    Ok(fields.number_given("rope_theta", "a number of at least 1", |theta| theta >= 1.0)?.value())
}

/// Theta, where the object holds it, and the scaling.
fn rope_object(
    family: &'static str,
    prefix: &'static str,
    map: &Map<String, Value>,
) -> Result<(Option<f64>, RopeScaling), ConfigError> {
    let mut fields = Fields::new(family, prefix, map);
    let theta = theta_of(&mut fields)?;
    fields.only("partial_rotary_factor", &json!(1.0))?;
    // Older configs say `type`; some carry both.
    let kind = match (fields.text("rope_type")?, fields.text("type")?) {
        (Given::Value(kind), Given::Value(old)) if kind != old => {
            return Err(ConfigError::Conflict {
                field: fields.path("rope_type"),
                other: fields.path("type"),
            });
        }
        (Given::Value(kind), _) | (_, Given::Value(kind)) => kind,
        // Only theta in it: an object of the newer style without a type means no scaling.
        _ if theta.is_some() && map.len() == 1 => "default",
        _ => return Err(ConfigError::Missing { field: fields.path("rope_type") }),
    };
    let at_least_one = |factor: f64| factor >= 1.0;
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear {
            factor: fields.number("factor", "a number of at least 1", at_least_one)?,
        },
        "llama3" => llama3(&mut fields)?,
        other => {
            let understood = "default, linear or llama3".to_owned();
            return Err(fields.unsupported("rope_type", &Value::from(other), understood));
        }
    };
    fields.finish(&[])?;
    Ok((theta, scaling))
}

fn llama3(fields: &mut Fields<'_>) -> Result<RopeScaling, ConfigError> {
    let positive = |value: f64| value > 0.0;
    let factor = fields.number("factor", "a number of at least 1", |factor| factor >= 1.0)?;
    let low = fields.number("low_freq_factor", "a positive number", positive)?;
    // The ramp divides by the difference of the two.
    let high = fields.number("high_freq_factor", "more than low_freq_factor", |high| high > low)?;
    let original_context =
        fields.number("original_max_position_embeddings", "a positive number", positive)?;
    Ok(RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_context,
    })
}
