//! What crosses the network: generated gRPC types, conversions, validation, transport settings.
//!
//! [`pb`] is generated from `proto/`. Nothing outside the shell crates sees its types: values are
//! converted field by field on the way out and on the way in, and the way in is the validating gate.

#![forbid(unsafe_code)]

/// Generated from `proto/phalanx/v1`; the documentation stands in the proto files.
#[allow(missing_docs)]
pub mod pb {
    tonic::include_proto!("phalanx.v1");
}
