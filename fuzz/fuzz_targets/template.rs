//! Chat templates: up to the first zero byte the template, then what the user says.
#![no_main]

use gateway::{ModelFiles, RequestLimits};
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let (source, said) = text.split_once('\0').unwrap_or((&text, "Hello"));
    let files = ModelFiles {
        chat_template: Some(source.to_owned()),
        tokenizer_config: Some(r#"{"bos_token": "<s>", "eos_token": "</s>"}"#.to_owned()),
        ..ModelFiles::default()
    };
    // The text that one step may make stays as large as it is for requests.
    let limits = RequestLimits { template_fuel: 200_000, ..RequestLimits::default() };
    let messages = [
        json!({"role": "system", "content": "Be terse."}),
        json!({"role": "user", "content": said}),
    ];
    let _ = gateway::try_template(&files, &limits, &messages);
});
