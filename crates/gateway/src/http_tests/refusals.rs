//! Bad input: each with its status, its field and its code, and a server that goes on.

use super::leader::Rule;
use super::*;

/// Sends a body and checks the refusal: status, param, code.
async fn refused(server: &Server, path: &str, body: &Value, expected: (u16, &str, &str)) {
    let reply = server.post(path, body).await;
    let shown = body.to_string().chars().take(200).collect::<String>();
    assert_eq!(reply.status, expected.0, "{path} {shown}: {}", reply.text());
    let error = reply.error();
    let param = if expected.1.is_empty() { Value::Null } else { json!(expected.1) };
    assert_eq!(error["param"], param, "{shown}: {error}");
    assert_eq!(error["code"], expected.2, "{shown}: {error}");
    assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()));
    assert!(error["type"].is_string());
    assert!(reply.header("x-request-id").is_some());
}

fn completion(name: &str, value: Value) -> Value {
    let mut body = json!({"model": "demo", "prompt": "x"});
    body[name] = value;
    body
}

#[tokio::test]
async fn values_out_of_range() {
    let server = Server::start(Rule::default()).await;
    let path = "/v1/completions";
    for (name, value) in [
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!("16")),
        ("max_tokens", json!(1.5)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("hot")),
        ("temperature", json!(1e300)),
        ("top_p", json!(0)),
        ("top_p", json!(1.01)),
        ("top_k", json!(-2)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("frequency_penalty", json!(2.5)),
        ("presence_penalty", json!(-2.5)),
        ("n", json!(0)),
        ("n", json!(9)),
        ("n", json!(1_000_000_000_000_u64)),
        ("best_of", json!(3)),
        ("logprobs", json!(21)),
        ("logprobs", json!(-1)),
        ("logprobs", json!(true)),
        ("seed", json!(1.5)),
        ("seed", json!(9_223_372_036_854_775_808_u64)),
        ("stop", json!("")),
        ("stop", json!(["a", ""])),
        ("stop", json!([1])),
        ("stop", json!(vec!["a"; 17])),
        ("stop", json!("a".repeat(257))),
        ("stop_token_ids", json!([509])),
        ("stop_token_ids", json!(vec![1; 129])),
        ("min_tokens", json!(17)),
        ("min_tokens", json!(-1)),
        ("logit_bias", json!({"509": 1})),
        ("logit_bias", json!({"1": 101})),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"7": 1, "07": 1})),
        ("logit_bias", json!([1])),
        ("stream", json!("yes")),
        ("stream_options", json!({"include_usage": true})),
        ("echo", json!(1)),
        ("model", json!(1)),
        ("prompt", json!("")),
        ("prompt", json!([])),
        ("prompt", json!([[]])),
        ("prompt", json!([1, [2]])),
        ("prompt", json!([509])),
        ("prompt", json!([-1])),
        ("prompt", json!({"text": "x"})),
        ("prompt", json!(vec!["x"; 65])),
    ] {
        let body = completion(name, value);
        refused(&server, path, &body, (400, name, "invalid_value")).await;
    }
    let many = json!({"model": "demo", "prompt": vec!["x"; 64], "n": 8});
    refused(&server, path, &many, (400, "n", "invalid_value")).await;
    assert!(server.leader.seen().is_empty(), "nothing reached the leader");
    server.complete(json!({"prompt": "still here"})).await;
}

#[tokio::test]
async fn prompts_that_do_not_fit() {
    let server = Server::start(Rule::default()).await;
    let path = "/v1/completions";
    let long = |n: usize| vec![7; n];
    let body = |prompt: usize, max: Value| {
        let prompt = long(prompt);
        json!({"model": "demo", "prompt": prompt, "max_tokens": max})
    };
    let expected = (400, "prompt", "context_length_exceeded");
    refused(&server, path, &body(CONTEXT, json!(1)), expected).await;
    refused(&server, path, &body(CONTEXT, json!(null)), expected).await;
    refused(&server, path, &body(10, json!(CONTEXT)), expected).await;
    refused(&server, path, &body(10, json!(u64::MAX >> 1)), expected).await;
    let reply = server.complete(body(CONTEXT - 1, json!(1))).await;
    assert_eq!(reply["usage"]["total_tokens"], CONTEXT);
    let reply = server.complete(body(CONTEXT - 3, json!(null))).await;
    assert_eq!(reply["usage"]["completion_tokens"], 3, "the default takes what is left");
    let started = std::time::Instant::now();
    let text = json!({"model": "demo", "prompt": "a ".repeat(1_900_000)});
    refused(&server, path, &text, expected).await;
    let text = json!({"messages": [{"role": "user", "content": "<|end|>".repeat(200_000)}]});
    let chat = (400, "messages", "context_length_exceeded");
    refused(&server, "/tokenize", &text, chat).await;
    // Counting the tokens of these takes an unoptimised build many seconds.
    assert!(started.elapsed().as_secs() < 5, "refused by size");
    let content = "word ".repeat(CONTEXT);
    let chat = json!({"model": "demo", "messages": [{"role": "user", "content": content}]});
    let expected = (400, "messages", "context_length_exceeded");
    refused(&server, "/v1/chat/completions", &chat, expected).await;
}

