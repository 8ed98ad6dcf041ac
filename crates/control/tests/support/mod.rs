//! A coordinator on loopback and workers that speak the protocol but hold no model.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use cluster::{Deployment, Epoch, GroupId, NodeInfo};
use control::{ControlConfig, ControlHandle};
use model::{ComputeType, ModelSpec};
use planner::{DeviceSpec, NodeId};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};
use wire::{FormGroup, Order, Report, pb, transport};

/// Far longer than anything here takes; a test that hangs fails instead.
const PATIENCE: Duration = Duration::from_secs(20);

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
        model: "tiny".to_owned(),
        digest: "abc123".to_owned(),
        spec: spec(),
        experts: planner::ExpertCut::Stripe,
        compute: ComputeType::F32,
        stripes: Some(8),
        ranks,
        kv_blocks: 16,
        block_tokens: 16,
        max_sequences: 4,
        step_tokens: 64,
        context: 128,
    }
}

pub fn info(number: u64) -> NodeInfo {
    NodeInfo {
        name: format!("w{number}"),
        worker_address: format!("host-{number}:9000"),
        collective_addresses: vec![format!("host-{number}:9100")],
        devices: vec![DeviceSpec { memory_bytes: 64 << 20, weight: 1.0 }],
        model_digest: "abc123".to_owned(),
        kernel_class: "avx2".to_owned(),
        version: "0.0.0".to_owned(),
    }
}

pub struct Coordinator {
    pub handle: ControlHandle,
    pub shutdown: CancellationToken,
    pub address: String,
}

pub async fn coordinator(ranks: usize, lease: Duration) -> Coordinator {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let shutdown = CancellationToken::new();
    let config = ControlConfig { lease };
    let handle = control::start(listener, deployment(ranks), config, shutdown.clone()).unwrap();
    let address = handle.local_addr.to_string();
    Coordinator { handle, shutdown, address }
}

impl Coordinator {
    pub async fn status(&self) -> pb::StatusReply {
        let channel = transport::connect(&self.address).await.unwrap();
        let mut client = transport::coordinator_client(channel);
        client.status(pb::StatusRequest {}).await.unwrap().into_inner()
    }

    /// Waits until the published view is as wished.
    pub async fn until(&self, wish: impl FnMut(&Arc<cluster::ClusterState>) -> bool) {
        let mut view = self.handle.view.clone();
        tokio::time::timeout(PATIENCE, view.wait_for(wish)).await.unwrap().unwrap();
    }

    /// Opens a session that starts with `first`.
    pub async fn open(&self, first: pb::WorkerReport) -> Result<Worker, Status> {
        let channel = transport::connect(&self.address).await.unwrap();
        let mut client = transport::coordinator_client(channel);
        let (reports, queue) = mpsc::channel(16);
        reports.send(first).await.unwrap();
        let orders = client.session(ReceiverStream::new(queue)).await?.into_inner();
        let mut worker = Worker { reports, orders, node: NodeId(0) };
        match worker.next().await {
            Ok(Order::Welcome { node }) => worker.node = node,
            other => panic!("the first order is {other:?}"),
        }
        Ok(worker)
    }

    pub async fn join(&self, number: u64) -> Worker {
        self.open(Report::Join(info(number)).to_wire()).await.unwrap()
    }

    pub async fn refused(&self, first: pb::WorkerReport) -> (Code, String) {
        match self.open(first).await {
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
    pub async fn next(&mut self) -> Result<Order, Status> {
        let order = tokio::time::timeout(PATIENCE, self.orders.message()).await.unwrap()?;
        let order = order.ok_or_else(|| Status::ok("the stream ended"))?;
        Ok(Order::from_wire(order, &spec()).unwrap())
    }

    pub async fn form(&mut self) -> FormGroup {
        match self.next().await {
            Ok(Order::Form(form)) => *form,
            other => panic!("expected a group, got {other:?}"),
        }
    }

    pub async fn retire(&mut self) -> (GroupId, Epoch, String) {
        match self.next().await {
            Ok(Order::Retire { group, epoch, reason }) => (group, epoch, reason),
            other => panic!("expected a retirement, got {other:?}"),
        }
    }

    pub async fn report(&self, report: Report) {
        self.reports.send(report.to_wire()).await.unwrap();
    }

    /// Reports the rank that `form` gives this node as ready.
    pub async fn ready(&self, form: &FormGroup) {
        let rank = form.plan.ranks.iter().find(|rank| rank.node == self.node).unwrap().rank;
        self.report(Report::Ready { group: form.group, epoch: form.epoch, rank }).await;
    }
}
