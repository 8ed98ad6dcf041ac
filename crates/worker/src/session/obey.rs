//! What the leader's orders make the worker do.

use std::collections::BTreeSet;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use cluster::{Epoch, GroupId};
use identity::KeyRequest;
use planner::NodeId;
use tokio::sync::mpsc as channel;
use tokio::task::JoinError;
use tonic::transport::Channel;
use wire::{FormGroup, Order, Report, pb, transport};

use super::Session;
use crate::rank::Formation;

/// Between hearing that nodes were removed and refusing them: a coordinator among them goes on
/// serving its clients for a while, and needs this worker for that.
const FAREWELL: Duration = transport::FAREWELL.saturating_add(transport::HEARING);

impl Session {
    /// Does what an order about a group says; returns when it is done.
    pub(super) async fn obey(&self, order: Order, up: &channel::UnboundedSender<Report>) {
        let done = match order {
            Order::Form(form) => self.form(*form, up).await,
            Order::Prepare(form) => self.prepare(*form, up).await,
            Order::Retire { group, epoch, reason } => self.retire(group, epoch, reason).await,
            // Not about groups; those are obeyed at once.
            Order::Welcome { .. }
            | Order::Lease
            | Order::Certificate { .. }
            | Order::Roll { .. } => Ok(()),
        };
        if let Err(error) = done {
            tracing::error!(%error, "an order could not be obeyed");
        }
    }

    async fn form(
        &self,
        form: FormGroup,
        up: &channel::UnboundedSender<Report>,
    ) -> Result<(), JoinError> {
        let node = self.node();
        let FormGroup { group, epoch, .. } = form;
        if self.groups.hosts(group, epoch) {
            // Two orders may cross where the leader changes.
            return Ok(());
        }
        tracing::info!(group = group.0, epoch = epoch.0, "forming a group");
        let mine = form.plan.ranks.iter().find(|r| r.node == node).map_or(0, |r| r.rank);
        let formation = match formation(form, node, self.hardware.devices.len()) {
            Ok(formation) => formation,
            Err(reason) => {
                // Another plan may do: the group fails, not the worker.
                tracing::error!(group = group.0, epoch = epoch.0, reason, "cannot form");
                let _ = up.send(Report::Failed { group, epoch, rank: mine, reason, blames: None });
                return Ok(());
            }
        };
        let (groups, hardware) = (Arc::clone(&self.groups), Arc::clone(&self.hardware));
        let up = up.clone();
        let form = move || groups.form(node, &Arc::new(formation), &hardware, &up);
        tokio::task::spawn_blocking(form).await
    }

    async fn prepare(
        &self,
        form: FormGroup,
        up: &channel::UnboundedSender<Report>,
    ) -> Result<(), JoinError> {
        tracing::info!(group = form.group.0, epoch = form.epoch.0, "preparing to join a group");
        let (groups, hardware) = (Arc::clone(&self.groups), Arc::clone(&self.hardware));
        let (node, up) = (self.node(), up.clone());
        let prepare = move || groups.prepare(node, form, &hardware, &up);
        tokio::task::spawn_blocking(prepare).await
    }

    async fn retire(&self, group: GroupId, epoch: Epoch, reason: String) -> Result<(), JoinError> {
        if !self.groups.hosts(group, epoch) {
            return Ok(());
        }
        tracing::warn!(group = group.0, epoch = epoch.0, reason, "the group is retired");
        let groups = Arc::clone(&self.groups);
        let retire = move || groups.retire(group, epoch);
        tokio::task::spawn_blocking(retire).await
    }

    /// This worker, by its certificate.
    pub(super) fn node(&self) -> NodeId {
        match *self.tls.peer() {
            identity::Peer::Node { id, .. } => NodeId(id),
            // Refused before a session is opened.
            _ => NodeId(0),
        }
    }

    pub(super) fn refuse(&self, given: u64, present: &BTreeSet<NodeId>) {
        transport::shut_out(&self.tls, given, present, FAREWELL);
    }

    /// Gets a fresh certificate, beside the session, if ours is of a generation before or old.
    pub(super) fn renew(&self, generation: u64, channel: &Channel) {
        let due = self.tls.credential().is_due(std::time::SystemTime::now());
        if !due && identity::generation(&self.identity) >= generation {
            return;
        }
        let (tls, identity) = (self.tls.clone(), self.identity.clone());
        let mut client = transport::coordinator_client(channel.clone());
        tokio::spawn(async move {
            let renewed = async {
                let key = KeyRequest::generate().map_err(|error| error.to_string())?;
                let certificate_request = key.request().to_vec().into();
                let reply = client.renew(pb::RenewRequest { certificate_request }).await;
                let reply = reply.map_err(|status| transport::reason(&status))?.into_inner();
                let roots = reply.roots.iter().map(|root| root.to_vec());
                let credential = key.complete(reply.certificate.to_vec(), roots);
                let credential = credential.map_err(|flaw| flaw.to_string())?;
                credential.save(&identity).map_err(|error| error.to_string())?;
                identity::set_generation(&identity, reply.generation)
                    .map_err(|error| error.to_string())?;
                tls.reload(credential).map_err(|flaw| flaw.to_string())?;
                Ok::<u64, String>(reply.generation)
            };
            match renewed.await {
                Ok(generation) => tracing::info!(generation, "this worker has a fresh certificate"),
                Err(reason) => tracing::warn!(reason, "the certificate could not be renewed"),
            }
        });
    }
}

/// Checks an order to form a group against the devices this worker has.
fn formation(order: FormGroup, node: NodeId, devices: usize) -> Result<Formation, String> {
    let absent = order.plan.ranks.iter().find(|r| r.node == node && r.device >= devices);
    if let Some(rank) = absent {
        return Err(format!("rank {} is planned on device {}", rank.rank, rank.device));
    }
    let addresses = order.addresses.iter().map(|a| resolve(&a.collective_address));
    let meeting = addresses.collect::<Result<_, _>>()?;
    Ok(Formation { order, meeting })
}

fn resolve(address: &str) -> Result<SocketAddr, String> {
    let mut found = address.to_socket_addrs().map_err(|e| format!("{address}: {e}"))?;
    found.next().ok_or_else(|| format!("{address} has no address"))
}
