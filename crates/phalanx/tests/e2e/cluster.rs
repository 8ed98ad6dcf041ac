//! A cluster of processes: streams, disconnects, strangers, losses.

use std::io::BufRead;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Cluster, Ground, Http, demo_model, golden_model, output, phalanx};

/// A long greedy stream that does not end by itself soon.
fn long_stream(prompt: &str) -> Value {
    json!({
        "model": "demo", "prompt": prompt, "max_tokens": 900, "temperature": 0,
        "ignore_eos": true, "stream": true,
    })
}

fn idle_and_whole(http: &Http) {
    http.wait("to be idle", || http.metric("phalanx_kv_blocks_used") == 0.0);
    assert_eq!(http.metric("phalanx_integrity"), 1.0);
    assert_eq!(http.metric("vllm:num_requests_running"), 0.0);
}

#[test]
fn a_disconnected_stream_frees_its_blocks() {
    let cluster = Cluster::start(&demo_model(), 2, &[]);
    let http = cluster.http();
    let mut stream = http.stream("/v1/completions", &long_stream("Once upon a time"));
    let mut line = String::new();
    stream.read_line(&mut line).expect("a first event");
    assert!(line.starts_with("data: "), "{line}");
    assert!(http.metric("phalanx_kv_blocks_used") > 0.0);
    let before = http.metric("phalanx_steps_total");
    drop(stream);
    idle_and_whole(&http);
    let after = http.metric("phalanx_steps_total");
    println!("steps between the first event and idle: {}", after - before);
    assert!(after - before < 800.0, "the sequence ran to its end");
}

