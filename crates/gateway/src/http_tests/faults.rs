//! Clients that leave, leaders that fail, shutdown.

use std::time::Duration;

use tonic::Code;

use super::leader::Rule;
use super::*;

fn slow() -> Rule {
    Rule { pace: Duration::from_millis(20), ..Rule::default() }
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_sequences() {
    let server = Server::start(slow()).await;
    for stream in [true, false] {
        let body = json!({"model": "demo", "prompt": ["abc", "def"], "n": 2, "max_tokens": 400,
                          "stream": stream});
        let mut connection = server.connect().await;
        let bytes = request("POST", "/v1/completions", body.to_string().as_bytes());
        connection.write_all(&bytes).await.expect("sends");
        server.leader.wait_open(4).await;
        drop(connection);
        server.leader.wait_open(0).await;
    }
    let metrics = server.get("/metrics").await.text();
    let aborted = metrics.lines().find(|l| {
        l.starts_with("vllm:request_success_total") && l.contains("finished_reason=\"abort\"")
    });
    assert!(aborted.is_some_and(|l| l.ends_with(" 8")), "{aborted:?}");
}

#[tokio::test]
async fn a_slow_reader_holds_back_its_leader() {
    let server = Server::with(Rule::default(), {
        let mut config = config();
        config.models[0].context = 2_000_000;
        config
    })
    .await;
    let body = json!({"model": "demo", "prompt": "abc", "max_tokens": 1_900_000, "stream": true});
    let mut connection = server.connect_narrow().await;
    let bytes = request("POST", "/v1/completions", body.to_string().as_bytes());
    connection.write_all(&bytes).await.expect("sends");
    server.leader.wait_open(1).await;
    // Unread, the answer stops for want of room between the leader and here: once the count
    // stands still it must be far from its end.
    let mut before = usize::MAX;
    while before != server.leader.produced() {
        before = server.leader.produced();
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert!((1..500_000).contains(&before), "{before} tokens were made for nobody");
    let others = server.complete(json!({"prompt": "x", "max_tokens": 50})).await;
    assert_eq!(others["usage"]["completion_tokens"], 50, "others are served meanwhile");
    assert_eq!(server.leader.open(), 1);
    drop(connection);
    server.leader.wait_open(0).await;
}

#[tokio::test]
async fn a_client_that_never_reads_is_left() {
    let mut config = config();
    config.models[0].context = 2_000_000;
    config.limits.send_timeout = Duration::from_millis(300);
    let server = Server::with(Rule::default(), config).await;
    let body = json!({"model": "demo", "prompt": "abc", "max_tokens": 1_900_000, "stream": true});
    let mut connection = server.connect_narrow().await;
    let bytes = request("POST", "/v1/completions", body.to_string().as_bytes());
    connection.write_all(&bytes).await.expect("sends");
    server.leader.wait_open(1).await;
    let left = tokio::time::timeout(Duration::from_secs(60), async {
        while server.leader.open() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(left.await.is_ok(), "the sequence still runs");
    let made = server.leader.produced();
    assert!(made < 500_000, "{made} tokens: it ended by itself");
    drop(connection);
}

#[tokio::test]
async fn large_bodies_wait_for_room_but_not_for_ever_and_small_ones_need_none() {
    let mut config = config();
    config.limits.bodies_bytes = 2048;
    config.limits.room_timeout = Duration::from_millis(600);
    let server = Server::with(Rule::default(), config).await;
    let mut slow = server.connect().await;
    let head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 67536\r\n\
                 content-type: application/json\r\n\r\n";
    slow.write_all(head).await.expect("sends");
    slow.write_all(&vec![b' '; 67_436]).await.expect("sends");
    tokio::time::sleep(Duration::from_millis(200)).await;
    let small = json!({"model": "demo", "prompt": "x", "max_tokens": 1}).to_string();
    let large = small.clone() + &" ".repeat(67_000);
    let path = "/v1/completions";
    assert_eq!(server.send(&request("POST", path, small.as_bytes())).await.status, 200);
    let large = request("POST", path, large.as_bytes());
    let reply = server.send(&large).await;
    assert_eq!((reply.status, reply.error()["code"].clone()), (503, json!("no_room_for_body")));
    assert!(reply.header("retry-after").is_some());
    let (second, ()) = tokio::join!(server.send(&large), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        drop(slow);
    });
    assert_eq!(second.status, 200, "room came free in time");
}

#[tokio::test]
async fn clients_that_announce_bodies_and_send_none_hold_nothing() {
    let server = Server::start(Rule::default()).await;
    let mut silent = Vec::new();
    for announced in ["transfer-encoding: chunked", "content-length: 4000000"] {
        for _ in 0..70 {
            let mut connection = server.connect().await;
            let head = format!(
                "POST /v1/completions HTTP/1.1\r\nhost: x\r\n{announced}\r\n\
                 content-type: application/json\r\n\r\n"
            );
            connection.write_all(head.as_bytes()).await.expect("sends");
            silent.push(connection);
        }
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let body = json!({"prompt": "x", "max_tokens": 1});
    let answered = tokio::time::timeout(Duration::from_secs(3), server.complete(body));
    assert!(answered.await.is_ok(), "silent clients hold others back");
}

#[tokio::test]
async fn idle_connections_give_way_and_busy_ones_do_not() {
    let mut config = config();
    config.limits.connections = 4;
    let server = Server::with(slow(), config).await;
    let mut idle = Vec::new();
    for _ in 0..8 {
        idle.push(server.connect().await);
        let alive = tokio::time::timeout(Duration::from_secs(3), server.get("/livez"));
        assert_eq!(alive.await.expect("idle ones are in the way").status, 200);
    }
    let mut busy = Vec::new();
    let body = json!({"model": "demo", "prompt": "abc", "max_tokens": 400, "stream": true});
    for open in 1..=4 {
        let mut connection = server.connect().await;
        let bytes = request("POST", "/v1/completions", body.to_string().as_bytes());
        connection.write_all(&bytes).await.expect("sends");
        busy.push(connection);
        server.leader.wait_open(open).await;
    }
    let refused = server.get("/v1/models").await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    assert_eq!(refused.error()["code"], "too_many_connections");
    assert_eq!(server.leader.open(), 4, "no open answer was cut");
    for path in ["/livez", "/readyz"] {
        assert_eq!(server.get(path).await.status, 200, "{path}: busy is not dead");
    }
    drop(busy.pop());
    server.leader.wait_open(3).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(server.get("/livez").await.status, 200);
}

#[tokio::test]
async fn refusals_of_the_leader_have_their_status() {
    for (code, status, name) in [
        (Code::InvalidArgument, 400, "invalid_request_error"),
        (Code::ResourceExhausted, 429, "rate_limit_error"),
        (Code::FailedPrecondition, 503, "server_error"),
        (Code::Unavailable, 503, "server_error"),
        (Code::Internal, 503, "server_error"),
    ] {
        let server = Server::start(Rule { refuse: Some(code), ..Rule::default() }).await;
        for stream in [false, true] {
            let body = json!({"model": "demo", "prompt": "x", "stream": stream});
            let reply = server.post("/v1/completions", &body).await;
            assert_eq!(reply.status, status, "{code:?}");
            assert_eq!(reply.error()["type"], name);
            assert_eq!(reply.text().contains("10.0.0.1"), code == Code::InvalidArgument);
        }
    }
}

#[tokio::test]
async fn a_leader_lost_in_mid_answer() {
    for (break_after, cut_after) in [(Some(3), None), (None, Some(3))] {
        let server = Server::start(Rule { break_after, cut_after, ..Rule::default() }).await;
        let body = json!({"model": "demo", "prompt": "a b c d", "max_tokens": 9, "stream": true});
        let reply = server.post("/v1/completions", &body).await;
        let events = reply.events();
        let (last, before) = events.split_last().expect("events");
        assert_eq!(last["error"]["type"], "server_error");
        assert_eq!(last["error"]["code"], "group_lost");
        assert!(!before.is_empty() && !before.contains(&json!("[DONE]")));
        assert!(!reply.text().contains("10.0.0.1"));
        assert!(reply.complete, "the connection itself is fine");
        let body = json!({"model": "demo", "prompt": "a b c d", "max_tokens": 9});
        let whole = server.post("/v1/completions", &body).await;
        assert_eq!((whole.status, whole.error()["code"].clone()), (503, json!("group_lost")));
    }
}

#[tokio::test]
async fn a_leader_that_is_not_there() {
    let server = Server::start(Rule::default()).await;
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = closed.local_addr().expect("an address").to_string();
    drop(closed);
    let route = route_to(&address);
    server.view.set(Ok(route));
    let reply = server.post("/v1/completions", &json!({"model": "demo", "prompt": "x"})).await;
    assert_eq!(reply.status, 503);
    assert!(!reply.text().contains(&address), "{}", reply.text());
    assert_eq!(server.get("/metrics").await.status, 200);
}

#[tokio::test]
async fn shutdown_lets_open_answers_end_for_a_while() {
    let mut config = config();
    config.limits.drain = Duration::from_millis(300);
    let mut server = Server::with(slow(), config).await;
    let mut short = server.connect().await;
    let mut long = server.connect().await;
    for (connection, count) in [(&mut short, 4), (&mut long, 400)] {
        let body = json!({"model": "demo", "prompt": "abc", "max_tokens": count});
        let bytes = request("POST", "/v1/completions", body.to_string().as_bytes());
        connection.write_all(&bytes).await.expect("sends");
    }
    server.leader.wait_open(2).await;
    drop(server.stop.take());
    let mut answer = Vec::new();
    short.read_to_end(&mut answer).await.expect("reads");
    assert_eq!(Reply::parse(&answer).status, 200);
    let mut cut = Vec::new();
    let _ = long.read_to_end(&mut cut).await;
    assert!(cut.is_empty(), "no answer within the drain time");
    server.leader.wait_open(0).await;
    let task = tokio::time::timeout(Duration::from_secs(5), &mut server.task).await;
    task.expect("ends").expect("does not panic").expect("without an error");
    assert!(TcpStream::connect(server.address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn tokenising_is_bounded_and_its_panics_stay_inside() {
    let mut config = config();
    config.limits.tokenizing = 1;
    let view = FixedView::new();
    let gateway = Gateway::new(config, Box::new(view), well(), coordinator()).expect("starts");
    let gateway = Arc::new(gateway);
    let (release, held) = std::sync::mpsc::channel::<()>();
    let busy = Arc::clone(&gateway);
    let first = tokio::spawn(async move {
        busy.tokenizing(move || {
            held.recv().expect("is released");
            Ok(())
        })
        .await
    });
    tokio::task::yield_now().await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let second = tokio::time::timeout(Duration::from_millis(200), gateway.tokenizing(|| Ok(2)));
    assert!(second.await.is_err(), "the one place is taken");
    // A request that is given up keeps its thread's place until the thread is done.
    first.abort();
    let third = tokio::time::timeout(Duration::from_millis(200), gateway.tokenizing(|| Ok(3)));
    assert!(third.await.is_err(), "the thread is still at work");
    release.send(()).expect("is waited for");
    assert_eq!(gateway.tokenizing(|| Ok(4)).await, Ok(4));
    let panicked = gateway.tokenizing(|| -> Result<(), _> { panic!("a library's mistake") }).await;
    assert_eq!(panicked.expect_err("fails").status.as_u16(), 500);
    assert_eq!(gateway.tokenizing(|| Ok(5)).await, Ok(5), "the place is free again");
}
