//! The whole gateway over HTTP on loopback, with a leader that answers by a simple rule in place
//! of a model. What the leader does is this module's; everything before it is the real thing.

mod answers;
mod faults;
mod keys;
mod leader;
mod names;
mod refusals;
mod repairs;
mod streams;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};

use cluster::{Epoch, GroupId, NodeId, Route};
use identity::{ClusterCa, NODE_LIFE, Role, Tls};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::config::{GatewayConfig, GatewayError, ModelFiles, RequestLimits, ServedModel};
use crate::gateway::Gateway;
use crate::view::{Change, Named, NoRoute, Outlook, View};
use leader::{FakeLeader, Rule};

const TOKENIZER: &[u8] = include_bytes!("../../tests/fixtures/byte_level.json");
const CONFIG: &str = include_str!("../../tests/fixtures/tokenizer_config.json");
/// Names of the fixture's control tokens, with ids from 0.
const SPECIALS: [&str; 6] =
    ["<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"];
const CONTEXT: usize = 512;

fn config() -> GatewayConfig {
    let generation = r#"{"do_sample": true, "temperature": 0.5, "top_k": 7}"#;
    GatewayConfig {
        served_names: vec!["demo".to_owned(), "alias/of-demo".to_owned()],
        models: vec![ServedModel {
            digest: "abc123".to_owned(),
            files: ModelFiles {
                tokenizer_json: TOKENIZER.to_vec(),
                tokenizer_config: Some(CONFIG.to_owned()),
                chat_template: None,
                generation_config: Some(generation.to_owned()),
            },
            context: CONTEXT,
            vocab: 509,
            bos: Some(0),
            eos: vec![1],
        }],
        limits: RequestLimits { patience: Duration::from_millis(400), ..Default::default() },
    }
}

/// A view that a test sets.
#[derive(Clone)]
struct FixedView {
    route: Arc<Mutex<Result<Route, NoRoute>>>,
    /// By name: what it means.
    names: Arc<Mutex<BTreeMap<String, Named>>>,
    /// The deployment whose groups were asked for last.
    asked: Arc<Mutex<String>>,
    /// What falls falls by choice.
    moved: Arc<AtomicBool>,
}

impl FixedView {
    fn new() -> Self {
        let route = nothing("it starts", Outlook::Wished);
        let second = ("second".to_owned(), named("second", "abc123"));
        Self {
            route: Arc::new(Mutex::new(route)),
            names: Arc::new(Mutex::new(BTreeMap::from([second]))),
            asked: Arc::default(),
            moved: Arc::default(),
        }
    }

    /// A name means this from now on; its digest is that of a model or none that is here.
    fn name(&self, name: &str, meant: Named) {
        self.names.lock().expect("not poisoned").insert(name.to_owned(), meant);
    }

    /// A name means nothing from now on.
    fn forget(&self, name: &str) {
        self.names.lock().expect("not poisoned").remove(name);
    }

    fn set(&self, to: Result<Route, NoRoute>) {
        *self.route.lock().expect("not poisoned") = to;
    }

    fn get(&self) -> Result<Route, NoRoute> {
        self.route.lock().expect("not poisoned").clone()
    }

    /// The group's next incarnation, on the same leader. A group falls once.
    fn fence(&self, epoch: u64) {
        let mut view = self.route.lock().expect("not poisoned");
        if let Ok(route) = view.as_mut()
            && route.epoch == Epoch(epoch)
        {
            route.epoch = route.epoch.next();
        }
    }
}

impl View for FixedView {
    fn routes(&self, deployment: &str) -> Result<Vec<Route>, NoRoute> {
        let names = self.names.lock().expect("not poisoned");
        let own = names.get(deployment).is_some_and(|meant| meant.deployment == deployment);
        assert!(own || deployment == "demo", "the deployment's own name is asked for");
        deployment.clone_into(&mut self.asked.lock().expect("not poisoned"));
        self.get().map(|route| vec![route])
    }

    fn meant(&self, name: &str) -> Option<Named> {
        self.names.lock().expect("not poisoned").get(name).cloned()
    }

    fn names(&self) -> Vec<String> {
        self.names.lock().expect("not poisoned").keys().cloned().collect()
    }

    fn stands(&self, route: &Route) -> bool {
        self.get().is_ok_and(|now| (now.group, now.epoch) == (route.group, route.epoch))
    }

    fn moved(&self, _: &Route) -> bool {
        self.moved.load(Ordering::SeqCst)
    }

    fn suspect(&self, _: &Route) -> Option<String> {
        None
    }

    fn trouble(&self, _: &str) -> Option<String> {
        self.get().is_err().then(|| "group 3 is being repaired: rank 1 fell".to_owned())
    }

    fn loading(&self, _: &str) -> Vec<String> {
        vec!["rank 1 on node 2: loaded 40 %".to_owned()]
    }

