//! What all requests share, and the way from a parsed request to its running sequences.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use engine::{Request, StopRules};
use futures::future::try_join_all;
use identity::Tls;
use serde_json::Value;
use tokio::sync::Semaphore;

use crate::api::chat::{ChatRequest, Conversation};
use crate::api::completions::CompletionsRequest;
use crate::api::fields::Prompt;
use crate::api::options::{Options, Rules};
use crate::clock::unix_seconds;
use crate::config::{GatewayConfig, GatewayError};
use crate::defaults::SamplingDefaults;
use crate::error::ApiError;
use crate::generate::{Context, Job, Sequence, TextRules};
use crate::health::Health;
use crate::idempotency::Answers;
use crate::leader::Leaders;
use crate::life::{Life, Vitals};
use crate::metrics::Metrics;
use crate::specials::Marker;
use crate::template::{ChatTemplate, Rendering};
use crate::tokenizer::Tokenizer;
use crate::view::{NoRoute, Outlook, View};
use crate::way::Ways;

/// How long a scrape waits for the group leader's counts.
const COUNTS_TIMEOUT: Duration = Duration::from_millis(500);

/// What all requests share.
pub(crate) struct Gateway {
    pub(crate) config: GatewayConfig,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) metrics: Metrics,
    /// Unix seconds of the start, which models carry as their date.
    pub(crate) created: u64,
    name: String,
    template: Option<Arc<ChatTemplate>>,
    defaults: SamplingDefaults,
    ways: Arc<Ways>,
    health: Health,
    pub(crate) answers: Answers,
    life: Life,
    tokenizing: Arc<Semaphore>,
    /// Room for request bodies, in KiB.
    pub(crate) bodies: Arc<Semaphore>,
}

impl Gateway {
    pub(crate) fn new(
        config: GatewayConfig,
        view: Box<dyn View>,
        vitals: Vitals,
        tls: Tls,
    ) -> Result<Self, GatewayError> {
        let name = config.served_names.first().ok_or(GatewayError::NoName)?.clone();
        let files = &config.files;
        let tokenizer = Tokenizer::new(&files.tokenizer_json)?;
        let mut template = ChatTemplate::new(files, &config.limits)?;
        if let Some(template) = &mut template {
            let spelled = |id: Option<u32>| id.and_then(|id| tokenizer.name(id));
            template.name_token("bos_token", spelled(config.bos));
            template.name_token("eos_token", spelled(config.eos.first().copied()));
        }
        let metrics = Metrics::new(&name);
        let (leaders, patience) = (Leaders::new(tls), config.limits.patience);
        let ways = Ways::new(view, leaders, metrics.clone(), patience);
        Ok(Self {
            tokenizer: Arc::new(tokenizer),
            created: unix_seconds(SystemTime::now()),
            template: template.map(Arc::new),
            defaults: SamplingDefaults::new(files.generation_config.as_deref())?,
            tokenizing: Arc::new(Semaphore::new(config.limits.tokenizing.max(1))),
            bodies: Arc::new(Semaphore::new(kib(config.limits.bodies_bytes) as usize)),
            ways: Arc::new(ways),
            health: Health::default(),
            answers: Answers::default(),
            life: Life::watch(vitals).map_err(GatewayError::Thread)?,
            name,
            metrics,
            config,
        })
    }

