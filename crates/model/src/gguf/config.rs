//! From metadata to a spec, by way of the config that the metadata amount to: each key is put
//! where the family's config has it, so that ranges, defaults and refusals are the same for both
//! ways of publishing a model. What the format does differently is set right afterwards.

use serde_json::{Map, Value as Json, json};

use super::words::Keys;
use super::{Gguf, GgufError, Value};
use crate::families::limits;
use crate::spec::{Attention, Format, GgufFormat, LatentUp, LayerSpec, ModelSpec, RopeScaling};

/// The architectures that are understood, by the format's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arch {
    Deepseek2,
    Gemma2,
    Gemma3,
    GptOss,
    Llama,
    Phi3,
    Qwen2,
    Qwen2Moe,
    Qwen3,
    Qwen3Moe,
}

impl Arch {
    const ALL: [(&'static str, Arch); 10] = [
        ("deepseek2", Arch::Deepseek2),
        ("gemma2", Arch::Gemma2),
        ("gemma3", Arch::Gemma3),
        ("gpt-oss", Arch::GptOss),
        ("llama", Arch::Llama),
        ("phi3", Arch::Phi3),
        ("qwen2", Arch::Qwen2),
        ("qwen2moe", Arch::Qwen2Moe),
        ("qwen3", Arch::Qwen3),
        ("qwen3moe", Arch::Qwen3Moe),
    ];
}

/// Keys that every architecture has, and the config's fields that mean the same.
const COMMON: [(&str, &str); 7] = [
    ("block_count", "num_hidden_layers"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("context_length", "max_position_embeddings"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("rope.freq_base", "rope_theta"),
];

/// Layers of the largest Gemma models, whose queries are scaled by another width than a head's.
const GEMMA2_LARGE: usize = 46;
const GEMMA3_LARGE: usize = 62;
/// Every so many layers one without a window.
const GEMMA3_PATTERN: u64 = 6;
/// Base of the windowed layers' rope in Gemma 3.
const GEMMA3_LOCAL_THETA: f64 = 10_000.0;

/// Divisors of the rotary frequencies (Llama 3).
const ROPE_FACTORS: &str = "rope_freqs.weight";
const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";

impl Gguf<'_> {
    /// The model that the file holds.
    ///
    /// # Errors
    /// A key is missing, has no meaning here, or is out of range; each error names it.
    pub fn spec(&self) -> Result<ModelSpec, GgufError> {
        let name = self.value("general.architecture").and_then(Value::text);
        let name = name.ok_or_else(|| self.bad_key("general.architecture", "is missing"))?;
        let arch = Arch::ALL.into_iter().find(|(known, _)| *known == name).ok_or_else(|| {
            let known: Vec<&str> = Arch::ALL.iter().map(|(known, _)| *known).collect();
            let problem =
                format!("is {}; understood are {}", crate::config::quote(name), known.join(", "));
            self.bad_key("general.architecture", problem)
        })?;
        self.whole_model()?;
        let mut keys = Keys::new(self, arch.0);
        common(&mut keys)?;
        let family = match arch.1 {
            Arch::Llama => llama(&mut keys)?,
            Arch::Phi3 => windowed(&mut keys, "phi3")?,
            Arch::Qwen2 => "qwen2",
            Arch::Qwen3 => "qwen3",
            Arch::Qwen2Moe => qwen2_moe(&mut keys)?,
            Arch::Qwen3Moe => qwen3_moe(&mut keys)?,
            Arch::GptOss => gpt_oss(&mut keys)?,
            Arch::Gemma2 => gemma2(&mut keys)?,
            Arch::Gemma3 => gemma3(&mut keys)?,
            Arch::Deepseek2 => deepseek(&mut keys)?,
        };
        keys.set("model_type", json!(family));
        if arch.1 != Arch::Deepseek2 {
            heads(&mut keys)?;
        }
        let scale = keys.number("attention.scale")?;
        let latent = arch.1 == Arch::Deepseek2;
        if let Some(scale) = scale.map(|scale| scale as f32)
            && (latent || !scale.is_finite() || scale <= 0.0)
        {
            let problem = if latent { "has no meaning here" } else { "is no positive number" };
            return Err(self.bad_key(&keys.path("attention.scale"), problem));
        }
        let config = keys.finish()?;
        let mut spec = ModelSpec::from_config(&Json::Object(config).to_string())
            .map_err(|source| keys.translate(source))?;
        self.adjust(&mut spec, scale)?;
        spec.check()
            .map_err(|flaw| self.bad_key("general.architecture", format!("gives {flaw}")))?;
        Ok(spec)
    }

    /// Refuses adapters and pieces of split files.
    fn whole_model(&self) -> Result<(), GgufError> {
        if let Some(kind) = self.value("general.type")
            && kind.text() != Some("model")
        {
            return Err(self.bad_key("general.type", "is not model"));
        }
        match self.value("split.count").map(|count| count.whole()) {
            None | Some(Some(0 | 1)) => Ok(()),
            _ => Err(self.bad_key("split.count", "says that this is a piece of a split file")),
        }
    }

    /// What the format does in its own way.
    fn adjust(&self, spec: &mut ModelSpec, scale: Option<f64>) -> Result<(), GgufError> {
        let down = |name: &str| {
            ["ffn_down.weight", "ffn_down_exps.weight", "ffn_down_shexp.weight"]
                .iter()
                .chain(&["attn_output.weight"])
                .any(|end| name.ends_with(end))
        };
        let cut = self.tensors().filter(|(name, _)| down(name)).map(|(_, info)| info.kind.block());
        let block = cut.max().unwrap_or(1);
        spec.format = Format::Gguf(GgufFormat { block });
        // The one was added when the file was made.
        spec.norm_plus_one = false;
        let factors = self.rope_factors()?;
        let latent = |layer: &LayerSpec| matches!(layer.attention, Attention::Latent(_));
        if factors.is_some() && spec.layers.iter().any(latent) {
            return Err(self.bad_tensor(ROPE_FACTORS, "has no meaning for latent attention"));
        }
        let split = self.tensor("blk.0.attn_k_b.weight").is_some();
        for layer in &mut spec.layers {
            match &mut layer.attention {
                Attention::Grouped(grouped) => {
                    if let Some(scale) = scale {
                        grouped.scale = scale as f32;
                    }
                    let Some(factors) = &factors else { continue };
                    if grouped.rope.scaling != RopeScaling::None {
                        return Err(self.bad_tensor(ROPE_FACTORS, "stands beside a rope scaling"));
                    }
                    if factors.len() != grouped.rope.dims / 2 {
                        let problem = format!("does not hold {} numbers", grouped.rope.dims / 2);
                        return Err(self.bad_tensor(ROPE_FACTORS, problem));
                    }
                    grouped.rope.scaling = RopeScaling::Divided { by: factors.clone() };
                }
                Attention::Latent(latent) if split => latent.up = LatentUp::Split,
                Attention::Latent(_) => {}
            }
        }
        Ok(())
    }

    /// The stored divisors of rotary frequencies.
    fn rope_factors(&self) -> Result<Option<Vec<f32>>, GgufError> {
        let Some(info) = self.tensor(ROPE_FACTORS) else { return Ok(None) };
        if info.kind != super::TensorType::F32 || info.shape.len() != 1 {
            return Err(self.bad_tensor(ROPE_FACTORS, "is not a vector of F32"));
        }
        let numbers = self.bytes[info.range.clone()].as_chunks::<4>().0.iter();
        let numbers: Vec<f32> = numbers.map(|bytes| f32::from_le_bytes(*bytes)).collect();
        match numbers.iter().all(|n| n.is_finite() && *n > 0.0) {
            true => Ok(Some(numbers)),
            false => Err(self.bad_tensor(ROPE_FACTORS, "holds what is no positive number")),
        }
    }
}

/// What all architectures share.
fn common(keys: &mut Keys<'_, '_>) -> Result<(), GgufError> {
    for (key, field) in COMMON {
        keys.copy(key, field)?;
    }
    let gguf = keys.gguf();
    let embedding = gguf.tensor(EMBEDDING);
    let shape = embedding.map(|info| info.shape.as_slice());
    let Some(&[vocab, _]) = shape else {
        return Err(gguf.bad_tensor(EMBEDDING, "is missing or no matrix"));
    };
    let said = keys.count("vocab_size")?;
    if said.is_some_and(|said| said != vocab) {
        let problem = format!("is not the {vocab} rows of {EMBEDDING}");
        return Err(gguf.bad_key(&keys.path("vocab_size"), problem));
    }
    keys.set("vocab_size", json!(vocab));
    keys.set("tie_word_embeddings", json!(gguf.tensor(HEAD).is_none()));
    keys.without_effect("rope.scaling.finetuned");
    keys.ids("tokenizer.ggml.bos_token_id", "bos_token_id", &[])?;
    let also = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
    keys.ids("tokenizer.ggml.eos_token_id", "eos_token_id", &also)?;
    scaling(keys)
}

/// `rope_scaling` for linear scaling and YaRN.
fn scaling(keys: &mut Keys<'_, '_>) -> Result<(), GgufError> {
    let factor = keys.number("rope.scaling.factor")?;
    // What the format's own runtime takes it for.
    let absent = if factor.is_some() { "linear" } else { "none" };
    let kind = keys.text("rope.scaling.type")?.unwrap_or(absent);
    let original = keys.count("rope.scaling.original_context_length")?;
    let mut map = Map::new();
    map.insert("rope_type".to_owned(), json!(kind));
    let mut put = |field: &str, value: Option<Json>| {
        map.extend(value.map(|value| (field.to_owned(), value)));
    };
    match kind {
        // The rest then has no meaning.
        "none" => return Ok(()),
        "linear" => put("factor", factor.map(Json::from)),
        "yarn" => {
            put("factor", factor.map(Json::from));
            put("original_max_position_embeddings", original.map(Json::from));
            let fast = keys.number("rope.scaling.yarn_beta_fast")?;
            let slow = keys.number("rope.scaling.yarn_beta_slow")?;
            put("beta_fast", fast.map(Json::from));
            put("beta_slow", slow.map(Json::from));
            keys.only_one("rope.scaling.yarn_ext_factor")?;
            keys.only_one("rope.scaling.yarn_attn_factor")?;
            keys.only_one("rope.scaling.attn_factor")?;
        }
        _ => {
            let key = keys.path("rope.scaling.type");
            return Err(keys.gguf().bad_key(&key, "is not none, linear or yarn"));
        }
    }
    keys.set("rope_scaling", Json::Object(map));
    keys.came_from("rope_scaling", "rope.scaling");
    Ok(())
}

/// Key and value heads of grouped attention, and their width.
fn heads(keys: &mut Keys<'_, '_>) -> Result<(), GgufError> {
    keys.copy("attention.head_count_kv", "num_key_value_heads")?;
    // Without it every query head has a key of its own.
    keys.copy_default("num_attention_heads", "num_key_value_heads");
    let whole = |keys: &Keys<'_, '_>, field: &str| keys.known(field).and_then(Json::as_u64);
    let hidden = whole(keys, "hidden_size").unwrap_or(0);
    let by_hidden = hidden.checked_div(whole(keys, "num_attention_heads").unwrap_or(0));
    let given = keys.count("attention.key_length")?;
    let width = given.or(by_hidden.and_then(|width| usize::try_from(width).ok()));
    let width = width.unwrap_or(0);
    for key in ["attention.value_length", "rope.dimension_count"] {
        if keys.count(key)?.is_some_and(|other| other != width) {
            let problem = format!("is not a head's width, {width}");
            return Err(keys.gguf().bad_key(&keys.path(key), problem));
        }
    }
    keys.set("head_dim", json!(width));
    keys.came_from("head_dim", "attention.key_length");
    Ok(())
}

/// A window for all layers, where there is one.
fn windowed(keys: &mut Keys<'_, '_>, family: &'static str) -> Result<&'static str, GgufError> {
    let window = keys.count("attention.sliding_window")?.filter(|window| *window > 0);
    keys.set("sliding_window", json!(window));
    keys.came_from("sliding_window", "attention.sliding_window");
    Ok(family)
}

/// Llama, Mistral and Mixtral go by one name.
fn llama(keys: &mut Keys<'_, '_>) -> Result<&'static str, GgufError> {
    let experts = keys.count("expert_count")?.filter(|count| *count > 0);
    let used = keys.count("expert_used_count")?;
    if let Some(experts) = experts {
        keys.set("num_local_experts", json!(experts));
        keys.set("num_experts_per_tok", json!(used));
        return windowed(keys, "mixtral");
    }
    let windows = keys.count("attention.sliding_window")?.is_some_and(|window| window > 0);
    if windows {
        return windowed(keys, "mistral");
    }
    let biased = keys.gguf().tensor("blk.0.attn_q.bias").is_some();
    keys.set("attention_bias", json!(biased));
    Ok("llama")
}

fn experts(keys: &mut Keys<'_, '_>, count: &'static str) -> Result<(), GgufError> {
    keys.copy("expert_count", count)?;
    keys.copy("expert_used_count", "num_experts_per_tok")
}

fn qwen2_moe(keys: &mut Keys<'_, '_>) -> Result<&'static str, GgufError> {
    experts(keys, "num_experts")?;
    keys.copy("expert_feed_forward_length", "moe_intermediate_size")?;
    keys.copy("expert_shared_feed_forward_length", "shared_expert_intermediate_size")?;
    if keys.known("shared_expert_intermediate_size").is_none() {
        let shared = keys.gguf().tensor("blk.0.ffn_gate_shexp.weight");
        let width = shared.and_then(|info| info.shape.first().copied());
        keys.set("shared_expert_intermediate_size", json!(width));
    }
    let renormalise = keys.truth("expert_weights_norm")?.unwrap_or(false);
    keys.set("norm_topk_prob", json!(renormalise));
    Ok("qwen2_moe")
}

fn qwen3_moe(keys: &mut Keys<'_, '_>) -> Result<&'static str, GgufError> {
    experts(keys, "num_experts")?;
    keys.copy("expert_feed_forward_length", "moe_intermediate_size")?;
    // All that were published do, and the format's own runtime takes it for granted.
    let renormalise = keys.truth("expert_weights_norm")?.unwrap_or(true);
    keys.set("norm_topk_prob", json!(renormalise));
    Ok("qwen3_moe")
}

