//! Names that clients use, and how what they mean is replaced without a failed request.
//!
//! Every step is a change of the cluster's state or a wait for what follows from one, and the
//! state alone says how far a swap has got: a command that was interrupted is given again.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use cluster::{Command, Deployment};
use planner::NodeId;
use serde_json::{Value, json};
use wire::pb;

use crate::args;
use crate::operator::{Operator, find, find_model};
use crate::process;
use crate::status;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);
/// How long a deployment must have had nothing to do. A gateway that is a moment behind, or still
/// at a prompt, may bring a request that began before.
const REST: Duration = Duration::from_secs(2);

/// What was done so far, each with the time since the command began.
struct Steps<'a> {
    operator: &'a Operator,
    began: Instant,
    done: Vec<Value>,
}

impl<'a> Steps<'a> {
    fn new(operator: &'a Operator) -> Self {
        Self { operator, began: Instant::now(), done: Vec::new() }
    }

    fn seconds(&self) -> f64 {
        (self.began.elapsed().as_secs_f64() * 1e3).round() / 1e3
    }

    /// Says a step: to people at once, to programs at the end.
    fn say(&mut self, step: &str, text: &str) -> anyhow::Result<()> {
        let seconds = self.seconds();
        self.done.push(json!({"step": step, "seconds": seconds}));
        match self.operator.output {
            args::Output::Table => process::line(&format!("{seconds:8.2} s  {text}")),
            args::Output::Json => Ok(()),
        }
        .context("standard output")
    }

    /// The one line for programs.
    fn end(self, mut of: Value) -> anyhow::Result<()> {
        of["seconds"] = json!(self.seconds());
        of["steps"] = Value::Array(self.done);
        match self.operator.output {
            args::Output::Table => Ok(()),
            args::Output::Json => process::line(&of.to_string()).context("standard output"),
        }
    }
}

pub(crate) async fn alias(args: args::Alias) -> anyhow::Result<()> {
    let operator = Operator::new(&args.reach)?;
    let command = match (args.name, args.to) {
        (Some(alias), Some(deployment)) => Command::Point { alias, deployment },
        (Some(alias), None) if args.remove => Command::Unpoint { alias },
        (Some(_), None) => bail!("say with --to what the name shall mean, or --remove it"),
        (None, _) => {
            let status = operator.status(false).await?;
            let (table, json) = (status::aliases_table(&status), status::aliases_json(&status));
            return operator.print(&table, &json);
        }
    };
    let said = match &command {
        Command::Point { alias, deployment } => format!("{alias} means {deployment}"),
        Command::Unpoint { alias } => format!("{alias} means nothing any more"),
        _ => String::new(),
    };
    operator.change_and_say(command, &said).await
}

pub(crate) async fn undeploy(args: args::Undeploy) -> anyhow::Result<()> {
    let operator = Operator::new(&args.reach)?;
    let name = args.name;
    if !args.drain {
        let said = format!("{name} is served no longer");
        return operator.change_and_say(Command::Undeploy { name }, &said).await;
    }
    let mut steps = Steps::new(&operator);
    let rested = take_away(&operator, &mut steps, &name, args.timeout).await?;
    steps.end(json!({"done": "undeployed", "deployment": name, "rested": rested}))
}

pub(crate) async fn swap(args: args::Swap) -> anyhow::Result<()> {
    let operator = Operator::new(&args.reach)?;
    let mut steps = Steps::new(&operator);
    let (alias, to) = (args.alias.as_str(), args.to.as_str());
    let status = operator.status(false).await?;
    let meant = meaning(&status, alias)?;
    if meant.deployment != to {
        bring_up(&operator, &mut steps, &status, &args).await?;
        let (alias, deployment) = (alias.to_owned(), to.to_owned());
        operator.change(Command::Point { alias, deployment }).await?;
        steps.say(
            "switched",
            &format!("{} means {to} instead of {}", args.alias, meant.deployment),
        )?;
    }
    let status = operator.status(false).await?;
    let before = meaning(&status, alias)?.before.clone();
    let other = status.aliases.iter().find(|other| other.deployment == before);
    let mut rested = Value::Null;
    match other {
        _ if before.is_empty() => steps.say("done", "nothing is left to be taken away")?,
        Some(other) => {
            steps.say("kept", &format!("{before} stays: {} means it, too", other.name))?;
        }
        None => rested = take_away(&operator, &mut steps, &before, args.timeout).await?.into(),
    }
    let before = Some(before).filter(|before| !before.is_empty());
    steps.end(json!({"done": "swapped", "alias": alias, "deployment": to, "before": before,
                     "rested": rested}))
}

