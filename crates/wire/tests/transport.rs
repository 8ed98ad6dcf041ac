//! Both ends of a connection send at once, and large messages pass.

#![allow(clippy::unwrap_used)]

use std::pin::Pin;

use futures::{Stream, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tonic::{Request, Response, Status, Streaming};
use wire::pb::worker_server::Worker;
use wire::{pb, transport};

/// Answers each step with a report whose error text is as long as the step.
struct Echo;

#[tonic::async_trait]
impl Worker for Echo {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<pb::GenerateEvent, Status>> + Send>>;
    type StepsStream = Pin<Box<dyn Stream<Item = Result<pb::StepReport, Status>> + Send>>;

    async fn generate(
        &self,
        _: Request<pb::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        Err(Status::unimplemented("not part of this test"))
    }

    async fn steps(
        &self,
        request: Request<Streaming<pb::StepPlan>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
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
        Ok(Response::new(pb::CountsReply::default()))
    }
}

#[tokio::test]
async fn nagle_is_off_on_both_sides() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut incoming = transport::incoming(listener);
    let _client = TcpStream::connect(address).await.unwrap();
    let accepted: TcpStream = incoming.next().await.unwrap().unwrap();
    assert!(accepted.nodelay().unwrap());
    assert!(transport::endpoint(&address.to_string()).unwrap().get_tcp_nodelay());
}

#[tokio::test]
async fn steps_and_reports_of_every_size_pass() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let service = transport::worker_server(Echo);
    let server = transport::server().add_service(service);
    let server = tokio::spawn(server.serve_with_incoming(transport::incoming(listener)));
    let mut client = transport::worker_client(transport::connect(&address).await.unwrap());
    let (orders, queue) = tokio::sync::mpsc::channel(1);
    let queue = tokio_stream::wrappers::ReceiverStream::new(queue);
    let mut reports = client.steps(queue).await.unwrap().into_inner();
    // The last one exceeds the 4 MiB that tonic takes unless it is told otherwise.
    for (number, tokens) in [(0, 1), (1, 4096), (2, 16 << 10), (3, 5 << 20)] {
        let entry = pb::StepEntry { tokens: vec![1; tokens], want: 2, ..Default::default() };
        let plan = pb::StepPlan { number, entries: vec![entry], ..Default::default() };
        orders.send(plan).await.unwrap();
        let report = reports.message().await.unwrap().unwrap();
        assert_eq!((report.number, report.error.len()), (number, tokens));
    }
    // One over the limit is refused with a status, not with a broken connection.
    let entry = pb::StepEntry { tokens: vec![1; transport::MESSAGE_MAX], ..Default::default() };
    let plan = pb::StepPlan { entries: vec![entry], ..Default::default() };
    orders.send(plan).await.unwrap();
    assert!(reports.message().await.is_err());
    client.counts(pb::CountsRequest::default()).await.unwrap();
    server.abort();
}

#[test]
fn an_address_that_is_none_is_refused() {
    assert!(transport::endpoint("no spaces here:1").is_err());
}
