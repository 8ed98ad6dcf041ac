//! The spec: one description of a model that planner, loader and decoder share.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Everything that decides a model's results and its size, read once from its config.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// The published architecture family; decides tensor names and how they are fused only.
    pub family: Family,
    /// What the projections of the checkpoint are stored in.
    pub format: Format,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding and of the output head.
    pub vocab: usize,
    /// Positions the model was made for; prompt plus answer may not exceed it.
    pub context: usize,
    /// Epsilon added to the mean square in every RMS norm.
    pub norm_eps: f32,
    /// Every norm weight is stored as `w - 1` (Gemma).
    pub norm_plus_one: bool,
    /// Embeddings are multiplied by this before the first layer.
    pub embedding_scale: Option<f32>,
    /// What a branch gives is multiplied by this before it is added to the stream (Granite).
    pub branch_scale: Option<f32>,
    /// Logits are multiplied by this, before the cap (Granite).
    pub logit_scale: Option<f32>,
    /// Logits become `cap * tanh(logit / cap)`.
    pub logit_softcap: Option<f32>,
    /// The output head is the embedding matrix.
    pub tied: bool,
    /// Layers from the embedding upward.
    #[serde(with = "crate::stack")]
    pub layers: Vec<LayerSpec>,
    /// Token that starts a sequence, where the config names one.
    pub bos: Option<u32>,
    /// Tokens that end a sequence (`eos_token_id` may be one id or a list).
    pub eos: Vec<u32>,
    /// Stored tensors whose names start so are not part of the plain forward pass (layers that
    /// predict further tokens).
    pub ignored_prefixes: Vec<String>,
}

/// The architecture families whose configs and tensor names are understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Family {
    /// DeepSeek V2 and V2-Lite (`DeepseekV2ForCausalLM`).
    DeepseekV2,
    /// DeepSeek V3 and R1 (`DeepseekV3ForCausalLM`).
    DeepseekV3,
    /// Gemma 2 (`Gemma2ForCausalLM`).
    Gemma2,
    /// Gemma 3, text only (`Gemma3ForCausalLM`).
    Gemma3Text,
    /// gpt-oss (`GptOssForCausalLM`).
    GptOss,
    /// Granite 3 without experts (`GraniteForCausalLM`).
    Granite,
    /// Llama 1, 2, 3.x (`LlamaForCausalLM`).
    Llama,
    /// Mistral (`MistralForCausalLM`).
    Mistral,
    /// Mixtral (`MixtralForCausalLM`).
    Mixtral,
    /// Phi-3 (`Phi3ForCausalLM`).
    Phi3,
    /// Qwen 2 and 2.5 (`Qwen2ForCausalLM`).
    Qwen2,
    /// Qwen 1.5 and 2 with experts (`Qwen2MoeForCausalLM`).
    Qwen2Moe,
    /// Qwen 3 (`Qwen3ForCausalLM`).
    Qwen3,
    /// Qwen 3 with experts (`Qwen3MoeForCausalLM`).
    Qwen3Moe,
}

/// What the projections of a checkpoint are stored in. Which of them are, `TensorSpec::stored`
/// says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Format {
    /// f32, f16 or bf16.
    Plain,
    /// All projections of the layers but routers in FP8 E4M3 with an f32 scale for every block of
    /// 128 x 128.
    Fp8Blocks,
    /// The experts' projections in MXFP4: 4-bit floats with a scale for every 32 of a row.
    Mxfp4,
    /// Each tensor in the type that its GGUF file says.
    Gguf(GgufFormat),
    /// The layers' projections in 4-bit integers, with a scale and a zero for each group of inputs
    /// and each output.
    Int4(Int4Format),
}

impl Format {
    /// Inputs of one output that share a scale, at the most: rows are best cut between them.
    pub fn block(self) -> usize {
        match self {
            Format::Plain => 1,
            Format::Fp8Blocks => 128,
            Format::Mxfp4 => 32,
            Format::Gguf(gguf) => gguf.block,
            Format::Int4(int4) => int4.group.unwrap_or(1),
        }
    }
}

/// What of a GGUF file's types matters to a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GgufFormat {
    /// The largest block of any tensor whose rows are cut; 1 where all are plain.
    pub block: usize,
}

/// How 4-bit integers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Int4Format {
    /// How they are packed.
    pub packing: Int4Packing,
    /// Inputs that share a scale and a zero; `None` for all of them.
    pub group: Option<usize>,
}

/// The two published ways of packing 4-bit integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Int4Packing {
    /// AWQ: words hold eight outputs, out of order.
    Awq,
    /// GPTQ: words hold eight inputs in order.
    Gptq {
        /// Zeros are stored less one (the format's first version).
        zeros_less_one: bool,
        /// Inputs belong to groups by a list, `g_idx`, instead of in order.
        listed: bool,
    },
}

