//! Who gets through to a service, and that nobody else's bytes ever do.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use identity::{Admit, ClusterCa, Expect, NODE_LIFE, Role, Roll, TOKEN_LIFE, Tls};
use support::{Server, asked_by, ca, called, credential, node};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::pki_types::UnixTime;
use tokio_rustls::rustls::time_provider::TimeProvider;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use wire::pb::worker_client::WorkerClient;
use wire::{pb, transport};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A clock that stands still.
#[derive(Debug)]
struct At(SystemTime);

impl TimeProvider for At {
    fn current_time(&self) -> Option<UnixTime> {
        let since = self.0.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(since))
    }
}

/// What comes back before the connection ends.
async fn answer(mut stream: impl AsyncReadExt + Unpin) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A reset is as good an end as any.
    let _ = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes)).await;
    bytes
}

/// A connection that stood when its node was removed breaks, and the next one says why.
#[tokio::test]
async fn a_removed_node_loses_the_connections_that_it_has() {
    let ca = ca();
    let here = node(&ca, 1, Role::Worker);
    let server = Server::start(&here, Admit::nodes()).await;
    let (gone, stays) = (node(&ca, 2, Role::Worker), node(&ca, 3, Role::Worker));
    let mut lost = server.client(Expect::Node(1), &gone).await.unwrap();
    let mut kept = server.client(Expect::Node(1), &stays).await.unwrap();
    lost.counts(pb::CountsRequest::default()).await.unwrap();
    kept.counts(pb::CountsRequest::default()).await.unwrap();
    here.refuse(Roll { given: 3, present: [1, 3].into() });
    let broken = lost.counts(pb::CountsRequest::default()).await.unwrap_err();
    assert!(!transport::removed(&broken), "that was the old connection: {broken:?}");
    let refused = lost.counts(pb::CountsRequest::default()).await.unwrap_err();
    assert!(transport::removed(&refused), "{refused:?}");
    let told = server.client(Expect::Node(1), &gone).await.expect_err("a refusal");
    assert!(matches!(told, transport::ConnectError::Removed { .. }), "{told}");
    kept.counts(pb::CountsRequest::default()).await.unwrap();
}

#[tokio::test]
async fn plaintext_gets_no_answer() {
    let ca = ca();
    let server = Server::start(&node(&ca, 1, Role::Worker), Admit::nodes()).await;
    // An HTTP/2 client that knows no TLS: its whole request waits to be parsed.
    let endpoint = transport::endpoint(&server.address).unwrap();
    assert!(match endpoint.connect().await {
        Err(_) => true,
        Ok(channel) =>
            WorkerClient::new(channel).counts(pb::CountsRequest::default()).await.is_err(),
    });
    let mut bare = TcpStream::connect(&server.address).await.unwrap();
    bare.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let answer = answer(bare).await;
    // At most an alert of TLS (kind 21), never a frame of HTTP/2.
    assert!(answer.is_empty() || answer[0] == 21, "{answer:?}");
    assert_eq!(server.calls(), 0);
    assert_eq!(server.handshakes.admitted(), 0);
    assert!(server.handshakes.refused() >= 2);
}

/// Who knows the authority of `ca`, as an ordinary TLS client does.
fn knowing(ca: &ClusterCa) -> (Arc<CryptoProvider>, Arc<WebPkiServerVerifier>) {
    let mut roots = RootCertStore::empty();
    roots.add(ca.certificate().clone()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), provider.clone());
    (provider, verifier.build().unwrap())
}

/// Nobody hears one who connects like this, though its own side of the handshake ends well.
async fn unheard(mut config: ClientConfig, ca: &ClusterCa) {
    let server = Server::start(&node(ca, 1, Role::Worker), Admit::members()).await;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = format!("n1.{}.phalanx", ca.cluster()).try_into().unwrap();
    let stream = TcpStream::connect(&server.address).await.unwrap();
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let _ = stream.write_all(preface).await;
    assert!(answer(stream).await.is_empty());
    assert_eq!((server.calls(), server.handshakes.admitted()), (0, 0));
    assert_eq!(server.handshakes.refused(), 1);
}

#[tokio::test]
async fn without_a_certificate_nobody_is_heard() {
    let ca = ca();
    let (provider, verifier) = knowing(&ca);
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_webpki_verifier(verifier)
        .with_no_client_auth();
    unheard(config, &ca).await;
}

#[tokio::test]
async fn another_clusters_certificate_is_not_heard() {
    let ca = ca();
    let stranger = node(&self::ca(), 2, Role::Worker);
    let config = stranger.client_config(Expect::Node(1), &[]).unwrap();
    let mut config = ClientConfig::clone(&config);
    config.dangerous().set_certificate_verifier(knowing(&ca).1);
    unheard(config, &ca).await;
}

