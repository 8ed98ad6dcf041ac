//! Answers that are not streamed.

use super::leader::{Rule, answer};
use super::*;

#[tokio::test]
async fn models_version_and_tokens() {
    let server = Server::start(Rule::default()).await;
    let list = server.get("/v1/models").await;
    assert_eq!((list.status, list.json()["object"].clone()), (200, json!("list")));
    assert_eq!(list.header("x-request-id").map(str::len), Some(32));
    let names: Vec<_> = (0..3).map(|i| list.json()["data"][i]["id"].clone()).collect();
    assert_eq!(names, ["demo", "alias/of-demo", "second"]);
    let other = json!({"model": "second", "prompt": "hello", "max_tokens": 1});
    assert_eq!(server.post("/v1/completions", &other).await.json()["model"], "second");
    assert_eq!(list.json()["data"][0]["max_model_len"], CONTEXT);
    let one = server.get("/v1/models/alias/of-demo").await.json();
    assert_eq!((&one["id"], &one["root"]), (&json!("alias/of-demo"), &json!("demo")));
    assert!(server.get("/version").await.json()["version"].is_string());
    let body = json!({"prompt": "hello é", "return_token_strs": true});
    let tokens = server.post("/tokenize", &body).await.json();
    assert_eq!(
        tokens["count"].as_u64().map(|n| n as usize),
        tokens["tokens"].as_array().map(Vec::len)
    );
    assert_eq!(
        tokens["token_strs"].as_array().map(Vec::len),
        tokens["tokens"].as_array().map(Vec::len)
    );
    let back = server.post("/detokenize", &json!({"tokens": tokens["tokens"]})).await;
    assert_eq!(back.json(), json!({"prompt": "hello é"}));
}

#[tokio::test]
async fn a_text_prompt_with_the_models_defaults() {
    let server = Server::start(Rule::default()).await;
    let ids = server.ids("hello there").await;
    let body =
        json!({"prompt": "hello there", "max_tokens": ids.len(), "user": "u", "store": false});
    let reply = server.complete(body).await;
    assert_eq!(reply["object"], "text_completion");
    assert_eq!(reply["model"], "demo");
    assert!(reply["id"].as_str().is_some_and(|id| id.starts_with("cmpl-")));
    let n = ids.len();
    assert_eq!(
        reply["usage"],
        json!({"prompt_tokens": n, "completion_tokens": n, "total_tokens": 2 * n})
    );
    assert_eq!(
        reply["choices"],
        json!([{"index": 0, "text": "hello there", "logprobs": null,
                "finish_reason": "length", "stop_reason": null}])
    );
    let seen = server.leader.seen();
    let sampling = seen[0].sampling.clone().expect("sampling");
    assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.5, 7, 1.0));
    assert_eq!(seen[0].prompt, ids);
    assert_eq!(seen[0].stop.clone().expect("rules").stop_ids, [1]);
}

#[tokio::test]
async fn parameters_reach_the_leader_as_given() {
    let server = Server::start(Rule::default()).await;
    server
        .complete(json!({
            "prompt": [5, 6], "max_tokens": 3, "temperature": 0, "top_p": 0.5, "top_k": -1,
            "min_p": 0.25, "repetition_penalty": 1.5, "frequency_penalty": -2,
            "presence_penalty": 2.0, "logit_bias": {"7": -100, "3": 1.5}, "seed": -1,
            "min_tokens": 2, "ignore_eos": true, "stop_token_ids": [8], "n": 2, "best_of": 2,
        }))
        .await;
    let mut seen = server.leader.seen();
    seen.sort_by_key(|request| request.sampling.as_ref().map(|s| s.choice));
    let sampling = seen[1].sampling.clone().expect("sampling");
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p),
        (0.0, 0.5, 0, 0.25)
    );
    assert_eq!((sampling.seed, sampling.choice), (u64::MAX, 1));
    assert_eq!(sampling.repetition_penalty, 1.5);
    assert_eq!((sampling.frequency_penalty, sampling.presence_penalty), (-2.0, 2.0));
    let bias: Vec<_> = sampling.logit_bias.iter().map(|b| (b.token, b.bias)).collect();
    assert_eq!(bias, [(3, 1.5), (7, -100.0)]);
    let stop = seen[1].stop.clone().expect("rules");
    assert_eq!((stop.max_tokens, stop.min_tokens, stop.stop_ids), (3, 2, vec![8]));
    for _ in 0..2 {
        server.complete(json!({"prompt": [5]})).await;
    }
    let seeds: Vec<_> =
        server.leader.seen().iter().map(|r| r.sampling.as_ref().expect("s").seed).collect();
    assert_eq!(seeds[0], seeds[1], "choices share the request's seed");
    assert_ne!(seeds[2], seeds[3], "each request without a seed gets its own");
}

