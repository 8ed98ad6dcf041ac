//! Read-only views of files, and memory that copies of their parts go to.

use memmap2::{Mmap, MmapMut};
use std::fs::File;
use std::io;
use std::path::Path;

/// A file's bytes, read from disk as they are touched.
///
/// The file must keep its length while it is mapped: a process that reads beyond the new end of a
/// truncated file is killed by the system, and bytes changed in place show through. So files are
/// mapped to be looked at once, at a start; what a worker loads later is read and checked.
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

/// From so many bytes on, memory is asked for in large pages.
#[cfg(target_os = "linux")]
const LARGE: usize = 8 << 20;

/// Zeros that take up memory only where they were written to, and go back to the system at once.
#[derive(Debug)]
pub struct SparseMemory {
    /// `None` for no bytes, which cannot be mapped.
    map: Option<MmapMut>,
}

impl SparseMemory {
    /// So many bytes.
    ///
    /// # Errors
    /// The system has no room for them.
    pub fn new(length: usize) -> io::Result<SparseMemory> {
        let map = if length == 0 { None } else { Some(MmapMut::map_anon(length)?) };
        #[cfg(target_os = "linux")]
        if let Some(map) = map.as_ref().filter(|map| map.len() >= LARGE) {
            // Most of its time would go into small pages. A system without large ones refuses, and
            // is served as well with small ones.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(SparseMemory { map })
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }

    /// All of it, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or_default()
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

    #[test]
    fn sparse_memory_is_zeros_until_written() {
        let mut memory = SparseMemory::new(1 << 20).unwrap();
        memory.bytes_mut()[70_000] = 7;
        assert_eq!(memory.bytes().len(), 1 << 20);
        let set: Vec<_> = memory.bytes().iter().enumerate().filter(|(_, b)| **b != 0).collect();
        assert_eq!(set, [(70_000, &7)]);
        assert!(SparseMemory::new(0).unwrap().bytes_mut().is_empty());
    }
}
