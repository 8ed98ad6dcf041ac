//! What every coordinator agrees on: nodes, the deployment, its groups and their epochs.
//!
//! ```text
//! Command ──> ClusterState::apply ──> Events        (the only way anything changes)
//! ClusterState ──> reconcile ──> Commands           (what to propose next)
//! ```
//! Replicated decisions only: a plan is computed once, by whoever proposes it, and `apply` checks
//! and stores it. No clock, no network, no thread; the same commands give the same state.

#![forbid(unsafe_code)]

mod apply;
mod deployment;
mod integrity;
mod reconcile;
mod state;

pub use apply::{Command, Event, Rejected};
pub use deployment::{BadField, Deployment, NodeInfo, check_address};
pub use integrity::IntegrityError;
pub use reconcile::{reconcile, waiting_for};
pub use state::{ClusterState, Epoch, Group, GroupId, Node, Phase, Route};
