//! Who runs in the next step: sequences, their blocks, and the order in which both are given out.
//!
//! Sequences are numbered in arrival order and served in it. Whoever runs arrived before whoever
//! waits; preemption takes the youngest that runs, so that stays true and "the front of the queue"
//! is simply the lowest number that waits. A sequence that is preempted loses its blocks and its
//! computed positions, never its tokens: they are prefilled again like a longer prompt.

mod commit;
mod integrity;
mod plan;
mod sequence;
mod submit;

use std::collections::{BTreeMap, BTreeSet};

pub use commit::{CommitError, Event, FinishReason};
pub use integrity::IntegrityError;

use crate::{BlockPool, ConfigError, EngineConfig, Request, SeqId, StepEntry, Want};
use sequence::Sequence;

/// Continuous batching over paged KV. See the crate's page for the loop that drives it.
#[derive(Debug, Clone)]
pub struct Scheduler {
    config: EngineConfig,
    pool: BlockPool,
    /// Every live sequence.
    sequences: BTreeMap<SeqId, Sequence>,
    /// Live sequences without blocks, in arrival order.
    waiting: BTreeSet<SeqId>,
    /// Live sequences with blocks, in arrival order; all arrived before those that wait.
    running: BTreeSet<SeqId>,
    in_flight: Option<InFlight>,
    next_seq: u64,
    next_step: u64,
    preemptions: u64,
    steps: u64,
}

/// The step that was handed out and not yet committed.
#[derive(Debug, Clone)]
struct InFlight {
    number: u64,
    /// In the step's order.
    entries: Vec<Planned>,
}

/// An entry without its tokens: what commit needs to know of it.
#[derive(Debug, Clone, Copy)]
struct Planned {
    seq: SeqId,
    start: usize,
    len: usize,
    want: Want,
}

impl Planned {
    /// The position after the entry's last.
    fn end(&self) -> usize {
        self.start + self.len
    }
}

/// The scheduler's counts at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Sequences that wait for blocks, preempted ones included.
    pub waiting: usize,
    /// Sequences that hold blocks.
    pub running: usize,
    /// Blocks taken.
    pub blocks_used: usize,
    /// Blocks that exist.
    pub blocks_total: usize,
    /// Preemptions since the start.
    pub preemptions: u64,
    /// Steps committed since the start.
    pub steps: u64,
}

impl Scheduler {
    /// An idle scheduler whose blocks are all free.
    pub fn new(config: EngineConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        let blocks = u32::try_from(config.blocks)
            .map_err(|_| ConfigError::TooMany { field: "blocks", value: config.blocks })?;
        Ok(Self {
            pool: BlockPool::new(blocks),
            config,
            sequences: BTreeMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            in_flight: None,
            next_seq: 0,
            // From 1, so that a default-built output never passes for a real one.
            next_step: 1,
            preemptions: 0,
            steps: 0,
        })
    }

    /// The limits this scheduler was made with.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Ends a sequence without an event. False when it is not live (any more).
    ///
    /// Its blocks are free at once, except while a step that writes to them is in flight: then at
    /// that step's commit, and what the step gives for it is dropped.
    pub fn cancel(&mut self, seq: SeqId) -> bool {
        let in_step = self.is_in_flight(seq);
        match self.sequences.get_mut(&seq) {
            None => false,
            Some(sequence) if sequence.cancelled => false,
            Some(sequence) if in_step => {
                sequence.cancelled = true;
                true
            }
            Some(_) => {
                self.remove(seq);
                true
            }
        }
    }

    /// A live sequence's request and the tokens generated so far: what choosing the next needs.
    pub fn context(&self, seq: SeqId) -> Option<(&Request, &[u32])> {
        let sequence = self.live(seq)?;
        Some((&sequence.request, &sequence.generated))
    }

    /// Ids that may not be sampled next: the stop ids while the answer is shorter than its
    /// `min_tokens`, else none.
    pub fn forbidden(&self, seq: SeqId) -> &[u32] {
        match self.live(seq) {
            Some(sequence) if !sequence.may_stop() => &sequence.request.stop.stop_ids,
            _ => &[],
        }
    }

    /// Whether this entry of the step in flight ends its sequence's known tokens, so that the next
    /// token is sampled. False for a sequence cancelled meanwhile: nothing is needed for it.
    pub fn samples(&self, entry: &StepEntry) -> bool {
        self.live(entry.seq)
            .is_some_and(|sequence| sequence.samples_at(entry.start + entry.tokens.len()))
    }

    /// The counts now.
    pub fn counts(&self) -> Counts {
        Counts {
            waiting: self.waiting.len(),
            running: self.running.len(),
            blocks_used: self.pool.used(),
            blocks_total: self.pool.total(),
            preemptions: self.preemptions,
            steps: self.steps,
        }
    }

    /// Whether no sequence is live: every block is free then.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    fn live(&self, seq: SeqId) -> Option<&Sequence> {
        self.sequences.get(&seq).filter(|sequence| !sequence.cancelled)
    }

    fn is_in_flight(&self, seq: SeqId) -> bool {
        let entries = self.in_flight.iter().flat_map(|step| &step.entries);
        entries.into_iter().any(|entry| entry.seq == seq)
    }

    /// Forgets a sequence and frees its blocks.
    fn remove(&mut self, seq: SeqId) {
        self.release_blocks(seq);
        self.waiting.remove(&seq);
        self.running.remove(&seq);
        self.sequences.remove(&seq);
    }

    /// Takes a sequence's blocks away; its tokens stay and have to be computed again.
    fn send_back(&mut self, seq: SeqId) {
        self.release_blocks(seq);
        self.running.remove(&seq);
        self.waiting.insert(seq);
    }

    fn release_blocks(&mut self, seq: SeqId) {
        let sequence = self.sequences.get_mut(&seq).expect("only live sequences are listed");
        sequence.computed = 0;
        for block in sequence.blocks.drain(..) {
            self.pool.release(block).expect("a sequence's blocks are taken");
        }
    }
}
