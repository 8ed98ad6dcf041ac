//! Requests with an idempotency key, while the whole cluster is killed under them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::control_plane::Fleet;
use crate::harness::{Http, PATIENCE};

/// Clients, and requests of each.
const CLIENTS: usize = 4;
const REQUESTS: usize = 6;

/// Sampled, and without a seed: only its key makes it the same twice.
fn body(key: &str) -> Value {
    json!({
        "model": "demo", "prompt": format!("Tell of {key}:"), "max_tokens": 120,
        "temperature": 0.9, "ignore_eos": true, "logprobs": 1,
    })
}

/// What a client is told, apart from what each answer has of its own.
fn told(answer: &str) -> String {
    let answer: Value = serde_json::from_str(answer).expect("an answer in JSON");
    json!([answer["choices"], answer["usage"]]).to_string()
}

/// Asks until it is answered, wherever the gateway is by then; how often it had to.
fn insist(at: &Mutex<Http>, key: &str) -> (String, usize) {
    let until = Instant::now() + PATIENCE;
    for times in 1.. {
        let http = at.lock().expect("not poisoned").clone();
        match http.try_post_keyed("/v1/completions", &body(key), key) {
            Some((200, answer)) => return (told(&answer), times),
            // It says that it cannot answer, or nobody is there: the request is not lost.
            Some((503, _)) | None => {}
            Some((status, answer)) => panic!("{status}: {answer}"),
        }
        assert!(Instant::now() < until, "{key} is never answered");
        std::thread::sleep(Duration::from_millis(100));
    }
    unreachable!("it is asked until it is answered")
}

#[test]
fn keyed_requests_are_answered_once_though_the_whole_cluster_is_killed() {
    let mut fleet = Fleet::start(3, 2, 2);
    let at = Mutex::new(fleet.coordinators[0].1.http());
    let (answered, again) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let answers = std::thread::scope(|scope| {
        let client = |client: usize| {
            let (at, answered, again) = (&at, &answered, &again);
            scope.spawn(move || {
                let one = |request: usize| {
                    let key = format!("key-{client}-{request}");
                    let (answer, times) = insist(at, &key);
                    answered.fetch_add(1, Ordering::SeqCst);
                    again.fetch_add(times - 1, Ordering::SeqCst);
                    (key, answer)
                };
                (0..REQUESTS).map(one).collect::<Vec<_>>()
            })
        };
        let clients: Vec<_> = (0..CLIENTS).map(client).collect();
        let until = Instant::now() + PATIENCE;
        while answered.load(Ordering::SeqCst) < CLIENTS {
            assert!(Instant::now() < until, "nothing is answered");
            std::thread::sleep(Duration::from_millis(5));
        }
        fleet.end_and_begin();
        *at.lock().expect("not poisoned") = fleet.coordinators[1].1.http();
        let all = clients.into_iter().map(|client| client.join().expect("a client"));
        all.flatten().collect::<Vec<_>>()
    });
    let again = again.load(Ordering::SeqCst);
    println!("{} answers; requests were sent again {again} times", answers.len());
    assert!(again > 0, "nothing was under way when the cluster was killed");
    // Whoever asks once more is told the same, by any gateway, though most of these answers were
    // given in the life before, or by another; other keys have other answers.
    let others = Mutex::new(fleet.coordinators[2].1.http());
    for (key, answer) in &answers {
        assert_eq!(insist(&others, key).0, *answer, "{key}");
    }
    let different: std::collections::BTreeSet<_> = answers.iter().map(|(_, a)| a).collect();
    assert_eq!(different.len(), answers.len());
}
