//! What the gateway is told at start: names, model files and the limits of a request.

use std::time::Duration;

/// Everything [`crate::serve`] needs beside its listener and the cluster's view.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Names that requests may use; the first is the own deployment's and the one listed. What
    /// the cluster knows a name as comes before them.
    pub served_names: Vec<String>,
    /// The models whose deployments are served, by their names and aliases; at least one, and the
    /// first one is that of the own deployment.
    pub models: Vec<ServedModel>,
    /// What one request may ask for.
    pub limits: RequestLimits,
}

/// A model as a gateway knows it.
#[derive(Debug, Clone)]
pub struct ServedModel {
    /// blake3 of the model directory.
    pub digest: String,
    /// The tokenizer and what belongs to it, as read from the model directory.
    pub files: ModelFiles,
    /// Most tokens of prompt and answer together, where no deployment says.
    pub context: usize,
    /// Size of the model's vocabulary; token ids in requests must lie below it.
    pub vocab: usize,
    /// The id that opens a text, where the model has one: `bos_token` of chat templates where
    /// `tokenizer_config.json` names none.
    pub bos: Option<u32>,
    /// Ids that end an answer unless the request says `ignore_eos`.
    pub eos: Vec<u32>,
}

/// Contents of the files beside the weights. Untrusted: nothing in them is executed but the
/// chat template, and that under limits.
#[derive(Debug, Clone, Default)]
pub struct ModelFiles {
    /// `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<String>,
    /// `chat_template.jinja`; wins over the one in `tokenizer_config.json`.
    pub chat_template: Option<String>,
    /// `generation_config.json`: defaults of the sampling parameters.
    pub generation_config: Option<String>,
}

/// Caps that hold before memory is spent on a request.
#[derive(Debug, Clone)]
pub struct RequestLimits {
    /// Bytes of a request body.
    pub body_bytes: usize,
    /// Choices per prompt.
    pub choices: usize,
    /// Prompts in one completions request.
    pub batch: usize,
    /// Choices over all prompts of one request.
    pub sequences: usize,
    /// Stop strings.
    pub stops: usize,
    /// Bytes of one stop string.
    pub stop_bytes: usize,
    /// Stop token ids.
    pub stop_ids: usize,
    /// Entries of `logit_bias`.
    pub logit_bias: usize,
    /// Messages in a chat.
    pub messages: usize,
    /// Steps that a chat template may take; 64 bytes of data that it makes count as one, so this
    /// bounds its memory too (`bounded` names what is bounded otherwise, and what is not).
    pub template_fuel: u64,
    /// Bytes that a chat template may write.
    pub template_bytes: usize,
    /// Tokenising jobs that run at once; others wait.
    pub tokenizing: usize,
    /// Open connections. For a further one the oldest without an open request gives way; where
    /// all have one, it is answered 503.
    pub connections: usize,
    /// How long a client may take to send a request's head, from the connection's begin or from
    /// the answer before.
    pub head_timeout: Duration,
    /// How long a client may take to send a request's body.
    pub receive_timeout: Duration,
    /// Bytes of request bodies over all connections, counted as they arrive.
    pub bodies_bytes: usize,
    /// How long a request waits for room for its body before it is answered 503.
    pub room_timeout: Duration,
    /// How long a client may take to make room for more of an answer.
    pub send_timeout: Duration,
    /// How long a request waits for a group while that is repaired: at its begin, and whenever it
    /// has lost one. Then it ends with an error.
    pub patience: Duration,
    /// How long open answers may go on after shutdown was asked for.
    pub drain: Duration,
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self {
            body_bytes: 4 << 20,
            choices: 8,
            batch: 64,
            sequences: 128,
            stops: 16,
            stop_bytes: 256,
            stop_ids: 128,
            logit_bias: 1024,
            messages: 4096,
            template_fuel: 2_000_000,
            template_bytes: 8 << 20,
            tokenizing: 2,
            connections: 1024,
            head_timeout: Duration::from_secs(10),
            receive_timeout: Duration::from_secs(30),
            bodies_bytes: 256 << 20,
            room_timeout: Duration::from_secs(5),
            send_timeout: Duration::from_secs(60),
            patience: Duration::from_secs(60),
            drain: Duration::from_secs(10),
        }
    }
}

/// Why the gateway could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// No name to serve under.
    #[error("the list of served model names is empty")]
    NoName,
    /// No model to serve.
    #[error("the list of served models is empty")]
    NoModel,
    /// `tokenizer.json` cannot be used.
    #[error("tokenizer.json cannot be used: {reason}")]
    Tokenizer {
        /// What is wrong with it.
        reason: String,
    },
    /// A JSON file beside the weights is broken.
    #[error("{file} cannot be used: {reason}")]
    ModelFile {
        /// The file's plain name.
        file: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The chat template does not parse.
    #[error("the chat template in {file} cannot be used: {reason}")]
    Template {
        /// The plain name of the file that it stands in.
        file: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A thread that watches over the process cannot be had.
    #[error("a thread cannot be started")]
    Thread(#[source] std::io::Error),
    /// The listening socket failed.
    #[error("the listening socket failed")]
    Listen(#[source] std::io::Error),
}
