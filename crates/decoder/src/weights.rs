//! The packed weights of one rank, in the shape the forward pass walks them.

use compute::{Device, HeadMap, Segment};

/// A packed matrix with the local column where its outputs (or inputs) start.
pub(crate) struct Piece<D: Device> {
    pub(crate) matrix: D::Matrix,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) column: usize,
}

impl<D: Device> Piece<D> {
    /// Column-parallel: reads rows `rows` whole, writes the same rows from its own column on.
    pub(crate) fn outward(&self, rows: std::ops::Range<usize>) -> Segment<'_, D::Matrix> {
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
    pub(crate) fn inward(
        &self,
        rows: std::ops::Range<usize>,
        to_row: usize,
    ) -> Segment<'_, D::Matrix> {
        Segment {
            matrix: &self.matrix,
            bias: None,
            from_rows: rows,
            from_column: self.column,
            to_row,
            to_column: 0,
        }
    }
}

/// One layer's weights.
pub(crate) struct LayerWeights<D: Device> {
    pub(crate) attention: AttentionWeights<D>,
    pub(crate) feed_forward_norm: Vec<f32>,
    pub(crate) feed_forward: FeedForwardWeights<D>,
}

/// Grouped attention on this rank. The projected row is `[queries | keys | values]`.
pub(crate) struct AttentionWeights<D: Device> {
    pub(crate) norm: Vec<f32>,
    /// Queries per stripe, then keys per KV head, then values per KV head.
    pub(crate) qkv: Vec<Piece<D>>,
    /// By own stripe: `[hidden, its heads * head_dim]`.
    pub(crate) output: Vec<Piece<D>>,
    pub(crate) output_bias: Option<Vec<f32>>,
    pub(crate) map: HeadMap,
    /// Local KV heads.
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Which of the decoder's rotary tables.
    pub(crate) rope: usize,
}

/// A gated network on this rank: gate columns, then up columns, then back.
pub(crate) struct Gated<D: Device> {
    /// Gate pieces, then up pieces (their columns start at `width`).
    pub(crate) gate_up: Vec<Piece<D>>,
    /// By own stripe: `[hidden, its columns]`.
    pub(crate) down: Vec<Piece<D>>,
}

/// A layer's feed-forward weights on this rank.
pub(crate) enum FeedForwardWeights<D: Device> {
    Dense {
        network: Gated<D>,
        down_bias: Option<Vec<f32>>,
        /// Local columns.
        width: usize,
    },
    Experts {
        router: D::Matrix,
        experts: Vec<Gated<D>>,
        chosen: usize,
        renormalise: bool,
        /// Local columns of one expert.
        width: usize,
    },
}

/// Embedding, head and final norm on this rank, by own stripe.
pub(crate) struct EdgeWeights<D: Device> {
    pub(crate) embedding: Vec<Piece<D>>,
    /// `None` when tied: the embedding serves.
    pub(crate) head: Option<Vec<Piece<D>>>,
    pub(crate) final_norm: Vec<f32>,
}
