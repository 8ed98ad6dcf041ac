//! A GGUF file is served as the directory that it was made from.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::golden::check;
use crate::harness::{Cluster, Http, golden_model, serve, source};

fn file(name: &str) -> PathBuf {
    source("tests/gguf/models").join(format!("{name}.gguf"))
}

#[test]
fn whole_models_are_served_as_the_reference_computes_them() {
    for name in ["gemma3", "gpt-oss-mxfp4"] {
        let server =
            serve(&file(&format!("{name}-bf16")), &["--ranks", "2", "--served-model-name", name]);
        check(name, &server.http());
    }
}

#[test]
fn three_worker_processes_serve_the_same() {
    let names = ["--served-model-name", "gemma2"];
    let cluster = Cluster::start(&file("gemma2-bf16"), 3, &names);
    check("gemma2", &cluster.http());
}

fn tokens(http: &Http, body: &Value) -> Value {
    http.post("/tokenize", body).1["tokens"].clone()
}

#[test]
fn texts_and_chats_become_the_same_tokens() {
    // Byte-level pairs, and SentencePiece with byte fallback.
    for (name, kind) in [("llama3", "bf16"), ("mixtral", "bf16")] {
        let given = ["--served-model-name", "m"];
        let directory = serve(&golden_model(name), &given);
        let gguf = serve(&file(&format!("{name}-{kind}")), &given);
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
