//! Every published chat template renders every conversation as the reference renders it, or fails
//! where the reference fails.

use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use super::{data, text};
use crate::config::{ModelFiles, RequestLimits};
use crate::error::ApiError;
use crate::template::{ChatTemplate, Rendering};

/// The reference's clock: 2025-01-02, 00:00 UTC.
fn reference_clock() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_735_776_000)
}

/// What a template makes of a conversation of `rendered.json`.
fn render(source: &str, entry: &Value, case: &Value, now: SystemTime) -> Result<String, ApiError> {
    let config = json!({"bos_token": entry["bos_token"], "eos_token": entry["eos_token"]});
    let files = ModelFiles {
        tokenizer_config: Some(config.to_string()),
        chat_template: Some(source.to_owned()),
        ..ModelFiles::default()
    };
    let template = ChatTemplate::new(&files, &RequestLimits::default());
    let template = template.expect("a template that parses").expect("a template");
    let list = |field: &str| case[field].as_array().cloned().unwrap_or_default();
    template.render(&Rendering {
        messages: &list("messages"),
        tools: &list("tools"),
        add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap_or(true),
        continue_final: false,
        variables: &Map::new(),
        now,
    })
}

/// Compares every rendering that `folder/rendered.json` lists; gives how many there are, of which
/// how many refuse.
fn compare(folder: &Path) -> (usize, usize) {
    let json: Value = serde_json::from_str(&text(&folder.join("rendered.json"))).expect("JSON");
    let (mut wrong, mut refused) = (Vec::new(), 0);
    let entries = json["rendered"].as_array().expect("a list of renderings");
    for entry in entries {
        let (template, case) = (entry["template"].as_str(), entry["case"].as_str());
        let (template, case) = (template.expect("a template"), case.expect("a case"));
        let got =
            render(&text(&folder.join(template)), entry, &json["cases"][case], reference_clock());
        let right = match (entry["output"].as_str(), &got) {
            (Some(want), Ok(got)) => want == got,
            (None, Err(_)) => entry["error"].is_string(),
            _ => false,
        };
        refused += usize::from(got.is_err());
        if !right {
            wrong.push(format!("{template} with {case}: {got:?} instead of {entry}"));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n\n"));
    (entries.len(), refused)
}

#[test]
fn every_published_template_renders_as_the_reference_does() {
    let Some(folder) = data("chat-templates") else { return };
    let (all, refused) = compare(&folder);
    println!("{all} renderings, {refused} of them refusals");
    assert!(all >= 304 && refused >= 18, "only {all} renderings, {refused} refusals");
}

#[test]
fn the_samples_in_this_repository_render_as_the_reference_does() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/published");
    let (all, refused) = compare(&fixtures.join("chat-templates"));
    assert!(all >= 40 && refused >= 2, "only {all} renderings, {refused} refusals");
}

#[test]
fn another_day_is_another_rendering() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/published");
    let source = text(&fixtures.join("chat-templates/hf/openai-gpt-oss-120b.jinja"));
    let case = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let render = |now| render(&source, &Value::Null, &case, now).expect("renders");
    let (today, tomorrow) =
        (render(reference_clock()), render(reference_clock() + Duration::from_secs(86_400)));
    assert!(today.contains("2025-01-02") && tomorrow.contains("2025-01-03"));
}
