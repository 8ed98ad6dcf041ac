//! What the answers of completions and chat have in common: identity, counts, logprobs.

use serde_json::{Map, Value, json};

use crate::generate::{Finish, Shown, StoppedBy};
use crate::tokenizer::Tokenizer;

/// JSON holds no infinity; this is what others send for it.
const LEAST_LOGPROB: f32 = -9999.0;

/// Fields that every body or chunk of one response repeats.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
}

impl Identity {
    /// A body of the type `object`.
    pub(crate) fn body(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        let mut body = Map::new();
        body.insert("id".into(), json!(self.id));
        body.insert("object".into(), json!(object));
        body.insert("created".into(), json!(self.created));
        body.insert("model".into(), json!(self.model));
        body.insert("choices".into(), Value::Array(choices));
        body
    }
}

/// Tokens of a whole response.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    pub(crate) prompt: usize,
    pub(crate) completion: usize,
}

impl Usage {
    pub(crate) fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        })
    }
}

/// How tokens are named in logprobs.
#[derive(Clone, Copy)]
pub(crate) struct Naming<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    /// `token_id:N` instead of text.
    pub(crate) as_ids: bool,
}

impl Naming<'_> {
    fn name(&self, id: u32) -> String {
        if self.as_ids { format!("token_id:{id}") } else { self.tokenizer.token_text(id) }
    }

    /// The logprobs object of completions: parallel lists.
    pub(crate) fn completion(&self, tokens: &[&Shown]) -> Value {
        let (mut logprobs, mut tops) = (Vec::new(), Vec::new());
        for shown in tokens {
            let Some(found) = &shown.logprobs else {
                logprobs.push(Value::Null);
                tops.push(Value::Null);
                continue;
            };
            logprobs.push(number(found.logprob));
            let mut top = Map::new();
            // The token itself is always listed, also where others are likelier. Ids of the same
            // text share an entry: the likeliest one's.
            for (id, logprob) in found.top.iter().copied().chain([(found.token, found.logprob)]) {
                top.entry(self.name(id)).or_insert_with(|| number(logprob));
            }
            tops.push(Value::Object(top));
        }
        json!({
            "tokens": tokens.iter().map(|shown| self.name(shown.id)).collect::<Vec<_>>(),
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": tokens.iter().map(|shown| shown.offset).collect::<Vec<_>>(),
        })
    }

    /// The logprobs object of chats: a list of objects.
    pub(crate) fn chat(&self, tokens: &[Shown]) -> Value {
        let entry = |id: u32, logprob: f32| {
            let bytes = self.tokenizer.token_bytes(id);
            json!({"token": self.name(id), "logprob": number(logprob), "bytes": bytes})
        };
        let found = tokens.iter().filter_map(|shown| shown.logprobs.as_ref());
        let content: Vec<Value> = found
            .map(|found| {
                let mut token = entry(found.token, found.logprob);
                let top: Vec<Value> = found.top.iter().map(|(id, lp)| entry(*id, *lp)).collect();
                token["top_logprobs"] = Value::Array(top);
                token
            })
            .collect();
        json!({"content": content, "refusal": null})
    }
}

fn number(logprob: f32) -> Value {
    let finite = if logprob.is_nan() { LEAST_LOGPROB } else { logprob.max(LEAST_LOGPROB) };
    json!(finite)
}

/// `finish_reason` and `stop_reason` of a choice.
pub(crate) fn finish(choice: &mut Map<String, Value>, finish: Option<&Finish>) {
    let stopped_by = match finish.map(|finish| &finish.stopped_by) {
        None | Some(StoppedBy::Nothing) => Value::Null,
        Some(StoppedBy::Text(text)) => json!(text),
        Some(StoppedBy::Id(id)) => json!(id),
    };
    choice.insert("finish_reason".into(), json!(finish.map(|finish| finish.reason)));
    choice.insert("stop_reason".into(), stopped_by);
}

/// The ids of tokens.
pub(crate) fn ids(tokens: &[Shown]) -> Value {
    json!(tokens.iter().map(|shown| shown.id).collect::<Vec<_>>())
}
