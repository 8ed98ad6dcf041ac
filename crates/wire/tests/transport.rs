//! Both ends of a connection send at once, and large messages pass.

#![allow(clippy::unwrap_used)]

mod support;

use futures::StreamExt;
use identity::{Admit, Expect, Role};
use support::{Server, ca, node};
use tokio::net::TcpListener;
use wire::{pb, transport};

#[tokio::test]
async fn nagle_is_off_on_both_sides() {
    let ca = ca();
    let (server, client) = (node(&ca, 1, Role::Worker), node(&ca, 2, Role::Worker));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut incoming = transport::incoming(listener, &server, Admit::nodes()).unwrap();
    // The other side is not heard of before it has proved who it is; it waits for our first word.
    let connecting = transport::connect(&address, Expect::Node(1), &client);
    let accepted = async { incoming.next().await.unwrap().unwrap() };
    tokio::select! {
        accepted = accepted => assert!(accepted.nodelay().unwrap()),
        _ = connecting => panic!("nobody has welcomed it"),
    }
}

#[tokio::test]
async fn steps_and_reports_of_every_size_pass() {
    let ca = ca();
    let server = Server::start(&node(&ca, 1, Role::Worker), Admit::nodes()).await;
    let caller = node(&ca, 2, Role::Worker);
    let mut client = server.client(Expect::Node(1), &caller).await.unwrap();
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
}

#[test]
fn an_address_that_is_none_is_refused() {
    assert!(transport::endpoint("no spaces here:1").is_err());
}
