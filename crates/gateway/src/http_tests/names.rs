//! What names mean: several models behind one gateway, aliases that move, deployments that are
//! taken away.

use super::leader::Rule;
use super::*;

const SECOND: &str = "def456";

/// The usual model, and another one with other texts, defaults and limits.
fn both() -> GatewayConfig {
    let mut config = config();
    let template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|assistant|>";
    let generation = r#"{"do_sample": true, "temperature": 0.25}"#;
    let mut other = config.models[0].clone();
    other.digest = SECOND.to_owned();
    other.files.chat_template = Some(template.to_owned());
    other.files.generation_config = Some(generation.to_owned());
    other.eos = vec![2];
    other.vocab = 300;
    config.models.push(other);
    config
}

async fn start() -> Server {
    let server = Server::with(Rule::default(), both()).await;
    let other = Named { context: 64, ..named("other", SECOND) };
    server.view.name("other", other.clone());
    server.view.name("chat", named("second", "abc123"));
    server
}

fn chat(model: &str) -> Value {
    let messages = json!([{"role": "user", "content": "a b"}]);
    json!({"model": model, "messages": messages, "max_tokens": 3})
}

#[tokio::test]
async fn a_request_is_its_models_from_end_to_end() {
    let server = start().await;
    let path = "/v1/chat/completions";
    for (model, text, temperature, eos) in [
        ("chat", "<|user|>a b<|end|>", 0.5, 1),
        ("other", "a b<|assistant|>", 0.25, 2),
        ("demo", "<|user|>a b<|end|>", 0.5, 1),
    ] {
        let reply = server.post(path, &chat(model)).await;
        assert_eq!((reply.status, &reply.json()["model"]), (200, &json!(model)), "{model}");
        let seen = server.leader.seen().pop().expect("a request");
        let inside = server.ids(text).await;
        let inside = inside.as_slice();
        assert!(seen.prompt.windows(inside.len()).any(|w| w == inside), "{model}: {seen:?}");
        assert_eq!(seen.sampling.expect("sampling").temperature, temperature, "{model}");
        assert_eq!(seen.stop.expect("rules").stop_ids, [eos], "{model}");
    }
    // Limits, too: of the vocabulary by the model, of the context by its deployment.
    let body = |model: &str, prompt: Value| json!({"model": model, "prompt": prompt});
    let completions = "/v1/completions";
    assert_eq!(server.post(completions, &body("chat", json!([400]))).await.status, 200);
    let refused = server.post(completions, &body("other", json!([400]))).await;
    assert_eq!((refused.status, &refused.error()["param"]), (400, &json!("prompt")));
    assert_eq!(server.post(completions, &body("chat", json!(vec![7; 65]))).await.status, 200);
    let refused = server.post(completions, &body("other", json!(vec![7; 65]))).await;
    assert_eq!(refused.error()["code"], "context_length_exceeded");
    let tokens = json!({"model": "other", "messages": [{"role": "user", "content": "x"}]});
    let tokens = server.post("/tokenize", &tokens).await.json();
    assert_eq!(tokens["tokens"], json!(server.ids("x<|assistant|>").await));
    assert_eq!(tokens["max_model_len"], 64);
}

#[tokio::test]
async fn an_alias_is_looked_up_once_for_each_request() {
    let rule = Rule { pace: Duration::from_millis(20), ..Rule::default() };
    let server = Server::with(rule, both()).await;
    server.view.name("other", named("other", SECOND));
    server.view.name("chat", named("second", "abc123"));
    let body = json!({"model": "chat", "prompt": "abc", "max_tokens": 40, "stream": true});
    let running = server.post("/v1/completions", &body);
    let moved = async {
        server.leader.wait_produced(4).await;
        server.view.name("chat", named("other", SECOND));
        // It loses its group, too: what it goes on in is still its deployment's.
        server.view.fence(9);
        let reply = server.post("/v1/chat/completions", &chat("chat")).await;
        assert_eq!(reply.json()["model"], "chat");
    };
    let (running, ()) = tokio::join!(running, moved);
    let seen = server.leader.seen();
    assert!(running.complete && running.text().ends_with("data: [DONE]\n\n"), "{}", running.text());
    let resumed = seen.iter().find(|one| !one.generated.is_empty()).expect("it was resumed");
    let stops = |one: &wire::pb::GenerateRequest| one.stop.clone().expect("rules").stop_ids;
    assert_eq!(stops(resumed), [1], "the old model's own");
    let fresh = seen.iter().find(|one| one.prompt != resumed.prompt).expect("another");
    assert_eq!(stops(fresh), [2], "the new model's own");
}

