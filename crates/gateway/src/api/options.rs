//! The parameters that completions and chat share.

use engine::Sampling;
use serde_json::{Value, json};

use super::fields::{Fields, known_id};
use crate::config::RequestLimits;
use crate::defaults::SamplingDefaults;
use crate::error::ApiError;

/// What a request is checked against.
pub(crate) struct Rules<'a> {
    pub(crate) limits: &'a RequestLimits,
    pub(crate) defaults: &'a SamplingDefaults,
    pub(crate) vocab: usize,
    pub(crate) context: usize,
    /// The seed of a request that names none, where it must be this one.
    pub(crate) seed: Option<u64>,
}

/// What a stream shall carry beside text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct StreamOptions {
    /// A last chunk with the token counts.
    pub(crate) usage: bool,
    /// The counts so far in every chunk.
    pub(crate) continuous: bool,
}

/// Shared parameters, checked.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// As typed, and one of the served names.
    pub(crate) model: String,
    pub(crate) choices: usize,
    /// With the request's seed; each sequence sets its own `choice`.
    pub(crate) sampling: Sampling,
    pub(crate) stops: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) stop_ids: Vec<u32>,
    pub(crate) ignore_eos: bool,
    pub(crate) min_tokens: usize,
    pub(crate) skip_special: bool,
    pub(crate) return_ids: bool,
    pub(crate) tokens_as_ids: bool,
    /// None: one answer in one body.
    pub(crate) stream: Option<StreamOptions>,
}

impl Options {
    /// Of a request for `model`.
    pub(crate) fn take(
        fields: &mut Fields,
        model: String,
        rules: &Rules<'_>,
    ) -> Result<Self, ApiError> {
        fields.ignore(&[
            "user",
            "metadata",
            "service_tier",
            "prompt_cache_key",
            "safety_identifier",
            "parallel_tool_calls",
            "request_id",
            "session_id",
            "include_reasoning",
        ]);
        refuse_unsupported(fields)?;
        let limits = rules.limits;
        let choices = fields.count("n", 1, limits.choices)?.unwrap_or(1);
        if fields.count("best_of", 1, usize::MAX)?.is_some_and(|best| best != choices) {
            let message = "'best_of' must equal 'n': ranking of answers is not supported";
            return Err(ApiError::invalid("best_of", message));
        }
        Ok(Self {
            model,
            choices,
            sampling: sampling(fields, rules)?,
            stops: stops(fields, limits)?,
            include_stop: fields.flag("include_stop_str_in_output")?.unwrap_or(false),
            stop_ids: fields
                .ids("stop_token_ids", limits.stop_ids, rules.vocab)?
                .unwrap_or_default(),
            ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
            min_tokens: fields.count("min_tokens", 0, rules.context)?.unwrap_or(0),
            skip_special: fields.flag("skip_special_tokens")?.unwrap_or(true),
            return_ids: fields.flag("return_token_ids")?.unwrap_or(false),
            tokens_as_ids: fields.flag("return_tokens_as_token_ids")?.unwrap_or(false),
            stream: stream(fields)?,
        })
    }
}

fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    let names = [
        "suffix",
        "store",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "guided_decoding_backend",
        "guided_whitespace_pattern",
        "structured_outputs",
        "tools",
        "functions",
        "function_call",
        "audio",
        "prediction",
        "web_search_options",
        "reasoning_effort",
        "verbosity",
        "moderation",
        "prompt_logprobs",
        "logprob_token_ids",
        "allowed_token_ids",
        "bad_words",
        "truncate_prompt_tokens",
        "documents",
        "chat_template",
        "cache_salt",
        "kv_transfer_params",
        "thinking_token_budget",
        "use_beam_search",
        "early_stopping",
        "prompt_embeds",
        "lora_request",
    ];
    fields.refuse(&names, &Value::Null)?;
    fields.refuse(&["response_format"], &json!({"type": "text"}))?;
    fields.refuse(&["modalities"], &json!(["text"]))?;
    fields.refuse(&["spaces_between_special_tokens"], &json!(true))?;
    fields.refuse(&["priority"], &json!(0))?;
    if fields.number("length_penalty", 1.0..=1.0).is_err() {
        return Err(ApiError::unsupported("length_penalty"));
    }
    match fields.take("tool_choice") {
        Some(choice) if choice != "none" && choice != "auto" => {
            Err(ApiError::unsupported("tool_choice"))
        }
        _ => Ok(()),
    }
}

