//! What the tests across crates share: golden checkpoints, and groups of ranks in this process.
#![forbid(unsafe_code)]

pub mod files;
pub mod golden;
pub mod group;
mod mistake;
