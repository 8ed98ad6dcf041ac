//! The cut of a model into stripes: which heads, columns and rows belong to which stripe, and what
//! a set of stripes weighs.
//!
//! Every range depends on the model, the number of stripes and the stripe alone, never on who
//! holds it; that is why results have the same bits on any number of ranks. Functions that take a
//! stripe expect `stripe < stripes`; they give empty ranges otherwise.

use std::ops::Range;

use model::{Attention, ComputeType, FeedForward, Latent, LayerSpec, ModelSpec, Part};
use model::{Sharding, TensorSpec};

use crate::{Cut, ExpertCut, PlanError};

/// Stripes where the heads allow and nobody says otherwise.
const DEFAULT: usize = 8;

/// The most stripes of any model. Planning takes time in their third power, and no published model
/// has more heads.
const LIMIT: usize = 256;

/// Columns of one 8-bit block along the inner dimension.
const INT8_BLOCK: usize = 32;

/// The part of a tensor that a stripe needs, in the tensor's own rows or columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Slice {
    /// All of it.
    Whole,
    /// Rows (dimension 0).
    Rows(Range<usize>),
    /// Columns (dimension 1).
    Columns(Range<usize>),
}

/// The most stripes the model can be cut into: one query head, feed-forward column and vocabulary
/// row for each at the least, and no more than 256.
pub fn max_count(spec: &ModelSpec) -> usize {
    let layers = spec.layers.iter().map(|layer| layer.attention.heads().min(narrowest(layer)));
    layers.fold(spec.vocab.min(LIMIT), usize::min)
}

/// The default number of stripes: 8, or fewer where the model has less than 8 heads (then the
/// largest power of two that it can be cut into).
pub fn default_count(spec: &ModelSpec) -> usize {
    let max = max_count(spec);
    if max >= DEFAULT { DEFAULT } else { 1 << max.max(1).ilog2() }
}

/// Checks a number of stripes.
///
/// # Errors
/// [`PlanError::Stripes`] where it is not within `1..=max_count`.
pub fn validate(spec: &ModelSpec, stripes: usize) -> Result<(), PlanError> {
    let max = max_count(spec);
    if (1..=max).contains(&stripes) { Ok(()) } else { Err(PlanError::Stripes { stripes, max }) }
}

/// Run `stripe` of `stripes` over `items`: runs differ by one item at most.
fn cut(items: usize, stripes: usize, stripe: usize) -> Range<usize> {
    if stripe >= stripes {
        return 0..0;
    }
    // Wide, since items times stripes may not fit.
    let bound = |stripe: usize| (stripe as u128 * items as u128 / stripes as u128) as usize;
    bound(stripe)..bound(stripe + 1)
}

/// Query heads of a stripe.
pub fn query_heads(heads: usize, stripes: usize, stripe: usize) -> Range<usize> {
    cut(heads, stripes, stripe)
}

/// KV heads that a stripe's query heads read. Neighbouring stripes share one where their query
/// heads belong to one group.
pub fn kv_heads(heads: usize, kv_heads: usize, stripes: usize, stripe: usize) -> Range<usize> {
    let query = query_heads(heads, stripes, stripe);
    if query.is_empty() || kv_heads == 0 {
        return 0..0;
    }
    let group = (heads / kv_heads).max(1);
    query.start / group..(query.end - 1) / group + 1
}

/// Feed-forward columns are cut at multiples of this: of `stored`, the checkpoint's own block
/// (`Format::block`), or of 32 (an 8-bit block) where that is less, while every stripe gets a
/// block; otherwise of a half of it, a quarter and so on. Neighbours then share a stored block.
pub fn block_width(width: usize, stored: usize, stripes: usize) -> usize {
    let mut block = stored.max(INT8_BLOCK);
    while block > 1 && width.div_ceil(block) < stripes {
        block /= 2;
    }
    block
}

/// Feed-forward columns of a stripe: whole blocks of [`block_width`], the last run up to `width`.
pub fn columns(width: usize, stored: usize, stripes: usize, stripe: usize) -> Range<usize> {
    let block = block_width(width, stored, stripes);
    let run = cut(width.div_ceil(block), stripes, stripe);
    // Only the very last block may be short.
    (run.start * block).min(width)..(run.end * block).min(width)
}

