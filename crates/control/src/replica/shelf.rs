//! The log as consensus reads it: a copy in memory of what the store holds, never ahead of it.

use std::cell::Cell;

use planner::NodeId;
use raft::eraftpb as rb;
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

use super::convert;
use super::store::{Batch, LogImage, LogStore, StoreError};

/// A store and what it holds.
#[derive(Debug)]
pub(super) struct Shelf<S> {
    store: S,
    image: LogImage,
    /// Bytes of the entries in the image.
    bytes: u64,
    /// Consensus needs a newer snapshot than there is: one that names the node it is for.
    wanted: Cell<bool>,
}

fn size(entry: &super::store::LogEntry) -> u64 {
    (entry.data.len() + entry.context.len() + 12) as u64
}

impl<S: LogStore> Shelf<S> {
    pub(super) fn new(store: S, image: LogImage) -> Self {
        let bytes = image.entries.iter().map(size).sum();
        Self { store, image, bytes, wanted: Cell::new(false) }
    }

    /// Durable first, then visible.
    pub(super) fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        self.store.write(batch)?;
        self.image.apply(batch)?;
        self.bytes = self.image.entries.iter().map(size).sum();
        Ok(())
    }

    pub(super) fn image(&self) -> &LogImage {
        &self.image
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn snapshot_wanted(&self) -> bool {
        self.wanted.get()
    }

    pub(super) fn snapshot_made(&self) {
        self.wanted.set(false);
    }

    pub(super) fn store(&self) -> &S {
        &self.store
    }

    pub(super) fn store_mut(&mut self) -> &mut S {
        &mut self.store
    }

    pub(super) fn into_store(self) -> S {
        self.store
    }
}

impl<S> Storage for Shelf<S> {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let members = self.image.snapshot.as_ref().map(|snapshot| &snapshot.members);
        Ok(RaftState {
            hard_state: convert::hard_state_to_raft(&self.image.hard_state),
            conf_state: members.map(convert::members_to_raft).unwrap_or_default(),
        })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<rb::Entry>> {
        let Some(from) = self.image.offset(low) else {
            return Err(StorageError::Compacted.into());
        };
        let Some(to) = self.image.offset(high) else {
            return Err(StorageError::Unavailable.into());
        };
        let limit = max_size.into().unwrap_or(u64::MAX);
        let mut sum = 0;
        // At least one, whatever its size.
        let fits = self.image.entries[from..to].iter().enumerate().take_while(|(at, entry)| {
            sum += size(entry);
            *at == 0 || sum <= limit
        });
        Ok(fits.map(|(_, entry)| convert::entry_to_raft(entry)).collect())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        match self.image.term(index) {
            Some(term) => Ok(term),
            None if index < self.image.base.index => Err(StorageError::Compacted.into()),
            None => Err(StorageError::Unavailable.into()),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.image.base.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.image.last().index)
    }

    /// A node ignores a snapshot whose members do not name it, and the leader would send the same
    /// one for ever: so a snapshot that does not name `to` is none, and a new one is made.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<rb::Snapshot> {
        match &self.image.snapshot {
            Some(snapshot)
                if snapshot.id.index >= request_index && snapshot.members.contains(NodeId(to)) =>
            {
                Ok(convert::snapshot_to_raft(snapshot))
            }
            _ => {
                self.wanted.set(true);
                Err(StorageError::SnapshotTemporarilyUnavailable.into())
            }
        }
    }
}
