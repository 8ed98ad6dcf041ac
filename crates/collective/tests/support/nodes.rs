//! Nodes of a cluster that lives as long as the test: rank `r` is held by node `100 + r`.

use std::sync::OnceLock;
use std::time::SystemTime;

use collective::tcp::Secure;
use identity::{Admit, ClusterCa, Credential, Expect, NODE_LIFE, Peer, Role, Tls};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConnection, ServerConnection};

/// The most ranks of a group here.
const RANKS: u64 = 8;

pub fn ca() -> &'static ClusterCa {
    static CA: OnceLock<ClusterCa> = OnceLock::new();
    CA.get_or_init(|| ClusterCa::create(SystemTime::now()).expect("an authority"))
}

/// A worker's credential.
pub fn credential(id: u64) -> Credential {
    ca().node(id, Role::Worker, NODE_LIFE, SystemTime::now()).expect("a credential")
}

/// What a rank knows of its group.
pub struct Node {
    pub tls: Tls,
}

/// The node that holds a rank.
pub fn node(rank: usize) -> Node {
    Node { tls: Tls::new(credential(100 + rank as u64)).expect("a good credential") }
}

impl Secure for Node {
    fn dial(&self, peer: usize) -> Result<ClientConnection, rustls::Error> {
        self.tls.client(Expect::Node(100 + peer as u64))
    }

    fn accept(&self) -> Result<ServerConnection, rustls::Error> {
        self.tls.server(Admit::workers(100..100 + RANKS))
    }

    fn holds(&self, certificate: &CertificateDer<'_>, rank: usize) -> bool {
        let (_, peer) = Peer::read(certificate).expect("names");
        peer.node(Role::Worker) == Some(100 + rank as u64)
    }
}
