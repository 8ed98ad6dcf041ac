//! From a directory and a listener to a running coordinator.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cluster::{ClusterState, Coordinator, Progress};
use identity::{Admit, ClusterCa, Expect, Role, Tls};
use planner::NodeId;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Router;
use wire::transport;

use crate::announce;
use crate::authority::Authority;
use crate::client::Control;
use crate::driver::{Driver, Event, Leadership, Published};
use crate::leader::Timing;
use crate::machine::ClusterMachine;
use crate::peers::Peers;
use crate::replica::{ClusterId, Fatal, LogStore, RedbStore, Replica, ReplicaConfig};
use crate::service::Service;

/// Events that may wait for the driver; whoever has more to say waits.
const EVENTS: usize = 4096;
/// How long connections may take to close once everything is told to end.
const DRAIN: Duration = Duration::from_secs(2);
/// The log, hard state and snapshots.
const LOG_FILE: &str = "raft.redb";
/// Says that there was a log here: one that is gone must not be begun anew under the same number,
/// for its votes are forgotten.
const MARK_FILE: &str = "raft.begun";
/// Who began the cluster: its credential comes with the authority's key, everybody else's later.
const FOUNDER: NodeId = NodeId(1);
/// The full name of the service that a coordinator's health is about.
const SERVICE: &str = "phalanx.v1.Coordinator";
/// How long another coordinator may take to show that it is there.
const ANSWER: Duration = Duration::from_secs(2);

/// How a coordinator's control plane behaves.
#[derive(Debug, Clone)]
pub struct ControlConfig {
    /// Leases of workers.
    pub timing: Timing,
    /// How long a tick of consensus is: 15 to 30 of them without a leader start an election.
    pub tick: Duration,
    /// Where the log is kept.
    pub data: PathBuf,
    /// Where this node's identity is kept.
    pub identity: PathBuf,
    /// A name for people.
    pub name: String,
    /// Where others reach this coordinator.
    pub at: Coordinator,
    /// `host:port` of coordinators that may know the cluster, for one that is new.
    pub known: Vec<String>,
}

/// A running control plane.
#[derive(Debug)]
pub struct ControlHandle {
    /// Reads and changes the state.
    pub control: Control,
    /// The state after every change; the newest one only.
    pub view: watch::Receiver<Arc<ClusterState>>,
    /// How far ranks have loaded, as far as they said so here: to the coordinator that leads.
    pub progress: watch::Receiver<Progress>,
    /// True once this node was removed from the cluster.
    pub removed: watch::Receiver<bool>,
    /// Ends after shutdown, or with what was fatal: then the process must end at once.
    pub task: JoinHandle<Result<(), Fatal>>,
}

/// Why the control plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The certificate is no coordinator's.
    #[error("the identity is that of {0}, which is no coordinator")]
    Identity(String),
    /// A lease that would lose workers at once.
    #[error("the lease must be longer than the suspicion, and that longer than a heartbeat")]
    Timing,
    /// The listener does not work.
    #[error("the listener cannot be used: {0}")]
    Listener(std::io::Error),
    /// The data directory does not work.
    #[error("{what} in the data directory: {error}")]
    Data {
        /// Which file.
        what: &'static str,
        /// What the operating system said.
        error: std::io::Error,
    },
    /// The log is gone, and with it the votes that this node has given.
    #[error(
        "the log of this coordinator is gone. It cannot come back as node {node}: its votes are \
         forgotten. Remove node {node} from the cluster, empty the data directory and join with a \
         new token"
    )]
    LogGone {
        /// This node.
        node: u64,
    },
    /// The log does not fit.
    #[error("the log: {0}")]
    Replica(#[from] Fatal),
}

/// Serves workers, operators and the other coordinators on `listener` until `shutdown`. Must be
/// called within a tokio runtime.
///
/// # Errors
/// [`ControlError`]; nothing runs then.
pub fn start(
    listener: TcpListener,
    config: ControlConfig,
    tls: &Tls,
    ca: ClusterCa,
    shutdown: CancellationToken,
) -> Result<ControlHandle, ControlError> {
    let timing = config.timing;
    if timing.heartbeat == 0
        || timing.suspicion <= timing.heartbeat
        || timing.lease <= timing.suspicion
    {
        return Err(ControlError::Timing);
    }
    let wrong = || ControlError::Identity(tls.peer().to_string());
    let node = tls.peer().node(Role::Coordinator).map(NodeId).ok_or_else(wrong)?;
    let replica = open(&config.data, node, ClusterId(tls.cluster().0))?;
    let incoming = transport::incoming(listener, tls, Admit::members());
    let incoming = incoming.map_err(ControlError::Listener)?;

    let (events, queue) = mpsc::channel(EVENTS);
    let (view, seen) = watch::channel(Arc::new(replica.machine().state().clone()));
    let (leadership, led) = watch::channel(Leadership::default());
    let (gone, removed) = watch::channel(false);
    let (loading, progress) = watch::channel(Progress::new());
    let published = Published { view, leadership, progress: loading, removed: gone };
    let known = led.clone();
    let control = Control::new(node, events.clone(), seen.clone(), led, tls.clone());
    let own = config.at.cluster_address.clone();
    let peers = Peers::new(Handle::current(), tls.clone(), own, events.clone());
    let authority = Authority::new(Arc::new(ca));
    let service = Service {
        control: control.clone(),
        events: events.clone(),
        authority: authority.clone(),
        shutdown: shutdown.clone(),
    };
    let driver = Driver::new(replica, timing, peers, published);
    let thread = std::thread::Builder::new().name("control".to_owned());
    let (ended, end) = oneshot::channel();
    let spawned = thread.spawn(move || {
        // Whoever waits may have gone: then nobody needs to know.
        let _ = ended.send(driver.run(queue));
    });
    spawned.map_err(ControlError::Listener)?;
    let tick = config.tick;
    let announcing = announce::run(control.clone(), authority, config, tls.clone(), events.clone());
    let task = tokio::spawn(async move {
        let (health, router, telling) = serves(service, known).await;
        let stop = shutdown.clone().cancelled_owned();
        let server = tokio::spawn(router.serve_with_incoming_shutdown(incoming, stop));
        let announcing = tokio::spawn(announcing);
        let ticking = tokio::spawn(beat(tick, events.clone()));
        let ending = tokio::spawn(async move {
            shutdown.cancelled().await;
            // A driver that has ended needs no telling.
            let _ = events.send(Event::Shutdown).await;
        });
        let result = end.await.unwrap_or(Err(Fatal::Failed));
        let telling = telling.abort_handle();
        [announcing.abort_handle(), ticking.abort_handle(), ending.abort_handle(), telling]
            .iter()
            .for_each(tokio::task::AbortHandle::abort);
        health.end().await;
        drain(server).await;
        result
    });
    Ok(ControlHandle { control, view: seen, progress, removed, task })
}