/// One decoder layer: `x += attention(norm(x)); x += feed_forward(norm(x))`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSpec {
    /// How tokens look at each other.
    pub attention: Attention,
    /// How each token is transformed on its own.
    pub feed_forward: FeedForward,
    /// The outputs of both branches are normed before they are added (Gemma 2, 3).
    pub post_norms: bool,
}

/// The attention kinds the decoder walks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Attention {
    /// Query heads in groups that share a key and value head.
    Grouped(Grouped),
    /// Query heads that all read one compressed vector per token (MLA).
    Latent(Latent),
}

impl Attention {
    /// Query heads.
    pub fn heads(&self) -> usize {
        match self {
            Attention::Grouped(grouped) => grouped.heads,
            Attention::Latent(latent) => latent.heads,
        }
    }
}

/// Grouped-query attention; query head `h` reads KV head `h / (heads / kv_heads)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grouped {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// The query, key and value projections have biases.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub out_bias: bool,
    /// Each head of query and key is RMS-normed over its `head_dim`, before rope.
    pub qk_norm: bool,
    /// One learned logit per query head joins the softmax and gives no value.
    pub sinks: bool,
    /// Scores become `cap * tanh(score / cap)`, after the scale and before the mask.
    pub softcap: Option<f32>,
    /// Products of query and key are multiplied by this; `head_dim^-0.5` in most models.
    pub scale: f32,
    /// A key is visible iff `0 <= query - key < window`; `None` sees everything before it.
    pub window: Option<usize>,
    /// Rotary position embedding of query and key.
    pub rope: Rope,
}

/// Multi-head latent attention. Per token one normed latent of `kv_rank` and one rotated key of
/// `rope_dim`, shared by all heads; a head's key is `[W_UK latent | rotated key]`, its value
/// `W_UV latent`. A head's rows are `[nope | rope]` in the query projection and `[W_UK | W_UV]`
/// in `Part::LatentUp`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latent {
    /// Query heads.
    pub heads: usize,
    /// Width of the query's own latent; `None` projects queries directly.
    pub query_rank: Option<usize>,
    /// Width of the latent that keys and values come from.
    pub kv_rank: usize,
    /// Query and key columns per head without position.
    pub nope_dim: usize,
    /// Query columns per head, and columns of the shared key, that are rotated.
    pub rope_dim: usize,
    /// Value columns per head.
    pub value_dim: usize,
    /// Products of query and key are multiplied by this.
    pub scale: f32,
    /// Rotary position embedding of the `rope_dim` columns.
    pub rope: Rope,
    /// How `W_UK` and `W_UV` are stored; specs written before there was a choice do not say.
    #[serde(default)]
    pub up: LatentUp,
}

/// How the projections up from the key-value latent are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LatentUp {
    #[default]
    /// As one matrix, `Part::LatentUp`.
    Joined,
    /// By themselves and that of the keys turned over, `Part::LatentKeyUp` and
    /// `Part::LatentValueUp` (newer GGUF files).
    Split,
}

/// Rotary embedding: frequencies `theta^(-2i/dims)`, then scaled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// The base.
    pub theta: f64,
    /// Rotated columns, even: the first of a head (`Grouped`), or `rope_dim` (`Latent`).
    pub dims: usize,
    /// Which columns turn together.
    pub pairs: Pairs,
    /// How the frequencies are changed for longer contexts.
    pub scaling: RopeScaling,
}

/// Which columns of the rotated ones turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Pairs {
    /// `(i, i + dims / 2)`.
    Halves,
    /// `(2i, 2i + 1)`.
    Interleaved,
}

/// Frequency scalings by their published `rope_type`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// `default`, or no scaling entry.
    None,
    /// `linear`: every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Every frequency divided by a number of its own.
    Divided {
        /// By pair of columns: the divisor.
        by: Vec<f32>,
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
    /// `yarn`: columns that turn more than `beta_fast` times in the original context keep their
    /// frequency, those that turn less than `beta_slow` times are divided, a ramp between.
    Yarn {
        /// Divisor of the slow columns' frequencies.
        factor: f64,
        /// Context of the original training.
        original_context: f64,
        /// Turns above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which a frequency is fully divided.
        beta_slow: f64,
        /// The ramp's ends are rounded outward to whole columns.
        truncate: bool,
        /// Multiplies cosine and sine. The attention scale already holds whatever else the
        /// config asks for.
        magnitude: f32,
    },
}

