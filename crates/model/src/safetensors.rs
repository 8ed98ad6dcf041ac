//! The safetensors format, read strictly: a file that lies about itself is refused by name.
//!
//! A file is an 8-byte little-endian header length, a JSON header of tensor names, types, shapes
//! and extents, and the data. Nothing is allocated before the length is checked against the file,
//! and no extent leaves this module that does not lie within the file.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use crate::config::quote;

/// The longest header that is read, as in the format's own reference.
pub const HEADER_LIMIT: u64 = 100_000_000;

/// Why a file or an index was refused. Each names the file, and the tensor where one is at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SafetensorsError {
    /// Not even a header length.
    #[error("{file}: {bytes} bytes are too few for a safetensors file")]
    TooShort {
        /// The file.
        file: String,
        /// Its length.
        bytes: usize,
    },
    /// A header over [`HEADER_LIMIT`].
    #[error("{file}: the header claims {length} bytes, more than {HEADER_LIMIT}")]
    HeaderTooLong {
        /// The file.
        file: String,
        /// The length it claims.
        length: u64,
    },
    /// A header that ends behind the file's end.
    #[error("{file}: the header claims {length} bytes, the file has {available} left")]
    HeaderTruncated {
        /// The file.
        file: String,
        /// The length it claims.
        length: u64,
        /// Bytes after the length.
        available: usize,
    },
    /// A header that is not the JSON it should be.
    #[error("{file}: the header is malformed: {message}")]
    Malformed {
        /// The file.
        file: String,
        /// What is wrong, with the tensor's name where there is one.
        message: String,
    },
    /// One name for two tensors.
    #[error("{file}: tensor {tensor} stands twice in the header")]
    Duplicate {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// A type that the format does not have.
    #[error("{file}: tensor {tensor} has the unknown type {dtype}")]
    UnknownDtype {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: String,
    },
    /// A type of the format that no computation here takes.
    #[error("{file}: tensor {tensor} has type {dtype}; usable are F32, F16 and BF16")]
    UnsupportedDtype {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
    },
    /// An extent that ends before it begins, or outside the file.
    #[error("{file}: tensor {tensor} lies at {begin}..{end} of {available} data bytes")]
    Extent {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// First byte, counted from the header's end.
        begin: u64,
        /// Byte after the last.
        end: u64,
        /// Data bytes in the file.
        available: u64,
    },
    /// An extent of another size than type and shape need.
    #[error("{file}: tensor {tensor} has {got} bytes, its type and shape need {needed}")]
    Size {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Bytes of its extent.
        got: u64,
        /// Bytes it needs, as text: the number may exceed 64 bits.
        needed: String,
    },
    /// An extent that begins before the end of the one before it.
    #[error("{file}: tensor {tensor} overlaps tensor {other}")]
    Overlap {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The tensor before it.
        other: String,
    },
    /// Data bytes before a tensor that belong to none.
    #[error("{file}: {bytes} bytes before tensor {tensor} belong to no tensor")]
    Hole {
        /// The file.
        file: String,
        /// The tensor after the hole.
        tensor: String,
        /// The hole's size.
        bytes: u64,
    },
    /// Data bytes after the last tensor.
    #[error("{file}: {bytes} bytes at the end belong to no tensor")]
    Trailing {
        /// The file.
        file: String,
        /// How many.
        bytes: u64,
    },
    /// A tensor that should be in the file, but is not.
    #[error("{file}: tensor {tensor} is missing")]
    Missing {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// A tensor of another shape than the model needs.
    #[error("{file}: tensor {tensor} has shape {got:?}, the model needs {needed:?}")]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The shape in the file.
        got: Vec<usize>,
        /// The shape by the spec.
        needed: Vec<usize>,
    },
    /// An index that names something else than a safetensors file beside it.
    #[error("{file}: tensor {tensor} is said to be in {named:?}, which is {why}")]
    FileName {
        /// The index.
        file: String,
        /// The tensor.
        tensor: String,
        /// The name.
        named: String,
        /// Why it is refused.
        why: &'static str,
    },
}

