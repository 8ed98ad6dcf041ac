//! The operations a device must offer, with shapes, and the values they take.
//!
//! `T` is the number of rows (tokens) of a call. Tensors are f32, row-major `[rows, columns]`.

use std::ops::Range;

use crate::BlockFormat;

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

/// A row that another stripe adds, see [`Device::combine_experts`].
pub const ELSEWHERE: u32 = u32::MAX;

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
    /// Signed 4-bit blocks of 32 with one f32 scale each: `q * scale` with `q` from -8 to 7, the
    /// element of the largest magnitude being -8. Activations and sums as in `Int8`.
    Int4,
}

/// How the elements of a stored matrix are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding<'a> {
    /// One number per element.
    Plain(StoredType),
    /// One byte per element, float8 E4M3 (finite: no infinity, NaN at 0x7f and 0xff); its value is
    /// the number times its block's scale, multiplied in f32.
    Fp8Blocks {
        /// Little endian, row-major, one per block:
        /// `[ceil(stored rows / block), ceil(stored columns / block)]`.
        scales: &'a [u8],
        /// How these are written; they are widened to f32.
        scale_type: StoredType,
        /// Rows and columns of a block.
        block: usize,
    },
    /// Half a byte per element (low nibble first): magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 in three
    /// bits, the sign in the fourth; times `2^(scale - 127)` (NaN where `scale` is 255).
    Mxfp4 {
        /// A byte for each 32 columns of a row, row-major `[stored rows, stored columns / 32]`.
        scales: &'a [u8],
    },
    /// Blocks of a row's elements with their scales, as in GGUF files.
    Blocks(BlockFormat),
    /// Four bits per element, in groups along the inputs: `(q - zero) * scale`. The bytes are
    /// little-endian words of eight elements; `stored_columns` are the outputs and the matrix
    /// counts as transposed, whichever way its words run.
    Int4(Int4<'a>),
}

/// What turns 4-bit elements into numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Int4<'a> {
    /// f16 `[groups, outputs]`.
    pub scales: &'a [u8],
    /// Words `[groups, outputs / 8]`.
    pub zeros: &'a [u8],
    /// i32 `[inputs]`: the group of each input; without it `group` inputs follow each other.
    pub groups: Option<&'a [u8]>,
    /// Inputs that share a scale.
    pub group: usize,
    /// How words are made of elements.
    pub order: Int4Order,
}

/// How 4-bit elements are put into words of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Int4Order {
    /// `[inputs, outputs / 8]`: outputs 0, 2, 4, 6, 1, 3, 5, 7 of each eight, lowest bits first.
    Awq,
    /// `[inputs / 8, outputs]`: inputs in order, lowest bits first; zeros run along the outputs in
    /// order, and each is `zero_offset` more than what is stored.
    Gptq {
        /// 1 in the first version of the format, 0 in the second.
        zero_offset: u8,
    },
}

/// A part of a stored matrix, to be packed. Its logical element `(o, i)` is the stored element
/// `[first_row + o * row_step, i]`, or `[i, first_row + o * row_step]` where `transposed`.
#[derive(Debug, Clone)]
pub struct WeightSource<'a> {
    /// The whole stored matrix' bytes, row-major (of a tensor of matrices, one of them).
    pub bytes: &'a [u8],
    /// How elements are written.
    pub encoding: Encoding<'a>,
    /// Elements in a stored row; whole blocks for MXFP4 and block formats.
    pub stored_columns: usize,
    /// Logical outputs `o` taken: the packed matrix' outputs.
    pub rows: Range<usize>,
    /// Logical inputs `i` taken: the packed matrix' inputs.
    pub columns: Range<usize>,
    /// Where logical output 0 stands.
    pub first_row: usize,
    /// From one logical output to the next; at least 1.
    pub row_step: usize,
    /// Whether it is stored as `[inputs, outputs]`. Not for MXFP4.
    pub transposed: bool,
    /// Of every so many outputs (a head's, an even number), the second half stands between those
    /// of the first: logical output `half * k + j` of a head is its stored row `2 * j + k`.
    pub paired: Option<usize>,
}

impl<'a> WeightSource<'a> {
    /// A rectangle of a matrix `[outputs, inputs]` stored as plain numbers.
    pub fn plain(
        bytes: &'a [u8],
        stored: StoredType,
        stored_columns: usize,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> WeightSource<'a> {
        WeightSource {
            bytes,
            encoding: Encoding::Plain(stored),
            stored_columns,
            rows,
            columns,
            first_row: 0,
            row_step: 1,
            transposed: false,
            paired: None,
        }
    }

    /// Which of `bytes` packing it reads: ascending runs for a matrix that is not `paired`, that
    /// do not touch. What `encoding` holds is read as a whole.
    ///
    /// # Errors
    /// As [`Device::pack`], where the part does not stand in the matrix.
    pub fn touched(&self) -> Result<Vec<Range<usize>>, DeviceError> {
        crate::cpu::touched(self)
    }
}

