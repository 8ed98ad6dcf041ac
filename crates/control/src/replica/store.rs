//! What must survive: the log, the hard state, the newest snapshot. One trait, one atomic write.

use super::members::MemberSet;

/// A position in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogId {
    /// Index of the entry; 0 is before the first.
    pub index: u64,
    /// Term in which it was proposed.
    pub term: u64,
}

/// What an entry is to consensus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// Empty, or a payload of ours.
    Normal,
    /// A change of members; one without data leaves joint consensus.
    Change,
}

/// One entry of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Its position.
    pub id: LogId,
    /// Its kind.
    pub kind: EntryKind,
    /// Its content, encoded.
    pub data: Vec<u8>,
    /// Who waits for its outcome, encoded; empty when nobody does.
    pub context: Vec<u8>,
}

/// What a node must not forget: its term, its vote, and how far it knows the log committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HardState {
    /// Current term.
    pub term: u64,
    /// Whom it voted for in that term; 0 for nobody.
    pub vote: u64,
    /// Known to be committed.
    pub commit: u64,
}

/// The state machine after an entry, with the members as of the same entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The last entry it contains.
    pub id: LogId,
    /// The members as of that entry.
    pub members: MemberSet,
    /// The state, its hash and the removed members, encoded.
    pub body: Vec<u8>,
}

/// One change to what is durable: all of it or nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// The new hard state.
    pub hard_state: Option<HardState>,
    /// Entries to append, consecutive; everything at and after the first one's index goes first.
    pub entries: Vec<LogEntry>,
    /// The new snapshot; the one before it is dropped.
    pub snapshot: Option<Snapshot>,
    /// The whole log is dropped (before `entries`) and continues after the snapshot: it came from
    /// a leader, and this log is not known to agree with it.
    pub reset: bool,
    /// Entries up to this one are dropped; it is remembered as the log's base.
    pub compact: Option<LogId>,
    /// How often this node has started.
    pub boot: Option<u64>,
}

/// What a store holds; also the whole of it in memory, and the definition of what a batch does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogImage {
    /// How often this node has started; 0 for a new store.
    pub boot: u64,
    /// Zeros for a new store.
    pub hard_state: HardState,
    /// The newest snapshot.
    pub snapshot: Option<Snapshot>,
    /// The entry before the first one in `entries`.
    pub base: LogId,
    /// Consecutive entries after `base`.
    pub entries: Vec<LogEntry>,
}

impl LogImage {
    /// Whether nothing was ever written.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Position of the last entry, or of the base when there is none.
    pub fn last(&self) -> LogId {
        self.entries.last().map_or(self.base, |entry| entry.id)
    }

    /// Where in `entries` the entry of `index` stands; its length for the index after the last.
    pub(super) fn offset(&self, index: u64) -> Option<usize> {
        let offset = usize::try_from(index.checked_sub(self.base.index + 1)?).ok()?;
        (offset <= self.entries.len()).then_some(offset)
    }

    /// The term of the entry at `index`, the base included.
    pub fn term(&self, index: u64) -> Option<u64> {
        if index == self.base.index {
            return Some(self.base.term);
        }
        self.entries.get(self.offset(index)?).map(|entry| entry.id.term)
    }

    /// Does what the batch says. A batch that was made for another image is refused whole.
    ///
    /// # Errors
    /// [`StoreError::Batch`].
    pub fn apply(&mut self, batch: &Batch) -> Result<(), StoreError> {
        let base = match (&batch.snapshot, batch.reset) {
            (Some(snapshot), true) => snapshot.id,
            (None, true) => return Err(StoreError::Batch { what: "a reset without a snapshot" }),
            _ => self.base,
        };
        let keep = self.check(batch, base)?;
        if let Some(state) = batch.hard_state {
            self.hard_state = state;
        }
        if let Some(boot) = batch.boot {
            self.boot = boot;
        }
        if let Some(snapshot) = &batch.snapshot {
            self.snapshot = Some(snapshot.clone());
        }
        self.base = base;
        self.entries.truncate(keep);
        self.entries.extend(batch.entries.iter().cloned());
        if let Some(compact) = batch.compact
            && let Some(offset) = self.offset(compact.index + 1)
        {
            self.entries.drain(..offset);
            self.base = compact;
        }
        Ok(())
    }