#[tokio::test]
async fn strangers_are_refused_and_told_why() {
    let (ca, now) = (ca(), SystemTime::now());
    // The server's clock is 100 days ahead, when certificates of 90 days have expired.
    let lasting = |id| ca.node(id, Role::Worker, 300 * DAY, now).unwrap();
    let tls = Tls::with_clock(lasting(1), Arc::new(At(now + 100 * DAY))).unwrap();
    let server = Server::start(&tls, Admit::nodes()).await;
    let strangers = [
        ("it has expired", ca.node(2, Role::Worker, NODE_LIFE, now).unwrap()),
        ("not admitted there", ca.operator("ops", 300 * DAY, now).unwrap()),
        ("not admitted there", ca.token(Role::Worker, 1, 300 * DAY, now).unwrap()),
    ];
    for (why, stranger) in strangers {
        let who = format!("{stranger:?}");
        let stranger = Tls::new(stranger).unwrap();
        let refused = server.client(Expect::Node(1), &stranger).await.unwrap_err().to_string();
        assert!(refused.contains(why), "{who}: {refused}");
    }
    assert_eq!((server.calls(), server.handshakes.admitted()), (0, 0));
    // And one who belongs there is heard.
    let member = Tls::new(lasting(2)).unwrap();
    let mut client = server.client(Expect::Node(1), &member).await.unwrap();
    assert_eq!(asked_by(&mut client).await, called(member.peer()));
    assert_eq!((server.calls(), server.handshakes.admitted()), (1, 1));
}

#[tokio::test]
async fn each_caller_is_known_by_its_certificate() {
    let (ca, now) = (ca(), SystemTime::now());
    let server = Server::start(&node(&ca, 1, Role::Coordinator), Admit::members()).await;
    for caller in [
        node(&ca, 2, Role::Worker),
        node(&ca, 3, Role::Coordinator),
        Tls::new(ca.operator("ops", NODE_LIFE, now).unwrap()).unwrap(),
        Tls::new(ca.token(Role::Worker, 5, TOKEN_LIFE, now).unwrap()).unwrap(),
    ] {
        let mut client = server.client(Expect::AnyCoordinator, &caller).await.unwrap();
        assert_eq!(asked_by(&mut client).await, called(caller.peer()));
    }
}

#[tokio::test]
async fn another_node_at_an_address_is_not_taken_for_the_right_one() {
    let ca = ca();
    let server = Server::start(&node(&ca, 1, Role::Worker), Admit::members()).await;
    let caller = node(&ca, 2, Role::Coordinator);
    for expect in [Expect::Node(3), Expect::AnyCoordinator] {
        let refused = server.client(expect, &caller).await.unwrap_err().to_string();
        assert!(refused.contains("another node's"), "{refused}");
    }
    // A channel that connects by itself says the same when it is used.
    let endpoint = transport::endpoint(&server.address).unwrap();
    let channel = transport::connect_lazy(&endpoint, Expect::Node(3), &caller);
    let status = transport::worker_client(channel).counts(pb::CountsRequest::default()).await;
    let reason = transport::reason(&status.unwrap_err());
    assert!(reason.contains("another node's"), "{reason}");
    assert_eq!((server.calls(), server.handshakes.admitted()), (0, 0));
    let nobody = transport::connect("127.0.0.1:1", Expect::Node(1), &caller).await.unwrap_err();
    assert!(nobody.to_string().contains("cannot be reached"), "{nobody}");
}

#[tokio::test]
async fn a_renewed_certificate_is_used_while_streams_run() {
    let (old, now) = (ca(), SystemTime::now());
    let new = old.successor(now).unwrap();
    let both = vec![old.certificate().clone(), new.certificate().clone()];
    let (here, caller) = (node(&old, 1, Role::Worker), node(&old, 2, Role::Worker));
    let server = Server::start(&here, Admit::nodes()).await;
    let mut client = server.client(Expect::Node(1), &caller).await.unwrap();
    let (orders, queue) = mpsc::channel(1);
    let mut reports = client.steps(ReceiverStream::new(queue)).await.unwrap().into_inner();
    let mut number = 0;
    let mut step = async || {
        number += 1;
        let entry = pb::StepEntry { tokens: vec![1; 3000], want: 2, ..Default::default() };
        let plan = pb::StepPlan { number, entries: vec![entry], ..Default::default() };
        orders.send(plan).await.unwrap();
        let report = reports.message().await.unwrap().unwrap();
        assert_eq!((report.number, report.error.len()), (number, 3000));
    };
    step().await;
    // First everybody trusts both authorities, then everybody is certified by the new one, then
    // the old one is forgotten.
    let renewed = |ca, roots: &[_]| {
        let roots: Vec<_> = roots.to_vec();
        let here: &Tls = &here;
        here.reload(credential(ca, 1, Role::Worker).with_roots(roots.clone())).unwrap();
        caller.reload(credential(ca, 2, Role::Worker).with_roots(roots)).unwrap();
    };
    for (ca, roots) in [(&old, &both[..]), (&new, &both[..]), (&new, &both[1..])] {
        renewed(ca, roots);
        step().await;
        let mut fresh = server.client(Expect::Node(1), &caller).await.unwrap();
        assert_eq!(asked_by(&mut fresh).await, called(caller.peer()));
        step().await;
    }
    // One who still shows the old certificate is refused now.
    let late = Tls::new(credential(&old, 3, Role::Worker).with_roots(both)).unwrap();
    assert!(server.client(Expect::Node(1), &late).await.is_err());
}

