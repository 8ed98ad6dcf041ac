//! Files of weights as they are read from a running worker: piece by piece, and each piece checked.
//!
//! A file may be damaged, rewritten or cut short long after it was found to be the model that it
//! is. So nothing is taken from a mapping then: what a rank needs is read into memory of its own,
//! compared with what was there when the model was digested, and only then packed.

use std::fs::File;
use std::io::{Error, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use compute::SparseMemory;
use model::content::{Content, PIECE};

use crate::CheckpointError;

/// A file of weights, open.
pub(crate) struct WeightFile {
    name: String,
    file: File,
    /// Its bytes when it was opened.
    length: usize,
    /// What it held when the model was digested, where that is known.
    content: Option<Content>,
    /// Threads that read a large part of it.
    threads: usize,
}

/// Bytes that are read at once: whole pieces.
const BLOCK: usize = 64 * PIECE;

impl WeightFile {
    pub(crate) fn open(name: &str, path: &Path, length: usize) -> Result<Self, CheckpointError> {
        let read = |source| CheckpointError::Read { file: name.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        Ok(Self { name: name.to_owned(), file, length, content: None, threads: 1 })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// From now on it has to be this, and is read by so many threads.
    pub(crate) fn expect(
        &mut self,
        content: Content,
        threads: usize,
    ) -> Result<(), CheckpointError> {
        if content.length() != self.length as u64 {
            let at = content.length().min(self.length as u64);
            return Err(CheckpointError::Changed { file: self.name.clone(), at });
        }
        (self.content, self.threads) = (Some(content), threads.max(1));
        Ok(())
    }

    /// Reads whole pieces from `start` on, which is a multiple of [`PIECE`], and checks them; large
    /// parts on several threads.
    fn read(&self, start: usize, into: &mut [u8]) -> Result<(), CheckpointError> {
        let share = into.len().div_ceil(self.threads).next_multiple_of(BLOCK);
        if share >= into.len() {
            return self.read_blocks(start, into);
        }
        std::thread::scope(|scope| {
            let shares = (start..).step_by(share).zip(into.chunks_mut(share));
            let readers: Vec<_> = shares
                .map(|(start, into)| scope.spawn(move || self.read_blocks(start, into)))
                .collect();
            let lost = |_| {
                Err(CheckpointError::Read {
                    file: self.name.clone(),
                    source: Error::other("a thread that read it panicked"),
                })
            };
            readers.into_iter().try_for_each(|reader| reader.join().unwrap_or_else(lost))
        })
    }

    /// A block is checked while it is still in the processor's cache.
    fn read_blocks(&self, start: usize, into: &mut [u8]) -> Result<(), CheckpointError> {
        let read = |source| CheckpointError::Read { file: self.name.clone(), source };
        for (start, block) in (start..).step_by(BLOCK).zip(into.chunks_mut(BLOCK)) {
            let done = self.file.read_exact_at(block, start as u64);
            done.map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => read(Error::other("it has become shorter")),
                _ => read(error),
            })?;
            let Some(content) = &self.content else { continue };
            for (number, piece) in (start / PIECE..).zip(block.chunks(PIECE)) {
                if !content.matches(number, piece) {
                    let (file, at) = (self.name.clone(), (number * PIECE) as u64);
                    return Err(CheckpointError::Changed { file, at });
                }
            }
        }
        Ok(())
    }
}

/// A run of a file's bytes, of which those are here that were asked for.
pub(crate) struct Extract<'a> {
    file: &'a WeightFile,
    /// Where the memory begins and ends within the file: borders of pieces, and the run within.
    around: Range<usize>,
    run: Range<usize>,
    memory: SparseMemory,
    /// By piece: whether it is here.
    here: Vec<bool>,
}

impl<'a> Extract<'a> {
    /// Nothing of `run` yet, which stands within the file.
    pub(crate) fn new(file: &'a WeightFile, run: Range<usize>) -> Result<Self, CheckpointError> {
        Self::within(file, run, &mut None)
    }

    /// The same in memory that was used before, where that is large enough.
    pub(crate) fn within(
        file: &'a WeightFile,
        run: Range<usize>,
        used: &mut Option<SparseMemory>,
    ) -> Result<Self, CheckpointError> {
        let start = run.start / PIECE * PIECE;
        let end = run.end.next_multiple_of(PIECE).min(file.length).max(run.end);
        let read = |source| CheckpointError::Read { file: file.name.clone(), source };
        let length = end - start;
        let memory = match used.take().filter(|memory| memory.bytes().len() >= length) {
            Some(memory) => memory,
            None => SparseMemory::new(length).map_err(read)?,
        };
        let here = vec![false; length.div_ceil(PIECE)];
        Ok(Self { file, around: start..end, run, memory, here })
    }

    /// The memory, to be used again.
    pub(crate) fn into_memory(self) -> SparseMemory {
        self.memory
    }

