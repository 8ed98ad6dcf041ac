//! A model that needs no weights and an executor that keeps real paged KV for it.
//!
//! The next token is a hash of all tokens before it, and the executor reads those back through the
//! block table it is given: a block lost, shared or written too early changes the answer.

#![allow(dead_code, reason = "each test binary uses its part")]

use engine::{
    BlockId, EngineConfig, Request, Sampled, Sampling, Scheduler, SeqId, SequenceOutput, Step,
    StepEntry, StepOutput, StopRules, TokenLogprobs, Want,
};

/// The scheduler's limits in these tests, small enough to be hit.
pub(crate) fn config() -> EngineConfig {
    EngineConfig {
        block_tokens: 4,
        blocks: 16,
        context: 48,
        vocab: 97,
        max_sequences: 4,
        step_tokens: 16,
        chunk_tokens: 8,
        waiting_max: 8,
    }
}

/// A request for `max_tokens` greedy tokens and nothing else.
pub(crate) fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        sampling: Sampling::greedy(),
        stop: StopRules { max_tokens, min_tokens: 0, stop_ids: Vec::new() },
        logprobs: None,
        prompt_logprobs: None,
    }
}

/// FNV-1a over token ids, step by step.
fn mix(hash: u64, token: u32) -> u64 {
    (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3).rotate_left(17)
}

const START: u64 = 0xcbf2_9ce4_8422_2325;

/// The hash of a run of tokens.
pub(crate) fn hash(tokens: &[u32]) -> u64 {
    tokens.iter().fold(START, |hash, &token| mix(hash, token))
}

/// The token that follows a prefix with this hash, stepping over what is forbidden.
pub(crate) fn next_token(hash: u64, vocab: usize, forbidden: &[u32]) -> u32 {
    let first = (hash >> 20) as usize % vocab;
    let mut ids = (0..vocab).map(|step| ((first + step) % vocab) as u32);
    ids.find(|id| !forbidden.contains(id)).unwrap_or(first as u32)
}

/// The fake logprobs of a token after a prefix with this hash.
pub(crate) fn scored(hash: u64, token: u32) -> TokenLogprobs {
    TokenLogprobs { token, logprob: -((hash % 1000) as f32), top: Vec::new() }
}

/// What one sequence alone answers, and the stop id that ended it.
pub(crate) fn solo(request: &Request, vocab: usize) -> (Vec<u32>, Option<u32>) {
    let mut tokens = request.prompt.clone();
    let mut generated = Vec::new();
    while generated.len() < request.stop.max_tokens {
        let early = generated.len() < request.stop.min_tokens;
        let forbidden: &[u32] = if early { &request.stop.stop_ids } else { &[] };
        let token = next_token(hash(&tokens), vocab, forbidden);
        tokens.push(token);
        generated.push(token);
        if !early && request.stop.stop_ids.contains(&token) {
            return (generated, Some(token));
        }
    }
    (generated, None)
}

/// A KV slot: whose token at which position it holds.
type Slot = Option<(SeqId, usize, u32)>;

/// Runs steps over paged KV and checks each against the limits.
pub(crate) struct FakeExecutor {
    config: EngineConfig,
    slots: Vec<Slot>,
    /// By sequence: where its next entry has to start if nothing sent it back.
    reached: std::collections::BTreeMap<SeqId, usize>,
    /// Entries that started over.
    pub(crate) restarts: u64,
    /// Tokens run.
    pub(crate) tokens: usize,
}

impl FakeExecutor {
    pub(crate) fn new(config: &EngineConfig) -> Self {
        Self {
            slots: vec![None; config.blocks * config.block_tokens],
            config: config.clone(),
            reached: Default::default(),
            restarts: 0,
            tokens: 0,
        }
    }

    /// Runs a step that must obey every rule of `Step`'s documentation.
    pub(crate) fn run(&mut self, scheduler: &Scheduler, step: &Step) -> StepOutput {
        self.check(step);
        // All writes before all reads: entries of a step run together.
        for entry in &step.entries {
            self.write(entry);
        }
        let outputs = step.entries.iter().map(|entry| self.read(scheduler, entry)).collect();
        StepOutput { number: step.number, outputs }
    }

    fn check(&mut self, step: &Step) {
        assert!(!step.entries.is_empty());
        let tokens: usize = step.entries.iter().map(|entry| entry.tokens.len()).sum();
        assert!(tokens <= self.config.step_tokens, "{tokens} tokens in a step");
        assert!(step.entries.len() <= self.config.max_sequences);
        let mut owned: Vec<BlockId> = Vec::new();
        for entry in &step.entries {
            let end = entry.start + entry.tokens.len();
            assert!((1..=self.config.chunk_tokens).contains(&entry.tokens.len()));
            assert!(end <= self.config.context);
            assert_eq!(entry.blocks.len(), end.div_ceil(self.config.block_tokens));
            assert!(entry.blocks.iter().all(|block| (block.0 as usize) < self.config.blocks));
            owned.extend(&entry.blocks);
            let reached = self.reached.entry(entry.seq).or_insert(0);
            if entry.start != *reached {
                assert_eq!(entry.start, 0, "starts over or goes on, never elsewhere");
                self.restarts += 1;
            }
            *reached = end;
        }
        self.tokens += tokens;
        let count = owned.len();
        owned.sort_unstable();
        owned.dedup();
        assert_eq!(owned.len(), count, "a block in two tables of one step");
    }

    fn slot(&self, entry: &StepEntry, position: usize) -> usize {
        let size = self.config.block_tokens;
        entry.blocks[position / size].0 as usize * size + position % size
    }

    fn write(&mut self, entry: &StepEntry) {
        for (position, &token) in (entry.start..).zip(&entry.tokens) {
            let slot = self.slot(entry, position);
            self.slots[slot] = Some((entry.seq, position, token));
        }
    }

    fn read(&self, scheduler: &Scheduler, entry: &StepEntry) -> SequenceOutput {
        let end = entry.start + entry.tokens.len();
        let context = scheduler.context(entry.seq);
        let mut hash = START;
        let mut prompt_logprobs = Vec::new();
        for position in 0..end {
            let (seq, at, token) = self.slots[self.slot(entry, position)].expect("written");
            assert_eq!((seq, at), (entry.seq, position), "another's block is read");
            hash = mix(hash, token);
            let next = context.and_then(|(request, _)| request.prompt.get(position + 1));
            if let (Want::All, true, Some(&next)) = (entry.want, position >= entry.start, next) {
                prompt_logprobs.push(scored(hash, next));
            }
        }
        let sampled = context.filter(|_| scheduler.samples(entry)).map(|(request, _)| {
            assert_ne!(entry.want, Want::Nothing, "sampling needs logits");
            let forbidden = scheduler.forbidden(entry.seq);
            let token = next_token(hash, self.config.vocab, forbidden);
            Sampled { token, logprobs: request.logprobs.map(|_| scored(hash, token)) }
        });
        SequenceOutput { seq: entry.seq, sampled, prompt_logprobs }
    }
}
