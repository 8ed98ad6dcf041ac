//! A GGUF file is served as the directory that it was made from.

#[path = "../../../../tests/gguf/unpack.rs"]
mod unpack;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::golden::check;
use crate::harness::{Cluster, Http, golden_model, serve, source};

/// The file of a golden checkpoint.
pub(crate) fn file(name: &str) -> PathBuf {
    let kind = if name == "llama-tied-f32" { "f32" } else { "bf16" };
    unpack::unpacked(&source("."), Path::new(env!("CARGO_TARGET_TMPDIR")), name, kind)
}

#[test]
fn whole_models_are_served_as_the_reference_computes_them() {
    // F32, and BF16 of each kind: dense, experts, latent attention, blocks of four bits.
    for name in ["llama-tied-f32", "llama3", "gemma3", "qwen3-moe", "deepseek-v3", "gpt-oss-mxfp4"]
    {
        let server = serve(&file(name), &["--ranks", "2", "--served-model-name", name]);
        check(name, &server.http());
    }
}

#[test]
fn three_worker_processes_serve_the_same() {
    let names = ["--served-model-name", "gemma2"];
    let cluster = Cluster::start(&file("gemma2"), 3, &names);
    check("gemma2", &cluster.http());
}

/// A copy of a file with one more entry of metadata, which must be the first.
pub(crate) fn with_text(bytes: &[u8], key: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut entry = text(key);
    entry.extend(8u32.to_le_bytes());
    entry.extend(text(value));
    // The data begin at a multiple of 32: as much more as keeps them there.
    assert_eq!(entry.len() % 32, 0, "an entry of another length would move the data");
    let entries = u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes"));
    [&bytes[..16], &(entries + 1).to_le_bytes(), &entry, &bytes[24..]].concat()
}

fn tokens(http: &Http, body: &Value) -> Value {
    http.post("/tokenize", body).1["tokens"].clone()
}

#[test]
fn texts_and_chats_become_the_same_tokens() {
    // Byte-level pairs, and SentencePiece with byte fallback.
    for name in ["llama3", "mixtral"] {
        let given = ["--served-model-name", "m"];
        let directory = serve(&golden_model(name), &given);
        let gguf = serve(&file(name), &given);
        let (directory, gguf) = (directory.http(), gguf.http());
        for text in [
            "What news of the war, my lord?",
            " two  spaces\n\nand lines\t",
            "na\u{ef}ve \u{4f60}\u{597d} \u{1f600} 12345 <|user|> <0x41>",
            "<|bos|>a<|end|> b",
            "",
        ] {
            let body = json!({ "model": "m", "prompt": text });
            assert_eq!(tokens(&directory, &body), tokens(&gguf, &body), "{name}: {text:?}");
            let chat = json!({
                "model": "m", "messages": [{ "role": "user", "content": text }],
            });
            assert_eq!(tokens(&directory, &chat), tokens(&gguf, &chat), "{name}: {text:?}");
        }
    }
}
