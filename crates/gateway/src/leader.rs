//! The gateway's side of the Worker service of a group leader: connections kept by node and
//! address.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use cluster::{NodeId, Route};
use identity::{Expect, Tls};
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};
use wire::pb::worker_client::WorkerClient;
use wire::{pb, transport};

/// Bytes of one answer that may wait for a slow client; then its leader pauses sending it.
const STREAM_WINDOW: u32 = 64 << 10;
/// Bytes of all answers of a connection: large, so that one slow client holds up no other.
const CONNECTION_WINDOW: u32 = 256 << 20;
/// Connections kept; groups move rarely.
const KEPT: usize = 16;

/// Connections to leaders. Cloning a channel is cheap; it reconnects by itself, to the same node
/// or to none.
#[derive(Debug)]
pub(crate) struct Leaders {
    tls: Tls,
    channels: Mutex<BTreeMap<(NodeId, String), Channel>>,
}

impl Leaders {
    /// Connections that are made as this coordinator.
    pub(crate) fn new(tls: Tls) -> Self {
        Self { tls, channels: Mutex::default() }
    }

    fn client(&self, route: &Route) -> Result<WorkerClient<Channel>, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (route.leader, route.leader_address.clone());
        let channel = match channels.get(&key) {
            Some(channel) => channel.clone(),
            None => {
                let endpoint = endpoint(&route.leader_address)?;
                let expect = Expect::Node(route.leader.0);
                let channel = transport::connect_lazy(&endpoint, expect, &self.tls);
                if channels.len() >= KEPT {
                    channels.clear();
                }
                channels.insert(key, channel.clone());
                channel
            }
        };
        Ok(transport::worker_client(channel))
    }

    /// Starts a sequence. Dropping the stream cancels it.
    pub(crate) async fn generate(
        &self,
        route: &Route,
        request: pb::GenerateRequest,
    ) -> Result<Streaming<pb::GenerateEvent>, Status> {
        let mut client = self.client(route)?;
        Ok(client.generate(request).await?.into_inner())
    }

    /// What the leader's rank does, where it says so in time.
    pub(crate) async fn pulse(&self, route: &Route, within: Duration) -> Option<pb::PulseReply> {
        let mut client = self.client(route).ok()?;
        let request = pb::PulseRequest { group: route.group.0, epoch: route.epoch.0, rank: 0 };
        let answer = tokio::time::timeout(within, client.pulse(request)).await;
        Some(answer.ok()?.ok()?.into_inner())
    }

    /// The scheduler's counts, where the leader tells them in time.
    pub(crate) async fn counts(&self, route: &Route, within: Duration) -> Option<pb::CountsReply> {
        let mut client = self.client(route).ok()?;
        let request = pb::CountsRequest { group: route.group.0, epoch: route.epoch.0 };
        let answer = tokio::time::timeout(within, client.counts(request)).await;
        Some(answer.ok()?.ok()?.into_inner())
    }
}

fn endpoint(address: &str) -> Result<Endpoint, Status> {
    let endpoint = transport::endpoint(address)
        .map_err(|_| Status::unavailable("the group's address is not one"))?;
    Ok(endpoint
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW))
}