#[tokio::test]
async fn fields_that_are_not_acted_on() {
    let server = Server::start(Rule::default()).await;
    let path = "/v1/completions";
    for (name, value) in [
        ("suffix", json!("end")),
        ("guided_json", json!({"type": "object"})),
        ("structured_outputs", json!({"regex": "a"})),
        ("response_format", json!({"type": "json_object"})),
        ("prompt_logprobs", json!(1)),
        ("use_beam_search", json!(true)),
        ("store", json!(true)),
        ("bad_words", json!(["x"])),
        ("tools", json!([{"type": "function"}])),
        ("tool_choice", json!("required")),
        ("length_penalty", json!(2)),
    ] {
        let body = completion(name, value);
        refused(&server, path, &body, (400, name, "unsupported_parameter")).await;
    }
    let unknown = completion("temprature", json!(0));
    refused(&server, path, &unknown, (400, "temprature", "unknown_parameter")).await;
    for (name, value) in [
        ("suffix", Value::Null),
        ("temprature", Value::Null),
        ("metadata", json!({"a": "b"})),
        ("service_tier", json!("auto")),
        ("use_beam_search", json!(false)),
        ("length_penalty", json!(1.0)),
        ("priority", json!(0)),
    ] {
        let reply = server.post(path, &completion(name, value)).await;
        assert_eq!(reply.status, 200, "{name}: {}", reply.text());
    }
}

#[tokio::test]
async fn chats() {
    let server = Server::start(Rule::default()).await;
    let path = "/v1/chat/completions";
    let user = json!([{"role": "user", "content": "x"}]);
    let with = |name: &str, value: Value| {
        let mut body = json!({"model": "demo", "messages": user});
        body[name] = value;
        body
    };
    for (name, value) in [
        ("messages", json!([])),
        ("messages", json!("x")),
        ("max_tokens", json!(0)),
        ("max_completion_tokens", json!(-5)),
        ("top_logprobs", json!(3)),
        ("logprobs", json!(5)),
        ("chat_template_kwargs", json!({"messages": []})),
        ("chat_template_kwargs", json!({"bos_token": "x"})),
        ("chat_template_kwargs", json!([])),
    ] {
        refused(&server, path, &with(name, value), (400, name, "invalid_value")).await;
    }
    let role = with("messages", json!([{"role": "end", "content": "x"}]));
    refused(&server, path, &role, (400, "messages[0].role", "invalid_value")).await;
    // This model's template raises for a role that it does not know.
    let tool = with("messages", json!([{"role": "tool", "content": "x"}]));
    let reply = server.post(path, &tool).await;
    assert_eq!(reply.status, 400);
    assert!(reply.error()["message"].as_str().is_some_and(|m| m.contains("unknown role tool")));
    let missing = json!({"model": "demo"});
    refused(&server, path, &missing, (400, "messages", "missing_required_parameter")).await;
    let prompt = with("prompt", json!("x"));
    assert_eq!(server.post(path, &prompt).await.status, 400);
    assert!(server.leader.seen().is_empty());
}

#[tokio::test]
async fn models_and_paths_that_do_not_exist() {
    let server = Server::start(Rule::default()).await;
    let body = json!({"model": "gpt-9", "prompt": "x"});
    refused(&server, "/v1/completions", &body, (404, "model", "model_not_found")).await;
    let body = json!({"model": "gpt-9", "messages": [{"role": "user", "content": "x"}]});
    refused(&server, "/v1/chat/completions", &body, (404, "model", "model_not_found")).await;
    let missing = json!({"prompt": "x"});
    let expected = (400, "model", "missing_required_parameter");
    refused(&server, "/v1/completions", &missing, expected).await;
    for path in ["/v1/models/nope", "/v1/models/%ff"] {
        assert_eq!(server.get(path).await.error()["code"], "model_not_found");
    }
    refused(&server, "/v1/embeddings", &json!({}), (404, "", "not_found")).await;
    let method = server.get("/v1/completions").await;
    assert_eq!((method.status, method.error()["code"].clone()), (405, json!("method_not_allowed")));
    assert!(method.header("x-request-id").is_some());
}

