//! Which record is damaged, when redb only says that some page is.

use std::panic::AssertUnwindSafe;

use redb::{ConcurrencyMode, Database, StorageBackend};

use super::backend::Memory;
use super::header::{FLAGS, HEADER};
use super::image;

/// The flag of a file that was not closed; without it redb reads what is there without repair.
const UNCLEAN: u8 = 2;

/// Reads every record of a copy of the file, pages unverified, until one of our checksums fails.
/// `None` when no record is damaged, or none can be reached.
pub(super) fn damaged(backend: &dyn StorageBackend) -> Option<String> {
    let len = usize::try_from(backend.len().ok()?).ok()?;
    let mut bytes = vec![0; len];
    backend.read(0, &mut bytes).ok()?;
    if len < HEADER {
        return None;
    }
    bytes[FLAGS] &= !UNCLEAN;
    let read = || {
        // As a reader beside a writer: it needs no allocator, which is what a repair rebuilds.
        let db = Database::builder()
            .set_concurrency_mode(ConcurrencyMode::MultiWriter)
            .open_read_only_with_backend(Memory::new(bytes))
            .ok()?;
        match image(&db) {
            Err(redb::Error::Corrupted(what)) => Some(what),
            Err(_) => None,
            Ok((image, _)) => image.verify().err().map(|error| error.to_string()),
        }
    };
    std::panic::catch_unwind(AssertUnwindSafe(read)).ok().flatten()
}