/// The element types of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types, reason = "the names are the format's own")]
pub enum Dtype {
    F32,
    F16,
    BF16,
    BOOL,
    F4,
    F6_E2M3,
    F6_E3M2,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E5M2FNUZ,
    F8_E4M3FNUZ,
    F8_E8M0,
    I16,
    U16,
    I32,
    U32,
    F64,
    I64,
    U64,
    C64,
}

impl Dtype {
    const ALL: [Dtype; 22] = [
        Dtype::F32,
        Dtype::F16,
        Dtype::BF16,
        Dtype::BOOL,
        Dtype::F4,
        Dtype::F6_E2M3,
        Dtype::F6_E3M2,
        Dtype::U8,
        Dtype::I8,
        Dtype::F8_E5M2,
        Dtype::F8_E4M3,
        Dtype::F8_E5M2FNUZ,
        Dtype::F8_E4M3FNUZ,
        Dtype::F8_E8M0,
        Dtype::I16,
        Dtype::U16,
        Dtype::I32,
        Dtype::U32,
        Dtype::F64,
        Dtype::I64,
        Dtype::U64,
        Dtype::C64,
    ];

    fn from_name(name: &str) -> Option<Dtype> {
        Self::ALL.into_iter().find(|dtype| format!("{dtype:?}") == name)
    }

    /// Bits per element.
    pub fn bits(self) -> u64 {
        match self {
            Dtype::F4 => 4,
            Dtype::F6_E2M3 | Dtype::F6_E3M2 => 6,
            Dtype::BOOL | Dtype::U8 | Dtype::I8 => 8,
            Dtype::F8_E5M2 | Dtype::F8_E4M3 | Dtype::F8_E8M0 => 8,
            Dtype::F8_E5M2FNUZ | Dtype::F8_E4M3FNUZ => 8,
            Dtype::F16 | Dtype::BF16 | Dtype::I16 | Dtype::U16 => 16,
            Dtype::F32 | Dtype::I32 | Dtype::U32 => 32,
            Dtype::F64 | Dtype::I64 | Dtype::U64 | Dtype::C64 => 64,
        }
    }

    /// Whether weights of this type can be loaded.
    pub fn usable(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::F16 | Dtype::BF16)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Where one tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, row-major.
    pub shape: Vec<usize>,
    /// Its bytes, counted from the beginning of the file; within the file.
    pub range: Range<usize>,
}

/// A checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    file: String,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Header {
    /// The file's name as given.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// All tensors in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// Looks a tensor up.
    pub fn get(&self, tensor: &str) -> Option<&TensorInfo> {
        self.tensors.get(tensor)
    }

    /// The tensor, if it has this shape and a usable type.
    ///
    /// # Errors
    /// It is missing, has another shape, or a type that cannot be computed with.
    pub fn expect(&self, tensor: &str, shape: &[usize]) -> Result<&TensorInfo, SafetensorsError> {
        let (file, name) = (|| self.file.clone(), || tensor.to_owned());
        let info = self
            .get(tensor)
            .ok_or_else(|| SafetensorsError::Missing { file: file(), tensor: name() })?;
        if info.shape != shape {
            let (got, needed) = (info.shape.clone(), shape.to_vec());
            return Err(SafetensorsError::Shape { file: file(), tensor: name(), got, needed });
        }
        if !info.dtype.usable() {
            let dtype = info.dtype;
            return Err(SafetensorsError::UnsupportedDtype { file: file(), tensor: name(), dtype });
        }
        Ok(info)
    }
}

