//! Names in certificates: who somebody is, written as DNS names and read back.
//!
//! A certificate says who its holder is in its subject alternative names and nowhere else. Each
//! kind
//! of holder has one exact set of names; [`Peer::read`] derives the holder from one of them, writes
//! the set out again and compares, so nothing that is merely similar passes.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;

use crate::error::{Flaw, IdentityError};

/// The last label of every name.
const DOMAIN: &str = "phalanx";
/// Longest name of an operator.
const OPERATOR_NAME: usize = 40;

/// Which cluster; chosen at random when its authority is made, and kept when that is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(pub [u8; 16]);

/// Which join token; chosen at random when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(pub [u8; 16]);

/// Sixteen bytes that nobody can guess.
///
/// # Errors
/// The operating system has no randomness to give.
pub fn random() -> Result<[u8; 16], IdentityError> {
    let mut bytes = [0; 16];
    let provider = rustls::crypto::ring::default_provider();
    let filled = provider.secure_random.fill(&mut bytes);
    filled.map_err(|_| IdentityError::Issue("the system has no randomness".to_owned()))?;
    Ok(bytes)
}

fn write_hex(bytes: &[u8; 16], formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
}

/// Lower-case hexadecimal only: each value has one spelling.
fn read_hex(text: &str) -> Option<[u8; 16]> {
    let digits = text.as_bytes();
    let plain = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if digits.len() != 32 || !digits.iter().all(plain) {
        return None;
    }
    let mut bytes = [0; 16];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

impl fmt::Display for ClusterId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, formatter)
    }
}

impl FromStr for ClusterId {
    type Err = Flaw;

    fn from_str(text: &str) -> Result<Self, Flaw> {
        read_hex(text).map(Self).ok_or_else(|| Flaw::Names(format!("{text:?} is no cluster")))
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, formatter)
    }
}

/// What a node does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// It computes.
    Worker,
    /// It decides, and serves the API.
    Coordinator,
}

impl Role {
    /// As it stands in certificates and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Coordinator => "coordinator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = Flaw;

    fn from_str(text: &str) -> Result<Self, Flaw> {
        let roles = [Self::Worker, Self::Coordinator];
        let found = roles.into_iter().find(|role| role.name() == text);
        found.ok_or_else(|| Flaw::Names(format!("{text:?} is no role")))
    }
}

/// Who holds a certificate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// A node of the cluster.
    Node {
        /// Its number; never used twice.
        id: u64,
        /// What it may do.
        role: Role,
    },
    /// A person or a program that looks and gives orders.
    Operator {
        /// Its name: lower-case letters, digits and hyphens.
        name: String,
    },
    /// Somebody who may become a node.
    Token {
        /// Which token.
        id: TokenId,
        /// What that node may do.
        role: Role,
        /// How many nodes may join with it.
        uses: u32,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node { id, role } => write!(formatter, "{role} node {id}"),
            Self::Operator { name } => write!(formatter, "operator {name}"),
            Self::Token { id, role, .. } => write!(formatter, "{role} token {id}"),
        }
    }
}

/// `n7.<cluster>.phalanx`: one node.
pub(crate) fn node_name(id: u64, cluster: ClusterId) -> String {
    format!("n{id}.{cluster}.{DOMAIN}")
}

/// `worker.<cluster>.phalanx`: any node of a role.
pub(crate) fn role_name(role: Role, cluster: ClusterId) -> String {
    format!("{role}.{cluster}.{DOMAIN}")
}

/// `<cluster>.phalanx`: the authority itself.
pub(crate) fn authority_name(cluster: ClusterId) -> String {
    format!("{cluster}.{DOMAIN}")
}

/// Whether an operator may be called so.
pub(crate) fn operator_name(name: &str) -> Result<(), Flaw> {
    let plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    let ends = [name.bytes().next(), name.bytes().last()];
    let fits = name.len() <= OPERATOR_NAME
        && name.bytes().all(plain)
        && ends.iter().all(|end| end.is_some_and(|byte| byte != b'-'));
    fits.then_some(()).ok_or_else(|| {
        Flaw::Names(format!("{name:?} is no name for an operator (a-z, 0-9 and -, at most 40)"))
    })
}

impl Peer {
    /// The node's number, if it is a node of this role.
    pub fn node(&self, wanted: Role) -> Option<u64> {
        match self {
            Self::Node { id, role } if *role == wanted => Some(*id),
            _ => None,
        }
    }

    /// Every name that a certificate of this holder has.
    pub(crate) fn names(&self, cluster: ClusterId) -> Vec<String> {
        match self {
            Self::Node { id, role } => vec![node_name(*id, cluster), role_name(*role, cluster)],
            Self::Operator { name } => vec![format!("operator-{name}.{cluster}.{DOMAIN}")],
            Self::Token { id, role, uses } => {
                vec![format!("token-{id}.{role}.u{uses}.{cluster}.{DOMAIN}")]
            }
        }
    }

    /// Who holds a certificate, and of which cluster. Verifies nothing but the names: the
    /// certificate must have been verified, or be one's own.
    ///
    /// # Errors
    /// It is no certificate, or its names are not exactly those of one kind of holder.
    pub fn read(certificate: &CertificateDer<'_>) -> Result<(ClusterId, Peer), Flaw> {
        let names = alternative_names(certificate)?;
        let found = names.iter().find_map(|name| parse(name, &names));
        let (cluster, peer) = found.ok_or_else(|| Flaw::Names(format!("{names:?}")))?;
        let whole: BTreeSet<String> = peer.names(cluster).into_iter().collect();
        if whole != names {
            return Err(Flaw::Names(format!("{names:?}")));
        }
        Ok((cluster, peer))
    }
}

/// The DNS names of a certificate; any other kind of name among them is refused.
pub(crate) fn alternative_names(
    certificate: &CertificateDer<'_>,
) -> Result<BTreeSet<String>, Flaw> {
    let unreadable = |why: &dyn fmt::Display| Flaw::Certificate(why.to_string());
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).map_err(|why| unreadable(&why))?;
    let extension = parsed.subject_alternative_name().map_err(|why| unreadable(&why))?;
    let extension = extension.ok_or_else(|| Flaw::Names("it has none".to_owned()))?;
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Ok((*name).to_owned()),
        other => Err(Flaw::Names(other.to_string())),
    };
    extension.value.general_names.iter().map(name).collect()
}

/// The holder that one name points to; what else there is among `names` tells a node's role.
fn parse(name: &str, names: &BTreeSet<String>) -> Option<(ClusterId, Peer)> {
    let labels: Vec<&str> = name.split('.').collect();
    let (&last, rest) = labels.split_last()?;
    let (cluster, rest) = rest.split_last()?;
    let cluster = ClusterId(read_hex(cluster).filter(|_| last == DOMAIN)?);
    let peer = match rest {
        [one] => match one.strip_prefix("operator-") {
            Some(name) => {
                operator_name(name).ok()?;
                Peer::Operator { name: name.to_owned() }
            }
            None => {
                let id = one.strip_prefix('n')?.parse().ok()?;
                let roles = [Role::Worker, Role::Coordinator];
                let has = |role: &Role| names.contains(&role_name(*role, cluster));
                Peer::Node { id, role: roles.into_iter().find(has)? }
            }
        },
        [token, role, uses] => Peer::Token {
            id: TokenId(read_hex(token.strip_prefix("token-")?)?),
            role: role.parse().ok()?,
            uses: uses.strip_prefix('u')?.parse().ok()?,
        },
        _ => return None,
    };
    Some((cluster, peer))
}