/// Experts of a stripe, where whole ones are divided.
pub fn experts(count: usize, stripes: usize, stripe: usize) -> Range<usize> {
    cut(count, stripes, stripe)
}

/// Vocabulary rows of a stripe.
pub fn vocab(vocab: usize, stripes: usize, stripe: usize) -> Range<usize> {
    cut(vocab, stripes, stripe)
}

/// The part of a tensor that a stripe needs. A tensor must be one of the spec's own; of a layer
/// that the spec does not have, a stripe needs no rows.
pub fn slice(tensor: &TensorSpec, spec: &ModelSpec, cut: impl Into<Cut>, stripe: usize) -> Slice {
    let Cut { stripes, experts } = cut.into();
    if experts == ExpertCut::Whole
        && let Some(expert) = tensor.part.expert()
    {
        let own = self::experts(experts_of(tensor, spec), stripes, stripe);
        return if own.contains(&expert) { Slice::Whole } else { Slice::Rows(0..0) };
    }
    let block = spec.format.block();
    let dimension = |at: usize| tensor.shape.get(at).copied().unwrap_or(0);
    let attention = tensor.layer.and_then(|layer| spec.layers.get(layer));
    let attention = attention.map(|layer| &layer.attention);
    // Rows or columns divide evenly among the heads.
    let scaled = |run: Range<usize>, size: usize, heads: usize| {
        let of_head = size.checked_div(heads).unwrap_or(0);
        run.start * of_head..run.end * of_head
    };
    let query = |size: usize| {
        attention.map_or(0..0, |attention| {
            let heads = attention.heads();
            scaled(query_heads(heads, stripes, stripe), size, heads)
        })
    };
    match tensor.sharding {
        Sharding::Replicated => Slice::Whole,
        Sharding::QueryHeads => Slice::Rows(query(dimension(0))),
        Sharding::QueryHeadColumns => Slice::Columns(query(dimension(1))),
        Sharding::KvHeads => Slice::Rows(match attention {
            Some(Attention::Grouped(grouped)) => {
                let run = kv_heads(grouped.heads, grouped.kv_heads, stripes, stripe);
                scaled(run, dimension(0), grouped.kv_heads)
            }
            Some(Attention::Latent(_)) | None => 0..0,
        }),
        Sharding::Width => Slice::Rows(columns(dimension(0), block, stripes, stripe)),
        Sharding::WidthColumns => Slice::Columns(columns(dimension(1), block, stripes, stripe)),
        Sharding::Vocab => Slice::Rows(vocab(dimension(0), stripes, stripe)),
    }
}

/// Experts of a tensor's layer.
fn experts_of(tensor: &TensorSpec, spec: &ModelSpec) -> usize {
    let layer = tensor.layer.and_then(|layer| spec.layers.get(layer));
    match layer.map(|layer| &layer.feed_forward) {
        Some(FeedForward::Experts(experts)) => experts.count,
        Some(FeedForward::Dense(_)) | None => 0,
    }
}

/// Bytes that a rank with these stripes (ascending, each once) keeps of the weights: a shared KV
/// head and every replicated tensor once per rank, a tied head once with the embedding.
///
/// This is what the numbers themselves take in the compute type, whatever the checkpoint stores.
/// Packing pads: each packed matrix up to the next 16 outputs, so at most 15 rows more per matrix
/// and stripe, and its rows up to the next 32 inputs.
pub fn weight_bytes(
    spec: &ModelSpec,
    cut: impl Into<Cut>,
    held: &[usize],
    compute: ComputeType,
) -> u64 {
    Costs::new(spec, cut.into(), compute).weight_bytes(held)
}

/// Bytes of the KV cache of a rank with these stripes: `blocks` of `block_tokens` tokens, for each
/// layer the keys and values of every KV head it holds, f32 for `F32` and bf16 otherwise. Of latent
/// attention every rank keeps the one latent and its rotated key, and no values.
pub fn kv_bytes(
    spec: &ModelSpec,
    cut: impl Into<Cut>,
    held: &[usize],
    compute: ComputeType,
    blocks: usize,
    block_tokens: usize,
) -> u64 {
    let cache_tokens = (blocks as u64).saturating_mul(block_tokens as u64);
    Costs::new(spec, cut.into(), compute).kv_bytes(held, cache_tokens)
}