/// Checks and reads the header of a whole file, given as its bytes (e.g. mapped; only the header's
/// are touched). `file_name` is for errors only.
///
/// # Errors
/// Anything that is not exactly the format; see [`SafetensorsError`].
pub fn parse_header(file_name: &str, bytes: &[u8]) -> Result<Header, SafetensorsError> {
    let file = quote(file_name);
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(SafetensorsError::TooShort { file, bytes: bytes.len() });
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_LIMIT {
        return Err(SafetensorsError::HeaderTooLong { file, length });
    }
    // The cap makes the conversion exact on every platform.
    let Some((json, data)) = rest.split_at_checked(length as usize) else {
        return Err(SafetensorsError::HeaderTruncated { file, length, available: rest.len() });
    };
    if json.first() != Some(&b'{') {
        let message = "it does not begin with a brace".to_owned();
        return Err(SafetensorsError::Malformed { file, message });
    }
    let raw: RawHeader = serde_json::from_slice(json).map_err(|error| {
        SafetensorsError::Malformed { file: file.clone(), message: error.to_string() }
    })?;
    let data_start = bytes.len() - data.len();
    let mut tensors = BTreeMap::new();
    for (name, raw) in raw.0 {
        let info = check_tensor(&file, &name, raw, data_start, data.len())?;
        if tensors.insert(name.clone(), info).is_some() {
            return Err(SafetensorsError::Duplicate { file, tensor: quote(&name) });
        }
    }
    check_tiling(&file, &tensors, data_start, bytes.len())?;
    Ok(Header { file, tensors })
}

/// Checks one entry by itself: type, size and that it lies within the data.
fn check_tensor(
    file: &str,
    name: &str,
    raw: RawTensor,
    data_start: usize,
    data_len: usize,
) -> Result<TensorInfo, SafetensorsError> {
    let (file, tensor) = (|| file.to_owned(), || quote(name));
    let Some(dtype) = Dtype::from_name(&raw.dtype) else {
        let dtype = quote(&raw.dtype);
        return Err(SafetensorsError::UnknownDtype { file: file(), tensor: tensor(), dtype });
    };
    let (begin, end) = raw.data_offsets;
    let available = data_len as u64;
    if begin > end || end > available {
        let (file, tensor) = (file(), tensor());
        return Err(SafetensorsError::Extent { file, tensor, begin, end, available });
    }
    let got = end - begin;
    let size_error = |needed: String| {
        Err(SafetensorsError::Size { file: file(), tensor: tensor(), got, needed })
    };
    let bits = raw.shape.iter().try_fold(dtype.bits(), |bits, &n| bits.checked_mul(n));
    match bits {
        None => return size_error("more than 2^64".to_owned()),
        Some(bits) if bits % 8 != 0 => return size_error(format!("{bits} bits")),
        Some(bits) if bits / 8 != got => return size_error((bits / 8).to_string()),
        Some(_) => {}
    }
    // A dimension may exceed usize only beside a zero on a 32-bit machine.
    let shape: Result<Vec<usize>, _> = raw.shape.iter().map(|&n| usize::try_from(n)).collect();
    let Ok(shape) = shape else {
        return size_error("more than the address space".to_owned());
    };
    // No overflow: both lie within the file, whose length is a usize.
    let range = data_start + begin as usize..data_start + end as usize;
    Ok(TensorInfo { dtype, shape, range })
}

/// The format wants the data tiled: no tensor over another, no byte without a tensor. This keeps
/// files from hiding content and from naming one extent many times.
fn check_tiling(
    file: &str,
    tensors: &BTreeMap<String, TensorInfo>,
    data_start: usize,
    file_len: usize,
) -> Result<(), SafetensorsError> {
    let mut order: Vec<(&String, &Range<usize>)> =
        tensors.iter().map(|(name, info)| (name, &info.range)).collect();
    order.sort_by_key(|(name, range)| (range.start, range.end, *name));
    let mut covered = data_start;
    let mut before = None;
    for (name, range) in order {
        let (file, tensor) = (|| file.to_owned(), || quote(name));
        if range.start < covered {
            let other = before.map(quote).unwrap_or_default();
            return Err(SafetensorsError::Overlap { file: file(), tensor: tensor(), other });
        }
        if range.start > covered {
            let bytes = (range.start - covered) as u64;
            return Err(SafetensorsError::Hole { file: file(), tensor: tensor(), bytes });
        }
        covered = range.end;
        before = Some(name.as_str());
    }
    if covered != file_len {
        let bytes = (file_len - covered) as u64;
        return Err(SafetensorsError::Trailing { file: file.to_owned(), bytes });
    }
    Ok(())
}