fn gpt_oss(keys: &mut Keys<'_, '_>) -> Result<&'static str, GgufError> {
    experts(keys, "num_local_experts")?;
    // Dense networks it has none.
    keys.copy("expert_feed_forward_length", "intermediate_size")?;
    keys.copy("attention.sliding_window", "sliding_window")?;
    pattern(keys, 2, 0)?;
    // The published models do not round the ends of YaRN's ramp, and the format has no key for it.
    keys.amend("rope_scaling", "truncate", json!(false));
    Ok("gpt_oss")
}

/// `layer_types` from the pattern of windows: every so many layers one without, counted so that
/// layer `first` has a window; or a list, one entry for each layer.
fn pattern(keys: &mut Keys<'_, '_>, every: u64, first: u64) -> Result<(), GgufError> {
    const KEY: &str = "attention.sliding_window_pattern";
    let layers = keys.known("num_hidden_layers").and_then(Json::as_u64).unwrap_or(0);
    let layers = layers.min(limits::LAYERS as u64);
    let value = keys.value(KEY);
    let listed = value.and_then(|value| value.array());
    let sliding: Option<Vec<bool>> = match (value, listed) {
        (Some(_), Some(list)) if list.len() as u64 == layers => {
            list.values().map(|value| value.truth()).collect()
        }
        (Some(value), None) => value
            .whole()
            .filter(|every| *every > 0)
            .map(|every| (first..first + layers).map(|layer| (layer + 1) % every != 0).collect()),
        (Some(_), Some(_)) => None,
        (None, _) => Some((first..first + layers).map(|layer| (layer + 1) % every != 0).collect()),
    };
    let Some(sliding) = sliding else {
        let problem = "is neither a number nor one truth value for each layer";
        return Err(keys.gguf().bad_key(&keys.path(KEY), problem));
    };
    let name = |sliding: &bool| if *sliding { "sliding_attention" } else { "full_attention" };
    keys.set("layer_types", json!(sliding.iter().map(name).collect::<Vec<_>>()));
    keys.came_from("layer_types", KEY);
    Ok(())
}

