//! What operators do to a running cluster, through whichever coordinator answers.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use cluster::{Command, Deployment, Done, Proposal, RequestId};
use identity::{Credential, Expect, Tls};
use planner::NodeId;
use serde_json::json;
use tonic::transport::Channel;
use wire::pb::coordinator_client::CoordinatorClient;
use wire::{pb, transport};

use crate::args;
use crate::config;
use crate::process;
use crate::status;

/// How long the coordinators together may take to decide.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long one of them may take to be reached.
const CONNECT: Duration = Duration::from_secs(2);
/// Between two rounds.
const RETRY: Duration = Duration::from_millis(200);

/// An operator's way to a cluster.
pub(crate) struct Operator {
    coordinators: Vec<String>,
    tls: Tls,
    pub(crate) output: args::Output,
}

impl Operator {
    pub(crate) fn new(reach: &args::Reach) -> anyhow::Result<Self> {
        let credential = Credential::load_file(&reach.identity).context(
            "an operator's credential is needed, such as `phalanx init` makes; say where it is \
             with --identity or PHALANX_IDENTITY",
        )?;
        let tls = Tls::new(credential)?;
        Ok(Self { coordinators: reach.coordinator.clone(), tls, output: reach.output })
    }

    /// A connection to the first coordinator that answers.
    async fn connect(&self) -> anyhow::Result<CoordinatorClient<Channel>> {
        self.connect_from(0).await
    }

    /// A connection to the first coordinator that answers, from the one at `first` on.
    async fn connect_from(&self, first: usize) -> anyhow::Result<CoordinatorClient<Channel>> {
        let mut reasons = Vec::new();
        let count = self.coordinators.len();
        for address in self.coordinators.iter().cycle().skip(first % count.max(1)).take(count) {
            let connecting = transport::connect(address, Expect::AnyCoordinator, &self.tls);
            match tokio::time::timeout(CONNECT, connecting).await {
                Ok(Ok(channel)) => return Ok(transport::coordinator_client(channel)),
                Ok(Err(error)) => reasons.push(format!("{address}: {error}")),
                Err(_) => reasons.push(format!("{address}: no answer")),
            }
        }
        bail!("no coordinator answers ({})", reasons.join("; "))
    }

    /// What the cluster looks like. A coordinator that is cut off from the others shows what it
    /// last knew: then the next one is asked, and its word is taken only where nobody knows better.
    pub(crate) async fn status(&self, local: bool) -> anyhow::Result<pb::StatusReply> {
        self.look(pb::StatusRequest { local, load: false }).await
    }

    /// The same, with what else is asked for.
    pub(crate) async fn look(&self, request: pb::StatusRequest) -> anyhow::Result<pb::StatusReply> {
        let local = request.local;
        let mut old = None;
        for first in 0..self.coordinators.len() {
            let asked = async {
                let mut client = self.connect_from(first).await?;
                let reply = client.status(request).await;
                Ok(reply.map_err(|status| anyhow!(transport::reason(&status)))?.into_inner())
            };
            match asked.await {
                Ok(reply) if reply.current || local => return Ok(reply),
                Ok(reply) => old = old.or(Some(Ok(reply))),
                Err(error) => old = old.or(Some(Err(error))),
            }
        }
        old.unwrap_or_else(|| bail!("no coordinator is given"))
    }

    /// What the cluster looks like, now and after every change.
    pub(crate) async fn watch(&self) -> anyhow::Result<tonic::Streaming<pb::StatusReply>> {
        let mut client = self.connect().await?;
        let reply = client.watch(pb::WatchRequest { after: 0 }).await;
        Ok(reply.map_err(|status| anyhow!(transport::reason(&status)))?.into_inner())
    }

    /// What a deployment would lack, in words; `None` where there is room for it.
    pub(crate) async fn room(&self, wish: &Deployment) -> anyhow::Result<Option<String>> {
        let request = pb::RoomRequest { deployment: Some(wire::deployment_to_wire(wish)) };
        let mut last = anyhow!("no coordinator is given");
        for first in 0..self.coordinators.len() {
            let mut client = self.connect_from(first).await?;
            match client.room(request.clone()).await {
                Ok(reply) => {
                    return Ok(Some(reply.into_inner().missing).filter(|why| !why.is_empty()));
                }
                Err(status) => last = anyhow!(transport::reason(&status)),
            }
        }
        Err(last)
    }

