//! Snapshots: made here so that the log stays short, or received so that no gap is replayed.

use raft::eraftpb as rb;

use super::payload::Body;
use super::{
    Batch, Fatal, HardState, LogId, LogStore, Machine, Output, Replica, Snapshot, StoreError,
    convert,
};

/// Bytes of the log at which a snapshot is made whatever its number of entries.
const LOG_BYTES_MAX: u64 = 32 << 20;

/// A received snapshot that the state machine has taken.
pub(super) struct Install {
    pub(super) snapshot: Snapshot,
    body: Body,
}

impl<S: LogStore, M: Machine> Replica<S, M> {
    fn snapshot_index(&self) -> u64 {
        self.raw.store().image().snapshot.as_ref().map_or(0, |snapshot| snapshot.id.index)
    }

    pub(super) fn snapshot_due(&self) -> bool {
        let since = self.applied - self.snapshot_index();
        if since == 0 || self.full {
            return false;
        }
        let shelf = self.raw.store();
        // Joint members would be carried along truly, but the next snapshot soon is one without.
        let regular = !self.members.is_joint()
            && (since >= self.config.snapshot_entries || shelf.bytes() > LOG_BYTES_MAX);
        regular || (shelf.snapshot_wanted() && self.leads())
    }

    /// The state and the members as of the same entry, and the log before it dropped, at once.
    pub(super) fn take_snapshot(&mut self) -> Result<(), Fatal> {
        let image = self.raw.store().image();
        let index = self.applied;
        let missing = StoreError::Batch { what: "a snapshot of an entry that is not stored" };
        let Some(term) = image.term(index) else { return Err(missing.into()) };
        let long = self.raw.store().bytes() > LOG_BYTES_MAX;
        let keep = if long { 0 } else { self.config.keep_entries };
        let floor = index.saturating_sub(keep);
        let compact = (floor > image.base.index)
            .then(|| image.term(floor).map(|term| LogId { index: floor, term }))
            .flatten();
        // At the next start the log must be known committed at least up to the snapshot.
        let commit = self.raw.raft.raft_log.committed.min(image.last().index);
        let hard_state = HardState { commit, ..self.hard_state };
        let removed = self.removed.iter().copied().collect();
        let body = Body { state: self.machine.snapshot(), hash: self.machine.hash(), removed };
        let members = self.members.clone();
        let batch = Batch {
            hard_state: Some(hard_state),
            snapshot: Some(Snapshot { id: LogId { index, term }, members, body: body.encode() }),
            compact,
            ..Batch::default()
        };
        if self.write(&batch)? {
            self.raw.store().snapshot_made();
        } else {
            self.full = true;
        }
        Ok(())
    }

    /// Lets the state machine take a received snapshot before it is stored: one that it cannot
    /// take must not be what this node starts from the next time.
    pub(super) fn prepare(&mut self, snapshot: &rb::Snapshot) -> Result<Option<Install>, Fatal> {
        if snapshot.is_empty() {
            return Ok(None);
        }
        let snapshot = convert::snapshot_from_raft(snapshot);
        let index = snapshot.id.index;
        let body = Body::decode(&snapshot.body).map_err(|_| Fatal::Payload { index })?;
        self.machine.restore(&body.state).map_err(|source| Fatal::Restore { index, source })?;
        if self.machine.hash() != body.hash {
            return Err(Fatal::StateDiverged { index });
        }
        Ok(Some(Install { snapshot, body }))
    }

    /// The snapshot is durable: from here on it is what this node has applied.
    pub(super) fn install(&mut self, install: Install) {
        let Install { snapshot, body } = install;
        self.applied = snapshot.id.index;
        self.removed = body.removed.into_iter().collect();
        self.checks.clear();
        self.record_check(self.applied);
        self.outputs.push(Output::Restored { index: self.applied });
        self.set_members(snapshot.members);
        self.outputs.push(Output::Members(self.members.clone()));
    }
}