/// Refuses a founder that must not begin: it has no log, and one of the others that `config` knows
/// is a coordinator of this cluster, which has a founder then. Its log is gone; a second beginning
/// under the same authority would be a second cluster.
///
/// # Errors
/// [`ControlError::LogGone`].
pub async fn began_elsewhere(config: &ControlConfig, tls: &Tls) -> Result<(), ControlError> {
    let node = tls.peer().node(Role::Coordinator);
    let begun = [LOG_FILE, MARK_FILE].iter().any(|file| config.data.join(file).exists());
    if begun || node != Some(FOUNDER.0) {
        return Ok(());
    }
    let mut asking = JoinSet::new();
    for address in &config.known {
        let (address, tls) = (address.clone(), tls.clone());
        asking.spawn(async move {
            let connecting = transport::connect(&address, Expect::AnyCoordinator, &tls);
            matches!(tokio::time::timeout(ANSWER, connecting).await, Ok(Ok(_)))
        });
    }
    match asking.join_all().await.contains(&true) {
        true => Err(ControlError::LogGone { node: FOUNDER.0 }),
        false => Ok(()),
    }
}

/// Opens the log, or begins one where there was none before.
fn open(
    data: &Path,
    node: NodeId,
    cluster: ClusterId,
) -> Result<Replica<RedbStore, ClusterMachine>, ControlError> {
    let (log, mark) = (data.join(LOG_FILE), data.join(MARK_FILE));
    let exists =
        |path: &Path, what| path.try_exists().map_err(|error| ControlError::Data { what, error });
    let begun = exists(&mark, MARK_FILE)?;
    if begun && !exists(&log, LOG_FILE)? {
        return Err(ControlError::LogGone { node: node.0 });
    }
    let mut store = RedbStore::open(&log);
    // It may have ended between the beginning and the mark.
    let begun = begun || !store.load().map_err(Fatal::from)?.is_empty();
    // Timeouts need only differ between nodes and between lives.
    let seed = u64::from_le_bytes(cluster.0[..8].try_into().unwrap_or_default()) ^ node.0;
    let config = ReplicaConfig::new(node, cluster, seed);
    let machine = ClusterMachine::default();
    let replica = match (begun, node) {
        (true, _) => Replica::open(config, store, machine)?,
        // The founder is node 1; everybody else has joined.
        (false, FOUNDER) => Replica::bootstrap(config, store, machine)?,
        (false, _) => Replica::join(config, store, machine)?,
    };
    if !mark.exists() {
        let marked = std::fs::File::create(&mark).and_then(|file| file.sync_all());
        let marked = marked.and_then(|()| std::fs::File::open(data)?.sync_all());
        marked.map_err(|error| ControlError::Data { what: MARK_FILE, error })?;
    }
    Ok(replica)
}

/// Ticks until the driver has ended. A driver that is busy misses ticks rather than getting them
/// late and all at once: time that it has not lived through must not count as a leader's silence.
async fn beat(tick: Duration, events: mpsc::Sender<Event>) {
    let mut interval = tokio::time::interval(tick);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        if events.try_send(Event::Tick).is_err() && events.is_closed() {
            return;
        }
    }
}

/// What the cluster's port serves, the health that it tells, and the task that keeps it true.
async fn serves(
    service: Service,
    leadership: watch::Receiver<Leadership>,
) -> (transport::Health, Router, JoinHandle<()>) {
    let (health, healthy) = transport::health(SERVICE).await;
    let router = transport::server().add_service(transport::coordinator_server(service));
    let telling = tokio::spawn(tell(health.clone(), leadership));
    (health, router.add_service(healthy), telling)
}

/// Tells those who ask for its health whether this coordinator knows who leads: then it passes
/// changes on, and can say what stands.
async fn tell(health: transport::Health, mut leadership: watch::Receiver<Leadership>) {
    loop {
        let led = leadership.borrow_and_update().leader.is_some();
        health.set(led).await;
        if leadership.changed().await.is_err() {
            return health.set(false).await;
        }
    }
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
