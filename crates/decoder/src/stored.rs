//! One tensor of the model as it stands in a checkpoint: alone, or as part of a fused or
//! shared stored tensor, plain or with scales beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use compute::{BlockFormat, Encoding, Int4, Int4Order, SparseMemory, StoredType, WeightSource};
use half::{bf16, f16};
use model::safetensors::{Dtype, Header, SafetensorsError, TensorInfo};
use model::{Int4Packing, Int4Tensors, TensorSpec};

use crate::checkpoint::INDEX;
use crate::files::{Extract, WeightFile};
use crate::{CheckpointError, LoadError};

/// Rows and columns that share one scale in an FP8 checkpoint.
const FP8_BLOCK: usize = 128;
/// Elements that share one scale in an MXFP4 checkpoint.
const MXFP4_BLOCK: usize = 32;

/// Where a tensor was found.
pub(crate) struct Located {
    pub(crate) name: String,
    pub(crate) place: Place,
    pub(crate) elements: Elements,
    /// Elements per stored row.
    pub(crate) stored_columns: usize,
    pub(crate) first_row: usize,
    pub(crate) row_step: usize,
    pub(crate) transposed: bool,
    pub(crate) paired: Option<usize>,
}

/// Bytes of a file.
pub(crate) struct Place {
    pub(crate) file: usize,
    pub(crate) bytes: Range<usize>,
}

pub(crate) enum Elements {
    Plain(StoredType),
    Blocks(BlockFormat),
    Fp8Blocks { scales: Place, scale_type: StoredType },
    Mxfp4 { scales: Place },
    Int4 { scales: Place, zeros: Place, groups: Option<Place>, group: usize, order: Int4Order },
}

/// Outputs and inputs of a matrix, as they stand or turned over.
#[derive(Clone)]
struct Rectangle {
    rows: Range<usize>,
    columns: Range<usize>,
    turned: bool,
}

/// One tensor as stored, and what was read of it so far. Packing several rectangles of it reads no
/// byte twice.
pub struct StoredTensor<'a> {
    located: &'a Located,
    bytes: Extract<'a>,
    /// What turns its elements into numbers: scales, zeros, groups, as far as it has them.
    beside: Vec<Extract<'a>>,
}

impl<'a> StoredTensor<'a> {
    pub(crate) fn new(
        located: &'a Located,
        files: &'a [WeightFile],
        used: &mut Option<SparseMemory>,
    ) -> Result<Self, CheckpointError> {
        let extract = |place: &Place| Extract::new(&files[place.file], place.bytes.clone());
        let beside = match &located.elements {
            Elements::Plain(_) | Elements::Blocks(_) => Vec::new(),
            Elements::Fp8Blocks { scales, .. } | Elements::Mxfp4 { scales } => vec![scales],
            Elements::Int4 { scales, zeros, groups, .. } => {
                [scales, zeros].into_iter().chain(groups).collect()
            }
        };
        Ok(Self {
            located,
            bytes: {
                let Place { file, bytes } = &located.place;
                Extract::within(&files[*file], bytes.clone(), used)?
            },
            beside: beside.into_iter().map(extract).collect::<Result<_, _>>()?,
        })
    }

    /// The memory that its elements stand in, to be used again.
    pub(crate) fn into_memory(self) -> SparseMemory {
        self.bytes.into_memory()
    }

