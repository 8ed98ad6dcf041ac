//! The spec: one description of a model that planner, loader and decoder share.

use std::fmt;
use std::str::FromStr;

/// Everything that decides a model's results and its size, read once from its config.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The published architecture family; decides tensor names only.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding and of the output head.
    pub vocab: usize,
    /// Positions the model was made for; prompt plus answer may not exceed it.
    pub context: usize,
    /// Epsilon added to the mean square in every RMS norm.
    pub norm_eps: f32,
    /// The output head is the embedding matrix.
    pub tied: bool,
    /// Layers from the embedding upward.
    pub layers: Vec<LayerSpec>,
    /// Token that starts a sequence, where the config names one.
    pub bos: Option<u32>,
    /// Tokens that end a sequence (`eos_token_id` may be one id or a list).
    pub eos: Vec<u32>,
}

/// The architecture families whose configs and tensor names are understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Llama 1, 2, 3.x (`LlamaForCausalLM`).
    Llama,
    /// Mistral (`MistralForCausalLM`).
    Mistral,
    /// Mixtral (`MixtralForCausalLM`).
    Mixtral,
}

/// One decoder layer: `x += attention(norm(x)); x += feed_forward(norm(x))`.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// How tokens look at each other.
    pub attention: Attention,
    /// How each token is transformed on its own.
    pub feed_forward: FeedForward,
}

/// The attention kinds the decoder walks.
#[derive(Debug, Clone, PartialEq)]
pub enum Attention {
    /// Query heads in groups that share a key and value head.
    Grouped(Grouped),
}

/// Grouped-query attention; query head `h` reads KV head `h / (heads / kv_heads)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Grouped {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of one head; scores are scaled by `head_dim^-0.5`.
    pub head_dim: usize,
    /// The query, key and value projections have biases.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub out_bias: bool,
    /// A key is visible iff `0 <= query - key < window`; `None` sees everything before it.
    pub window: Option<usize>,
    /// Rotary position embedding, half-split ("neox") pairs `(i, i + head_dim/2)`.
    pub rope: Rope,
}

/// Rotary embedding: frequencies `theta^(-2i/head_dim)`, then scaled.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// The base.
    pub theta: f64,
    /// How the frequencies are changed for longer contexts.
    pub scaling: RopeScaling,
}

/// Frequency scalings by their published `rope_type`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// `default`, or no scaling entry.
    None,
    /// `linear`: every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// `llama3`: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths over `original_context / low_freq_factor` are fully divided.
        low_freq_factor: f64,
        /// Wavelengths under `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context of the original training.
        original_context: f64,
    },
}

/// The feed-forward kinds the decoder walks.
#[derive(Debug, Clone, PartialEq)]
pub enum FeedForward {
    /// One gated network: `down(silu(gate(x)) * up(x))`.
    Dense(Dense),
    /// Several gated networks of which each token uses a few.
    Experts(Experts),
}

/// A dense gated feed-forward network.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    /// Inner width.
    pub width: usize,
    /// Gate, up and down have biases.
    pub bias: bool,
}

/// A mixture of experts with a softmax router: probabilities over all experts in f32, the
/// `chosen` largest (ties to the lower id), their probabilities as weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Experts {
    /// Experts per layer.
    pub count: usize,
    /// Experts each token uses.
    pub chosen: usize,
    /// Inner width of one expert.
    pub width: usize,
    /// Weights of the chosen experts are divided by their sum.
    pub renormalise: bool,
}

/// What enters a product: the stored weights and activations are converted to this type,
/// accumulation is always f32. A property of the deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ComputeType {
    /// Weights widened to f32; the mode that is checked against golden references.
    F32,
    /// Weights and activations rounded to bf16 before each product; KV cache in bf16.
    Bf16,
    /// Weights in signed 8-bit blocks of 32 along the inner dimension with f32 scales, activations
    /// quantised the same way per token; embedding, head and router stay bf16; KV cache in bf16.
    Int8,
}

impl ComputeType {
    /// All compute types.
    pub const ALL: [ComputeType; 3] = [ComputeType::F32, ComputeType::Bf16, ComputeType::Int8];

    /// Its name on command lines and in messages.
    pub fn name(self) -> &'static str {
        match self {
            ComputeType::F32 => "f32",
            ComputeType::Bf16 => "bf16",
            ComputeType::Int8 => "int8",
        }
    }
}

impl fmt::Display for ComputeType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Text that names no compute type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("compute type {0:?} is not one of f32, bf16, int8")]
pub struct UnknownComputeType(String);

impl FromStr for ComputeType {
    type Err = UnknownComputeType;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|compute| compute.name() == text);
        found.ok_or_else(|| UnknownComputeType(text.chars().take(32).collect()))
    }
}