/// One entry as it stands in the header.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a tensor's entry")]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// All entries in the header's order, repeated names included.
struct RawHeader(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    let named = |error: A::Error| {
                        A::Error::custom(format_args!("{}: {error}", quote(&name)))
                    };
                    if name == "__metadata__" {
                        // Remarks of whoever wrote the file; text only, by the format.
                        map.next_value::<BTreeMap<String, String>>().map_err(named)?;
                        continue;
                    }
                    let tensor = map.next_value::<RawTensor>().map_err(named)?;
                    entries.push((name, tensor));
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// A `model.safetensors.index.json`: which file holds which tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    file: String,
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads an index. `file_name` is for errors only.
    ///
    /// # Errors
    /// Not an index, over [`HEADER_LIMIT`], a tensor twice, or a file name that is not plainly
    /// that of a safetensors file in the same directory.
    pub fn parse(file_name: &str, json: &str) -> Result<Index, SafetensorsError> {
        let file = quote(file_name);
        if json.len() as u64 > HEADER_LIMIT {
            return Err(SafetensorsError::HeaderTooLong { file, length: json.len() as u64 });
        }
        let raw: RawIndex = serde_json::from_str(json).map_err(|error| {
            SafetensorsError::Malformed { file: file.clone(), message: error.to_string() }
        })?;
        let mut weight_map = BTreeMap::new();
        for (tensor, named) in raw.weight_map.0 {
            if let Some(why) = refused_name(&named) {
                let (tensor, named) = (quote(&tensor), quote(&named));
                return Err(SafetensorsError::FileName { file, tensor, named, why });
            }
            if weight_map.insert(tensor.clone(), named).is_some() {
                return Err(SafetensorsError::Duplicate { file, tensor: quote(&tensor) });
            }
        }
        Ok(Index { file, weight_map })
    }

    /// The file that holds a tensor.
    ///
    /// # Errors
    /// The index does not name the tensor.
    pub fn file_of(&self, tensor: &str) -> Result<&str, SafetensorsError> {
        self.weight_map.get(tensor).map(String::as_str).ok_or_else(|| SafetensorsError::Missing {
            file: self.file.clone(),
            tensor: quote(tensor),
        })
    }

    /// The files named, each once, in ascending order.
    pub fn files(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }

    /// Tensors and their files in the order of the tensors' names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &str)> {
        self.weight_map.iter().map(|(tensor, file)| (tensor.as_str(), file.as_str()))
    }
}

/// Why a file name in an index is refused, if it is. Names decide what is opened.
fn refused_name(name: &str) -> Option<&'static str> {
    let separators = ['/', '\\', ':', '\0'];
    if name.is_empty() || name.len() > 255 {
        Some("no file name")
    } else if name.contains(separators) || name.contains("..") || name.chars().any(char::is_control)
    {
        Some("not a plain file name")
    } else if !name.ends_with(".safetensors") {
        Some("not a safetensors file")
    } else {
        None
    }
}

#[derive(serde::Deserialize)]
#[serde(expecting = "an index")]
struct RawIndex {
    weight_map: RawMap,
}

/// Name and file, repeated names included.
struct RawMap(Vec<(String, String)>);

impl<'de> Deserialize<'de> for RawMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawMap, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry::<String, String>()? {
                    entries.push(entry);
                }
                Ok(RawMap(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
