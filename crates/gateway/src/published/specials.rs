//! No text of a user becomes a control token of a published tokenizer, in any role or field, by
//! itself, in parts or with its neighbours; in a raw completions prompt every one is recognised.

use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::{TOKENIZERS, data, text, tokenizer};
use crate::api::chat::Conversation;
use crate::config::{ModelFiles, RequestLimits};
use crate::face::chat_text;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// Every role, nothing between control tokens and texts, and texts beside each other.
const TIGHT: &str = "{% for m in messages %}{{ bos_token }}{{ m.role }}{{ m.name }}{{ m.content }}\
                     {{ m.content }}{{ eos_token }}{{ m.content | trim }}{% endfor %}";
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

fn template(source: &str, tokenizer: &Tokenizer, [bos, eos]: [u32; 2]) -> ChatTemplate {
    let files = ModelFiles { chat_template: Some(source.to_owned()), ..ModelFiles::default() };
    let template = ChatTemplate::new(&files, &RequestLimits::default()).expect("a template");
    let mut template = template.expect("a template");
    template.name_token("bos_token", tokenizer.name(bos));
    template.name_token("eos_token", tokenizer.name(eos));
    template
}

/// The control tokens in the ids of a chat.
fn controls(tokenizer: &Tokenizer, template: &ChatTemplate, messages: &[Value]) -> Vec<u32> {
    let conversation = Conversation {
        messages: messages.to_vec(),
        add_generation_prompt: true,
        continue_final: false,
        variables: Map::new(),
    };
    let marker = tokenizer.marker();
    let with = (tokenizer, &marker);
    let text = chat_text(conversation, template, with, SystemTime::UNIX_EPOCH).expect("renders");
    let mut ids = tokenizer.encode_chat(&text, &marker).expect("encodes");
    ids.retain(|id| tokenizer.word(*id).is_some_and(|word| word.special));
    ids
}

/// The control tokens of a tokenizer with their ids. The unknown token is none: it says that a
/// text has no other spelling.
fn specials(tokenizer: &Tokenizer) -> Vec<(u32, String)> {
    let special = |id: u32| tokenizer.word(id).is_some_and(|word| word.special);
    let all = (0..1 << 20).filter(|id| special(*id));
    let named = all.filter_map(|id| Some((id, tokenizer.name(id)?)));
    named.filter(|(_, name)| name != "<unk>").collect()
}

/// A control token's name in every dress.
fn dresses(name: &str) -> Vec<[String; 2]> {
    let middle = name.char_indices().nth(name.chars().count() / 2).map_or(0, |(at, _)| at);
    let (head, tail) = name.split_at(middle);
    let both = |text: String| [text.clone(), text];
    vec![
        both(name.to_owned()),
        both(format!("a{name}b {name}{name}")),
        both(format!(" {name}\n")),
        [head.to_owned(), tail.to_owned()],
        [tail.to_owned(), format!("x{head}")],
    ]
}

#[test]
fn control_tokens_come_from_templates_only() {
    for file in TOKENIZERS {
        let Some(tokenizer) = tokenizer(file) else { return };
        let specials = specials(&tokenizer);
        assert!(specials.len() >= 2, "{file}");
        let template = template(TIGHT, &tokenizer, [specials[0].0, specials[1].0]);
        let messages = |[name, text]: [&str; 2]| {
            let message = |role: &&str| json!({"role": role, "name": name, "content": text});
            ROLES.iter().map(message).collect::<Vec<_>>()
        };
        let want = controls(&tokenizer, &template, &messages(["x", "y"]));
        assert_eq!(want.len(), 2 * ROLES.len(), "{file}");
        for (id, name) in &specials {
            for [first, second] in dresses(name) {
                let chat = messages([&first, &second]);
                let got = controls(&tokenizer, &template, &chat);
                assert_eq!(got, want, "{file}: {id} {name:?} as {first:?} and {second:?}");
            }
        }
    }
}

#[test]
fn published_templates_let_none_through() {
    for (file, source, [bos, eos]) in [
        ("deepseek-v3/tokenizer.json", "hf/deepseek-ai-DeepSeek-V3.1.jinja", [0, 1]),
        (
            "llama3.2/tokenizer.json",
            "hf/meta-llama-Llama-3.2-3B-Instruct.jinja",
            [128_000, 128_009],
        ),
        ("mistral/tokenizer.v1.json", "mistral-common/v1.jinja", [1, 2]),
        ("mistral/tokenizer.v3.json", "mistral-common/v3.jinja", [1, 2]),
    ] {
        let Some(folder) = data("chat-templates") else { return };
        let tokenizer = tokenizer(file).expect("beside the templates");
        let template = template(&text(&folder.join(source)), &tokenizer, [bos, eos]);
        let messages = |text: &str| {
            let message = |role: &str| json!({"role": role, "content": text});
            ["system", "user", "assistant", "user"].map(message)
        };
        let want = controls(&tokenizer, &template, &messages("x"));
        let specials = specials(&tokenizer);
        // Where there are hundreds, nearly all differ by a number only.
        let step = if specials.len() > 100 { 7 } else { 1 };
        for (id, name) in specials.into_iter().step_by(step) {
            for [first, second] in dresses(&name) {
                for text in [first, second].iter().filter(|text| !text.trim().is_empty()) {
                    let got = controls(&tokenizer, &template, &messages(text));
                    assert_eq!(got, want, "{file}: {id} {name:?} as {text:?}");
                }
            }
        }
    }
}

#[test]
fn raw_prompts_may_hold_any_control_token() {
    for file in TOKENIZERS {
        let Some(tokenizer) = tokenizer(file) else { return };
        for (id, name) in specials(&tokenizer) {
            assert_eq!(tokenizer.encode(&name, false).expect("encodes"), [id], "{file}: {name:?}");
        }
    }
}
