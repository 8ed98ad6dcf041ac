//! What every coordinator agrees on: nodes, models, deployments, their groups and epochs.
//!
//! ```text
//! Command ──> ClusterState::apply ──> Events        (the only way anything changes)
//! ClusterState, Observation ──> reconcile ──> Commands           (what to propose next)
//! ```
//! Replicated decisions only: a plan is computed once, by whoever proposes it, and `apply` checks
//! and stores it. No clock, no network, no thread; the same commands give the same state.
//!
//! A group is one replica of a deployment. It keeps its number; each incarnation has an epoch of
//! its own. When one ends (a node is lost, a rank fails, ranks move), the epoch moves in that very
//! change, and nothing that names the one before is accepted again.

#![forbid(unsafe_code)]

mod apply;
mod catalog;
mod command;
mod fields;
mod group;
mod ids;
mod integrity;
mod node;
mod outcome;
mod reconcile;
mod rejected;
mod snapshot;
mod state;

pub use catalog::{Alias, Deployment, Model};
pub use command::{Command, Event, Proposal};
pub use fields::{BadField, check_address};
pub use group::{Group, MOVED, Phase, Progress, Route};
pub use ids::{Epoch, GroupId, RequestId, TokenId};
pub use integrity::IntegrityError;
pub use node::{Coordinator, Node, NodeInfo, Role, Standing, Token};
pub use outcome::{Done, Outcome, Refusal};
pub use planner::NodeId;
pub use reconcile::{Observation, degraded, degraded_group, lacking, reconcile, waiting_for};
pub use rejected::{Code, Rejected};
pub use snapshot::{RestoreError, Snapshot};
pub use state::ClusterState;
