//! The forward pass and its weights: one decoder walks the spec of any family.
//!
//! [`Decoder::load`] packs what one rank's stripes need of a [`Checkpoint`];
//! [`Decoder::forward`] runs a step of the engine on it, meeting the other ranks in a
//! `Collective`; [`sample`] turns logits into tokens on rank 0.
#![forbid(unsafe_code)]

mod attention;
mod checkpoint;
mod feed_forward;
mod files;
mod forward;
mod gguf;
mod kept;
mod latent;
mod layout;
mod load;
mod rope;
pub mod sample;
mod stored;
mod weights;

pub use checkpoint::{Checkpoint, CheckpointError};
pub use forward::{Decoder, ForwardError, Logits, Place};
pub use kept::Kept;
pub use load::{CacheSize, LoadError, LoadProgress, RankShape};
pub use stored::StoredTensor;
