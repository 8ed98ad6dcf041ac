//! What lies under redb: a file with a reserve beside it, and a guard that remembers how an
//! operation failed, which redb's errors do not tell well enough to act on.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use redb::backends::FileBackend;
use redb::{BackendError, Database, DatabaseError, StorageBackend, StorageError};

use crate::replica::StoreError;

/// Where a store's bytes are.
pub trait Disk: std::fmt::Debug + Send + Sync {
    /// The bytes, from the start; called again after a commit that failed for want of room.
    ///
    /// # Errors
    /// Whatever the disk says.
    fn open(&mut self) -> io::Result<Box<dyn StorageBackend>>;

    /// Sets room aside, if it is not already.
    ///
    /// # Errors
    /// There is none.
    fn reserve(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Gives the room that was set aside; whether there was any.
    ///
    /// # Errors
    /// Whatever the disk says.
    fn release(&mut self) -> io::Result<bool> {
        Ok(false)
    }
}

/// Whether an error says that there is no room.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// An error outside redb.
pub(super) fn failed(error: io::Error) -> StoreError {
    if is_full(&error) { StoreError::Full } else { StoreError::Io(error) }
}

/// How the operations since the last opening went.
#[derive(Debug, Default)]
pub(super) struct Weather(Mutex<Report>);

#[derive(Debug, Default)]
struct Report {
    full: bool,
    failed: Option<io::Error>,
}

impl Weather {
    fn with<R>(&self, act: impl FnOnce(&mut Report) -> R) -> R {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn clear(&self) {
        self.with(|report| report.full = false);
    }

    /// What an error of redb means. A disk that failed once in any other way than for want of room
    /// stays failed: what it did with the bytes it had is unknown.
    pub(super) fn judge(&self, error: redb::Error) -> StoreError {
        self.with(|report| {
            if let Some(failed) = report.failed.take() {
                let again = io::Error::new(failed.kind(), failed.to_string());
                report.failed = Some(again);
                return StoreError::Io(failed);
            }
            if report.full {
                return StoreError::Full;
            }
            match error {
                redb::Error::Corrupted(what) => StoreError::Corrupt { what },
                redb::Error::Io(error) if foreign(&error) => {
                    StoreError::Corrupt { what: format!("file: {error}") }
                }
                redb::Error::Io(error) => StoreError::Io(error),
                redb::Error::UpgradeRequired(version) => {
                    StoreError::Corrupt { what: format!("file: of format {version}") }
                }
                redb::Error::DatabaseAlreadyOpen => {
                    let why = "another process uses this data directory";
                    StoreError::Io(io::Error::new(io::ErrorKind::ResourceBusy, why))
                }
                other => StoreError::Io(io::Error::other(other.to_string())),
            }
        })
    }

    fn note(&self, error: io::Error) -> io::Error {
        self.with(|report| {
            if is_full(&error) {
                report.full = true;
            } else if !foreign(&error) && report.failed.is_none() {
                report.failed = Some(io::Error::new(error.kind(), error.to_string()));
            }
        });
        error
    }

    /// A sync that fails for want of room has failed like any other: the bytes may be lost and the
    /// next sync would not say so.
    fn note_sync(&self, error: io::Error) -> io::Error {
        let error = io::Error::other(format!("sync: {error}"));
        self.note(error)
    }
}

/// Errors that say that the file is not what it should be, rather than that the disk failed.
fn foreign(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnexpectedEof | ErrorKind::InvalidData | ErrorKind::InvalidInput
    )
}

/// Passes everything on and remembers what failed.
#[derive(Debug)]
pub(super) struct Guard {
    inner: Box<dyn StorageBackend>,
    weather: Arc<Weather>,
}

impl Guard {
    pub(super) fn new(inner: Box<dyn StorageBackend>, weather: Arc<Weather>) -> Self {
        Self { inner, weather }
    }
}

impl StorageBackend for Guard {
    fn len(&self) -> io::Result<u64> {
        self.inner.len().map_err(|error| self.weather.note(error))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, out).map_err(|error| self.weather.note(error))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len).map_err(|error| self.weather.note(error))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data().map_err(|error| self.weather.note_sync(error))
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inner.write(offset, data).map_err(|error| self.weather.note(error))
    }

    fn close(&self) -> io::Result<()> {
        self.inner.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.inner.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.query_lock_range(start, end)
    }
}

