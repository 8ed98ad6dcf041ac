//! The control plane of a coordinator: Raft inside, workers' sessions in, orders out.
//!
//! ```text
//! gRPC (service, peers) ──Event──> driver ──Input──> replica::Replica ──> ClusterState::apply
//!                                    │                                         │ events
//!                                    └──Input──> leader::Leader <──────────────┘
//!                                                  │ proposals, orders to workers
//! ```
//! Two machines do the thinking and know neither network nor clock nor thread: [`replica`] agrees
//! with the other coordinators on a log and applies it; [`leader`], on whichever coordinator leads,
//! keeps leases, proposes what reconciliation wants and tells workers what was decided. The driver
//! is the one loop around both. [`Control`] is how everybody else reads and changes the state.

#![forbid(unsafe_code)]

mod announce;
mod authority;
mod client;
mod driver;
pub mod leader;
mod load;
mod machine;
mod peers;
pub mod replica;
mod service;
mod start;
mod status;

pub use client::{Control, outcome_from_wire};
pub use driver::{Leadership, NotWritten};
pub use machine::{ClusterMachine, Outcome};
pub use service::{LEADER_KEY, NO_LEADER};
pub use start::{ControlConfig, ControlError, ControlHandle, began_elsewhere, start};
