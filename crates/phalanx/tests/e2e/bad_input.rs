//! Requests that cannot be served: each a clear error, and the server goes on.

use serde_json::{Value, json};

use crate::harness::{Http, demo_model, serve};

/// Sends a body and checks status, `type`, `param` and that the server still answers.
fn refused(http: &Http, path: &str, body: &Value, status: u16, param: Option<&str>) -> Value {
    let (got, answer) = http.post(path, body);
    assert_eq!(got, status, "{body} -> {answer}");
    let error = &answer["error"];
    for field in ["message", "type", "param", "code"] {
        assert!(error.get(field).is_some(), "{field} is missing: {answer}");
    }
    assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()));
    if let Some(param) = param {
        assert_eq!(error["param"], param, "{body} -> {answer}");
    }
    answer
}

fn with(field: &str, value: Value) -> Value {
    let mut body = json!({"model": "demo", "prompt": "Hello", "max_tokens": 2, "ignore_eos": true});
    body[field] = value;
    body
}

#[test]
fn each_wrong_request_is_refused_by_name_and_the_server_goes_on() {
    let server = serve(&demo_model(), &[]);
    let http = server.http();
    let path = "/v1/completions";
    let wrong = [
        ("prompt", json!([])),
        ("prompt", json!([[]])),
        ("prompt", json!({"text": "x"})),
        ("prompt", json!([99999])),
        ("prompt", json!([-1])),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!("ten")),
        ("max_tokens", json!(1.5)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("NaN")),
        ("temperature", json!(1e39)),
        ("top_p", json!(0)),
        ("top_p", json!(1.1)),
        ("min_p", json!(2)),
        ("n", json!(0)),
        ("n", json!(1_000_000)),
        ("logprobs", json!(21)),
        ("logprobs", json!(-1)),
        ("stop", json!(5)),
        ("repetition_penalty", json!(0)),
        ("frequency_penalty", json!(99)),
        ("logit_bias", json!({"x": 1})),
        ("suffix", json!("end")),
    ];
    for (param, value) in wrong {
        refused(&http, path, &with(param, value), 400, Some(param));
    }
    let answer = refused(&http, path, &with("model", json!("gpt-9")), 404, None);
    assert_eq!(answer["error"]["code"], "model_not_found");
    let long = json!((0..2000).map(|i| 10 + i % 100).collect::<Vec<u32>>());
    let answer = refused(&http, path, &with("prompt", long), 400, None);
    assert_eq!(answer["error"]["code"], "context_length_exceeded");
    let messages = json!({"model": "demo", "messages": []});
    refused(&http, "/v1/chat/completions", &messages, 400, Some("messages"));
    let body = with("prompt", json!("Still there?"));
    assert_eq!(http.complete(&body)["usage"]["completion_tokens"], 2);
}

#[test]
fn bodies_that_are_not_requests_are_refused() {
    let server = serve(&demo_model(), &[]);
    let http = server.http();
    let nan = br#"{"model": "demo", "prompt": "x", "temperature": NaN}"#;
    for body in [&b"{"[..], b"", b"[]", b"null", b"\xff\xfe", nan] {
        let (status, text) = http.post_raw("/v1/completions", body);
        assert_eq!(status, 400, "{body:?} -> {text}");
        assert!(text.contains("\"error\""), "{text}");
    }
    let huge = vec![b' '; 10 << 20];
    let (status, text) = http.post_raw("/v1/completions", &huge);
    assert_eq!(status, 413, "{text}");
    let (status, text) = http.get("/v1/nothing");
    assert_eq!(status, 404);
    assert!(text.contains("\"error\""), "{text}");
    let (status, _) = http.get("/v1/completions");
    assert_eq!(status, 405);
    http.ready();
}

#[test]
fn no_tokens_means_the_prompt_alone() {
    let server = serve(&demo_model(), &[]);
    let mut body = with("max_tokens", json!(0));
    body["echo"] = json!(true);
    let answer = server.http().complete(&body);
    assert_eq!(answer["choices"][0]["text"], "Hello");
    assert_eq!(answer["usage"]["completion_tokens"], 0);
}
