//! The tensor table of a model: name, shape and how each tensor is cut, side by side.

use crate::spec::ModelSpec;
use crate::spec::{Attention, Experts, FeedForward, Grouped, Latent, LatentUp, LayerSpec};
use crate::stored::Stored;

/// One tensor of a checkpoint. The loader and the planner read the same table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Decoder layer, or `None` outside the layers.
    pub layer: Option<usize>,
    /// What the tensor is for.
    pub part: Part,
    /// Name of the checkpoint's tensor that holds it (of the `_blocks` for MXFP4). Several
    /// logical tensors may share one.
    pub name: String,
    /// Its logical shape; a projection is `[out, in]`.
    pub shape: Vec<usize>,
    /// How it is cut into stripes.
    pub sharding: Sharding,
    /// Where in the checkpoint's tensor it stands.
    pub stored: Stored,
}

/// What a tensor is for; experts carry their id.
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
    /// `[heads * head_dim, hidden]`; for `Latent` without `query_rank`
    /// `[heads * (nope_dim + rope_dim), hidden]`.
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
    /// `[hidden, heads * head_dim]`; for `Latent` `[hidden, heads * value_dim]`.
    Output,
    /// `[hidden]`.
    OutputBias,
    /// `[head_dim]`, the same for all query heads.
    QueryNorm,
    /// `[head_dim]`, the same for all KV heads.
    KeyNorm,
    /// `[heads]`.
    Sinks,
    /// `[query_rank, hidden]`.
    QueryDown,
    /// `[query_rank]`.
    QueryDownNorm,
    /// `[heads * (nope_dim + rope_dim), query_rank]`, per head `[nope | rope]`.
    QueryUp,
    /// `[kv_rank + rope_dim, hidden]`: the latent's rows, then those of the shared key.
    LatentDown,
    /// `[kv_rank]`.
    LatentNorm,
    /// `[heads * (nope_dim + value_dim), kv_rank]`, per head `[W_UK | W_UV]`.
    LatentUp,
    /// `[heads * kv_rank, nope_dim]`: per head `W_UK` turned over.
    LatentKeyUp,
    /// `[heads * value_dim, kv_rank]`: per head `W_UV`.
    LatentValueUp,
    /// `[hidden]`, after attention and before its output is added.
    AttentionPostNorm,
    /// `[hidden]`, before the feed-forward network.
    FeedForwardNorm,
    /// `[hidden]`, after the feed-forward network and before its output is added.
    FeedForwardPostNorm,
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
    /// `[count]`, added to the logits.
    RouterBias,
    /// `[count]`, added to the scores for the choice alone.
    RouterCorrection,
    /// `[width, hidden]` of one expert (Mixtral's `w1`).
    ExpertGate(usize),
    /// `[width]` of one expert.
    ExpertGateBias(usize),
    /// `[width, hidden]` of one expert (Mixtral's `w3`).
    ExpertUp(usize),
    /// `[width]` of one expert.
    ExpertUpBias(usize),
    /// `[hidden, width]` of one expert (Mixtral's `w2`).
    ExpertDown(usize),
    /// `[hidden]` of one expert.
    ExpertDownBias(usize),
    /// `[shared width, hidden]`.
    SharedGate,
    /// `[shared width, hidden]`.
    SharedUp,
    /// `[hidden, shared width]`.
    SharedDown,
    /// `[1, hidden]`: the shared expert's own gate.
    SharedRouter,
}

impl Part {
    /// The expert that a part belongs to, where it is one expert's alone.
    pub fn expert(self) -> Option<usize> {
        match self {
            Part::ExpertGate(id)
            | Part::ExpertUp(id)
            | Part::ExpertDown(id)
            | Part::ExpertGateBias(id)
            | Part::ExpertUpBias(id)
            | Part::ExpertDownBias(id) => Some(id),
            _ => None,
        }
    }
}

