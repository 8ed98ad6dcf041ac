//! A node's identity: read from its data directory, or got for a join token the first time.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, anyhow, bail, ensure};
use identity::{CA_KEY_FILE, CERTIFICATE_FILE, ClusterCa, Credential, Expect, KeyRequest};
use identity::{NODE_LIFE, Peer, Role, Tls, private_dir};
use tokio_util::sync::CancellationToken;
use wire::{pb, transport};

use crate::args;

/// Between two rounds of asking.
const RETRY: Duration = Duration::from_millis(250);
/// How long one coordinator may take to be reached. One that waits to be let in itself has its port
/// open and does not answer there yet: the next one may.
const CONNECT: Duration = Duration::from_secs(2);
/// How long nothing is said of it.
const QUIET: Duration = Duration::from_secs(3);
/// Keeps the number under which this node asks, so that it gets one identity however often it
/// has to ask.
const REQUEST_FILE: &str = "enrolment";
/// Bytes of a token file that are read.
const TOKEN_MAX: u64 = 64 << 10;

/// The identity in `join.data`. Without one there: asks `coordinators` for one, until shutdown.
pub(crate) async fn identity(
    join: &args::Join,
    role: Role,
    name: &str,
    coordinators: &[String],
    shutdown: &CancellationToken,
) -> anyhow::Result<Tls> {
    let credential = if join.data.join(CERTIFICATE_FILE).is_file() {
        unexpired(Credential::load(&join.data)?, &join.data)?
    } else {
        let token = token(join)?;
        tokio::select! {
            asked = ask(&join.data, &token, role, name, coordinators) => asked?,
            () = shutdown.cancelled() => bail!("stopped before the cluster let this node in"),
        }
    };
    let held = match credential.peer() {
        Peer::Node { role, .. } => *role,
        other => bail!("{} holds the identity of {other}, which is no node", join.data.display()),
    };
    ensure!(
        held == role,
        "{} holds the identity of a {held}, not of a {role}",
        join.data.display()
    );
    Ok(Tls::new(credential)?)
}

/// A coordinator that was off for longer than its certificate is good for signs the next one by
/// itself: it holds the authority's key. Nobody else can, and asks with a token as a new node.
fn unexpired(credential: Credential, data: &Path) -> anyhow::Result<Credential> {
    let now = SystemTime::now();
    let (_, until) = credential.validity()?;
    let Peer::Node { id, role } = *credential.peer() else { return Ok(credential) };
    if until > now {
        return Ok(credential);
    }
    if role != Role::Coordinator {
        bail!(
            "the certificate of {role} node {id} has expired. Empty {} and join again with a new \
             token; `phalanx nodes remove {id}` takes the old number out",
            data.display()
        );
    }
    let fresh = ClusterCa::load(data)?.node(id, role, NODE_LIFE, now)?;
    fresh.save(data)?;
    tracing::warn!(node = id, "this coordinator's certificate had expired; it signed a fresh one");
    Ok(fresh)
}

fn token(join: &args::Join) -> anyhow::Result<Credential> {
    let text = match (&join.token, &join.token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(path)) => {
            let length = std::fs::metadata(path).with_context(|| path.display().to_string())?.len();
            ensure!(length <= TOKEN_MAX, "{} is too long for a token", path.display());
            std::fs::read_to_string(path).with_context(|| path.display().to_string())?
        }
        (None, None) => bail!(
            "{} holds no identity yet. Join a cluster with --token or --token-file, which `phalanx \
             token` makes, or make a new cluster with `phalanx init --data {}`",
            join.data.display(),
            join.data.display()
        ),
    };
    Credential::from_token(text.trim()).context("the join token")
}

/// Asks one coordinator after another until one lets this node in or the cluster refuses it.
async fn ask(
    data: &Path,
    token: &Credential,
    role: Role,
    name: &str,
    coordinators: &[String],
) -> anyhow::Result<Credential> {
    match token.peer() {
        Peer::Token { role: lets, .. } if *lets == role => {}
        Peer::Token { role: lets, .. } => bail!("the join token lets in a {lets}, not a {role}"),
        other => bail!("the join token is the credential of {other}"),
    }
    ensure!(!coordinators.is_empty(), "a new node needs the address of a coordinator");
    private_dir(data)?;
    let request_id = request_id(data)?;
    let tls = Tls::new(token.clone()).context("the join token")?;
    let (mut told, began) = (false, Instant::now());
    loop {
        let mut reason = String::new();
        for address in coordinators {
            let key = KeyRequest::generate()?;
            let request = pb::EnrolRequest {
                certificate_request: key.request().to_vec().into(),
                name: name.to_owned(),
                request_id: request_id.to_vec().into(),
            };
            match enrol(address, &tls, request).await {
                Ok(reply) => return keep(data, key, reply, role),
                Err(Refused::ForGood(reason)) => bail!("the cluster refused this node: {reason}"),
                Err(Refused::ForNow(why)) => reason = format!("{address}: {why}"),
            }
        }
        // A cluster that is just being made takes a moment.
        if began.elapsed() > QUIET && !std::mem::replace(&mut told, true) {
            tracing::warn!(reason, "not let in yet; trying again");
        }
        tokio::time::sleep(RETRY).await;
    }
}

enum Refused {
    ForGood(String),
    ForNow(String),
}

async fn enrol(
    address: &str,
    tls: &Tls,
    request: pb::EnrolRequest,
) -> Result<pb::EnrolReply, Refused> {
    let connecting = transport::connect(address, Expect::AnyCoordinator, tls);
    let channel = tokio::time::timeout(CONNECT, connecting).await;
    let channel = channel.map_err(|_| Refused::ForNow("no answer".to_owned()))?;
    let channel = channel.map_err(|error| Refused::ForNow(error.to_string()))?;
    let reply = transport::coordinator_client(channel).enrol(request).await;
    reply.map(tonic::Response::into_inner).map_err(|status| {
        let reason = transport::reason(&status);
        match status.code() {
            tonic::Code::FailedPrecondition
            | tonic::Code::InvalidArgument
            | tonic::Code::PermissionDenied
            | tonic::Code::AlreadyExists => Refused::ForGood(reason),
            _ => Refused::ForNow(reason),
        }
    })
}

/// Writes what the cluster gave: the authority's key first, so that a coordinator with a
/// certificate always has it.
fn keep(
    data: &Path,
    key: KeyRequest,
    reply: pb::EnrolReply,
    role: Role,
) -> anyhow::Result<Credential> {
    let roots: Vec<Vec<u8>> = reply.roots.iter().map(|root| root.to_vec()).collect();
    let credential = key.complete(reply.certificate.to_vec(), roots).context("the answer")?;
    if role == Role::Coordinator && !data.join(CA_KEY_FILE).is_file() {
        let ca = ClusterCa::from_key(reply.authority_key.to_vec(), credential.roots());
        ca.context("the authority's key")?.save(data)?;
    }
    credential.save(data)?;
    tracing::info!(node = reply.node, "the cluster has let this node in");
    Ok(credential)
}

fn request_id(data: &Path) -> anyhow::Result<[u8; 16]> {
    let path = data.join(REQUEST_FILE);
    if let Ok(bytes) = std::fs::read(&path) {
        return bytes.try_into().map_err(|_| anyhow!("{} is damaged", path.display()));
    }
    let id = identity::random()?;
    std::fs::write(&path, id).with_context(|| path.display().to_string())?;
    Ok(id)
}