    /// How many of today's entries stay under the batch.
    fn check(&self, batch: &Batch, base: LogId) -> Result<usize, StoreError> {
        let consecutive =
            batch.entries.windows(2).all(|two| two[0].id.index + 1 == two[1].id.index);
        if !consecutive {
            return Err(StoreError::Batch { what: "entries that are not consecutive" });
        }
        let len = if batch.reset { 0 } else { self.entries.len() };
        let Some(first) = batch.entries.first() else { return Ok(len) };
        let gap = StoreError::Batch { what: "entries that leave a gap" };
        let Some(offset) = first.id.index.checked_sub(base.index + 1) else { return Err(gap) };
        match usize::try_from(offset) {
            Ok(offset) if offset <= len => Ok(offset),
            _ => Err(gap),
        }
    }

    /// Whether it is what a sequence of batches can have left.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`], naming the part that does not fit.
    pub fn verify(&self) -> Result<(), StoreError> {
        let corrupt = |what: String| Err(StoreError::Corrupt { what });
        let mut before = self.base;
        for entry in &self.entries {
            if entry.id.index != before.index + 1 {
                return corrupt(format!("log entry {}: missing", before.index + 1));
            }
            if entry.id.term < before.term {
                return corrupt(format!(
                    "log entry {}: its term is below the one before",
                    entry.id.index
                ));
            }
            before = entry.id;
        }
        if let Some(snapshot) = &self.snapshot {
            let index = snapshot.id.index;
            let fits = self.base.index <= index && index <= before.index;
            if !fits || self.term(index) != Some(snapshot.id.term) {
                return corrupt("snapshot: it does not stand within the log".to_owned());
            }
        } else if self.base != LogId::default() {
            return corrupt("snapshot: missing although the log was compacted".to_owned());
        }
        let floor = self.snapshot.as_ref().map_or(0, |snapshot| snapshot.id.index);
        let commit = self.hard_state.commit;
        if commit < floor || commit > before.index || self.hard_state.term < before.term {
            return corrupt("hard state: it does not fit the log".to_owned());
        }
        Ok(())
    }
}

/// Why a store could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No room. Nothing of the batch is durable; the store works on and may be asked again.
    #[error("no room on the disk")]
    Full,
    /// What is stored is not what was written.
    #[error("the store is corrupt: {what}")]
    Corrupt {
        /// Which part.
        what: String,
    },
    /// The batch does not fit what is stored: a defect of the caller.
    #[error("the batch does not fit the store: {what}")]
    Batch {
        /// What does not fit.
        what: &'static str,
    },
    /// Anything else the disk said. The process must end: whether the last write is durable is not
    /// known, and asking again would not tell (a failed fsync drops what it could not write).
    #[error("the disk failed: {0}")]
    Io(#[from] std::io::Error),
}

/// A durable log. Reading happens once, at the start; what is written since then is held in memory
/// by the replica too, which compaction keeps small.
pub trait LogStore {
    /// Everything that is durable, verified.
    ///
    /// # Errors
    /// [`StoreError`].
    fn load(&mut self) -> Result<LogImage, StoreError>;

    /// Makes the batch durable (synced to the disk) before it returns, whole or not at all.
    ///
    /// # Errors
    /// [`StoreError::Full`] leaves everything as it was; any other error ends the process.
    fn write(&mut self, batch: &Batch) -> Result<(), StoreError>;

    /// Whether the store lives on its reserve: writes still succeed, but nothing should be added
    /// that need not be.
    fn is_low(&self) -> bool {
        false
    }

    /// Tries to get the reserve back; called about once a second while the store is low or full.
    ///
    /// # Errors
    /// [`StoreError`] other than `Full`; no room is not an error here.
    fn probe(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
}
