//! A coordinator on loopback, and nodes that speak the protocol but hold no model.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use cluster::{ClusterState, Command, Deployment, Model, NodeInfo, Proposal, RequestId};
use control::leader::Timing;
use control::{Control, ControlConfig, ControlHandle};
use identity::{ClusterCa, Credential, Expect, KeyRequest, NODE_LIFE, Role, TOKEN_LIFE, Tls};
use model::{ComputeType, ModelSpec};
use planner::{DeviceSpec, NodeId};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use wire::pb::coordinator_client::CoordinatorClient;
use wire::{FormGroup, Held, Order, Report, pb, transport};

/// Far longer than anything here takes; a test that hangs fails instead.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn spec() -> Arc<ModelSpec> {
    Arc::new(
        ModelSpec::from_config(
            r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4,
            "max_position_embeddings": 128, "vocab_size": 256, "rms_norm_eps": 1e-5,
            "bos_token_id": null, "eos_token_id": 0}"#,
        )
        .expect("a Llama config"),
    )
}

pub fn deployment(ranks: usize) -> Deployment {
    Deployment {
        name: "tiny".to_owned(),
        digest: "abc123".to_owned(),
        experts: planner::ExpertCut::Stripe,
        compute: ComputeType::F32,
        stripes: Some(8),
        ranks,
        replicas: 1,
        nodes: BTreeSet::new(),
        kv_blocks: 16,
        block_tokens: 16,
        max_sequences: 4,
        step_tokens: 64,
        context: 128,
    }
}

pub fn info(number: u64) -> NodeInfo {
    NodeInfo {
        boot: number,
        name: format!("w{number}"),
        worker_address: format!("host-{number}:9000"),
        collective_addresses: vec![format!("host-{number}:9100")],
        devices: vec![DeviceSpec { memory_bytes: 64 << 20, weight: 1.0 }],
        model_digests: BTreeSet::from(["abc123".to_owned()]),
        kernel_class: "avx2".to_owned(),
        version: "0.0.0".to_owned(),
    }
}

pub fn draw() -> Option<RequestId> {
    Some(RequestId(identity::random().unwrap()))
}

pub struct Coordinator {
    pub handle: ControlHandle,
    pub control: Control,
    pub shutdown: CancellationToken,
    pub address: String,
    pub data: TempDir,
}

/// The first coordinator of a new cluster, which wishes that `tiny` be served on `ranks` ranks.
pub async fn coordinator(ranks: usize) -> Coordinator {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let data = tempfile::tempdir().unwrap();
    let directory = data.path().join("c1");
    let now = SystemTime::now();
    let ca = ClusterCa::create(now).unwrap();
    ca.save(&directory).unwrap();
    let credential = ca.node(1, Role::Coordinator, NODE_LIFE, now).unwrap();
    credential.save(&directory).unwrap();
    let config = ControlConfig {
        timing: Timing { heartbeat: 50, suspicion: 2_000, lease: 60_000, takeover: 60_000 },
        tick: Duration::from_millis(5),
        data: directory.clone(),
        identity: directory,
        name: "c1".to_owned(),
        at: cluster::Coordinator {
            cluster_address: address.clone(),
            http_address: "127.0.0.1:1".to_owned(),
            model_digests: BTreeSet::from(["abc123".to_owned()]),
        },
        known: Vec::new(),
    };
    let shutdown = CancellationToken::new();
    let tls = Tls::new(credential).unwrap();
    let handle = control::start(listener, config, &tls, ca, shutdown.clone()).unwrap();
    let control = handle.control.clone();
    let coordinator = Coordinator { handle, control, shutdown, address, data };
    coordinator.until(|state| state.coordinators().count() == 1).await;
    let model = Model { name: "tiny".to_owned(), digest: "abc123".to_owned(), spec: spec() };
    coordinator.put(Command::RegisterModel(model)).await;
    coordinator.put(Command::Deploy(deployment(ranks))).await;
    coordinator
}

impl Coordinator {
    pub fn ca(&self) -> ClusterCa {
        ClusterCa::load(&self.data.path().join("c1")).unwrap()
    }

    pub async fn put(&self, command: Command) {
        let proposal = Proposal { request: draw(), command };
        self.control.write(proposal, PATIENCE).await.unwrap().unwrap();
    }

