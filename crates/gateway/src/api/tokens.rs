//! POST /tokenize and /detokenize, in vLLM's shapes.

use serde_json::{Value, json};

use super::chat::Conversation;
use super::fields::{Fields, Prompt};
use super::options::Rules;
use crate::error::ApiError;
use crate::tokenizer::Tokenizer;

/// What is to be tokenised.
pub(crate) enum Input {
    Text { text: String, add_special: bool },
    Chat(Conversation),
}

/// A /tokenize request.
pub(crate) struct TokenizeRequest {
    pub(crate) input: Input,
    return_strings: bool,
}

impl TokenizeRequest {
    /// Of what is left of a body.
    pub(crate) fn take(mut fields: Fields, rules: &Rules<'_>) -> Result<Self, ApiError> {
        let return_strings = fields.flag("return_token_strs")?.unwrap_or(false);
        let input = if fields.has_prompt() {
            let add_special = fields.flag("add_special_tokens")?.unwrap_or(true);
            let mut prompts = fields.prompts()?;
            match prompts.pop() {
                Some(Prompt::Text(text)) => Input::Text { text, add_special },
                _ => return Err(ApiError::invalid("prompt", "'prompt' must be a string")),
            }
        } else {
            fields.refuse(&["add_special_tokens", "tools"], &Value::Null)?;
            Input::Chat(Conversation::take(&mut fields, rules)?)
        };
        fields.finish()?;
        Ok(Self { input, return_strings })
    }

    /// The answer for these ids.
    pub(crate) fn answer(&self, ids: &[u32], tokenizer: &Tokenizer, context: usize) -> Value {
        let strings = || ids.iter().map(|id| tokenizer.token_text(*id)).collect::<Vec<_>>();
        json!({
            "count": ids.len(),
            "max_model_len": context,
            "tokens": ids,
            "token_strs": self.return_strings.then(strings),
        })
    }
}

/// A /detokenize request.
pub(crate) struct DetokenizeRequest {
    pub(crate) ids: Vec<u32>,
}

impl DetokenizeRequest {
    /// Of what is left of a body.
    pub(crate) fn take(mut fields: Fields, rules: &Rules<'_>) -> Result<Self, ApiError> {
        let ids = fields.ids("tokens", rules.limits.body_bytes, rules.vocab)?;
        let ids = ids.ok_or_else(|| ApiError::missing("tokens"))?;
        fields.finish()?;
        Ok(Self { ids })
    }
}