    /// What requests are checked against.
    pub(crate) fn rules(&self) -> Rules<'_> {
        Rules {
            limits: &self.config.limits,
            defaults: &self.defaults,
            vocab: self.config.vocab,
            context: self.config.context,
            seed: None,
        }
    }

    /// Names that requests may use: its own, and those of further deployments of the model.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names = self.config.served_names.clone();
        let more = self.ways.view().deployments(&self.config.digest);
        names.extend(more.into_iter().filter(|name| !self.config.served_names.contains(name)));
        names
    }

    /// Refuses names that are not served.
    pub(crate) fn check_model(&self, model: &str) -> Result<(), ApiError> {
        let served = self.config.served_names.iter().any(|name| name == model);
        if served || self.names().iter().any(|name| name == model) {
            Ok(())
        } else {
            Err(ApiError::no_model())
        }
    }

    /// The deployment that a name means: those of this gateway all mean its first one's.
    fn deployment<'a>(&'a self, model: &'a str) -> &'a str {
        let own = self.config.served_names.iter().any(|name| name == model);
        if own { &self.name } else { model }
    }

    /// Whether this gateway's own deployment serves or has served, or why it has not so far.
    pub(crate) fn started(&self) -> Result<(), ApiError> {
        match self.ways.route(&self.name) {
            Ok(_) | Err(NoRoute { outlook: Outlook::Returns, .. }) => Ok(()),
            Err(NoRoute { why, .. }) => {
                let parts = [vec![why], self.ways.view().loading(&self.name)].concat();
                let why = parts.join("; ");
                Err(ApiError::unavailable(format!("the model is not ready: {why}")))
            }
        }
    }

    /// Whether this process gets on, or what of it does not.
    pub(crate) fn alive(&self) -> Result<(), ApiError> {
        self.life.stalled().map_or(Ok(()), |why| Err(ApiError::stalled(why)))
    }

    /// Whether this gateway's own deployment would answer.
    pub(crate) async fn healthy(&self) -> Result<(), ApiError> {
        self.health.check(&self.ways, &self.name).await
    }

    /// The text of a scrape.
    pub(crate) async fn scrape(&self) -> String {
        let counts = match self.ways.route(&self.name) {
            Ok(route) => self.ways.counts(&route, COUNTS_TIMEOUT).await,
            Err(_) => None,
        };
        self.metrics.text(counts.as_ref())
    }

    /// Runs tokenising work on a thread of its own, a few at a time. A panic of the libraries on
    /// some text fails that request alone.
    pub(crate) async fn tokenizing<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let permit = Arc::clone(&self.tokenizing).acquire_owned().await;
        let failed = || ApiError::internal("the text could not be tokenised");
        let permit = permit.map_err(|_| failed())?;
        let job = tokio::task::spawn_blocking(move || {
            // Held by the thread: a client that leaves does not free a busy thread's place.
            let _permit = permit;
            work()
        });
        job.await.map_err(|_| failed())?
    }

    /// Ids of completions prompts, in order. Ids that were sent are checked.
    pub(crate) async fn prompt_ids(
        &self,
        prompts: Vec<Prompt>,
        add_special: bool,
    ) -> Result<Vec<Arc<Vec<u32>>>, ApiError> {
        let tokenizer = Arc::clone(&self.tokenizer);
        let (vocab, context) = (self.config.vocab, self.config.context);
        let known = move |id: &u32| usize::try_from(*id).is_ok_and(|id| id < vocab);
        self.tokenizing(move || {
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
    pub(crate) async fn chat_ids(&self, chat: Conversation) -> Result<Arc<Vec<u32>>, ApiError> {
        let tokenizer = Arc::clone(&self.tokenizer);
        let Some(template) = self.template.clone() else {
            let message = "this model has no chat template; use /v1/completions";
            return Err(ApiError::invalid("messages", message));
        };
        let (now, context) = (SystemTime::now(), self.config.context);
        let ids = move || {
            let marker = tokenizer.marker();
            let text = chat_text(chat, &template, (&tokenizer, &marker), now)?;
            tokenizer.check_size("messages", &marker.strip(&text).0, context)?;
            tokenizer.encode_chat(&text, &marker).map(Arc::new)
        };
        self.tokenizing(ids).await
    }

    /// The sequences of a completions request: those of prompt `p` are `p * n ..`.
    pub(crate) fn completion_jobs(
        &self,
        request: &CompletionsRequest,
        prompts: &[Arc<Vec<u32>>],
    ) -> Result<Vec<Job>, ApiError> {
        let mut jobs = Vec::new();
        for (ids, sent) in prompts.iter().zip(&request.prompts) {
            let max_tokens = request.max_tokens(ids.len(), self.config.context)?;
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
        let max_tokens = request.max_tokens(ids.len(), self.config.context)?;
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
        let eos = if options.ignore_eos { &[][..] } else { &self.config.eos };
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

    /// Starts all sequences of a request; where one is refused, all are dropped.
    pub(crate) async fn open(
        &self,
        model: &str,
        request_id: &str,
        jobs: Vec<Job>,
    ) -> Result<Vec<Sequence>, ApiError> {
        let open = jobs.into_iter().map(|job| {
            let context = Context {
                request_id: request_id.to_owned(),
                deployment: self.deployment(model).to_owned(),
                ways: Arc::clone(&self.ways),
                tokenizer: Arc::clone(&self.tokenizer),
                meter: self.metrics.meter(job.request.prompt.len()),
            };
            Sequence::open(job, context)
        });
        try_join_all(open).await
    }
}

/// KiB that so many bytes take.
pub(crate) fn kib(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
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
