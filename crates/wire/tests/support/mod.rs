//! A cluster that lives as long as its test, and a service that counts its calls.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "no test file uses all of it")]

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use futures::{Stream, StreamExt};
use identity::{Admit, ClusterCa, Credential, Expect, NODE_LIFE, Peer, Role, Tls};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use wire::pb::worker_client::WorkerClient;
use wire::pb::worker_server::Worker;
use wire::transport::{ConnectError, Handshakes};
use wire::{pb, transport};

pub fn ca() -> ClusterCa {
    ClusterCa::create(SystemTime::now()).unwrap()
}

pub fn credential(ca: &ClusterCa, id: u64, role: Role) -> Credential {
    ca.node(id, role, NODE_LIFE, SystemTime::now()).unwrap()
}

pub fn node(ca: &ClusterCa, id: u64, role: Role) -> Tls {
    Tls::new(credential(ca, id, role)).unwrap()
}

/// Answers each step with a report whose error text is as long as the step, and each sequence with
/// who has asked for it.
#[derive(Clone, Default)]
pub struct Echo {
    pub calls: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl Worker for Echo {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<pb::GenerateEvent, Status>> + Send>>;
    type StepsStream = Pin<Box<dyn Stream<Item = Result<pb::StepReport, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let peer = transport::peer(&request)?;
        Err(Status::unimplemented(format!("asked by {peer}")))
    }

    async fn steps(
        &self,
        request: Request<Streaming<pb::StepPlan>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let reports = request.into_inner().map(|plan| {
            let plan = plan?;
            let tokens = plan.entries.iter().map(|entry| entry.tokens.len()).sum();
            let (number, error) = (plan.number, "x".repeat(tokens));
            Ok(pb::StepReport { number, error, ..Default::default() })
        });
        Ok(Response::new(Box::pin(reports)))
    }

    async fn counts(
        &self,
        _: Request<pb::CountsRequest>,
    ) -> Result<Response<pb::CountsReply>, Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(pb::CountsReply::default()))
    }

    async fn pulse(
        &self,
        _: Request<pb::PulseRequest>,
    ) -> Result<Response<pb::PulseReply>, Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(pb::PulseReply::default()))
    }
}

/// A running server.
pub struct Server {
    pub address: String,
    pub calls: Arc<AtomicUsize>,
    pub handshakes: Handshakes,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Server {
    pub async fn start(tls: &Tls, admit: Admit) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::on(listener, tls, admit)
    }

    pub fn on(listener: TcpListener, tls: &Tls, admit: Admit) -> Self {
        let address = listener.local_addr().unwrap().to_string();
        let echo = Echo::default();
        let calls = Arc::clone(&echo.calls);
        let incoming = transport::incoming(listener, tls, admit).unwrap();
        let handshakes = incoming.handshakes();
        let server = transport::server().add_service(transport::worker_server(echo));
        let (stop, stopped) = oneshot::channel();
        // A server whose handle was dropped goes on.
        let stopped = async {
            if stopped.await.is_err() {
                std::future::pending().await
            }
        };
        let task = tokio::spawn(server.serve_with_incoming_shutdown(incoming, stopped));
        Self { address, calls, handshakes, stop, task }
    }

    /// Ends it in order, its connections too.
    pub async fn end(self) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap().unwrap();
    }

    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    pub async fn client(
        &self,
        expect: Expect,
        tls: &Tls,
    ) -> Result<WorkerClient<Channel>, ConnectError> {
        let channel = transport::connect(&self.address, expect, tls).await?;
        Ok(transport::worker_client(channel))
    }
}

/// Who the server says has asked.
pub async fn asked_by(client: &mut WorkerClient<Channel>) -> String {
    let status = client.generate(pb::GenerateRequest::default()).await.unwrap_err();
    transport::reason(&status)
}

/// As the server calls a peer.
pub fn called(peer: &Peer) -> String {
    format!("asked by {peer}")
}