/// Along which dimension a tensor is cut, and by what. `planner::stripes` turns this and a stripe
/// number into a range of rows or columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sharding {
    /// Whole on every rank.
    Replicated,
    /// Rows (dimension 0) by query heads: column-parallel. Rows divide evenly among the heads.
    QueryHeads,
    /// Rows by KV heads, evenly; a KV head may be shared by neighbouring stripes.
    KvHeads,
    /// Columns (dimension 1) by query heads, evenly: row-parallel, a partial sum per stripe.
    QueryHeadColumns,
    /// Rows by feed-forward columns (of the dense network, an expert, or the shared one).
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
        parts.extend(attention_parts(&spec.attention));
        if spec.post_norms {
            parts.push(Part::AttentionPostNorm);
        }
        parts.push(Part::FeedForwardNorm);
        parts.extend(feed_forward_parts(&spec.feed_forward));
        if let FeedForward::Experts(experts) = &spec.feed_forward {
            parts.extend((0..experts.count).flat_map(|id| expert_parts(experts, id)));
        }
        if spec.post_norms {
            parts.push(Part::FeedForwardPostNorm);
        }
        parts.into_iter().map(|part| self.entry(Some(layer), part)).collect()
    }

    /// One tensor by its use, or `None` where this model has none such.
    pub fn tensor(&self, layer: Option<usize>, part: Part) -> Option<TensorSpec> {
        let exists = match (layer, part) {
            (None, Part::Embedding | Part::FinalNorm) => true,
            (None, Part::Head) => !self.tied,
            (None, _) | (Some(_), Part::Embedding | Part::FinalNorm | Part::Head) => false,
            (Some(layer), part) => {
                self.layers.get(layer).is_some_and(|layer| has_part(layer, part))
            }
        };
        exists.then(|| self.entry(layer, part))
    }

    /// Name, shape and cut of a part that exists.
    fn entry(&self, layer: Option<usize>, part: Part) -> TensorSpec {
        let (shape, sharding) = self.shape(layer, part);
        let (name, stored) = self.stored(layer, part, &shape, sharding);
        TensorSpec { layer, part, name, shape, sharding, stored }
    }

    /// Logical shape and cut of a part; zeros where the layer has none such.
    pub(crate) fn shape(&self, layer: Option<usize>, part: Part) -> (Vec<usize>, Sharding) {
        let spec = layer.and_then(|layer| self.layers.get(layer));
        let latent = latent_sizes(spec.map(|spec| &spec.attention));
        let sizes = Sizes::of(spec);
        let Sizes { heads, head_dim, query, kv, attended, width, experts, shared } = sizes;
        let hidden = self.hidden;
        match part {
            Part::Embedding | Part::Head => (vec![self.vocab, hidden], Sharding::Vocab),
            Part::FinalNorm
            | Part::AttentionNorm
            | Part::AttentionPostNorm
            | Part::FeedForwardNorm
            | Part::FeedForwardPostNorm => (vec![hidden], Sharding::Replicated),
            Part::Query => (vec![query, hidden], Sharding::QueryHeads),
            Part::QueryBias => (vec![query], Sharding::QueryHeads),
            Part::Key | Part::Value => (vec![kv, hidden], Sharding::KvHeads),
            Part::KeyBias | Part::ValueBias => (vec![kv], Sharding::KvHeads),
            Part::QueryNorm | Part::KeyNorm => (vec![head_dim], Sharding::Replicated),
            Part::Sinks => (vec![heads], Sharding::QueryHeads),
            Part::QueryDown => (vec![latent.query_rank, hidden], Sharding::Replicated),
            Part::QueryDownNorm => (vec![latent.query_rank], Sharding::Replicated),
            Part::QueryUp => (vec![query, latent.query_rank], Sharding::QueryHeads),
            Part::LatentDown => (vec![latent.down, hidden], Sharding::Replicated),
            Part::LatentNorm => (vec![latent.kv_rank], Sharding::Replicated),
            Part::LatentUp => (vec![latent.up, latent.kv_rank], Sharding::QueryHeads),
            Part::LatentKeyUp => (latent.key_up.to_vec(), Sharding::QueryHeads),
            Part::LatentValueUp => (vec![attended, latent.kv_rank], Sharding::QueryHeads),
            Part::Output => (vec![hidden, attended], Sharding::QueryHeadColumns),
            // Added once, not by every stripe.
            Part::OutputBias | Part::DownBias | Part::ExpertDownBias(_) => {
                (vec![hidden], Sharding::Replicated)
            }
            Part::Gate | Part::Up | Part::ExpertGate(_) | Part::ExpertUp(_) => {
                (vec![width, hidden], Sharding::Width)
            }
            Part::GateBias | Part::UpBias | Part::ExpertGateBias(_) | Part::ExpertUpBias(_) => {
                (vec![width], Sharding::Width)
            }
            Part::Down | Part::ExpertDown(_) => (vec![hidden, width], Sharding::WidthColumns),
            Part::Router => (vec![experts, hidden], Sharding::Replicated),
            Part::RouterBias | Part::RouterCorrection => (vec![experts], Sharding::Replicated),
            Part::SharedGate | Part::SharedUp => (vec![shared, hidden], Sharding::Width),
            Part::SharedDown => (vec![hidden, shared], Sharding::WidthColumns),
            Part::SharedRouter => (vec![1, hidden], Sharding::Replicated),
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
                let parts = expert_parts(experts, 0).into_iter();
                let one: u64 = parts.map(|part| self.entry(Some(number), part).elements()).sum();
                let idle = experts.count.saturating_sub(experts.chosen) as u64;
                total = total.saturating_sub(one.saturating_mul(idle));
            }
        }
        total
    }
}

/// Sizes of a layer that shapes are made of; zero where they do not apply.
#[derive(Default)]
struct Sizes {
    heads: usize,
    head_dim: usize,
    /// Rows of the query projection.
    query: usize,
    /// Rows of the key projection.
    kv: usize,
    /// Columns of the output projection.
    attended: usize,
    width: usize,
    experts: usize,
    shared: usize,
}