    fn change(&self) -> Change {
        let (view, before) = (self.clone(), self.get());
        Box::pin(async move {
            while view.get() == before {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
    }
}

/// A deployment of a model.
fn named(deployment: &str, digest: &str) -> Named {
    let (deployment, digest) = (deployment.to_owned(), digest.to_owned());
    Named { deployment, digest, context: CONTEXT, draining: false }
}

/// A process that gets on.
fn well() -> crate::life::Vitals {
    Arc::new(|| None)
}

/// Nothing serves.
fn nothing(why: &str, outlook: Outlook) -> Result<Route, NoRoute> {
    Err(NoRoute { why: why.to_owned(), outlook })
}

/// A running gateway and its leader.
struct Server {
    address: std::net::SocketAddr,
    leader: FakeLeader,
    view: FixedView,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), GatewayError>>,
}

/// A node of a cluster that lives as long as the tests.
fn node(id: u64, role: Role) -> Tls {
    static CA: OnceLock<ClusterCa> = OnceLock::new();
    let now = SystemTime::now();
    let ca = CA.get_or_init(|| ClusterCa::create(now).expect("an authority"));
    Tls::new(ca.node(id, role, NODE_LIFE, now).expect("a credential")).expect("a good one")
}

/// Who the gateway is.
fn coordinator() -> Tls {
    node(7, Role::Coordinator)
}

/// The route to a leader that listens at `address`.
fn route_to(address: &str) -> Route {
    let (group, epoch, leader) = (GroupId(3), Epoch(9), NodeId(1));
    Route { group, epoch, leader, leader_address: address.to_owned() }
}

impl Server {
    async fn start(rule: Rule) -> Self {
        Self::with(rule, config()).await
    }

    async fn with(rule: Rule, config: GatewayConfig) -> Self {
        Self::living(rule, config, well()).await
    }

    async fn living(rule: Rule, config: GatewayConfig, vitals: crate::life::Vitals) -> Self {
        let view = FixedView::new();
        let leader = FakeLeader::start(rule, view.clone()).await;
        view.set(Ok(route_to(&leader.address)));
        let socket = TcpSocket::new_v4().expect("a socket");
        // Little room for what nobody reads, so that tests of slow readers are quick.
        socket.set_send_buffer_size(16 << 10).expect("sets");
        socket.bind("127.0.0.1:0".parse().expect("an address")).expect("binds");
        let listener = socket.listen(64).expect("listens");
        let address = listener.local_addr().expect("an address");
        let (stop, stopped) = oneshot::channel::<()>();
        let gateway =
            Gateway::new(config, Box::new(view.clone()), vitals, coordinator()).expect("starts");
        let limits = gateway.config.limits.clone();
        let router = crate::routes::router(Arc::new(gateway));
        let task = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            crate::server::run(listener, router, &limits, stopped).await
        });
        Self { address, leader, view, stop: Some(stop), task }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("connects")
    }

    /// A connection on which little waits to be read.
    async fn connect_narrow(&self) -> TcpStream {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(4096).expect("sets");
        socket.connect(self.address).await.expect("connects")
    }

    async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(&request("POST", path, body.to_string().as_bytes())).await
    }

    async fn get(&self, path: &str) -> Reply {
        self.send(&request("GET", path, b"")).await
    }

    /// Sends raw bytes and reads to the end of the connection.
    async fn send(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect().await;
        // A server that has refused the head need not read the body.
        let _ = stream.write_all(bytes).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        Reply::parse(&answer)
    }

    /// A completion that must succeed.
    async fn complete(&self, mut body: Value) -> Value {
        body["model"] = json!("demo");
        let reply = self.post("/v1/completions", &body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.json()
    }

    async fn ids(&self, text: &str) -> Vec<u32> {
        let reply = self.post("/tokenize", &json!({"prompt": text})).await;
        serde_json::from_value(reply.json()["tokens"].clone()).expect("ids")
    }
}

fn request(method: &str, path: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let mut bytes = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    )
    .into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// An HTTP answer, read to its end.
struct Reply {
    status: u16,
    head: String,
    body: Vec<u8>,
    /// The body ended as it should, and not with the connection.
    complete: bool,
}

impl Reply {
    fn parse(bytes: &[u8]) -> Self {
        let split = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("an HTTP answer");
        let head = String::from_utf8_lossy(&bytes[..split]).to_lowercase();
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
        let raw = &bytes[split + 4..];
        let (body, complete) = if head.contains("transfer-encoding: chunked") {
            dechunk(raw)
        } else {
            (raw.to_vec(), true)
        };
        Self { status, head, body, complete }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    fn error(&self) -> Value {
        self.json()["error"].clone()
    }

    /// The events of a stream; `[DONE]` as a string.
    fn events(&self) -> Vec<Value> {
        let text = self.text();
        let events = text.split("\n\n").filter(|event| !event.is_empty());
        events
            .map(|event| {
                let data = event.strip_prefix("data: ").expect("an event");
                serde_json::from_str(data).unwrap_or_else(|_| json!(data))
            })
            .collect()
    }
}

fn dechunk(mut raw: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    while let Some(end) = raw.windows(2).position(|w| w == b"\r\n") {
        let size = String::from_utf8_lossy(&raw[..end]);
        let size = usize::from_str_radix(size.trim(), 16).expect("a chunk size");
        if size == 0 {
            return (body, true);
        }
        body.extend_from_slice(&raw[end + 2..end + 2 + size]);
        raw = &raw[end + 4 + size..];
    }
    (body, false)
}
