//! Answers as server-sent events.

use super::leader::Rule;
use super::*;

#[tokio::test]
async fn chat_chunks_come_in_order() {
    let server = Server::start(Rule::default()).await;
    let prompt = "<|bos|><|user|>hello you<|end|><|assistant|>";
    let ids = server.ids(prompt).await;
    let body = json!({
        "model": "demo", "messages": [{"role": "user", "content": "hello you"}],
        "max_tokens": ids.len(), "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true},
    });
    let reply = server.post("/v1/chat/completions", &body).await;
    assert_eq!(reply.header("content-type"), Some("text/event-stream"));
    let mut events = reply.events();
    assert_eq!(events.pop(), Some(json!("[DONE]")));
    let usage = events.pop().expect("usage");
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], ids.len());
    assert_eq!(usage["usage"]["prompt_tokens"], ids.len());
    let last = events.pop().expect("the end");
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    let first = events.remove(0);
    assert_eq!(first["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let mut text = String::new();
    for event in [&first].into_iter().chain(&events) {
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["id"], first["id"]);
        let choice = event["choices"][0].as_object().expect("a choice");
        assert_eq!(choice.get("finish_reason"), Some(&Value::Null), "present and null");
        assert_eq!(event.get("usage"), Some(&Value::Null));
        text.push_str(choice["delta"]["content"].as_str().expect("text"));
    }
    assert_eq!(text, "hello you");
    assert!(events.len() > 2, "token by token");
}

#[tokio::test]
async fn completions_stream_the_same_text_as_whole_answers() {
    let server = Server::start(Rule::default()).await;
    let prompt = "der Fluß 日本 🙂 läuft, END of it";
    for (stop, echo) in [(json!(null), false), (json!("END"), false), (json!(" of "), true)] {
        let mut body = json!({"model": "demo", "prompt": prompt, "max_tokens": 100, "stop": stop,
                              "echo": echo, "n": 2});
        let whole = server.complete(body.clone()).await;
        body["stream"] = json!(true);
        let mut events = server.post("/v1/completions", &body).await.events();
        assert_eq!(events.pop(), Some(json!("[DONE]")));
        for index in 0..2 {
            let mine: Vec<_> = events
                .iter()
                .map(|event| &event["choices"][0])
                .filter(|choice| choice["index"] == index)
                .collect();
            let text: String = mine.iter().map(|c| c["text"].as_str().expect("text")).collect();
            let expected = &whole["choices"][index];
            assert_eq!(json!(text), expected["text"]);
            let (last, before) = mine.split_last().expect("chunks");
            assert_eq!(last["finish_reason"], expected["finish_reason"]);
            assert!(before.iter().all(|choice| choice["finish_reason"] == Value::Null));
            assert!(before.iter().all(|c| !c["text"].as_str().expect("text").contains('\u{fffd}')));
        }
        assert!(events.iter().all(|event| event.get("usage").is_none()), "not asked for");
    }
}

#[tokio::test]
async fn streamed_tokens_logprobs_and_running_usage() {
    let server = Server::start(Rule::default()).await;
    let body = json!({
        "model": "demo", "prompt": [40, 41], "max_tokens": 3, "stream": true, "logprobs": 1,
        "return_token_ids": true, "echo": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true},
    });
    let mut events = server.post("/v1/completions", &body).await.events();
    assert_eq!(events.pop(), Some(json!("[DONE]")));
    assert_eq!(events.pop().expect("usage")["usage"]["completion_tokens"], 3);
    let ids: Vec<u64> = events
        .iter()
        .flat_map(|event| event["choices"][0]["token_ids"].as_array().expect("ids").clone())
        .filter_map(|id| id.as_u64())
        .collect();
    assert_eq!(ids, [40, 41, 40]);
    let counts: Vec<_> = events.iter().map(|e| e["usage"]["completion_tokens"].clone()).collect();
    assert_eq!(counts, [1, 2, 3, 3]);
    let logprobs = |i: usize| events[i]["choices"][0]["logprobs"]["token_logprobs"].clone();
    assert_eq!(logprobs(0).as_array().map(Vec::len), Some(3), "the prompt and a token");
    assert_eq!(logprobs(0)[0], Value::Null);
    assert_eq!(logprobs(1).as_array().map(Vec::len), Some(1));
    assert_eq!(events[0]["choices"][0]["prompt_token_ids"], json!([40, 41]));
    assert_eq!(events[1]["choices"][0]["prompt_token_ids"], Value::Null);
}

#[tokio::test]
async fn tokens_are_sent_as_they_come() {
    let rule = Rule { pace: std::time::Duration::from_millis(20), ..Rule::default() };
    let server = Server::start(rule).await;
    let body = json!({"model": "demo", "prompt": "abc", "max_tokens": 400, "stream": true});
    let mut stream = server.connect().await;
    let bytes = request("POST", "/v1/completions", body.to_string().as_bytes());
    stream.write_all(&bytes).await.expect("sends");
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    while received.windows(6).filter(|w| w == b"data: ").count() < 3 {
        let n = stream.read(&mut buffer).await.expect("reads");
        assert!(n > 0, "the stream goes on");
        received.extend_from_slice(&buffer[..n]);
    }
    assert_eq!(server.leader.open(), 1, "the answer is far from its end");
}