#[tokio::test]
async fn names_are_listed_with_what_they_mean() {
    let server = start().await;
    server.view.name("foreign", named("foreign", "ffff"));
    server.view.name("going", Named { draining: true, ..named("going", SECOND) });
    let list = server.get("/v1/models").await.json();
    let cards = list["data"].as_array().expect("cards").iter();
    let cards: Vec<_> = cards.map(|card| (&card["id"], &card["root"])).collect();
    let expected = [
        ("demo", "demo"),
        ("alias/of-demo", "demo"),
        ("chat", "second"),
        ("other", "other"),
        ("second", "second"),
    ];
    let expected: Vec<_> = expected.iter().map(|(id, root)| (json!(id), json!(root))).collect();
    assert!(cards.iter().map(|(a, b)| ((*a).clone(), (*b).clone())).eq(expected), "{list}");
    let card = server.get("/v1/models/other").await.json();
    assert_eq!(card["max_model_len"], 64);
    for path in ["/v1/models/foreign", "/v1/models/nope"] {
        assert_eq!(server.get(path).await.status, 404, "{path}");
    }
    let refused = server.post("/v1/chat/completions", &chat("foreign")).await;
    assert_eq!((refused.status, &refused.error()["code"]), (404, &json!("model_not_found")));
    // The cluster's word comes before a name that this gateway was given.
    server.view.name("alias/of-demo", named("other", SECOND));
    let card = server.get("/v1/models/alias/of-demo").await.json();
    assert_eq!(card["root"], "other");
}

#[tokio::test]
async fn a_deployment_that_drains_gets_nothing_new_and_ends_what_it_has() {
    let rule = Rule { pace: Duration::from_millis(20), ..Rule::default() };
    let server = Server::with(rule, both()).await;
    let body = json!({"model": "second", "prompt": "abc", "max_tokens": 40, "stream": true});
    let running = server.post("/v1/completions", &body);
    let drained = async {
        server.leader.wait_produced(4).await;
        server.view.name("second", Named { draining: true, ..named("second", "abc123") });
        server.view.fence(9);
        let refused = server.post("/v1/completions", &body).await;
        assert_eq!(refused.status, 503, "{}", refused.text());
        assert_eq!(refused.header("retry-after"), Some("1"));
    };
    let (running, ()) = tokio::join!(running, drained);
    assert!(running.text().ends_with("data: [DONE]\n\n"), "{}", running.text());
    let resumed = server.leader.seen().iter().any(|one| !one.generated.is_empty());
    assert!(resumed, "it lost its group and went on");
}

#[tokio::test]
async fn health_is_about_what_clients_ask_for() {
    let server = Server::with(Rule::default(), both()).await;
    let asked = async |path: &str| {
        assert_eq!(server.get(path).await.status, 200, "{path}");
        server.view.asked.lock().expect("not poisoned").clone()
    };
    assert_eq!(asked("/startupz").await, "demo", "its own, which may come yet");
    // The own deployment is not there; what an alias means, and is served here, is.
    server.view.name("a-foreign-one", named("foreign", "ffff"));
    server.view.name("chat", named("second", "abc123"));
    assert_eq!(asked("/startupz").await, "second");
    assert_eq!(asked("/health").await, "second");
    server.view.name("demo", named("demo", "abc123"));
    assert_eq!(asked("/startupz").await, "demo");
    server.view.forget("demo");
    assert_eq!(asked("/startupz").await, "second");
}