    /// Reads what is not here yet of some bytes of the run.
    pub(crate) fn fetch(&mut self, bytes: Range<usize>) -> Result<(), CheckpointError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let before = self.run.start - self.around.start;
        let pieces = (before + bytes.start) / PIECE..(before + bytes.end).div_ceil(PIECE);
        let mut next = pieces.start;
        while next < pieces.end {
            let first = next;
            while next < pieces.end && !self.here[next] {
                next += 1;
            }
            if first < next {
                let whole = first * PIECE..(next * PIECE).min(self.around.len());
                let start = self.around.start + whole.start;
                self.file.read(start, &mut self.memory.bytes_mut()[whole])?;
                self.here[first..next].fill(true);
            }
            next += usize::from(first == next);
        }
        Ok(())
    }

    /// All of it.
    pub(crate) fn fetch_all(&mut self) -> Result<(), CheckpointError> {
        self.fetch(0..self.run.len())
    }

    /// The run; what stands where nothing was fetched means nothing.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.memory.bytes()[self.run.start - self.around.start..][..self.run.len()]
    }
}

#[cfg(test)]
mod tests {
    use model::content::ContentHasher;

    use super::*;

    fn file(folder: &Path, bytes: &[u8]) -> WeightFile {
        let path = folder.join("weights");
        std::fs::write(&path, bytes).expect("written");
        let mut hasher = ContentHasher::default();
        hasher.update(bytes);
        let mut file = WeightFile::open("weights", &path, bytes.len()).expect("a file");
        file.expect(hasher.finish(), 3).expect("what it is");
        file
    }

    #[test]
    fn what_was_asked_for_is_there_and_little_else() {
        let folder = tempfile::tempdir().expect("a directory");
        let bytes: Vec<u8> = (0..10 * PIECE + 77).map(|at| (at % 251) as u8 + 1).collect();
        let file = file(folder.path(), &bytes);
        for run in [0..bytes.len(), 5..6, PIECE - 1..3 * PIECE + 1, 10 * PIECE..bytes.len()] {
            let mut extract = Extract::new(&file, run.clone()).expect("memory");
            let length = run.len();
            let want = &bytes[run];
            assert!(extract.bytes().iter().all(|byte| *byte == 0));
            for part in [length / 2..length / 2, length / 3..length / 2, 0..1, length - 1..length] {
                extract.fetch(part.clone()).expect("read");
                assert_eq!(extract.bytes()[part.clone()], want[part]);
            }
            let here = extract.bytes().iter().filter(|byte| **byte != 0).count();
            assert!(here <= length / 6 + 4 * PIECE, "{here} of {length}");
            extract.fetch_all().expect("read");
            assert_eq!(extract.bytes(), want);
        }
    }

    #[test]
    fn what_has_changed_is_an_error_where_it_is_read() {
        let folder = tempfile::tempdir().expect("a directory");
        let mut bytes = vec![7; 5 * PIECE];
        let file = file(folder.path(), &bytes);
        bytes[3 * PIECE + 9] ^= 16;
        std::fs::write(folder.path().join("weights"), &bytes).expect("written");
        let fetch = |bytes| Extract::new(&file, 100..5 * PIECE)?.fetch(bytes);
        fetch(0..2 * PIECE).expect("as it was");
        let error = fetch(0..3 * PIECE).expect_err("a bit is another").to_string();
        assert!(error.starts_with("weights is no longer what it was"), "{error}");
        assert!(error.contains("byte 12288"), "{error}");
        std::fs::write(folder.path().join("weights"), &bytes[..4 * PIECE]).expect("written");
        let error = fetch(4 * PIECE..4 * PIECE + 1).expect_err("it ends before").to_string();
        assert_eq!(error, "cannot read weights: it has become shorter");
    }

    #[test]
    fn threads_share_a_large_part() {
        let folder = tempfile::tempdir().expect("a directory");
        let mut bytes: Vec<u8> = (0..5 * BLOCK + 33).map(|at| (at / 7) as u8).collect();
        let file = file(folder.path(), &bytes);
        let mut extract = Extract::new(&file, 0..bytes.len()).expect("memory");
        extract.fetch_all().expect("read");
        assert!(extract.bytes() == bytes, "other bytes");
        for at in [0, 2 * BLOCK, 5 * BLOCK + 32] {
            bytes[at] ^= 1;
            std::fs::write(folder.path().join("weights"), &bytes).expect("written");
            let mut extract = Extract::new(&file, 0..bytes.len()).expect("memory");
            let error = extract.fetch_all().expect_err("a bit is another");
            let place = at / PIECE * PIECE;
            assert!(matches!(error, CheckpointError::Changed { at, .. } if at == place as u64));
            bytes[at] ^= 1;
        }
    }

    #[test]
    fn another_length_is_another_file() {
        let folder = tempfile::tempdir().expect("a directory");
        let mut file = file(folder.path(), &[1; 100]);
        let error = file.expect(ContentHasher::default().finish(), 1).expect_err("none was empty");
        assert!(matches!(error, CheckpointError::Changed { at: 0, .. }), "{error}");
    }
}
