//! The form of a recording in a file. All numbers are little endian.
//!
//! ```text
//! magic "PHXR" | version u16 | zero u16 | rank u32 | size u32 | calls u64
//! each call: operation u8 | zero 7 | rows u64 | widths u64 | inputs u64 | outputs u64
//!            widths u64 each | inputs f32 each | outputs f32 each
//! BLAKE3 of all before, 32 bytes
//! ```

use super::{Call, Operation, Recording};
use crate::link::CollectiveError;

const MAGIC: [u8; 4] = *b"PHXR";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 24;
const DIGEST_BYTES: usize = 32;
const CALL_BYTES: usize = 40;

/// Bytes of a recording without calls.
pub(super) const FRAME_BYTES: u64 = (HEADER_BYTES + DIGEST_BYTES) as u64;

/// Bytes of a call with so many widths and values.
pub(super) fn call_bytes(widths: usize, values: usize) -> u64 {
    let (widths, values) = (widths as u64, values as u64);
    widths
        .saturating_mul(8)
        .saturating_add(values.saturating_mul(4))
        .saturating_add(CALL_BYTES as u64)
}

/// Why there is no recording.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordingError {
    /// The run made more than was to be kept, or a file has more than is to be read.
    #[error("a recording of {bytes} bytes or more is over the limit of {limit}")]
    TooLarge {
        /// What it takes.
        bytes: u64,
        /// What it may take.
        limit: u64,
    },
    /// A collective failed while it was recorded.
    #[error("call {call} failed while it was recorded: {source}")]
    Failed {
        /// The call, from 0.
        call: u64,
        /// How.
        source: CollectiveError,
    },
    /// The bytes are something else.
    #[error("this is no recording of collectives")]
    NotARecording,
    /// A version that this one does not read.
    #[error("the recording is of version {got}, this reads {VERSION}")]
    Version {
        /// Its version.
        got: u16,
    },
    /// The bytes are not those that were written.
    #[error("the recording is damaged: its digest does not fit")]
    Damaged,
    /// The digest fits and the content is none.
    #[error("call {call} of the recording: {what}")]
    Call {
        /// The call, from 0; the number of calls where the trouble is behind the last.
        call: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// A rank that its group does not have.
    #[error("the recording is of rank {rank} of {size}")]
    Rank {
        /// The rank.
        rank: u32,
        /// Ranks of the group.
        size: u32,
    },
}

impl Recording {
    /// The bytes of its file.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(self.rank.to_le_bytes());
        bytes.extend(self.size.to_le_bytes());
        bytes.extend((self.calls.len() as u64).to_le_bytes());
        for call in &self.calls {
            bytes.extend([call.operation as u8, 0, 0, 0, 0, 0, 0, 0]);
            bytes.extend(call.rows.to_le_bytes());
            for length in [call.widths.len(), call.input.len(), call.output.len()] {
                bytes.extend((length as u64).to_le_bytes());
            }
            bytes.extend(call.widths.iter().flat_map(|width| width.to_le_bytes()));
            let values = call.input.iter().chain(&call.output);
            bytes.extend(values.flat_map(|value| value.to_le_bytes()));
        }
        let digest = blake3::hash(&bytes);
        bytes.extend(digest.as_bytes());
        bytes
    }

    /// Reads what [`Recording::encode`] wrote. Nothing is allocated for more than the bytes hold.
    ///
    /// # Errors
    /// [`RecordingError`] for bytes that are too many, none of this form, of another version, or
    /// not those that were written.
    pub fn decode(bytes: &[u8], limit: u64) -> Result<Self, RecordingError> {
        if bytes.len() as u64 > limit {
            return Err(RecordingError::TooLarge { bytes: bytes.len() as u64, limit });
        }
        let mut header = Reader(bytes);
        let magic = header.array::<4>().ok_or(RecordingError::NotARecording)?;
        if magic != MAGIC {
            return Err(RecordingError::NotARecording);
        }
        // Before the digest: another version may have another one.
        let version = header.array().map(u16::from_le_bytes);
        let got = version.ok_or(RecordingError::NotARecording)?;
        if got != VERSION {
            return Err(RecordingError::Version { got });
        }
        let (content, digest) =
            bytes.split_last_chunk::<DIGEST_BYTES>().ok_or(RecordingError::Damaged)?;
        if content.len() < HEADER_BYTES || blake3::hash(content) != *digest {
            return Err(RecordingError::Damaged);
        }
        let mut reader = Reader(&content[8..]);
        let damaged = RecordingError::Damaged;
        let rank = reader.array().map(u32::from_le_bytes).ok_or(damaged.clone())?;
        let size = reader.array().map(u32::from_le_bytes).ok_or(damaged.clone())?;
        let calls = reader.u64().ok_or(damaged)?;
        if rank >= size {
            return Err(RecordingError::Rank { rank, size });
        }
        let mut recording = Recording { rank, size, calls: Vec::new() };
        for call in 0..calls {
            let read = reader.call().map_err(|what| RecordingError::Call { call, what })?;
            recording.calls.push(read);
        }
        if !reader.0.is_empty() {
            return Err(RecordingError::Call { call: calls, what: "bytes follow the last call" });
        }
        Ok(recording)
    }
}

/// Takes numbers from the front.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// `count` numbers of `N` bytes.
    fn list<const N: usize, T>(&mut self, count: u64, read: fn([u8; N]) -> T) -> Option<Vec<T>> {
        let length = usize::try_from(count).ok()?.checked_mul(N)?;
        let (mine, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        let (chunks, _) = mine.as_chunks::<N>();
        Some(chunks.iter().map(|chunk| read(*chunk)).collect())
    }

    fn call(&mut self) -> Result<Call, &'static str> {
        const SHORT: &str = "the bytes end within it";
        let [number, zeros @ ..] = self.array::<8>().ok_or(SHORT)?;
        let all = [Operation::Sum, Operation::Gather, Operation::Barrier];
        let operation = all.into_iter().find(|operation| *operation as u8 == number);
        let operation = operation.ok_or("an unknown operation")?;
        if zeros != [0; 7] {
            return Err("reserved bytes are set");
        }
        let rows = self.u64().ok_or(SHORT)?;
        let (widths, inputs) = (self.u64().ok_or(SHORT)?, self.u64().ok_or(SHORT)?);
        let outputs = self.u64().ok_or(SHORT)?;
        let widths = self.list(widths, u64::from_le_bytes).ok_or(SHORT)?;
        let input = self.list(inputs, f32::from_le_bytes).ok_or(SHORT)?;
        let output = self.list(outputs, f32::from_le_bytes).ok_or(SHORT)?;
        Ok(Call { operation, rows, widths, input, output })
    }
}
