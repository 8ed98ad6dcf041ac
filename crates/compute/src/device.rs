//! The operations a device must offer, with shapes, and the values they take.
//!
//! `T` is the number of rows (tokens) of a call. Tensors are f32, row-major `[rows, columns]`.

use std::ops::Range;

/// What went wrong in an operation. Wrong shapes are errors in release builds too.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Operands do not fit each other.
    #[error("{op}: {what} is {got}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Which operand or dimension.
        what: &'static str,
        /// What was given.
        got: usize,
        /// What would fit.
        expected: usize,
    },
    /// A buffer could not be had.
    #[error("cannot allocate {bytes} bytes")]
    OutOfMemory {
        /// Its size.
        bytes: u64,
    },
    /// This processor lacks the instructions of a kernel class.
    #[error("this processor lacks the instructions of kernel class {class}")]
    UnavailableClass {
        /// What was asked for.
        class: crate::KernelClass,
    },
    /// No kernel class has this name.
    #[error("unknown kernel class {name:?}, expected portable, avx2 or avx512")]
    UnknownClass {
        /// What was given.
        name: String,
    },
    /// A device was asked to work without a thread.
    #[error("a device needs at least one thread")]
    NoThreads,
    /// The system refused threads.
    #[error("cannot start {wanted} threads: {reason}")]
    Threads {
        /// How many were asked for.
        wanted: usize,
        /// What the system said.
        reason: String,
    },
}

/// How weights are stored in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoredType {
    /// IEEE 754 binary32, little endian.
    F32,
    /// IEEE 754 binary16, little endian.
    F16,
    /// bfloat16, little endian.
    Bf16,
}

/// What a packed matrix is kept in and what activations are converted to before products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32 times f32.
    F32,
    /// bf16 weights times activations rounded to bf16 (nearest, ties to even); f32 accumulation.
    Bf16,
    /// Signed 8-bit blocks of 32 along the inner dimension (the last one may be shorter) with one
    /// f32 scale (largest magnitude / 127) each; activations quantised likewise per row. A block's
    /// integer dot product is exact; blocks are added in order by one fused multiply-add each:
    /// `acc = fma(weight_scale * activation_scale, dot as f32, acc)`.
    Int8,
}

/// A rectangle of a stored matrix, to be packed.
#[derive(Debug, Clone)]
pub struct WeightSource<'a> {
    /// The whole stored tensor's bytes, row-major.
    pub bytes: &'a [u8],
    /// Element type.
    pub stored: StoredType,
    /// Columns of the whole stored tensor.
    pub stored_columns: usize,
    /// Rows taken: the packed matrix' outputs.
    pub rows: Range<usize>,
    /// Columns taken: the packed matrix' inputs.
    pub columns: Range<usize>,
}

/// One product within a [`Device::matmul`] call:
/// `out[to_row + i, to_column + o] = sum_k x[from_rows.start + i, from_column + k] * matrix[o, k]`
/// (plus `bias[o]`, added last), `k` ascending.
#[derive(Debug, Clone)]
pub struct Segment<'a, M> {
    /// The packed matrix `[outputs, inputs]`.
    pub matrix: &'a M,
    /// Added to each output after the sum; `[outputs]`.
    pub bias: Option<&'a [f32]>,
    /// Rows of `x`; may be empty.
    pub from_rows: Range<usize>,
    /// First input column of `x`.
    pub from_column: usize,
    /// First output row.
    pub to_row: usize,
    /// First output column.
    pub to_column: usize,
}

/// Cosines and sines of a rotary embedding, for positions `0..positions`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    /// Width of one head; pairs are `(i, i + head_dim / 2)`.
    pub head_dim: usize,
    /// `[positions, head_dim / 2]`.
    pub cos: Vec<f32>,
    /// `[positions, head_dim / 2]`.
    pub sin: Vec<f32>,
}

/// The size of a paged KV cache on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Layers.
    pub layers: usize,
    /// Blocks per layer.
    pub blocks: usize,
    /// Positions per block.
    pub block_tokens: usize,
    /// KV heads on this rank.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// `F32` keeps f32; the others keep bf16 (rounded when stored).
    pub precision: Precision,
}

/// One sequence's rows in an attention call.
#[derive(Debug, Clone)]
pub struct AttendSpan<'a> {
    /// Rows of the call that belong to it, in position order.
    pub rows: Range<usize>,
    /// Position of the first row.
    pub start: usize,
    /// Position `p` lives in cache block `blocks[p / block_tokens]`.
    pub blocks: &'a [u32],
}

/// Which cached KV head each local query head reads, and how scores are made.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadMap {
    /// By local query head: the local KV head.
    pub kv_of_query: Vec<usize>,
    /// A key is visible iff `0 <= query - key < window`.
    pub window: Option<usize>,
    /// Scores are `scale * dot(query, key)`.
    pub scale: f32,
}

