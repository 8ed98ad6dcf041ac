//! The packed weights of one rank, in the shape the forward pass walks them.

use std::ops::Range;
use std::sync::Arc;

use compute::{Activation, Device, HeadMap, Routing, Segment};

/// A packed matrix, shared with what outlives the rank ([`crate::Kept`]).
pub(crate) type Packed<D> = Arc<<D as Device>::Matrix>;

/// A packed matrix with the local column where its outputs (or inputs) start.
pub(crate) struct Piece<D: Device> {
    pub(crate) matrix: Packed<D>,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) column: usize,
}

impl<D: Device> Piece<D> {
    /// Column-parallel: reads rows `rows` whole, writes the same rows from its own column on.
    pub(crate) fn outward(&self, rows: Range<usize>) -> Segment<'_, D::Matrix> {
        Segment {
            matrix: &self.matrix,
            bias: self.bias.as_deref(),
            to_row: rows.start,
            from_rows: rows,
            from_column: 0,
            to_column: self.column,
        }
    }

    /// Row-parallel: reads rows `rows` from its own column on, writes whole rows from `to_row` on.
    pub(crate) fn inward(&self, rows: Range<usize>, to_row: usize) -> Segment<'_, D::Matrix> {
        Segment {
            matrix: &self.matrix,
            bias: self.bias.as_deref(),
            from_rows: rows,
            from_column: self.column,
            to_row,
            to_column: 0,
        }
    }
}

/// The same rows of a matrix' input and output, each at its column.
pub(crate) fn across<M>(matrix: &M, rows: usize, from: usize, to: usize) -> Segment<'_, M> {
    Segment { matrix, bias: None, from_rows: 0..rows, from_column: from, to_row: 0, to_column: to }
}

/// One layer's weights.
pub(crate) struct LayerWeights<D: Device> {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) attention: AttentionWeights<D>,
    /// By own stripe: `[hidden, its heads' outputs]`.
    pub(crate) output: Vec<Piece<D>>,
    pub(crate) output_bias: Option<Vec<f32>>,
    /// Of the summed output, before it joins the stream.
    pub(crate) attention_post_norm: Option<Vec<f32>>,
    pub(crate) feed_forward_norm: Vec<f32>,
    pub(crate) feed_forward: FeedForwardWeights<D>,
    pub(crate) feed_forward_post_norm: Option<Vec<f32>>,
}

/// What turns the normed stream into each local head's output.
pub(crate) enum AttentionWeights<D: Device> {
    Grouped(GroupedWeights<D>),
    Latent(LatentWeights<D>),
}

/// Grouped attention on this rank. The projected row is `[queries | keys | values]`.
pub(crate) struct GroupedWeights<D: Device> {
    /// Queries per stripe, then keys per KV head, then values per KV head.
    pub(crate) qkv: Vec<Piece<D>>,
    /// Weights of each query head's and each key head's norm.
    pub(crate) head_norms: Option<(Vec<f32>, Vec<f32>)>,
    pub(crate) map: HeadMap,
    /// Local KV heads.
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Which of the decoder's rotary tables.
    pub(crate) rope: usize,
}

/// Latent attention on this rank, absorbed: every head looks at the one latent that is cached.
///
/// The stream is projected to `[query latent | key-value latent | rotated key]`, whole on every
/// rank; a head's query is `[nope | rotated]`.
pub(crate) struct LatentWeights<D: Device> {
    /// Down to the query latent, with its norm; without it queries come from the stream.
    pub(crate) query_down: Option<(Piece<D>, Vec<f32>)>,
    /// Queries per stripe.
    pub(crate) query: Vec<Piece<D>>,
    /// `[kv_rank + rope_dim, hidden]`.
    pub(crate) latent_down: Piece<D>,
    /// Of the key-value latent alone.
    pub(crate) latent_norm: Vec<f32>,
    /// By local head: `[kv_rank, nope_dim]`, the key projection turned over.
    pub(crate) key_up: Vec<Packed<D>>,
    /// By local head: `[value_dim, kv_rank]`.
    pub(crate) value_up: Vec<Packed<D>>,
    pub(crate) map: HeadMap,
    pub(crate) query_rank: usize,
    pub(crate) kv_rank: usize,
    pub(crate) nope_dim: usize,
    pub(crate) rope_dim: usize,
    pub(crate) value_dim: usize,
    /// Which of the decoder's rotary tables.
    pub(crate) rope: usize,
}

/// A gated network on this rank: gate columns, then up columns, then back.
pub(crate) struct Gated<D: Device> {
    /// Gate pieces, then up pieces (their columns start at `width`).
    pub(crate) gate_up: Vec<Piece<D>>,
    /// By own stripe: `[hidden, its columns]`. A bias stands on stripe 0's alone.
    pub(crate) down: Vec<Piece<D>>,
    /// Local columns.
    pub(crate) width: usize,
    pub(crate) activation: Activation,
}

/// A layer's feed-forward weights on this rank.
pub(crate) enum FeedForwardWeights<D: Device> {
    Dense { network: Gated<D>, down_bias: Option<Vec<f32>> },
    Experts(ExpertsWeights<D>),
}

/// A mixture of experts: every rank routes alike, and has its columns of every expert or some
/// experts whole.
pub(crate) struct ExpertsWeights<D: Device> {
    pub(crate) router: Packed<D>,
    pub(crate) router_bias: Option<Vec<f32>>,
    /// How experts are chosen, but for the correction.
    pub(crate) routing: Routing<'static>,
    /// Added to scores for the selection only.
    pub(crate) correction: Option<Vec<f32>>,
    /// By id; `None` where another rank has it.
    pub(crate) experts: Vec<Option<Gated<D>>>,
    /// Where whole experts are divided, by id: which of the own stripes has it.
    pub(crate) owners: Option<Vec<Option<usize>>>,
    /// Own stripes.
    pub(crate) own: usize,
    /// The network that every token uses, with what weighs it where something does.
    pub(crate) shared: Option<(Gated<D>, Option<Packed<D>>)>,
}

/// Embedding, head and final norm on this rank, by own stripe.
pub(crate) struct EdgeWeights<D: Device> {
    pub(crate) embedding: Vec<Piece<D>>,
    /// `None` when tied: the embedding serves.
    pub(crate) head: Option<Vec<Piece<D>>>,
    pub(crate) final_norm: Vec<f32>,
}