    /// Waits until the published view is as wished.
    pub async fn until(&self, wish: impl FnMut(&Arc<ClusterState>) -> bool) {
        let mut view = self.handle.view.clone();
        tokio::time::timeout(PATIENCE, view.wait_for(wish)).await.unwrap().unwrap();
    }

    pub async fn client(&self, credential: &Credential) -> CoordinatorClient<Channel> {
        let tls = Tls::new(credential.clone()).unwrap();
        let channel = transport::connect(&self.address, Expect::AnyCoordinator, &tls).await;
        transport::coordinator_client(channel.unwrap())
    }

    pub fn operator(&self) -> Credential {
        self.ca().operator("test", NODE_LIFE, SystemTime::now()).unwrap()
    }

    pub fn token(&self, role: Role, uses: u32) -> Credential {
        self.ca().token(role, uses, TOKEN_LIFE, SystemTime::now()).unwrap()
    }

    pub async fn status(&self) -> pb::StatusReply {
        let mut client = self.client(&self.operator()).await;
        client.status(pb::StatusRequest { local: false, load: false }).await.unwrap().into_inner()
    }

    /// Shows a token; the reply and what the node has then.
    pub async fn enrol(
        &self,
        token: &Credential,
        request_id: [u8; 16],
    ) -> Result<(pb::EnrolReply, Credential), Status> {
        let key = KeyRequest::generate().unwrap();
        let request = pb::EnrolRequest {
            certificate_request: key.request().to_vec().into(),
            name: "n".to_owned(),
            request_id: request_id.to_vec().into(),
        };
        let reply = self.client(token).await.enrol(request).await?.into_inner();
        let roots: Vec<Vec<u8>> = reply.roots.iter().map(|root| root.to_vec()).collect();
        let credential = key.complete(reply.certificate.to_vec(), roots).unwrap();
        Ok((reply, credential))
    }

    /// A new worker's identity.
    pub async fn worker(&self) -> Credential {
        let id = identity::random().unwrap();
        self.enrol(&self.token(Role::Worker, 1), id).await.unwrap().1
    }

    /// Opens a session that starts with `first`.
    pub async fn open(&self, who: &Credential, first: pb::WorkerReport) -> Result<Worker, Status> {
        let mut client = self.client(who).await;
        let (reports, queue) = mpsc::channel(16);
        reports.send(first).await.unwrap();
        let orders = client.session(ReceiverStream::new(queue)).await?.into_inner();
        let mut worker = Worker { reports, orders, node: NodeId(0) };
        match worker.next().await? {
            Order::Welcome { node, .. } => worker.node = node,
            other => panic!("the first order is {other:?}"),
        }
        Ok(worker)
    }

    /// A new worker's session.
    pub async fn join(&self, number: u64) -> Worker {
        let who = self.worker().await;
        self.open(&who, Report::Join(info(number), Vec::new()).to_wire()).await.unwrap()
    }

    pub async fn refused(&self, who: &Credential, first: pb::WorkerReport) -> (Code, String) {
        match self.open(who, first).await {
            Ok(worker) => panic!("node {} was let in", worker.node.0),
            Err(status) => (status.code(), status.message().to_owned()),
        }
    }
}

pub struct Worker {
    pub reports: mpsc::Sender<pb::WorkerReport>,
    pub orders: Streaming<pb::Order>,
    pub node: NodeId,
}

impl Worker {
    /// The next order but answers to heartbeats.
    pub async fn next(&mut self) -> Result<Order, Status> {
        loop {
            let order = tokio::time::timeout(PATIENCE, self.orders.message()).await.unwrap()?;
            let order = order.ok_or_else(|| Status::ok("the stream ended"))?;
            let order = Order::from_wire(order, |_| Some(spec())).unwrap();
            if order != Order::Lease {
                return Ok(order);
            }
        }
    }

    pub async fn form(&mut self) -> FormGroup {
        match self.next().await {
            Ok(Order::Form(form)) => *form,
            other => panic!("expected a group, got {other:?}"),
        }
    }

    pub async fn report(&self, report: Report) {
        self.reports.send(report.to_wire()).await.unwrap();
    }

    /// Reports the rank that `form` gives this node as ready; what it holds then.
    pub async fn ready(&self, form: &FormGroup) -> Held {
        let rank = form.plan.ranks.iter().find(|rank| rank.node == self.node).unwrap().rank;
        let (group, epoch) = (form.group, form.epoch);
        self.report(Report::Ready { group, epoch, rank }).await;
        Held { group, epoch, rank, ready: true }
    }
}
