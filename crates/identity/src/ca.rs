//! The cluster's certificate authority: a key, and what it vouches for.

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SerialNumber,
};
use rustls_pki_types::pem::SectionKind;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

use crate::credential::{Credential, validity};
use crate::error::{Flaw, IdentityError};
use crate::files::{
    self, CA_FILE, CA_KEY_FILE, Secrecy, certificates, flaw, pem, private_dir, within,
};
use crate::name::{
    ClusterId, Peer, Role, TokenId, alternative_names, authority_name, operator_name, random,
};

/// How long an authority vouches.
pub const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// How long a node's or an operator's certificate is valid.
pub const NODE_LIFE: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// How long a join token is valid.
pub const TOKEN_LIFE: Duration = Duration::from_secs(24 * 60 * 60);
/// How far clocks may differ: everything is valid from so long before it was issued.
pub const SKEW: Duration = Duration::from_secs(5 * 60);

/// The authority of one cluster.
pub struct ClusterCa {
    cluster: ClusterId,
    key: KeyPair,
    certificate: CertificateDer<'static>,
}

impl fmt::Debug for ClusterCa {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ClusterCa").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

fn issue(why: rcgen::Error) -> IdentityError {
    IdentityError::Issue(why.to_string())
}

/// A certificate's common part: random serial, and valid from a little before `now`.
fn params(
    names: Vec<String>,
    title: &str,
    (from, until): (SystemTime, SystemTime),
) -> Result<CertificateParams, IdentityError> {
    let mut params = CertificateParams::new(names).map_err(issue)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, title);
    params.not_before = OffsetDateTime::from(from);
    params.not_after = OffsetDateTime::from(until);
    let mut serial = random()?;
    // Positive, and of full length.
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

/// Which cluster an authority's certificate names.
fn cluster_of(certificate: &CertificateDer<'_>) -> Result<ClusterId, Flaw> {
    let names = alternative_names(certificate)?;
    let cluster = names.iter().find_map(|name| name.strip_suffix(".phalanx")?.parse().ok());
    cluster.ok_or_else(|| Flaw::Names(format!("{names:?}")))
}

impl ClusterCa {
    /// Makes the authority of a new cluster.
    ///
    /// # Errors
    /// The operating system has no randomness to give.
    pub fn create(now: SystemTime) -> Result<Self, IdentityError> {
        Self::with_id(ClusterId(random()?), now)
    }

    /// Makes another authority for the same cluster, to take over from this one: both are trusted
    /// until every member has a certificate of the new one.
    ///
    /// # Errors
    /// The operating system has no randomness to give.
    pub fn successor(&self, now: SystemTime) -> Result<Self, IdentityError> {
        Self::with_id(self.cluster, now)
    }

    fn with_id(cluster: ClusterId, now: SystemTime) -> Result<Self, IdentityError> {
        let key = KeyPair::generate().map_err(issue)?;
        let title = format!("Phalanx cluster {cluster}");
        let span = (now - SKEW, now + CA_LIFE);
        let mut params = params(vec![authority_name(cluster)], &title, span)?;
        // It signs members, and no further authorities.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(issue)?.der().clone();
        Ok(Self { cluster, key, certificate })
    }

    /// Which cluster it vouches for.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Its certificate: the root that members trust.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Writes `ca.pem` and `ca-key.pem` (0600) into a directory that only its owner can enter. An
    /// authority that is there already is not replaced.
    ///
    /// # Errors
    /// A file is there already or cannot be written; the error names it.
    pub fn save(&self, directory: &Path) -> Result<(), IdentityError> {
        private_dir(directory)?;
        let (key, certificate) = (within(directory, CA_KEY_FILE), within(directory, CA_FILE));
        files::absent(&key)?;
        let text = pem(SectionKind::PrivateKey, self.key.serialized_der());
        files::write(&key, text.as_bytes(), Secrecy::Private)?;
        let text = pem(SectionKind::Certificate, &self.certificate);
        files::write(&certificate, text.as_bytes(), Secrecy::Public)
    }

    /// Reads what [`ClusterCa::save`] wrote. Of several certificates in `ca.pem` the one that
    /// belongs to the key counts.
    ///
    /// # Errors
    /// A file is missing, is none of an authority, or is a key that others can read; the error
    /// names it.
    pub fn load(directory: &Path) -> Result<Self, IdentityError> {
        let (secret, path) = (within(directory, CA_KEY_FILE), within(directory, CA_FILE));
        let text = files::read(&secret, Secrecy::Private)?;
        let unusable = |why: String| flaw(&secret, Flaw::Key(why));
        let key = files::key(&secret, &text)?;
        let key = KeyPair::try_from(&key).map_err(|why| unusable(why.to_string()))?;
        let roots = certificates(&path, &files::read(&path, Secrecy::Public)?)?;
        let own = roots.into_iter().find(|root| public_key(root).as_deref() == Ok(key.der_bytes()));
        let certificate = own.ok_or_else(|| flaw(&path, Flaw::OtherKey))?;
        let cluster = cluster_of(&certificate).map_err(|why| flaw(&path, why))?;
        Ok(Self { cluster, key, certificate })
    }

