//! TLS with the credential of the moment.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::{ClientConnection, Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ServerConnection, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::credential::Credential;
use crate::error::Flaw;
use crate::name::{ClusterId, Peer, Role, node_name, role_name};
use crate::verify::{Callers, OwnCertificate, Servers};

/// Who may connect to a port.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Admit {
    /// Nodes that compute.
    pub workers: bool,
    /// Nodes that decide.
    pub coordinators: bool,
    /// Operators.
    pub operators: bool,
    /// Those who are about to join.
    pub tokens: bool,
    /// Of the nodes only these, where given.
    pub nodes: Option<BTreeSet<u64>>,
}

impl Admit {
    /// Everybody whom the cluster has certified: a coordinator's port.
    pub fn members() -> Self {
        Self { workers: true, coordinators: true, operators: true, tokens: true, nodes: None }
    }

    /// Every node: a worker's port.
    pub fn nodes() -> Self {
        Self { workers: true, coordinators: true, ..Self::default() }
    }

    /// Only these workers: a rank's port, while its group forms.
    pub fn workers(nodes: impl IntoIterator<Item = u64>) -> Self {
        Self { workers: true, nodes: Some(nodes.into_iter().collect()), ..Self::default() }
    }

    /// Whether it admits somebody.
    pub fn admits(&self, peer: &Peer) -> bool {
        match peer {
            Peer::Node { id, role } => {
                let role = match role {
                    Role::Worker => self.workers,
                    Role::Coordinator => self.coordinators,
                };
                role && self.nodes.as_ref().is_none_or(|nodes| nodes.contains(id))
            }
            Peer::Operator { .. } => self.operators,
            Peer::Token { .. } => self.tokens,
        }
    }
}

/// Whom a client wants to reach; anybody else is refused in the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Expect {
    /// Exactly this node.
    Node(u64),
    /// Any coordinator of the own cluster: for first contact.
    AnyCoordinator,
    /// Any worker of the own cluster, where an address is known and no number.
    AnyWorker,
}

impl Expect {
    /// The name that the server's certificate must have.
    pub(crate) fn name(self, cluster: ClusterId) -> String {
        match self {
            Self::Node(id) => node_name(id, cluster),
            Self::AnyCoordinator => role_name(Role::Coordinator, cluster),
            Self::AnyWorker => role_name(Role::Worker, cluster),
        }
    }

    pub(crate) fn admits(self, peer: &Peer) -> bool {
        match (self, peer) {
            (Self::Node(wanted), Peer::Node { id, .. }) => *id == wanted,
            (Self::AnyCoordinator, peer) => peer.node(Role::Coordinator).is_some(),
            (Self::AnyWorker, peer) => peer.node(Role::Worker).is_some(),
            (Self::Node(_), _) => false,
        }
    }
}

/// The numbers that nodes of the cluster were given, and who of them is still there: the others
/// were removed. Numbers are never given twice, so whoever is newer than this is nobody's concern.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Roll {
    /// Numbers up to this one were given.
    pub given: u64,
    /// Who of them was not removed.
    pub present: BTreeSet<u64>,
}

impl Roll {
    /// Whether a node of this number was removed.
    pub fn removed(&self, node: u64) -> bool {
        node <= self.given && !self.present.contains(&node)
    }

    /// How many were removed; it only grows.
    fn count(&self) -> u64 {
        self.given.saturating_sub(self.present.len() as u64)
    }
}

/// What handshakes use at this moment.
pub(crate) struct Current {
    pub(crate) certified: Arc<CertifiedKey>,
    pub(crate) callers: Arc<dyn ClientCertVerifier>,
    pub(crate) servers: Arc<WebPkiServerVerifier>,
    pub(crate) roll: Roll,
}

/// What all handles of one identity share.
pub(crate) struct Shared {
    pub(crate) cluster: ClusterId,
    peer: Peer,
    current: RwLock<(Arc<Current>, Credential)>,
    provider: Arc<CryptoProvider>,
    clock: Arc<dyn TimeProvider>,
}

