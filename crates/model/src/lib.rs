//! What a model is, as data.
//!
//! A [`ModelSpec`] is everything the planner, the loader, the KV sizing and the decoder need to
//! know of a model; nothing else reads `config.json`. A family (`families/*.rs`) maps one published
//! config to the spec and names its tensors. Pure: callers read the files and hand over bytes.

#![forbid(unsafe_code)]

mod check;
mod config;
pub mod content;
pub mod digest;
pub mod families;
pub mod gguf;
pub mod safetensors;
mod spec;
mod stack;
mod stored;
mod tensors;

pub use check::{SpecError, SpecProblem};
pub use config::ConfigError;
pub use spec::{
    Activation, Attention, ComputeType, Dense, Experts, Family, FeedForward, Format, GgufFormat,
    GroupScore, Grouped, Groups, Int4Format, Int4Packing, Latent, LatentUp, LayerSpec, ModelSpec,
    Pairs, Rope, RopeScaling, Router, Score, Shared, UnknownComputeType,
};
pub use stored::{Encoding, Int4Tensors, Stored};
pub use tensors::{Part, Sharding, TensorSpec};
