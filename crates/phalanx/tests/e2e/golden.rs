//! Golden checkpoints over HTTP, as an OpenAI client with vLLM's extensions sees them.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::harness::{Cluster, Http, golden_model, phalanx, serve};

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
fn experts_are_divided_whole_where_the_deployment_says_so() {
    let cluster = Cluster::start(&golden_model("mixtral"), 3, &["--experts", "whole"]);
    check("mixtral", &cluster.http());
    let coordinator = cluster.coordinator.cluster();
    let operate = |args: &[&str]| cluster.ground.operate(&coordinator, args);
    // No worker is left for it, but the wish is kept as it was made.
    let wish = ["deploy", "second", "--model", "mixtral", "--experts", "whole", "--quantize", "q4"];
    assert!(operate(&wish).status.success());
    let status = cluster.ground.status(&coordinator);
    let told = |name: &str| {
        let all = status["deployments"].as_array().expect("deployments");
        let one = all.iter().find(|one| one["name"] == name).expect("deployed");
        (one["experts"].clone(), one["compute"].clone())
    };
    assert_eq!(told("mixtral"), (json!("whole"), json!("f32")));
    assert_eq!(told("second"), (json!("whole"), json!("int4")));
    let table = String::from_utf8(operate(&["status"]).stdout).expect("UTF-8");
    assert!(table.contains("deployment second, experts whole: waiting"), "{table}");
}

/// What quantising at load is said to have lost, in percent.
fn said_to_be_lost(option: &str) -> f64 {
    let model = golden_model("llama3");
    let mut child = phalanx()
        .args(["--log", "info", "serve"])
        .arg(model)
        .args(["--port", "0", "--supervised", "--ranks", "2", "--quantize", option])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a process");
    let stderr = BufReader::new(child.stderr.take().expect("its log"));
    let said = stderr.lines().map_while(Result::ok).find_map(|line| {
        let (_, after) = line.split_once("off by ")?;
        after.split_once(" %")?.0.parse().ok()
    });
    drop(child.stdin.take());
    child.wait().expect("it ends with its parent");
    said.unwrap_or_else(|| panic!("--quantize {option} says nothing of its error"))
}

#[test]
fn quantising_at_load_says_what_it_lost() {
    let (q8, q4) = (said_to_be_lost("q8"), said_to_be_lost("q4"));
    assert!((0.1..1.0).contains(&q8), "{q8}");
    assert!((2.0..12.0).contains(&q4), "{q4}");
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
