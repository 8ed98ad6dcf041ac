//! `phalanx worker`: joins a coordinator and computes its share.

use std::sync::Arc;

use ::worker::WorkerConfig;
use anyhow::{Context, ensure};
use tokio::net::TcpListener;

use crate::args;
use crate::config;
use crate::model_dir::ModelDir;
use crate::process::{self, Announcement};

pub(crate) async fn run(args: args::Worker) -> anyhow::Result<()> {
    ensure!(
        args.weight.is_finite() && args.weight > 0.0,
        "--weight must be a positive number, not {}",
        args.weight
    );
    let model = ModelDir::open(&args.directory)?;
    let mut config = worker_config(&model, args.ranks, args.threads, args.memory)?;
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr()?;
    ensure!(
        !address.ip().is_unspecified(),
        "--listen must name the address that other nodes reach this worker at, not {address}"
    );
    config.name = args.name.unwrap_or_else(|| format!("worker-{}", address.port()));
    config.coordinator = args.coordinator;
    config.weight = args.weight;
    config.kernels = args
        .kernels
        .map(|class| class.parse().with_context(|| format!("--kernels {class}")))
        .transpose()?;
    let supervised = args.parent.supervised;
    let shutdown = process::shutdown(supervised)?;
    process::announce(supervised, &Announcement { http: None, cluster: address })?;
    Ok(::worker::run(listener, config, shutdown).await?)
}

/// What every worker of this binary has in common; name and coordinator are still to be set.
pub(crate) fn worker_config(
    model: &ModelDir,
    ranks: usize,
    threads: Option<usize>,
    memory: Option<u64>,
) -> anyhow::Result<WorkerConfig> {
    ensure!((1..=64).contains(&ranks), "--ranks must be between 1 and 64");
    Ok(WorkerConfig {
        name: String::new(),
        coordinator: String::new(),
        directory: model.path.clone(),
        spec: Arc::clone(&model.spec),
        digest: model.digest.to_string(),
        ranks,
        threads: config::threads(threads, ranks)?,
        kernels: None,
        memory_bytes: memory.map_or_else(process::free_memory, Ok)?,
        weight: 1.0,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}
