//! The few HTTP calls the command makes to a running server. Blocking: call from a blocking task.

use std::io::{BufRead, BufReader};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde_json::Value;

/// A server's HTTP API.
#[derive(Clone)]
pub(crate) struct Api {
    agent: ureq::Agent,
    base: String,
}

/// How a streamed answer ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) finish_reason: String,
    pub(crate) tokens: u64,
}

impl Api {
    pub(crate) fn new(base: &str) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(5)))
            .build();
        let base = base.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        Self { agent: config.into(), base }
    }

    /// The id of the first model the server lists.
    pub(crate) fn first_model(&self) -> anyhow::Result<String> {
        let mut response = self
            .agent
            .get(format!("{}/v1/models", self.base))
            .call()
            .with_context(|| format!("no server answers at {}", self.base))?;
        let list: Value = response.body_mut().read_json().context("the server's model list")?;
        let id = list["data"][0]["id"].as_str();
        id.map(str::to_owned).context("the server lists no model")
    }

    /// Streams a chat answer; `on_text` gets each piece of text as it comes.
    pub(crate) fn chat(
        &self,
        body: &Value,
        on_text: &mut dyn FnMut(&str),
    ) -> anyhow::Result<Answer> {
        let mut response = self
            .agent
            .post(format!("{}/v1/chat/completions", self.base))
            .send_json(body)
            .with_context(|| format!("no server answers at {}", self.base))?;
        if response.status() != 200 {
            let error: Value = response.body_mut().read_json().unwrap_or_default();
            bail!("{}", error_text(&error, response.status().as_u16()));
        }
        let mut answer = Answer::default();
        for line in BufReader::new(response.body_mut().as_reader()).lines() {
            let line = line.context("the answer was cut off")?;
            let Some(data) = line.strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                return Ok(answer);
            }
            let chunk: Value = serde_json::from_str(data).context("an event of the answer")?;
            if chunk.get("error").is_some() {
                bail!("{}", error_text(&chunk, 500));
            }
            let choice = &chunk["choices"][0];
            if let Some(text) = choice["delta"]["content"].as_str() {
                answer.text.push_str(text);
                on_text(text);
            }
            if let Some(reason) = choice["finish_reason"].as_str() {
                reason.clone_into(&mut answer.finish_reason);
            }
            if let Some(tokens) = chunk["usage"]["completion_tokens"].as_u64() {
                answer.tokens = tokens;
            }
        }
        Err(anyhow!("the answer was cut off"))
    }
}

fn error_text(body: &Value, status: u16) -> String {
    match body["error"]["message"].as_str() {
        Some(message) => message.to_owned(),
        None => format!("the server answered with status {status}"),
    }
}
