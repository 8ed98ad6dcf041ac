//! The architecture families: how each one's config maps to the spec and what its tensors are
//! called. The parts that families share stand here.

mod deepseek;
mod gemma;
mod gpt_oss;
mod granite;
mod llama;
mod mistral;
mod mixtral;
mod names;
mod phi3;
mod quantised;
mod qwen;
mod rope;

use serde_json::{Value, json};

use crate::config::{ConfigError, Fields};
use crate::spec::{
    Activation, Dense, Family, FeedForward, Format, Grouped, LayerSpec, ModelSpec, Pairs, Rope,
};
use rope::{RopeDefaults, Turns};

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
    pub const ALL: [Family; 14] = [
        Family::DeepseekV2,
        Family::DeepseekV3,
        Family::Gemma2,
        Family::Gemma3Text,
        Family::GptOss,
        Family::Granite,
        Family::Llama,
        Family::Mistral,
        Family::Mixtral,
        Family::Phi3,
        Family::Qwen2,
        Family::Qwen2Moe,
        Family::Qwen3,
        Family::Qwen3Moe,
    ];

    /// Its name, as `model_type` gives it.
    pub fn name(self) -> &'static str {
        match self {
            Family::DeepseekV2 => "deepseek_v2",
            Family::DeepseekV3 => "deepseek_v3",
            Family::Gemma2 => "gemma2",
            Family::Gemma3Text => "gemma3_text",
            Family::GptOss => "gpt_oss",
            Family::Granite => "granite",
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Mixtral => "mixtral",
            Family::Phi3 => "phi3",
            Family::Qwen2 => "qwen2",
            Family::Qwen2Moe => "qwen2_moe",
            Family::Qwen3 => "qwen3",
            Family::Qwen3Moe => "qwen3_moe",
        }
    }

    /// Its class, as `architectures` gives it.
    pub fn architecture(self) -> &'static str {
        match self {
            Family::DeepseekV2 => "DeepseekV2ForCausalLM",
            Family::DeepseekV3 => "DeepseekV3ForCausalLM",
            Family::Gemma2 => "Gemma2ForCausalLM",
            Family::Gemma3Text => "Gemma3ForCausalLM",
            Family::GptOss => "GptOssForCausalLM",
            Family::Granite => "GraniteForCausalLM",
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Mixtral => "MixtralForCausalLM",
            Family::Phi3 => "Phi3ForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen2Moe => "Qwen2MoeForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
            Family::Qwen3Moe => "Qwen3MoeForCausalLM",
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
}

/// Reads the family's fields into a spec.
pub(crate) fn spec(family: Family, fields: &mut Fields<'_>) -> Result<ModelSpec, ConfigError> {
    match family {
        Family::DeepseekV2 | Family::DeepseekV3 => deepseek::spec(family, fields),
        Family::Gemma2 => gemma::gemma2(fields),
        Family::Gemma3Text => gemma::gemma3(fields),
        Family::GptOss => gpt_oss::spec(fields),
        Family::Granite => granite::spec(fields),
        Family::Llama => llama::spec(fields),
        Family::Mistral => mistral::spec(fields),
        Family::Mixtral => mixtral::spec(fields),
        Family::Phi3 => phi3::spec(fields),
        Family::Qwen2 | Family::Qwen3 => qwen::dense(family, fields),
        Family::Qwen2Moe | Family::Qwen3Moe => qwen::experts(family, fields),
    }
}

/// The fields of the family that do not change an inference result.
pub(crate) fn without_effect(family: Family) -> [&'static [&'static str]; 2] {
    let own = match family {
        Family::DeepseekV2 | Family::DeepseekV3 => deepseek::WITHOUT_EFFECT,
        Family::Gemma2 | Family::Gemma3Text => gemma::WITHOUT_EFFECT,
        Family::GptOss => gpt_oss::WITHOUT_EFFECT,
        Family::Llama => llama::WITHOUT_EFFECT,
        Family::Mixtral => mixtral::WITHOUT_EFFECT,
        Family::Phi3 => phi3::WITHOUT_EFFECT,
        Family::Qwen2Moe | Family::Qwen3Moe => qwen::MOE_WITHOUT_EFFECT,
        Family::Granite | Family::Mistral | Family::Qwen2 | Family::Qwen3 => &[],
    };
    [COMMON_WITHOUT_EFFECT, own]
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
    "license",
    "license_link",
    "license_name",
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
fn only_causal(fields: &mut Fields<'_>, activation: &str) -> Result<(), ConfigError> {
    fields.only("hidden_act", &json!(activation))?;
    // Above 1, Llama's projections are summed in slices, which rounds differently.
    fields.only("pretraining_tp", &json!(1))?;
    fields.only("add_cross_attention", &json!(false))?;
    fields.only("is_decoder", &json!(false))?;
    fields.only("is_encoder_decoder", &json!(false))?;
    fields.only("chunk_size_feed_forward", &json!(0))?;
    fields.only("pruned_heads", &json!({}))
}

/// What the config class of a family assumes where a field is absent, and what it understands.
pub(crate) struct Defaults {
    pub(crate) kv_heads: Option<usize>,
    /// `None`: hidden / heads.
    pub(crate) head_dim: Option<usize>,
    pub(crate) norm_eps: f64,
    pub(crate) theta: f64,
    pub(crate) tied: bool,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
    /// The one activation's published name.
    pub(crate) activation: &'static str,
    /// Checkpoints may come in this format, too.
    pub(crate) quantised: Option<Format>,
    /// The rope types that the class implements.
    pub(crate) rope_types: &'static [&'static str],
}

