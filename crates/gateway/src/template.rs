//! Chat templates: the model's own Jinja program over a list of messages, under limits.
//!
//! The program comes with the model and is not trusted: it can reach no file, its steps and its
//! output are limited, and what it raises is told to the client as its own refusal.

use std::io;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value as Jinja, ValueKind};
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};

use crate::config::{GatewayError, ModelFiles, RequestLimits};
use crate::error::ApiError;
use crate::{bounded, clock, dialect, generators, json};

const NAME: &str = "chat";
/// Most characters of a template's own message that a client is shown.
const MESSAGE_LIMIT: usize = 300;
/// The stack of a rendering. Address space: memory is taken only as far as a template nests.
const STACK_BYTES: usize = 1 << 30;

/// The parsed template and the tokens it may name.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token` and so on.
    tokens: Vec<(String, String)>,
    output_limit: usize,
    source: String,
}

/// One rendering.
pub(crate) struct Rendering<'a> {
    /// Objects with `role` and `content`; strings are guarded already.
    pub(crate) messages: &'a [Value],
    /// Functions that the model may call, in OpenAI's form; `tools` is none where there are none.
    pub(crate) tools: &'a [Value],
    /// Ends with the beginning of the assistant's turn.
    pub(crate) add_generation_prompt: bool,
    /// Leaves the last message open, so that the answer goes on with it.
    pub(crate) continue_final: bool,
    /// The caller's variables; never overrides the ones above.
    pub(crate) variables: &'a Map<String, Value>,
    /// For `strftime_now`.
    pub(crate) now: SystemTime,
}

/// What `raise_exception` raised.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    /// Reads the template of a model, where it has one.
    pub(crate) fn new(
        files: &ModelFiles,
        limits: &RequestLimits,
    ) -> Result<Option<Self>, GatewayError> {
        let config: Value = match &files.tokenizer_config {
            None => Value::Null,
            Some(text) => serde_json::from_str(text).map_err(|e| GatewayError::ModelFile {
                file: "tokenizer_config.json",
                reason: e.to_string(),
            })?,
        };
        let inline = named_template(&config["chat_template"]);
        let file = match files.chat_template {
            Some(_) => "chat_template.jinja",
            None => "tokenizer_config.json",
        };
        let Some(source) = files.chat_template.clone().or(inline) else { return Ok(None) };
        let broken = |e: minijinja::Error| GatewayError::Template { file, reason: e.to_string() };
        let mut environment = environment(limits).map_err(broken)?;
        environment.add_template_owned(NAME, dialect::adapted(&source)).map_err(broken)?;
        Ok(Some(Self {
            environment,
            tokens: token_names(&config),
            output_limit: limits.template_bytes,
            source,
        }))
    }

    /// Names a token that `tokenizer_config.json` leaves out.
    pub(crate) fn name_token(&mut self, variable: &str, token: Option<String>) {
        let known = self.tokens.iter().any(|(name, _)| name == variable);
        if let Some(token) = token.filter(|_| !known) {
            self.tokens.push((variable.to_owned(), token));
        }
    }

    /// Whether the template has a word for the role `developer`; others take it for `system`.
    pub(crate) fn knows_developer(&self) -> bool {
        self.source.contains("developer")
    }

    /// Renders a chat to the text that the model reads, on a stack that the deepest value which
    /// the fuel pays for does not overflow: the engine drops and shows values by recursion.
    pub(crate) fn render(&self, rendering: &Rendering<'_>) -> Result<String, ApiError> {
        let failed = || ApiError::internal("the chat template could not be run");
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
            let thread = thread.spawn_scoped(scope, || self.render_here(rendering));
            thread.map_err(|_| failed())?.join().map_err(|_| failed())?
        })
    }

    fn render_here(&self, rendering: &Rendering<'_>) -> Result<String, ApiError> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|e| refusal(&e, &self.source, rendering.messages))?;
        let mut output = Limited { text: Vec::new(), limit: self.output_limit, full: false };
        let result = template.render_captured_to(self.context(rendering), &mut output);
        if output.full {
            let message =
                format!("the chat is over {} bytes as the model reads it", self.output_limit);
            return Err(ApiError::invalid("messages", message));
        }
        if let Err(error) = result {
            return Err(refusal(&error, &self.source, rendering.messages));
        }
        drop(result);
        let text = String::from_utf8(output.text)
            .map_err(|_| ApiError::internal("the chat template wrote broken text"))?;
        if rendering.continue_final { left_open(text, rendering.messages) } else { Ok(text) }
    }

    fn context(&self, rendering: &Rendering<'_>) -> Jinja {
        let now = rendering.now;
        let mut context: Vec<(String, Jinja)> = Vec::new();
        for (name, value) in rendering.variables {
            context.push((name.clone(), Jinja::from(Serde(value))));
        }
        for (name, token) in &self.tokens {
            context.push((name.clone(), Jinja::from(token.clone())));
        }
        let flag = rendering.add_generation_prompt;
        context.push(("messages".into(), Jinja::from(Serde(rendering.messages))));
        context.push(("add_generation_prompt".into(), Jinja::from(flag)));
        let tools = match rendering.tools {
            [] => Jinja::from(()),
            tools => Jinja::from(Serde(tools)),
        };
        context.push(("tools".into(), tools));
        context.push(("documents".into(), Jinja::from(())));
        let strftime = move |format: &Jinja| {
            let format = bounded::text(format)?.to_string();
            Ok::<_, minijinja::Error>(clock::strftime(now, &format))
        };
        context.push(("strftime_now".into(), Jinja::from_function(strftime)));
        Jinja::from_pairs(context)
    }
}