/// What both versions of Gemma share. In their largest models queries are scaled by the width of
/// the stream per head, in the others by that of a head.
fn gemma(keys: &mut Keys<'_, '_>, large: usize) -> Result<(), GgufError> {
    keys.copy("attention.sliding_window", "sliding_window")?;
    keys.copy("attn_logit_softcapping", "attn_logit_softcapping")?;
    keys.copy("final_logit_softcapping", "final_logit_softcapping")?;
    heads(keys)?;
    let whole = |field: &str| keys.known(field).and_then(Json::as_u64);
    let by_hidden = whole("hidden_size").zip(whole("num_attention_heads"));
    let by_hidden = by_hidden.and_then(|(hidden, heads)| hidden.checked_div(heads));
    let scalar = match whole("num_hidden_layers") == Some(large as u64) {
        true => by_hidden,
        false => whole("head_dim"),
    };
    keys.set("query_pre_attn_scalar", json!(scalar));
    Ok(())
}

fn gemma2(keys: &mut Keys<'_, '_>) -> Result<&'static str, GgufError> {
    gemma(keys, GEMMA2_LARGE)?;
    pattern(keys, 2, 0)?;
    Ok("gemma2")
}

fn gemma3(keys: &mut Keys<'_, '_>) -> Result<&'static str, GgufError> {
    gemma(keys, GEMMA3_LARGE)?;
    pattern(keys, GEMMA3_PATTERN, 0)?;
    let local = keys.number("rope.freq_base_swa")?.unwrap_or(GEMMA3_LOCAL_THETA);
    let mut global = match keys.take("rope_scaling") {
        Some(Json::Object(map)) => map,
        _ => Map::from_iter([("rope_type".to_owned(), json!("default"))]),
    };
    global.extend(keys.take("rope_theta").map(|theta| ("rope_theta".to_owned(), theta)));
    let local = json!({ "rope_type": "default", "rope_theta": local });
    let both = json!({ "full_attention": global, "sliding_attention": local });
    keys.set("rope_parameters", both);
    keys.came_from("rope_parameters", "rope");
    Ok("gemma3_text")
}