/// One product within a [`Device::matmul`] call:
/// `out[to_row + i, to_column + o] = sum_k x[from_rows.start + i, from_column + k] * matrix[o, k]`
/// (plus `bias[o]`, added last), `k` ascending.
#[derive(Debug)]
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

/// A copy refers to the same matrix, which need not be one that can be copied itself.
impl<M> Clone for Segment<'_, M> {
    fn clone(&self) -> Self {
        Self { from_rows: self.from_rows.clone(), ..*self }
    }
}

/// Which columns of a head a rotary embedding turns together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RopePairs {
    /// `(i, i + dims / 2)`.
    Halves,
    /// `(2 * i, 2 * i + 1)`.
    Interleaved,
}

/// Cosines and sines of a rotary embedding, for positions `0..positions`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    /// Rotated columns of a head.
    pub dims: usize,
    /// How they are paired; pair `i` turns by angle `i`.
    pub pairs: RopePairs,
    /// `[positions, dims / 2]`.
    pub cos: Vec<f32>,
    /// `[positions, dims / 2]`.
    pub sin: Vec<f32>,
}

/// Runs of columns at equal distances: run `h` starts at column `first + h * stride`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// Where run 0 starts.
    pub first: usize,
    /// From one start to the next.
    pub stride: usize,
}

/// What a cache keeps as values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheValue {
    /// Values of this width, stored beside the keys.
    Own(usize),
    /// No values: the first so many columns of a key are its value.
    PrefixOfKey(usize),
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
    /// Width of a key of one head.
    pub key_dim: usize,
    /// Values of one head.
    pub value: CacheValue,
    /// `F32` keeps f32; the others keep bf16 (rounded when stored).
    pub precision: Precision,
}

impl CacheShape {
    /// Width of a value of one head.
    pub fn value_dim(&self) -> usize {
        match self.value {
            CacheValue::Own(dim) | CacheValue::PrefixOfKey(dim) => dim,
        }
    }
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
    /// Then `cap * tanh(score / cap)`; the cap is positive.
    pub softcap: Option<f32>,
    /// Empty, or one logit per local query head that joins the softmax (its maximum and its sum)
    /// as a position without a value, as it is: neither scaled nor capped.
    pub sinks: Vec<f32>,
}

/// What a gated feed-forward makes of gate `g` and up `u`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `g * sigmoid(g) * u`.
    Silu,
    /// `0.5 * g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3))) * u`.
    GeluTanh,
    /// With `g = min(g, limit)`, `u = clamp(u, -limit, limit)`: `(u + 1) * g * sigmoid(alpha * g)`.
    ClampedSwiglu {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// Bound.
        limit: f32,
    },
}

/// What the logits of a router become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Experts are chosen by logit; weights are the softmax over the chosen logits.
    SoftmaxOfChosen,
    /// Sigmoid of each logit.
    Sigmoid,
}

/// How a group of experts is judged by its experts' selection scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// By the largest; scores (and so weights) in the other groups count as 0.
    Max,
    /// By the sum of the two largest; selection scores in the other groups count as -infinity.
    TopTwoSum,
}

/// A choice among runs of neighbouring experts before the choice of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Groups; divides the number of experts.
    pub count: usize,
    /// Groups kept, the best (ties to the lower one).
    pub chosen: usize,
    /// How they are judged.
    pub by: GroupScore,
}

/// How experts are chosen and weighed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing<'a> {
    /// Experts per row.
    pub chosen: usize,
    /// From logits to scores.
    pub score: Score,
    /// Whether weights are divided by (their sum + 1e-20).
    pub renormalise: bool,
    /// Weights are multiplied by this, last.
    pub scale: f32,
    /// Limits the choice to the best groups.
    pub groups: Option<Groups>,
    /// Added to each expert's score for the selection (groups included), never to its weight.
    pub correction: Option<&'a [f32]>,
}

/// The experts each row uses, in slot order (best selection score first, ties to the lower id).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Routes {
    /// Slots per row.
    pub chosen: usize,
    /// `[T * chosen]` expert ids.
    pub experts: Vec<u32>,
    /// `[T * chosen]` weights.
    pub weights: Vec<f32>,
}

/// What was lost by keeping weights in 8 or 4 bits, as sums over weights.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rounding {
    /// Squares of the weights as they are stored.
    pub weights: f64,
    /// Squares of what the kept ones are off by.
    pub errors: f64,
}

impl Rounding {
    /// Root mean square of the errors over that of the weights; 0 where nothing was lost.
    pub fn relative(self) -> f64 {
        if self.errors == 0.0 { 0.0 } else { (self.errors / self.weights).sqrt() }
    }
}

impl std::ops::AddAssign for Rounding {
    fn add_assign(&mut self, other: Self) {
        self.weights += other.weights;
        self.errors += other.errors;
    }
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