/// The experts each row uses, in slot order (most likely first, ties to the lower id).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Routes {
    /// Slots per row.
    pub chosen: usize,
    /// `[T * chosen]` expert ids.
    pub experts: Vec<u32>,
    /// `[T * chosen]` weights.
    pub weights: Vec<f32>,
}

/// A device. All operations check their shapes and return an error rather than panic.
pub trait Device: Send + Sync + 'static {
    /// f32 `[rows, columns]`.
    type Tensor: Send;
    /// A packed weight matrix `[outputs, inputs]`.
    type Matrix: Send + Sync;
    /// A paged KV cache.
    type Cache: Send;

    /// A zeroed tensor.
    fn tensor(&self, rows: usize, columns: usize) -> Result<Self::Tensor, DeviceError>;

    /// Gives `tensor` a new shape, reusing its memory where it suffices. Contents are unspecified.
    fn reshape(
        &self,
        tensor: &mut Self::Tensor,
        rows: usize,
        columns: usize,
    ) -> Result<(), DeviceError>;

    /// The tensor's values on the host, `[rows * columns]`.
    fn host<'a>(&self, tensor: &'a Self::Tensor) -> &'a [f32];

    /// The tensor's values on the host, to be changed.
    fn host_mut<'a>(&self, tensor: &'a mut Self::Tensor) -> &'a mut [f32];

    /// Packs a rectangle of a stored matrix.
    fn pack(
        &self,
        source: &WeightSource<'_>,
        precision: Precision,
    ) -> Result<Self::Matrix, DeviceError>;

    /// `(outputs, inputs)` of a packed matrix.
    fn matrix_shape(&self, matrix: &Self::Matrix) -> (usize, usize);

    /// A zeroed cache.
    fn cache(&self, shape: CacheShape) -> Result<Self::Cache, DeviceError>;

    /// `out[i, :] = table[rows[i], :]` widened to f32, or zeros where `rows[i]` is `None`.
    /// `table: [n, C]`, `out: [rows.len(), C]`, written from row `to_row` on.
    fn embed(
        &self,
        table: &Self::Matrix,
        rows: &[Option<u32>],
        to_row: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// `out[t, c] = x[t, c] / sqrt(mean_c(x[t, c]^2) + eps) * weight[c]`, all `[T, C]`.
    fn rms_norm(
        &self,
        x: &Self::Tensor,
        weight: &[f32],
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// All products of `segments`, in one parallel region. Output elements that no segment
    /// writes keep their value. Segments may not overlap in `out`.
    fn matmul(
        &self,
        x: &Self::Tensor,
        segments: &[Segment<'_, Self::Matrix>],
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Rotates, in place, `heads` heads of `table.head_dim` that start at `from_column`.
    /// Row `t` stands at `positions[t]`.
    fn rope(
        &self,
        x: &mut Self::Tensor,
        from_column: usize,
        heads: usize,
        positions: &[u32],
        table: &RopeTable,
    ) -> Result<(), DeviceError>;

    /// Stores keys and values of all rows: `x[t, key_column..]` and `x[t, value_column..]` hold
    /// `kv_heads * head_dim` values each. Rows and positions as `spans` say.
    fn store_kv(
        &self,
        cache: &mut Self::Cache,
        layer: usize,
        x: &Self::Tensor,
        key_column: usize,
        value_column: usize,
        spans: &[AttendSpan<'_>],
    ) -> Result<(), DeviceError>;

    /// Softmax attention over the cache, positions ascending. `x[t, 0..heads * head_dim]` are the
    /// queries (columns beyond are ignored); `out: [T, heads * head_dim]`.
    fn attend(
        &self,
        cache: &Self::Cache,
        layer: usize,
        x: &Self::Tensor,
        map: &HeadMap,
        spans: &[AttendSpan<'_>],
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// `out[t, c] = silu(x[t, c]) * x[t, width + c]`; `x: [T, 2 * width]`, `out: [T, width]`.
    fn silu_mul(
        &self,
        x: &Self::Tensor,
        width: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Softmax over `logits: [T, experts]`, the `chosen` largest per row, renormalised or not.
    fn route(
        &self,
        logits: &Self::Tensor,
        chosen: usize,
        renormalise: bool,
    ) -> Result<Routes, DeviceError>;

    /// `out[i, :] = x[rows[i], :]`.
    fn gather_rows(
        &self,
        x: &Self::Tensor,
        rows: &[u32],
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Sums each token's experts in slot order, for every local stripe `s < stripes`:
    /// `out[s * T + t, :] = sum_j weights[t, j] * y[s * T * chosen + rows[t * chosen + j], :]`,
    /// one fused multiply-add per slot, from zero. `y: [stripes * T * chosen, C]`,
    /// `out: [stripes * T, C]`.
    fn combine_experts(
        &self,
        y: &Self::Tensor,
        routes: &Routes,
        rows: &[u32],
        stripes: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// `x[t, c] += y[t, c] (+ bias[c] added to y first)`.
    fn add(
        &self,
        x: &mut Self::Tensor,
        y: &Self::Tensor,
        bias: Option<&[f32]>,
    ) -> Result<(), DeviceError>;
}
