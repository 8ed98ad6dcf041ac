//! What a caller asks of the engine: token ids in, rules for the tokens that come out.

use crate::FinishReason;

/// A running generation's number within one scheduler; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// One sequence to generate. Derived from ids alone, so that it can be resumed anywhere.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Prompt token ids; at least one.
    pub prompt: Vec<u32>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// When generation ends.
    pub stop: StopRules,
    /// Report the sampled token's logprob and this many most likely alternatives (0 to 20).
    pub logprobs: Option<u8>,
    /// Report logprobs of the prompt's own tokens likewise.
    pub prompt_logprobs: Option<u8>,
}

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy (ties to the lower id). Finite, not negative.
    pub temperature: f32,
    /// Keep the `k` most likely; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; in (0, 1].
    pub top_p: f32,
    /// Drop tokens under this share of the most likely one's probability; in [0, 1].
    pub min_p: f32,
    /// Divides positive, multiplies negative logits of tokens seen in prompt or answer; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted per occurrence of a token in the answer.
    pub frequency_penalty: f32,
    /// Subtracted once for a token that occurs in the answer.
    pub presence_penalty: f32,
    /// Added to logits by token id, before everything else; ascending ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Keys the counter-based generator together with `choice` and the position.
    pub seed: u64,
    /// Which of a request's `n` choices this sequence is.
    pub choice: u32,
}

impl Sampling {
    /// The most likely token each time, nothing changed.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            choice: 0,
        }
    }
}

/// When generation ends; stop strings are the gateway's business.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopRules {
    /// Most tokens to generate; 0 only evaluates the prompt.
    pub max_tokens: usize,
    /// Tokens that may not end the answer earlier than this many tokens.
    pub min_tokens: usize,
    /// Ids that end the answer (the model's eos ids unless ignored, and the caller's stop ids).
    pub stop_ids: Vec<u32>,
}

impl StopRules {
    /// Why an answer of these tokens is whole; `None` while it goes on. An answer of no tokens
    /// that may have none ends with its prompt, which is not for the rules to see.
    pub fn reached(&self, generated: &[u32]) -> Option<FinishReason> {
        let (&id, before) = generated.split_last()?;
        if before.len() >= self.min_tokens && self.stop_ids.contains(&id) {
            return Some(FinishReason::Stop { id });
        }
        (generated.len() >= self.max_tokens).then_some(FinishReason::Length)
    }
}

/// How far a sequence had come elsewhere, before it is continued here. Empty for a fresh one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resume {
    /// Tokens of the answer that were delivered.
    pub generated: Vec<u32>,
    /// Prompt tokens `1..=scored` had their logprobs delivered.
    pub scored: usize,
}

/// Why a request was not taken. Each has a stable name for metrics and logs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// The prompt holds no token.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// Prompt and answer do not fit the context.
    #[error(
        "prompt of {prompt} tokens plus {max_tokens} to generate exceeds the context of {context}"
    )]
    TooLong {
        /// Prompt tokens.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// The limit.
        context: usize,
    },
    /// Prompt and answer can never fit the KV blocks that exist.
    #[error("the sequence needs {needed} KV blocks and there are {total}")]
    TooFewBlocks {
        /// Blocks the sequence may need.
        needed: usize,
        /// Blocks that exist.
        total: usize,
    },
    /// A token id lies outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// The vocabulary's size.
        vocab: usize,
    },
    /// A sampling parameter is out of its range.
    #[error("{field} is out of range")]
    BadSampling {
        /// The parameter.
        field: &'static str,
    },
    /// What is to be continued cannot have been.
    #[error("the answer so far cannot be continued: {field} does not fit the request")]
    BadResume {
        /// The part of it.
        field: &'static str,
    },
    /// The waiting queue is full.
    #[error("{waiting} requests are waiting already")]
    QueueFull {
        /// Requests in the queue.
        waiting: usize,
    },
}
