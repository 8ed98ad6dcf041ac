//! Who may ask a worker for what, over real connections.

#![allow(clippy::unwrap_used)]

use std::time::SystemTime;

use identity::{Admit, ClusterCa, Expect, NODE_LIFE, TOKEN_LIFE, Tls};
use tokio::net::TcpListener;
use tonic::Code;
use wire::transport::ConnectError;

use super::*;

/// A worker without groups, and who may want something of it.
struct Place {
    ca: ClusterCa,
    address: String,
}

async fn place() -> Place {
    let ca = ClusterCa::create(SystemTime::now()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let place = Place { ca, address };
    let tls = place.node(1, Role::Worker);
    let incoming = transport::incoming(listener, &tls, Admit::nodes()).unwrap();
    let service =
        transport::worker_server(Service { groups: Arc::default(), endpoints: Vec::new() });
    let server = transport::server().add_service(service);
    tokio::spawn(server.serve_with_incoming(incoming));
    place
}

type Client = pb::worker_client::WorkerClient<tonic::transport::Channel>;

impl Place {
    fn node(&self, id: u64, role: Role) -> Tls {
        Tls::new(self.ca.node(id, role, NODE_LIFE, SystemTime::now()).unwrap()).unwrap()
    }

    async fn client(&self, tls: &Tls) -> Result<Client, ConnectError> {
        let channel = transport::connect(&self.address, Expect::Node(1), tls).await?;
        Ok(transport::worker_client(channel))
    }
}

fn request() -> pb::GenerateRequest {
    let stop = pb::StopRules { max_tokens: 4, ..Default::default() };
    let sampling = pb::Sampling { top_p: 1.0, repetition_penalty: 1.0, ..Default::default() };
    pb::GenerateRequest {
        group: 1,
        epoch: 1,
        prompt: vec![1],
        stop: Some(stop),
        sampling: Some(sampling),
        ..Default::default()
    }
}

/// What a step answers.
async fn step(client: &mut Client) -> Status {
    let plan = pb::StepPlan { group: 1, epoch: 1, rank: 1, ..Default::default() };
    match client.steps(tokio_stream::once(plan)).await {
        Ok(reports) => reports.into_inner().message().await.unwrap_err(),
        Err(status) => status,
    }
}

#[tokio::test]
async fn answers_are_for_coordinators_and_steps_from_workers() {
    let place = place().await;
    let counts = pb::CountsRequest { group: 1, epoch: 1 };
    let mut coordinator = place.client(&place.node(7, Role::Coordinator)).await.unwrap();
    // Let through as far as the group, which is not here.
    let asked = coordinator.generate(request()).await.unwrap_err();
    assert_eq!(asked.code(), Code::Unavailable, "{asked}");
    assert_eq!(coordinator.counts(counts).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(step(&mut coordinator).await.code(), Code::PermissionDenied);

    let mut worker = place.client(&place.node(2, Role::Worker)).await.unwrap();
    assert_eq!(worker.generate(request()).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(worker.counts(counts).await.unwrap_err().code(), Code::PermissionDenied);
    assert_ne!(step(&mut worker).await.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn operators_and_tokens_do_not_get_through_the_handshake() {
    let place = place().await;
    let now = SystemTime::now();
    for stranger in [
        place.ca.operator("ops", NODE_LIFE, now).unwrap(),
        place.ca.token(Role::Worker, 1, TOKEN_LIFE, now).unwrap(),
    ] {
        let refused = place.client(&Tls::new(stranger).unwrap()).await.unwrap_err().to_string();
        assert!(refused.contains("refused our certificate"), "{refused}");
    }
}
