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