#[tokio::test]
async fn a_channel_reconnects_with_the_certificate_of_the_moment() {
    let old = ca();
    let new = old.successor(SystemTime::now()).unwrap();
    let caller = node(&old, 2, Role::Worker);
    let first = Server::start(&node(&old, 1, Role::Worker), Admit::nodes()).await;
    let endpoint = transport::endpoint(&first.address).unwrap();
    let channel = transport::connect_lazy(&endpoint, Expect::Node(1), &caller);
    let mut client = transport::worker_client(channel);
    assert_eq!(asked_by(&mut client).await, called(caller.peer()));

    // The server comes back under the new authority alone, and so does the caller.
    let address = first.address.clone();
    first.end().await;
    let listener = TcpListener::bind(&address).await.unwrap();
    let second = Server::on(listener, &node(&new, 1, Role::Worker), Admit::nodes());
    caller.reload(credential(&new, 2, Role::Worker)).unwrap();
    let again = async {
        while asked_by(&mut client).await != called(caller.peer()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), again).await.unwrap();
    assert_eq!(second.calls(), 1);
}

#[tokio::test]
async fn silent_connections_keep_nobody_out() {
    let ca = ca();
    let server = Server::start(&node(&ca, 1, Role::Worker), Admit::nodes()).await;
    let mut silent = Vec::new();
    for _ in 0..150 {
        silent.push(TcpStream::connect(&server.address).await.unwrap());
    }
    let caller = node(&ca, 2, Role::Worker);
    let began = std::time::Instant::now();
    let mut client = server.client(Expect::Node(1), &caller).await.unwrap();
    assert_eq!(asked_by(&mut client).await, called(caller.peer()));
    assert!(began.elapsed() < Duration::from_secs(4), "it waited for the silent ones");
    // The oldest of them have been let go.
    assert!(server.handshakes.refused() >= 150 - 64);
    assert!(answer(silent.remove(0)).await.is_empty());
}

/// Passes one connection on to `target`; returns where to connect, and what passed when it ends.
async fn proxy(target: String) -> (String, tokio::task::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let tape = tokio::spawn(async move {
        let (near, _) = listener.accept().await.unwrap();
        let far = TcpStream::connect(target).await.unwrap();
        let (near, far) = (near.into_split(), far.into_split());
        let (there, back) = tokio::join!(pass(near.0, far.1), pass(far.0, near.1));
        [there, back].concat()
    });
    (address, tape)
}

async fn pass(mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin) -> Vec<u8> {
    let mut tape = Vec::new();
    let mut bytes = [0; 4096];
    while let Ok(count) = from.read(&mut bytes).await {
        tape.extend(&bytes[..count]);
        if count == 0 || to.write_all(&bytes[..count]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
    tape
}

/// A request whose prompt can be found again: token ids of one byte each are bytes on the wire.
const PROMPT: &[u8] = b"what nobody but the two of us should read";

async fn ask(channel: Channel) {
    let prompt = PROMPT.iter().map(|byte| u32::from(*byte)).collect();
    let request = pb::GenerateRequest { prompt, ..Default::default() };
    assert!(transport::worker_client(channel).generate(request).await.is_err());
}

#[tokio::test]
async fn prompts_are_not_seen_between_gateway_and_worker() {
    let ca = ca();
    let sees = |tape: &[u8]| tape.windows(PROMPT.len()).any(|window| window == PROMPT);
    let server = Server::start(&node(&ca, 1, Role::Worker), Admit::nodes()).await;
    let (near, tape) = proxy(server.address.clone()).await;
    let gateway = node(&ca, 2, Role::Coordinator);
    ask(transport::connect(&near, Expect::Node(1), &gateway).await.unwrap()).await;
    let tape = tape.await.unwrap();
    assert!(server.calls() == 1 && tape.len() > 1000);
    assert!(!sees(&tape), "the prompt is on the wire");
    // Nor do the names of nodes tell anybody who speaks to whom.
    let cluster = ca.cluster().to_string();
    assert!(!tape.windows(cluster.len()).any(|window| window == cluster.as_bytes()));

    // The same call without TLS, past the same eyes: they do see.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let echo = transport::worker_server(support::Echo::default());
    let bare = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(transport::server().add_service(echo).serve_with_incoming(bare));
    let (near, tape) = proxy(address).await;
    ask(transport::endpoint(&near).unwrap().connect().await.unwrap()).await;
    assert!(sees(&tape.await.unwrap()), "this test would see nothing anyway");
}
