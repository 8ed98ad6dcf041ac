//! What happens inside a handshake: which certificate is shown, and whose is taken.
//!
//! Each verifier first lets webpki check signature, purpose and time against the roots of the
//! moment, then reads who the holder is and asks whether that one is wanted here.

use std::fmt;
use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    PeerIncompatible, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::name::Peer;
use crate::tls::{Admit, Expect, Shared};

/// Why somebody with a good certificate was turned away.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Unwanted {
    #[error("{0} is not admitted here")]
    NotAdmitted(Peer),
    #[error("it is {got}, not the one that was looked for ({expected:?})")]
    Another { got: Peer, expected: Expect },
    #[error("{0}")]
    Names(String),
}

fn refuse(why: Unwanted) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(why))))
}

impl Shared {
    /// Who shows a certificate that has passed, if one of this cluster and not removed from it.
    fn holder(&self, certificate: &CertificateDer<'_>) -> Result<Peer, Error> {
        let read = Peer::read(certificate);
        let (cluster, peer) = read.map_err(|why| refuse(Unwanted::Names(why.to_string())))?;
        if cluster != self.cluster {
            return Err(Error::InvalidCertificate(CertificateError::UnknownIssuer));
        }
        match peer {
            // The one refusal that the other end can tell from all others: trying again is of no
            // use to it.
            Peer::Node { id, .. } if self.current().roll.removed(id) => {
                Err(Error::InvalidCertificate(CertificateError::Revoked))
            }
            peer => Ok(peer),
        }
    }
}

/// Shows the certificate of the moment.
#[derive(Debug)]
pub(crate) struct OwnCertificate {
    pub(crate) shared: Arc<Shared>,
}

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.shared.current().certified))
    }
}

impl ResolvesClientCert for OwnCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.shared.current().certified))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// TLS 1.2 is not offered, so nothing of it may ever have to be verified.
fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::PeerIncompatible(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig))
}

/// Judges those who connect.
pub(crate) struct Callers {
    pub(crate) shared: Arc<Shared>,
    pub(crate) admit: Admit,
}

impl fmt::Debug for Callers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Callers").field("admit", &self.admit).finish_non_exhaustive()
    }
}

impl ClientCertVerifier for Callers {
    /// No hints: they would have to outlive a reload, and every caller has one certificate.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let callers = &self.shared.current().callers;
        let verified = callers.verify_client_cert(end_entity, intermediates, now)?;
        let peer = self.shared.holder(end_entity)?;
        match self.admit.admits(&peer) {
            true => Ok(verified),
            false => Err(refuse(Unwanted::NotAdmitted(peer))),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.shared.current().callers.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.shared.current().callers.supported_verify_schemes()
    }
}

/// Judges those who are connected to.
pub(crate) struct Servers {
    pub(crate) shared: Arc<Shared>,
    pub(crate) expect: Expect,
}

impl fmt::Debug for Servers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Servers").field("expect", &self.expect).finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // The name comes from what this config was made for, not from how the connection is called.
        let name = self.expect.name(self.shared.cluster);
        let name = ServerName::try_from(name).map_err(|why| Error::General(why.to_string()))?;
        let servers = &self.shared.current().servers;
        let verified =
            servers.verify_server_cert(end_entity, intermediates, &name, ocsp_response, now)?;
        let peer = self.shared.holder(end_entity)?;
        match self.expect.admits(&peer) {
            true => Ok(verified),
            false => Err(refuse(Unwanted::Another { got: peer, expected: self.expect })),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.shared.current().servers.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.shared.current().servers.supported_verify_schemes()
    }
}
