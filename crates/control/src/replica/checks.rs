//! State hashes: every replica remembers its own at the same entries, and the leader's is compared.

use std::collections::BTreeMap;

/// How many of its own hashes a replica remembers.
const KEPT: usize = 8;

/// Hashes of this replica's state.
#[derive(Debug)]
pub(super) struct Checks {
    every: u64,
    hashes: BTreeMap<u64, [u8; 32]>,
    /// The newest entry whose hash was proposed or compared.
    newest: u64,
}

impl Checks {
    /// Every so many entries; 0 for never. At each entry is not possible: the comparison is one.
    pub(super) fn new(every: u64) -> Self {
        let every = if every == 0 { 0 } else { every.max(2) };
        Self { every, hashes: BTreeMap::new(), newest: 0 }
    }

    pub(super) fn due(&self, index: u64) -> bool {
        self.every != 0 && index.is_multiple_of(self.every)
    }

    pub(super) fn record(&mut self, index: u64, hash: [u8; 32]) {
        self.hashes.insert(index, hash);
        while self.hashes.len() > KEPT {
            self.hashes.pop_first();
        }
    }

    /// A snapshot replaced the state: what came before says nothing about it.
    pub(super) fn clear(&mut self) {
        self.hashes.clear();
    }

    /// A hash that a leader has not told yet.
    pub(super) fn untold(&self) -> Option<(u64, [u8; 32])> {
        let (index, hash) = self.hashes.last_key_value()?;
        (*index > self.newest).then_some((*index, *hash))
    }

    pub(super) fn told(&mut self, index: u64) {
        self.newest = self.newest.max(index);
    }

    /// Whether the leader's hash may be ours. One that is not remembered says nothing.
    pub(super) fn agrees(&mut self, index: u64, hash: &[u8; 32]) -> bool {
        self.told(index);
        self.hashes.get(&index).is_none_or(|ours| ours == hash)
    }
}