/// Names that `chat_template_kwargs` may not take, beside those of `tokens`.
pub(crate) fn is_reserved(name: &str) -> bool {
    let fixed = [
        "messages",
        "add_generation_prompt",
        "continue_final_message",
        "tools",
        "documents",
        "strftime_now",
        "raise_exception",
        "namespace",
        "range",
        "dict",
        "tokenize",
        "chat_template",
    ];
    fixed.contains(&name) || name.ends_with("_token")
}

fn environment(limits: &RequestLimits) -> Result<Environment<'static>, minijinja::Error> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    let mut environment = Environment::new();
    environment.set_syntax(syntax);
    environment.set_fuel(Some(limits.template_fuel));
    bounded::guard(&mut environment);
    dialect::teach(&mut environment);
    generators::teach(&mut environment);
    // As in Jinja2: here none would be iterable, and a text or a map no sequence.
    environment.add_test("iterable", |value: &Jinja| {
        is_kind(value, &[ValueKind::String, ValueKind::Bytes, ValueKind::Iterable])
    });
    environment.add_test("sequence", |value: &Jinja| {
        is_kind(value, &[ValueKind::String, ValueKind::Bytes])
    });
    environment.add_filter("tojson", json::to_json);
    environment.add_function("raise_exception", |message: &Jinja| -> Result<Jinja, _> {
        let message = bounded::text(message)?.to_string();
        let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raised");
        Err(error.with_source(Raised(message)))
    });
    Ok(environment)
}

/// Whether a value is a list, a map, undefined (which counts as empty), or one of `others`.
fn is_kind(value: &Jinja, others: &[ValueKind]) -> bool {
    let common = [ValueKind::Seq, ValueKind::Map, ValueKind::Undefined];
    common.contains(&value.kind()) || others.contains(&value.kind())
}

/// The template of a `tokenizer_config.json`: a text, or the entry `default` of a list.
fn named_template(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => {
            let default = list.iter().find(|entry| entry["name"] == "default")?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// `bos_token` and its like, given as text or as an object with `content`.
fn token_names(config: &Value) -> Vec<(String, String)> {
    let Some(fields) = config.as_object() else { return Vec::new() };
    let text = |value: &Value| value.as_str().or(value["content"].as_str()).map(str::to_owned);
    fields
        .iter()
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, value)| Some((name.clone(), text(value)?)))
        .collect()
}

/// Cuts the rendered chat right behind the last message's text.
fn left_open(text: String, messages: &[Value]) -> Result<String, ApiError> {
    let last = messages.last().and_then(|m| m["content"].as_str()).unwrap_or("");
    if last.trim().is_empty() {
        // Nothing marks the place where an empty text would stand.
        let message = "the final message is empty: there is nothing to continue";
        return Err(ApiError::invalid("messages", message));
    }
    let refused = || {
        let message = "the chat template does not show the final message as it is";
        ApiError::invalid("continue_final_message", message)
    };
    let at = text.rfind(last.trim()).ok_or_else(refused)?;
    let whole = last.trim_start();
    let kept = if text[at..].starts_with(whole) { whole.len() } else { last.trim().len() };
    Ok(text[..at + kept].to_owned())
}

/// A failed rendering: what the template raised is the client's to read, the rest is ours. Only
/// the template's own words are shown: a message that it put together may hold the prompt.
fn refusal(error: &minijinja::Error, source: &str, messages: &[Value]) -> ApiError {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(inner) = cause {
        if let Some(Raised(message)) = inner.downcast_ref::<Raised>() {
            let message = if is_own(message, source, messages) {
                format!("the chat template says: {message}")
            } else {
                "the chat template refused the messages".to_owned()
            };
            return ApiError::invalid("messages", message);
        }
        if let Some(inner) = inner.downcast_ref::<minijinja::Error>()
            && inner.kind() == ErrorKind::OutOfFuel
        {
            let message = "the chat takes the template more steps or room than are allowed";
            return ApiError::invalid("messages", message);
        }
        cause = inner.source();
    }
    tracing::warn!(kind = ?error.kind(), line = ?error.line(), "the chat template failed");
    ApiError::internal("the model's chat template failed on this chat")
}

/// Whether the message stands in the template as one quoted text, or is such texts around a role.
fn is_own(message: &str, source: &str, messages: &[Value]) -> bool {
    let quoted = |text: &str| {
        text.is_empty()
            || ['\'', '"'].iter().any(|quote| source.contains(&format!("{quote}{text}{quote}")))
    };
    let around = |role: &str| {
        message
            .match_indices(role)
            .any(|(at, _)| quoted(&message[..at]) && quoted(&message[at + role.len()..]))
    };
    // Roles are of a fixed list, so no prompt is in them.
    let mut roles = messages.iter().filter_map(|m| m["role"].as_str());
    message.chars().count() <= MESSAGE_LIMIT && (quoted(message) || roles.any(around))
}

/// Takes output up to a limit.
struct Limited {
    text: Vec<u8>,
    limit: usize,
    full: bool,
}

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit - self.text.len() {
            self.full = true;
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
