//! The worker's session with the coordinator that leads: join, report, obey; find the leader again
//! when it breaks. What the worker holds outlives a session, as long as its lease does.

mod lease;
mod obey;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cluster::NodeInfo;
use identity::{Expect, Tls};
use tokio::sync::mpsc as channel;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use wire::transport::{self, ConnectError, Health};
use wire::{Held, Order, Report, pb};

use self::lease::{Beats, Lease};
use crate::WorkerError;
use crate::group::{Groups, Hardware};

/// Between two attempts to reach a coordinator.
const RETRY: Duration = Duration::from_millis(100);
/// How long a coordinator may take to answer an attempt.
const ATTEMPT: Duration = Duration::from_secs(1);
/// How long a goodbye may take.
const GOODBYE: Duration = Duration::from_millis(500);
/// In the metadata of a refusal: who leads instead, as `NODE@HOST:PORT`, or that nobody does.
const LEADER_KEY: &str = "phalanx-leader";
const NO_LEADER: &str = "none";

/// What sessions work with.
pub(crate) struct Session {
    /// `host:port` of the coordinators that are known from the start.
    pub(crate) coordinators: Vec<String>,
    pub(crate) info: NodeInfo,
    pub(crate) groups: Arc<Groups>,
    pub(crate) hardware: Arc<Hardware>,
    pub(crate) tls: Tls,
    /// Where the identity is kept; a fresh certificate goes there.
    pub(crate) identity: PathBuf,
    /// What this worker says of itself: it serves as long as its lease lasts.
    pub(crate) health: Health,
}

/// Why a session ended, or did not begin.
enum End {
    /// The coordinator cannot be reached, or the stream broke: try again.
    Broken(String),
    /// Another coordinator leads.
    Elsewhere(String),
    /// A coordinator answers, and nobody leads: nothing can be decided against this worker.
    NoLeader,
    /// The cluster refused this worker: trying again would not help.
    Refused(String),
    /// The worker is shutting down.
    Shutdown,
}

impl Session {
    /// Keeps a session until shutdown or until the cluster refuses this worker.
    pub(crate) async fn run(&self, shutdown: &CancellationToken) -> Result<(), WorkerError> {
        let lease = Arc::new(Lease::default());
        // Ranks report for as long as they live, whatever becomes of sessions.
        let (up, mut ranks) = channel::unbounded_channel();
        let watching = self.watch(Arc::clone(&lease), up.clone());
        let telling = self.tell(&lease);
        // Orders about groups are obeyed one after the other, across sessions. They may wait for
        // threads that load; heartbeats do not wait for those.
        let (told_to, mut orders) = channel::unbounded_channel();
        let obeying = async {
            while let Some(order) = orders.recv().await {
                self.obey(order, &up).await;
            }
        };
        let working = async {
            let mut targets = self.coordinators.iter().cycle();
            let mut hint = None;
            let mut told = false;
            loop {
                let target = hint.take().or_else(|| targets.next().cloned()).unwrap_or_default();
                let end = self.once(&target, &lease, &told_to, &mut ranks, shutdown).await;
                let reason = match end {
                    End::Shutdown => return Ok(()),
                    End::Refused(reason) => return Err(WorkerError::Refused { reason }),
                    End::NoLeader => {
                        lease.attested();
                        "no coordinator leads".to_owned()
                    }
                    End::Elsewhere(address) => {
                        hint = Some(address);
                        "another coordinator leads".to_owned()
                    }
                    End::Broken(reason) => reason,
                };
                if std::mem::replace(&mut told, true) {
                    tracing::debug!(target, reason, "no session");
                } else {
                    tracing::warn!(target, reason, "no session; looking for the leader");
                }
                tokio::select! {
                    () = tokio::time::sleep(RETRY) => {}
                    () = shutdown.cancelled() => return Ok(()),
                }
            }
        };
        let result = tokio::select! {
            result = working => result,
            () = watching => Ok(()),
            () = telling => Ok(()),
            () = obeying => Ok(()),
        };
        let groups = Arc::clone(&self.groups);
        let _ = tokio::task::spawn_blocking(move || groups.retire_all()).await;
        result
    }

    /// Fences the worker whenever its lease has run out: somebody else may hold its ranks by then.
    /// It says so, too: a leader that is being joined just now was told of ranks that are gone.
    async fn watch(&self, lease: Arc<Lease>, up: channel::UnboundedSender<Report>) {
        loop {
            tokio::time::sleep(lease.left().max(RETRY)).await;
            self.groups.tidy();
            if lease.left().is_zero() && !self.groups.is_empty() {
                tracing::warn!("the lease ran out: this worker lets go of its groups");
                let held = self.groups.held();
                let groups = Arc::clone(&self.groups);
                let _ = tokio::task::spawn_blocking(move || groups.retire_all()).await;
                for Held { group, epoch, rank, .. } in held {
                    let reason = "its lease ran out".to_owned();
                    let _ = up.send(Report::Failed { group, epoch, rank, reason, blames: None });
                }
            }
        }
    }

