//! One live sequence: its tokens, how many of them are computed, and its block table.

use crate::{BlockId, Request, Resume, Want};

#[derive(Debug, Clone)]
pub(super) struct Sequence {
    pub(super) request: Request,
    /// Tokens sampled and delivered.
    pub(super) generated: Vec<u32>,
    /// Positions whose keys and values are in `blocks`.
    pub(super) computed: usize,
    /// Position `p` lives in `blocks[p / block_tokens]`.
    pub(super) blocks: Vec<BlockId>,
    /// Prompt tokens `1..=scored` had their logprobs delivered; recomputation repeats none.
    pub(super) scored: usize,
    /// Cancelled while in flight: lives on only until the step returns.
    pub(super) cancelled: bool,
}

impl Sequence {
    pub(super) fn new(request: Request, so_far: Resume) -> Self {
        Self {
            request,
            generated: so_far.generated,
            computed: 0,
            blocks: Vec::new(),
            scored: so_far.scored,
            cancelled: false,
        }
    }

    /// Prompt and answer so far.
    pub(super) fn known(&self) -> usize {
        self.request.prompt.len() + self.generated.len()
    }

    /// Known tokens that still have to be run; at least one while the sequence lives.
    pub(super) fn pending(&self) -> usize {
        self.known() - self.computed
    }

    /// The known tokens at positions `start..start + len`.
    pub(super) fn tokens(&self, start: usize, len: usize) -> Vec<u32> {
        let prompt = &self.request.prompt;
        let split = prompt.len();
        let end = start + len;
        let mut tokens = Vec::with_capacity(len);
        tokens.extend_from_slice(&prompt[start.min(split)..end.min(split)]);
        tokens.extend_from_slice(&self.generated[start.max(split) - split..end.max(split) - split]);
        tokens
    }

    /// Whether a token is sampled after position `end - 1`.
    pub(super) fn samples_at(&self, end: usize) -> bool {
        end == self.known() && self.request.stop.max_tokens > 0
    }

    /// Whether the next token may end the answer.
    pub(super) fn may_stop(&self) -> bool {
        self.generated.len() >= self.request.stop.min_tokens
    }

    /// Prompt tokens that an entry over `start..end` gives logprobs for: those that follow one of
    /// its tokens.
    pub(super) fn scored_by(&self, start: usize, end: usize) -> std::ops::Range<usize> {
        let last = self.request.prompt.len();
        start + 1..(end + 1).min(last).max(start + 1)
    }

    /// At which tokens of the entry `start..end` logits are wanted.
    pub(super) fn want(&self, start: usize, end: usize) -> Want {
        let scores = self.scored_by(start, end);
        if self.request.prompt_logprobs.is_some() && scores.end > scores.start.max(self.scored + 1)
        {
            Want::All
        } else if self.samples_at(end) {
            Want::Last
        } else {
            Want::Nothing
        }
    }
}

/// Positions that a request can fill: the last token of an answer is never run.
pub(super) fn positions_max(request: &Request) -> usize {
    let prompt = request.prompt.len();
    prompt.saturating_add(request.stop.max_tokens.saturating_sub(1))
}