fn sampling(fields: &mut Fields, rules: &Rules<'_>) -> Result<Sampling, ApiError> {
    let defaults = rules.defaults;
    let above_zero = f32::MIN_POSITIVE;
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?;
    let top_k = top_k.map(|k| u32::try_from(k).unwrap_or(0));
    let penalty = fields.number("repetition_penalty", above_zero..=100.0)?;
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0..=100.0)?.unwrap_or(defaults.temperature),
        top_k: top_k.unwrap_or(defaults.top_k),
        top_p: fields.number("top_p", above_zero..=1.0)?.unwrap_or(defaults.top_p),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(defaults.min_p),
        repetition_penalty: penalty.unwrap_or(defaults.repetition_penalty),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        logit_bias: logit_bias(fields, rules)?,
        seed: match fields.integer("seed", i64::MIN..=i64::MAX)? {
            Some(seed) => seed.cast_unsigned(),
            None => rules.seed.unwrap_or_else(random),
        },
        choice: 0,
    })
}

/// A seed for a request that names none.
fn random() -> u64 {
    // A version-4 id has fixed bits in either half; folded, 64 bits of it are random.
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    high.rotate_left(32) ^ low
}

fn logit_bias(fields: &mut Fields, rules: &Rules<'_>) -> Result<Vec<(u32, f32)>, ApiError> {
    let name = "logit_bias";
    let Some(map) = fields.object(name)? else { return Ok(Vec::new()) };
    let most = rules.limits.logit_bias;
    if map.len() > most {
        let message = format!("'{name}' may hold at most {most} entries");
        return Err(ApiError::invalid(name, message));
    }
    let mut biases = Vec::with_capacity(map.len());
    for (id, bias) in &map {
        let id = id.parse().ok().and_then(|id| known_id(id, rules.vocab));
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let Some((id, bias)) = id.zip(bias) else {
            let message = format!(
                "'{name}' must map token ids below {} to numbers from -100 to 100",
                rules.vocab
            );
            return Err(ApiError::invalid(name, message));
        };
        #[expect(clippy::cast_possible_truncation, reason = "logits are f32")]
        biases.push((id, bias as f32));
    }
    biases.sort_by_key(|(id, _)| *id);
    // "7" and "07" name the same token.
    if biases.windows(2).any(|pair| pair[0].0 == pair[1].0) {
        return Err(ApiError::invalid(name, format!("'{name}' names a token twice")));
    }
    Ok(biases)
}

fn stops(fields: &mut Fields, limits: &RequestLimits) -> Result<Vec<String>, ApiError> {
    let refused = || {
        let message = format!(
            "'stop' must be a string or a list of at most {} strings, each of 1 to {} bytes",
            limits.stops, limits.stop_bytes
        );
        ApiError::invalid("stop", message)
    };
    let list = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= limits.stops => list,
        Some(Value::Array(_)) => return Err(refused()),
        Some(one) => vec![one],
    };
    let mut stops = Vec::with_capacity(list.len());
    for value in list {
        match value {
            Value::String(stop) if (1..=limits.stop_bytes).contains(&stop.len()) => {
                stops.push(stop);
            }
            _ => return Err(refused()),
        }
    }
    Ok(stops)
}

fn stream(fields: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    let name = "stream_options";
    let stream = fields.flag("stream")?.unwrap_or(false);
    let Some(map) = fields.object(name)? else {
        return Ok(stream.then(StreamOptions::default));
    };
    if !stream {
        return Err(ApiError::invalid(name, format!("'{name}' needs 'stream' to be true")));
    }
    let mut options = StreamOptions::default();
    for (key, value) in &map {
        let flag = match value {
            Value::Bool(flag) => *flag,
            Value::Null => false,
            _ => {
                let message = format!("'{name}' must hold true or false values");
                return Err(ApiError::invalid(name, message));
            }
        };
        match key.as_str() {
            "include_usage" => options.usage = flag,
            "continuous_usage_stats" => options.continuous = flag,
            "include_obfuscation" => {}
            other => return Err(ApiError::unknown_field(&format!("{name}.{other}"))),
        }
    }
    // As elsewhere, the running counts are part of reporting usage at all.
    options.continuous &= options.usage;
    Ok(Some(options))
}
