//! The products and attentions of one rank, each as bytes that it reads and its arithmetic.

use std::ops::Range;

use model::{
    Attention, ComputeType, Encoding, FeedForward, LayerSpec, ModelSpec, Part, TensorSpec,
};

use super::rates::Rates;
use super::{Breakdown, Kept, PredictError, Work};
use crate::cut::{Cut, ExpertCut};
use crate::stripes::{self, Slice};

/// Columns or rows that share a scale in FP8 checkpoints.
const FP8_SIDE: f64 = 128.0;
/// Bytes of 32 MXFP4 numbers: two a byte, and their scale.
const MXFP4_BYTES: f64 = 17.0;

/// What a rank holds of a model.
pub(super) struct Held<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) cut: Cut,
    /// Ascending.
    pub(super) stripes: &'a [usize],
    pub(super) kept: Kept,
}

/// The type that operands of a product have.
#[derive(Clone, Copy)]
enum Operands {
    F32,
    Bf16,
    EightBit,
}

/// One matrix of a rank, its products with rows, and how many there are like it.
struct Matrix {
    bytes: f64,
    outputs: f64,
    inputs: f64,
    operands: Operands,
    /// How many are read in a step.
    read: f64,
    /// Rows through one of them, times how many.
    rows: f64,
}

impl Rates {
    fn products(&self, operands: Operands) -> f64 {
        match operands {
            Operands::F32 => self.f32,
            Operands::Bf16 => self.bf16,
            Operands::EightBit => self.eight_bit,
        }
    }
}

