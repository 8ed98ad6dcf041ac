//! What a coordinator says and does by itself: that it is there and where; a fresh certificate in
//! time; nobody who was removed is let in.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use cluster::{ClusterState, Command, Coordinator, Proposal, RequestId};
use identity::{Expect, IdentityError, KeyRequest, Peer, Tls};
use planner::NodeId;
use tokio::sync::mpsc;
use tonic::Status;
use wire::pb;
use wire::transport::{self, ConnectError};

use crate::authority::Authority;
use crate::client::{Control, outcome_from_wire};
use crate::driver::Event;
use crate::start::ControlConfig;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// How long one attempt to say where we are may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Before a renewal that failed is tried again.
const RENEWAL: Duration = Duration::from_secs(30);

/// Runs as long as the coordinator does.
pub(crate) async fn run(
    control: Control,
    authority: Authority,
    config: ControlConfig,
    tls: Tls,
    events: mpsc::Sender<Event>,
) {
    let mut view = control.view();
    let mut roll = (0, BTreeSet::new());
    let mut renewal = Instant::now();
    let mut told = false;
    let began = Instant::now();
    let mut led = began;
    loop {
        let state = view.borrow_and_update().clone();
        if control.leadership().leader.is_some() {
            led = Instant::now();
        } else if led.elapsed() > PATIENCE {
            led = Instant::now();
            tokio::spawn(knock(known(&state, &config), tls.clone(), events.clone()));
        }
        if !said(&state, control.node(), &config.at) {
            match say(&control, &config, &state, &tls).await {
                Ok(()) => told = false,
                // An election takes a moment; that is no news.
                Err(status) if !told && began.elapsed() > PATIENCE => {
                    let reason = transport::reason(&status);
                    tracing::warn!(reason, "the cluster does not know of this coordinator yet");
                    told = true;
                }
                Err(_) => {}
            }
        }
        if Instant::now() >= renewal
            && !renew(&control, &authority, &config.identity, &tls, state.generation())
        {
            renewal = Instant::now() + RENEWAL;
        }
        let now = state.roll();
        if now != roll {
            transport::shut_out(&tls, now.0, &now.1, transport::HEARING);
            roll = now;
        }
        tokio::select! {
            changed = view.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Whether the state says where this coordinator is.
fn said(state: &ClusterState, node: NodeId, at: &Coordinator) -> bool {
    let entry = state.nodes().get(&node).and_then(|entry| entry.coordinator.as_ref());
    entry == Some(at)
}

/// Where other coordinators may be.
fn known(state: &ClusterState, config: &ControlConfig) -> BTreeSet<String> {
    let members = state.coordinators().map(|(_, at)| at.cluster_address.clone());
    let known = members.chain(config.known.iter().cloned());
    known.filter(|address| *address != config.at.cluster_address).collect()
}

/// Nobody leads, or nobody says so here: perhaps this coordinator was removed while it was off.
async fn knock(addresses: BTreeSet<String>, tls: Tls, events: mpsc::Sender<Event>) {
    for address in addresses {
        let connecting = transport::connect(&address, Expect::AnyCoordinator, &tls);
        let connected = tokio::time::timeout(PATIENCE, connecting).await;
        if let Ok(Err(ConnectError::Removed { .. })) = connected {
            // A driver that has ended needs no telling.
            let _ = events.send(Event::Removed).await;
            return;
        }
    }
}

async fn say(
    control: &Control,
    config: &ControlConfig,
    state: &ClusterState,
    tls: &Tls,
) -> Result<(), Status> {
    let node = control.node();
    if control.leadership().leading && state.nodes().is_empty() {
        // A refusal means that somebody was faster, which is as well.
        let _ = put(control, Command::Found { name: config.name.clone() }).await?;
    }
    let command = Command::SetCoordinator { node, at: config.at.clone() };
    if control.leadership().leader.is_some() {
        return put(control, command).await?;
    }
    let proposal = Proposal { request: Some(draw()?), command };
    let mut last = Status::unavailable("nobody leads, and no other coordinator is known");
    for address in &config.known {
        let channel = match transport::connect(address, Expect::AnyCoordinator, tls).await {
            Ok(channel) => channel,
            Err(error) => {
                last = Status::unavailable(error.to_string());
                continue;
            }
        };
        let command = wire::encode_command(&proposal).into();
        let request = pb::ChangeRequest { command, forwarded: false };
        let asked = transport::coordinator_client(channel).change(request).await;
        match asked.and_then(|reply| outcome_from_wire(reply.into_inner())) {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(refusal)) => last = Status::failed_precondition(refusal.message),
            Err(status) => last = status,
        }
    }
    Err(last)
}

/// Has a change decided. The inner error is the state's own refusal.
async fn put(control: &Control, command: Command) -> Result<Result<(), Status>, Status> {
    let proposal = Proposal { request: Some(draw()?), command };
    let outcome = control.write(proposal, PATIENCE).await;
    let outcome = outcome.map_err(|why| Status::unavailable(why.to_string()))?;
    Ok(outcome.map(|_| ()).map_err(|refusal| Status::failed_precondition(refusal.message)))
}

fn draw() -> Result<RequestId, Status> {
    identity::random().map(RequestId).map_err(|error| Status::internal(error.to_string()))
}

/// Signs this coordinator's next certificate where the one it has is of a generation before or has
/// lived for two thirds of its life. False if that failed.
fn renew(
    control: &Control,
    authority: &Authority,
    directory: &Path,
    tls: &Tls,
    generation: u64,
) -> bool {
    let due =
        identity::generation(directory) < generation || tls.credential().is_due(SystemTime::now());
    if !due {
        return true;
    }
    let renewed = || -> Result<(), String> {
        let key = KeyRequest::generate().map_err(|error| error.to_string())?;
        let Peer::Node { .. } = tls.peer() else { return Ok(()) };
        let request = pb::RenewRequest { certificate_request: key.request().to_vec().into() };
        let reply = authority.renew(control, tls.peer(), &request);
        let reply = reply.map_err(|status| status.message().to_owned())?;
        let roots = reply.roots.iter().map(|root| root.to_vec());
        let credential = key.complete(reply.certificate.to_vec(), roots);
        let credential = credential.map_err(|flaw| flaw.to_string())?;
        let kept = |error: IdentityError| error.to_string();
        credential.save(directory).map_err(kept)?;
        identity::set_generation(directory, generation).map_err(kept)?;
        tls.reload(credential).map_err(|flaw| flaw.to_string())
    };
    let renewed = renewed();
    match &renewed {
        Ok(()) => tracing::info!(generation, "this coordinator has a fresh certificate"),
        Err(reason) => tracing::error!(reason, "the certificate could not be renewed"),
    }
    renewed.is_ok()
}
