//! Whether the books are in order: for tests after each operation, in production when idle.

use std::collections::{BTreeMap, BTreeSet};

use super::{Planned, Scheduler};
use crate::block_pool::PoolError;
use crate::{BlockId, SeqId};

/// What is wrong with a scheduler's books. Always a defect of the scheduler itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IntegrityError {
    /// The pool's own books are broken.
    #[error("the block pool is broken: {0}")]
    Pool(#[from] PoolError),
    /// A block is in two tables, or twice in one.
    #[error("block {} belongs to sequences {} and {}", .block.0, .first.0, .second.0)]
    SharedBlock {
        /// The block.
        block: BlockId,
        /// One owner.
        first: SeqId,
        /// The other; may be the same.
        second: SeqId,
    },
    /// A block in a table is free or does not exist.
    #[error("block {} of sequence {} is not taken", .block.0, .seq.0)]
    FreeBlockOwned {
        /// The block.
        block: BlockId,
        /// Its owner.
        seq: SeqId,
    },
    /// Blocks are taken and in no table.
    #[error("{used} blocks are taken and tables hold {owned}")]
    LostBlocks {
        /// Taken by the pool's count.
        used: usize,
        /// In tables.
        owned: usize,
    },
    /// A table is longer or shorter than its sequence's positions need.
    #[error("sequence {} holds {got} blocks and needs {expected}", .seq.0)]
    TableLength {
        /// The sequence.
        seq: SeqId,
        /// Blocks its positions need.
        expected: usize,
        /// Blocks it holds.
        got: usize,
    },
    /// A sequence is in none or both of the queue and the running set, or a listed one is gone.
    #[error("{live} sequences are live, {waiting} wait and {running} run")]
    Listing {
        /// Live sequences.
        live: usize,
        /// Waiting ones.
        waiting: usize,
        /// Running ones.
        running: usize,
    },
    /// A waiting sequence arrived before a running one.
    #[error("sequence {} waits and the younger {} runs", .waiting.0, .running.0)]
    OutOfOrder {
        /// Who waits.
        waiting: SeqId,
        /// Who runs.
        running: SeqId,
    },
    /// More sequences run than may.
    #[error("{running} sequences run and {max} may")]
    TooManyRunning {
        /// Running sequences.
        running: usize,
        /// The limit.
        max: usize,
    },
    /// A sequence's state contradicts itself or the step in flight.
    #[error("sequence {}: {what}", .seq.0)]
    Sequence {
        /// The sequence.
        seq: SeqId,
        /// What is wrong.
        what: &'static str,
    },
}

impl Scheduler {
    /// Checks all books: every block is free or in exactly one table, tables are exactly as long
    /// as their positions need, every live sequence either waits or runs, and the step in flight
    /// names running sequences where they stand. O(blocks in use + live sequences).
    pub fn check_integrity(&self) -> Result<(), IntegrityError> {
        self.pool.check()?;
        self.check_listing()?;
        self.check_tables()?;
        self.check_in_flight()
    }

    fn check_listing(&self) -> Result<(), IntegrityError> {
        let live = self.sequences.len();
        let (waiting, running) = (self.waiting.len(), self.running.len());
        let mut listed = self.waiting.iter().chain(&self.running);
        if waiting + running != live || !listed.all(|seq| self.sequences.contains_key(seq)) {
            return Err(IntegrityError::Listing { live, waiting, running });
        }
        // Also excludes a sequence that is in both.
        if let (Some(&waiting), Some(&running)) = (self.waiting.first(), self.running.last())
            && waiting <= running
        {
            return Err(IntegrityError::OutOfOrder { waiting, running });
        }
        let max = self.config.max_sequences;
        if running > max {
            return Err(IntegrityError::TooManyRunning { running, max });
        }
        Ok(())
    }

    fn check_tables(&self) -> Result<(), IntegrityError> {
        let flying: BTreeMap<SeqId, &Planned> = self.planned().map(|p| (p.seq, p)).collect();
        let mut owners: BTreeMap<BlockId, SeqId> = BTreeMap::new();
        for (&seq, sequence) in &self.sequences {
            let positions = flying.get(&seq).map_or(sequence.computed, |planned| planned.end());
            let (expected, got) = (self.config.blocks_for(positions), sequence.blocks.len());
            if expected != got {
                return Err(IntegrityError::TableLength { seq, expected, got });
            }
            for &block in &sequence.blocks {
                if let Some(first) = owners.insert(block, seq) {
                    return Err(IntegrityError::SharedBlock { block, first, second: seq });
                }
                if !self.pool.is_taken(block) {
                    return Err(IntegrityError::FreeBlockOwned { block, seq });
                }
            }
        }
        let (used, owned) = (self.pool.used(), owners.len());
        if used != owned { Err(IntegrityError::LostBlocks { used, owned }) } else { Ok(()) }
    }