impl Held<'_> {
    /// Weights, keys and values, and arithmetic of a step; no collectives and no gaps.
    pub(super) fn step(&self, rates: &Rates, work: Work) -> Result<Breakdown, PredictError> {
        let mut total = Breakdown::default();
        let mut first = 0;
        // Equal layers take equal times.
        for run in self.spec.layers.chunk_by(|a, b| a == b) {
            let mut one = Breakdown::default();
            for matrix in self.layer(first, &run[0], work)? {
                matrix.add_to(&mut one, rates);
            }
            self.attend(&run[0].attention, work, rates, &mut one);
            total.weights += one.weights * run.len() as f64;
            total.kv += one.kv * run.len() as f64;
            total.matrix += one.matrix * run.len() as f64;
            first += run.len();
        }
        let part = if self.spec.tied { Part::Embedding } else { Part::Head };
        let head = self.spec.tensor(None, part);
        let head = head.map(|head| self.matrix(&head, 1.0, work.head_rows() as f64)).transpose()?;
        if let Some(head) = head.flatten() {
            head.add_to(&mut total, rates);
        }
        Ok(total)
    }

    /// Bytes of all matrices.
    pub(super) fn weights(&self) -> Result<f64, PredictError> {
        let mut bytes = 0.0;
        let mut first = 0;
        for run in self.spec.layers.chunk_by(|a, b| a == b) {
            let mut one = 0.0;
            for tensor in self.layer_matrices(first) {
                let count =
                    if tensor.part.expert().is_some() { self.experts(&run[0]) } else { 1.0 };
                one += self.matrix(&tensor, 0.0, 0.0)?.map_or(0.0, |m| m.bytes) * count;
            }
            bytes += one * run.len() as f64;
            first += run.len();
        }
        let embedding = self.spec.tensor(None, Part::Embedding);
        let head = self.spec.tensor(None, Part::Head);
        for tensor in embedding.iter().chain(&head) {
            bytes += self.matrix(tensor, 0.0, 0.0)?.map_or(0.0, |matrix| matrix.bytes);
        }
        Ok(bytes)
    }

    /// The matrices of a layer, of its experts only the first's: all have the same shapes.
    fn layer_matrices(&self, layer: usize) -> impl Iterator<Item = TensorSpec> {
        let tensors = self.spec.layer_tensors(layer).into_iter();
        tensors.filter(|tensor| {
            tensor.shape.len() == 2 && tensor.part.expert().is_none_or(|expert| expert == 0)
        })
    }

    /// The products of a layer.
    fn layer(
        &self,
        number: usize,
        layer: &LayerSpec,
        work: Work,
    ) -> Result<Vec<Matrix>, PredictError> {
        let rows = work.rows() as f64;
        let mut found = Vec::new();
        for tensor in self.layer_matrices(number) {
            let (read, rows) = match (&layer.feed_forward, tensor.part.expert()) {
                (FeedForward::Experts(experts), Some(_)) => {
                    let share = experts.chosen as f64 / experts.count as f64;
                    let held = self.experts(layer);
                    // Routers are taken to choose evenly and independently: an expert is read if
                    // any row has chosen it.
                    (held * (1.0 - (1.0 - share).powf(rows)), held * share * rows)
                }
                _ => (1.0, rows),
            };
            found.extend(self.matrix(&tensor, read, rows)?);
        }
        Ok(found)
    }

    /// Experts of a layer of which this rank has any columns.
    fn experts(&self, layer: &LayerSpec) -> f64 {
        let FeedForward::Experts(experts) = &layer.feed_forward else { return 0.0 };
        let own = |&stripe: &usize| stripes::experts(experts.count, self.cut.stripes, stripe).len();
        match self.cut.experts {
            ExpertCut::Stripe => experts.count as f64,
            ExpertCut::Whole => self.stripes.iter().map(own).sum::<usize>() as f64,
        }
    }

    /// This rank's part of a matrix; `None` where it has none.
    fn matrix(
        &self,
        tensor: &TensorSpec,
        read: f64,
        rows: f64,
    ) -> Result<Option<Matrix>, PredictError> {
        let [outputs, inputs] = tensor.shape[..] else { return Ok(None) };
        let whole = self.cut.experts == ExpertCut::Whole && tensor.part.expert().is_some();
        let (mut outputs, mut inputs) = (outputs, inputs);
        if !whole {
            let slices = self.stripes.iter();
            let slices = slices.map(|&s| stripes::slice(tensor, self.spec, self.cut, s));
            let (mut some_rows, mut some_columns) = (Vec::new(), Vec::new());
            for slice in slices {
                match slice {
                    Slice::Whole => {}
                    Slice::Rows(range) => some_rows.push(range),
                    Slice::Columns(range) => some_columns.push(range),
                }
            }
            // Neighbouring stripes may share a KV head.
            outputs = if some_rows.is_empty() { outputs } else { distinct(some_rows) };
            inputs = if some_columns.is_empty() { inputs } else { distinct(some_columns) };
        }
        if outputs == 0 || inputs == 0 {
            return Ok(None);
        }
        let (bytes, operands) = self.size(tensor, outputs, inputs)?;
        let (outputs, inputs) = (outputs as f64, inputs as f64);
        Ok(Some(Matrix { bytes, outputs, inputs, operands, read, rows }))
    }

    /// Bytes of a part of a matrix, and what its products are made of.
    fn size(
        &self,
        tensor: &TensorSpec,
        outputs: usize,
        inputs: usize,
    ) -> Result<(f64, Operands), PredictError> {
        let compute = match self.kept {
            Kept::As(compute) => compute,
            Kept::Stored => return stored(tensor, outputs as f64, inputs as f64),
        };
        let layer = tensor.layer.and_then(|layer| self.spec.layers.get(layer));
        let bytes = match layer.map(|layer| &layer.attention) {
            Some(Attention::Latent(latent)) if tensor.part == Part::LatentUp => {
                stripes::latent_up_bytes(latent, outputs, compute)
            }
            _ => stripes::slice_bytes(tensor.part, outputs, Some(inputs), compute),
        };
        let wide =
            matches!(tensor.part, Part::Router | Part::SharedRouter | Part::Embedding | Part::Head);
        let operands = match compute {
            ComputeType::F32 => Operands::F32,
            ComputeType::Bf16 => Operands::Bf16,
            ComputeType::Int8 | ComputeType::Int4 if wide => Operands::Bf16,
            ComputeType::Int8 | ComputeType::Int4 => Operands::EightBit,
        };
        Ok((bytes as f64, operands))
    }

    /// Reads keys and values, and multiplies them with queries and weights.
    fn attend(&self, attention: &Attention, work: Work, rates: &Rates, into: &mut Breakdown) {
        let count = self.cut.stripes;
        let runs = |range: &dyn Fn(usize) -> Range<usize>| {
            distinct(self.stripes.iter().map(|&stripe| range(stripe)).collect()) as f64
        };
        let heads = runs(&|stripe| stripes::query_heads(attention.heads(), count, stripe));
        let kv_heads = runs(&|stripe| stripes::cached_heads(attention, count, stripe));
        let window = match attention {
            Attention::Grouped(grouped) => grouped.window.unwrap_or(usize::MAX),
            Attention::Latent(_) => usize::MAX,
        };
        // Keys that are read, and pairs of a query and a key.
        let (keys, pairs) = match work {
            Work::Decode { sequences, context } => {
                let keys = sequences as f64 * context.min(window) as f64;
                (keys, keys)
            }
            Work::Prefill { tokens } => {
                let near = tokens.min(window) as f64;
                let pairs = near * (near + 1.0) / 2.0 + (tokens as f64 - near) * near;
                (tokens as f64, pairs)
            }
        };
        // Numbers of a key and a value that a pair multiplies.
        let pair = match (attention, work) {
            (Attention::Grouped(grouped), _) => 2 * grouped.head_dim,
            // One row for each sequence multiplies latents as they are, many rows multiply keys
            // and values made of them.
            (Attention::Latent(l), Work::Decode { .. }) => 2 * l.kv_rank + l.rope_dim,
            (Attention::Latent(l), Work::Prefill { .. }) => l.nope_dim + l.rope_dim + l.value_dim,
        };
        let (element, operands) = match self.kept {
            Kept::As(ComputeType::F32) => (4.0, Operands::F32),
            _ => (2.0, Operands::Bf16),
        };
        let bytes = keys * kv_heads * stripes::cached_columns(attention) as f64 * element;
        let read = bytes / rates.memory;
        let arithmetic = 2.0 * pairs * heads * pair as f64 / rates.products(operands);
        into.kv += read;
        into.matrix += (arithmetic - read).max(0.0);
    }
}

