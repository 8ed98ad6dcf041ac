//! Groups that end in the middle of answers: their clients see a pause, and the same bytes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use tonic::Code;

use super::leader::Rule;
use super::*;

fn losing(losses: &[usize]) -> Rule {
    let losses = Arc::new(Mutex::new(VecDeque::from(losses.to_vec())));
    // Slow enough that a token has arrived before the group ends over the next one.
    Rule { losses, pace: Duration::from_millis(3), ..Rule::default() }
}

/// Requests of every kind: whole and streamed, both APIs, everything that is derived from tokens.
fn requests() -> Vec<(&'static str, Value)> {
    let completion = |body: Value| ("/v1/completions", body);
    let message = json!([{"role": "user", "content": "a b c"}]);
    let mut all = vec![
        completion(json!({"prompt": "a b c d", "max_tokens": 9})),
        completion(json!({"prompt": "é日🙂x", "max_tokens": 40, "logprobs": 3})),
        completion(json!({"prompt": ["a b", "c d"], "n": 2, "max_tokens": 12, "logprobs": 0})),
        completion(json!({"prompt": "a b c d", "max_tokens": 7, "echo": true, "logprobs": 2})),
        completion(json!({"prompt": "abcdef", "max_tokens": 30, "stop": ["efa"], "n": 2})),
        completion(json!({"prompt": "abcdef", "max_tokens": 30, "stop": ["fab"],
                          "include_stop_str_in_output": true, "min_tokens": 3})),
        completion(json!({"prompt": "abc", "max_tokens": 1})),
        ("/v1/chat/completions", json!({"messages": message, "max_tokens": 12})),
        (
            "/v1/chat/completions",
            json!({"messages": message, "max_tokens": 12, "n": 2,
                                        "logprobs": true, "top_logprobs": 2}),
        ),
    ];
    let streamed: Vec<_> = all
        .iter()
        .map(|(path, body)| {
            let mut body = body.clone();
            body["stream"] = json!(true);
            body["stream_options"] = json!({"include_usage": true});
            (*path, body)
        })
        .collect();
    all.extend(streamed);
    all
}