    /// Its name.
    pub fn name(&self) -> &'a str {
        &self.located.name
    }

    /// Outputs `rows` and inputs `columns` of a matrix, read and checked, to be packed.
    ///
    /// # Errors
    /// The bytes cannot be read or are others than they were; the rectangle is not in the matrix.
    pub fn source(
        &mut self,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Result<WeightSource<'_>, LoadError> {
        self.read(&Rectangle { rows, columns, turned: false })
    }

    /// The same rectangle turned over: its columns become outputs and its rows inputs. `None` for
    /// a tensor that is stored in a way that cannot be read so.
    ///
    /// # Errors
    /// As [`StoredTensor::source`].
    pub fn turned(
        &mut self,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Result<Option<WeightSource<'_>>, LoadError> {
        if self.located.row_step != 1 || self.located.paired.is_some() {
            return Ok(None);
        }
        self.read(&Rectangle { rows, columns, turned: true }).map(Some)
    }

    fn read(&mut self, rectangle: &Rectangle) -> Result<WeightSource<'_>, LoadError> {
        self.beside.iter_mut().try_for_each(Extract::fetch_all)?;
        let failed = |source| LoadError::Pack { tensor: self.located.name.clone(), source };
        for run in self.view(rectangle).touched().map_err(failed)? {
            self.bytes.fetch(run)?;
        }
        Ok(self.view(rectangle))
    }

    /// A rectangle of what is here.
    fn view(&self, rectangle: &Rectangle) -> WeightSource<'_> {
        let Located { stored_columns, first_row, row_step, transposed, paired, .. } = *self.located;
        let Rectangle { rows, columns, turned } = rectangle.clone();
        let (rows, columns, first_row) = match turned {
            false => (rows, columns, first_row),
            true => (columns, first_row + rows.start..first_row + rows.end, 0),
        };
        WeightSource {
            bytes: self.bytes.bytes(),
            encoding: self.encoding(),
            stored_columns,
            rows,
            columns,
            first_row,
            row_step,
            transposed: transposed != turned,
            paired,
        }
    }

    fn encoding(&self) -> Encoding<'_> {
        let beside = |at: usize| self.beside.get(at).map(Extract::bytes);
        let [scales, zeros] = [0, 1].map(|at| beside(at).unwrap_or_default());
        match &self.located.elements {
            Elements::Plain(stored) => Encoding::Plain(*stored),
            Elements::Blocks(format) => Encoding::Blocks(*format),
            Elements::Fp8Blocks { scale_type, .. } => {
                Encoding::Fp8Blocks { scales, scale_type: *scale_type, block: FP8_BLOCK }
            }
            Elements::Mxfp4 { .. } => Encoding::Mxfp4 { scales },
            Elements::Int4 { group, order, .. } => {
                let (groups, group, order) = (beside(2), *group, *order);
                Encoding::Int4(Int4 { scales, zeros, groups, group, order })
            }
        }
    }

    /// Stored bytes of so many elements, scales not counted for FP8 (one in 4096) and 4-bit words.
    pub fn bytes_of(&self, elements: usize) -> u64 {
        let elements = elements as u64;
        match self.located.elements {
            Elements::Plain(stored) => elements * element_bytes(stored) as u64,
            Elements::Fp8Blocks { .. } => elements,
            Elements::Mxfp4 { .. } => elements / 2 + elements / MXFP4_BLOCK as u64,
            Elements::Blocks(format) => elements * format.bytes() as u64 / format.elements() as u64,
            Elements::Int4 { .. } => elements / 2,
        }
    }

    /// Elements `run` of a vector, read and checked, widened to f32.
    ///
    /// # Errors
    /// [`CheckpointError::Outside`] where the run is not within what is stored or that is not
    /// plain; the bytes cannot be read or are others than they were.
    pub fn values(&mut self, run: Range<usize>) -> Result<Vec<f32>, CheckpointError> {
        let Located { first_row, row_step, paired, .. } = *self.located;
        let outside = || CheckpointError::Outside {
            tensor: self.located.name.clone(),
            first: run.start,
            end: run.end,
        };
        let Elements::Plain(stored) = self.located.elements else {
            return Err(outside());
        };
        let width = element_bytes(stored);
        let place = |element: usize| {
            // As matrices are: the second half of a head stands between the first.
            let element = paired.map_or(element, |head| {
                let (within, half) = (element % head, head / 2);
                element - within + 2 * (within % half) + within / half
            });
            (first_row + element * row_step) * width
        };
        let (first, end) = run
            .clone()
            .map(place)
            .fold((usize::MAX, 0), |(first, end), at| (first.min(at), end.max(at + width)));
        if end > self.bytes.bytes().len() {
            return Err(outside());
        }
        self.bytes.fetch(first.min(end)..end)?;
        let bytes = self.bytes.bytes();
        Ok(run.map(|element| widen(stored, &bytes[place(element)..][..width])).collect())
    }
}

fn widen(stored: StoredType, bytes: &[u8]) -> f32 {
    match stored {
        StoredType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        StoredType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        StoredType::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
    }
}

fn element_bytes(stored: StoredType) -> usize {
    match stored {
        StoredType::F32 => 4,
        StoredType::F16 | StoredType::Bf16 => 2,
    }
}

/// Finds tensors in the headers of a checkpoint and remembers which stored ones were used; several
/// logical tensors may share one.
pub(crate) struct Finder<'a> {
    headers: &'a [Header],
    /// By stored tensor: the number of its file.
    holders: BTreeMap<&'a str, usize>,
    used: BTreeSet<&'a str>,
}

impl<'a> Finder<'a> {
    pub(crate) fn new(headers: &'a [Header], holders: BTreeMap<&'a str, usize>) -> Self {
        Self { headers, holders, used: BTreeSet::new() }
    }

