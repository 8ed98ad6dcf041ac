//! The coordinator's control plane: workers' sessions in, orders out, one owner of the state.
//!
//! ```text
//! Session, Status (service) ──Event──> owner: ClusterState::apply ──> orders to sessions
//!                                        └── reconcile               └─> the published view
//! ```
//! The owner task alone holds the state and sees a closed set of events; every change is a command
//! through `apply`. In this release it decides alone (docs/decisions/0003-control-plane-of-one.md).

#![forbid(unsafe_code)]

mod owner;
mod service;
mod status;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cluster::{ClusterState, Deployment, Rejected};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use wire::transport;

use crate::owner::Owner;
use crate::service::Service;

/// Events that may wait for the owner; sessions wait when there are more.
const EVENTS: usize = 1024;
/// How long connections may take to close once everything is told to end.
const DRAIN: Duration = Duration::from_secs(2);

/// How the control plane behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlConfig {
    /// A worker that reports nothing for this long is lost. Not zero.
    pub lease: Duration,
}

/// A running control plane.
#[derive(Debug)]
pub struct ControlHandle {
    /// The state after every change; the newest one only.
    pub view: watch::Receiver<Arc<ClusterState>>,
    /// Where workers reach it.
    pub local_addr: SocketAddr,
    /// Ends after shutdown, when every session has ended.
    pub task: JoinHandle<()>,
}

/// Why the control plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nothing could serve this deployment.
    #[error(transparent)]
    Deployment(#[from] Rejected),
    /// A lease of no length would lose every worker at once.
    #[error("the lease must be longer than zero")]
    Lease,
    /// The listener does not work.
    #[error("the listener has no address: {0}")]
    Listener(#[from] std::io::Error),
}

/// Serves workers and operators on `listener` and keeps `deployment` served, until `shutdown`.
/// Must be called within a tokio runtime.
///
/// # Errors
/// [`ControlError`]; nothing runs then.
pub fn start(
    listener: TcpListener,
    deployment: Deployment,
    config: ControlConfig,
    shutdown: CancellationToken,
) -> Result<ControlHandle, ControlError> {
    if config.lease.is_zero() {
        return Err(ControlError::Lease);
    }
    let local_addr = listener.local_addr()?;
    let (owner, view) = Owner::new(deployment)?;
    let (events, queue) = mpsc::channel(EVENTS);
    let service = Service::new(events, config.lease, shutdown.clone());
    let task = tokio::spawn(async move {
        let router = transport::server().add_service(transport::coordinator_server(service));
        let incoming = transport::incoming(listener);
        let stop = shutdown.clone();
        let stop = async move { stop.cancelled().await };
        let server = tokio::spawn(router.serve_with_incoming_shutdown(incoming, stop));
        owner.run(queue, shutdown).await;
        drain(server).await;
    });
    Ok(ControlHandle { view, local_addr, task })
}

/// Lets connections close; a peer that keeps its connection open cannot keep us.
async fn drain(mut server: JoinHandle<Result<(), tonic::transport::Error>>) {
    match tokio::time::timeout(DRAIN, &mut server).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => tracing::warn!(%error, "the control server ended with an error"),
        Ok(Err(error)) => tracing::warn!(%error, "the control server's task failed"),
        Err(_) => {
            tracing::debug!("connections are cut: they did not close in time");
            server.abort();
        }
    }
}
