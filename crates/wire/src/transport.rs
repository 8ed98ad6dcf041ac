//! Servers and channels with the same settings everywhere, mutual TLS among them.
//!
//! Two of tonic's defaults hurt here. `Server::tcp_nodelay` is ignored when a server is given its
//! listener, and Nagle's algorithm then holds back the last part of a message until the peer has
//! acknowledged the one before: 46 ms instead of 62 us for a 16 KiB round trip. And messages
//! over 4 MiB are refused on receipt, which a long prompt with logprobs exceeds.
//!
//! TLS is ours rather than tonic's: its settings are fixed when a server or a channel is made, and
//! a renewed certificate would need new ones. Here every handshake uses the credential of the
//! moment ([`identity::Tls`]), and who may call is decided in the handshake ([`incoming`]).

mod dial;
mod health;
mod incoming;

use std::collections::BTreeSet;
use std::error::Error as _;
use std::time::Duration;

use identity::{Expect, Peer, Roll, Tls};
use planner::NodeId;
use tonic::transport::{Channel, Endpoint, Error, Server};
use tonic::{Request, Status};

use crate::pb::coordinator_client::CoordinatorClient;
use crate::pb::coordinator_server::{Coordinator, CoordinatorServer};
use crate::pb::worker_client::WorkerClient;
use crate::pb::worker_server::{Worker, WorkerServer};

pub use dial::ConnectError;
pub use health::{Health, HealthCheckRequest, health, health_client};
pub use incoming::{Caller, Connection, Handshakes, Incoming, incoming};

/// Most bytes of one message to or from a worker.
pub const MESSAGE_MAX: usize = 16 << 20;
/// Most bytes of one message between coordinators or to one: a snapshot of the cluster's state in
/// one piece is the largest.
pub const CONTROL_MESSAGE_MAX: usize = 66 << 20;
/// How long a connection attempt may take, its handshake included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a coordinator that was removed goes on: those that stay may still need its vote to
/// learn that it was, and the answers of its clients end.
pub const FAREWELL: Duration = Duration::from_secs(10);
/// How long a node that was removed may take to hear of it, before anybody refuses it.
pub const HEARING: Duration = Duration::from_secs(3);
/// How often an idle connection is probed, so that a peer that vanished without a word is noticed.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// How long a probe may stay unanswered.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// What both ends must speak within TLS.
const PROTOCOL: &[u8] = b"h2";

/// The settings of every channel, for `address` = `host:port`; [`connect_lazy`] makes a channel of
/// it. Its own `connect` would speak plaintext, which no server here answers.
///
/// # Errors
/// The address is not one.
pub fn endpoint(address: &str) -> Result<Endpoint, Error> {
    // The scheme is that of tonic's own TLS, which stays out of it.
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
    Ok(endpoint
        .http2_keep_alive_interval(PROBE_INTERVAL)
        .keep_alive_timeout(PROBE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// Connects to `address` = `host:port`, where the expected must answer. Once this returns, that one
/// has taken our certificate too.
///
/// # Errors
/// The address is not one, nobody answers there within [`CONNECT_TIMEOUT`], it is not the expected,
/// or we are not admitted. The text says which.
pub async fn connect(address: &str, expect: Expect, tls: &Tls) -> Result<Channel, ConnectError> {
    let endpoint = endpoint(address).map_err(|_| ConnectError::Address)?;
    let channel = endpoint.connect_with_connector(dial::connector(expect, tls)).await;
    channel.map_err(|error| match dial::cause(&error) {
        Some(cause) => cause,
        None => ConnectError::Broken(innermost(&error)),
    })
}

/// A channel that connects when it is used, and again whenever its connection is lost, each time
/// with the credential of the moment.
pub fn connect_lazy(endpoint: &Endpoint, expect: Expect, tls: &Tls) -> Channel {
    endpoint.connect_with_connector_lazy(dial::connector(expect, tls))
}

/// What a failed call means. Where the connection failed the status's own text says little.
pub fn reason(status: &Status) -> String {
    let cause = status.source().and_then(dial::cause);
    cause.map_or_else(|| status.message().to_owned(), |cause| cause.to_string())
}

/// Whether a call failed because this node was removed from the cluster.
pub fn removed(status: &Status) -> bool {
    matches!(status.source().and_then(dial::cause), Some(ConnectError::Removed { .. }))
}

/// Refuses whoever of the numbers up to `given` is not `present` any more, after a while: those who
/// were removed are to hear of it, and to end what they do.
pub fn shut_out(tls: &Tls, given: u64, present: &BTreeSet<NodeId>, after: Duration) {
    let roll = Roll { given, present: present.iter().map(|node| node.0).collect() };
    let tls = tls.clone();
    tokio::spawn(async move {
        tokio::time::sleep(after).await;
        tls.refuse(roll);
    });
}

fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    error.source().map_or_else(|| error.to_string(), innermost)
}

/// Who called, as the handshake has verified.
///
/// # Errors
/// `Unauthenticated` where the request came over no connection of [`incoming`].
pub fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    let caller = request.extensions().get::<Caller>();
    let caller = caller.ok_or_else(|| Status::unauthenticated("the caller is not known"))?;
    Ok(caller.peer.clone())
}

/// A server with the settings of every server; add services to it.
pub fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(PROBE_INTERVAL))
        .http2_keepalive_timeout(Some(PROBE_TIMEOUT))
}

/// The Coordinator service of `inner`, with the message limit.
pub fn coordinator_server<T: Coordinator>(inner: T) -> CoordinatorServer<T> {
    CoordinatorServer::new(inner)
        .max_decoding_message_size(CONTROL_MESSAGE_MAX)
        .max_encoding_message_size(CONTROL_MESSAGE_MAX)
}

/// The Worker service of `inner`, with the message limit.
pub fn worker_server<T: Worker>(inner: T) -> WorkerServer<T> {
    WorkerServer::new(inner)
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX)
}

/// A client of the Coordinator service, with the message limit.
pub fn coordinator_client(channel: Channel) -> CoordinatorClient<Channel> {
    CoordinatorClient::new(channel)
        .max_decoding_message_size(CONTROL_MESSAGE_MAX)
        .max_encoding_message_size(CONTROL_MESSAGE_MAX)
}

/// A client of the Worker service, with the message limit.
pub fn worker_client(channel: Channel) -> WorkerClient<Channel> {
    WorkerClient::new(channel)
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX)
}
