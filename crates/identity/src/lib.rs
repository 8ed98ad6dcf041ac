//! Who a node is: the cluster's certificate authority, certificates, and TLS both ways.
//!
//! ```text
//! ClusterCa ──issues──> Credential (certificate, key, roots) ──> Tls ──> server and client configs
//!    │                     │  files (0600), or one line: a join token
//!    └── names: n7.<cluster>.phalanx ──> Peer, read from what a handshake verified
//! ```
//! A cluster is whoever holds a certificate of its authority. Every connection shows one at both
//! ends, and who may speak to whom is decided inside the handshake ([`Admit`], [`Expect`]): a
//! stranger never gets a byte to a parser of ours. Everything here is synchronous and nothing reads
//! a clock of its own but the handshakes; issuing takes the time as an argument.
#![forbid(unsafe_code)]

mod ca;
mod credential;
mod error;
mod files;
mod name;
mod refusal;
mod rotation;
mod tls;
mod token;
mod verify;

pub use ca::{CA_LIFE, ClusterCa, NODE_LIFE, SKEW, TOKEN_LIFE};
pub use credential::{Credential, KeyRequest};
pub use error::{FileFlaw, Flaw, IdentityError};
pub use files::{CA_FILE, CA_KEY_FILE, CERTIFICATE_FILE, KEY_FILE, OPERATOR_FILE, private_dir};
pub use name::{ClusterId, Peer, Role, TokenId, random};
pub use refusal::{explain, explain_io, says_removed};
pub use rotation::{generation, set_generation};
pub use tls::{Admit, Expect, Roll, Tls};
