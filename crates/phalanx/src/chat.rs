//! `phalanx chat`: a conversation with a running server, or one question.

use std::io::{BufRead, Write};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::args;
use crate::http::Api;
use crate::process;

pub(crate) async fn run(args: args::Chat) -> anyhow::Result<()> {
    if let Some(temperature) = args.temperature {
        // JSON has no NaN; it would be sent as null and mean the default.
        ensure!(
            temperature.is_finite() && temperature >= 0.0,
            "--temperature must be a number that is not negative, not {temperature}"
        );
    }
    tokio::task::spawn_blocking(move || talk(&args)).await.context("the conversation ended")?
}

fn talk(args: &args::Chat) -> anyhow::Result<()> {
    let api = Api::new(&args.url);
    let model = match &args.model {
        Some(model) => model.clone(),
        None => api.first_model()?,
    };
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    if let Some(prompt) = &args.prompt {
        return say(&api, args, &model, &mut messages, prompt);
    }
    let hint = "An empty line ends the conversation.";
    process::line(&format!("Talking to {model} at {}. {hint}", args.url))?;
    let mut lines = std::io::stdin().lock().lines();
    loop {
        write!(std::io::stdout(), "> ").and_then(|()| std::io::stdout().flush())?;
        let Some(line) = lines.next().transpose()? else { return Ok(()) };
        if line.trim().is_empty() {
            return Ok(());
        }
        // One refused question does not end the conversation.
        if let Err(error) = say(&api, args, &model, &mut messages, &line) {
            eprintln!("{error:#}");
            messages.pop();
        }
    }
}

fn say(
    api: &Api,
    args: &args::Chat,
    model: &str,
    messages: &mut Vec<Value>,
    prompt: &str,
) -> anyhow::Result<()> {
    messages.push(json!({"role": "user", "content": prompt}));
    let mut body = json!({
        "model": model,
        "messages": messages,
        "max_tokens": args.max_tokens,
        "stream": true,
    });
    if let Some(temperature) = args.temperature {
        body["temperature"] = json!(temperature);
    }
    if let Some(seed) = args.seed {
        body["seed"] = json!(seed);
    }
    let mut out = std::io::stdout();
    let answer = api.chat(&body, &mut |text| {
        // A closed terminal ends the process anyway.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    })?;
    process::line("")?;
    messages.push(json!({"role": "assistant", "content": answer.text}));
    Ok(())
}
