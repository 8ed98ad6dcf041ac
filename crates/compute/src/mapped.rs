//! Read-only views of files.

use memmap2::Mmap;
use std::fs::File;
use std::io;
use std::path::Path;

/// A file's bytes, read from disk as they are touched.
///
/// The file must keep its length while it is mapped: a process that reads beyond the new end of a
/// truncated file is killed by the system, and bytes changed in place show through. Model files
/// are published under a name and never changed after; who truncates one under a running worker
/// has stopped that worker.
#[derive(Debug)]
pub struct MappedFile {
    /// `None` for an empty file, which cannot be mapped everywhere.
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps the file at `path`. An empty file has no bytes.
    ///
    /// # Errors
    /// What the system says on opening or mapping; a directory cannot be mapped.
    pub fn open(path: &Path) -> io::Result<MappedFile> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        if metadata.len() == 0 {
            return Ok(MappedFile { map: None });
        }
        // SAFETY: only read from. That nobody truncates or rewrites the file meanwhile is
        // the operator's part, as the type's documentation says.
        let map = unsafe { Mmap::map(&file)? };
        Ok(MappedFile { map: Some(map) })
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn maps_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, b"abc").unwrap();
        assert_eq!(MappedFile::open(&path).unwrap().bytes(), b"abc");
        std::fs::write(&path, b"").unwrap();
        assert_eq!(MappedFile::open(&path).unwrap().bytes(), b"");
        assert!(MappedFile::open(folder.path()).is_err());
        assert!(MappedFile::open(&folder.path().join("missing")).is_err());
    }
}
