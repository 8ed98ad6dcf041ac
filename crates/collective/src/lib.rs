//! Sums and gathers between the ranks of a group, with bits that do not depend on who holds what.
//!
//! Partial sums are kept per stripe and added along one fixed balanced binary tree over stripe
//! numbers ([`tree`]). A rank adds the subtrees it owns whole and the ranks exchange the rest.
//! [`Link`] moves frames; [`TreeCollective`] does the arithmetic over any link. [`record`] keeps a
//! rank's calls, so that it can be run again alone.

// Calls into NCCL are the only unsafe code, and stand in `nccl` alone.
#![cfg_attr(not(feature = "cuda"), forbid(unsafe_code))]
#![cfg_attr(feature = "cuda", deny(unsafe_code))]

mod frame;
mod link;
pub mod local;
#[cfg(feature = "cuda")]
#[allow(unsafe_code, reason = "calls into a C library")]
pub mod nccl;
pub mod record;
pub mod tcp;
pub mod tree;
mod tree_collective;

pub use frame::{Frame, FrameHeader, HEADER_BYTES, Kind, Membership};
pub use link::{Abort, AbortHandle, CollectiveError, DEFAULT_TIMEOUT, Link};
pub use tree_collective::{Collective, TreeCollective};