    /// Tells those who ask for its health whether this worker has a lease.
    async fn tell(&self, lease: &Lease) {
        let mut told = None;
        loop {
            let serves = !lease.left().is_zero();
            if told.replace(serves) != Some(serves) {
                self.health.set(serves).await;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn connect(&self, target: &str) -> Result<tonic::transport::Channel, End> {
        let connecting = transport::connect(target, Expect::AnyCoordinator, &self.tls);
        match tokio::time::timeout(ATTEMPT, connecting).await {
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(error @ ConnectError::Removed { .. })) => Err(End::Refused(error.to_string())),
            Ok(Err(error)) => Err(End::Broken(error.to_string())),
            Err(_) => Err(End::Broken("it does not answer".to_owned())),
        }
    }

    /// One session from join to end.
    async fn once(
        &self,
        target: &str,
        lease: &Lease,
        obeyed: &channel::UnboundedSender<Order>,
        ranks: &mut channel::UnboundedReceiver<Report>,
        shutdown: &CancellationToken,
    ) -> End {
        let channel = match self.connect(target).await {
            Ok(channel) => channel,
            Err(end) => return end,
        };
        let mut client = transport::coordinator_client(channel.clone());
        let (reports, outgoing) = channel::channel(256);
        let failures = self.groups.take_note(ranks);
        let join = Report::Join(self.info.clone(), self.groups.held());
        // The channel is empty and its other end is held here, so this cannot fail.
        let _ = reports.try_send(join.to_wire());
        let opening = client.session(ReceiverStream::new(outgoing));
        let mut orders = match tokio::time::timeout(ATTEMPT, opening).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return end_of(&status),
            Err(_) => return End::Broken("it does not answer".to_owned()),
        };
        for failure in failures {
            if reports.send(failure.to_wire()).await.is_err() {
                return End::Broken("the session's stream closed".to_owned());
            }
        }
        let mut beats = Beats::new();
        loop {
            let report = tokio::select! {
                order = orders.next() => match order {
                    Some(Ok(order)) => {
                        match self.order(order, lease, &mut beats, &channel) {
                            Ok(None) => {}
                            // Its other end lives as long as this worker does.
                            Ok(Some(order)) => drop(obeyed.send(order)),
                            Err(reason) => return End::Refused(reason),
                        }
                        continue;
                    }
                    Some(Err(status)) => return end_of(&status),
                    None => return End::Broken("the coordinator ended the session".to_owned()),
                },
                Some(report) = ranks.recv() => {
                    self.groups.note(&report);
                    report
                }
                () = beats.next() => {
                    if beats.unanswered() {
                        return End::Broken("its heartbeats go unanswered".to_owned());
                    }
                    Report::Heartbeat(self.groups.incarnations())
                }
                () = shutdown.cancelled() => {
                    // Closing our half says goodbye; the other half closes when it was heard.
                    drop(reports);
                    let heard = async { while let Some(Ok(_)) = orders.next().await {} };
                    let _ = tokio::time::timeout(GOODBYE, heard).await;
                    return End::Shutdown;
                }
            };
            if reports.send(report.to_wire()).await.is_err() {
                return End::Broken("the session's stream closed".to_owned());
            }
        }
    }

    /// Does at once what can be done at once; returns an order about a group.
    fn order(
        &self,
        order: pb::Order,
        lease: &Lease,
        beats: &mut Beats,
        channel: &tonic::transport::Channel,
    ) -> Result<Option<Order>, String> {
        let spec = |digest: &str| Some(Arc::clone(&self.hardware.models.get(digest)?.spec));
        let order = Order::from_wire(order, spec).map_err(|error| error.to_string())?;
        match order {
            Order::Welcome { node, heartbeat_ms, lease_ms, generation } => {
                tracing::info!(node = node.0, "joined the cluster");
                let began = beats.start(Duration::from_millis(heartbeat_ms), lease_ms);
                lease.granted(began, Duration::from_millis(lease_ms));
                self.renew(generation, channel);
            }
            Order::Lease => {
                if let Some(sent) = beats.answered() {
                    lease.renewed(sent);
                }
            }
            Order::Certificate { generation } => self.renew(generation, channel),
            Order::Roll { given, present } => self.refuse(given, &present),
            Order::Form(_) | Order::Prepare(_) | Order::Retire { .. } => return Ok(Some(order)),
        }
        Ok(None)
    }
}

fn end_of(status: &Status) -> End {
    let reason = transport::reason(status);
    if let Some(hint) = status.metadata().get(LEADER_KEY).and_then(|hint| hint.to_str().ok()) {
        return match hint.split_once('@') {
            Some((_, address)) if !address.is_empty() => End::Elsewhere(address.to_owned()),
            None if hint == NO_LEADER => End::NoLeader,
            _ => End::Broken(reason),
        };
    }
    match status.code() {
        tonic::Code::FailedPrecondition
        | tonic::Code::InvalidArgument
        | tonic::Code::PermissionDenied => End::Refused(reason),
        _ => End::Broken(reason),
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
