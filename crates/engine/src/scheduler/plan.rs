//! Filling the next step: decode tokens first, then prefill chunks, then newcomers.

use super::sequence::{Sequence, positions_max};
use super::{InFlight, Planned, Scheduler};
use crate::{SeqId, Step, StepEntry};

/// A step while it is filled.
struct Batch {
    entries: Vec<Planned>,
    /// Tokens that still fit.
    room: usize,
}

impl Scheduler {
    /// The next step, or `None` while a step is in flight or when nothing is live.
    ///
    /// Decode tokens of all running sequences come first, oldest first, then prefill chunks of
    /// running sequences, then newcomers in arrival order while blocks, `max_sequences` and the
    /// step's tokens allow. Where a running sequence needs a block and none is free, the youngest
    /// running one is preempted, so the oldest always gets on.
    pub fn schedule(&mut self) -> Option<Step> {
        if self.in_flight.is_some() {
            return None;
        }
        let mut batch = Batch { entries: Vec::new(), room: self.config.step_tokens };
        let running: Vec<SeqId> = self.running.iter().copied().collect();
        for decodes in [true, false] {
            for &seq in &running {
                // An older one may have preempted it meanwhile.
                if self.running.contains(&seq) && decodes == (self.sequence(seq).pending() == 1) {
                    self.extend(seq, &mut batch);
                }
            }
        }
        self.admit(&mut batch);
        if batch.entries.is_empty() {
            debug_assert!(self.sequences.is_empty(), "the oldest sequence always gets on");
            return None;
        }
        let number = self.next_step;
        self.next_step += 1;
        let entries = batch.entries.iter().map(|planned| self.entry(planned)).collect();
        self.in_flight = Some(InFlight { number, entries: batch.entries });
        Some(Step { number, entries })
    }

    /// The step in flight failed: forgets it and sends every running sequence back to be computed
    /// again; the tokens known so far stay. Returns how many sequences were sent back.
    ///
    /// All of them, not only the step's: a failure says nothing about what devices still hold.
    /// Without a step in flight this does the same, for a group that lost its KV while idle.
    pub fn abandon(&mut self) -> usize {
        self.in_flight = None;
        let running: Vec<SeqId> = self.running.iter().copied().collect();
        let mut sent_back = 0;
        for seq in running {
            if self.sequence(seq).cancelled {
                self.remove(seq);
            } else {
                self.send_back(seq);
                sent_back += 1;
            }
        }
        sent_back
    }

    /// Gives a running sequence its next tokens in the step, as many as fit.
    fn extend(&mut self, seq: SeqId, batch: &mut Batch) {
        let sequence = self.sequence(seq);
        let start = sequence.computed;
        let len = sequence.pending().min(self.config.chunk_tokens).min(batch.room);
        if len == 0 || !self.reach(seq, start + len, batch) {
            return;
        }
        let want = self.sequence(seq).want(start, start + len);
        batch.room -= len;
        batch.entries.push(Planned { seq, start, len, want });
    }

    /// Lengthens a running sequence's table to hold `end` positions, preempting from the youngest
    /// up where blocks lack. False when the sequence itself was the youngest and is preempted.
    fn reach(&mut self, seq: SeqId, end: usize, batch: &mut Batch) -> bool {
        let needed = self.config.blocks_for(end);
        while self.sequence(seq).blocks.len() < needed {
            if let Some(block) = self.pool.allocate() {
                self.sequence_mut(seq).blocks.push(block);
                continue;
            }
            let &youngest = self.running.last().expect("the sequence itself runs");
            self.preempt(youngest, batch);
            if youngest == seq {
                return false;
            }
        }
        true
    }

    fn preempt(&mut self, seq: SeqId, batch: &mut Batch) {
        self.send_back(seq);
        self.preemptions += 1;
        // An older sequence's prefill chunk may push out a younger one that was to decode.
        if let Some(index) = batch.entries.iter().rposition(|entry| entry.seq == seq) {
            batch.room += batch.entries.remove(index).len;
        }
    }

    /// Lets waiting sequences run, in arrival order, until one does not fit.
    ///
    /// The watermark: a newcomer is let in only if after all its known tokens, and those of every
    /// running sequence, there is still one more block for each of them that may grow. So whoever
    /// is let in is not pushed out again within the next `block_tokens` steps by growth alone,
    /// and two prompts never prefill against each other for blocks that only one can have. Nor does
    /// a sequence come back in the step that preempts it: part of its blocks went to another, so
    /// fewer are free than it needs.
    fn admit(&mut self, batch: &mut Batch) {
        let promised: usize = self
            .running
            .iter()
            .map(|&seq| self.sequence(seq))
            .map(|sequence| self.blocks_ahead(sequence) - sequence.blocks.len())
            .sum();
        let mut free = self.pool.free().saturating_sub(promised);
        while batch.room > 0 && self.running.len() < self.config.max_sequences {
            let Some(&seq) = self.waiting.first() else { break };
            let needed = self.blocks_ahead(self.sequence(seq));
            if needed > free {
                break;
            }
            free -= needed;
            self.waiting.remove(&seq);
            self.running.insert(seq);
            self.extend(seq, batch);
        }
    }

    /// Blocks that a sequence holds once its known tokens are computed, and one more if it may
    /// grow into it. Never above what `submit` checked against the pool, so a sequence that is
    /// alone always fits.
    fn blocks_ahead(&self, sequence: &Sequence) -> usize {
        let known = self.config.blocks_for(sequence.known());
        let last = self.config.blocks_for(positions_max(&sequence.request));
        (known + 1).min(last)
    }

    fn entry(&self, planned: &Planned) -> StepEntry {
        let sequence = self.sequence(planned.seq);
        StepEntry {
            seq: planned.seq,
            start: planned.start,
            tokens: sequence.tokens(planned.start, planned.len),
            blocks: sequence.blocks.clone(),
            want: planned.want,
        }
    }

    fn sequence(&self, seq: SeqId) -> &Sequence {
        self.sequences.get(&seq).expect("only live sequences are listed")
    }

    fn sequence_mut(&mut self, seq: SeqId) -> &mut Sequence {
        self.sequences.get_mut(&seq).expect("only live sequences are listed")
    }
}
