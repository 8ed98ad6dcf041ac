//! `phalanx worker`: joins a cluster and computes its share.

use std::sync::Arc;

use ::worker::{LocalModel, WorkerConfig};
use anyhow::{Context, ensure};
use identity::{Role, Tls};
use tokio::net::TcpListener;

use crate::args;
use crate::config;
use crate::enrol;
use crate::model_dir::ModelDir;
use crate::process::{self, Announcement};

pub(crate) async fn run(args: args::Worker) -> anyhow::Result<()> {
    ensure!(
        args.weight.is_finite() && args.weight > 0.0,
        "--weight must be a positive number, not {}",
        args.weight
    );
    let kernels = args.kernels.as_ref();
    let kernels = kernels.map(|class| class.parse().with_context(|| format!("--kernels {class}")));
    let kernels = kernels.transpose()?;
    let models = ModelDir::open_all(&args.directories)?;
    let share = Share { ranks: args.ranks, threads: args.threads, memory: args.memory };
    share.check()?;
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr()?;
    let reached = config::reached(address, args.identity.advertise.as_deref())?;
    let supervised = args.parent.supervised;
    let shutdown = process::shutdown(supervised)?;
    process::announce(supervised, &Announcement { http: None, cluster: address })?;
    let name = args.name.unwrap_or_else(|| format!("worker-{}", address.port()));
    let join = &args.identity;
    let tls = enrol::identity(join, Role::Worker, &name, &args.coordinator, &shutdown).await?;
    let config = WorkerConfig {
        name,
        coordinators: args.coordinator,
        address: reached,
        tensor_port: args.tensor_port,
        weight: args.weight,
        kernels,
        identity: join.data.clone(),
        ..worker_config(&models, &share, tls)?
    };
    Ok(::worker::run(listener, config, shutdown).await?)
}

/// What of the machine a worker may use.
pub(crate) struct Share {
    pub(crate) ranks: usize,
    pub(crate) threads: Option<usize>,
    pub(crate) memory: Option<u64>,
}

impl Share {
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        ensure!((1..=64).contains(&self.ranks), "--ranks must be between 1 and 64");
        config::threads(self.threads, self.ranks).map(|_| ())
    }
}

/// What every worker of this binary has in common; names and addresses are still to be set.
pub(crate) fn worker_config(
    models: &[ModelDir],
    share: &Share,
    tls: Tls,
) -> anyhow::Result<WorkerConfig> {
    share.check()?;
    let boot = identity::random()?;
    Ok(WorkerConfig {
        name: String::new(),
        coordinators: Vec::new(),
        address: String::new(),
        tensor_port: None,
        models: models.iter().map(local).collect(),
        ranks: share.ranks,
        threads: config::threads(share.threads, share.ranks)?,
        kernels: None,
        memory_bytes: share.memory.map_or_else(process::free_memory, Ok)?,
        weight: 1.0,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        boot: u64::from_le_bytes(boot[..8].try_into().context("eight bytes")?),
        tls,
        identity: std::path::PathBuf::new(),
        vitals: ::worker::Vitals::default(),
    })
}

fn local(model: &ModelDir) -> LocalModel {
    LocalModel {
        directory: model.path.clone(),
        spec: Arc::clone(&model.spec),
        digest: model.digest.to_string(),
        contents: Arc::clone(&model.contents),
    }
}
