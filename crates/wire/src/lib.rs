//! What crosses the network: generated gRPC types, conversions, validation, transport settings.
//!
//! [`pb`] is generated from `proto/`. Nothing outside the shell crates sees its types: values are
//! converted field by field by `to_wire` on the way out and by `from_wire` on the way in, and the
//! way in is the validating gate: sizes, enum values, floats and missing parts are refused by name.

#![forbid(unsafe_code)]

/// Generated from `proto/phalanx/v1`; the documentation stands in the proto files.
#[allow(missing_docs, reason = "generated; the proto files hold the documentation")]
pub mod pb {
    tonic::include_proto!("phalanx.v1");
}

mod bytes;
mod commands;
mod error;
mod generate;
mod orders;
mod reports;
mod snapshot;
mod step;
pub mod transport;

pub use bytes::{message_from_bytes, message_to_bytes};
pub use commands::{COMMAND_MAX, decode_command, encode_command};
pub use error::WireError;
pub use generate::{Generate, event_from_wire, event_to_wire};
pub use orders::{
    FormGroup, Order, RankAddress, compute_from_wire, compute_to_wire, deployment_from_wire,
    deployment_to_wire, plan_from_wire, plan_to_wire, wish_from_wire,
};
pub use reports::{Held, Report, device_from_wire, device_to_wire, join_from_wire, join_to_wire};
pub use snapshot::{STATE_MAX, decode_state, encode_state, state_hash};
pub use step::{StepOrder, StepReport, counts_to_wire};

/// Most tokens of one prompt or one step that are read from the network.
pub const TOKENS_MAX: usize = 1 << 20;
/// Most KV blocks of one sequence.
pub const BLOCKS_MAX: usize = 1 << 20;
/// Most sequences of one step.
pub const ENTRIES_MAX: usize = 1 << 16;
/// Most entries of a request's logit bias.
pub const BIASES_MAX: usize = 1 << 16;
/// Most ids that end an answer.
pub const STOP_IDS_MAX: usize = 1 << 12;
/// Most alternatives reported beside a token.
pub const TOP_MAX: usize = 20;
/// Most bytes of a request id.
pub const REQUEST_ID_MAX: usize = 256;
/// Most ranks of a group and stripes of a model.
pub const STRIPES_MAX: usize = 1 << 12;
/// Most nodes that one message lists.
pub const NODES_MAX: usize = 1 << 12;
/// Most bytes of a reason or an error.
pub const REASON_MAX: usize = 4096;
