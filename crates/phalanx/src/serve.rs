//! `phalanx serve`: coordinator, gateway and worker in one process.

use std::net::{Ipv4Addr, SocketAddr};

use ::worker::WorkerConfig;
use anyhow::Context;
use cluster::Deployment;
use planner::{DeviceSpec, Limits, NodeId, NodeSpec};
use tokio::net::TcpListener;

use crate::args;
use crate::config;
use crate::coordinator::{self, Roles};
use crate::model_dir::ModelDir;
use crate::process::{self, Announcement};
use crate::worker::worker_config;

/// Where `phalanx status` looks first.
const CLUSTER_PORT: u16 = 8100;

pub(crate) async fn run(args: args::Serve) -> anyhow::Result<()> {
    let model = ModelDir::open(&args.directory)?;
    let deployment = config::deployment(&args.deploy, args.ranks, &model)?;
    let gateway = config::gateway(&args.deploy, &model, &deployment)?;
    let http = coordinator::bind_http(&args.http).await?;
    let cluster = bind_cluster().await?;
    let nodes = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let supervised = args.parent.supervised;
    let shutdown = process::shutdown(supervised)?;
    let announcement =
        Announcement { http: Some(http.local_addr()?), cluster: cluster.local_addr()? };
    process::announce(supervised, &announcement)?;

    let mut worker = worker_config(&model, args.ranks, args.threads, args.memory)?;
    fits(&deployment, &worker)?;
    worker.coordinator = cluster.local_addr()?.to_string();
    worker.name = "local".to_owned();
    let serving =
        coordinator::serve(Roles { http, cluster, deployment, gateway }, shutdown.clone());
    let working = ::worker::run(nodes, worker, shutdown.clone());
    tokio::pin!(serving, working);
    // Whichever role ends first takes the other with it; the error is the one that began it.
    tokio::select! {
        result = &mut serving => {
            shutdown.cancel();
            result.and(working.await.map_err(Into::into))
        }
        result = &mut working => {
            shutdown.cancel();
            let served = serving.await;
            result.map_err(anyhow::Error::from).and(served)
        }
    }
}

/// Refuses at once what would never be placed: in a cluster another worker may come, here not.
fn fits(deployment: &Deployment, worker: &WorkerConfig) -> anyhow::Result<()> {
    let device = DeviceSpec {
        memory_bytes: worker.memory_bytes / worker.ranks as u64,
        weight: worker.weight,
    };
    let node = NodeSpec { id: NodeId(1), devices: vec![device; worker.ranks] };
    let limits = Limits {
        stripes: deployment.stripes,
        ranks: Some(deployment.ranks),
        experts: deployment.experts,
        compute: deployment.compute,
        kv_blocks: deployment.kv_blocks,
        block_tokens: deployment.block_tokens,
    };
    planner::plan(&deployment.spec, &[node], &limits).context(
        "lower --max-model-len or --kv-tokens, choose --compute bf16 or int8, or add --memory",
    )?;
    Ok(())
}

/// The usual port, or a free one where another server has it.
async fn bind_cluster() -> anyhow::Result<TcpListener> {
    let usual = SocketAddr::from((Ipv4Addr::LOCALHOST, CLUSTER_PORT));
    match TcpListener::bind(usual).await {
        Ok(listener) => Ok(listener),
        Err(_) => {
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("cannot listen on loopback")
        }
    }
}
