//! Requests that are sent again under the same idempotency key.

use super::leader::Rule;
use super::*;

/// A completions request with a key.
fn keyed(key: &str, body: &Value) -> Vec<u8> {
    let plain = request("POST", "/v1/completions", body.to_string().as_bytes());
    let plain = String::from_utf8(plain).expect("text");
    let line = format!("host: x\r\nidempotency-key: {key}\r\n");
    plain.replacen("host: x\r\n", &line, 1).into_bytes()
}

fn body(more: &Value) -> Value {
    let mut body = json!({"model": "demo", "prompt": "a b c", "max_tokens": 9});
    for (name, value) in more.as_object().into_iter().flatten() {
        body[name] = value.clone();
    }
    body
}

fn seeds(server: &Server) -> Vec<u64> {
    server.leader.seen().into_iter().map(|seen| seen.sampling.unwrap_or_default().seed).collect()
}

#[tokio::test]
async fn a_request_with_a_key_is_computed_and_answered_once() {
    let rule = Rule { pace: Duration::from_millis(10), ..Rule::default() };
    let server = Server::start(rule).await;
    let sent = keyed("once", &body(&json!({})));
    // At the same time, and later.
    let (one, two) = tokio::join!(server.send(&sent), server.send(&sent));
    let three = server.send(&sent).await;
    for reply in [&one, &two, &three] {
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(reply.text(), one.text(), "its id is that of the first answer, too");
    }
    assert_eq!(server.leader.seen().len(), 1);
    let replayed = |reply: &Reply| reply.header("idempotent-replayed") == Some("true");
    assert!(replayed(&one) != replayed(&two) && replayed(&three));
    // Another request needs a key of its own.
    let other = server.send(&keyed("once", &body(&json!({"max_tokens": 8})))).await;
    assert_eq!((other.status, &other.error()["code"]), (422, &json!("idempotency_key_reused")));
    assert_eq!(server.send(&keyed("twice", &body(&json!({})))).await.status, 200);
    assert_eq!(server.leader.seen().len(), 2);
}

/// So that an answer that was lost with its gateway is the same when it is computed again.
#[tokio::test]
async fn a_key_stands_in_for_the_seed_wherever_it_is_asked() {
    let (server, another) =
        (Server::start(Rule::default()).await, Server::start(Rule::default()).await);
    let streamed = body(&json!({"stream": true}));
    for (key, body) in
        [("k", &streamed), ("k", &streamed), ("l", &streamed), ("n", &body(&json!({})))]
    {
        assert_eq!(server.send(&keyed(key, body)).await.status, 200);
        assert_eq!(another.send(&keyed(key, body)).await.status, 200);
    }
    let seen = seeds(&server);
    assert_eq!(seen, seeds(&another));
    assert_eq!(seen[0], seen[1], "a stream is computed again, to the same bytes");
    assert!(seen[0] != seen[2] && seen[0] != seen[3], "another key or body, another seed");
    for other in [body(&json!({})), body(&json!({"stream": true, "max_tokens": 8}))] {
        let reply = server.send(&keyed("k", &other)).await;
        assert_eq!((reply.status, &reply.error()["code"]), (422, &json!("idempotency_key_reused")));
    }
    // A stream that was refused may be mended, one that waits is no other.
    let long = body(&json!({"stream": true, "max_tokens": 100_000}));
    assert_eq!(server.send(&keyed("o", &long)).await.status, 400);
    let two = keyed("o", &streamed);
    let (one, two) = tokio::join!(server.send(&two), server.send(&two));
    assert_eq!((one.status, two.status), (200, 200));
    let seen = seeds(&server);
    assert_eq!(seen[4], seen[5]);
    // A seed that is named counts; without a key each request has its own.
    server.send(&keyed("m", &body(&json!({"seed": 7})))).await;
    server.complete(json!({"prompt": "a"})).await;
    server.complete(json!({"prompt": "a"})).await;
    let seen = seeds(&server);
    assert_eq!(seen[6], 7);
    assert_ne!(seen[7], seen[8]);
}

#[tokio::test]
async fn what_came_to_nothing_is_not_remembered() {
    let rule = Rule { pace: Duration::from_millis(20), ..Rule::default() };
    let server = Server::start(rule).await;
    let sent = keyed("left", &body(&json!({"max_tokens": 40})));
    let mut stream = server.connect().await;
    stream.write_all(&sent).await.expect("sends");
    server.leader.wait_open(1).await;
    let waiting = server.send(&sent);
    let leaving = async {
        tokio::time::sleep(Duration::from_millis(60)).await;
        drop(stream);
    };
    let (reply, ()) = tokio::join!(waiting, leaving);
    assert_eq!(reply.status, 200, "who waited for it takes its place: {}", reply.text());
    assert_eq!(server.leader.seen().len(), 2);
    // Refused requests may be mended and sent again.
    let refused = server.send(&keyed("mended", &body(&json!({"max_tokens": 100_000})))).await;
    assert_eq!(refused.status, 400);
    assert_eq!(server.send(&keyed("mended", &body(&json!({})))).await.status, 200);
}

#[tokio::test]
async fn keys_are_short_plain_texts() {
    let server = Server::start(Rule::default()).await;
    for key in ["", &"k".repeat(256), "k\r\nidempotency-key: l", "\u{e9}"] {
        let reply = server.send(&keyed(key, &body(&json!({})))).await;
        assert_eq!(reply.status, 400, "{key:?}: {}", reply.text());
        assert_eq!(reply.error()["param"], "idempotency-key");
    }
    assert_eq!(server.send(&keyed(&"k".repeat(255), &body(&json!({})))).await.status, 200);
}
