//! Which record is damaged, when redb only says that some page is.
//!
//! This follows the pointers of the file's current commit and trusts none: after a flip they may
//! lead anywhere, and redb itself would ask for as much memory as they say. The layout is that of
//! redb's file format 3.

use std::ops::Range;

use redb::{Error, StorageBackend, TableHandle};

use super::header::{FLAGS, HEADER, PRIMARY, SLOTS};
use super::{LOG, META, record};

const PAGE: u64 = 4096;
/// Bytes of the header: pages of a region's own header, and its pages of data.
const REGION: [usize; 2] = [16, 20];
/// The first byte of a page.
const LEAF: u8 = 1;
const BRANCH: u8 = 2;
/// Deeper than any tree gets whose pages are 4 KiB.
const DEPTH: usize = 16;

/// The first record whose checksum does not match. `None` when there is none, or none is reached.
pub(super) fn damaged(backend: &dyn StorageBackend) -> Option<String> {
    let len = usize::try_from(backend.len().ok()?).ok()?;
    let mut bytes = vec![0; len];
    backend.read(0, &mut bytes).ok()?;
    let file = File { bytes: &bytes };
    let slot = file.slot()?;
    let mut tables = Vec::new();
    file.walk(number(slot, 8)?, 0, &mut |page| {
        tables.extend(named(page));
        None::<()>
    });
    let table = |name: &str| {
        let root = tables.iter().find(|(known, _)| *known == name)?.1;
        // After its kind, its length and a mark that it has a root.
        number(root, 10)
    };
    let log = || file.walk(table(LOG.name())?, 0, &mut log_leaf);
    let meta = || file.walk(table(META.name())?, 0, &mut meta_leaf);
    match log().or_else(meta)? {
        Error::Corrupted(what) => Some(what),
        other => Some(other.to_string()),
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?).into())
}

struct File<'a> {
    bytes: &'a [u8],
}

impl<'a> File<'a> {
    /// The commit that counts.
    fn slot(&self) -> Option<&'a [u8]> {
        let header = self.bytes.get(..HEADER)?;
        header.get(SLOTS[usize::from(header[FLAGS] & PRIMARY)]..)
    }

    /// The bytes of a page: its number within a region, the region, and how often its size is
    /// doubled.
    fn page(&self, pointer: u64) -> Option<&'a [u8]> {
        let [own, data] = REGION.map(|at| word(self.bytes, at));
        let (own, order) = (own?, pointer >> 59);
        let index = pointer & (0xf_ffff >> order);
        let region = pointer >> 20 & 0xf_ffff;
        let before = 1 + region * (own + data?) + own;
        let from = before.checked_add(index << order)?.checked_mul(PAGE)?;
        let range = Range { start: from, end: from.checked_add(PAGE << order)? };
        self.bytes.get(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
    }

    /// Looks at the leaves under a page in order, until `look` finds something.
    fn walk<T>(
        &self,
        pointer: u64,
        depth: usize,
        look: &mut impl FnMut(&'a [u8]) -> Option<T>,
    ) -> Option<T> {
        let page = self.page(pointer).filter(|_| depth < DEPTH)?;
        match page[0] {
            LEAF => look(page),
            BRANCH => {
                let children = count(page)? + 1;
                // After the checksums of the children.
                let pointers = page.get(8 + 16 * children..8 + 24 * children)?;
                let (pointers, _) = pointers.as_chunks::<8>();
                let mut pointers = pointers.iter().map(|bytes| u64::from_le_bytes(*bytes));
                pointers.find_map(|pointer| self.walk(pointer, depth + 1, look))
            }
            _ => None,
        }
    }
}

/// Pairs of a leaf, or keys of a branch.
fn count(page: &[u8]) -> Option<usize> {
    Some(u16::from_le_bytes(*page.get(2..)?.first_chunk()?).into())
}

/// What stands behind each other from `first` on, by where it ends: `count` offsets at `at`.
fn pieces(page: &[u8], at: usize, count: usize, first: usize) -> Option<Vec<&[u8]>> {
    let (ends, _) = page.get(at..at + 4 * count)?.as_chunks::<4>();
    let mut from = first;
    let piece = |end: &[u8; 4]| {
        let to = u32::from_le_bytes(*end) as usize;
        page.get(std::mem::replace(&mut from, to)..to)
    };
    ends.iter().map(piece).collect()
}

/// A leaf whose keys are names.
fn named(page: &[u8]) -> Vec<(&str, &[u8])> {
    let read = || {
        let count = count(page)?;
        let names = pieces(page, 4, count, 4 + 8 * count)?;
        let first = 4 + 8 * count + names.iter().map(|name| name.len()).sum::<usize>();
        let values = pieces(page, 4 + 4 * count, count, first)?;
        Some(names.into_iter().zip(values))
    };
    let pairs = read().into_iter().flatten();
    pairs.filter_map(|(name, value)| Some((std::str::from_utf8(name).ok()?, value))).collect()
}

/// The damaged entry of a leaf of the log; its keys are numbers of eight bytes.
fn log_leaf(page: &[u8]) -> Option<Error> {
    let count = count(page)?;
    let keys = 4 + 4 * count;
    let values = pieces(page, 4, count, keys + 8 * count)?;
    let mut entries = (0..).zip(values);
    entries.find_map(|(at, value)| {
        let index = number(page, keys + 8 * at)?;
        record::read_entry(index, value).err()
    })
}

/// The damaged record of a leaf of the other table.
fn meta_leaf(page: &[u8]) -> Option<Error> {
    let mut records = named(page).into_iter();
    records.find_map(|(name, value)| record::read_meta(&mut Default::default(), name, value).err())
}
