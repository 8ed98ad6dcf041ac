//! The forward pass and its weights: one decoder walks the spec of any family.

mod attention;
mod checkpoint;
mod feed_forward;
mod forward;
mod load;
mod rope;
pub mod sample;

pub use checkpoint::{Checkpoint, CheckpointError};
pub use forward::{Decoder, ForwardError, Logits};
pub use load::{CacheSize, LoadError, LoadProgress};