/// Sizes by stripe, computed once per plan.
#[derive(Debug, Clone)]
pub(crate) struct Costs {
    /// Tensors that every rank keeps.
    replicated: u64,
    /// By stripe: what is its alone.
    own: Vec<u64>,
    /// By run of equal layers: KV heads, which neighbouring stripes may share.
    kv: Vec<KvCost>,
}

#[derive(Debug, Clone)]
struct KvCost {
    /// By stripe: the KV heads it reads.
    heads: Vec<Range<usize>>,
    /// Weight bytes of one KV head in all layers of the run.
    weight_per_head: u64,
    /// Cache bytes of one KV head and token in all layers of the run.
    cache_per_head: u64,
}

impl Costs {
    pub(crate) fn new(spec: &ModelSpec, cut: Cut, compute: ComputeType) -> Self {
        let stripes = cut.stripes;
        let mut costs = Costs { replicated: 0, own: vec![0; stripes], kv: Vec::new() };
        let outside = [Part::Embedding, Part::FinalNorm, Part::Head];
        for tensor in outside.into_iter().filter_map(|part| spec.tensor(None, part)) {
            costs.add(&tensor, spec, (cut, compute), 1);
        }
        let mut first = 0;
        // Models have runs of equal layers; one of each run tells the whole.
        for run in spec.layers.chunk_by(|a, b| a == b) {
            let count = run.len() as u64;
            let range = |stripe| cached_heads(&run[0].attention, stripes, stripe);
            let cache_element = if compute == ComputeType::F32 { 4 } else { 2 };
            let columns = cached_columns(&run[0].attention) as u64;
            costs.kv.push(KvCost {
                heads: (0..stripes).map(range).collect(),
                weight_per_head: 0,
                cache_per_head: count.saturating_mul(columns).saturating_mul(cache_element),
            });
            for tensor in spec.layer_tensors(first) {
                costs.add(&tensor, spec, (cut, compute), count);
            }
            first += run.len();
        }
        costs
    }

    /// Adds `count` tensors like this one.
    fn add(
        &mut self,
        tensor: &TensorSpec,
        spec: &ModelSpec,
        (cut, compute): (Cut, ComputeType),
        count: u64,
    ) {
        let (rows, columns) = match tensor.shape[..] {
            [rows, columns] => (rows, Some(columns)),
            _ => (tensor.elements() as usize, None),
        };
        let layer = tensor.layer.and_then(|layer| spec.layers.get(layer));
        let size = |rows: usize, columns: Option<usize>| {
            let bytes = match layer.map(|layer| &layer.attention) {
                Some(Attention::Latent(latent)) if tensor.part == Part::LatentUp => {
                    latent_up_bytes(latent, rows, compute)
                }
                _ => slice_bytes(tensor.part, rows, columns, compute),
            };
            bytes.saturating_mul(count)
        };
        let whole = cut.experts == ExpertCut::Whole && tensor.part.expert().is_some();
        match tensor.sharding {
            Sharding::Replicated if !whole => {
                self.replicated = self.replicated.saturating_add(size(rows, columns));
            }
            Sharding::KvHeads => {
                let kv_heads = match layer.map(|layer| &layer.attention) {
                    Some(Attention::Grouped(grouped)) => grouped.kv_heads,
                    _ => 0,
                };
                if let Some(kv) = self.kv.last_mut() {
                    kv.weight_per_head += size(rows.checked_div(kv_heads).unwrap_or(0), columns);
                }
            }
            _ => {
                for (stripe, own) in self.own.iter_mut().enumerate() {
                    let bytes = match slice(tensor, spec, cut, stripe) {
                        Slice::Whole => size(rows, columns),
                        Slice::Rows(range) => size(range.len(), columns),
                        Slice::Columns(range) => size(rows, Some(range.len())),
                    };
                    *own = own.saturating_add(bytes);
                }
            }
        }
    }

    /// See [`weight_bytes`].
    pub(crate) fn weight_bytes(&self, held: &[usize]) -> u64 {
        let own = held.iter().filter_map(|&stripe| self.own.get(stripe));
        let own = own.fold(self.replicated, |sum, &bytes| sum.saturating_add(bytes));
        self.kv.iter().fold(own, |sum, kv| {
            sum.saturating_add(kv.weight_per_head.saturating_mul(kv.distinct(held)))
        })
    }

