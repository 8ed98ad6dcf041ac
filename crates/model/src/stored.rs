//! Where a logical tensor stands in its checkpoint: fused with others, transposed, or quantised.

use crate::spec::{Family, Format, Int4Format, ModelSpec};
use crate::tensors::{Part, Sharding};

/// Where a logical tensor stands in the checkpoint's tensor `TensorSpec::name`. Several logical
/// tensors may share one stored tensor (fused qkv, fused gate and up, all experts).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Shape of the stored tensor.
    pub shape: Vec<usize>,
    /// Index in the first dimension, where the stored tensor holds one more dimension.
    pub slab: Option<usize>,
    /// Stored row (or column, if transposed) of logical row 0.
    pub first_row: usize,
    /// Logical row `r` is stored row (or column) `first_row + r * row_step`.
    pub row_step: usize,
    /// Stored as `[in, out]`.
    pub transposed: bool,
    /// Of every so many rows (a head's), the second half stands between those of the first:
    /// logical row `half * k + j` of a head is stored as its row `2 * j + k`.
    pub paired: Option<usize>,
    /// How the numbers are stored.
    pub encoding: Encoding,
}

/// How the numbers of a stored tensor are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Encoding {
    /// f32, f16 or bf16.
    Plain,
    /// F8_E4M3 `[rows, columns]`, times the f32 of its block of 128 x 128 in the tensor `scales`,
    /// `[ceil(rows/128), ceil(columns/128)]`. A tensor stored in another float type is taken as
    /// it is and has no scales.
    Fp8Blocks {
        /// The scales' tensor.
        scales: String,
    },
    /// The tensor is u8 `[.., rows, columns/32, 16]`, two 4-bit floats a byte, low nibble first;
    /// times `2^(s - 127)` with `s` from the u8 tensor `scales`, `[.., rows, columns/32]`.
    Mxfp4 {
        /// The scales' tensor.
        scales: String,
    },
    /// As the type of the tensor in its GGUF file says; rows of whole blocks.
    AsTyped,
    /// 4-bit integers: the tensor is i32 words of eight, times scales, with zeros. The shape is
    /// that of the numbers, `[out, in]`.
    Int4(Int4Tensors),
}

/// Where the parts of a matrix of 4-bit integers are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Int4Tensors {
    /// The matrix as plain numbers, which stands there instead where it was not quantised.
    pub plain: String,
    /// f16 `[groups, outputs]`.
    pub scales: String,
    /// i32 `[groups, outputs / 8]`.
    pub zeros: String,
    /// i32 `[inputs]`, the group of each input: GPTQ has it, AWQ has not.
    pub groups: String,
    /// How they are stored.
    pub format: Int4Format,
}

/// Columns that share one MXFP4 scale, and the bytes they take.
pub(crate) const MXFP4_BLOCK: usize = 32;
const MXFP4_BYTES: usize = 16;

impl Stored {
    /// A stored tensor that is the logical one.
    pub(crate) fn whole(shape: &[usize]) -> Self {
        Stored {
            shape: shape.to_vec(),
            slab: None,
            first_row: 0,
            row_step: 1,
            transposed: false,
            paired: None,
            encoding: Encoding::Plain,
        }
    }
}

impl ModelSpec {
    /// The stored tensor's name, and where in it a part of this shape and cut stands.
    pub(crate) fn stored(
        &self,
        layer: Option<usize>,
        part: Part,
        shape: &[usize],
        sharding: Sharding,
    ) -> (String, Stored) {
        if matches!(self.format, Format::Gguf(_)) {
            return self.gguf_stored(layer, part, shape);
        }
        let name = self.family.tensor_name(layer.unwrap_or(0), part);
        if let Some((words, encoding)) = self.int4(part, sharding, &name) {
            let stored = match self.family {
                Family::Phi3 => self.fused_rows(layer, part, shape),
                _ => Stored::whole(shape),
            };
            return (words, Stored { transposed: true, encoding, ..stored });
        }
        match self.family {
            Family::Phi3 => (name, self.fused_rows(layer, part, shape)),
            Family::GptOss => self.fused_experts(layer, part, name, shape),
            _ if self.format == Format::Fp8Blocks && is_projection(part, sharding) => {
                let scales = format!("{name}_scale_inv");
                let encoding = Encoding::Fp8Blocks { scales };
                (name, Stored { encoding, ..Stored::whole(shape) })
            }
            _ => (name, Stored::whole(shape)),
        }
    }

