//! A disk that outlives the process that writes it, and fails in the ways that disks do.
//!
//! What is stored is a [`LogImage`], and a write is what [`LogImage::apply`] says: atomic, as the
//! real store makes it. In some runs the real store itself stands on a disk of bytes that get lost
//! and torn (`bytes.rs`), and the image here says what it must hold.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use control::replica::{
    Batch, EntryKind, LogEntry, LogId, LogImage, LogStore, RedbStore, StoreError,
};

use super::bytes::Bytes;
use super::rng::Rng;

/// A disk that does not do what it says: what the checkers are tested with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// Nothing is synced: a crash loses any number of the last writes.
    NeverSynced,
    /// A write returns before its sync: a crash loses the last one.
    SyncedLate,
    /// The vote is not stored with the term.
    VoteForgotten,
}

/// When power fails, counted in writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Writes that still succeed.
    pub after: u64,
    /// Whether the one that fails is durable all the same.
    pub durable: bool,
}

/// What lies on the disk, and what is wrong with it.
#[derive(Debug, Default)]
struct State {
    /// What was written.
    image: LogImage,
    /// Writes that a crash may take back, and the image without them, on a lying disk.
    unsynced: Vec<Batch>,
    synced: LogImage,
    lie: Option<Lie>,
    /// Power fails then.
    cut: Option<Cut>,
    /// Power has failed.
    dead: bool,
    full: bool,
    /// What was damaged.
    damage: Option<String>,
    /// Writes since the world last looked.
    writes: u64,
    /// Digests of entries written since then.
    entries: Vec<(LogId, u64)>,
    /// Where the real store keeps its bytes, in runs that use it.
    file: Option<Bytes>,
    /// What was being written as the power failed: it may be there or not.
    torn: Option<Batch>,
    /// What the real store did that no store may.
    wrong: Option<String>,
}

/// The disk as the world holds it.
#[derive(Debug, Clone, Default)]
pub struct Platter(Rc<RefCell<State>>);

/// The disk as a process holds it.
#[derive(Debug)]
pub struct Disk {
    state: Rc<RefCell<State>>,
    real: Option<RedbStore>,
}

impl Platter {
    /// An empty disk, of bytes under the real store if asked.
    pub fn new(lie: Option<Lie>, real: bool) -> Self {
        let platter = Self::default();
        let file = (real && lie.is_none()).then(|| Bytes::new(false));
        let mut state = platter.0.borrow_mut();
        (state.lie, state.file) = (lie, file);
        drop(state);
        platter
    }

    /// For a process that starts.
    pub fn open(&self) -> Disk {
        let mut state = self.0.borrow_mut();
        (state.dead, state.cut) = (false, None);
        let real = state.file.clone().map(RedbStore::with_backend);
        Disk { state: Rc::clone(&self.0), real }
    }

    /// What the real store did that no store may.
    pub fn wrong(&self) -> Option<String> {
        self.0.borrow().wrong.clone()
    }

    /// The power fails: nothing more is written, by a process that ends either.
    pub fn kill(&self) {
        let mut state = self.0.borrow_mut();
        state.dead = true;
        if let Some(file) = &state.file {
            file.kill();
        }
    }

    /// Whether a process ever wrote to it.
    pub fn is_empty(&self) -> bool {
        self.0.borrow().image.is_empty()
    }

    /// Lets power fail at a write to come.
    pub fn cut(&self, cut: Cut) {
        let mut state = self.0.borrow_mut();
        match &state.file {
            // A commit of the real store is a dozen operations on its file.
            Some(file) => file.cut(Some(cut.after * 8 + u64::from(cut.durable))),
            None => state.cut = Some(cut),
        }
    }

    /// Whether power failed.
    pub fn is_dead(&self) -> bool {
        self.0.borrow().dead
    }

    /// Whether there is no room.
    pub fn is_full(&self) -> bool {
        self.0.borrow().full
    }

    /// Whether there is no room, from now on.
    pub fn set_full(&self, full: bool) {
        let mut state = self.0.borrow_mut();
        state.full = full;
        if let Some(file) = &state.file {
            file.set_full(full);
        }
    }

    /// Turns a bit of something stored; what it was. `None` when nothing is stored.
    pub fn flip(&self, rng: &mut Rng) -> Option<String> {
        let mut state = self.0.borrow_mut();
        if let Some(file) = &state.file {
            state.damage = file.flip(rng).map(|at| format!("byte {at}"));
            return state.damage.clone();
        }
        let mut parts = vec!["hard state".to_owned()];
        parts.extend(state.image.snapshot.iter().map(|_| "snapshot".to_owned()));
        let entries = state.image.entries.iter();
        parts.extend(entries.map(|entry| format!("log entry {}", entry.id.index)));
        let empty = state.image.is_empty();
        state.damage = rng.pick(&parts).filter(|_| !empty).cloned();
        state.damage.clone()
    }

    /// What was found damaged, if something is.
    pub fn damage(&self) -> Option<String> {
        self.0.borrow().damage.clone()
    }

    /// Whether the log holds a change of members after `index`.
    pub fn changes_after(&self, index: u64) -> bool {
        let state = self.0.borrow();
        let changes = |entry: &LogEntry| entry.kind == EntryKind::Change && entry.id.index > index;
        state.image.entries.iter().any(changes)
    }

    /// Whether every change of members in the log is known to be committed, durably.
    pub fn knows_its_changes(&self) -> bool {
        let commit = self.0.borrow().image.hard_state.commit;
        !self.changes_after(commit)
    }