impl Sizes {
    fn of(spec: Option<&LayerSpec>) -> Sizes {
        let Some(spec) = spec else {
            return Sizes::default();
        };
        let mut sizes = match &spec.attention {
            Attention::Grouped(Grouped { heads, kv_heads, head_dim, .. }) => Sizes {
                heads: *heads,
                head_dim: *head_dim,
                query: heads * head_dim,
                kv: kv_heads * head_dim,
                attended: heads * head_dim,
                ..Sizes::default()
            },
            Attention::Latent(Latent { heads, nope_dim, rope_dim, value_dim, .. }) => Sizes {
                heads: *heads,
                query: heads * (nope_dim + rope_dim),
                attended: heads * value_dim,
                ..Sizes::default()
            },
        };
        match &spec.feed_forward {
            FeedForward::Dense(dense) => sizes.width = dense.width,
            FeedForward::Experts(experts) => {
                sizes.width = experts.width;
                sizes.experts = experts.count;
                sizes.shared = experts.shared.map_or(0, |shared| shared.width);
            }
        }
        sizes
    }
}

/// Sizes of latent attention; zero for other kinds.
#[derive(Default)]
struct LatentSizes {
    query_rank: usize,
    kv_rank: usize,
    /// Rows of the projection down: latent and shared key.
    down: usize,
    /// Rows of the projection up: keys and values of all heads.
    up: usize,
    /// Rows and columns of the keys' alone, turned over.
    key_up: [usize; 2],
}

fn latent_sizes(attention: Option<&Attention>) -> LatentSizes {
    let Some(Attention::Latent(latent)) = attention else {
        return LatentSizes::default();
    };
    LatentSizes {
        query_rank: latent.query_rank.unwrap_or(0),
        kv_rank: latent.kv_rank,
        down: latent.kv_rank + latent.rope_dim,
        up: latent.heads * (latent.nope_dim + latent.value_dim),
        key_up: [latent.heads * latent.kv_rank, latent.nope_dim],
    }
}

/// The parts of an attention in the order they are used.
fn attention_parts(attention: &Attention) -> Vec<Part> {
    let mut parts = Vec::new();
    match attention {
        Attention::Grouped(grouped) => {
            parts.extend([Part::Query, Part::Key, Part::Value, Part::Output]);
            if grouped.qkv_bias {
                parts.extend([Part::QueryBias, Part::KeyBias, Part::ValueBias]);
            }
            if grouped.out_bias {
                parts.push(Part::OutputBias);
            }
            if grouped.qk_norm {
                parts.extend([Part::QueryNorm, Part::KeyNorm]);
            }
            if grouped.sinks {
                parts.push(Part::Sinks);
            }
        }
        Attention::Latent(latent) => {
            match latent.query_rank {
                None => parts.push(Part::Query),
                Some(_) => parts.extend([Part::QueryDown, Part::QueryDownNorm, Part::QueryUp]),
            }
            parts.extend([Part::LatentDown, Part::LatentNorm]);
            match latent.up {
                LatentUp::Joined => parts.push(Part::LatentUp),
                LatentUp::Split => parts.extend([Part::LatentKeyUp, Part::LatentValueUp]),
            }
            parts.push(Part::Output);
        }
    }
    parts
}

/// The parts of a feed-forward network but those of single experts.
fn feed_forward_parts(feed_forward: &FeedForward) -> Vec<Part> {
    let mut parts = Vec::new();
    match feed_forward {
        FeedForward::Dense(dense) => {
            parts.extend([Part::Gate, Part::Up, Part::Down]);
            if dense.bias {
                parts.extend([Part::GateBias, Part::UpBias, Part::DownBias]);
            }
        }
        FeedForward::Experts(experts) => {
            parts.push(Part::Router);
            if experts.router.bias {
                parts.push(Part::RouterBias);
            }
            if experts.router.correction {
                parts.push(Part::RouterCorrection);
            }
            if let Some(shared) = experts.shared {
                parts.extend([Part::SharedGate, Part::SharedUp, Part::SharedDown]);
                if shared.gated {
                    parts.push(Part::SharedRouter);
                }
            }
        }
    }
    parts
}

/// The parts of one expert.
fn expert_parts(experts: &Experts, id: usize) -> Vec<Part> {
    let mut parts = vec![Part::ExpertGate(id), Part::ExpertUp(id), Part::ExpertDown(id)];
    if experts.bias {
        parts.extend([Part::ExpertGateBias(id), Part::ExpertUpBias(id), Part::ExpertDownBias(id)]);
    }
    parts
}

fn has_part(layer: &LayerSpec, part: Part) -> bool {
    match part {
        Part::AttentionNorm | Part::FeedForwardNorm => true,
        Part::AttentionPostNorm | Part::FeedForwardPostNorm => layer.post_norms,
        Part::ExpertGate(id)
        | Part::ExpertUp(id)
        | Part::ExpertDown(id)
        | Part::ExpertGateBias(id)
        | Part::ExpertUpBias(id)
        | Part::ExpertDownBias(id) => match &layer.feed_forward {
            FeedForward::Experts(experts) => {
                id < experts.count && expert_parts(experts, id).contains(&part)
            }
            FeedForward::Dense(_) => false,
        },
        _ => {
            attention_parts(&layer.attention).contains(&part)
                || feed_forward_parts(&layer.feed_forward).contains(&part)
        }
    }
}
