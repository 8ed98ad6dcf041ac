//! `phalanx init` and `phalanx token`: a new cluster, and the way into it. Files only; nothing
//! needs to run.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use identity::{ClusterCa, NODE_LIFE, OPERATOR_FILE, Role};

use crate::args;
use crate::process;

/// A token that lives longer than this is a password.
const TTL_MAX: Duration = Duration::from_secs(366 * 24 * 60 * 60);
/// Most nodes that one token may let in.
const USES_MAX: u32 = 1024;

pub(crate) fn run(args: &args::Init) -> anyhow::Result<()> {
    let ca = found(&args.data, &args.operator)?;
    let (data, cluster) = (args.data.display(), ca.cluster());
    process::line(&format!(
        "cluster {cluster} is made in {data}\n\
         \n\
         start its first coordinator:   phalanx coordinator MODEL --data {data}\n\
         let another node in:           phalanx token --data {data} --role worker\n\
         look at it:                    phalanx status --identity {}\n\
         \n\
         {data} holds the key that signs certificates: keep it private and keep a copy.",
        args.data.join(OPERATOR_FILE).display()
    ))
    .context("standard output")
}

/// Makes a cluster's authority, the identity of its first coordinator and an operator's.
pub(crate) fn found(data: &Path, operator: &str) -> anyhow::Result<ClusterCa> {
    let now = SystemTime::now();
    let ca = ClusterCa::create(now)?;
    // First, for it refuses a directory that holds a cluster already.
    ca.save(data)?;
    ca.node(1, Role::Coordinator, NODE_LIFE, now)?.save(data)?;
    ca.operator(operator, NODE_LIFE, now)?.save_file(&data.join(OPERATOR_FILE))?;
    Ok(ca)
}

pub(crate) fn operator(args: &args::OperatorCredential) -> anyhow::Result<()> {
    within(args.ttl)?;
    let ca = ClusterCa::load(&args.data)?;
    ca.operator(&args.name, args.ttl, SystemTime::now())?.save_file(&args.out)?;
    let said = format!("{} is the credential of operator {}", args.out.display(), args.name);
    process::line(&said).context("standard output")
}

fn within(ttl: Duration) -> anyhow::Result<()> {
    ensure!(!ttl.is_zero() && ttl <= TTL_MAX, "--ttl must be more than 0 and at most 366 days");
    Ok(())
}

pub(crate) fn token(args: &args::Token) -> anyhow::Result<()> {
    ensure!((1..=USES_MAX).contains(&args.uses), "--uses must be between 1 and {USES_MAX}");
    within(args.ttl)?;
    let ca = ClusterCa::load(&args.data)?;
    let role = match args.role {
        args::NodeRole::Worker => Role::Worker,
        args::NodeRole::Coordinator => Role::Coordinator,
    };
    let token = ca.token(role, args.uses, args.ttl, SystemTime::now())?;
    process::line(&token.to_token()?).context("standard output")
}
