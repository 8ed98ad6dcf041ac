//! redb's file header has one bit that no checksum covers: which of its two commits counts. One
//! flip and the store is as it was a commit ago, with every checksum right.
//!
//! The commits are numbered, and in two phases the number of the one that counts is the greater,
//! but for one moment: between the phases of a commit. The newer commit is complete on the disk
//! then, and nobody was told so yet. So a newer commit that verifies is taken in both cases; one
//! that does not is the torn beginning of a commit, and the older counts.

use std::io;
use std::sync::Arc;

use redb::StorageBackend;

use super::backend::{Disk, Guard, Memory, Weather, failed};
use super::{StoreError, database, image};

// The file's format is version 3 of redb, which describes it in its design document.
pub(super) const HEADER: usize = 320;
pub(super) const FLAGS: usize = 9;
pub(super) const PRIMARY: u8 = 1;
pub(super) const SLOTS: [usize; 2] = [64, 192];
const NUMBER: usize = 104;

/// Makes the newer commit count if it can be opened.
pub(super) fn prefer_newer(disk: &mut dyn Disk) -> Result<(), StoreError> {
    let backend = disk.open().map_err(failed)?;
    let flipped = flipped(backend.as_ref()).map_err(failed)?;
    if let Some(flags) = flipped
        && verifies(backend.as_ref(), flags).map_err(failed)?
    {
        backend.write(FLAGS as u64, &[flags]).map_err(failed)?;
        backend.sync_data().map_err(StoreError::Io)?;
    }
    backend.close().map_err(StoreError::Io)
}

/// The flags that would make the other commit count, if it is the newer.
fn flipped(backend: &dyn StorageBackend) -> io::Result<Option<u8>> {
    if backend.len()? < HEADER as u64 {
        return Ok(None);
    }
    let mut header = [0; HEADER];
    backend.read(0, &mut header)?;
    let number = |slot: usize| {
        let bytes = header[SLOTS[slot] + NUMBER..].first_chunk::<8>().copied();
        u64::from_le_bytes(bytes.unwrap_or_default())
    };
    let flags = header[FLAGS];
    let primary = usize::from(flags & PRIMARY);
    Ok((number(1 - primary) > number(primary)).then_some(flags ^ PRIMARY))
}

/// Whether the file opens and verifies with these flags; tried on a copy.
fn verifies(backend: &dyn StorageBackend, flags: u8) -> io::Result<bool> {
    let len = usize::try_from(backend.len()?).map_err(io::Error::other)?;
    let mut bytes = vec![0; len];
    backend.read(0, &mut bytes)?;
    bytes[FLAGS] = flags;
    let guard = Guard::new(Box::new(Memory::new(bytes)), Arc::new(Weather::default()));
    let Ok(db) = database(guard) else { return Ok(false) };
    Ok(image(&db).is_ok_and(|(image, _)| image.verify().is_ok()))
}