/// What an alias means.
fn meaning<'a>(status: &'a pb::StatusReply, alias: &str) -> anyhow::Result<&'a pb::AliasStatus> {
    let found = status.aliases.iter().find(|one| one.name == alias);
    found.with_context(|| {
        format!("{alias} is no alias; `phalanx alias {alias} --to DEPLOYMENT` makes it one")
    })
}

/// A deployment and how it stands.
fn standing<'a>(status: &'a pb::StatusReply, name: &str) -> Option<&'a pb::DeploymentStatus> {
    let named = |one: &&pb::DeploymentStatus| {
        one.deployment.as_ref().is_some_and(|deployment| deployment.model == name)
    };
    status.deployments.iter().find(named)
}

/// Has the new deployment serve, if there is room for it beside the old one.
async fn bring_up(
    operator: &Operator,
    steps: &mut Steps<'_>,
    status: &pb::StatusReply,
    args: &args::Swap,
) -> anyhow::Result<()> {
    let known = standing(status, &args.to);
    let wish = match known.and_then(|one| one.deployment.clone()) {
        // Given again, the command finds what it has deployed.
        Some(known) => as_asked(wire::wish_from_wire(known)?, status, args)?,
        None => successor(status, args)?,
    };
    if let Some(missing) = operator.room(&wish).await? {
        bail!("there is no room for {} beside {}: {missing}", args.to, args.alias);
    }
    steps.say("room", &format!("there is room for {} on {} ranks", args.to, wish.ranks))?;
    if known.is_none_or(|known| known.draining) {
        operator.change(Command::Deploy(wish)).await?;
        steps.say("deployed", &format!("{} is deployed", args.to))?;
    }
    let until = Instant::now() + args.timeout;
    loop {
        let now = operator.status(false).await;
        let waiting = match now.as_ref().map(|status| standing(status, &args.to)) {
            Ok(Some(one)) if one.waiting_for.is_empty() => break,
            Ok(Some(one)) => one.waiting_for.clone(),
            Ok(None) => bail!("{} was undeployed meanwhile", args.to),
            Err(error) => error.to_string(),
        };
        ensure!(
            Instant::now() < until,
            "{} does not serve yet, and {} means what it did: {waiting}. Give the command again, \
             or `phalanx undeploy {}`",
            args.to,
            args.alias,
            args.to
        );
        tokio::time::sleep(LOOK).await;
    }
    steps.say("serves", &format!("{} serves", args.to))
}

/// A deployment that stands, if it is as the command says.
fn as_asked(
    known: Deployment,
    status: &pb::StatusReply,
    args: &args::Swap,
) -> anyhow::Result<Deployment> {
    let model = args.model.as_ref().map(|model| find_model(status, model)).transpose()?;
    let same = model.is_none_or(|model| model.digest == known.digest)
        && args.ranks.is_none_or(|ranks| ranks == known.ranks)
        && args.replicas.is_none_or(|replicas| replicas == known.replicas)
        && (args.nodes.is_empty() || nodes(status, args)? == known.nodes);
    ensure!(same, "{} is deployed otherwise; `phalanx deploy` changes it", args.to);
    Ok(known)
}

fn nodes(status: &pb::StatusReply, args: &args::Swap) -> anyhow::Result<BTreeSet<NodeId>> {
    args.nodes.iter().map(|node| find(status, node)).collect()
}