impl Shared {
    pub(crate) fn current(&self) -> Arc<Current> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Tls").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// An identity in use. Clones share it; after [`Tls::reload`] every handshake, also one of a
/// listener or a channel that exists already, uses the new credential. Connections that are open
/// stay as they are.
#[derive(Debug, Clone)]
pub struct Tls {
    shared: Arc<Shared>,
}

impl Tls {
    /// Takes a credential into use.
    ///
    /// # Errors
    /// Its key is not that of its certificate, none of its roots has signed it, or it is not valid
    /// now.
    pub fn new(credential: Credential) -> Result<Self, Flaw> {
        Self::with_clock(credential, Arc::new(DefaultTimeProvider))
    }

    /// As [`Tls::new`], with the clock that decides what has expired.
    ///
    /// # Errors
    /// As for [`Tls::new`].
    pub fn with_clock(credential: Credential, clock: Arc<dyn TimeProvider>) -> Result<Self, Flaw> {
        Self::with_provider(credential, clock, rustls::crypto::ring::default_provider())
    }

    /// As [`Tls::with_clock`], with the cryptography that is used.
    ///
    /// # Errors
    /// As for [`Tls::new`].
    pub fn with_provider(
        credential: Credential,
        clock: Arc<dyn TimeProvider>,
        provider: CryptoProvider,
    ) -> Result<Self, Flaw> {
        let provider = Arc::new(provider);
        let current = current(&credential, &provider, &*clock)?;
        let (cluster, peer) = (credential.cluster(), credential.peer().clone());
        let current = RwLock::new((Arc::new(current), credential));
        Ok(Self { shared: Arc::new(Shared { cluster, peer, current, provider, clock }) })
    }

    /// Uses another credential of the same holder from now on: a renewed certificate, other roots.
    ///
    /// # Errors
    /// As for [`Tls::new`], or it is another one's; then the old one stays in use.
    pub fn reload(&self, credential: Credential) -> Result<(), Flaw> {
        let Shared { cluster: expected, peer, provider, clock, .. } = &*self.shared;
        let got = credential.cluster();
        if got != *expected {
            return Err(Flaw::OtherCluster { expected: *expected, got });
        }
        if credential.peer() != peer {
            let (expected, got) = (peer.clone(), credential.peer().clone());
            return Err(Flaw::OtherPeer { expected, got });
        }
        let checked = current(&credential, provider, &**clock)?;
        let mut place = self.shared.current.write().unwrap_or_else(PoisonError::into_inner);
        let roll = place.0.roll.clone();
        *place = (Arc::new(Current { roll, ..checked }), credential);
        Ok(())
    }

    /// Refuses from now on whoever was removed from the cluster, whatever it shows. A roll that is
    /// older than the one in use changes nothing.
    pub fn refuse(&self, roll: Roll) {
        let mut place = self.shared.current.write().unwrap_or_else(PoisonError::into_inner);
        if roll.count() <= place.0.roll.count() {
            return;
        }
        let Current { certified, callers, servers, .. } = &*place.0;
        let (certified, callers, servers) =
            (Arc::clone(certified), Arc::clone(callers), Arc::clone(servers));
        place.0 = Arc::new(Current { certified, callers, servers, roll });
    }

    /// Whether this peer was removed since it was let in.
    pub fn refuses(&self, peer: &Peer) -> bool {
        matches!(peer, Peer::Node { id, .. } if self.shared.current().roll.removed(*id))
    }

    /// Who this is.
    pub fn peer(&self) -> &Peer {
        &self.shared.peer
    }

    /// Which cluster it is of.
    pub fn cluster(&self) -> ClusterId {
        self.shared.cluster
    }

    /// The credential in use.
    pub fn credential(&self) -> Credential {
        self.shared.current.read().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// For servers: TLS 1.3 only, and only those who are admitted. `protocols` are those of ALPN;
    /// none where both ends know what they speak.
    ///
    /// Sessions cannot be resumed, for a resumed one is not verified again.
    ///
    /// # Errors
    /// The cryptography cannot do TLS 1.3.
    pub fn server_config(
        &self,
        admit: Admit,
        protocols: &[&[u8]],
    ) -> Result<Arc<ServerConfig>, rustls::Error> {
        let callers = Callers { shared: Arc::clone(&self.shared), admit };
        let own = OwnCertificate { shared: Arc::clone(&self.shared) };
        let (provider, clock) = self.parts();
        let mut config = ServerConfig::builder_with_details(provider, clock)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::new(callers))
            .with_cert_resolver(Arc::new(own));
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(Arc::new(config))
    }