#[test]
fn many_streams_at_once_all_end_whole() {
    let cluster = Cluster::start(&demo_model(), 3, &["--kv-tokens", "2048"]);
    let http = cluster.http();
    let body = |prompt: &str, seed: usize| {
        json!({
            "model": "demo", "prompt": prompt, "max_tokens": 60, "temperature": 0.9, "seed": seed,
            "ignore_eos": true, "stream": true,
        })
    };
    let alone = http.stream_whole("/v1/completions", &body("The king said", 5));
    let threads: Vec<_> = (0..32)
        .map(|number| {
            let (http, alone) = (http.clone(), alone.clone());
            std::thread::spawn(move || {
                for round in 0..3 {
                    if number % 8 == round {
                        let text = http.stream_whole("/v1/completions", &body("The king said", 5));
                        assert_eq!(text, alone, "a crowd changes an answer");
                    } else {
                        http.stream_whole("/v1/completions", &body(&format!("No {number}"), round));
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().expect("streams that end"));
    idle_and_whole(&http);
}

#[test]
fn the_devices_that_fit_are_found_among_those_that_do_not() {
    let model = demo_model();
    let ground = Ground::new();
    let coordinator = ground.founder(&model, "127.0.0.1:0", &["--ranks", "1"]);
    let address = coordinator.cluster();
    let join =
        |name: &str, memory: &str| ground.worker(&model, name, &address, &["--memory", memory]);
    let _small = join("small", "1MiB");
    coordinator.http().wait("to say what is missing", || {
        let (status, text) = coordinator.http().get("/health");
        status == 503 && text.contains("lacks")
    });
    let _large = join("large", "2GiB");
    coordinator.http().ready();
}

#[test]
fn a_worker_with_another_model_is_refused_and_the_server_goes_on() {
    let cluster = Cluster::start(&golden_model("llama3"), 1, &[]);
    let mut other = phalanx();
    other.arg("worker").arg(golden_model("mixtral"));
    other.args(["--coordinator", &cluster.coordinator.cluster()]);
    other.args(["--data", &cluster.ground.data("other")]);
    other.args(["--token", &cluster.ground.token("worker")]);
    let refused = output(&mut other);
    assert!(!refused.status.success());
    let errors = String::from_utf8_lossy(&refused.stderr);
    assert!(errors.contains("digest"), "the cause is not named: {errors}");
    let body = json!({
        "model": "llama3", "prompt": [5, 6], "max_tokens": 2, "ignore_eos": true,
    });
    assert_eq!(cluster.http().complete(&body)["usage"]["completion_tokens"], 2);
}

#[test]
fn a_lost_worker_is_a_pause_and_a_new_one_is_taken_in() {
    let mut cluster = Cluster::start(&demo_model(), 2, &[]);
    let http = cluster.http();
    let body = json!({
        "model": "demo", "prompt": "Alas,", "max_tokens": 20, "temperature": 0,
        "ignore_eos": true,
    });
    let before = http.complete(&body);
    let whole = http.stream_whole("/v1/completions", &long_stream("Alas,"));
    let mut stream = http.stream("/v1/completions", &long_stream("Alas,"));
    let mut line = String::new();
    stream.read_line(&mut line).expect("a first event");
    cluster.workers[1].kill();
    let mut text = String::new();
    for line in std::iter::once(Ok(line)).chain(stream.lines()) {
        let line = line.expect("a stream that is not cut off");
        if let Some(event) = line.trim().strip_prefix("data: {") {
            let event: Value = serde_json::from_str(&format!("{{{event}")).expect("an event");
            assert!(event.get("error").is_none(), "{event}");
            text.push_str(event["choices"][0]["text"].as_str().unwrap_or_default());
        }
    }
    assert_eq!(text, whole, "other bytes than before");
    let address = cluster.coordinator.cluster();
    let status = cluster.ground.status(&address);
    let deployment = &status["deployments"][0];
    assert_eq!(deployment["waiting_for"], "", "it serves: {status}");
    assert_eq!(deployment["degraded"], "group 1 serves on 1 of 2 ranks", "and says so: {status}");
    let rank = &status["groups"][0]["ranks"][0];
    let (read, held) = (rank["bytes_read"].as_u64(), rank["weight_bytes"].as_u64());
    assert!(read > Some(0) && read.map(|read| read * 10) < held.map(|held| held * 6), "{rank}");
    assert_eq!(http.complete(&body)["choices"], before["choices"], "other bytes than before");
    cluster.join();
    http.wait("to take the new one in", || {
        cluster.ground.status(&address)["deployments"][0]["degraded"] == ""
    });
    assert_eq!(http.complete(&body)["choices"], before["choices"], "other bytes than before");
    idle_and_whole(&http);
}

#[test]
fn status_shows_the_plan() {
    let cluster = Cluster::start(&demo_model(), 3, &[]);
    let address = cluster.coordinator.cluster();
    let table = cluster.ground.operate(&address, &["status"]);
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    for part in ["serving", "0-2", "3-5", "6-7", "leader", "ready"] {
        assert!(table.contains(part), "{part:?} is not in:\n{table}");
    }
    let json = cluster.ground.status(&address);
    assert_eq!(json["groups"][0]["phase"], "serving");
    assert_eq!(json["groups"][0]["ranks"].as_array().map(Vec::len), Some(3));
}

#[test]
fn a_worker_waits_for_its_coordinator() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = free.local_addr().expect("its address").to_string();
    drop(free);
    let (model, ground) = (demo_model(), Ground::new());
    let _worker = ground.worker(&model, "early", &address, &[]);
    std::thread::sleep(Duration::from_millis(700));
    let coordinator = ground.founder(&model, &address, &["--ranks", "1"]);
    coordinator.http().ready();
}

#[test]
fn chat_talks_to_a_server() {
    let cluster = Cluster::start(&demo_model(), 1, &[]);
    let url = cluster.http().base;
    let say = |seed: &str| {
        let mut chat = phalanx();
        chat.args(["chat", "--url", &url, "--prompt", "Who goes there?", "--seed", seed]);
        let output = output(chat.args(["--max-tokens", "24"]));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    assert_eq!(say("3"), say("3"));
    assert_ne!(say("3"), say("4"));
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("its address").port().to_string();
    let refused = output(phalanx().arg("serve").arg(demo_model()).args(["--port", &port]));
    let errors = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success());
    assert!(errors.contains(&port) && errors.contains("--port"), "{errors}");
}
