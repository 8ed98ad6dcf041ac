//! Everything that can be wrong with a credential, and where.

use std::io;
use std::path::PathBuf;

use crate::name::{ClusterId, Peer};

/// Why an identity could not be made, read, written or used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file is not what it must be.
    #[error("{}: {why}", path.display())]
    File {
        /// Which file or directory.
        path: PathBuf,
        /// What is wrong with it.
        why: FileFlaw,
    },
    /// A credential that did not come from a file, or whose parts do not belong together.
    #[error(transparent)]
    Credential(#[from] Flaw),
    /// What was to be issued cannot be.
    #[error("cannot issue a certificate: {0}")]
    Issue(String),
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum FileFlaw {
    /// It is not there.
    #[error("there is no such file")]
    Missing,
    /// It is there already and would be lost.
    #[error("it exists already and is not overwritten")]
    Exists,
    /// Others than its owner can read or change it.
    #[error("a private key that others can reach (mode {mode:03o}); run chmod 600 on it")]
    Exposed {
        /// Its permission bits.
        mode: u32,
    },
    /// A directory, a device, or far larger than any credential.
    #[error("it is not a credential file")]
    NotOne,
    /// No PEM block of the kind that belongs there.
    #[error("it holds no {what} in PEM form")]
    NoPem {
        /// The kind of block that was looked for.
        what: &'static str,
    },
    /// What it holds is no good.
    #[error("{0}")]
    Content(#[from] Flaw),
    /// The operating system refused.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// What is wrong with a credential.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// The certificate is not X.509 as it is used here.
    #[error("the certificate cannot be read: {0}")]
    Certificate(String),
    /// The names in the certificate are not those of a node, an operator or a token.
    #[error("the names in the certificate are not those of a member: {0}")]
    Names(String),
    /// The private key cannot be used.
    #[error("the private key cannot be used: {0}")]
    Key(String),
    /// The private key is another one's.
    #[error("the private key does not belong to the certificate")]
    OtherKey,
    /// Its time is over.
    #[error("the certificate of {peer} has expired")]
    Expired {
        /// Whose it is.
        peer: Peer,
    },
    /// Its time has not come.
    #[error("the certificate of {peer} is not valid yet; is the clock right?")]
    NotYet {
        /// Whose it is.
        peer: Peer,
    },
    /// No root that is trusted here has signed it.
    #[error("the certificate of {peer} is not signed by this cluster's authority: {why}")]
    Untrusted {
        /// Whose it claims to be.
        peer: Peer,
        /// What the verification said.
        why: String,
    },
    /// A credential that is to replace another is not for the same one.
    #[error("a credential of {got} cannot replace that of {expected}")]
    OtherPeer {
        /// Who is running.
        expected: Peer,
        /// Whose the new credential is.
        got: Peer,
    },
    /// A credential of another cluster.
    #[error("the certificate belongs to cluster {got}, not {expected}")]
    OtherCluster {
        /// The cluster it should be of.
        expected: ClusterId,
        /// The cluster it is of.
        got: ClusterId,
    },
    /// There is no root certificate, or one that is none.
    #[error("a root certificate cannot be used: {0}")]
    Root(String),
    /// A join token that is cut off, mistyped, or none at all.
    #[error("the join token cannot be read: {0}")]
    Token(&'static str),
    /// A certificate request that cannot be read or whose signature is wrong.
    #[error("the certificate request cannot be used: {0}")]
    Request(String),
}
