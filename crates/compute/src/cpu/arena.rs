//! Memory for what is large and stays: weights and caches.
//!
//! A model's matrices are read from end to end for every token. In pages of 4 KiB that is half a
//! million translations for each gigabyte; systems that have larger pages give them only where they
//! are asked to, and only to runs of memory that are large themselves. So pieces are cut from
//! chunks of many megabytes, whose pages are asked to be large. A chunk is given back when the last
//! piece of it is gone. Memory comes zeroed, and is not touched before it is used.

use super::pack::{Bf16Step, F32Step, Int4Step, Int8Step};
use crate::DeviceError;
use crate::check::out_of_memory;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a chunk that pieces share.
const CHUNK: usize = 32 << 20;

/// Pieces of more bytes have a chunk of their own.
const LARGE: usize = CHUNK / 4;

/// Where pieces begin: what the widest loads like best.
const ALIGNMENT: usize = 64;

/// Plain numbers, for which zero bytes are a value.
///
/// # Safety
/// Any pattern of zero bits must be a value of the type, which must not need dropping, and be
/// aligned to at most [`ALIGNMENT`].
pub(crate) unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: numbers.
unsafe impl Plain for f32 {}
// SAFETY: numbers.
unsafe impl Plain for u16 {}
// SAFETY: arrays of numbers, aligned to 64.
unsafe impl Plain for F32Step {}
// SAFETY: arrays of numbers, aligned to 64.
unsafe impl Plain for Bf16Step {}
// SAFETY: arrays of numbers, aligned to 64.
unsafe impl Plain for Int8Step {}
// SAFETY: arrays of numbers, aligned to 64.
unsafe impl Plain for Int4Step {}

/// Hands out pieces.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    open: Mutex<Option<Open>>,
}

/// The chunk that the next small piece is cut from.
#[derive(Debug)]
struct Open {
    chunk: Arc<Chunk>,
    used: usize,
}

/// Memory from the system.
struct Chunk {
    start: NonNull<u8>,
    len: usize,
    /// Keeps the memory; never looked at, since pieces are changed through their own pointers.
    _map: map::Map,
}

// SAFETY: a chunk is an address and a length; pieces of it do not overlap.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

#[cfg(not(miri))]
mod map {
    pub(super) type Map = crate::SparseMemory;

    pub(super) fn new(bytes: usize) -> std::io::Result<Map> {
        Map::new(bytes)
    }

    pub(super) fn start(map: &mut Map) -> *mut u8 {
        map.bytes_mut().as_mut_ptr()
    }
}

/// The interpreter knows no mapped memory.
#[cfg(miri)]
mod map {
    #[derive(Clone)]
    #[repr(align(64))]
    pub(super) struct Line([u8; 64]);

    pub(super) type Map = Vec<Line>;

    pub(super) fn new(bytes: usize) -> std::io::Result<Map> {
        Ok(vec![Line([0; 64]); bytes.div_ceil(64)])
    }

    pub(super) fn start(map: &mut Map) -> *mut u8 {
        map.as_mut_ptr().cast()
    }
}

impl Chunk {
    fn new(bytes: usize) -> Option<Arc<Chunk>> {
        let mut map = map::new(bytes).ok()?;
        let start = NonNull::new(map::start(&mut map))?;
        Some(Arc::new(Chunk { start, len: bytes, _map: map }))
    }
}

impl Arena {
    /// `len` zeros.
    pub(crate) fn zeros<T: Plain>(&self, len: usize) -> Result<Block<T>, DeviceError> {
        let short = || out_of_memory::<T>(len);
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(short)?;
        let whole = bytes.checked_next_multiple_of(ALIGNMENT).ok_or_else(short)?;
        if whole == 0 {
            return Ok(Block { start: NonNull::dangling(), len: 0, chunk: None, of: PhantomData });
        }
        if whole > LARGE {
            return Ok(Block::cut(Chunk::new(whole).ok_or_else(short)?, 0, len));
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |open: &&mut Open| open.chunk.len - open.used >= whole;
        if let Some(open) = open.as_mut().filter(fits) {
            let block = Block::cut(Arc::clone(&open.chunk), open.used, len);
            open.used += whole;
            return Ok(block);
        }
        let chunk = Chunk::new(CHUNK).ok_or_else(short)?;
        *open = Some(Open { chunk: Arc::clone(&chunk), used: whole });
        Ok(Block::cut(chunk, 0, len))
    }
}

/// A piece of memory, a slice to those who have it.
pub(crate) struct Block<T> {
    start: NonNull<T>,
    len: usize,
    /// `None` where there is nothing.
    chunk: Option<Arc<Chunk>>,
    of: PhantomData<T>,
}

// SAFETY: a block owns its elements, as a vector does.
unsafe impl<T: Send> Send for Block<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Block<T> {}

impl<T: Plain> Block<T> {
    /// The elements from byte `at` of a chunk on, which no other piece may have.
    fn cut(chunk: Arc<Chunk>, at: usize, len: usize) -> Block<T> {
        assert!(at.is_multiple_of(ALIGNMENT) && align_of::<T>() <= ALIGNMENT, "a piece in line");
        assert!(at <= chunk.len && len <= (chunk.len - at) / size_of::<T>(), "a piece within");
        // SAFETY: within the chunk, as just checked.
        let start = unsafe { chunk.start.add(at) }.cast();
        Block { start, len, chunk: Some(chunk), of: PhantomData }
    }
}

impl<T> Deref for Block<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        debug_assert!(self.chunk.is_some() || self.len == 0, "memory that is kept");
        // SAFETY: `len` elements of a chunk that lives as long as the block, zeroed or written, and
        // nobody else's; or none.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Block<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed by nobody else.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> fmt::Debug for Block<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} elements", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zero_and_do_not_overlap() {
        let arena = Arena::default();
        let mut blocks: Vec<Block<f32>> = Vec::new();
        for len in [1, 15, 16, 17, 1000, LARGE / 4, LARGE / 4 + 1, 3, 2 * LARGE, 70_000] {
            let mut block = arena.zeros(len).unwrap();
            assert!(block.iter().all(|v| *v == 0.0));
            assert_eq!(block.as_ptr() as usize % ALIGNMENT, 0);
            block.fill(len as f32);
            blocks.push(block);
        }
        for block in &blocks {
            assert!(block.iter().all(|v| *v == block.len() as f32));
        }
        assert!(arena.zeros::<u16>(0).unwrap().is_empty());
    }

    #[test]
    fn a_piece_outlives_its_arena_and_its_neighbours() {
        let arena = Arena::default();
        let [mut first, mut second] = [(); 2].map(|()| arena.zeros::<u16>(9).unwrap());
        first.fill(1);
        second.fill(2);
        drop(first);
        drop(arena);
        assert_eq!(*second, [2; 9]);
    }

    #[test]
    fn what_cannot_be_had_is_an_error() {
        let arena = Arena::default();
        for len in [usize::MAX, usize::MAX / 4, 1 << 60] {
            let error = arena.zeros::<f32>(len).unwrap_err();
            assert!(matches!(error, DeviceError::OutOfMemory { bytes } if bytes >= 1 << 62));
        }
    }
}
