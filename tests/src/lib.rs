//! What the tests across crates share: golden checkpoints, groups of ranks in this process, and the
//! simulation of the control plane.
#![forbid(unsafe_code)]

pub mod files;
pub mod golden;
pub mod group;
mod mistake;
mod nodes;
pub mod sim;