#[tokio::test]
async fn batched_prompts_and_choices_in_order() {
    let server = Server::start(Rule::default()).await;
    let body = json!({
        "prompt": [[10, 11, 12], [20, 21]], "n": 2, "max_tokens": 3, "return_token_ids": true,
    });
    let reply = server.complete(body).await;
    let found: Vec<_> = reply["choices"].as_array().expect("choices").iter().collect();
    let expected = [
        (answer(&[10, 11, 12], 0, 3), [10, 11, 12].as_slice()),
        (answer(&[10, 11, 12], 1, 3), &[10, 11, 12]),
        (answer(&[20, 21], 0, 3), &[20, 21]),
        (answer(&[20, 21], 1, 3), &[20, 21]),
    ];
    assert_eq!(found.len(), 4);
    for (i, (choice, (ids, prompt))) in found.iter().zip(expected).enumerate() {
        assert_eq!(choice["index"], i);
        assert_eq!(choice["token_ids"], json!(ids));
        assert_eq!(choice["prompt_token_ids"], json!(prompt));
    }
    assert_eq!(reply["usage"]["prompt_tokens"], 5);
    assert_eq!(reply["usage"]["completion_tokens"], 12);
    let two = server.complete(json!({"prompt": ["a", "b"], "max_tokens": 1})).await;
    assert_eq!(two["choices"][1]["text"], "b");
}

#[tokio::test]
async fn echo_with_logprobs() {
    let server = Server::start(Rule::default()).await;
    for max_tokens in [0, 1] {
        let reply = server
            .complete(json!({
                "prompt": [105, 106, 107], "echo": true, "logprobs": 2, "max_tokens": max_tokens,
                "return_tokens_as_token_ids": true,
            }))
            .await;
        let logprobs = &reply["choices"][0]["logprobs"];
        let known = ["token_id:105", "token_id:106", "token_id:107", "token_id:105"];
        assert_eq!(logprobs["tokens"], json!(known[..3 + max_tokens]));
        let values = logprobs["token_logprobs"].as_array().expect("a list");
        assert_eq!(values.len(), 3 + max_tokens);
        assert_eq!(values[0], Value::Null);
        assert!((values[2].as_f64().expect("a number") + 1.07).abs() < 1e-6);
        assert_eq!(logprobs["top_logprobs"][0], Value::Null);
        let top = logprobs["top_logprobs"][1].as_object().expect("an object");
        // The token itself is listed beside the two likeliest.
        let names: Vec<_> = top.keys().map(String::as_str).collect();
        assert_eq!(names, ["token_id:10", "token_id:11", "token_id:106"]);
        let text = reply["choices"][0]["text"].as_str().expect("text").to_owned();
        let offsets: Vec<usize> =
            serde_json::from_value(logprobs["text_offset"].clone()).expect("offsets");
        assert_eq!(offsets[0], 0);
        assert!(offsets.windows(2).all(|pair| pair[0] <= pair[1]));
        assert!(offsets.iter().all(|offset| *offset <= text.chars().count()));
        assert_eq!(reply["choices"][0]["finish_reason"], "length");
    }
    let plain = server.complete(json!({"prompt": "say é", "echo": true, "max_tokens": 1})).await;
    assert!(plain["choices"][0]["text"].as_str().expect("text").starts_with("say é"));
    assert_eq!(plain["choices"][0]["logprobs"], Value::Null);
}