    fn check_in_flight(&self) -> Result<(), IntegrityError> {
        let broken = |seq, what| Err(IntegrityError::Sequence { seq, what });
        let mut seen = BTreeSet::new();
        for planned in self.planned() {
            let seq = planned.seq;
            let Some(sequence) = self.sequences.get(&seq) else {
                return broken(seq, "is in flight and not live");
            };
            if !self.running.contains(&seq) {
                return broken(seq, "is in flight and does not run");
            }
            if planned.start != sequence.computed || planned.end() > sequence.known() {
                return broken(seq, "is in flight at other positions than it stands at");
            }
            if !seen.insert(seq) {
                return broken(seq, "is in flight twice");
            }
        }
        for (&seq, sequence) in &self.sequences {
            if sequence.computed >= sequence.known() {
                return broken(seq, "has nothing left to run and is live");
            }
            if sequence.cancelled && !seen.contains(&seq) {
                return broken(seq, "is cancelled, not in flight and live");
            }
            if self.waiting.contains(&seq) && sequence.computed != 0 {
                return broken(seq, "waits and has computed positions");
            }
        }
        Ok(())
    }

    fn planned(&self) -> impl Iterator<Item = &Planned> {
        self.in_flight.iter().flat_map(|step| &step.entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EngineConfig, Request, Sampling, StopRules};

    /// Sequences 0 and 1 run with two blocks each and are in flight; 2 waits.
    fn scheduler() -> Scheduler {
        let config = EngineConfig {
            block_tokens: 4,
            blocks: 8,
            context: 32,
            vocab: 10,
            max_sequences: 2,
            step_tokens: 16,
            chunk_tokens: 8,
            waiting_max: 4,
        };
        let sampling = Sampling::greedy();
        let stop = StopRules { max_tokens: 2, min_tokens: 0, stop_ids: Vec::new() };
        let request =
            Request { prompt: vec![1; 5], sampling, stop, logprobs: None, prompt_logprobs: None };
        let mut scheduler = Scheduler::new(config).unwrap();
        for _ in 0..3 {
            scheduler.submit(request.clone()).unwrap();
        }
        assert_eq!(scheduler.schedule().map(|step| step.entries.len()), Some(2));
        scheduler
    }

    fn broken(damage: impl FnOnce(&mut Scheduler)) -> String {
        let mut scheduler = scheduler();
        assert_eq!(scheduler.check_integrity(), Ok(()));
        damage(&mut scheduler);
        scheduler.check_integrity().expect_err("the damage is seen").to_string()
    }

    fn table(scheduler: &mut Scheduler, seq: u64) -> &mut Vec<BlockId> {
        &mut scheduler.sequences.get_mut(&SeqId(seq)).unwrap().blocks
    }

    #[test]
    fn damage_to_blocks_is_seen() {
        let shared = broken(|s| table(s, 1)[0] = BlockId(0));
        assert_eq!(shared, "block 0 belongs to sequences 0 and 1");
        let twice = broken(|s| table(s, 1)[0] = BlockId(3));
        assert_eq!(twice, "block 3 belongs to sequences 1 and 1");
        let free = broken(|s| s.pool.release(BlockId(2)).unwrap());
        assert_eq!(free, "block 2 of sequence 1 is not taken");
        let lost = broken(|s| assert!(s.pool.allocate().is_some()));
        assert_eq!(lost, "5 blocks are taken and tables hold 4");
        let short = broken(|s| table(s, 0).truncate(1));
        assert_eq!(short, "sequence 0 holds 1 blocks and needs 2");
    }

    #[test]
    fn damage_to_lists_is_seen() {
        let gone = broken(|s| s.waiting.clear());
        assert_eq!(gone, "3 sequences are live, 0 wait and 2 run");
        let unknown = broken(|s| {
            s.waiting.pop_first();
            s.waiting.insert(SeqId(9));
        });
        assert_eq!(unknown, "3 sequences are live, 1 wait and 2 run");
        let order = broken(|s| {
            s.running.remove(&SeqId(0));
            s.waiting.insert(SeqId(0));
        });
        assert_eq!(order, "sequence 0 waits and the younger 1 runs");
        let many = broken(|s| {
            s.waiting.remove(&SeqId(2));
            s.running.insert(SeqId(2));
        });
        assert_eq!(many, "3 sequences run and 2 may");
    }

    #[test]
    fn damage_to_sequences_is_seen() {
        let twice = broken(|s| {
            let entries = &mut s.in_flight.as_mut().unwrap().entries;
            entries.push(entries[0]);
        });
        assert_eq!(twice, "sequence 0: is in flight twice");
        let moved = broken(|s| s.sequences.get_mut(&SeqId(1)).unwrap().computed = 1);
        assert_eq!(moved, "sequence 1: is in flight at other positions than it stands at");
        let cancelled = broken(|s| s.sequences.get_mut(&SeqId(2)).unwrap().cancelled = true);
        assert_eq!(cancelled, "sequence 2: is cancelled, not in flight and live");
        let done = broken(|s| {
            s.in_flight = None;
            s.sequences.get_mut(&SeqId(0)).unwrap().computed = 5;
            s.sequences.get_mut(&SeqId(1)).unwrap().computed = 5;
        });
        assert_eq!(done, "sequence 0: has nothing left to run and is live");
    }
}
