//! Sums and gathers between the ranks of a group, with bits that do not depend on who holds what.
//!
//! Partial sums are kept per stripe and added along one fixed balanced binary tree over stripe
//! numbers ([`tree`]). A rank adds the subtrees it owns whole and the ranks exchange the rest.
//! [`Link`] moves frames; [`TreeCollective`] does the arithmetic over any link.

#![forbid(unsafe_code)]

mod frame;
mod link;
pub mod local;
pub mod tcp;
pub mod tree;
mod tree_collective;

pub use frame::{Frame, FrameHeader, HEADER_BYTES, Kind, Membership};
pub use link::{Abort, AbortHandle, CollectiveError, DEFAULT_TIMEOUT, Link};
pub use tree_collective::{Collective, TreeCollective};