    /// Takes back a power failure that has not come.
    pub fn mend(&self) {
        let mut state = self.0.borrow_mut();
        state.cut = None;
        if let Some(file) = &state.file {
            file.cut(None);
        }
    }

    /// The process is gone: what was not synced may be, too.
    pub fn crash(&self, rng: &mut Rng) {
        let mut state = self.0.borrow_mut();
        if let Some(file) = &state.file {
            file.restart(rng.bits());
        }
        if state.lie.is_some() && !state.unsynced.is_empty() {
            let kept = match state.lie {
                Some(Lie::SyncedLate) => state.unsynced.len() as u64 - 1,
                _ => rng.below(state.unsynced.len() as u64 + 1),
            };
            let unsynced = std::mem::take(&mut state.unsynced);
            for batch in &unsynced[..kept as usize] {
                // What was accepted once is accepted again.
                let _ = state.synced.apply(batch);
            }
            state.image = state.synced.clone();
        }
    }

    /// The term of an entry; `None` where the log has none.
    pub fn term(&self, index: u64) -> Option<u64> {
        self.0.borrow().image.term(index)
    }

    /// Whether the log reaches to `index`.
    pub fn reaches(&self, index: u64) -> bool {
        self.0.borrow().image.last().index >= index
    }

    /// Whether the vote of `term` is for `candidate`, or no longer of interest.
    pub fn has_vote(&self, term: u64, candidate: u64) -> bool {
        let state = self.0.borrow().image.hard_state;
        state.term > term || (state.term == term && state.vote == candidate)
    }

    /// Writes, and the entries in them, since the last call.
    pub fn take(&self) -> (u64, Vec<(LogId, u64)>) {
        let mut state = self.0.borrow_mut();
        (std::mem::take(&mut state.writes), std::mem::take(&mut state.entries))
    }
}

impl State {
    /// What of `batch` the disk keeps.
    fn kept(&self, batch: &Batch) -> Batch {
        let mut kept = batch.clone();
        if self.lie == Some(Lie::VoteForgotten)
            && let Some(hard_state) = &mut kept.hard_state
        {
            hard_state.vote = 0;
        }
        kept
    }

    fn apply(&mut self, batch: &Batch) -> Result<(), StoreError> {
        self.writes += 1;
        let digest = |data: &[u8]| data.iter().fold(7, |sum, byte| Rng::fold(sum, *byte));
        let entries = batch.entries.iter();
        self.entries.extend(entries.map(|entry| (entry.id, digest(&entry.data))));
        if !matches!(self.lie, Some(Lie::NeverSynced | Lie::SyncedLate)) {
            return self.image.apply(&self.kept(batch));
        }
        self.image.apply(batch)?;
        self.unsynced.push(batch.clone());
        // The operating system writes back by itself in time.
        let kept = if self.lie == Some(Lie::SyncedLate) { 1 } else { 64 };
        if self.unsynced.len() > kept {
            let batch = self.unsynced.remove(0);
            self.synced.apply(&batch)?;
        }
        Ok(())
    }
}

impl State {
    /// What the real store found must be what was written, or that and what was being written.
    fn found(&mut self, found: &LogImage) -> Result<(), StoreError> {
        let torn = self.torn.take();
        if *found != self.image
            && let Some(torn) = torn
        {
            self.image.apply(&torn)?;
        }
        if *found != self.image {
            let (last, expected) = (found.last(), self.image.last());
            self.wrong = Some(format!("the store held up to {last:?}, not {expected:?}"));
            return Err(StoreError::Io(io::Error::other("the wrong content")));
        }
        // A bit that turned where nothing was kept.
        self.damage = None;
        Ok(())
    }

    fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        let failed = || StoreError::Io(io::Error::other("the power failed"));
        if self.dead {
            return Err(failed());
        }
        if let Some(cut) = &mut self.cut {
            if cut.after > 0 {
                cut.after -= 1;
            } else {
                let durable = cut.durable;
                self.dead = true;
                if durable {
                    self.apply(batch)?;
                }
                return Err(failed());
            }
        }
        if self.full {
            return Err(StoreError::Full);
        }
        self.apply(batch)
    }
}

impl LogStore for Disk {
    fn load(&mut self) -> Result<LogImage, StoreError> {
        if let Some(real) = &mut self.real {
            let found = real.load()?;
            self.state.borrow_mut().found(&found)?;
            return Ok(found);
        }
        let state = self.state.borrow();
        if let Some(what) = &state.damage {
            return Err(StoreError::Corrupt { what: what.clone() });
        }
        state.image.verify()?;
        Ok(state.image.clone())
    }

    fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        let Some(real) = &mut self.real else { return self.state.borrow_mut().write(batch) };
        let written = real.write(batch);
        let mut state = self.state.borrow_mut();
        match &written {
            Ok(()) => state.apply(batch)?,
            Err(StoreError::Full) => {}
            Err(_) => {
                state.dead = state.file.as_ref().is_some_and(Bytes::is_dead);
                state.torn = Some(batch.clone());
            }
        }
        written
    }

    fn is_low(&self) -> bool {
        match &self.real {
            Some(real) => real.is_low(),
            None => self.state.borrow().full,
        }
    }

    fn probe(&mut self) -> Result<(), StoreError> {
        self.real.as_mut().map_or(Ok(()), LogStore::probe)
    }
}