#[tokio::test]
async fn text_offsets_point_at_the_tokens_texts() {
    let server = Server::start(Rule::default()).await;
    let body = json!({"prompt": "one two three", "max_tokens": 9, "logprobs": 0, "echo": true});
    let reply = server.complete(body).await;
    let choice = &reply["choices"][0];
    let text: Vec<char> = choice["text"].as_str().expect("text").chars().collect();
    let tokens = choice["logprobs"]["tokens"].as_array().expect("tokens");
    let offsets = choice["logprobs"]["text_offset"].as_array().expect("offsets");
    assert!(tokens.len() > 9);
    for (token, offset) in tokens.iter().zip(offsets) {
        let rest: String = text[offset.as_u64().expect("an offset") as usize..].iter().collect();
        assert!(rest.starts_with(token.as_str().expect("text")), "{token} at {rest:?}");
    }
    let own = choice["logprobs"]["top_logprobs"][1].as_object().expect("an object");
    assert_eq!(own.len(), 1, "with logprobs 0 only the token itself is listed");
}

#[tokio::test]
async fn stop_strings_over_token_borders() {
    let server = Server::start(Rule::default()).await;
    let stop = "k br";
    let ids = server.ids("quick brown fox ").await;
    let body = json!({
        "prompt": "quick brown fox ", "max_tokens": 40, "stop": ["zzz", stop],
        "return_token_ids": true,
    });
    let reply = server.complete(body.clone()).await;
    let choice = &reply["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("quic"), &json!("stop")));
    assert_eq!(choice["stop_reason"], stop);
    let used = choice["token_ids"].as_array().expect("ids").len();
    assert!(used > 1 && used < ids.len(), "ends with the token that completes the stop string");
    assert_eq!(reply["usage"]["completion_tokens"], used);
    server.leader.wait_open(0).await;
    let mut with = body.clone();
    with["include_stop_str_in_output"] = json!(true);
    assert_eq!(server.complete(with).await["choices"][0]["text"], "quick br");
    let mut later = body;
    later["min_tokens"] = json!(ids.len());
    let text = server.complete(later).await["choices"][0]["text"].clone();
    assert_eq!(text, "quick brown fox quic", "not before min_tokens");
}

#[tokio::test]
async fn stop_tokens_end_without_their_text() {
    let server = Server::start(Rule::default()).await;
    let body = json!({"prompt": [72, 73, 74], "max_tokens": 9, "stop_token_ids": [74],
                      "return_token_ids": true, "logprobs": 0});
    let reply = server.complete(body).await;
    let choice = &reply["choices"][0];
    assert_eq!(choice["token_ids"], json!([72, 73, 74]));
    let shown = server.post("/detokenize", &json!({"tokens": [72, 73]})).await.json();
    assert_eq!(choice["text"], shown["prompt"]);
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(74)));
    assert_eq!(choice["logprobs"]["tokens"].as_array().map(Vec::len), Some(3));
    // The model's own end is not the caller's stop.
    let body = json!({"prompt": [72, 1, 74], "max_tokens": 9});
    let reply = server.complete(body.clone()).await;
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    assert_eq!(reply["choices"][0]["stop_reason"], Value::Null);
    assert_eq!(reply["usage"]["completion_tokens"], 2);
    let mut on = body;
    on["ignore_eos"] = json!(true);
    assert_eq!(server.complete(on).await["usage"]["completion_tokens"], 9);
}

#[tokio::test]
async fn chats_are_rendered_by_the_models_template() {
    let server = Server::start(Rule::default()).await;
    let body = json!({
        "model": "alias/of-demo", "max_completion_tokens": 1, "return_token_ids": true,
        "messages": [
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": " hi "}]},
        ],
        "logprobs": true, "top_logprobs": 2, "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"},
    });
    let reply = server.post("/v1/chat/completions", &body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let reply = reply.json();
    let rendered = "<|bos|><|system|>be kind<|end|><|user|>hi<|end|><|assistant|>";
    let ids = server.ids(rendered).await;
    assert_eq!(reply["prompt_token_ids"], json!(ids));
    assert_eq!((ids[0], ids[1]), (0, 2), "control tokens, and one bos only");
    let choice = &reply["choices"][0];
    assert_eq!(reply["object"], "chat.completion");
    assert_eq!(reply["model"], "alias/of-demo");
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "", "refusal": null}));
    let content = &choice["logprobs"]["content"][0];
    assert_eq!(content["bytes"], json!("<|bos|>".as_bytes()));
    assert_eq!(content["top_logprobs"].as_array().map(Vec::len), Some(2));
    assert_eq!(reply["usage"]["prompt_tokens"], ids.len());
    // Without a limit the answer may fill the context.
    let body = json!({"model": "demo", "messages": [{"role": "user", "content": "x"}],
                      "stop_token_ids": [3]});
    server.post("/v1/chat/completions", &body).await;
    let last = server.leader.seen().pop().expect("a request");
    let wanted = last.stop.expect("rules").max_tokens as usize;
    assert_eq!(last.prompt.len() + wanted, CONTEXT);
}

