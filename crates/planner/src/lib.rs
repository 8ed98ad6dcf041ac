//! Which rank holds which stripe of a model.
//!
//! [`stripes`] is the one cut of a model into `S` stripes (DESIGN.md section 4); [`plan`] gives
//! every rank its stripes, evenly or by capacity, and refuses by name what does not fit.

#![forbid(unsafe_code)]

mod cut;
mod plan;
mod split;
pub mod stripes;
mod table;

pub use cut::{Cut, ExpertCut, UnknownExpertCut};
pub use plan::{
    DeviceSpec, Limits, NodeId, NodeSpec, PlanError, RankPlan, ShardPlan, Shortage, plan,
};
pub use table::human_bytes;