    /// Has a change decided. Asked again, it is still one change.
    pub(crate) async fn change(&self, command: Command) -> anyhow::Result<Done> {
        let request = Some(RequestId(*uuid::Uuid::new_v4().as_bytes()));
        let command = wire::encode_command(&Proposal { request, command });
        let began = std::time::Instant::now();
        for round in 0.. {
            let asked = async {
                // One that cannot decide may be cut off from those that can.
                let mut client = self.connect_from(round).await?;
                let command = command.clone().into();
                let reply = client.change(pb::ChangeRequest { command, forwarded: false }).await;
                Ok::<_, anyhow::Error>(reply)
            };
            let reason = match asked.await {
                Ok(Ok(reply)) => {
                    let outcome = control::outcome_from_wire(reply.into_inner());
                    let outcome = outcome.map_err(|status| anyhow!(transport::reason(&status)))?;
                    return outcome.map_err(|refusal| anyhow!(refusal.message));
                }
                Ok(Err(status)) if status.code() != tonic::Code::Unavailable => {
                    bail!(transport::reason(&status))
                }
                Ok(Err(status)) => anyhow!(transport::reason(&status)),
                Err(error) => error,
            };
            if began.elapsed() >= PATIENCE {
                return Err(reason.context("nobody could say that the change was decided"));
            }
            tokio::time::sleep(RETRY).await;
        }
        bail!("no coordinator is given")
    }

    /// Has a change decided and says so.
    pub(crate) async fn change_and_say(&self, command: Command, said: &str) -> anyhow::Result<()> {
        let done = self.change(command).await?;
        self.print(said, &json!({"done": said, "index": done.index}))
    }

    pub(crate) fn print(&self, table: &str, json: &serde_json::Value) -> anyhow::Result<()> {
        match self.output {
            args::Output::Table => process::line(table.trim_end()),
            args::Output::Json => process::line(&json.to_string()),
        }
        .context("standard output")
    }

    /// The node of that number or name.
    async fn find(&self, node: &str) -> anyhow::Result<NodeId> {
        let status = self.status(false).await?;
        find(&status, node)
    }
}

/// The node of that number, or the only one of that name that has not left.
pub(crate) fn find(status: &pb::StatusReply, node: &str) -> anyhow::Result<NodeId> {
    let number = node.parse::<u64>().ok();
    let present = status.nodes.iter().filter(|one| one.standing != "left");
    let named = present.filter(|one| Some(one.node) == number || one.name == node);
    let named: Vec<u64> = named.map(|one| one.node).collect();
    match named[..] {
        [one] => Ok(NodeId(one)),
        [] => bail!("no node {node} is known"),
        _ => match number.filter(|number| named.contains(number)) {
            Some(number) => Ok(NodeId(number)),
            None => bail!("several nodes have the name {node}; give the number"),
        },
    }
}

pub(crate) async fn status(args: args::Status) -> anyhow::Result<()> {
    let operator = Operator::new(&args.reach)?;
    let show =
        |status: &pb::StatusReply| operator.print(&status::table(status), &status::json(status));
    if !args.watch {
        return show(&operator.status(args.local).await?);
    }
    let mut client = operator.connect().await?;
    let stream = client.watch(pb::WatchRequest { after: 0 }).await;
    let mut stream = stream.map_err(|status| anyhow!(transport::reason(&status)))?.into_inner();
    loop {
        match stream.message().await {
            Ok(Some(status)) => show(&status)?,
            Ok(None) => return Ok(()),
            Err(status) => bail!(transport::reason(&status)),
        }
    }
}

pub(crate) async fn nodes(args: args::Nodes) -> anyhow::Result<()> {
    let operator = Operator::new(&args.reach)?;
    if let Some(args::NodesAction::Remove { node }) = &args.action {
        return remove(&operator, node, "worker").await;
    }
    let status = operator.status(false).await?;
    operator.print(&status::nodes_table(&status), &status::nodes_json(&status))
}

async fn remove(operator: &Operator, node: &str, role: &str) -> anyhow::Result<()> {
    let status = operator.status(false).await?;
    let id = find(&status, node)?;
    let held = status.nodes.iter().find(|one| one.node == id.0).map(|one| one.role.as_str());
    ensure!(
        held == Some(role),
        "node {node} is a {}; `phalanx {} remove` takes it out",
        held.unwrap_or("stranger"),
        if role == "worker" { "members" } else { "nodes" }
    );
    operator.change_and_say(Command::Leave { node: id }, &format!("node {} is removed", id.0)).await
}

pub(crate) async fn groups(args: args::Groups) -> anyhow::Result<()> {
    let operator = Operator::new(&args.reach)?;
    let status = operator.status(false).await?;
    operator.print(&status::groups_table(&status), &status::groups_json(&status))
}

pub(crate) async fn models(args: args::Models) -> anyhow::Result<()> {
    let operator = Operator::new(&args.reach)?;
    let status = operator.status(false).await?;
    operator.print(&status::models_table(&status), &status::models_json(&status))
}