    /// The key that signs, PKCS #8 in DER: for another coordinator, which signs as well.
    pub fn key_der(&self) -> &[u8] {
        self.key.serialized_der()
    }

    /// The authority of this key, whose certificate is one of `roots`.
    ///
    /// # Errors
    /// What is given is no key, or no root belongs to it.
    pub fn from_key(key: Vec<u8>, roots: &[CertificateDer<'static>]) -> Result<Self, Flaw> {
        let key = PrivatePkcs8KeyDer::from(key);
        let key = KeyPair::try_from(&key).map_err(|why| Flaw::Key(why.to_string()))?;
        let own =
            |root: &&CertificateDer<'static>| public_key(root).as_deref() == Ok(key.der_bytes());
        let certificate = roots.iter().find(own).cloned().ok_or(Flaw::OtherKey)?;
        let cluster = cluster_of(&certificate)?;
        Ok(Self { cluster, key, certificate })
    }

    /// Certifies the key of a request (PKCS #10, DER) as that of a node. What the request says
    /// beside its key is not looked at.
    ///
    /// # Errors
    /// The request cannot be read, or does not prove that its sender has the key.
    pub fn issue_node(
        &self,
        request: &[u8],
        id: u64,
        role: Role,
        life: Duration,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, IdentityError> {
        let request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request));
        let request = request.map_err(|why| Flaw::Request(why.to_string()))?;
        if request.public_key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
            return Err(Flaw::Request("its key is not ECDSA on P-256".to_owned()).into());
        }
        self.sign(&Peer::Node { id, role }, &request.public_key, life, now)
    }

    /// A node's credential with a fresh key.
    ///
    /// # Errors
    /// The operating system has no randomness to give.
    pub fn node(
        &self,
        id: u64,
        role: Role,
        life: Duration,
        now: SystemTime,
    ) -> Result<Credential, IdentityError> {
        self.credential(&Peer::Node { id, role }, life, now)
    }

    /// An operator's credential with a fresh key.
    ///
    /// # Errors
    /// The name is not made of a-z, 0-9 and hyphens, or is longer than 40.
    pub fn operator(
        &self,
        name: &str,
        life: Duration,
        now: SystemTime,
    ) -> Result<Credential, IdentityError> {
        operator_name(name)?;
        self.credential(&Peer::Operator { name: name.to_owned() }, life, now)
    }

    /// A join token's credential, good for `uses` nodes; [`Credential::to_token`] writes it out.
    ///
    /// # Errors
    /// It would be good for nobody.
    pub fn token(
        &self,
        role: Role,
        uses: u32,
        life: Duration,
        now: SystemTime,
    ) -> Result<Credential, IdentityError> {
        if uses == 0 {
            return Err(IdentityError::Issue("a token of no uses".to_owned()));
        }
        let id = TokenId(random()?);
        self.credential(&Peer::Token { id, role, uses }, life, now)
    }

    fn credential(
        &self,
        peer: &Peer,
        life: Duration,
        now: SystemTime,
    ) -> Result<Credential, IdentityError> {
        let key = KeyPair::generate().map_err(issue)?;
        let certificate = self.sign(peer, &key, life, now)?;
        let roots = vec![self.certificate.clone()];
        Ok(Credential::new(certificate, key.serialize_der().into(), roots)?)
    }

    fn sign(
        &self,
        peer: &Peer,
        key: &impl PublicKeyData,
        life: Duration,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, IdentityError> {
        // Nobody checks how long a root is valid, so nothing it signs may outlive it.
        let (_, end) = validity(&self.certificate)?;
        let until = now.checked_add(life).map_or(end, |until| until.min(end));
        if until <= now {
            return Err(IdentityError::Issue("it would have expired already".to_owned()));
        }
        let span = (now - SKEW, until);
        let mut params = params(peer.names(self.cluster), &peer.to_string(), span)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        // Only nodes are ever connected to.
        if matches!(peer, Peer::Node { .. }) {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key).map_err(issue)?;
        Ok(params.signed_by(key, &issuer).map_err(issue)?.der().clone())
    }
}

/// The public key of a certificate, as bits.
fn public_key(certificate: &CertificateDer<'_>) -> Result<Vec<u8>, Flaw> {
    let parsed = x509_parser::parse_x509_certificate(certificate);
    let (_, parsed) = parsed.map_err(|why| Flaw::Certificate(why.to_string()))?;
    Ok(parsed.public_key().subject_public_key.data.to_vec())
}
