//! A disk of bytes for the real store: what is not synced may be lost, torn or done in any order.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use redb::StorageBackend;

use super::rng::Rng;

/// Bytes that a disk writes as one.
const SECTOR: usize = 512;

/// Something done to the file since its last sync.
#[derive(Debug, Clone)]
enum Undone {
    Write { offset: usize, data: Vec<u8> },
    Length(usize),
}

#[derive(Default)]
struct Inner {
    /// As a reader sees it.
    seen: Vec<u8>,
    /// As it is sure to be found after the power fails.
    sure: Vec<u8>,
    /// What leads from the one to the other.
    undone: Vec<Undone>,
    /// Operations until the power fails.
    left: Option<u64>,
    dead: bool,
    full: bool,
    /// Syncs do nothing: what the checkers are tested with.
    lies: bool,
}

/// A file on a simulated disk. Clones are the same file.
#[derive(Clone, Default)]
pub struct Bytes(Arc<Mutex<Inner>>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bytes")
    }
}

impl Bytes {
    /// An empty file on a disk that syncs, or only says so.
    pub fn new(lies: bool) -> Self {
        let file = Self::default();
        file.inner().lies = lies;
        file
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("one thread uses it")
    }

    /// Lets the power fail after `left` more operations, or never.
    pub fn cut(&self, left: Option<u64>) {
        self.inner().left = left;
    }

    /// Whether the power has failed.
    pub fn is_dead(&self) -> bool {
        self.inner().dead
    }

    /// Whether there is no room, from now on.
    pub fn set_full(&self, full: bool) {
        self.inner().full = full;
    }

    /// The power fails now.
    pub fn kill(&self) {
        self.inner().dead = true;
    }

    /// The power comes back: of what was not synced, each write is there, not there, or torn. Which
    /// of these depends on `seed` and on where the write went, not on when.
    pub fn restart(&self, seed: u64) {
        let mut inner = self.inner();
        let inner = &mut *inner;
        (inner.dead, inner.left) = (false, None);
        for undone in std::mem::take(&mut inner.undone) {
            let mut rng = Rng::new(seed, undone.place());
            match rng.below(3) {
                0 => {}
                1 => undone.apply(&mut inner.sure),
                _ => undone.torn(&mut rng).apply(&mut inner.sure),
            }
        }
        inner.seen.clone_from(&inner.sure);
    }

    /// Turns a bit of a byte that is not zero; where it is.
    pub fn flip(&self, rng: &mut Rng) -> Option<usize> {
        let mut inner = self.inner();
        let written: Vec<usize> = (0..inner.sure.len()).filter(|at| inner.sure[*at] != 0).collect();
        let at = *rng.pick(&written)?;
        let bit = 1 << rng.below(8);
        inner.sure[at] ^= bit;
        // It may have been cut off since the last sync.
        if let Some(byte) = inner.seen.get_mut(at) {
            *byte ^= bit;
        }
        Some(at)
    }
}

impl Undone {
    /// Where it went.
    fn place(&self) -> u64 {
        match self {
            Self::Write { offset, .. } => *offset as u64,
            Self::Length(length) => u64::MAX - *length as u64,
        }
    }

    fn apply(&self, file: &mut Vec<u8>) {
        match self {
            Self::Length(length) => file.resize(*length, 0),
            Self::Write { offset, data } => {
                let end = offset + data.len();
                // The length may be what was lost.
                if file.len() < end {
                    file.resize(end, 0);
                }
                file[*offset..end].copy_from_slice(data);
            }
        }
    }

    /// As much of it as fits whole sectors before some point.
    fn torn(self, rng: &mut Rng) -> Self {
        match self {
            Self::Write { offset, mut data } => {
                let first = SECTOR - offset % SECTOR;
                let cuts = 1 + data.len().saturating_sub(first).div_ceil(SECTOR) as u64;
                let kept = match rng.below(cuts) {
                    0 => 0,
                    more => first + (more as usize - 1) * SECTOR,
                };
                data.truncate(kept);
                Self::Write { offset, data }
            }
            other => other,
        }
    }
}

impl Inner {
    /// One operation more.
    fn step(&mut self) -> Result<(), io::Error> {
        match &mut self.left {
            _ if self.dead => {}
            Some(0) => self.dead = true,
            Some(left) => *left -= 1,
            None => {}
        }
        if self.dead { Err(io::Error::other("the power failed")) } else { Ok(()) }
    }

    fn write(&mut self, undone: Undone) -> Result<(), io::Error> {
        self.step()?;
        undone.apply(&mut self.seen);
        self.undone.push(undone);
        Ok(())
    }
}

impl StorageBackend for Bytes {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.inner().seen.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let inner = self.inner();
        let offset = offset as usize;
        let found = inner.seen.get(offset..offset + out.len());
        let missing = || io::Error::from(io::ErrorKind::UnexpectedEof);
        out.copy_from_slice(found.ok_or_else(missing)?);
        Ok(())
    }

    fn set_len(&self, length: u64) -> Result<(), io::Error> {
        let mut inner = self.inner();
        let grows = length as usize > inner.seen.len();
        if inner.full && grows {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        inner.write(Undone::Length(length as usize))
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        let mut inner = self.inner();
        inner.step()?;
        let inner = &mut *inner;
        if !inner.lies {
            inner.undone.drain(..).for_each(|undone| undone.apply(&mut inner.sure));
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        let undone = Undone::Write { offset: offset as usize, data: data.to_vec() };
        self.inner().write(undone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(file: &Bytes) -> Vec<u8> {
        file.inner().seen.clone()
    }

    #[test]
    fn what_is_synced_stays_and_the_rest_may_tear_at_sectors() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let file = Bytes::new(false);
            file.set_len(2048).unwrap();
            file.write(0, &[1; 2048]).unwrap();
            file.sync_data().unwrap();
            file.write(256, &[2; 1024]).unwrap();
            assert_eq!(bytes(&file).iter().filter(|byte| **byte == 2).count(), 1024);
            file.restart(seed);
            let found = bytes(&file);
            assert_eq!((found.len(), &found[..256]), (2048, &[1; 256][..]));
            seen.insert(found.iter().filter(|byte| **byte == 2).count());
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 256, 768, 1024]);
    }

    #[test]
    fn a_bit_turns_behind_an_end_that_is_not_synced() {
        let file = Bytes::new(false);
        file.set_len(8).unwrap();
        file.write(0, &[0, 0, 0, 0, 0, 0, 0, 9]).unwrap();
        file.sync_data().unwrap();
        file.set_len(4).unwrap();
        assert_eq!(file.flip(&mut Rng::new(1, 1)), Some(7));
        assert_eq!(bytes(&file), [0; 4]);
    }

    #[test]
    fn the_power_fails_once_and_stays_away() {
        let file = Bytes::new(false);
        file.cut(Some(1));
        file.set_len(10).unwrap();
        assert!(file.write(0, &[1]).is_err() && file.sync_data().is_err() && file.is_dead());
        file.restart(1);
        assert!(file.set_len(20).is_ok());
    }

    #[test]
    fn a_disk_that_lies_loses() {
        let lost = (0..50).any(|seed| {
            let file = Bytes::new(true);
            file.set_len(8).unwrap();
            file.write(0, &[7; 8]).unwrap();
            file.sync_data().unwrap();
            file.restart(seed);
            bytes(&file) != [7; 8]
        });
        assert!(lost);
    }
}
