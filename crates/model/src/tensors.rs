//! The tensor table of a model: name, shape and how each tensor is cut, side by side.

use crate::spec::{Attention, Dense, Experts, FeedForward, Grouped, ModelSpec};

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

impl TensorSpec {
    /// Elements: the product of the shape.
    pub fn elements(&self) -> u64 {
        self.shape.iter().fold(1u64, |product, &n| product.saturating_mul(n as u64))
    }
}

impl ModelSpec {
    /// Every tensor of the checkpoint: embedding, layers upward, final norm, head (unless tied).
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = vec![self.entry(None, Part::Embedding)];
        for layer in 0..self.layers.len() {
            tensors.extend(self.layer_tensors(layer));
        }
        tensors.push(self.entry(None, Part::FinalNorm));
        if !self.tied {
            tensors.push(self.entry(None, Part::Head));
        }
        tensors
    }

    /// The tensors of one layer in the order they are used; none if there is no such layer.
    pub fn layer_tensors(&self, layer: usize) -> Vec<TensorSpec> {
        let Some(spec) = self.layers.get(layer) else {
            return Vec::new();
        };
        let mut parts = vec![Part::AttentionNorm];
        let Attention::Grouped(attention) = &spec.attention;
        parts.extend([Part::Query, Part::Key, Part::Value, Part::Output]);
        if attention.qkv_bias {
            parts.extend([Part::QueryBias, Part::KeyBias, Part::ValueBias]);
        }
        if attention.out_bias {
            parts.push(Part::OutputBias);
        }
        parts.push(Part::FeedForwardNorm);
        match &spec.feed_forward {
            FeedForward::Dense(dense) => {
                parts.extend([Part::Gate, Part::Up, Part::Down]);
                if dense.bias {
                    parts.extend([Part::GateBias, Part::UpBias, Part::DownBias]);
                }
            }
            FeedForward::Experts(experts) => {
                parts.push(Part::Router);
                parts.extend((0..experts.count).flat_map(|id| {
                    [Part::ExpertGate(id), Part::ExpertUp(id), Part::ExpertDown(id)]
                }));
            }
        }
        parts.into_iter().map(|part| self.entry(Some(layer), part)).collect()
    }

    /// One tensor by its use, or `None` where this model has none such.
    pub fn tensor(&self, layer: Option<usize>, part: Part) -> Option<TensorSpec> {
        let exists = match (layer, part) {
            (None, Part::Embedding | Part::FinalNorm) => true,
            (None, Part::Head) => !self.tied,
            (None, _) | (Some(_), Part::Embedding | Part::FinalNorm | Part::Head) => false,
            (Some(layer), part) => self.has_part(layer, part),
        };
        exists.then(|| self.entry(layer, part))
    }

    fn has_part(&self, layer: usize, part: Part) -> bool {
        let Some(spec) = self.layers.get(layer) else {
            return false;
        };
        let Attention::Grouped(attention) = &spec.attention;
        let (dense, experts) = match &spec.feed_forward {
            FeedForward::Dense(dense) => (Some(dense), None),
            FeedForward::Experts(experts) => (None, Some(experts)),
        };
        match part {
            Part::Embedding | Part::FinalNorm | Part::Head => false,
            Part::AttentionNorm | Part::FeedForwardNorm => true,
            Part::Query | Part::Key | Part::Value | Part::Output => true,
            Part::QueryBias | Part::KeyBias | Part::ValueBias => attention.qkv_bias,
            Part::OutputBias => attention.out_bias,
            Part::Gate | Part::Up | Part::Down => dense.is_some(),
            Part::GateBias | Part::UpBias | Part::DownBias => dense.is_some_and(|d| d.bias),
            Part::Router => experts.is_some(),
            Part::ExpertGate(id) | Part::ExpertUp(id) | Part::ExpertDown(id) => {
                experts.is_some_and(|experts| id < experts.count)
            }
        }
    }

    /// Name, shape and cut of a part that exists.
    fn entry(&self, layer: Option<usize>, part: Part) -> TensorSpec {
        let (shape, sharding) = self.shape(layer, part);
        let name = self.family.tensor_name(layer.unwrap_or(0), part);
        TensorSpec { layer, part, name, shape, sharding }
    }

    fn shape(&self, layer: Option<usize>, part: Part) -> (Vec<usize>, Sharding) {
        let spec = layer.and_then(|layer| self.layers.get(layer));
        let attention = spec.map(|spec| match &spec.attention {
            Attention::Grouped(Grouped { heads, kv_heads, head_dim, .. }) => {
                (heads * head_dim, kv_heads * head_dim)
            }
        });
        let (query, kv) = attention.unwrap_or_default();
        let (width, experts) = match spec.map(|spec| &spec.feed_forward) {
            Some(FeedForward::Dense(Dense { width, .. })) => (*width, 0),
            Some(FeedForward::Experts(Experts { width, count, .. })) => (*width, *count),
            None => (0, 0),
        };
        let hidden = self.hidden;
        match part {
            Part::Embedding | Part::Head => (vec![self.vocab, hidden], Sharding::Vocab),
            Part::FinalNorm | Part::AttentionNorm | Part::FeedForwardNorm => {
                (vec![hidden], Sharding::Replicated)
            }
            Part::Query => (vec![query, hidden], Sharding::QueryHeads),
            Part::QueryBias => (vec![query], Sharding::QueryHeads),
            Part::Key | Part::Value => (vec![kv, hidden], Sharding::KvHeads),
            Part::KeyBias | Part::ValueBias => (vec![kv], Sharding::KvHeads),
            Part::Output => (vec![hidden, query], Sharding::QueryHeadColumns),
            // Added once, after the sum over stripes.
            Part::OutputBias | Part::DownBias => (vec![hidden], Sharding::Replicated),
            Part::Gate | Part::Up | Part::ExpertGate(_) | Part::ExpertUp(_) => {
                (vec![width, hidden], Sharding::Width)
            }
            Part::GateBias | Part::UpBias => (vec![width], Sharding::Width),
            Part::Down | Part::ExpertDown(_) => (vec![hidden, width], Sharding::WidthColumns),
            Part::Router => (vec![experts, hidden], Sharding::Replicated),
        }
    }

    /// Parameters of the checkpoint; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        let sizes = self.tensors().into_iter().map(|tensor| tensor.elements());
        sizes.fold(0, u64::saturating_add)
    }

    /// Parameters that one token's forward pass uses: of the experts only the chosen ones.
    pub fn active_parameters(&self) -> u64 {
        let mut total = self.parameters();
        for (number, layer) in self.layers.iter().enumerate() {
            if let FeedForward::Experts(experts) = &layer.feed_forward {
                let parts = [Part::ExpertGate(0), Part::ExpertUp(0), Part::ExpertDown(0)];
                let one: u64 =
                    parts.map(|part| self.entry(Some(number), part).elements()).iter().sum();
                let idle = experts.count.saturating_sub(experts.chosen) as u64;
                total = total.saturating_sub(one.saturating_mul(idle));
            }
        }
        total
    }
}
