//! `phalanx coordinator`: a member of the control plane and its HTTP gateway.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ::worker::Vitals;
use anyhow::{Context, anyhow, bail};
use cluster::{Command, Coordinator, Deployment, Model, Proposal, RequestId};
use control::leader::Timing;
use control::{Control, ControlConfig};
use gateway::{GatewayConfig, Sources};
use identity::{ClusterCa, Role, Tls};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use wire::transport::FAREWELL;

use crate::args;
use crate::config;
use crate::enrol;
use crate::model_dir::ModelDir;
use crate::process::{self, Announcement};

/// How long one attempt to register the model may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts.
const RETRY: Duration = Duration::from_millis(200);

/// What a coordinator serves, and where.
pub(crate) struct Roles {
    pub(crate) http: TcpListener,
    pub(crate) cluster: TcpListener,
    pub(crate) models: Vec<Model>,
    /// What shall be deployed unless it is.
    pub(crate) deployment: Option<Deployment>,
    pub(crate) gateway: GatewayConfig,
    pub(crate) control: ControlConfig,
    pub(crate) tls: Tls,
    pub(crate) ca: ClusterCa,
    /// The worker that shares the process, where one does.
    pub(crate) vitals: Vitals,
}

pub(crate) async fn run(args: args::Coordinator) -> anyhow::Result<()> {
    let models = ModelDir::open_all(&args.directories)?;
    let first = models.first().context("a model directory is needed")?;
    let wished = config::deployment(&args.deploy, args.ranks.unwrap_or(1), first)?;
    let gateway = config::gateway((&args.deploy, &args.http), &models, &wished)?;
    let timing = config::timing(&args.patience)?;
    let http = bind_http(&args.http).await?;
    let cluster = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    let supervised = args.parent.supervised;
    let shutdown = process::shutdown(supervised)?;
    let announcement =
        Announcement { http: Some(http.local_addr()?), cluster: cluster.local_addr()? };
    process::announce(supervised, &announcement)?;
    let listen = cluster.local_addr()?;
    let name = args.name.unwrap_or_else(|| format!("coordinator-{}", listen.port()));
    let join = &args.identity;
    let at = Coordinator {
        cluster_address: config::reached(listen, join.advertise.as_deref())?,
        http_address: config::reached(http.local_addr()?, join.advertise.as_deref())?,
        model_digests: config::digests(&models),
    };
    // All coordinators may be given the same list: none asks itself.
    let known: Vec<String> =
        args.join.into_iter().filter(|address| *address != at.cluster_address).collect();
    let tls = enrol::identity(join, Role::Coordinator, &name, &known, &shutdown).await?;
    let ca = ClusterCa::load(&join.data)?;
    let control = control_config(timing, args.patience.tick, join.data.clone(), name, at);
    let control = ControlConfig { known, ..control };
    control::began_elsewhere(&control, &tls).await?;
    let roles = Roles {
        http,
        cluster,
        models: models.iter().map(config::model).collect(),
        deployment: args.ranks.map(|_| wished),
        gateway,
        control,
        tls,
        ca,
        vitals: Vitals::default(),
    };
    serve(roles, shutdown).await
}

pub(crate) fn control_config(
    timing: Timing,
    tick: Duration,
    data: PathBuf,
    name: String,
    at: Coordinator,
) -> ControlConfig {
    let identity = data.clone();
    ControlConfig { timing, tick, data, identity, name, at, known: Vec::new() }
}

/// Serves both planes of a coordinator until shutdown.
pub(crate) async fn serve(roles: Roles, shutdown: CancellationToken) -> anyhow::Result<()> {
    let Roles { http, cluster, models, deployment, gateway, control, tls, ca, vitals } = roles;
    tracing::info!(
        models = ?models.iter().map(|model| &model.name).collect::<Vec<_>>(),
        http = %http.local_addr()?,
        cluster = %cluster.local_addr()?,
        "the coordinator listens"
    );
    let mut running = control::start(cluster, control, &tls, ca, shutdown.clone())?;
    let wishing = wish(running.control.clone(), models, deployment);
    let wishing = tokio::spawn(wishing);
    let ended = shutdown.clone().cancelled_owned();
    let sources = Sources {
        state: running.view.clone(),
        progress: running.progress.clone(),
        vitals: Arc::new(move || vitals.stalled()),
    };
    let serving = gateway::serve(http, gateway, sources, tls, ended);
    tokio::pin!(serving);
    let mut removed = running.removed.clone();
    let dismissed = async move {
        if removed.wait_for(|removed| *removed).await.is_err() {
            return std::future::pending().await;
        }
        tracing::warn!(seconds = FAREWELL.as_secs(), "removed from the cluster; ending soon");
        tokio::time::sleep(FAREWELL).await;
    };
    tokio::select! {
        served = &mut serving => {
            shutdown.cancel();
            wishing.abort();
            let controlled = running.task.await;
            served?;
            Ok(controlled.map_err(|e| anyhow!("the control task failed: {e}"))??)
        }
        // What is fatal to the control plane ends the process now: nobody knows what the disk
        // holds, and only a new start finds out.
        controlled = &mut running.task => {
            controlled.map_err(|e| anyhow!("the control task failed: {e}"))??;
            wishing.abort();
            Ok(serving.await?)
        }
        () = dismissed => {
            bail!("this coordinator was removed from the cluster; its data directory is of no \
                   more use")
        }
    }
}

/// Registers the models, and has the first one deployed where that is wished and it is not.
async fn wish(control: Control, models: Vec<Model>, deployment: Option<Deployment>) {
    let name = deployment.as_ref().map(|deployment| deployment.name.clone());
    for model in models {
        settle(&control, |state| {
            let known = state.models().contains_key(&model.digest);
            (!known).then(|| Command::RegisterModel(model.clone()))
        })
        .await;
    }
    let (Some(deployment), Some(name)) = (deployment, name) else { return };
    settle(&control, |state| match state.deployments().get(&name) {
        None => Some(Command::Deploy(deployment.clone())),
        Some(standing) => {
            if *standing != deployment {
                tracing::warn!(name, "it is deployed with other options, which stand");
            }
            None
        }
    })
    .await;
}

/// Proposes what `missing` says until it says nothing or the state refuses it.
async fn settle(control: &Control, missing: impl Fn(&cluster::ClusterState) -> Option<Command>) {
    loop {
        // The newest state, so that a restart does not wish for what was taken back since.
        let Ok(state) = control.read(PATIENCE).await else {
            tokio::time::sleep(RETRY).await;
            continue;
        };
        let Some(command) = missing(&state) else { return };
        let Ok(id) = identity::random() else { return };
        let proposal = Proposal { request: Some(RequestId(id)), command };
        match control.write(proposal, PATIENCE).await {
            Ok(Ok(_)) => return,
            Ok(Err(refusal)) => {
                tracing::error!(%refusal, "the cluster refuses what this coordinator is to serve");
                return;
            }
            Err(error) => tracing::debug!(%error, "not decided yet"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The HTTP listener; an error that says which address and what to do.
pub(crate) async fn bind_http(http: &args::Http) -> anyhow::Result<TcpListener> {
    TcpListener::bind(SocketAddr::from((http.host, http.port))).await.with_context(|| {
        format!("cannot serve HTTP on {}:{}; choose another with --port", http.host, http.port)
    })
}
