//! NVIDIA's collectives, loaded when they are asked for: the way of `fast`.
//!
//! NCCL adds in an order of its own, which depends on ranks, sizes and topology. Its sums are equal
//! from run to run at one layout and not across layouts, so `exact` never uses them: there our own
//! kernels add along the stripe tree.
//!
//! Nothing here needs NCCL to build, and a machine without it gets [`NcclError::Unavailable`] and
//! no panic. The order of things:
//!
//! 1. [`Nccl::load`] finds the library and its symbols, and refuses what is too old.
//! 2. One rank makes a [`Rendezvous`] for a group and an epoch. As bytes it travels with the epoch;
//!    it is a secret, since NCCL trusts whoever has it.
//! 3. Every rank [joins](Communicator::join): non-blocking, polled, with a deadline of ours.
//! 4. [`Communicator::wait`] polls for errors that NCCL noticed by itself while a step runs.
//! 5. After an error, a deadline or an [abort](crate::AbortHandle) the communicator is aborted and
//!    never used again. The group's next epoch makes a new rendezvous and begins at 2.
//!
//! NCCL wants no two threads within one communicator. Every call is made under one lock; abort is
//! made by a thread of its own, since it may block, and nothing waits for it without a limit.
//!
//! Checked without a GPU against a small library that imitates NCCL's calls, errors and hangs
//! (`tests/nccl.rs`). Not checked there: that NCCL itself aborts in time on real wires.

mod communicator;
mod library;
mod rendezvous;

pub use communicator::{Communicator, Element, Place};
pub use library::{Extra, Nccl, Version};
pub use rendezvous::{RENDEZVOUS_BYTES, Rendezvous};

use std::fmt;
use std::time::Duration;

use crate::frame::Membership;

/// What NCCL answered, other than success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// A call to CUDA failed.
    Cuda,
    /// A call to the system failed.
    System,
    /// NCCL broke down.
    Internal,
    /// An argument is wrong.
    Argument,
    /// NCCL was used wrongly.
    Usage,
    /// A peer or the network failed.
    Remote,
    /// Still at it.
    InProgress,
    /// It gave up waiting.
    Timeout,
    /// A code of a newer version.
    Other(i32),
}

impl fmt::Display for Code {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Cuda => "unhandled CUDA error",
            Self::System => "system error",
            Self::Internal => "internal error",
            Self::Argument => "invalid argument",
            Self::Usage => "invalid usage",
            Self::Remote => "remote error",
            Self::InProgress => "in progress",
            Self::Timeout => "timeout",
            Self::Other(code) => return write!(formatter, "unknown code {code}"),
        };
        formatter.write_str(name)
    }
}

/// Why NCCL cannot be used, or a communicator no longer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    /// The library is not there, or the system does not load it.
    #[error("NCCL is not available: tried {}: {reason}", tried.join(", "))]
    Unavailable {
        /// Names tried, in order.
        tried: Vec<String>,
        /// What the system said of the last.
        reason: String,
    },
    /// The library lacks what every supported version has.
    #[error("this NCCL lacks {name}")]
    Symbol {
        /// The symbol.
        name: &'static str,
    },
    /// The library is too old, or of another major version.
    #[error("NCCL {got} cannot be used: at least {least} is needed, and below {below}")]
    Version {
        /// Its version.
        got: Version,
        /// The oldest that can be used.
        least: Version,
        /// The first that is too new.
        below: Version,
    },
    /// Rank and rendezvous come from different versions; NCCL itself would notice late.
    #[error("this rank has NCCL {ours}, the rendezvous is of NCCL {theirs}")]
    OtherVersion {
        /// This rank's.
        ours: Version,
        /// The rendezvous'.
        theirs: Version,
    },
    /// The rendezvous is of another group or another incarnation.
    #[error("the rendezvous is of {got}, this rank is of {expected}")]
    WrongEpoch {
        /// This rank's.
        expected: Membership,
        /// The rendezvous'.
        got: Membership,
    },
    /// An argument does not fit.
    #[error("{what} is {got}, which does not fit {limit}")]
    Invalid {
        /// Which.
        what: &'static str,
        /// Its value.
        got: u64,
        /// What it must agree with.
        limit: u64,
    },
    /// Bytes that are no rendezvous.
    #[error("this is no rendezvous: {what}")]
    Malformed {
        /// What is wrong.
        what: &'static str,
    },
    /// NCCL refused a call.
    #[error("{call} failed: {code}: {text}")]
    Call {
        /// Its name.
        call: &'static str,
        /// What it answered.
        code: Code,
        /// What NCCL says of it.
        text: String,
    },
    /// NCCL noticed an error by itself.
    #[error("rank {rank} of {membership}: {code}: {text}")]
    Noticed {
        /// The group.
        membership: Membership,
        /// This rank.
        rank: usize,
        /// What it noticed.
        code: Code,
        /// What NCCL says of it.
        text: String,
    },
    /// NCCL was still at it when the time was over.
    #[error("{call} was not done within {limit:?}")]
    Deadline {
        /// What was waited for.
        call: &'static str,
        /// How long.
        limit: Duration,
    },
    /// The communicator was aborted.
    #[error("the communicator was aborted")]
    Aborted,
    /// A thread could not be started.
    #[error("cannot start a thread: {kind}")]
    Thread {
        /// What the system said.
        kind: std::io::ErrorKind,
    },
}
