//! Why a message was refused, and the checks that every conversion shares.

use cluster::{BadField, RestoreError};
use model::SpecError;
use planner::PlanError;

/// A message that says what cannot be. Each names the field; none repeats its content.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WireError {
    /// A part that must be there is not.
    #[error("{field} is missing")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// An enum value that this release does not know.
    #[error("{field} has the unknown value {value}")]
    UnknownEnum {
        /// The field.
        field: &'static str,
        /// The number.
        value: i32,
    },
    /// A number, or a pair of them, that cannot be.
    #[error("{field} is out of range")]
    OutOfRange {
        /// The field.
        field: &'static str,
    },
    /// A NaN or an infinity.
    #[error("{field} is not a finite number")]
    NotFinite {
        /// The field.
        field: &'static str,
    },
    /// A list or a text that is too long.
    #[error("{field} has {got} entries where at most {limit} may be")]
    TooLong {
        /// The field.
        field: &'static str,
        /// Its length.
        got: usize,
        /// The limit.
        limit: usize,
    },
    /// A list that does not match another one in length or order.
    #[error("{field} does not match {other}")]
    Mismatch {
        /// The field.
        field: &'static str,
        /// What it must match.
        other: &'static str,
    },
    /// A digest of none of the worker's models.
    #[error("{field} is that of a model which is not here")]
    UnknownModel {
        /// The field.
        field: &'static str,
    },
    /// A deployment, node or address that the cluster could not use.
    #[error(transparent)]
    BadField(#[from] BadField),
    /// A plan that contradicts itself.
    #[error("plan: {0}")]
    Plan(#[from] PlanError),
    /// Bytes that are no message.
    #[error("{field} is not a message of its kind")]
    Malformed {
        /// What they should be.
        field: &'static str,
    },
    /// A model that cannot be one.
    #[error("spec: {0}")]
    Spec(#[from] SpecError),
    /// A snapshot that no state can have written.
    #[error("snapshot: {0}")]
    Snapshot(#[from] RestoreError),
}

impl From<WireError> for tonic::Status {
    fn from(error: WireError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

/// A sub-message that must be there.
pub(crate) fn required<T>(field: &'static str, value: Option<T>) -> Result<T, WireError> {
    value.ok_or(WireError::Missing { field })
}

/// A number that counts something in memory.
pub(crate) fn size(field: &'static str, value: impl TryInto<usize>) -> Result<usize, WireError> {
    value.try_into().map_err(|_| WireError::OutOfRange { field })
}

/// A float that may take part in arithmetic.
pub(crate) fn finite(field: &'static str, value: f32) -> Result<f32, WireError> {
    if value.is_finite() { Ok(value) } else { Err(WireError::NotFinite { field }) }
}

/// A length that may be kept.
pub(crate) fn bounded(field: &'static str, got: usize, limit: usize) -> Result<(), WireError> {
    if got <= limit { Ok(()) } else { Err(WireError::TooLong { field, got, limit }) }
}

/// An identifier of 16 bytes.
pub(crate) fn id16(field: &'static str, value: &[u8]) -> Result<[u8; 16], WireError> {
    value.try_into().map_err(|_| WireError::OutOfRange { field })
}

/// The value of a closed enumeration; `E` is the protocol's, whose 0 stands for none.
pub(crate) fn known<E: TryFrom<i32>>(field: &'static str, value: i32) -> Result<E, WireError> {
    let unknown = WireError::UnknownEnum { field, value };
    if value == 0 { Err(unknown) } else { E::try_from(value).map_err(|_| unknown) }
}

/// A number of this process as the protocol's 32 bits. Everything that is sent so was checked
/// against far smaller limits before; a larger number would be refused by the receiver.
pub(crate) fn narrow(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
