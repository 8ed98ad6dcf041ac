//! What a file holds, piece by piece: its BLAKE3 hash, and a short one of every piece of it, so
//! that a part that is read again later can be told from what it was.

use blake3::Hasher;
use blake3::hazmat::{ChainingValue, HasherExt, Mode};
use blake3::hazmat::{merge_subtrees_non_root, merge_subtrees_root};

/// Bytes of a piece: a page, so that checking a part reads no more of a disk than the part does.
pub const PIECE: usize = 4096;

/// Bytes that are kept of a piece's hash: 8 MiB for a file of 4 GiB.
const KEPT: usize = 8;

/// A file's length, its hash and those of its pieces.
#[derive(Clone, PartialEq, Eq)]
pub struct Content {
    length: u64,
    hash: [u8; 32],
    pieces: Vec<[u8; KEPT]>,
}

impl std::fmt::Debug for Content {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Content").field("length", &self.length).finish_non_exhaustive()
    }
}

impl Content {
    /// Bytes in the file.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The BLAKE3 hash of all of it.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// Whether piece `number`, counted from 0, is these bytes. The last piece may be short.
    pub fn matches(&self, number: usize, bytes: &[u8]) -> bool {
        let Some(kept) = self.pieces.get(number) else { return false };
        if self.pieces.len() == 1 {
            return *kept == short(blake3::hash(bytes).as_bytes());
        }
        // Others are no pieces of any file, and the hasher would panic.
        (1..=PIECE).contains(&bytes.len()) && *kept == short(&value(number, bytes))
    }
}

/// The first bytes of a hash.
fn short(hash: &[u8; 32]) -> [u8; KEPT] {
    std::array::from_fn(|at| hash[at])
}

/// What a piece is in the tree of a file that has several.
fn value(number: usize, bytes: &[u8]) -> ChainingValue {
    let mut hasher = Hasher::new();
    hasher.set_input_offset((number * PIECE) as u64).update(bytes);
    hasher.finalize_non_root()
}

/// Takes a file's bytes in order. The hash is made of those of the pieces, so they cost nothing.
#[derive(Debug, Clone, Default)]
pub struct ContentHasher {
    /// The bytes that make no piece yet, or the last one so far.
    rest: Vec<u8>,
    length: u64,
    pieces: Vec<[u8; KEPT]>,
    /// Whole subtrees, the largest first.
    tree: Vec<ChainingValue>,
}

impl ContentHasher {
    /// Takes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.length += bytes.len() as u64;
        // The last piece is held back: alone it would be the root.
        while self.rest.len() + bytes.len() > PIECE {
            let (piece, after) = bytes.split_at(PIECE - self.rest.len());
            if self.rest.is_empty() {
                self.piece(piece);
            } else {
                self.rest.extend_from_slice(piece);
                let whole = std::mem::take(&mut self.rest);
                self.piece(&whole);
            }
            bytes = after;
        }
        self.rest.extend_from_slice(bytes);
    }

    /// Adds a piece of a file that has several.
    fn piece(&mut self, bytes: &[u8]) {
        let number = self.pieces.len();
        // Two subtrees of a size become one only when more follows: the last pair is the root.
        while self.tree.len() > number.count_ones() as usize {
            let (Some(right), Some(left)) = (self.tree.pop(), self.tree.pop()) else { break };
            self.tree.push(merge_subtrees_non_root(&left, &right, Mode::Hash));
        }
        let value = value(number, bytes);
        self.pieces.push(short(&value));
        self.tree.push(value);
    }

    /// What was taken.
    pub fn finish(mut self) -> Content {
        let rest = std::mem::take(&mut self.rest);
        if self.pieces.is_empty() {
            let hash = *blake3::hash(&rest).as_bytes();
            let pieces = if rest.is_empty() { Vec::new() } else { vec![short(&hash)] };
            return Content { length: self.length, hash, pieces };
        }
        self.piece(&rest);
        let mut right = self.tree.pop().unwrap_or_default();
        while let Some(left) = self.tree.pop() {
            if self.tree.is_empty() {
                right = *merge_subtrees_root(&left, &right, Mode::Hash).as_bytes();
            } else {
                right = merge_subtrees_non_root(&left, &right, Mode::Hash);
            }
        }
        Content { length: self.length, hash: right, pieces: self.pieces }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(bytes: &[u8], at_once: usize) -> Content {
        let mut hasher = ContentHasher::default();
        bytes.chunks(at_once).for_each(|bytes| hasher.update(bytes));
        hasher.finish()
    }

    fn bytes(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 7 + at / 251) as u8).collect()
    }

    #[test]
    fn the_hash_is_that_of_the_whole_however_it_comes() {
        let pieces = (0..20).chain([31, 32, 33, 64, 65, 100]);
        for length in pieces.flat_map(|n| [n * PIECE, n * PIECE + 1, (n + 1) * PIECE - 1]) {
            let bytes = bytes(length);
            for at_once in [1000, PIECE, 5 * PIECE + 1, 1 << 20] {
                let content = content(&bytes, at_once);
                assert_eq!(content.hash(), *blake3::hash(&bytes).as_bytes(), "{length}");
                assert_eq!(content.length(), length as u64);
            }
        }
    }

    #[test]
    fn a_piece_is_told_from_every_other() {
        for length in [1, PIECE, PIECE + 1, 3 * PIECE, 9 * PIECE - 5] {
            let bytes = bytes(length);
            let content = content(&bytes, 1 << 20);
            for (number, piece) in bytes.chunks(PIECE).enumerate() {
                assert!(content.matches(number, piece), "{length} {number}");
                assert!(!content.matches(number + 1, piece), "{length} {number}");
                assert!(!content.matches(number, &piece[1..]), "{length} {number}");
                for bit in [0, 8 * piece.len() - 1] {
                    let mut other = piece.to_vec();
                    other[bit / 8] ^= 1 << (bit % 8);
                    assert!(!content.matches(number, &other), "{length} {number} {bit}");
                }
            }
            assert!(!content.matches(length.div_ceil(PIECE), &[]));
        }
    }
}