/// A file, and one beside it that only takes up room.
#[derive(Debug)]
pub(super) struct FileDisk {
    path: PathBuf,
    reserve: PathBuf,
    bytes: u64,
}

impl FileDisk {
    pub(super) fn new(path: &Path, bytes: u64) -> Self {
        let mut reserve = path.as_os_str().to_owned();
        reserve.push(".reserve");
        Self { path: path.to_owned(), reserve: reserve.into(), bytes }
    }

    /// redb takes a file whose making was interrupted for a damaged one. So it is made under
    /// another name and gets its own when it is whole.
    fn create(&self) -> io::Result<()> {
        let mut new = self.path.as_os_str().to_owned();
        new.push(".new");
        let new = PathBuf::from(new);
        let made = File::create(&new)?;
        let database = Database::create(&new).map_err(|error| match error {
            DatabaseError::Storage(StorageError::Io(error)) => error,
            other => io::Error::other(other.to_string()),
        })?;
        database.close().map_err(|error| io::Error::other(error.to_string()))?;
        made.sync_all()?;
        std::fs::rename(&new, &self.path)?;
        // Its name must survive a power cut as well as its content.
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }

    fn fill(&self) -> io::Result<()> {
        let mut file = File::create(&self.reserve)?;
        // Not zeros: some file systems store those as nothing.
        let mut noise = blake3::Hasher::new().update(b"reserve").finalize_xof();
        let mut block = [0; 4096];
        for _ in 0..self.bytes.div_ceil(block.len() as u64) {
            noise.fill(&mut block);
            file.write_all(&block)?;
        }
        file.sync_all()
    }
}

impl Disk for FileDisk {
    fn open(&mut self) -> io::Result<Box<dyn StorageBackend>> {
        if !self.path.exists() {
            self.create()?;
        }
        let file = OpenOptions::new().read(true).write(true).open(&self.path)?;
        let backend =
            FileBackend::new(file).map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Box::new(backend))
    }

    fn reserve(&mut self) -> io::Result<()> {
        if std::fs::metadata(&self.reserve).is_ok_and(|found| found.len() >= self.bytes) {
            return Ok(());
        }
        self.fill().inspect_err(|_| drop(std::fs::remove_file(&self.reserve)))
    }

    fn release(&mut self) -> io::Result<bool> {
        match std::fs::remove_file(&self.reserve) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// A backend whose clones share what they hold.
#[derive(Debug)]
pub(super) struct Cloned<B>(pub(super) B);

impl<B: StorageBackend + Clone> Disk for Cloned<B> {
    fn open(&mut self) -> io::Result<Box<dyn StorageBackend>> {
        Ok(Box::new(self.0.clone()))
    }
}

/// A file in memory.
#[derive(Debug, Clone)]
pub(super) struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(bytes)))
    }

    fn with<R>(&self, act: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.with(|bytes| bytes.clone())
    }
}

/// The part of a file that an operation is about.
fn part(offset: u64, len: usize) -> io::Result<std::ops::Range<usize>> {
    let from = usize::try_from(offset).map_err(|_| ErrorKind::UnexpectedEof)?;
    let to = from.checked_add(len).ok_or(ErrorKind::UnexpectedEof)?;
    Ok(from..to)
}

impl StorageBackend for Memory {
    fn len(&self) -> io::Result<u64> {
        Ok(self.with(|bytes| bytes.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let part = part(offset, out.len())?;
        self.with(|bytes| {
            out.copy_from_slice(bytes.get(part).ok_or(ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| ErrorKind::StorageFull)?;
        self.with(|bytes| bytes.resize(len, 0));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let part = part(offset, data.len())?;
        self.with(|bytes| {
            bytes.get_mut(part).ok_or(ErrorKind::UnexpectedEof)?.copy_from_slice(data);
            Ok(())
        })
    }

    fn try_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn try_lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn unlock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn query_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(false)
    }
}
