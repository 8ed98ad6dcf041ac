//! Which node holds which rank of a group, as the tensor plane has to see it proved.

use std::sync::Arc;

use collective::tcp::Secure;
use identity::{Admit, Expect, Peer, Role, Tls};
use planner::ShardPlan;
use rustls::pki_types::CertificateDer;
use rustls::{ClientConnection, ServerConfig, ServerConnection};

/// The nodes of one group incarnation.
pub(crate) struct Nodes {
    tls: Tls,
    /// By rank.
    holders: Vec<u64>,
    admitting: Arc<ServerConfig>,
}

impl Nodes {
    /// The nodes that a plan names, as seen by this one.
    pub(crate) fn new(plan: &ShardPlan, tls: Tls) -> Result<Self, rustls::Error> {
        let holders: Vec<u64> = plan.ranks.iter().map(|rank| rank.node.0).collect();
        let admitting = tls.server_config(Admit::workers(holders.iter().copied()), &[])?;
        Ok(Self { tls, holders, admitting })
    }
}

impl Secure for Nodes {
    fn dial(&self, peer: usize) -> Result<ClientConnection, rustls::Error> {
        let holder = self.holders.get(peer).copied();
        let none = || rustls::Error::General(format!("there is no rank {peer}"));
        self.tls.client(Expect::Node(holder.ok_or_else(none)?))
    }

    fn accept(&self) -> Result<ServerConnection, rustls::Error> {
        ServerConnection::new(Arc::clone(&self.admitting))
    }

    fn holds(&self, certificate: &CertificateDer<'_>, rank: usize) -> bool {
        let shown = Peer::read(certificate).ok().and_then(|(_, peer)| peer.node(Role::Worker));
        shown.is_some() && shown == self.holders.get(rank).copied()
    }
}
