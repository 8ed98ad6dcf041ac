//! Golden checkpoints over HTTP, as an OpenAI client with vLLM's extensions sees them.

use serde_json::{Value, json};

use crate::harness::{Cluster, Http, golden_model, serve};

/// Largest difference of a logprob from the reference.
const TOLERANCE: f64 = 1e-3;

fn golden(name: &str) -> Value {
    let path = golden_model(name).join("golden.json");
    serde_json::from_str(&std::fs::read_to_string(path).expect("golden.json")).expect("JSON")
}

/// Every prompt's greedy continuation and its logprobs, up to the first near-tie.
pub(crate) fn check(name: &str, http: &Http) {
    let golden = golden(name);
    for (label, prompt) in golden["prompts"].as_object().expect("prompts") {
        let answer = http.complete(&json!({
            "model": name, "prompt": prompt["ids"], "max_tokens": 32, "temperature": 0,
            "logprobs": 5, "ignore_eos": true, "return_token_ids": true,
        }));
        let choice = &answer["choices"][0];
        for step in 0..32 {
            let (got, want) = (&choice["token_ids"][step], &prompt["greedy_ids"][step]);
            if got != want {
                let margin = prompt["margins"][step].as_f64().expect("a margin");
                assert!(margin < 2.0 * TOLERANCE, "{name} {label} step {step}: {got}, not {want}");
                break;
            }
            let got = choice["logprobs"]["token_logprobs"][step].as_f64().expect("a logprob");
            let want = prompt["greedy_logprobs"][step].as_f64().expect("a logprob");
            assert!((got - want).abs() < TOLERANCE, "{name} {label} step {step}: {got}, {want}");
        }
    }
}

#[test]
fn every_golden_checkpoint_is_served_as_the_reference_computes_it() {
    for name in ["llama3", "llama-tied-f32", "llama-kv2-oddvocab", "mistral-window", "mixtral"] {
        let server = serve(&golden_model(name), &["--ranks", "2"]);
        check(name, &server.http());
    }
}

#[test]
fn three_worker_processes_serve_the_same() {
    let cluster = Cluster::start(&golden_model("mixtral"), 3, &[]);
    check("mixtral", &cluster.http());
}

#[test]
fn echo_gives_the_prompts_logprobs() {
    let server = serve(&golden_model("llama3"), &[]);
    let golden = golden("llama3");
    let prompt = &golden["prompts"]["long"];
    let answer = server.http().complete(&json!({
        "model": "llama3", "prompt": prompt["ids"], "max_tokens": 0, "temperature": 0,
        "logprobs": 1, "echo": true,
    }));
    let got = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("a list");
    let want = prompt["prompt_logprobs"].as_array().expect("a list");
    assert_eq!(got.len(), want.len());
    assert_eq!(got[0], Value::Null);
    for (got, want) in got.iter().zip(want).skip(1) {
        let (got, want) = (got.as_f64().expect("a number"), want.as_f64().expect("a number"));
        assert!((got - want).abs() < TOLERANCE, "{got} for {want}");
    }
}