/// The feed-forward kinds the decoder walks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FeedForward {
    /// One gated network: `down(activation(gate(x), up(x)))`.
    Dense(Dense),
    /// Several gated networks of which each token uses a few.
    Experts(Experts),
}

/// How a gated network joins gate `g` and up `u`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Activation {
    /// `silu(g) * u`.
    Silu,
    /// `gelu(g) * u`, gelu by its tanh form.
    GeluTanh,
    /// `(u + 1) * g * sigmoid(alpha * g)` with `g = min(g, limit)`, `u = clamp(u, -limit, limit)`.
    ClampedSwiglu {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// The clamp.
        limit: f32,
    },
}

/// A dense gated feed-forward network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dense {
    /// Inner width.
    pub width: usize,
    /// Gate, up and down have biases.
    pub bias: bool,
    /// How gate and up are joined.
    pub activation: Activation,
}

/// A mixture of experts: the weighted sum of the chosen ones, and of the shared one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// Experts per layer.
    pub count: usize,
    /// Experts each token uses; at most `count`.
    pub chosen: usize,
    /// Inner width of one expert.
    pub width: usize,
    /// Gate, up and down of every expert have biases.
    pub bias: bool,
    /// How gate and up are joined, in the shared expert too.
    pub activation: Activation,
    /// How experts are chosen and weighted.
    pub router: Router,
    /// A network that every token uses besides.
    pub shared: Option<Shared>,
}

/// How experts are chosen and weighted, in f32; ties go to the lower id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Router {
    /// From logits to scores; the `chosen` largest win and their scores are the weights.
    pub score: Score,
    /// Weights of the chosen experts are divided by their sum.
    pub renormalise: bool,
    /// Weights are multiplied by this at last.
    pub scale: f32,
    /// Only experts of the best groups may be chosen.
    pub groups: Option<Groups>,
    /// A bias is added to the logits.
    pub bias: bool,
    /// `e_score_correction_bias` is added to the scores for the choice, not for the weights.
    pub correction: bool,
}

impl Router {
    /// Scores as they are: no groups, no biases, weights neither renormalised nor scaled.
    pub fn plain(score: Score) -> Router {
        Router {
            score,
            renormalise: false,
            scale: 1.0,
            groups: None,
            bias: false,
            correction: false,
        }
    }
}

/// From router logits to scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// The largest logits win; softmax over them alone.
    SoftmaxOfChosen,
    /// Sigmoid of each logit.
    Sigmoid,
}

/// Experts in `count` groups of equal size, by ascending id; only `chosen` groups may win.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Groups {
    /// Groups; a divisor of the experts.
    pub count: usize,
    /// Groups that stay, fewer than `count`.
    pub chosen: usize,
    /// What a group is worth.
    pub by: GroupScore,
}

/// What a group of experts is worth, and what the scores of the other groups become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum GroupScore {
    /// Its largest score; other groups' scores become 0.0.
    Max,
    /// The sum of its two largest (corrected) scores; other groups' become minus infinity.
    TopTwoSum,
}

/// A gated network beside the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shared {
    /// Inner width; of several shared experts together.
    pub width: usize,
    /// Its output is multiplied by `sigmoid(x . g)`, `g` being `Part::SharedRouter` (Qwen2-MoE).
    pub gated: bool,
}

/// What enters a product: the stored weights and activations are converted to this type,
/// accumulation is always f32. A property of the deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ComputeType {
    /// Weights widened to f32; the mode that is checked against golden references.
    F32,
    /// Weights and activations rounded to bf16 before each product; KV cache in bf16.
    Bf16,
    /// Weights in signed 8-bit blocks of 32 along the inner dimension with f32 scales, activations
    /// quantised the same way per token; embedding, head and router stay bf16; KV cache in bf16.
    Int8,
    /// As `Int8`, with the weights of the layers' projections in signed 4-bit blocks of 32.
    Int4,
}

impl ComputeType {
    /// All compute types.
    pub const ALL: [ComputeType; 4] =
        [ComputeType::F32, ComputeType::Bf16, ComputeType::Int8, ComputeType::Int4];

    /// Its name on command lines and in messages.
    pub fn name(self) -> &'static str {
        match self {
            ComputeType::F32 => "f32",
            ComputeType::Bf16 => "bf16",
            ComputeType::Int8 => "int8",
            ComputeType::Int4 => "int4",
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
#[error("compute type {0:?} is not one of f32, bf16, int8, int4")]
pub struct UnknownComputeType(String);

impl FromStr for ComputeType {
    type Err = UnknownComputeType;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|compute| compute.name() == text);
        found.ok_or_else(|| UnknownComputeType(text.chars().take(32).collect()))
    }
}