    /// Calls `work(first, part)` for parts that together are `values`, `first` being the index of
    /// a part's first element: each part once, in any order, on the host's threads that the device
    /// has. `cost` is the number of operations per element.
    fn share(&self, values: &mut [f32], cost: usize, work: &(dyn Fn(usize, &mut [f32]) + Sync));

    /// Packs a rectangle of a stored matrix.
    fn pack(
        &self,
        source: &WeightSource<'_>,
        precision: Precision,
    ) -> Result<Self::Matrix, DeviceError>;

    /// What packing lost; nothing is counted in f32 and bf16.
    fn rounding(&self, matrix: &Self::Matrix) -> Rounding;

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

    /// Rotates, in place, `table.dims` columns of each of `heads` heads: head `h`'s start at
    /// `from_column + h * stride`. Row `t` stands at `positions[t]`.
    fn rope(
        &self,
        x: &mut Self::Tensor,
        from_column: usize,
        heads: usize,
        stride: usize,
        positions: &[u32],
        table: &RopeTable,
    ) -> Result<(), DeviceError>;

    /// RMS norm, in place and each for itself, of `weight.len()` columns of each of `heads` heads:
    /// head `h`'s start at `from_column + h * stride`. The arithmetic of [`Device::rms_norm`].
    fn norm_heads(
        &self,
        x: &mut Self::Tensor,
        from_column: usize,
        heads: usize,
        stride: usize,
        weight: &[f32],
        eps: f32,
    ) -> Result<(), DeviceError>;

    /// `out[t, to.first + h * to.stride + c] = x[t, from.first + h * from.stride + c]` for
    /// `h < heads`, `c < width`. Other columns of `out` keep their values. Runs may overlap in `x`,
    /// not in `out`.
    fn copy_columns(
        &self,
        x: &Self::Tensor,
        from: Columns,
        width: usize,
        heads: usize,
        out: &mut Self::Tensor,
        to: Columns,
    ) -> Result<(), DeviceError>;

    /// Stores keys and values of all rows: `x[t, key_column..]` holds `kv_heads * key_dim` values,
    /// `x[t, value_column..]` `kv_heads * value_dim` (`value_column` is ignored where values are
    /// prefixes of keys). Rows and positions as `spans` say.
    fn store_kv(
        &self,
        cache: &mut Self::Cache,
        layer: usize,
        x: &Self::Tensor,
        key_column: usize,
        value_column: usize,
        spans: &[AttendSpan<'_>],
    ) -> Result<(), DeviceError>;

    /// Softmax attention over the cache, positions ascending. `x[t, 0..heads * key_dim]` are the
    /// queries (columns beyond are ignored); `out: [T, heads * value_dim]`.
    fn attend(
        &self,
        cache: &Self::Cache,
        layer: usize,
        x: &Self::Tensor,
        map: &HeadMap,
        spans: &[AttendSpan<'_>],
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// `out[t, c] = activation(g = x[t, c], u = x[t, width + c])`; `x: [T, 2 * width]`,
    /// `out: [T, width]`.
    fn gate(
        &self,
        x: &Self::Tensor,
        width: usize,
        activation: Activation,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Chooses and weighs experts by `logits: [T, experts]`, each row for itself.
    fn route(&self, logits: &Self::Tensor, routing: &Routing<'_>) -> Result<Routes, DeviceError>;

    /// `out[i, :] = x[rows[i], :]`.
    fn gather_rows(
        &self,
        x: &Self::Tensor,
        rows: &[u32],
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Sums each token's experts in slot order, for every local stripe `s`:
    /// `out[s * T + t, :] = sum_j weights[t, j] * y[rows[(s * T + t) * chosen + j], :]`, one fused
    /// multiply-add per slot, from zero; slots whose row is [`ELSEWHERE`] are left out.
    /// `rows: [stripes * T * chosen]`, `out: [stripes * T, C]`.
    fn combine_experts(
        &self,
        y: &Self::Tensor,
        routes: &Routes,
        rows: &[u32],
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// `x[t, c] += y[t, c] (+ bias[c] added to y first)`.
    fn add(
        &self,
        x: &mut Self::Tensor,
        y: &Self::Tensor,
        bias: Option<&[f32]>,
    ) -> Result<(), DeviceError>;

    /// `x[s * T + t, c] += sigmoid(gates[t]) * y[s * T + t, c]` for `s < copies`, one fused
    /// multiply-add each. `gates: [T, 1]`, `x` and `y: [copies * T, C]`.
    fn add_gated(
        &self,
        x: &mut Self::Tensor,
        y: &Self::Tensor,
        gates: &Self::Tensor,
        copies: usize,
    ) -> Result<(), DeviceError>;

    /// `x[t, c] *= factor`.
    fn scale(&self, x: &mut Self::Tensor, factor: f32) -> Result<(), DeviceError>;

    /// `x[t, c] = cap * tanh(x[t, c] / cap)`; the cap is positive.
    fn softcap(&self, x: &mut Self::Tensor, cap: f32) -> Result<(), DeviceError>;
}
