//! The tensor table of a model: name, shape and how each tensor is cut, side by side.

/// One tensor of a checkpoint. The loader and the planner read the same table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Decoder layer, or `None` outside the layers.
    pub layer: Option<usize>,
    /// What the tensor is for.
    pub part: Part,
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape; a projection is `[out, in]`.
    pub shape: Vec<usize>,
    /// How it is cut into stripes.
    pub sharding: Sharding,
}

/// What a tensor is for. `E` is an expert's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// `[vocab, hidden]`.
    Embedding,
    /// `[hidden]`, before the head.
    FinalNorm,
    /// `[vocab, hidden]`; absent from the table when tied.
    Head,
    /// `[hidden]`, before attention.
    AttentionNorm,
    /// `[heads * head_dim, hidden]`.
    Query,
    /// `[heads * head_dim]`.
    QueryBias,
    /// `[kv_heads * head_dim, hidden]`.
    Key,
    /// `[kv_heads * head_dim]`.
    KeyBias,
    /// `[kv_heads * head_dim, hidden]`.
    Value,
    /// `[kv_heads * head_dim]`.
    ValueBias,
    /// `[hidden, heads * head_dim]`.
    Output,
    /// `[hidden]`.
    OutputBias,
    /// `[hidden]`, before the feed-forward network.
    FeedForwardNorm,
    /// `[width, hidden]`.
    Gate,
    /// `[width]`.
    GateBias,
    /// `[width, hidden]`.
    Up,
    /// `[width]`.
    UpBias,
    /// `[hidden, width]`.
    Down,
    /// `[hidden]`.
    DownBias,
    /// `[count, hidden]`.
    Router,
    /// `[width, hidden]` of one expert (Mixtral's `w1`).
    ExpertGate(usize),
    /// `[width, hidden]` of one expert (Mixtral's `w3`).
    ExpertUp(usize),
    /// `[hidden, width]` of one expert (Mixtral's `w2`).
    ExpertDown(usize),
}

/// Along which dimension a tensor is cut, and by what. `planner::stripes` turns this and a stripe
/// number into a range of rows or columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sharding {
    /// Whole on every rank.
    Replicated,
    /// Rows (dimension 0) by query heads: column-parallel.
    QueryHeads,
    /// Rows by KV heads; a KV head may be shared by neighbouring stripes.
    KvHeads,
    /// Columns (dimension 1) by query heads: row-parallel, a partial sum per stripe.
    QueryHeadColumns,
    /// Rows by feed-forward columns.
    Width,
    /// Columns by feed-forward columns: row-parallel, a partial sum per stripe.
    WidthColumns,
    /// Rows by vocabulary run.
    Vocab,
}
