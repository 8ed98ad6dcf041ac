//! POST /v1/completions: what is asked and what is answered.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::fields::{Fields, Prompt};
use super::options::{Options, Rules};
use super::shape::{Identity, Naming, Usage, finish, ids};
use crate::error::ApiError;
use crate::generate::Piece;

/// Where a request names no `max_tokens`.
const MAX_TOKENS: usize = 16;

/// A completions request, checked as far as it can be without its tokens.
#[derive(Debug, Clone)]
pub(crate) struct CompletionsRequest {
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) options: Options,
    pub(crate) echo: bool,
    pub(crate) logprobs: Option<u8>,
    /// None: the default, or what the context leaves of it.
    max_tokens: Option<usize>,
    /// The tokenizer adds its own control tokens to text prompts.
    pub(crate) add_special: bool,
}

impl CompletionsRequest {
    /// Of what is left of the body of a request for `model`.
    pub(crate) fn take(
        mut fields: Fields,
        model: String,
        rules: &Rules<'_>,
    ) -> Result<Self, ApiError> {
        let options = Options::take(&mut fields, model, rules)?;
        let echo = fields.flag("echo")?.unwrap_or(false);
        let logprobs = fields.integer("logprobs", 0..=20)?;
        let max_tokens = fields.count("max_tokens", 0, usize::MAX)?;
        if max_tokens == Some(0) && !echo {
            let message = "'max_tokens' must be at least 1 unless 'echo' is true";
            return Err(ApiError::invalid("max_tokens", message));
        }
        let request = Self {
            prompts: fields.prompts()?,
            options,
            echo,
            logprobs: logprobs.and_then(|n| u8::try_from(n).ok()),
            max_tokens,
            add_special: fields.flag("add_special_tokens")?.unwrap_or(true),
        };
        fields.finish()?;
        let sequences = request.prompts.len() * request.options.choices;
        if sequences > rules.limits.sequences {
            let most = rules.limits.sequences;
            let message = format!("prompts times 'n' may be at most {most}");
            return Err(ApiError::invalid("n", message));
        }
        Ok(request)
    }

    /// Tokens to generate after a prompt of this length.
    pub(crate) fn max_tokens(&self, prompt: usize, context: usize) -> Result<usize, ApiError> {
        let left = context.saturating_sub(prompt);
        let wanted = self.max_tokens.unwrap_or_else(|| MAX_TOKENS.min(left.max(1)));
        check_length("prompt", prompt, wanted, context)?;
        Ok(wanted)
    }
}

/// Refuses a prompt and an answer that do not fit the context together.
pub(crate) fn check_length(
    param: &str,
    prompt: usize,
    wanted: usize,
    context: usize,
) -> Result<(), ApiError> {
    if prompt == 0 {
        return Err(ApiError::invalid(param, "the prompt holds no token"));
    }
    if prompt.saturating_add(wanted) > context {
        let message = format!(
            "this model's context is {context} tokens: the prompt has {prompt} and {wanted} more \
             were asked for"
        );
        return Err(ApiError::too_long(param, message));
    }
    Ok(())
}

/// Writes the answers of one completions request.
#[derive(Clone)]
pub(crate) struct CompletionsWriter {
    pub(crate) identity: Identity,
    pub(crate) tokenizer: Arc<crate::tokenizer::Tokenizer>,
    pub(crate) as_ids: bool,
    pub(crate) logprobs: bool,
    /// Ids of the prompt of each choice, where ids are to be returned.
    pub(crate) prompt_ids: Option<Vec<Arc<Vec<u32>>>>,
}

impl CompletionsWriter {
    fn choice(&self, piece: &Piece, first: bool) -> Map<String, Value> {
        let mut choice = Map::new();
        choice.insert("index".into(), json!(piece.index));
        choice.insert("text".into(), json!(piece.text));
        let tokens: Vec<_> = piece.prompt.iter().chain(&piece.tokens).collect();
        let naming = Naming { tokenizer: &self.tokenizer, as_ids: self.as_ids };
        let logprobs = (self.logprobs && !tokens.is_empty()).then(|| naming.completion(&tokens));
        choice.insert("logprobs".into(), json!(logprobs));
        finish(&mut choice, piece.finish.as_ref());
        if let Some(prompts) = &self.prompt_ids {
            choice.insert("token_ids".into(), ids(&piece.tokens));
            let prompt = prompts.get(piece.index).filter(|_| first);
            choice.insert("prompt_token_ids".into(), json!(prompt.map(|ids| ids.as_slice())));
        }
        choice
    }

    /// The body of an answer that is not streamed; one piece per choice, in order.
    pub(crate) fn whole(&self, pieces: &[Piece], usage: Usage) -> Value {
        let choices = pieces.iter().map(|piece| Value::Object(self.choice(piece, true)));
        let mut body = self.identity.body("text_completion", choices.collect());
        body.insert("usage".into(), usage.json());
        Value::Object(body)
    }

    /// A chunk of a stream.
    pub(crate) fn chunk(&self, piece: &Piece, first: bool) -> Map<String, Value> {
        let choice = Value::Object(self.choice(piece, first));
        self.identity.body("text_completion", vec![choice])
    }

    /// The last chunk, with the counts.
    pub(crate) fn usage(&self) -> Map<String, Value> {
        self.identity.body("text_completion", Vec::new())
    }
}