    /// For clients: TLS 1.3 only, shows the own certificate, and reaches nobody but the expected.
    /// The name that goes with it is [`Tls::server_name`].
    ///
    /// # Errors
    /// The cryptography cannot do TLS 1.3.
    pub fn client_config(
        &self,
        expect: Expect,
        protocols: &[&[u8]],
    ) -> Result<Arc<ClientConfig>, rustls::Error> {
        let servers = Servers { shared: Arc::clone(&self.shared), expect };
        let own = OwnCertificate { shared: Arc::clone(&self.shared) };
        let (provider, clock) = self.parts();
        let mut config = ClientConfig::builder_with_details(provider, clock)
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(servers))
            .with_client_cert_resolver(Arc::new(own));
        config.resumption = Resumption::disabled();
        // It would tell every listener on the way whom this looks for.
        config.enable_sni = false;
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(Arc::new(config))
    }

    /// The name by which the expected is known.
    ///
    /// # Errors
    /// None in practice: the names are well formed.
    pub fn server_name(&self, expect: Expect) -> Result<ServerName<'static>, rustls::Error> {
        let name = ServerName::try_from(expect.name(self.shared.cluster));
        name.map_err(|why| rustls::Error::General(why.to_string()))
    }

    /// One connection that this end opens.
    ///
    /// # Errors
    /// As for [`Tls::client_config`].
    pub fn client(&self, expect: Expect) -> Result<ClientConnection, rustls::Error> {
        ClientConnection::new(self.client_config(expect, &[])?, self.server_name(expect)?)
    }

    /// One connection that this end has accepted.
    ///
    /// # Errors
    /// As for [`Tls::server_config`].
    pub fn server(&self, admit: Admit) -> Result<ServerConnection, rustls::Error> {
        ServerConnection::new(self.server_config(admit, &[])?)
    }

    fn parts(&self) -> (Arc<CryptoProvider>, Arc<dyn TimeProvider>) {
        (Arc::clone(&self.shared.provider), Arc::clone(&self.shared.clock))
    }
}

/// Checks a credential and makes of it what handshakes use.
fn current(
    credential: &Credential,
    provider: &Arc<CryptoProvider>,
    clock: &dyn TimeProvider,
) -> Result<Current, Flaw> {
    let key = PrivateKeyDer::from(credential.key.clone_key());
    let chain = vec![credential.certificate.clone()];
    let certified = CertifiedKey::from_der(chain, key, provider).map_err(|why| match why {
        rustls::Error::InconsistentKeys(_) => Flaw::OtherKey,
        why => Flaw::Key(why.to_string()),
    })?;
    let roots = Arc::new(roots(&credential.roots)?);
    let unusable = |why: &dyn fmt::Display| Flaw::Root(why.to_string());
    let callers =
        WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(provider));
    let callers = callers.build().map_err(|why| unusable(&why))?;
    let servers = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(provider));
    let servers = servers.build().map_err(|why| unusable(&why))?;
    let now = clock.current_time().ok_or_else(|| Flaw::Key("there is no clock".to_owned()))?;
    own(credential, &*callers, now)?;
    Ok(Current { certified: Arc::new(certified), callers, servers, roll: Roll::default() })
}

fn roots(certificates: &[CertificateDer<'static>]) -> Result<RootCertStore, Flaw> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate.clone()).map_err(|why| Flaw::Root(why.to_string()))?;
    }
    match roots.is_empty() {
        true => Err(Flaw::Root("there is none".to_owned())),
        false => Ok(roots),
    }
}

/// Whether the own certificate would pass where it is shown.
fn own(
    credential: &Credential,
    verifier: &dyn ClientCertVerifier,
    now: UnixTime,
) -> Result<(), Flaw> {
    use rustls::CertificateError as E;
    use rustls::Error::InvalidCertificate;
    let peer = credential.peer().clone();
    match verifier.verify_client_cert(&credential.certificate, &[], now) {
        Ok(_) => Ok(()),
        Err(InvalidCertificate(E::Expired | E::ExpiredContext { .. })) => {
            Err(Flaw::Expired { peer })
        }
        Err(InvalidCertificate(E::NotValidYet | E::NotValidYetContext { .. })) => {
            Err(Flaw::NotYet { peer })
        }
        Err(why) => Err(Flaw::Untrusted { peer, why: why.to_string() }),
    }
}
