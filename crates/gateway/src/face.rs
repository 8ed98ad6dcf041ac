//! What turns a model's texts into tokens and back, and what its requests are checked against: one
//! face for each model that a gateway has.

use std::sync::Arc;
use std::time::SystemTime;

use engine::{Request, StopRules};
use serde_json::Value;

use crate::api::chat::{ChatRequest, Conversation};
use crate::api::completions::CompletionsRequest;
use crate::api::fields::Prompt;
use crate::api::options::{Options, Rules};
use crate::config::{GatewayError, RequestLimits, ServedModel};
use crate::defaults::SamplingDefaults;
use crate::error::ApiError;
use crate::gateway::Gateway;
use crate::generate::{Job, TextRules};
use crate::specials::Marker;
use crate::template::{ChatTemplate, Rendering};
use crate::tokenizer::Tokenizer;
use crate::view::Named;

/// A model as its clients see it.
pub(crate) struct Face {
    pub(crate) digest: String,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// Tokens of prompt and answer together, where no deployment says.
    pub(crate) context: usize,
    template: Option<Arc<ChatTemplate>>,
    defaults: SamplingDefaults,
    vocab: usize,
    eos: Vec<u32>,
}

impl Face {
    pub(crate) fn new(model: &ServedModel, limits: &RequestLimits) -> Result<Self, GatewayError> {
        let files = &model.files;
        let tokenizer = Tokenizer::new(&files.tokenizer_json)?;
        let mut template = ChatTemplate::new(files, limits)?;
        if let Some(template) = &mut template {
            let spelled = |id: Option<u32>| id.and_then(|id| tokenizer.name(id));
            template.name_token("bos_token", spelled(model.bos));
            template.name_token("eos_token", spelled(model.eos.first().copied()));
        }
        Ok(Self {
            digest: model.digest.clone(),
            tokenizer: Arc::new(tokenizer),
            context: model.context,
            template: template.map(Arc::new),
            defaults: SamplingDefaults::new(files.generation_config.as_deref())?,
            vocab: model.vocab,
            eos: model.eos.clone(),
        })
    }

    /// Whether a deployment is of this model.
    pub(crate) fn is_of(&self, named: &Named) -> bool {
        self.digest == named.digest
    }
}

/// What the name in a request means. Decided once, at its start: an alias that moves on meanwhile
/// takes no request with it.
pub(crate) struct Meant {
    pub(crate) face: Arc<Face>,
    pub(crate) named: Named,
}

impl Meant {
    /// For a new request: refuses what gets none.
    ///
    /// # Errors
    /// 503: the deployment is being drained.
    pub(crate) fn fresh(self) -> Result<Self, ApiError> {
        match self.named.draining {
            true => Err(ApiError::unavailable("the model is being taken away".to_owned())),
            false => Ok(self),
        }
    }

    /// What requests are checked against.
    pub(crate) fn rules<'a>(&'a self, limits: &'a RequestLimits, seed: Option<u64>) -> Rules<'a> {
        let (defaults, vocab) = (&self.face.defaults, self.face.vocab);
        Rules { limits, defaults, vocab, context: self.named.context, seed }
    }

    /// Ids of completions prompts, in order. Ids that were sent are checked.
    pub(crate) async fn prompt_ids(
        &self,
        gateway: &Gateway,
        prompts: Vec<Prompt>,
        add_special: bool,
    ) -> Result<Vec<Arc<Vec<u32>>>, ApiError> {
        let tokenizer = Arc::clone(&self.face.tokenizer);
        let (vocab, context) = (self.face.vocab, self.named.context);
        let known = move |id: &u32| usize::try_from(*id).is_ok_and(|id| id < vocab);
        gateway
            .tokenizing(move || {
                let ids = |prompt| match prompt {
                    Prompt::Text(text) => {
                        tokenizer.check_size("prompt", &text, context)?;
                        tokenizer.encode(&text, add_special).map(Arc::new)
                    }
                    Prompt::Ids(ids) if ids.iter().all(known) => Ok(Arc::new(ids)),
                    Prompt::Ids(_) => {
                        let message = format!("'prompt' must hold token ids below {vocab}");
                        Err(ApiError::invalid("prompt", message))
                    }
                };
                prompts.into_iter().map(ids).collect()
            })
            .await
    }

    /// Ids of a chat as the model's template writes it.
    pub(crate) async fn chat_ids(
        &self,
        gateway: &Gateway,
        chat: Conversation,
    ) -> Result<Arc<Vec<u32>>, ApiError> {
        let tokenizer = Arc::clone(&self.face.tokenizer);
        let Some(template) = self.face.template.clone() else {
            let message = "this model has no chat template; use /v1/completions";
            return Err(ApiError::invalid("messages", message));
        };
        let (now, context) = (SystemTime::now(), self.named.context);
        let ids = move || {
            let marker = tokenizer.marker();
            let text = chat_text(chat, &template, (&tokenizer, &marker), now)?;
            tokenizer.check_size("messages", &marker.strip(&text).0, context)?;
            tokenizer.encode_chat(&text, &marker).map(Arc::new)
        };
        gateway.tokenizing(ids).await
    }

