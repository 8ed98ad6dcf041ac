//! The store on a disk: one redb file, one durable two-phase commit per batch.
//!
//! Two phases, because a file whose last commit does not verify must be told apart from one whose
//! last commit was never finished: with one phase redb falls back to the commit before in both
//! cases, and after an acknowledged commit that would be to lose it without a word. Beside redb's
//! own page checksums every record carries a blake3 of ours, bound to what it is and where it
//! belongs, and everything is verified when the store is opened.

mod backend;
mod diagnose;
mod header;
mod record;
#[cfg(test)]
mod tests;

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;

use redb::{
    Database, DatabaseError, Durability, ReadTransaction, ReadableDatabase, ReadableTable,
    TableDefinition,
};

pub use self::backend::Disk;
use self::backend::{Cloned, FileDisk, Guard, Memory, Weather};
use super::{Batch, LogImage, LogStore, StoreError};

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
/// redb's cache; everything is in memory here already.
const CACHE: usize = 4 << 20;
/// Room set aside beside the file, so that a full disk is noticed while there still is some.
const RESERVE: u64 = 4 << 20;

/// A [`LogStore`] in a redb file.
#[derive(Debug)]
pub struct RedbStore {
    disk: Box<dyn Disk>,
    /// Absent before `load`, and after a failed commit until the file could be opened again.
    db: Option<Database>,
    weather: Arc<Weather>,
    /// How many batches are durable.
    sequence: u64,
    low: bool,
}

impl RedbStore {
    /// The store in this file, which is made if it is not there. Beside it lies a reserve of
    /// 4 MiB; it is given up when the disk is full and taken back when there is room.
    pub fn open(path: impl AsRef<Path>) -> Self {
        Self::with_disk(FileDisk::new(path.as_ref(), RESERVE))
    }

    /// The store in a backend, whose clones must share what they hold. It has no reserve.
    pub fn with_backend(backend: impl redb::StorageBackend + Clone) -> Self {
        Self::with_disk(Cloned(backend))
    }

    /// The store on a disk of any kind.
    pub fn with_disk(disk: impl Disk + 'static) -> Self {
        let weather = Arc::new(Weather::default());
        Self { disk: Box::new(disk), db: None, weather, sequence: 0, low: false }
    }

    fn opened(&mut self) -> Result<&Database, StoreError> {
        if self.db.is_none() {
            self.db = Some(self.open_file()?);
        }
        self.db.as_ref().ok_or(StoreError::Full)
    }

    fn open_file(&mut self) -> Result<Database, StoreError> {
        self.weather.clear();
        header::prefer_newer(self.disk.as_mut())?;
        let guard = Guard::new(self.disk.open().map_err(backend::failed)?, self.weather.clone());
        match database(guard).map_err(|error| self.weather.judge(error)) {
            Err(StoreError::Corrupt { what }) => Err(StoreError::Corrupt { what: self.name(what) }),
            other => other,
        }
    }

    /// redb names a damaged page by nothing; the record in it has a name.
    fn name(&mut self, what: String) -> String {
        let Ok(backend) = self.disk.open() else { return what };
        let damaged = diagnose::damaged(backend.as_ref());
        let _ = backend.close();
        damaged.unwrap_or_else(|| format!("pages: {what}"))
    }

    fn try_write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        let sequence = self.sequence + 1;
        let weather = self.weather.clone();
        let db = self.opened()?;
        commit(db, batch, sequence).map_err(|error| weather.judge(error))?;
        self.sequence = sequence;
        Ok(())
    }

    /// A commit failed for want of room, and redb will do nothing more with this handle. The file
    /// is opened again; what is in it says whether the commit was made after all.
    fn recover(&mut self) -> Result<(), StoreError> {
        self.db = None;
        let weather = self.weather.clone();
        let db = self.opened()?;
        let stored = db.begin_read().map_err(redb::Error::from).and_then(|read| sequence(&read));
        let stored = stored.map_err(|error| weather.judge(error))?;
        if stored == self.sequence + 1 {
            self.sequence = stored;
            return Ok(());
        }
        if stored == self.sequence {
            return Err(StoreError::Full);
        }
        Err(StoreError::Corrupt { what: "number of batches: it went back".to_owned() })
    }
}

