//! Which rank holds which stripe of a model.
//!
//! [`stripes`] is the one cut of a model into `S` stripes (DESIGN.md section 4); [`plan`] gives
//! every rank its stripes, evenly or by capacity, and refuses by name what does not fit; [`repair`]
//! is the plan after one that lost devices, in which as little moves as possible. [`predict`] says
//! what a step of a plan should take, from rates that were measured elsewhere.

#![forbid(unsafe_code)]

mod cut;
mod plan;
pub mod predict;
mod repair;
mod split;
pub mod stripes;
mod table;

pub use cut::{Cut, ExpertCut, UnknownExpertCut};
pub use plan::{
    DeviceSpec, Limits, NodeId, NodeSpec, PlanError, RankPlan, ShardPlan, Shortage, plan,
};
pub use repair::repair;
pub use table::human_bytes;
