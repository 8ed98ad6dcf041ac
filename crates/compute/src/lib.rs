//! A closed set of fused operations, on the CPU today.
//!
//! Numerics contract (`exact`): every element of every output is computed in an order that
//! depends only on shapes that belong to the model and its stripes and on the token's own position:
//! never on how many rows a call has, on neighbours, on threads or on the instruction set. So each
//! kernel has one order, written once portably, and its AVX2 and AVX-512 forms give the same bits.

mod blocks;
mod check;
pub mod cpu;
mod device;
mod mapped;
mod rope;

pub use blocks::BlockFormat;
pub use cpu::{CpuDevice, KernelClass, MachineLimits};
pub use device::{
    Activation, AttendSpan, CacheShape, CacheValue, Columns, Device, DeviceError, ELSEWHERE,
    Encoding, GroupScore, Groups, HeadMap, Int4, Int4Order, Precision, RopePairs, RopeTable,
    Rounding, Routes, Routing, Score, Segment, StoredType, WeightSource,
};
pub use mapped::{MappedFile, SparseMemory};