/// A deployment with the options of the one that the alias means.
fn successor(status: &pb::StatusReply, args: &args::Swap) -> anyhow::Result<Deployment> {
    let model = find_model(status, args.model.as_ref().unwrap_or(&args.to))?;
    let meant = &meaning(status, &args.alias)?.deployment;
    let now = standing(status, meant).and_then(|one| one.deployment.clone());
    let now = wire::wish_from_wire(now.with_context(|| format!("{meant} is not deployed"))?)?;
    let most = usize::try_from(model.context).context("the model's context")?;
    Ok(Deployment {
        name: args.to.clone(),
        digest: model.digest.clone(),
        ranks: args.ranks.unwrap_or(now.ranks),
        replicas: args.replicas.unwrap_or(now.replicas),
        nodes: if args.nodes.is_empty() { now.nodes } else { nodes(status, args)? },
        context: now.context.min(most),
        ..now
    })
}

/// Drains a deployment and undeploys it; whether it came to rest before.
async fn take_away(
    operator: &Operator,
    steps: &mut Steps<'_>,
    name: &str,
    patience: Duration,
) -> anyhow::Result<bool> {
    operator.change(Command::DrainDeployment { name: name.to_owned() }).await?;
    steps.say("draining", &format!("{name} gets no new requests"))?;
    let rested = rest(operator, name, Instant::now() + patience).await;
    match rested {
        true => steps.say("rested", &format!("{name} has nothing left to do"))?,
        false => steps.say("late", &format!("{name} is still busy; it is not waited for"))?,
    }
    operator.change(Command::Undeploy { name: name.to_owned() }).await?;
    steps.say("freed", &format!("{name} is served no longer; its devices are free"))?;
    Ok(rested)
}

/// Waits until a deployment that gets no new requests has nothing to do; whether it came to that.
async fn rest(operator: &Operator, name: &str, until: Instant) -> bool {
    let mut since = None;
    loop {
        let now = operator.look(pb::StatusRequest { local: false, load: true }).await;
        // Whoever cannot say is asked again.
        since = match now.is_ok_and(|status| rests(&status, name)) {
            true => since.or(Some(Instant::now())),
            false => None,
        };
        if since.is_some_and(|since| since.elapsed() >= REST) {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether no group of the deployment has anything to do. One that is being repaired has: those
/// who wait for it are in no count.
fn rests(status: &pb::StatusReply, name: &str) -> bool {
    let mut groups = status.groups.iter().filter(|group| group.deployment == name);
    groups.all(|group| match (group.phase.as_str(), &group.load) {
        ("retired", _) => true,
        ("serving", Some(load)) => load.waiting + load.running == 0,
        ("forming" | "loading", _) => group.epoch <= 1,
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deployment_rests_when_every_group_says_so() {
        let group = |deployment: &str, phase: &str, epoch, load: Option<(u64, u64)>| {
            let load = load.map(|(waiting, running)| pb::GroupLoad { waiting, running });
            let (deployment, phase) = (deployment.to_owned(), phase.to_owned());
            pb::GroupStatus { deployment, phase, epoch, load, ..Default::default() }
        };
        let of = |groups: Vec<pb::GroupStatus>| {
            rests(&pb::StatusReply { groups, ..Default::default() }, "old")
        };
        let idle = || group("old", "serving", 3, Some((0, 0)));
        assert!(of(vec![idle(), group("old", "retired", 1, None)]));
        assert!(of(vec![idle(), group("new", "serving", 1, Some((4, 4)))]), "another's work");
        assert!(of(vec![idle(), group("old", "loading", 1, None)]), "nobody was ever there");
        for busy in [
            group("old", "serving", 1, Some((0, 1))),
            group("old", "serving", 1, Some((1, 0))),
            group("old", "serving", 1, None),
            group("old", "repairing", 2, None),
            group("old", "forming", 2, None),
        ] {
            assert!(!of(vec![idle(), busy]));
        }
    }
}
