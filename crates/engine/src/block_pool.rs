//! KV blocks by number: which are free, which are taken. Who owns which, the scheduler knows.

use std::collections::BTreeSet;

/// The number of a KV block: `block_tokens` consecutive positions of one sequence, in every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// A fixed number of KV blocks, handed out lowest free number first so that equal histories give
/// equal tables.
#[derive(Debug, Clone)]
pub struct BlockPool {
    total: u32,
    /// Blocks from here on were never handed out. Keeps a pool of millions cheap to create.
    fresh: u32,
    /// Blocks below `fresh` that came back.
    returned: BTreeSet<BlockId>,
}

/// A pool was used against its rules, or lost count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// The block was given back twice, or was never handed out.
    #[error("block {0:?} is given back but is not taken")]
    NotTaken(BlockId),
    /// A free block's number lies where no block was handed out yet.
    #[error("block {0:?} is listed as returned but was never handed out")]
    Stray(BlockId),
    /// More blocks were handed out than exist.
    #[error("{fresh} blocks were handed out and {total} exist")]
    Overrun {
        /// Blocks handed out at least once.
        fresh: usize,
        /// Blocks that exist.
        total: usize,
    },
}

impl BlockPool {
    /// A pool of `total` free blocks, numbered from 0.
    pub fn new(total: u32) -> Self {
        Self { total, fresh: 0, returned: BTreeSet::new() }
    }

    /// Blocks that exist.
    pub fn total(&self) -> usize {
        self.total as usize
    }

    /// Blocks nobody holds.
    pub fn free(&self) -> usize {
        (self.total - self.fresh) as usize + self.returned.len()
    }

    /// Blocks somebody holds.
    pub fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// Whether this block exists and somebody holds it.
    pub fn is_taken(&self, block: BlockId) -> bool {
        block.0 < self.fresh && !self.returned.contains(&block)
    }

    /// Takes the free block with the lowest number; `None` when all are taken.
    pub fn allocate(&mut self) -> Option<BlockId> {
        // Every returned block is below `fresh`, so this order is the order of numbers.
        if let Some(block) = self.returned.pop_first() {
            return Some(block);
        }
        if self.fresh == self.total {
            return None;
        }
        let block = BlockId(self.fresh);
        self.fresh += 1;
        Some(block)
    }

    /// Gives a block back. A block that is not taken is an error and changes nothing.
    pub fn release(&mut self, block: BlockId) -> Result<(), PoolError> {
        if !self.is_taken(block) {
            return Err(PoolError::NotTaken(block));
        }
        self.returned.insert(block);
        Ok(())
    }

    /// Whether the pool's own books are in order.
    pub fn check(&self) -> Result<(), PoolError> {
        if self.fresh > self.total {
            return Err(PoolError::Overrun { fresh: self.fresh as usize, total: self.total() });
        }
        match self.returned.last() {
            Some(&block) if block.0 >= self.fresh => Err(PoolError::Stray(block)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hands_out_the_lowest_free_number() {
        let mut pool = BlockPool::new(4);
        let taken: Vec<u32> = (0..3).map(|_| pool.allocate().unwrap().0).collect();
        assert_eq!(taken, [0, 1, 2]);
        pool.release(BlockId(1)).unwrap();
        pool.release(BlockId(0)).unwrap();
        let again: Vec<u32> = (0..3).map(|_| pool.allocate().unwrap().0).collect();
        assert_eq!(again, [0, 1, 3]);
        assert_eq!(pool.allocate(), None);
        assert_eq!((pool.used(), pool.free(), pool.total()), (4, 0, 4));
    }

    #[test]
    fn refuses_what_is_not_taken() {
        let mut pool = BlockPool::new(2);
        let block = pool.allocate().unwrap();
        assert_eq!(pool.release(BlockId(1)), Err(PoolError::NotTaken(BlockId(1))));
        assert_eq!(pool.release(BlockId(9)), Err(PoolError::NotTaken(BlockId(9))));
        pool.release(block).unwrap();
        assert_eq!(pool.release(block), Err(PoolError::NotTaken(block)));
        assert_eq!((pool.used(), pool.free()), (0, 2));
    }

    #[test]
    fn check_sees_broken_books() {
        let mut pool = BlockPool::new(2);
        assert_eq!(pool.check(), Ok(()));
        pool.returned.insert(BlockId(1));
        assert_eq!(pool.check(), Err(PoolError::Stray(BlockId(1))));
        pool.returned.clear();
        pool.fresh = 3;
        assert_eq!(pool.check(), Err(PoolError::Overrun { fresh: 3, total: 2 }));
    }
}