/// DeepSeek V2 and V3, told apart by how the router scores.
fn deepseek(keys: &mut Keys<'_, '_>) -> Result<&'static str, GgufError> {
    let v3 = match keys.count("expert_gating_func")? {
        None | Some(0 | 1) => false,
        Some(2) => true,
        Some(_) => {
            let key = keys.path("expert_gating_func");
            return Err(keys.gguf().bad_key(&key, "is neither 1 (softmax) nor 2 (sigmoid)"));
        }
    };
    latent(keys)?;
    let pairs = [
        ("expert_count", "n_routed_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_shared_count", "n_shared_experts"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("leading_dense_block_count", "first_k_dense_replace"),
    ];
    for (key, field) in pairs {
        keys.copy(key, field)?;
    }
    let scale = keys.number("expert_weights_scale")?.unwrap_or(1.0);
    keys.set("routed_scaling_factor", json!(scale));
    keys.came_from("routed_scaling_factor", "expert_weights_scale");
    let renormalise = keys.truth("expert_weights_norm")?.unwrap_or(false);
    keys.set("norm_topk_prob", json!(renormalise));
    keys.came_from("norm_topk_prob", "expert_weights_norm");
    let groups = keys.count("expert_group_count")?.unwrap_or(1);
    let kept = keys.count("expert_group_used_count")?.unwrap_or(groups);
    keys.set("n_group", json!(groups));
    keys.set("topk_group", json!(kept));
    keys.came_from("n_group", "expert_group_count");
    keys.came_from("topk_group", "expert_group_used_count");
    if v3 {
        keys.set("num_nextn_predict_layers", json!(0));
        return Ok("deepseek_v3");
    }
    let method = if kept < groups { "group_limited_greedy" } else { "greedy" };
    keys.set("topk_method", json!(method));
    Ok("deepseek_v2")
}