    /// The words of a 4-bit matrix, where the checkpoint has such.
    fn int4(&self, part: Part, sharding: Sharding, name: &str) -> Option<(String, Encoding)> {
        let Format::Int4(format) = self.format else { return None };
        let stem = name.strip_suffix(".weight")?;
        let tensors = Int4Tensors {
            plain: name.to_owned(),
            scales: format!("{stem}.scales"),
            zeros: format!("{stem}.qzeros"),
            groups: format!("{stem}.g_idx"),
            format,
        };
        is_projection(part, sharding).then(|| (format!("{stem}.qweight"), Encoding::Int4(tensors)))
    }

    /// Phi-3: query, key and value one below the other; gate and up likewise.
    pub(crate) fn fused_rows(&self, layer: Option<usize>, part: Part, shape: &[usize]) -> Stored {
        let rows = |part| self.shape(layer, part).0.first().copied().unwrap_or(0);
        let (first_row, all) = match part {
            Part::Query | Part::Key | Part::Value => {
                let (query, kv) = (rows(Part::Query), rows(Part::Key));
                let first = match part {
                    Part::Query => 0,
                    Part::Key => query,
                    _ => query + kv,
                };
                (first, query + 2 * kv)
            }
            Part::Gate => (0, 2 * rows(Part::Gate)),
            Part::Up => (rows(Part::Gate), 2 * rows(Part::Gate)),
            _ => return Stored::whole(shape),
        };
        let mut stored = Stored { first_row, ..Stored::whole(shape) };
        stored.shape[0] = all;
        stored
    }

    /// gpt-oss: all experts in one tensor, rows of gate and up taking turns. Plain ones are
    /// transposed, MXFP4 ones are not.
    fn fused_experts(
        &self,
        layer: Option<usize>,
        part: Part,
        name: String,
        shape: &[usize],
    ) -> (String, Stored) {
        // Which expert, the first stored row, and how many logical tensors share the rows.
        let (id, first_row, row_step) = match part {
            Part::ExpertGate(id) | Part::ExpertGateBias(id) => (id, 0, 2),
            Part::ExpertUp(id) | Part::ExpertUpBias(id) => (id, 1, 2),
            Part::ExpertDown(id) | Part::ExpertDownBias(id) => (id, 0, 1),
            _ => return (name, Stored::whole(shape)),
        };
        let count = self.shape(layer, Part::Router).0.first().copied().unwrap_or(0);
        let mut stored = Stored { slab: Some(id), first_row, row_step, ..Stored::whole(shape) };
        let [rows, columns] = *shape else {
            stored.shape = vec![count, shape.iter().product::<usize>() * row_step];
            return (name, stored);
        };
        if self.format == Format::Mxfp4 {
            stored.shape = vec![count, rows * row_step, columns / MXFP4_BLOCK, MXFP4_BYTES];
            stored.encoding = Encoding::Mxfp4 { scales: format!("{name}_scales") };
            return (format!("{name}_blocks"), stored);
        }
        stored.shape = vec![count, columns, rows * row_step];
        stored.transposed = true;
        (name, stored)
    }
}

/// Matrices of the layers but the routers: what FP8 checkpoints quantise.
fn is_projection(part: Part, sharding: Sharding) -> bool {
    let replicated = matches!(part, Part::QueryDown | Part::LatentDown);
    let bias = matches!(part, Part::QueryBias | Part::KeyBias | Part::ValueBias | Part::Sinks)
        || matches!(part, Part::GateBias | Part::UpBias)
        || matches!(part, Part::ExpertGateBias(_) | Part::ExpertUpBias(_));
    let cut = !matches!(sharding, Sharding::Replicated | Sharding::Vocab);
    replicated || (cut && !bias)
}
