//! POST /v1/chat/completions: what is asked and what is answered.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::completions::check_length;
use super::fields::Fields;
use super::options::{Options, Rules};
use super::shape::{Identity, Naming, Usage, finish, ids};
use crate::error::ApiError;
use crate::generate::Piece;
use crate::template::is_reserved;
use crate::tokenizer::Tokenizer;

/// Messages and how the template shall treat them.
#[derive(Debug, Clone)]
pub(crate) struct Conversation {
    pub(crate) messages: Vec<Value>,
    pub(crate) add_generation_prompt: bool,
    pub(crate) continue_final: bool,
    pub(crate) variables: Map<String, Value>,
}

impl Conversation {
    pub(crate) fn take(fields: &mut Fields, rules: &Rules<'_>) -> Result<Self, ApiError> {
        let list = fields.list("messages")?.ok_or_else(|| ApiError::missing("messages"))?;
        let messages = super::messages::take(list, rules.limits.messages)?;
        let continue_final = fields.flag("continue_final_message")?.unwrap_or(false);
        let add = fields.flag("add_generation_prompt")?;
        if continue_final && add == Some(true) {
            let message = "an answer cannot both continue the final message and begin a new one";
            return Err(ApiError::invalid("continue_final_message", message));
        }
        let variables = fields.object("chat_template_kwargs")?.unwrap_or_default();
        if let Some(name) = variables.keys().find(|name| is_reserved(name)) {
            let message = "'chat_template_kwargs' may not set what the server sets";
            tracing::debug!(%name, "a reserved template variable");
            return Err(ApiError::invalid("chat_template_kwargs", message));
        }
        let add_generation_prompt = add.unwrap_or(!continue_final);
        Ok(Self { messages, add_generation_prompt, continue_final, variables })
    }
}

/// A chat request, checked as far as it can be without its tokens.
#[derive(Debug, Clone)]
pub(crate) struct ChatRequest {
    pub(crate) conversation: Conversation,
    pub(crate) options: Options,
    /// With this many alternatives.
    pub(crate) logprobs: Option<u8>,
    max_tokens: Option<usize>,
}

impl ChatRequest {
    /// Of what is left of the body of a request for `model`.
    pub(crate) fn take(
        mut fields: Fields,
        model: String,
        rules: &Rules<'_>,
    ) -> Result<Self, ApiError> {
        let options = Options::take(&mut fields, model, rules)?;
        let conversation = Conversation::take(&mut fields, rules)?;
        fields.refuse(&["echo"], &Value::Null)?;
        // False by default and so set by clients that know vLLM: the template has them already.
        fields.refuse(&["add_special_tokens"], &Value::Null)?;
        let wanted = fields.flag("logprobs")?.unwrap_or(false);
        let top = fields.integer("top_logprobs", 0..=20)?;
        if top.is_some_and(|top| top > 0) && !wanted {
            let message = "'top_logprobs' needs 'logprobs' to be true";
            return Err(ApiError::invalid("top_logprobs", message));
        }
        let old = fields.count("max_tokens", 1, usize::MAX)?;
        let new = fields.count("max_completion_tokens", 1, usize::MAX)?;
        fields.finish()?;
        let top = u8::try_from(top.unwrap_or(0)).unwrap_or(0);
        let logprobs = wanted.then_some(top);
        Ok(Self { conversation, options, logprobs, max_tokens: new.or(old) })
    }

    /// Tokens to generate after a prompt of this length: by default as many as fit.
    pub(crate) fn max_tokens(&self, prompt: usize, context: usize) -> Result<usize, ApiError> {
        let left = context.saturating_sub(prompt).max(1);
        let wanted = self.max_tokens.unwrap_or(left);
        check_length("messages", prompt, wanted, context)?;
        Ok(wanted)
    }
}

/// Writes the answers of one chat request.
#[derive(Clone)]
pub(crate) struct ChatWriter {
    pub(crate) identity: Identity,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) as_ids: bool,
    pub(crate) logprobs: bool,
    /// The prompt's ids, where ids are to be returned.
    pub(crate) prompt_ids: Option<Arc<Vec<u32>>>,
}

const CHUNK: &str = "chat.completion.chunk";

impl ChatWriter {
    fn choice(&self, index: usize, name: &str, message: Value) -> Map<String, Value> {
        let mut choice = Map::new();
        choice.insert("index".into(), json!(index));
        choice.insert(name.into(), message);
        choice.insert("logprobs".into(), Value::Null);
        finish(&mut choice, None);
        choice
    }

    fn add_tokens(&self, choice: &mut Map<String, Value>, piece: &Piece) {
        if self.logprobs && !piece.tokens.is_empty() {
            let naming = Naming { tokenizer: &self.tokenizer, as_ids: self.as_ids };
            choice.insert("logprobs".into(), naming.chat(&piece.tokens));
        }
        if self.prompt_ids.is_some() {
            choice.insert("token_ids".into(), ids(&piece.tokens));
        }
    }

    fn add_prompt(&self, body: &mut Map<String, Value>) {
        if let Some(prompt) = &self.prompt_ids {
            body.insert("prompt_token_ids".into(), json!(prompt.as_slice()));
        }
    }

    /// The body of an answer that is not streamed; one piece per choice, in order.
    pub(crate) fn whole(&self, pieces: &[Piece], usage: Usage) -> Value {
        let choice = |piece: &Piece| {
            let message = json!({"role": "assistant", "content": piece.text, "refusal": null});
            let mut choice = self.choice(piece.index, "message", message);
            self.add_tokens(&mut choice, piece);
            finish(&mut choice, piece.finish.as_ref());
            Value::Object(choice)
        };
        let choices = pieces.iter().map(choice).collect();
        let mut body = self.identity.body("chat.completion", choices);
        body.insert("usage".into(), usage.json());
        self.add_prompt(&mut body);
        Value::Object(body)
    }

    /// The first chunk of a choice: the role.
    pub(crate) fn role(&self, index: usize) -> Map<String, Value> {
        let delta = json!({"role": "assistant", "content": ""});
        let choice = Value::Object(self.choice(index, "delta", delta));
        let mut body = self.identity.body(CHUNK, vec![choice]);
        self.add_prompt(&mut body);
        body
    }

    /// A chunk with text.
    pub(crate) fn delta(&self, piece: &Piece) -> Map<String, Value> {
        let mut choice = self.choice(piece.index, "delta", json!({"content": piece.text}));
        self.add_tokens(&mut choice, piece);
        self.identity.body(CHUNK, vec![Value::Object(choice)])
    }

    /// The last chunk of a choice: an empty delta and why it ended.
    pub(crate) fn finish(&self, piece: &Piece) -> Map<String, Value> {
        let mut choice = self.choice(piece.index, "delta", json!({}));
        finish(&mut choice, piece.finish.as_ref());
        self.identity.body(CHUNK, vec![Value::Object(choice)])
    }

    /// The last chunk of all, with the counts.
    pub(crate) fn usage(&self) -> Map<String, Value> {
        self.identity.body(CHUNK, Vec::new())
    }
}
