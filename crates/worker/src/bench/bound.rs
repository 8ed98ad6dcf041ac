//! What a machine's limits allow for a case: the longer of reading and arithmetic.

use compute::MachineLimits;
use model::{Attention, ComputeType, FeedForward, LayerSpec, ModelSpec};
use planner::stripes;

use super::Case;

/// The least time that one step can take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// Tokens of the step.
    pub tokens: usize,
    /// Bytes of weights and cache that it reads, each once.
    pub bytes: f64,
    /// Arithmetic operations in products and attention, two per multiply-add.
    pub operations: f64,
    /// Seconds that reading takes.
    pub reading: f64,
    /// Seconds that arithmetic takes.
    pub arithmetic: f64,
}

impl Bound {
    pub(crate) fn new(
        spec: &ModelSpec,
        compute: ComputeType,
        case: Case,
        limits: &MachineLimits,
    ) -> Self {
        // Rows, rows with logits, and the positions that each row sees on average.
        let (tokens, logits, seen, sequences) = match case {
            Case::Prefill { tokens } => (tokens, 1, tokens as f64 / 2.0, 0),
            Case::Decode { sequences, context } => {
                (sequences, sequences, context as f64, sequences)
            }
        };
        let edge = (spec.vocab * spec.hidden) as f64;
        let layers = products(spec) * tokens as f64;
        let attention: f64 = spec.layers.iter().map(|l| attention(l, seen)).sum();
        let (head, attention) = (2.0 * edge * logits as f64, attention * tokens as f64);
        let cached = stripes::kv_bytes(spec, 1, &[0], compute, 1, 1) as f64 * seen;
        let bytes = weights(spec, compute, tokens) + cached * sequences as f64;
        // Head and attention stay in floating point.
        let rate = match compute {
            ComputeType::F32 | ComputeType::Bf16 => limits.float,
            ComputeType::Int8 | ComputeType::Int4 => limits.int8,
        };
        Self {
            tokens,
            bytes,
            operations: layers + head + attention,
            reading: bytes / limits.read,
            arithmetic: layers / rate + (head + attention) / limits.float,
        }
    }

    /// Tokens per second.
    pub fn rate(&self) -> f64 {
        self.tokens as f64 / self.reading.max(self.arithmetic)
    }
}

/// Operations of one token in the layers' products.
fn products(spec: &ModelSpec) -> f64 {
    let edges = spec.vocab * spec.hidden * if spec.tied { 1 } else { 2 };
    2.0 * spec.active_parameters().saturating_sub(edges as u64) as f64
}

/// Operations of one token that sees so many positions in one layer: scores and values.
fn attention(layer: &LayerSpec, seen: f64) -> f64 {
    let (widths, window) = match &layer.attention {
        Attention::Grouped(a) => (2 * a.heads * a.head_dim, a.window),
        // Absorbed: every head multiplies whole latents.
        Attention::Latent(a) => (a.heads * (2 * a.kv_rank + a.rope_dim), None),
    };
    let seen = window.map_or(seen, |window| seen.min(window as f64));
    2.0 * widths as f64 * seen
}

/// Bytes of weights that a step of so many tokens reads, each once: all but the embedding, and of
/// the experts those that the tokens choose, if they choose evenly.
fn weights(spec: &ModelSpec, compute: ComputeType, tokens: usize) -> f64 {
    let all = stripes::weight_bytes(spec, 1, &[0], compute) as f64;
    let edge = (spec.vocab * spec.hidden) as f64;
    let embedding = if spec.tied { 0.0 } else { edge * edge_bytes(compute) };
    let idle: f64 = spec.layers.iter().map(|layer| idle_experts(spec, layer, tokens)).sum();
    all - embedding - idle * element_bytes(compute)
}

/// Elements of a layer's experts that no token chooses, on average.
fn idle_experts(spec: &ModelSpec, layer: &LayerSpec, tokens: usize) -> f64 {
    match &layer.feed_forward {
        FeedForward::Dense(_) => 0.0,
        FeedForward::Experts(experts) => {
            let passed_over = 1.0 - experts.chosen as f64 / experts.count as f64;
            let elements = experts.count * 3 * experts.width * spec.hidden;
            elements as f64 * passed_over.powf(tokens as f64)
        }
    }
}

/// Bytes of one element of a layer's matrix, its share of the scales included.
fn element_bytes(compute: ComputeType) -> f64 {
    match compute {
        ComputeType::F32 => 4.0,
        ComputeType::Bf16 => 2.0,
        ComputeType::Int8 => 36.0 / 32.0,
        ComputeType::Int4 => 20.0 / 32.0,
    }
}

/// Bytes of one element of embedding and head.
fn edge_bytes(compute: ComputeType) -> f64 {
    if compute == ComputeType::F32 { 4.0 } else { 2.0 }
}