#[tokio::test]
async fn bodies_that_are_no_json() {
    let server = Server::start(Rule::default()).await;
    let path = "/v1/completions";
    for body in [
        &b"{"[..],
        b"",
        b"null",
        b"[1]",
        b"\xff\xfe",
        b"{\"model\": \"demo\", \"prompt\": \"secret\" \"",
        b"{\"model\": \"demo\"} trailing",
    ] {
        let reply = server.send(&request("POST", path, body)).await;
        assert_eq!((reply.status, reply.error()["code"].clone()), (400, json!("invalid_json")));
        assert!(!reply.text().contains("secret"));
    }
    for number in ["NaN", "Infinity", "-Infinity", "1e999"] {
        let body = format!(r#"{{"model": "demo", "prompt": "x", "temperature": {number}}}"#);
        let reply = server.send(&request("POST", path, body.as_bytes())).await;
        assert_eq!((reply.status, reply.error()["param"].clone()), (400, json!("temperature")));
    }
    let body = json!({"model": "demo", "prompt": "x", "max_tokens": 1}).to_string();
    let typed = request("POST", path, body.as_bytes());
    let typed = String::from_utf8(typed).expect("text");
    for (kind, status) in [
        ("content-type: application/json", 200),
        ("content-type: Application/JSON; charset=utf-8", 200),
        ("content-type: text/plain", 415),
        ("content-type: application/json\u{e9}", 415),
        ("content-type:", 415),
        ("x-other: 1", 415),
    ] {
        let bytes = typed.replace("content-type: application/json", kind);
        let reply = server.send(bytes.as_bytes()).await;
        assert_eq!(reply.status, status, "{kind}");
    }
}

#[tokio::test]
async fn texts_that_cannot_fit_are_not_counted_for_tokenize_either() {
    let server = Server::start(Rule::default()).await;
    let body = json!({"prompt": "x".repeat(1 << 20)});
    refused(&server, "/tokenize", &body, (400, "prompt", "context_length_exceeded")).await;
    let body = json!({"prompt": "a b", "return_token_strs": true});
    let reply = server.post("/tokenize", &body).await;
    assert_eq!(reply.header("content-type"), Some("application/json"));
    assert_eq!(reply.json()["count"], reply.json()["token_strs"].as_array().map_or(0, Vec::len));
}

#[tokio::test]
async fn bodies_that_are_too_large() {
    let server = Server::start(Rule::default()).await;
    let body = vec![b' '; 10 << 20];
    let reply = server.send(&request("POST", "/v1/completions", &body)).await;
    assert_eq!((reply.status, reply.error()["code"].clone()), (413, json!("request_too_large")));
    // Without a length announced, it is noticed on the way.
    let mut stream = server.connect().await;
    let head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\
                 content-type: application/json\r\n\r\n";
    stream.write_all(head).await.expect("sends");
    let mut chunk = b"100000\r\n".to_vec();
    chunk.resize(chunk.len() + (1 << 20), b' ');
    chunk.extend_from_slice(b"\r\n");
    for _ in 0..10 {
        if stream.write_all(&chunk).await.is_err() {
            break;
        }
    }
    // The server reads on for a while, so that a client that sends all sees the answer.
    stream.write_all(b"0\r\n\r\n").await.expect("the end of the body is taken");
    let mut answer = vec![0; 4096];
    let n = stream.read(&mut answer).await.expect("an answer");
    assert_eq!(Reply::parse(&answer[..n]).status, 413);
    server.complete(json!({"prompt": "still here"})).await;
}

#[tokio::test]
async fn heads_that_are_too_large_or_too_slow() {
    let mut config = config();
    config.limits.receive_timeout = std::time::Duration::from_millis(200);
    config.limits.head_timeout = std::time::Duration::from_millis(200);
    let server = Server::with(Rule::default(), config).await;
    let head = format!("GET /livez HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "a".repeat(1 << 20));
    assert_eq!(server.send(head.as_bytes()).await.status, 431);
    let many = format!("GET /livez HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(100));
    assert_eq!(server.send(many.as_bytes()).await.status, 431);
    let slow = server
        .send(
            b"POST /v1/completions HTTP/1.1\r\n\
              content-type: application/json\r\ncontent-length: 9\r\n\r\n{",
        )
        .await;
    assert_eq!(slow.status, 408);
    let mut idle = server.connect().await;
    idle.write_all(b"GET /livez HT").await.expect("sends");
    let mut rest = Vec::new();
    let closed =
        tokio::time::timeout(std::time::Duration::from_secs(5), idle.read_to_end(&mut rest));
    assert!(closed.await.is_ok(), "a head that does not come is not waited for");
}