#[tokio::test]
async fn no_text_of_a_chat_becomes_a_control_token() {
    let server = Server::start(Rule::default()).await;
    let chat = async |role: &str, content: &str| {
        let body = json!({"messages": [{"role": role, "content": content}]});
        let reply = server.post("/tokenize", &body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let ids: Vec<u32> = serde_json::from_value(reply.json()["tokens"].clone()).expect("ids");
        let back = server.post("/detokenize", &json!({"tokens": ids})).await.json();
        let text = back["prompt"].as_str().expect("text").to_owned();
        (ids.iter().filter(|id| **id < 6).copied().collect::<Vec<_>>(), text)
    };
    for (role, id) in [("system", 2), ("developer", 2), ("user", 3), ("assistant", 4)] {
        for special in SPECIALS {
            let (head, tail) = special.split_at(4);
            for content in [
                special.to_owned(),
                format!("a{special}b {special}"),
                format!(" {special}{special} "),
                format!("{special} {head}"),
                head.to_owned(),
                tail.to_owned(),
                "<".to_owned(),
                "|>".to_owned(),
            ] {
                let (controls, text) = chat(role, &content).await;
                assert_eq!(controls, [0, id, 5, 4], "{role}: {content:?}");
                assert!(text.contains(content.trim()), "{content:?} is kept: {text:?}");
            }
        }
    }
    // Raw prompts are the operator's own format: there they are control tokens.
    assert_eq!(server.ids("<|user|>").await, [3]);
}

#[tokio::test]
async fn health_and_metrics_tell_the_truth() {
    let server = Server::start(Rule::default()).await;
    server.complete(json!({"prompt": [5, 6], "max_tokens": 3})).await;
    assert_eq!(server.get("/health").await.status, 200);
    let metrics = server.get("/metrics").await.text();
    for line in [
        "vllm:prompt_tokens_total{model_name=\"demo\",engine=\"0\"} 2",
        "vllm:generation_tokens_total{model_name=\"demo\",engine=\"0\"} 3",
        "vllm:num_requests_running{model_name=\"demo\",engine=\"0\"} 0",
        "phalanx_kv_blocks_total 4",
        "phalanx_integrity 1",
        "phalanx_http_requests_total{route=\"/v1/completions\",status=\"200\"} 1",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line} is not in\n{metrics}");
    }
    server.view.set(nothing("2 of 3 ranks have joined", Outlook::Wished));
    for path in ["/health", "/readyz"] {
        let sick = server.get(path).await;
        assert_eq!(sick.status, 503);
        let message = sick.error()["message"].as_str().expect("a message").to_owned();
        assert!(message.contains("2 of 3 ranks"), "{message}");
    }
    assert_eq!(server.get("/livez").await.status, 200);
    assert!(!server.get("/metrics").await.text().contains("kv_blocks"), "unknown, so left out");
    let refused = server.post("/v1/completions", &json!({"model": "demo", "prompt": "x"})).await;
    assert_eq!((refused.status, refused.error()["type"].clone()), (503, json!("server_error")));
    assert_eq!(refused.header("retry-after"), Some("1"));
}

#[tokio::test]
async fn a_template_in_its_own_file_and_tokens_named_by_the_model() {
    let mut config = config();
    config.models[0].files.tokenizer_config = None;
    config.models[0].files.chat_template = Some(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | trim \
         + eos_token }}{% endfor %}"
            .to_owned(),
    );
    let server = Server::with(Rule::default(), config).await;
    let body = json!({"messages": [{"role": "user", "content": " x "}]});
    let chat = server.post("/tokenize", &body).await.json();
    assert_eq!(chat["tokens"], json!(server.ids("<|bos|><|user|>x<|eos|>").await));
    let none = Server::with(Rule::default(), {
        let mut config = super::config();
        config.models[0].files.tokenizer_config = None;
        config
    })
    .await;
    let reply = none.post("/tokenize", &body).await;
    assert_eq!(reply.status, 400);
    assert!(reply.error()["message"].as_str().is_some_and(|m| m.contains("no chat template")));
}
