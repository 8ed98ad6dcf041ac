//! One forward pass over a batch of sequences, and what comes back from it.

use crate::{BlockId, SeqId};

/// One forward pass: every rank of a group receives the same step.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Step {
    /// Counts up by one per step within a scheduler.
    pub number: u64,
    /// Sequences of this step. Prefill chunks and single decode tokens may mix.
    pub entries: Vec<StepEntry>,
}

/// One sequence's part of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepEntry {
    /// The sequence.
    pub seq: SeqId,
    /// Position of `tokens[0]` in the sequence.
    pub start: usize,
    /// Tokens to run, at positions `start..start + tokens.len()`; never empty.
    pub tokens: Vec<u32>,
    /// The sequence's block table: position `p` lives in `blocks[p / block_tokens]`; covers
    /// every position up to the end of `tokens`.
    pub blocks: Vec<BlockId>,
    /// At which of `tokens` logits are wanted.
    pub want: Want,
}

/// At which tokens of an entry logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// A prefill chunk after which nothing is sampled and of which no logprobs are due.
    Nothing,
    /// After the last token: the next one is sampled.
    Last,
    /// After every token: prompt logprobs. The next token is sampled only where the entry
    /// reaches the sequence's end, which the scheduler knows.
    All,
}

/// What running a step gave, in the order of its entries.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepOutput {
    /// The step's number.
    pub number: u64,
    /// One per entry.
    pub outputs: Vec<SequenceOutput>,
}

/// One entry's results.
#[derive(Debug, Clone, PartialEq)]
pub struct SequenceOutput {
    /// The sequence.
    pub seq: SeqId,
    /// The sampled token, where [`crate::Scheduler::samples`] says that the entry samples.
    pub sampled: Option<Sampled>,
    /// For `Want::All`: one per prompt token `start + 1 + i` that follows a token of the entry and
    /// lies inside the prompt, in position order.
    pub prompt_logprobs: Vec<TokenLogprobs>,
}

/// A sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its logprobs, where asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Natural-log probabilities over the full vocabulary, before temperature and penalties.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token in question.
    pub token: u32,
    /// Its logprob.
    pub logprob: f32,
    /// The most likely tokens, best first (ties to the lower id), as many as asked for.
    pub top: Vec<(u32, f32)>,
}