    /// See [`kv_bytes`].
    pub(crate) fn kv_bytes(&self, held: &[usize], cache_tokens: u64) -> u64 {
        let per_token = self.kv.iter().fold(0u64, |sum, kv| {
            sum.saturating_add(kv.cache_per_head.saturating_mul(kv.distinct(held)))
        });
        per_token.saturating_mul(cache_tokens)
    }
}

impl KvCost {
    /// How many KV heads these ascending stripes read. Runs ascend with the stripe, so only what
    /// lies beyond the furthest end so far is new.
    fn distinct(&self, held: &[usize]) -> u64 {
        let (mut count, mut covered) = (0, 0);
        for range in held.iter().filter_map(|&stripe| self.heads.get(stripe)) {
            count += range.end.saturating_sub(range.start.max(covered)) as u64;
            covered = covered.max(range.end);
        }
        count
    }
}

/// Bytes of a vector (`columns` is `None`) or of a matrix `[rows, columns]` that is packed by
/// itself. Vectors stay f32; embedding, head and routers have no 8-bit form.
pub(crate) fn slice_bytes(
    part: Part,
    rows: usize,
    columns: Option<usize>,
    compute: ComputeType,
) -> u64 {
    let rows = rows as u64;
    let Some(columns) = columns else {
        return 4 * rows;
    };
    let router = matches!(part, Part::Router | Part::SharedRouter);
    let wide = router || matches!(part, Part::Embedding | Part::Head);
    let row = match compute {
        ComputeType::F32 => 4 * columns,
        ComputeType::Bf16 => 2 * columns,
        ComputeType::Int8 | ComputeType::Int4 if wide => 2 * columns,
        // One byte each and an f32 scale per block.
        ComputeType::Int8 => columns + 4 * columns.div_ceil(INT8_BLOCK),
        // Half a byte each: whole blocks, since the last one is padded.
        ComputeType::Int4 => (INT8_BLOCK / 2 + 4) * columns.div_ceil(INT8_BLOCK),
    };
    rows.saturating_mul(row as u64)
}

/// Bytes of whole heads' rows of [`Part::LatentUp`]. A head's first rows are packed transposed,
/// since they multiply queries rather than latents.
pub(crate) fn latent_up_bytes(latent: &Latent, rows: usize, compute: ComputeType) -> u64 {
    let heads = rows.checked_div(latent.nope_dim + latent.value_dim).unwrap_or(0) as u64;
    let bytes = |rows, columns| slice_bytes(Part::LatentUp, rows, Some(columns), compute);
    let head = bytes(latent.kv_rank, latent.nope_dim) + bytes(latent.value_dim, latent.kv_rank);
    heads.saturating_mul(head)
}

/// KV heads that a stripe reads from the cache; the latent is one that all share.
pub(crate) fn cached_heads(attention: &Attention, stripes: usize, stripe: usize) -> Range<usize> {
    match attention {
        Attention::Grouped(grouped) => kv_heads(grouped.heads, grouped.kv_heads, stripes, stripe),
        Attention::Latent(latent) => kv_heads(latent.heads, 1, stripes, stripe),
    }
}

/// Cached numbers per token and KV head: keys and values, or latent and rotated key.
pub(crate) fn cached_columns(attention: &Attention) -> usize {
    match attention {
        Attention::Grouped(grouped) => 2 * grouped.head_dim,
        Attention::Latent(latent) => latent.kv_rank + latent.rope_dim,
    }
}

/// Inner width of the feed-forward network, or of one expert.
pub(crate) fn width(layer: &LayerSpec) -> usize {
    match &layer.feed_forward {
        FeedForward::Dense(dense) => dense.width,
        FeedForward::Experts(experts) => experts.width,
    }
}

/// The smallest inner width in a layer.
fn narrowest(layer: &LayerSpec) -> usize {
    match &layer.feed_forward {
        FeedForward::Dense(dense) => dense.width,
        FeedForward::Experts(experts) => {
            experts.shared.map_or(experts.width, |shared| shared.width.min(experts.width))
        }
    }
}
