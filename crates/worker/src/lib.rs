//! A process that owns a shard: joins a coordinator, loads its stripes, runs steps.
//!
//! [`run`] keeps a session with the coordinator (`session`), starts the ranks it is ordered to
//! (`group`, `rank`), and serves generation and steps (`service`). The rank that leads schedules
//! (`leader`) and hands each step to the others (`followers`).
#![forbid(unsafe_code)]

pub mod bench;
mod followers;
mod group;
mod leader;
mod nodes;
mod prepare;
mod pulse;
mod rank;
mod service;
mod session;
mod shelf;
mod vitals;
mod watchdog;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use cluster::NodeInfo;
use collective::CollectiveError;
use collective::tcp::Endpoint;
use compute::{CpuDevice, KernelClass};
/// How whoever looks into a GGUF file reads it, whether it then works on it or not; and what
/// figures are measured by.
pub use compute::{MachineLimits, MappedFile};
use decoder::{Checkpoint, CheckpointError};
use identity::{Admit, Peer, Role, Tls};
use model::ModelSpec;
use model::content::Content;
use planner::DeviceSpec;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::group::{Groups, Hardware, Model};
use crate::service::Service;
use crate::session::Session;
pub use crate::vitals::Vitals;

/// The full name of the service that a worker's health is about.
const SERVICE: &str = "phalanx.v1.Worker";

/// A model on this machine.
#[derive(Debug, Clone)]
pub struct LocalModel {
    /// The model directory or GGUF file.
    pub directory: PathBuf,
    /// What it is.
    pub spec: Arc<ModelSpec>,
    /// blake3 digest of the directory or file, hexadecimal.
    pub digest: String,
    /// By file name: what the digest was made from. Nothing else is ever loaded.
    pub contents: Arc<BTreeMap<String, Content>>,
}

/// What a worker is and where it belongs.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Its name in tables.
    pub name: String,
    /// `host:port` of the coordinators that are known from the start.
    pub coordinators: Vec<String>,
    /// `host:port` at which other nodes reach this worker; the tensor plane has the same host.
    pub address: String,
    /// First port of the tensor plane, one per rank; free ones where there is none.
    pub tensor_port: Option<u16>,
    /// The models whose ranks it can hold, at least one.
    pub models: Vec<LocalModel>,
    /// Ranks this worker can hold; each is a device of its own.
    pub ranks: usize,
    /// Threads of each rank.
    pub threads: usize,
    /// Instruction set of the kernels; the best there is by default.
    pub kernels: Option<KernelClass>,
    /// Bytes all its ranks together may take.
    pub memory_bytes: u64,
    /// Speed relative to other workers.
    pub weight: f64,
    /// Release of the binary.
    pub version: String,
    /// A number that this process drew at its start.
    pub boot: u64,
    /// Who this worker is.
    pub tls: Tls,
    /// Where its identity is kept; a renewed one goes there.
    pub identity: PathBuf,
    /// Where others in the process see whether it gets on.
    pub vitals: Vitals,
}

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The model directory does not hold what its config says.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The processor lacks the instruction set, or threads cannot be had.
    #[error("the CPU device cannot be used: {0}")]
    Device(String),
    /// A socket cannot be had.
    #[error("cannot listen: {0}")]
    Listen(#[from] std::io::Error),
    /// The tensor plane cannot listen.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The ports that its address asks for cannot be.
    #[error("the address {0} leaves no room for the ports of the tensor plane")]
    Address(String),
    /// The identity is not that of a worker.
    #[error("the identity is that of {0}, which is no worker")]
    Identity(Peer),
    /// The cluster refused this worker.
    #[error("the cluster refused this worker: {reason}")]
    Refused {
        /// Its reason.
        reason: String,
    },
    /// The gRPC server failed.
    #[error("serving failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Serves as a worker until `shutdown`, or until the coordinator refuses it.
pub async fn run(
    listener: TcpListener,
    config: WorkerConfig,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    if config.tls.peer().node(Role::Worker).is_none() {
        return Err(WorkerError::Identity(config.tls.peer().clone()));
    }
    let address = listener.local_addr()?;
    let hardware = Arc::new(hardware(&config, address.ip())?);
    let groups = Arc::new(Groups::default());
    config.vitals.set(&groups);
    let (health, healthy) = wire::transport::health(SERVICE).await;
    let endpoints = hardware.endpoints.clone();
    let session = Session {
        coordinators: config.coordinators.clone(),
        info: info(&config, &hardware),
        groups: Arc::clone(&groups),
        hardware,
        tls: config.tls.clone(),
        identity: config.identity.clone(),
        health: health.clone(),
    };
    let service = wire::transport::worker_server(Service { groups, endpoints });
    // Whichever of the two ends first, the other ends in order before this returns: a group must
    // not outlive its session.
    let end = shutdown.child_token();
    let server = wire::transport::server().add_service(service).add_service(healthy);
    let incoming = wire::transport::incoming(listener, &config.tls, Admit::nodes())?;
    let serving = async {
        let served =
            server.serve_with_incoming_shutdown(incoming, end.clone().cancelled_owned()).await;
        end.cancel();
        served
    };
    let working = async {
        let worked = session.run(&end).await;
        end.cancel();
        health.end().await;
        worked
    };
    let (served, worked) = tokio::join!(serving, working);
    worked?;
    Ok(served?)
}

fn hardware(config: &WorkerConfig, address: IpAddr) -> Result<Hardware, WorkerError> {
    let mut models = BTreeMap::new();
    for LocalModel { directory, spec, digest, contents } in &config.models {
        let checkpoint = Checkpoint::open(directory, spec)?.expecting(contents, config.threads)?;
        let checkpoint = Arc::new(checkpoint);
        models.insert(digest.clone(), Model { spec: Arc::clone(spec), checkpoint });
    }
    let mut devices = Vec::new();
    let mut endpoints = Vec::new();
    for rank in 0..config.ranks {
        let device = CpuDevice::new(config.threads, config.kernels);
        devices.push(device.map_err(|e| WorkerError::Device(e.to_string()))?);
        let port = match config.tensor_port {
            Some(first) => u16::try_from(rank).ok().and_then(|rank| first.checked_add(rank)),
            None => Some(0),
        };
        let port = port.ok_or_else(|| WorkerError::Address(config.address.clone()))?;
        endpoints.push(Arc::new(Endpoint::bind((address, port))?));
    }
    Ok(Hardware {
        devices,
        endpoints,
        models,
        tls: config.tls.clone(),
        runtime: tokio::runtime::Handle::current(),
    })
}

/// What the cluster is told of this worker.
fn info(config: &WorkerConfig, hardware: &Hardware) -> NodeInfo {
    // The host as others know it, the port as it was found.
    let host = config.address.rsplit_once(':').map_or(config.address.as_str(), |(host, _)| host);
    let meeting =
        hardware.endpoints.iter().map(|end| format!("{host}:{}", end.local_addr().port()));
    let memory_bytes = config.memory_bytes / config.ranks.max(1) as u64;
    let device = DeviceSpec { memory_bytes, weight: config.weight };
    let kernel_class = hardware.devices.first().map(|d| d.class().to_string());
    NodeInfo {
        boot: config.boot,
        name: config.name.clone(),
        worker_address: config.address.clone(),
        collective_addresses: meeting.collect(),
        devices: vec![device; config.ranks],
        model_digests: hardware.models.keys().cloned().collect(),
        kernel_class: kernel_class.unwrap_or_default(),
        version: config.version.clone(),
    }
}