impl LogStore for RedbStore {
    fn load(&mut self) -> Result<LogImage, StoreError> {
        let weather = self.weather.clone();
        if self.disk.reserve().is_err() {
            self.low = true;
        }
        let db = self.opened()?;
        let (image, sequence) = image(db).map_err(|error| weather.judge(error))?;
        image.verify()?;
        self.sequence = sequence;
        Ok(image)
    }

    fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        match self.try_write(batch) {
            Err(StoreError::Full) => {}
            other => return other,
        }
        match self.recover() {
            Err(StoreError::Full) if !self.low => {}
            other => return other,
        }
        // The reserve is for this: the batch on its way, votes, and the way out of leadership.
        self.low = self.disk.release().map_err(backend::failed)?;
        if !self.low {
            return Err(StoreError::Full);
        }
        match self.try_write(batch) {
            Err(StoreError::Full) => self.recover(),
            other => other,
        }
    }

    fn is_low(&self) -> bool {
        self.low
    }

    fn probe(&mut self) -> Result<(), StoreError> {
        if self.low {
            self.low = self.disk.reserve().is_err();
        }
        Ok(())
    }
}

/// Everything in the image of such a file: what opening it would find.
///
/// # Errors
/// [`StoreError`]; never a panic, whatever the bytes.
#[doc(hidden)]
pub fn recover(bytes: &[u8]) -> Result<LogImage, StoreError> {
    RedbStore::with_backend(Memory::new(bytes.to_vec())).load()
}

/// Opens and verifies every page. redb promises an error for a file that somebody else altered; a
/// panic would be a defect of its own, and is one more way to say so.
fn database(guard: Guard) -> Result<Database, redb::Error> {
    let open = || {
        Database::builder()
            .set_cache_size(CACHE)
            .set_check_integrity_on_open(true)
            .create_with_backend(guard)
    };
    match std::panic::catch_unwind(AssertUnwindSafe(open)) {
        Ok(opened) => opened.map_err(DatabaseError::into),
        Err(_) => Err(redb::Error::Corrupted("it cannot be opened".to_owned())),
    }
}

fn commit(db: &Database, batch: &Batch, sequence: u64) -> Result<(), redb::Error> {
    let mut transaction = db.begin_write()?;
    transaction.set_two_phase_commit(true);
    transaction.set_durability(Durability::Immediate)?;
    {
        let mut log = transaction.open_table(LOG)?;
        if batch.reset {
            log.retain(|_, _| false)?;
        }
        if let Some(first) = batch.entries.first() {
            log.retain_in(first.id.index.., |_, _| false)?;
        }
        for entry in &batch.entries {
            log.insert(entry.id.index, record::entry(entry).as_slice())?;
        }
        if let Some(compact) = batch.compact {
            log.retain_in(..=compact.index, |_, _| false)?;
        }
        let mut meta = transaction.open_table(META)?;
        for (name, record) in record::meta(batch, sequence) {
            meta.insert(name, record.as_slice())?;
        }
    }
    transaction.commit()?;
    Ok(())
}

fn sequence(transaction: &ReadTransaction) -> Result<u64, redb::Error> {
    let meta = match transaction.open_table(META) {
        Ok(meta) => meta,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(0),
        Err(error) => return Err(error.into()),
    };
    let record = meta.get(record::SEQUENCE)?;
    Ok(record
        .map(|record| record::number(record::SEQUENCE, record.value()))
        .transpose()?
        .unwrap_or(0))
}

fn image(db: &impl ReadableDatabase) -> Result<(LogImage, u64), redb::Error> {
    let transaction = db.begin_read()?;
    let mut image = LogImage::default();
    let tables = (transaction.open_table(LOG), transaction.open_table(META));
    let (log, meta) = match tables {
        (Ok(log), Ok(meta)) => (log, meta),
        // Nothing was ever written: both tables come with the first batch.
        (
            Err(redb::TableError::TableDoesNotExist(_)),
            Err(redb::TableError::TableDoesNotExist(_)),
        ) => {
            return Ok((image, 0));
        }
        (Err(error), _) | (_, Err(error)) => return Err(error.into()),
    };
    for row in meta.iter()? {
        let (name, value) = row?;
        record::read_meta(&mut image, name.value(), value.value())?;
    }
    for row in log.iter()? {
        let (index, value) = row?;
        image.entries.push(record::read_entry(index.value(), value.value())?);
    }
    Ok((image, sequence(&transaction)?))
}
