//! The worker's session with its coordinator: join, report, obey; join again when it breaks.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use cluster::NodeInfo;
use planner::NodeId;
use tokio::sync::mpsc as channel;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use wire::{FormGroup, Order, Report, pb};

use crate::WorkerError;
use crate::group::{Groups, Hardware};
use crate::rank::Formation;

/// How often the worker shows that it is alive.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Between two attempts to reach the coordinator.
const RETRY: Duration = Duration::from_millis(500);

/// What a session works with.
pub(crate) struct Session {
    pub(crate) coordinator: String,
    pub(crate) join: NodeInfo,
    pub(crate) groups: Arc<Groups>,
    pub(crate) hardware: Arc<Hardware>,
}

/// Why a session ended.
enum End {
    /// The coordinator cannot be reached, or the stream broke: try again.
    Broken(String),
    /// The coordinator refused this worker: trying again would not help.
    Refused(String),
    /// The worker is shutting down.
    Shutdown,
}

impl Session {
    /// Keeps a session with the coordinator until shutdown or until it refuses this worker.
    pub(crate) async fn run(&self, shutdown: &CancellationToken) -> Result<(), WorkerError> {
        let mut told = false;
        loop {
            let end = tokio::select! {
                end = self.once() => end,
                () = shutdown.cancelled() => End::Shutdown,
            };
            // Without a session nobody decides about the groups: fence ourselves.
            let groups = Arc::clone(&self.groups);
            let _ = tokio::task::spawn_blocking(move || groups.retire_all()).await;
            match end {
                End::Shutdown => return Ok(()),
                End::Refused(reason) => return Err(WorkerError::Refused { reason }),
                End::Broken(reason) if told => tracing::debug!(reason, "no session"),
                End::Broken(reason) => {
                    tracing::warn!(reason, "no session with the coordinator; trying again");
                    told = true;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    /// One session from join to end.
    async fn once(&self) -> End {
        let channel = match wire::transport::connect(&self.coordinator).await {
            Ok(channel) => channel,
            Err(error) => return End::Broken(error.to_string()),
        };
        let mut client = wire::transport::coordinator_client(channel);
        let (reports, outgoing) = channel::channel(256);
        // The channel is empty and its other end is held here, so this cannot fail.
        let _ = reports.try_send(Report::Join(self.join.clone()).to_wire());
        let mut orders = match client.session(ReceiverStream::new(outgoing)).await {
            Ok(response) => response.into_inner(),
            Err(status) => return end_of(&status),
        };
        let (up, mut ranks) = channel::unbounded_channel::<Report>();
        // Beside the loop below: an order may take long to obey, which is not silence.
        let mut beating = tokio::task::JoinSet::new();
        beating.spawn(beat(reports.clone()));
        let mut node = None;
        loop {
            let report = tokio::select! {
                order = orders.next() => match order {
                    Some(Ok(order)) => match self.obey(order, &mut node, &up).await {
                        Ok(()) => continue,
                        Err(reason) => return End::Refused(reason),
                    },
                    Some(Err(status)) => return end_of(&status),
                    None => return End::Broken("the coordinator ended the session".to_owned()),
                },
                Some(report) = ranks.recv() => report,
            };
            if reports.send(report.to_wire()).await.is_err() {
                return End::Broken("the session's stream closed".to_owned());
            }
        }
    }

    async fn obey(
        &self,
        order: pb::Order,
        node: &mut Option<NodeId>,
        up: &channel::UnboundedSender<Report>,
    ) -> Result<(), String> {
        let order = Order::from_wire(order, &self.hardware.spec).map_err(|e| e.to_string())?;
        match order {
            Order::Welcome { node: number } => {
                tracing::info!(node = number.0, "joined the cluster");
                *node = Some(number);
                Ok(())
            }
            Order::Form(form) => {
                let node = node.ok_or("a group was ordered before a welcome")?;
                let FormGroup { group, epoch, .. } = *form;
                tracing::info!(group = group.0, epoch = epoch.0, "forming a group");
                let mine = form.plan.ranks.iter().find(|r| r.node == node).map_or(0, |r| r.rank);
                let formation = match formation(*form, node, self.hardware.devices.len()) {
                    Ok(formation) => formation,
                    Err(reason) => {
                        // Another plan may do: the group fails, not the worker.
                        tracing::error!(group = group.0, epoch = epoch.0, reason, "cannot form");
                        let _ = up.send(Report::Failed { group, epoch, rank: mine, reason });
                        return Ok(());
                    }
                };
                let (groups, hardware) = (Arc::clone(&self.groups), Arc::clone(&self.hardware));
                let up = up.clone();
                let form = move || groups.form(node, &Arc::new(formation), &hardware, &up);
                tokio::task::spawn_blocking(form).await.map_err(|e| e.to_string())
            }
            Order::Retire { group, epoch, reason } => {
                tracing::warn!(group = group.0, epoch = epoch.0, reason, "the group is retired");
                let groups = Arc::clone(&self.groups);
                let retire = move || groups.retire(group);
                tokio::task::spawn_blocking(retire).await.map_err(|e| e.to_string())
            }
        }
    }
}

/// Shows that the worker is alive until the session ends.
async fn beat(reports: channel::Sender<pb::WorkerReport>) {
    let mut interval = tokio::time::interval(HEARTBEAT);
    loop {
        interval.tick().await;
        if reports.send(Report::Heartbeat.to_wire()).await.is_err() {
            return;
        }
    }
}

fn end_of(status: &tonic::Status) -> End {
    let reason = status.message().to_owned();
    match status.code() {
        tonic::Code::FailedPrecondition | tonic::Code::InvalidArgument => End::Refused(reason),
        _ => End::Broken(reason),
    }
}

/// Checks an order to form a group against the devices this worker has.
fn formation(order: FormGroup, node: NodeId, devices: usize) -> Result<Formation, String> {
    let absent = order.plan.ranks.iter().find(|r| r.node == node && r.device >= devices);
    if let Some(rank) = absent {
        return Err(format!("rank {} is planned on device {}", rank.rank, rank.device));
    }
    let addresses = order.addresses.iter().map(|a| resolve(&a.collective_address));
    let meeting = addresses.collect::<Result<_, _>>()?;
    Ok(Formation { order, meeting })
}

fn resolve(address: &str) -> Result<SocketAddr, String> {
    let mut found = address.to_socket_addrs().map_err(|e| format!("{address}: {e}"))?;
    found.next().ok_or_else(|| format!("{address} has no address"))
}