impl Defaults {
    /// Those that most families share.
    pub(crate) const USUAL: Defaults = Defaults {
        kv_heads: None,
        head_dim: None,
        norm_eps: 1e-6,
        theta: 10_000.0,
        tied: false,
        bos: None,
        eos: None,
        activation: "silu",
        quantised: None,
        rope_types: rope::TYPES,
    };
    /// Those of the oldest families, whose config classes name the tokens 1 and 2.
    pub(crate) const LLAMA: Defaults = Defaults { bos: Some(1), eos: Some(2), ..Self::USUAL };

    pub(crate) fn rope(&self, context: usize) -> RopeDefaults {
        RopeDefaults { theta: self.theta, context, types: self.rope_types }
    }
}

/// The fields that all families share, before the family adds layers.
pub(crate) struct Base {
    /// A spec without layers.
    pub(crate) spec: ModelSpec,
    pub(crate) layers: usize,
    /// `intermediate_size`.
    pub(crate) width: usize,
}

impl Base {
    /// As many layers, made by number.
    pub(crate) fn with_layers(mut self, layer: impl Fn(usize) -> LayerSpec) -> ModelSpec {
        self.spec.layers = (0..self.layers).map(layer).collect();
        self.spec
    }

    /// A dense network of `intermediate_size`.
    pub(crate) fn dense(&self, bias: bool, activation: Activation) -> FeedForward {
        FeedForward::Dense(Dense { width: self.width, bias, activation })
    }
}

/// Reads the fields that all families share.
pub(crate) fn base(
    family: Family,
    fields: &mut Fields<'_>,
    defaults: &Defaults,
) -> Result<Base, ConfigError> {
    let format = quantised::format(fields, defaults.quantised)?;
    only_causal(fields, defaults.activation)?;
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
    let tied = fields.truth("tie_word_embeddings")?.value().unwrap_or(defaults.tied);
    // Explicit null means none.
    let small = |id: Option<u32>| id.filter(|&id| (id as usize) < vocab).map(|id| vec![id]);
    let bos = fields.tokens("bos_token_id", vocab)?.or_absent(small(defaults.bos));
    let eos = fields.tokens("eos_token_id", vocab)?.or_absent(small(defaults.eos));
    let spec = ModelSpec {
        family,
        format,
        hidden,
        vocab,
        context,
        norm_eps,
        norm_plus_one: false,
        embedding_scale: None,
        branch_scale: None,
        logit_scale: None,
        logit_softcap: None,
        tied,
        layers: vec![],
        bos: bos.and_then(|ids| ids.first().copied()),
        eos: eos.unwrap_or_default(),
        ignored_prefixes: vec![],
    };
    Ok(Base { spec, layers, width })
}

/// By layer, whether it has a window, where `layer_types` says so.
fn sliding_layers(
    fields: &mut Fields<'_>,
    layers: usize,
) -> Result<Option<Vec<bool>>, ConfigError> {
    let Some(types) = fields.texts("layer_types")?.value() else {
        return Ok(None);
    };
    if types.len() != layers {
        return Err(ConfigError::OutOfRange {
            field: fields.path("layer_types"),
            value: format!("a list of {}", types.len()),
            allowed: format!("one for each of {layers} layers"),
        });
    }
    let sliding = |name: &&str| match *name {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => {
            let understood = "sliding_attention or full_attention".to_owned();
            Err(fields.unsupported("layer_types", &Value::from(other), understood))
        }
    };
    types.iter().map(sliding).collect::<Result<_, _>>().map(Some)
}

fn not_divisible(field: &str, value: usize, by: &str, divisor: usize) -> ConfigError {
    ConfigError::NotDivisible { field: field.to_owned(), value, by: by.to_owned(), divisor }
}

/// Grouped attention without biases, norms, sinks and window.
pub(crate) fn grouped(
    fields: &mut Fields<'_>,
    spec: &ModelSpec,
    defaults: &Defaults,
) -> Result<Grouped, ConfigError> {
    fields.only("partial_rotary_factor", &json!(1.0))?;
    let turns = rope::rope(fields, defaults.rope(spec.context))?;
    grouped_with(fields, spec, defaults, turns)
}

/// The same where the caller has read the rope.
pub(crate) fn grouped_with(
    fields: &mut Fields<'_>,
    spec: &ModelSpec,
    defaults: &Defaults,
    turns: Turns,
) -> Result<Grouped, ConfigError> {
    let hidden = spec.hidden;
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
    let head_dim = head_dim.or(defaults.head_dim);
    if head_dim.is_none() && !hidden.is_multiple_of(heads) {
        return Err(not_divisible("hidden_size", hidden, "num_attention_heads", heads));
    }
    let head_dim = head_dim.unwrap_or(hidden / heads);
    if head_dim % 2 != 0 {
        return Err(not_divisible("head_dim", head_dim, PAIRS, 2));
    }
    channels(heads, head_dim)?;
    let Turns { theta, scaling, .. } = turns;
    Ok(Grouped {
        heads,
        kv_heads,
        head_dim,
        qkv_bias: false,
        out_bias: false,
        qk_norm: false,
        sinks: false,
        softcap: None,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window: None,
        rope: Rope { theta, dims: head_dim, pairs: Pairs::Halves, scaling },
    })
}

/// Why a rotated width must be even.
const PAIRS: &str = "pairs of the rotary embedding";

/// Refuses more channels than any model has.
fn channels(heads: usize, head_dim: usize) -> Result<(), ConfigError> {
    let count = heads as u128 * head_dim as u128;
    let limit = limits::WIDTH as u128;
    match count > limit {
        true => Err(ConfigError::TooBig { what: "query channels per layer", count, limit }),
        false => Ok(()),
    }
}
