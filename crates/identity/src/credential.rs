//! A credential: a certificate with its private key, and the roots its holder trusts.

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls_pki_types::pem::SectionKind;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use crate::error::{Flaw, IdentityError};
use crate::files::{
    self, CA_FILE, CERTIFICATE_FILE, KEY_FILE, Secrecy, certificates, flaw, key, pem, private_dir,
    within,
};
use crate::name::{ClusterId, Peer};

/// What a member of a cluster shows and by what it judges others.
pub struct Credential {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivatePkcs8KeyDer<'static>,
    pub(crate) roots: Vec<CertificateDer<'static>>,
    cluster: ClusterId,
    peer: Peer,
}

impl fmt::Debug for Credential {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("Credential");
        shown.field("peer", &self.peer).field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

impl Clone for Credential {
    fn clone(&self) -> Self {
        Self {
            certificate: self.certificate.clone(),
            key: self.key.clone_key(),
            roots: self.roots.clone(),
            cluster: self.cluster,
            peer: self.peer.clone(),
        }
    }
}

impl Credential {
    /// Puts the parts together. Whether they fit is looked at when they are used
    /// ([`Tls::new`](crate::Tls::new)).
    ///
    /// # Errors
    /// The names in the certificate are not those of a member.
    pub fn new(
        certificate: CertificateDer<'static>,
        key: PrivatePkcs8KeyDer<'static>,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Self, Flaw> {
        let (cluster, peer) = Peer::read(&certificate)?;
        Ok(Self { certificate, key, roots, cluster, peer })
    }

    /// Who holds it.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Which cluster it is of.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// The certificates of the authorities it trusts, in DER form.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// When it becomes valid and when it ceases to be.
    ///
    /// # Errors
    /// The certificate cannot be read.
    pub fn validity(&self) -> Result<(SystemTime, SystemTime), Flaw> {
        validity(&self.certificate)
    }

    /// Trusts these authorities from now on, instead of those before.
    pub fn with_roots(mut self, roots: Vec<CertificateDer<'static>>) -> Self {
        self.roots = roots;
        self
    }

    /// Writes a node's credential into a directory that only its owner can enter: `node.pem`,
    /// `node-key.pem` (0600) and `ca.pem`. What was there is replaced, the key first: a crash in
    /// between leaves a pair that [`Credential::load`] refuses, never a wrong identity.
    ///
    /// # Errors
    /// A file cannot be written; the error names it.
    pub fn save(&self, directory: &Path) -> Result<(), IdentityError> {
        private_dir(directory)?;
        let key = pem(SectionKind::PrivateKey, self.key.secret_pkcs8_der());
        let certificate = pem(SectionKind::Certificate, &self.certificate);
        files::write(&within(directory, CA_FILE), self.roots_pem().as_bytes(), Secrecy::Public)?;
        files::write(&within(directory, KEY_FILE), key.as_bytes(), Secrecy::Private)?;
        let path = within(directory, CERTIFICATE_FILE);
        files::write(&path, certificate.as_bytes(), Secrecy::Public)
    }

    /// Reads what [`Credential::save`] wrote.
    ///
    /// # Errors
    /// A file is missing, is no credential, or is a key that others can read; the error names it.
    pub fn load(directory: &Path) -> Result<Self, IdentityError> {
        let path = within(directory, CERTIFICATE_FILE);
        let chain = certificates(&path, &files::read(&path, Secrecy::Public)?)?;
        let ca = within(directory, CA_FILE);
        let roots = certificates(&ca, &files::read(&ca, Secrecy::Public)?)?;
        let secret = within(directory, KEY_FILE);
        let key = key(&secret, &files::read(&secret, Secrecy::Private)?)?;
        let [certificate] = <[_; 1]>::try_from(chain)
            .map_err(|_| flaw(&path, Flaw::Certificate("there must be exactly one".to_owned())))?;
        Self::new(certificate, key, roots).map_err(|why| flaw(&path, why))
    }

    /// Writes everything into one file (0600), as operators use it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save_file(&self, path: &Path) -> Result<(), IdentityError> {
        let text = pem(SectionKind::Certificate, &self.certificate)
            + &pem(SectionKind::PrivateKey, self.key.secret_pkcs8_der())
            + &self.roots_pem();
        files::write(path, text.as_bytes(), Secrecy::Private)
    }

    /// Reads what [`Credential::save_file`] wrote: first the own certificate, then the roots.
    ///
    /// # Errors
    /// As for [`Credential::load`].
    pub fn load_file(path: &Path) -> Result<Self, IdentityError> {
        let text = files::read(path, Secrecy::Private)?;
        let mut chain = certificates(path, &text)?;
        let key = key(path, &text)?;
        let roots = chain.split_off(1);
        let certificate = chain.remove(0);
        Self::new(certificate, key, roots).map_err(|why| flaw(path, why))
    }

    fn roots_pem(&self) -> String {
        self.roots.iter().map(|root| pem(SectionKind::Certificate, root)).collect()
    }
}

/// When a certificate becomes valid and when it ceases to be.
pub(crate) fn validity(certificate: &CertificateDer<'_>) -> Result<(SystemTime, SystemTime), Flaw> {
    let parsed = x509_parser::parse_x509_certificate(certificate);
    let (_, parsed) = parsed.map_err(|why| Flaw::Certificate(why.to_string()))?;
    let time = |stamp: x509_parser::time::ASN1Time| {
        UNIX_EPOCH + Duration::from_secs(stamp.timestamp().try_into().unwrap_or(0))
    };
    let validity = parsed.validity();
    Ok((time(validity.not_before), time(validity.not_after)))
}

/// A fresh private key and the request to have it certified. The key never leaves its owner.
pub struct KeyRequest {
    key: PrivatePkcs8KeyDer<'static>,
    request: Vec<u8>,
}

impl fmt::Debug for KeyRequest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("KeyRequest").finish_non_exhaustive()
    }
}

impl KeyRequest {
    /// Makes a key (ECDSA P-256) and a request for it. The request proves that the key is at hand
    /// and names nobody: who its holder will be is the issuer's to say.
    ///
    /// # Errors
    /// The operating system has no randomness to give.
    pub fn generate() -> Result<Self, IdentityError> {
        let issue = |why: rcgen::Error| IdentityError::Issue(why.to_string());
        let key = KeyPair::generate().map_err(issue)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(&key).map_err(issue)?;
        Ok(Self { request: request.der().to_vec(), key: key.serialize_der().into() })
    }

    /// The request (PKCS #10, DER), for [`ClusterCa::issue_node`](crate::ClusterCa::issue_node).
    pub fn request(&self) -> &[u8] {
        &self.request
    }

    /// The credential, once the authority has answered with a certificate and its roots in DER.
    ///
    /// # Errors
    /// The certificate is not one of a member.
    pub fn complete(
        self,
        certificate: Vec<u8>,
        roots: impl IntoIterator<Item = Vec<u8>>,
    ) -> Result<Credential, Flaw> {
        let roots = roots.into_iter().map(CertificateDer::from).collect();
        Credential::new(certificate.into(), self.key, roots)
    }
}
