//! The GGUF format, read strictly: a file that lies about itself is refused by name.
//!
//! A file is a magic number, a version, two counts, metadata as keys with typed values, the
//! tensors' names, shapes, types and offsets, and after padding the data. Everything is read
//! through a reader that knows where the file ends, nothing is copied but small numbers, and no
//! extent leaves this module that does not lie within the file.

mod config;
mod names;
mod pre;
mod read;
mod tokenizer;
mod types;
mod words;

use std::collections::BTreeMap;
use std::ops::Range;

use crate::config::{ConfigError, quote};
pub use read::{Array, Value};
use read::{Reader, Shortage};
pub use tokenizer::TokenizerFiles;
pub use types::TensorType;

/// The first four bytes.
const MAGIC: &[u8; 4] = b"GGUF";
/// Versions with the same layout; the first one had shorter counts.
const VERSIONS: [u32; 2] = [2, 3];
/// Data begins at a multiple of this, and so does each tensor, unless the metadata says otherwise.
const ALIGNMENT: u64 = 32;
/// The largest alignment that makes sense: a huge page.
const ALIGNMENT_MAX: u64 = 1 << 21;
/// Bytes of the longest key, by the format.
const KEY_MAX: u64 = 65_535;
/// Bytes of the longest tensor name.
const NAME_MAX: u64 = 256;
/// Dimensions of a tensor, by the format.
const DIMENSIONS_MAX: u32 = 4;
/// The least bytes of a metadata entry and of a tensor's entry.
const ENTRY_MIN: u64 = 13;
const TENSOR_MIN: u64 = 32;

/// Why a file was refused. Each names the file, and the key or tensor at fault.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GgufError {
    /// Another format.
    #[error("{file} does not begin as a GGUF file does")]
    NotGguf {
        /// The file.
        file: String,
    },
    /// A version that is not understood, which includes files of the other byte order.
    #[error("{file}: GGUF version {version} is not understood; understood are 2 and 3")]
    Version {
        /// The file.
        file: String,
        /// Its version.
        version: u32,
    },
    /// The file ends too early, or a length in it is beyond its end.
    #[error("{file}: {what} does not fit into the file")]
    Truncated {
        /// The file.
        file: String,
        /// What was being read, with its name where that is known.
        what: String,
    },
    /// A metadata entry that cannot be.
    #[error("{file}: metadata key {key} {problem}")]
    Metadata {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// What is wrong, as the end of a sentence that begins with the key.
        problem: String,
    },
    /// A tensor that cannot be.
    #[error("{file}: tensor {tensor} {problem}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What is wrong, as the end of a sentence that begins with the tensor.
        problem: String,
    },
    /// The metadata describe no model that is understood.
    #[error("{file}: metadata key {key}: {source}")]
    Config {
        /// The file.
        file: String,
        /// The key, or those of the architecture where more than one is at fault.
        key: String,
        /// What the config they amount to lacks.
        source: Box<ConfigError>,
    },
}

/// Where one tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub kind: TensorType,
    /// Dimensions, row-major: the reverse of the file's order.
    pub shape: Vec<usize>,
    /// Its bytes, counted from the beginning of the file; within the file.
    pub range: Range<usize>,
}

/// A checked file, up to its data.
#[derive(Debug, Clone)]
pub struct Gguf<'a> {
    file: String,
    bytes: &'a [u8],
    metadata: BTreeMap<&'a str, Value<'a>>,
    tensors: BTreeMap<&'a str, TensorInfo>,
}

impl<'a> Gguf<'a> {
    /// Checks and reads a whole file, given as its bytes (e.g. mapped; only those before the data
    /// are touched). `file_name` is for errors only.
    ///
    /// # Errors
    /// Anything that is not exactly the format; see [`GgufError`].
    pub fn parse(file_name: &str, bytes: &'a [u8]) -> Result<Self, GgufError> {
        let file = quote(file_name);
        let mut reader = Reader::new(bytes);
        let short = |what: &str| GgufError::Truncated { file: file.clone(), what: what.to_owned() };
        if reader.array::<4>().ok() != Some(*MAGIC) {
            return Err(GgufError::NotGguf { file });
        }
        let version = reader.u32().map_err(|_| short("the version"))?;
        if !VERSIONS.contains(&version) {
            return Err(GgufError::Version { file, version });
        }
        let tensors = reader.u64().map_err(|_| short("the number of tensors"))?;
        let entries = reader.u64().map_err(|_| short("the number of metadata entries"))?;
        if entries > reader.left() / ENTRY_MIN {
            return Err(short(&format!("a list of {entries} metadata entries")));
        }
        if tensors > reader.left() / TENSOR_MIN {
            return Err(short(&format!("a list of {tensors} tensors")));
        }
        let mut gguf = Gguf { file, bytes, metadata: BTreeMap::new(), tensors: BTreeMap::new() };
        for number in 0..entries {
            gguf.entry(&mut reader, number)?;
        }
        let alignment = gguf.alignment()?;
        let mut extents = Vec::new();
        for number in 0..tensors {
            extents.push(gguf.tensor_entry(&mut reader, number)?);
        }
        gguf.place(extents, reader.position(), alignment)?;
        Ok(gguf)
    }

