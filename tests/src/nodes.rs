//! The nodes of a group under test: rank `r` is held by node `100 + r` of a cluster that lives as
//! long as the test.

use std::sync::OnceLock;
use std::time::SystemTime;

use collective::tcp::Secure;
use identity::{Admit, ClusterCa, Expect, NODE_LIFE, Peer, Role, Tls};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConnection, Error, ServerConnection};

/// Node of rank 0.
const FIRST: u64 = 100;
/// More ranks than any group here has.
const RANKS: u64 = 64;

/// A rank's node.
pub(crate) struct Node {
    tls: Tls,
}

/// The node that holds a rank.
pub(crate) fn node(rank: usize) -> Node {
    static CA: OnceLock<ClusterCa> = OnceLock::new();
    let ca = CA.get_or_init(|| ClusterCa::create(SystemTime::now()).expect("an authority"));
    let held = ca.node(FIRST + rank as u64, Role::Worker, NODE_LIFE, SystemTime::now());
    Node { tls: Tls::new(held.expect("a credential")).expect("a good one") }
}

impl Secure for Node {
    fn dial(&self, peer: usize) -> Result<ClientConnection, Error> {
        self.tls.client(Expect::Node(FIRST + peer as u64))
    }

    fn accept(&self) -> Result<ServerConnection, Error> {
        self.tls.server(Admit::workers(FIRST..FIRST + RANKS))
    }

    fn holds(&self, certificate: &CertificateDer<'_>, rank: usize) -> bool {
        let shown = Peer::read(certificate).ok().and_then(|(_, peer)| peer.node(Role::Worker));
        shown == Some(FIRST + rank as u64)
    }
}