impl Matrix {
    fn add_to(&self, total: &mut Breakdown, rates: &Rates) {
        let read = self.bytes * self.read / rates.memory;
        let arithmetic = 2.0 * self.rows * self.outputs * self.inputs;
        total.weights += read;
        total.matrix += (arithmetic / rates.products(self.operands) - read).max(0.0);
    }
}

/// Bytes of a part of a matrix in the checkpoint's own form.
fn stored(tensor: &TensorSpec, outputs: f64, inputs: f64) -> Result<(f64, Operands), PredictError> {
    let numbers = outputs * inputs;
    Ok(match &tensor.stored.encoding {
        Encoding::Plain => (2.0 * numbers, Operands::Bf16),
        Encoding::Fp8Blocks { .. } => {
            let scales = (outputs / FP8_SIDE).ceil() * (inputs / FP8_SIDE).ceil();
            (numbers + 4.0 * scales, Operands::EightBit)
        }
        Encoding::Mxfp4 { .. } => (outputs * (inputs / 32.0).ceil() * MXFP4_BYTES, Operands::Bf16),
        Encoding::Int4(int4) => {
            let group = int4.format.group.map_or(inputs, |group| group as f64);
            // An f16 scale and four bits of a zero for each group.
            let groups = outputs * (inputs / group).ceil();
            (numbers / 2.0 + 2.5 * groups, Operands::Bf16)
        }
        Encoding::AsTyped => return Err(PredictError::StoredUnknown),
    })
}

/// How many numbers are in any of these ranges, whose beginnings and ends ascend.
fn distinct(ranges: Vec<Range<usize>>) -> usize {
    let (mut count, mut covered) = (0, 0);
    for range in ranges {
        count += range.end.saturating_sub(range.start.max(covered));
        covered = covered.max(range.end);
    }
    count
}