    /// The file's name as given.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// All tensors in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&'a str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (*name, info))
    }

    /// Looks a tensor up.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Looks a metadata value up.
    pub fn value(&self, key: &str) -> Option<&Value<'a>> {
        self.metadata.get(key)
    }

    fn short(&self, what: impl Into<String>) -> GgufError {
        GgufError::Truncated { file: self.file.clone(), what: what.into() }
    }

    fn bad_key(&self, key: &str, problem: impl Into<String>) -> GgufError {
        GgufError::Metadata { file: self.file.clone(), key: quote(key), problem: problem.into() }
    }

    fn bad_tensor(&self, tensor: &str, problem: impl Into<String>) -> GgufError {
        let (file, tensor) = (self.file.clone(), quote(tensor));
        GgufError::Tensor { file, tensor, problem: problem.into() }
    }

    /// Reads one metadata entry.
    fn entry(&mut self, reader: &mut Reader<'a>, number: u64) -> Result<(), GgufError> {
        let what = || format!("the key of metadata entry {number}");
        let key = reader.text(KEY_MAX).map_err(|_| self.short(what()))?;
        let value = reader.value().map_err(|shortage| match shortage {
            Shortage::End => self.short(format!("the value of metadata key {}", quote(key))),
            Shortage::Malformed(problem) => self.bad_key(key, problem),
        })?;
        match self.metadata.insert(key, value) {
            Some(_) => Err(self.bad_key(key, "stands twice")),
            None => Ok(()),
        }
    }

    fn alignment(&self) -> Result<u64, GgufError> {
        const KEY: &str = "general.alignment";
        let Some(value) = self.value(KEY) else { return Ok(ALIGNMENT) };
        value
            .whole()
            .filter(|n| n.is_power_of_two() && (8..=ALIGNMENT_MAX).contains(n))
            .ok_or_else(|| self.bad_key(KEY, "is not a power of two from 8 to 2 MiB"))
    }

    /// Reads one tensor's entry; its data lie at an offset that is not checked yet.
    fn tensor_entry(&self, reader: &mut Reader<'a>, number: u64) -> Result<Extent<'a>, GgufError> {
        let what = || format!("the name of tensor {number}");
        let name = reader.text(NAME_MAX).map_err(|_| self.short(what()))?;
        let short = |_| self.short(format!("the entry of tensor {}", quote(name)));
        let dimensions = reader.u32().map_err(short)?;
        if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
            return Err(self.bad_tensor(name, format!("has {dimensions} dimensions, not 1 to 4")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(reader.u64().map_err(short)?);
        }
        let code = reader.u32().map_err(short)?;
        let kind = TensorType::from_code(code)
            .map_err(|named| self.bad_tensor(name, format!("has {named}")))?;
        let offset = reader.u64().map_err(short)?;
        let row = shape.first().copied().unwrap_or(0);
        if row % kind.block() as u64 != 0 {
            let problem = format!("has rows of {row}, not of whole {kind} blocks");
            return Err(self.bad_tensor(name, problem));
        }
        let elements = shape.iter().try_fold(1u64, |product, n| product.checked_mul(*n));
        let size = elements
            .and_then(|n| (n / kind.block() as u64).checked_mul(kind.block_bytes() as u64))
            .ok_or_else(|| self.bad_tensor(name, "has more than 2^64 bytes"))?;
        let small: Result<Vec<usize>, _> =
            shape.iter().rev().map(|n| usize::try_from(*n)).collect();
        let shape = small.map_err(|_| self.bad_tensor(name, "is too large for this machine"))?;
        Ok(Extent { name, kind, shape, offset, size })
    }

    /// Checks that tensors lie within the data one after the other, with no more than padding
    /// between them: nothing is hidden, and no extent is named twice.
    fn place(
        &mut self,
        mut extents: Vec<Extent<'a>>,
        header_end: u64,
        alignment: u64,
    ) -> Result<(), GgufError> {
        let length = self.bytes.len() as u64;
        let up = |n: u64| n.checked_next_multiple_of(alignment);
        let start = up(header_end).unwrap_or(u64::MAX);
        extents.sort_by_key(|extent| (extent.offset, extent.size));
        let (mut covered, mut before) = (0u64, "");
        for extent in extents {
            let Extent { name, kind, shape, offset, size } = extent;
            if offset % alignment != 0 {
                let problem = format!("is at {offset}, not at a multiple of {alignment}");
                return Err(self.bad_tensor(name, problem));
            }
            if offset < covered {
                return Err(self.bad_tensor(name, format!("overlaps tensor {}", quote(before))));
            }
            if up(covered).is_none_or(|expected| offset > expected) {
                let problem = format!("follows {} bytes that belong to none", offset - covered);
                return Err(self.bad_tensor(name, problem));
            }
            let place = start.checked_add(offset);
            let place = place.and_then(|begin| Some((begin, begin.checked_add(size)?)));
            let Some((begin, end)) = place.filter(|(_, end)| *end <= length) else {
                let problem = format!("of {size} bytes at {offset} lies beyond the file's end");
                return Err(self.bad_tensor(name, problem));
            };
            (covered, before) = (offset + size, name);
            // Both lie within the file, whose length is a usize.
            let info = TensorInfo { kind, shape, range: begin as usize..end as usize };
            if self.tensors.insert(name, info).is_some() {
                return Err(self.bad_tensor(name, "stands twice"));
            }
        }
        Ok(())
    }
}

/// A tensor's entry as read.
struct Extent<'a> {
    name: &'a str,
    kind: TensorType,
    shape: Vec<usize>,
    offset: u64,
    size: u64,
}