    /// Stored tensors that nothing asked for, with the number of their file.
    pub(crate) fn unused(&self) -> impl Iterator<Item = (&'a str, usize)> {
        let unused = self.holders.iter().filter(|(name, _)| !self.used.contains(*name));
        unused.map(|(name, file)| (*name, *file))
    }

    /// Finds a tensor, and its scales where it is stored with some.
    pub(crate) fn locate(&mut self, wanted: TensorSpec) -> Result<Located, CheckpointError> {
        if let model::Encoding::Int4(tensors) = &wanted.stored.encoding {
            if !self.holders.contains_key(wanted.name.as_str()) && self.has(&tensors.plain) {
                return self.locate(left_plain(&wanted, &tensors.plain));
            }
            return self.int4(&wanted, tensors);
        }
        let stored = &wanted.stored;
        let (file, info) = self.find(&wanted.name)?;
        let header = &self.headers[file];
        let shape = &stored.shape;
        let last = |from_end: usize| shape.iter().rev().nth(from_end).copied().unwrap_or(1);
        let (elements, stored_columns) = match &stored.encoding {
            model::Encoding::Fp8Blocks { scales } if info.dtype == Dtype::F8_E4M3 => {
                expect(header, &wanted.name, shape, Dtype::F8_E4M3)?;
                let (scales, scale_type) = self.fp8_scales(scales, shape, stored.slab)?;
                (Elements::Fp8Blocks { scales, scale_type }, last(0))
            }
            model::Encoding::Mxfp4 { scales } => {
                expect(header, &wanted.name, shape, Dtype::U8)?;
                let rows = shape.split_last().map_or(&[][..], |(_, rows)| rows);
                let scales = self.scales(scales, rows, stored.slab)?;
                (Elements::Mxfp4 { scales }, last(1) * MXFP4_BLOCK)
            }
            // Words were found above, and types of their own only GGUF files have.
            model::Encoding::Plain
            | model::Encoding::Fp8Blocks { .. }
            | model::Encoding::AsTyped
            | model::Encoding::Int4(_) => {
                let info = header.expect(&wanted.name, shape)?;
                (Elements::Plain(plain(header, &wanted.name, info.dtype)?), last(0))
            }
        };
        Ok(Located {
            place: place(file, info, stored.slab),
            elements,
            stored_columns,
            first_row: stored.first_row,
            row_step: stored.row_step,
            transposed: stored.transposed,
            paired: stored.paired,
            name: wanted.name,
        })
    }

    fn has(&self, name: &str) -> bool {
        self.holders.contains_key(name)
    }

    /// Finds the words of a 4-bit matrix with what turns them into numbers.
    fn int4(
        &mut self,
        wanted: &TensorSpec,
        tensors: &Int4Tensors,
    ) -> Result<Located, CheckpointError> {
        let [outputs, inputs] = wanted.stored.shape[..] else {
            return Err(self.missing(&wanted.name));
        };
        let group = tensors.format.group.unwrap_or(inputs);
        let groups = inputs.div_ceil(group.max(1));
        // Counts that do not divide differ from what is stored: the shape is then refused.
        let (order, words) = match tensors.format.packing {
            Int4Packing::Awq => (Int4Order::Awq, [inputs, outputs.div_ceil(8)]),
            Int4Packing::Gptq { zeros_less_one, .. } => {
                let order = Int4Order::Gptq { zero_offset: u8::from(zeros_less_one) };
                (order, [inputs.div_ceil(8), outputs])
            }
        };
        for (what, count) in [("outputs", outputs), ("inputs", inputs)] {
            if count % 8 != 0 {
                let tensor = wanted.name.clone();
                return Err(CheckpointError::Eighths { tensor, what, count });
            }
        }
        let mut find = |name: &str, shape: &[usize], dtype| {
            let (file, info) = self.find(name)?;
            expect(&self.headers[file], name, shape, dtype)?;
            Ok::<_, CheckpointError>(place(file, info, None))
        };
        let place = find(&wanted.name, &words, Dtype::I32)?;
        let scales = find(&tensors.scales, &[groups, outputs], Dtype::F16)?;
        let zeros = find(&tensors.zeros, &[groups, outputs / 8], Dtype::I32)?;
        let mut list = None;
        if let Int4Packing::Gptq { listed, .. } = tensors.format.packing {
            // Without an order of its own the list says nothing new, and may be left out.
            if listed || self.has(&tensors.groups) {
                let (file, info) = self.find(&tensors.groups)?;
                expect(&self.headers[file], &tensors.groups, &[inputs], Dtype::I32)?;
                list = Some(self::place(file, info, None));
            }
        }
        Ok(Located {
            name: wanted.name.clone(),
            place,
            elements: Elements::Int4 { scales, zeros, groups: list, group, order },
            stored_columns: outputs,
            first_row: wanted.stored.first_row,
            row_step: wanted.stored.row_step,
            transposed: true,
            paired: None,
        })
    }