/// Everything that a client is shown, without what every answer has of its own. Chunks of one
/// choice stay in order; those of several may come in any.
async fn shown(server: &Server, path: &str, body: &Value) -> String {
    let mut body = body.clone();
    body["model"] = json!("demo");
    let reply = server.post(path, &body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let own = |mut value: Value| {
        for field in ["id", "created"] {
            if let Some(fields) = value.as_object_mut() {
                fields.remove(field);
            }
        }
        value
    };
    if body["stream"] != true {
        return own(reply.json()).to_string();
    }
    assert!(reply.complete, "the connection was cut: {}", reply.text());
    let mut events: Vec<Value> = reply.events().into_iter().map(own).collect();
    events.sort_by_key(|event| event["choices"][0]["index"].as_u64().unwrap_or(u64::MAX));
    events.iter().map(|event| format!("{event}\n")).collect()
}

#[tokio::test]
async fn a_group_that_is_lost_is_a_pause_and_nothing_else() {
    let undisturbed = Server::start(Rule::default()).await;
    for (path, body) in requests() {
        let gold = shown(&undisturbed, path, &body).await;
        assert!(!gold.contains("\"error\""), "{gold}");
        // Before the first token, in the middle, twice at the same place, over the last word.
        for losses in [&[0][..], &[3], &[1, 1], &[2, 4, 6], &[0, 1, 2, 3, 4, 5], &[9], &[12, 7]] {
            if losses.len() > 3 && (body["n"].is_u64() || body["prompt"].is_array()) {
                // Where several share a group each loss is one of all.
                continue;
            }
            let server = Server::start(losing(losses)).await;
            let same = shown(&server, path, &body).await;
            assert_eq!(same, gold, "{path} {body} with losses {losses:?}");
        }
    }
}

#[tokio::test]
async fn what_was_said_is_passed_on_and_counted() {
    let server = Server::start(losing(&[3])).await;
    let body = json!({"prompt": "a b c d", "max_tokens": 9, "echo": true, "logprobs": 1});
    server.complete(body).await;
    let [first, second] = &server.leader.seen()[..] else { panic!("two attempts") };
    assert_eq!((first.epoch, second.epoch), (9, 10));
    assert!(first.generated.is_empty() && first.scored == 0);
    // What was under way when the epoch ended is refused and computed again.
    let answer: Vec<u32> = first.prompt.iter().copied().cycle().take(3).collect();
    assert!(answer.starts_with(&second.generated), "{second:?}");
    assert_eq!(second.scored as usize, first.prompt.len() - 1);
    let metrics = server.get("/metrics").await.text();
    for line in ["phalanx_sequences_resumed_total 1", "phalanx_resume_pause_seconds_count 1"] {
        assert!(metrics.lines().any(|one| one == line), "{line} is not in\n{metrics}");
    }
    let success = metrics.lines().filter(|one| one.starts_with("vllm:request_success_total"));
    assert_eq!(success.count(), 1, "a sequence that goes on is neither ended nor aborted");
}

#[tokio::test]
async fn nothing_of_another_epoch_is_shown() {
    let body = json!({"prompt": "a b c d", "max_tokens": 400});
    let gold = Server::start(Rule::default()).await.complete(body.clone()).await;
    let mislabelled = Server::start(Rule { mislabelled: Some(5), ..Rule::default() }).await;
    assert_eq!(mislabelled.complete(body.clone()).await["choices"], gold["choices"]);
    let metrics = mislabelled.get("/metrics").await.text();
    assert!(metrics.lines().any(|one| one == "phalanx_stale_tokens_total 1"), "{metrics}");
    // A group that is fenced and does not know it goes on talking, and faster than the view.
    let server = Server::start(Rule { ghost: Some(7), ..Rule::default() }).await;
    let (view, leader) = (server.view.clone(), server.leader.clone());
    let fencing = tokio::spawn(async move {
        let mut epoch = 9;
        loop {
            let before = leader.produced();
            while leader.produced() < before + 250 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            view.fence(epoch);
            epoch += 1;
        }
    });
    for _ in 0..10 {
        assert_eq!(server.complete(body.clone()).await["choices"], gold["choices"]);
    }
    fencing.abort();
    assert!(server.view.get().is_ok_and(|route| route.epoch > Epoch(11)), "nothing was fenced");
}

#[tokio::test]
async fn a_request_that_ends_its_groups_is_answered_and_others_are_not_hurt() {
    let undisturbed = Server::start(Rule::default()).await;
    let bad = undisturbed.ids("!").await[0];
    let body = json!({"prompt": "a b c d", "max_tokens": 60, "logprobs": 1});
    let gold = undisturbed.complete(body.clone()).await["choices"].clone();
    let pace = Duration::from_millis(5);
    for stream in [false, true] {
        let rule = Rule { pace, poison: Some((bad, 4)), ..Rule::default() };
        let server = Server::start(rule).await;
        let poison = json!({"model": "demo", "prompt": "! x", "max_tokens": 9, "stream": stream});
        let poisoned = server.post("/v1/completions", &poison);
        let (poisoned, one, other) =
            tokio::join!(poisoned, server.complete(body.clone()), server.complete(body.clone()));
        assert_eq!((&one["choices"], &other["choices"]), (&gold, &gold));
        let text = poisoned.text();
        assert!(text.contains("request_quarantined"), "{text}");
        assert_eq!(poisoned.status, if stream { 200 } else { 500 });
        assert!(!text.contains("[DONE]"));
        let attempts = server.leader.seen().iter().filter(|one| one.prompt[0] == bad).count();
        assert_eq!(attempts, 5, "twice among others, once among few, and twice alone");
        // The place is free again.
        let again = server.post("/v1/completions", &poison).await;
        assert!(again.text().contains("request_quarantined"), "{}", again.text());
    }
}

#[tokio::test]
async fn a_line_of_suspects_is_waited_for() {
    const CLIENTS: usize = 64;
    let rule = Rule { pace: Duration::from_millis(100), mute_before: 11, ..Rule::default() };
    let server = Arc::new(Server::start(rule).await);
    let body = json!({"model": "demo", "prompt": "a b c d", "max_tokens": 1});
    let client = || {
        let (server, body) = (Arc::clone(&server), body.clone());
        tokio::spawn(async move { server.post("/v1/completions", &body).await })
    };
    let clients: Vec<_> = (0..CLIENTS).map(|_| client()).collect();
    // Two groups are lost under all of them, before any has a token.
    for epoch in [9, 10] {
        while server.leader.seen().iter().filter(|one| one.epoch == epoch).count() < CLIENTS {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // The gateway has to hear that they were taken.
        tokio::time::sleep(Duration::from_millis(200)).await;
        server.view.fence(epoch);
    }
    let most = async {
        let mut most = 0;
        while server.leader.seen().len() < 3 * CLIENTS {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let seen = server.leader.seen();
            let last = seen.iter().filter(|one| one.epoch == 11).count();
            // By the second turn nothing of the lost groups is left.
            most = most.max(if last > 8 { server.leader.open() } else { 0 });
        }
        most
    };
    let most = tokio::time::timeout(Duration::from_secs(60), most).await.expect("all are tried");
    assert!((2..=8).contains(&most), "{most} suspects at a time");
    for client in clients {
        let answer = client.await.expect("a client");
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

#[tokio::test]
async fn ranks_that_move_are_nobodys_fault() {
    let bad = Server::start(Rule::default()).await.ids("!").await[0];
    let rule = Rule { poison: Some((bad, 4)), ..Rule::default() };
    let server = Server::start(rule).await;
    server.view.moved.store(true, Ordering::SeqCst);
    let body = json!({"model": "demo", "prompt": "! x", "max_tokens": 9});
    let answer = server.post("/v1/completions", &body).await;
    // It never gets a token here and gives up in the end, as everybody's patience does.
    assert_eq!(answer.status, 503, "{}", answer.text());
    assert!(!answer.text().contains("request_quarantined"), "{}", answer.text());
    let attempts = server.leader.seen().iter().filter(|one| one.prompt[0] == bad).count();
    assert!(attempts > 4, "{attempts} attempts");
}

#[tokio::test]
async fn requests_wait_for_a_group_that_is_repaired_but_not_for_ever() {
    let server = Server::start(Rule::default()).await;
    let body = json!({"model": "demo", "prompt": "abc", "max_tokens": 3});
    let route = server.view.get();
    server.view.set(nothing("group 3 forms", Outlook::Returns));
    let answered = async {
        let answer = server.post("/v1/completions", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    };
    let repaired = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(server.leader.seen().is_empty());
        server.view.set(route);
    };
    tokio::join!(answered, repaired);
    for outlook in [Outlook::Returns, Outlook::Wished, Outlook::Gone] {
        server.view.set(nothing("group 3 forms", outlook));
        let late = server.post("/v1/completions", &body).await;
        assert_eq!((late.status, &late.error()["code"]), (503, &json!("model_not_ready")));
        assert!(late.text().contains("group 3 forms") && late.header("retry-after").is_some());
    }
}

#[tokio::test]
async fn health_names_what_stalls_and_takes_nobody_busy_for_dead() {
    let why = "a step has taken 900 ms, in the sum of attention in layer 1: rank 1 on node 3 does \
               not answer";
    let server = Server::start(Rule { stalled: why.to_owned(), ..Rule::default() }).await;
    for path in ["/health", "/readyz"] {
        let sick = server.get(path).await;
        assert_eq!((sick.status, sick.text().contains(why)), (503, true), "{}", sick.text());
    }
    assert_eq!(server.get("/livez").await.status, 200);
    // Idle, it has to give a token; nobody asks it twice within a moment.
    let server = Server::start(Rule::default()).await;
    for _ in 0..3 {
        assert_eq!(server.get("/readyz").await.status, 200);
    }
    let asked: Vec<String> = server.leader.seen().into_iter().map(|one| one.request_id).collect();
    assert_eq!(asked, ["canary"]);
    // One that gives none is not well, until it is seen to compute.
    let server = Server::start(Rule { refuse: Some(Code::Unavailable), ..Rule::default() }).await;
    let sick = server.get("/readyz").await;
    assert_eq!((sick.status, sick.text().contains("gives no token")), (503, true));
    tokio::time::sleep(Duration::from_millis(250)).await;
    assert_eq!(server.get("/readyz").await.status, 200, "its steps go on: it is busy");
}

#[tokio::test]
async fn startup_is_over_once_a_group_has_served() {
    let server = Server::start(Rule::default()).await;
    let route = server.view.get();
    server.view.set(nothing("2 of 3 ranks have joined", Outlook::Wished));
    let early = server.get("/startupz").await;
    assert_eq!((early.status, early.text().contains("2 of 3 ranks")), (503, true));
    assert!(early.text().contains("rank 1 on node 2: loaded 40 %"), "{}", early.text());
    server.view.set(route);
    assert_eq!(server.get("/startupz").await.status, 200);
    server.view.set(nothing("group 3 forms", Outlook::Returns));
    assert_eq!(server.get("/startupz").await.status, 200, "a repair is no start");
}

#[tokio::test]
async fn what_does_not_get_on_in_this_process_is_not_alive() {
    let hangs = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&hangs);
    let why = "group 3: rank 0 has not advanced for 12000 ms";
    let vitals = move || seen.load(Ordering::SeqCst).then(|| why.to_owned());
    let server = Server::living(Rule::default(), config(), Arc::new(vitals)).await;
    assert_eq!(server.get("/livez").await.status, 200);
    hangs.store(true, Ordering::SeqCst);
    let hanging = server.get("/livez").await;
    assert_eq!((hanging.status, hanging.error()["message"].clone()), (503, json!(why)));
    hangs.store(false, Ordering::SeqCst);
    // A cluster that cannot answer is no reason to start this process again.
    server.view.set(nothing("2 of 3 ranks have joined", Outlook::Returns));
    assert_eq!(server.get("/livez").await.status, 200);
    let sick = server.get("/readyz").await;
    assert!(sick.text().contains("is being repaired: rank 1 fell"), "{}", sick.text());
}