/// Widths of latent attention. Newer files name the widths of the cache, as if all heads shared
/// one key, and those of the heads under names of their own.
fn latent(keys: &mut Keys<'_, '_>) -> Result<(), GgufError> {
    let query = keys.count("attention.q_lora_rank")?.filter(|rank| *rank > 0);
    keys.set("q_lora_rank", json!(query));
    keys.copy("attention.kv_lora_rank", "kv_lora_rank")?;
    keys.copy("rope.dimension_count", "qk_rope_head_dim")?;
    let rope = keys.count("rope.dimension_count")?.unwrap_or(0);
    let plain = (keys.count("attention.key_length")?, keys.count("attention.value_length")?);
    let own = (keys.count("attention.key_length_mla")?, keys.count("attention.value_length_mla")?);
    let shared = keys.count("attention.head_count_kv")?;
    let (key, value) = if own.0.is_some() { own } else { plain };
    let rank = keys.known("kv_lora_rank").and_then(Json::as_u64).unwrap_or(0);
    let heads = keys.known("num_attention_heads").and_then(Json::as_u64);
    let expected = if own.0.is_some() { Some(1) } else { heads };
    if shared.is_some_and(|shared| Some(shared as u64) != expected) {
        let key = keys.path("attention.head_count_kv");
        return Err(keys.gguf().bad_key(&key, "is not what latent attention has"));
    }
    let cached = |width: Option<usize>, more: u64| {
        own.0.is_none() || width.is_none_or(|width| width as u64 == rank + more)
    };
    if !cached(plain.0, rope as u64) || !cached(plain.1, 0) {
        let key = keys.path("attention.key_length");
        return Err(keys.gguf().bad_key(&key, "is not the cached latent's width"));
    }
    keys.set("qk_nope_head_dim", json!(key.and_then(|key| key.checked_sub(rope))));
    keys.came_from("qk_nope_head_dim", "attention.key_length");
    keys.set("v_head_dim", json!(value));
    keys.came_from("v_head_dim", "attention.value_length");
    // A tenth of what both fields of the config say.
    let multiplier = keys.number("rope.scaling.yarn_log_multiplier")?;
    if keys.known("rope_scaling").is_some_and(|scaling| scaling["rope_type"] == "yarn") {
        let Some(multiplier) = multiplier else {
            let key = keys.path("rope.scaling.yarn_log_multiplier");
            return Err(keys.gguf().bad_key(&key, "is missing beside YaRN"));
        };
        let both = (multiplier * 1e7).round() / 1e6;
        keys.amend("rope_scaling", "mscale", json!(both));
        keys.amend("rope_scaling", "mscale_all_dim", json!(both));
    }
    Ok(())
}
