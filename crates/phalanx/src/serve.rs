//! `phalanx serve`: coordinator, gateway and worker in one process.
//!
//! They are the same three as in a cluster, with a certificate authority that lives as long as the
//! process: what speaks over a port speaks mutual TLS, here as well.

use std::net::{Ipv4Addr, SocketAddr};

use ::worker::WorkerConfig;
use anyhow::Context;
use cluster::{Coordinator, Deployment};
use identity::{Credential, OPERATOR_FILE, Role, TOKEN_LIFE, Tls};
use planner::{DeviceSpec, Limits, NodeId, NodeSpec};
use tokio::net::TcpListener;

use crate::args;
use crate::config;
use crate::coordinator::{self, Roles, control_config};
use crate::enrol;
use crate::init;
use crate::model_dir::ModelDir;
use crate::process::{self, Announcement};
use crate::worker::{Share, worker_config};

/// Where `phalanx status` looks first.
const CLUSTER_PORT: u16 = 8100;

pub(crate) async fn run(args: args::Serve) -> anyhow::Result<()> {
    let model = ModelDir::open(&args.directory)?;
    let deployment = config::deployment(&args.deploy, args.ranks, &model)?;
    let models = std::slice::from_ref(&model);
    let gateway = config::gateway((&args.deploy, &args.http), models, &deployment)?;
    let share = Share { ranks: args.ranks, threads: args.threads, memory: args.memory };
    let http = coordinator::bind_http(&args.http).await?;
    let cluster = bind_cluster().await?;
    let nodes = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let supervised = args.parent.supervised;
    let shutdown = process::shutdown(supervised)?;

    let private = tempfile::Builder::new().prefix("phalanx-").tempdir();
    let private = private.context("a private temporary directory")?;
    let (ours, workers) = (private.path().join("coordinator"), private.path().join("worker"));
    let ca = init::found(&ours, "local")?;
    let token = ca.token(Role::Worker, 1, TOKEN_LIFE, std::time::SystemTime::now())?;
    let tls = Tls::new(Credential::load(&ours)?)?;
    let at = Coordinator {
        cluster_address: cluster.local_addr()?.to_string(),
        http_address: config::reached(http.local_addr()?, Some("127.0.0.1"))?,
        model_digests: config::digests(models),
    };
    let join = args::Join {
        data: workers.clone(),
        token: Some(token.to_token()?),
        token_file: None,
        advertise: None,
    };
    let coordinators = vec![at.cluster_address.clone()];
    let name = "local".to_owned();
    let (timing, tick) = config::alone();
    let control = control_config(timing, tick, ours.clone(), name.clone(), at);
    // The worker's own identity comes over the wire, as in a cluster; this stands in until then.
    let mut worker = worker_config(models, &share, tls.clone())?;
    fits(&model, &deployment, &worker)?;
    worker.coordinators.clone_from(&coordinators);
    worker.address = nodes.local_addr()?.to_string();
    worker.name.clone_from(&name);
    worker.identity = workers;
    let announcement =
        Announcement { http: Some(http.local_addr()?), cluster: cluster.local_addr()? };
    process::announce(supervised, &announcement)?;
    tracing::info!(identity = %ours.join(OPERATOR_FILE).display(), "for phalanx status");
    let (models, deployment) = (vec![config::model(&model)], Some(deployment));
    let vitals = worker.vitals.clone();
    let roles = Roles { http, cluster, models, deployment, gateway, control, tls, ca, vitals };
    let serving = coordinator::serve(roles, shutdown.clone());
    let working = async {
        let who = enrol::identity(&join, Role::Worker, &name, &coordinators, &shutdown);
        worker.tls = who.await?;
        Ok::<(), anyhow::Error>(::worker::run(nodes, worker, shutdown.clone()).await?)
    };
    tokio::pin!(serving, working);
    // Whichever role ends first takes the other with it; the error is the one that began it.
    tokio::select! {
        result = &mut serving => {
            let stopping = shutdown.is_cancelled();
            shutdown.cancel();
            let worked = working.await;
            if stopping { result } else { result.and(worked) }
        }
        result = &mut working => {
            let stopping = shutdown.is_cancelled();
            shutdown.cancel();
            let served = serving.await;
            if stopping { served } else { result.and(served) }
        }
    }
}

/// Refuses at once what would never be placed: in a cluster another worker may come, here not.
fn fits(model: &ModelDir, deployment: &Deployment, worker: &WorkerConfig) -> anyhow::Result<()> {
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
    planner::plan(&model.spec, &[node], &limits).context(
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
