//! The control plane in one thread, from a seed: the production machines over a simulated disk,
//! network and clock, with everything going wrong that a seed says, and checkers that watch.
//!
//! ```text
//!  clients ── questions ──> nodes: Replica over Disk <── faults ── nemesis
//!                             │ ▲                    <── changes ── operator
//!                             ▼ │ bytes
//!                            network                 ──> checks, history ──> linear
//! ```
//! A run is a function of its seed. `tests/tests/simulation.rs` runs some, the binary `simulate`
//! as many as are asked for, and a failure prints the command that replays it.

mod asking;
pub mod bytes;
pub mod checks;
pub mod client;
pub mod cluster;
pub mod disk;
pub mod duties;
pub mod errands;
pub mod fleet;
pub mod linear;
mod nemesis;
pub mod net;
pub mod node;
pub mod operator;
pub mod plan;
pub mod register;
pub mod rng;
pub mod run;
pub mod stats;
pub mod story;
pub mod trace;
pub mod workload;
pub mod world;