    fn missing(&self, tensor: &str) -> CheckpointError {
        let file = match self.headers {
            [only] => only.file(),
            _ => INDEX,
        };
        CheckpointError::Missing { file: file.to_owned(), tensor: tensor.to_owned() }
    }

    /// A stored tensor by name; it counts as used.
    fn find(&mut self, name: &str) -> Result<(usize, &'a TensorInfo), CheckpointError> {
        let missing = || self.missing(name);
        let (name, file) = self.holders.get_key_value(name).ok_or_else(missing)?;
        let info = self.headers[*file].get(name).ok_or_else(missing)?;
        self.used.insert(name);
        Ok((*file, info))
    }

    /// One number for each block of [`FP8_BLOCK`] rows and columns; blocks at the edges are
    /// partial.
    fn fp8_scales(
        &mut self,
        name: &str,
        shape: &[usize],
        slab: Option<usize>,
    ) -> Result<(Place, StoredType), CheckpointError> {
        let matrix = shape.len().saturating_sub(2);
        let blocks = shape[matrix..].iter().map(|n| n.div_ceil(FP8_BLOCK));
        let shape: Vec<usize> = shape[..matrix].iter().copied().chain(blocks).collect();
        let (file, info) = self.find(name)?;
        let scale_type = plain(&self.headers[file], name, info.dtype)?;
        expect(&self.headers[file], name, &shape, info.dtype)?;
        Ok((place(file, info, slab), scale_type))
    }

    /// One exponent for each block of [`MXFP4_BLOCK`] elements of a row.
    fn scales(
        &mut self,
        name: &str,
        shape: &[usize],
        slab: Option<usize>,
    ) -> Result<Place, CheckpointError> {
        let (file, info) = self.find(name)?;
        expect(&self.headers[file], name, shape, Dtype::U8)?;
        Ok(place(file, info, slab))
    }
}

/// A matrix that was left as it was in a checkpoint of 4-bit integers.
fn left_plain(wanted: &TensorSpec, name: &str) -> TensorSpec {
    let mut plain = wanted.clone();
    plain.name = name.to_owned();
    plain.stored.encoding = model::Encoding::Plain;
    plain.stored.transposed = false;
    plain
}

/// The bytes of a stored tensor, or of its slab.
fn place(file: usize, info: &TensorInfo, slab: Option<usize>) -> Place {
    let bytes = match slab {
        None => info.range.clone(),
        Some(slab) => {
            let size = info.range.len() / info.shape.first().copied().unwrap_or(1).max(1);
            let start = info.range.start + slab * size;
            start..start + size
        }
    };
    Place { file, bytes }
}

/// Checks the shape and the type of a tensor that is not plain.
fn expect(
    header: &Header,
    name: &str,
    shape: &[usize],
    dtype: Dtype,
) -> Result<(), CheckpointError> {
    let (file, tensor) = (header.file().to_owned(), name.to_owned());
    let Some(info) = header.get(name) else {
        return Err(CheckpointError::Missing { file, tensor });
    };
    if info.shape != shape {
        let (got, needed) = (info.shape.clone(), shape.to_vec());
        return Err(SafetensorsError::Shape { file, tensor, got, needed }.into());
    }
    if info.dtype != dtype {
        let expected = match dtype {
            Dtype::F8_E4M3 => "F8_E4M3",
            Dtype::U8 => "U8",
            Dtype::I32 => "I32",
            Dtype::F16 => "F16",
            _ => "F32",
        };
        let dtype = info.dtype.to_string();
        return Err(CheckpointError::Type { file, tensor, dtype, expected });
    }
    Ok(())
}

fn plain(header: &Header, name: &str, dtype: Dtype) -> Result<StoredType, CheckpointError> {
    match dtype {
        Dtype::F32 => Ok(StoredType::F32),
        Dtype::F16 => Ok(StoredType::F16),
        Dtype::BF16 => Ok(StoredType::Bf16),
        other => Err(CheckpointError::Type {
            file: header.file().to_owned(),
            tensor: name.to_owned(),
            dtype: other.to_string(),
            expected: "F32, F16 or BF16",
        }),
    }
}
