//! `phalanx coordinator`: the cluster's decisions and its HTTP gateway.

use std::time::Duration;

use anyhow::{Context, anyhow};
use cluster::Deployment;
use control::ControlConfig;
use gateway::GatewayConfig;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::args;
use crate::config;
use crate::model_dir::ModelDir;
use crate::process::{self, Announcement};

/// A worker that says nothing for this long is lost.
const LEASE: Duration = Duration::from_secs(5);

/// What a coordinator serves, and where.
pub(crate) struct Roles {
    pub(crate) http: TcpListener,
    pub(crate) cluster: TcpListener,
    pub(crate) deployment: Deployment,
    pub(crate) gateway: GatewayConfig,
}

pub(crate) async fn run(args: args::Coordinator) -> anyhow::Result<()> {
    let model = ModelDir::open(&args.directory)?;
    let deployment = config::deployment(&args.deploy, args.ranks, &model)?;
    let gateway = config::gateway(&args.deploy, &model, &deployment)?;
    let http = bind_http(&args.http).await?;
    let cluster = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    let supervised = args.parent.supervised;
    let shutdown = process::shutdown(supervised)?;
    let announcement =
        Announcement { http: Some(http.local_addr()?), cluster: cluster.local_addr()? };
    process::announce(supervised, &announcement)?;
    serve(Roles { http, cluster, deployment, gateway }, shutdown).await
}

/// Serves both planes of a coordinator until shutdown.
pub(crate) async fn serve(roles: Roles, shutdown: CancellationToken) -> anyhow::Result<()> {
    let Roles { http, cluster, deployment, gateway } = roles;
    tracing::info!(
        model = deployment.model,
        http = %http.local_addr()?,
        cluster = %cluster.local_addr()?,
        ranks = deployment.ranks,
        stripes = deployment.stripes,
        "the coordinator listens"
    );
    let control =
        control::start(cluster, deployment, ControlConfig { lease: LEASE }, shutdown.clone())?;
    let ended = shutdown.clone().cancelled_owned();
    let served = gateway::serve(http, gateway, control.view.clone(), ended).await;
    shutdown.cancel();
    let controlled = control.task.await.map_err(|e| anyhow!("the control task failed: {e}"));
    served?;
    controlled?;
    Ok(())
}

/// The HTTP listener; an error that says which address and what to do.
pub(crate) async fn bind_http(http: &args::Http) -> anyhow::Result<TcpListener> {
    TcpListener::bind((http.host, http.port)).await.with_context(|| {
        format!("cannot serve HTTP on {}:{}; choose another with --port", http.host, http.port)
    })
}