    /// The sequences of a completions request: those of prompt `p` are `p * n ..`.
    pub(crate) fn completion_jobs(
        &self,
        request: &CompletionsRequest,
        prompts: &[Arc<Vec<u32>>],
    ) -> Result<Vec<Job>, ApiError> {
        let mut jobs = Vec::new();
        for (ids, sent) in prompts.iter().zip(&request.prompts) {
            let max_tokens = request.max_tokens(ids.len(), self.named.context)?;
            let echo = request.echo.then(|| match sent {
                Prompt::Text(text) => Some(text.clone()),
                Prompt::Ids(_) => None,
            });
            let prompt_logprobs = request.logprobs.filter(|_| request.echo);
            self.add_jobs(&mut jobs, &request.options, ids, |request_of, text| {
                request_of.stop.max_tokens = max_tokens;
                request_of.logprobs = request.logprobs;
                request_of.prompt_logprobs = prompt_logprobs;
                text.echo.clone_from(&echo);
            })?;
        }
        Ok(jobs)
    }

    /// The sequences of a chat request.
    pub(crate) fn chat_jobs(
        &self,
        request: &ChatRequest,
        ids: &Arc<Vec<u32>>,
    ) -> Result<Vec<Job>, ApiError> {
        let max_tokens = request.max_tokens(ids.len(), self.named.context)?;
        let mut jobs = Vec::new();
        self.add_jobs(&mut jobs, &request.options, ids, |request_of, _| {
            request_of.stop.max_tokens = max_tokens;
            request_of.logprobs = request.logprobs;
        })?;
        Ok(jobs)
    }

    fn add_jobs(
        &self,
        jobs: &mut Vec<Job>,
        options: &Options,
        prompt: &Arc<Vec<u32>>,
        complete: impl Fn(&mut Request, &mut TextRules),
    ) -> Result<(), ApiError> {
        let eos = if options.ignore_eos { &[][..] } else { &self.face.eos };
        let stop_ids = eos.iter().chain(&options.stop_ids).copied().collect();
        let mut request = Request {
            prompt: prompt.to_vec(),
            sampling: options.sampling.clone(),
            stop: StopRules { max_tokens: 0, min_tokens: options.min_tokens, stop_ids },
            logprobs: None,
            prompt_logprobs: None,
        };
        let mut text = TextRules {
            stops: options.stops.clone(),
            include_stop: options.include_stop,
            skip_special: options.skip_special,
            echo: None,
        };
        complete(&mut request, &mut text);
        if request.stop.min_tokens > request.stop.max_tokens {
            let message = format!(
                "'min_tokens' must be at most the {} tokens to generate",
                request.stop.max_tokens
            );
            return Err(ApiError::invalid("min_tokens", message));
        }
        for choice in 0..options.choices {
            request.sampling.choice = u32::try_from(choice).unwrap_or(u32::MAX);
            jobs.push(Job {
                index: jobs.len(),
                request: request.clone(),
                text: text.clone(),
                named_stops: options.stop_ids.clone(),
            });
        }
        Ok(())
    }
}

/// Renders a chat. Texts of the caller are guarded against control tokens.
pub(crate) fn chat_text(
    mut chat: Conversation,
    template: &ChatTemplate,
    (tokenizer, marker): (&Tokenizer, &Marker),
    now: SystemTime,
) -> Result<String, ApiError> {
    for message in &mut chat.messages {
        for (name, value) in message.as_object_mut().into_iter().flatten() {
            if name != "role" {
                guard(value, &|text| tokenizer.guard(text, marker));
            } else if *value == "developer" && !template.knows_developer() {
                *value = Value::from("system");
            }
        }
    }
    for (_, value) in &mut chat.variables {
        guard(value, &|text| tokenizer.guard(text, marker));
    }
    let rendering = Rendering {
        messages: &chat.messages,
        tools: &[],
        add_generation_prompt: chat.add_generation_prompt,
        continue_final: chat.continue_final,
        variables: &chat.variables,
        now,
    };
    template.render(&rendering)
}

/// Guards every string in a value.
fn guard(value: &mut Value, with: &impl Fn(&str) -> String) {
    match value {
        Value::String(text) => *text = with(text),
        Value::Array(items) => items.iter_mut().for_each(|item| guard(item, with)),
        Value::Object(fields) => {
            let entries = std::mem::take(fields).into_iter();
            *fields = entries
                .map(|(name, mut value)| {
                    guard(&mut value, with);
                    (with(&name), value)
                })
                .collect();
        }
        _ => {}
    }
}