pub(crate) async fn members(args: args::Members) -> anyhow::Result<()> {
    let operator = Operator::new(&args.reach)?;
    match &args.action {
        Some(args::MembersAction::Remove { node }) => remove(&operator, node, "coordinator").await,
        Some(args::MembersAction::Transfer { node }) => {
            let node = match node {
                Some(node) => operator.find(node).await?.0,
                None => 0,
            };
            let mut client = operator.connect().await?;
            let moved = client.transfer(pb::TransferRequest { node, forwarded: false }).await;
            moved.map_err(|status| anyhow!(transport::reason(&status)))?;
            operator.print("leadership is being moved", &json!({"done": "transfer"}))
        }
        None => {
            let status = operator.status(false).await?;
            operator.print(&status::members_table(&status), &status::members_json(&status))
        }
    }
}

pub(crate) async fn deploy(args: args::DeployCommand) -> anyhow::Result<()> {
    let operator = Operator::new(&args.reach)?;
    config::sizes(&args.options)?;
    let status = operator.status(false).await?;
    let standing = status.deployments.iter().filter_map(|one| one.deployment.as_ref());
    let standing = standing.clone().find(|one| one.model == args.name);
    let mut nodes = BTreeSet::new();
    for node in &args.nodes {
        nodes.insert(find(&status, node)?);
    }
    let deployment = match standing {
        // What stands changes in scale only.
        Some(standing) => {
            let mut deployment = wire::wish_from_wire(standing.clone())?;
            ensure!(
                args.model.is_none() && args.ranks.is_none_or(|ranks| ranks == deployment.ranks),
                "{} is deployed; only --replicas and --nodes can change. Undeploy it first",
                args.name
            );
            deployment.replicas = args.replicas.unwrap_or(deployment.replicas);
            if !args.nodes.is_empty() {
                deployment.nodes = nodes;
            }
            deployment
        }
        None => new_deployment(&args, &status, nodes)?,
    };
    let said = format!(
        "{} is deployed: {} ranks, replicas {}",
        deployment.name, deployment.ranks, deployment.replicas
    );
    operator.change_and_say(Command::Deploy(deployment), &said).await
}

fn new_deployment(
    args: &args::DeployCommand,
    status: &pb::StatusReply,
    nodes: BTreeSet<NodeId>,
) -> anyhow::Result<Deployment> {
    let model = find_model(status, args.model.as_ref().unwrap_or(&args.name))?;
    let most = usize::try_from(model.context).context("the model's context")?;
    let context = config::context(&args.options, most)?;
    Ok(Deployment {
        name: args.name.clone(),
        digest: model.digest.clone(),
        compute: config::compute(&args.options),
        experts: args.options.experts.into(),
        stripes: args.options.stripes,
        ranks: args.ranks.unwrap_or(1),
        replicas: args.replicas.unwrap_or(1),
        nodes,
        kv_blocks: config::kv_blocks(&args.options, context)?,
        block_tokens: args.options.block_size,
        max_sequences: args.options.max_num_seqs,
        step_tokens: args.options.max_num_batched_tokens,
        context,
    })
}

/// The only model of that name, or with those first digits of its digest.
pub(crate) fn find_model<'a>(
    status: &'a pb::StatusReply,
    wanted: &str,
) -> anyhow::Result<&'a pb::ModelStatus> {
    let named = |one: &&pb::ModelStatus| {
        one.name == wanted || (wanted.len() >= 8 && one.digest.starts_with(wanted))
    };
    let found: Vec<&pb::ModelStatus> = status.models.iter().filter(named).collect();
    match found[..] {
        [model] => Ok(model),
        [] => bail!(
            "no model {wanted} is known; coordinators register theirs when they start \
             (`phalanx models`)"
        ),
        _ => bail!("several models are named {wanted}; give the first digits of the digest"),
    }
}

pub(crate) async fn drain(args: args::Drain) -> anyhow::Result<()> {
    let operator = Operator::new(&args.reach)?;
    let node = operator.find(&args.node).await?;
    if args.undo {
        let said = format!("node {} may hold ranks again", node.0);
        return operator.change_and_say(Command::Undrain { node }, &said).await;
    }
    let said = format!("node {} drains; it holds ranks as long as no other node has room", node.0);
    operator.change_and_say(Command::Drain { node }, &said).await
}

pub(crate) async fn certs(args: args::Certs) -> anyhow::Result<()> {
    let operator = Operator::new(&args.reach)?;
    match args.action {
        args::CertsAction::Rotate => {
            let said = "every node gets a new certificate";
            operator.change_and_say(Command::RotateCertificates, said).await
        }
    }
}
