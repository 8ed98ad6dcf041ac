//! Reads stored matrices: plain numbers, FP8 with block scales, MXFP4, blocks, 4-bit words;
//! straight or transposed.

use std::ops::Range;

use super::int4::Int4Reader;
use super::math::from_bf16;
use crate::blocks::BLOCK_MAX;
use crate::check::Check;
use crate::{BlockFormat, DeviceError, Encoding, Int4Order, StoredType, WeightSource};

/// Columns that share an MXFP4 scale.
const MX_BLOCK: usize = 32;

/// The finite float8 with four bits of exponent (bias 7) and three of mantissa, by its code.
const FP8: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = ((code >> 3 & 15) as u32, (code & 7) as u32);
        let magnitude = if exponent == 15 && mantissa == 7 {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 / 512.0
        } else {
            f32::from_bits((exponent + 120) << 23 | mantissa << 20)
        };
        table[code] = if code < 128 { magnitude } else { -magnitude };
        code += 1;
    }
    table
};

/// The four-bit float of MXFP4, by its code.
const FP4: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// `2^(code - 127)`, NaN for 255.
fn power_of_two(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// How elements become numbers.
#[derive(Clone, Copy)]
enum Decoder<'a> {
    F32,
    F16,
    Bf16,
    /// Scales `[row of blocks][across]`.
    Fp8 {
        scales: &'a [u8],
        scale_type: StoredType,
        block: usize,
        across: usize,
    },
    Mxfp4 {
        scales: &'a [u8],
    },
    Blocks(BlockFormat),
    Int4(Int4Reader<'a>),
}

/// A checked part of a stored matrix.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    decoder: Decoder<'a>,
    /// Bytes between stored rows.
    stride: usize,
    /// Stored row (column, if transposed) of output 0, and from one output to the next.
    first: usize,
    step: usize,
    /// Stored column (row, if transposed) of input 0.
    start: usize,
    transposed: bool,
    /// Outputs of a head whose halves stand between each other, and the first output taken.
    paired: Option<(usize, usize)>,
    /// Outputs.
    pub(crate) rows: usize,
    /// Inputs.
    pub(crate) columns: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(source: &WeightSource<'a>) -> Result<Self, DeviceError> {
        let check = Check("pack");
        let (rows, columns) = (&source.rows, &source.columns);
        check.at_most("start of the rows", rows.start, rows.end)?;
        check.at_most("start of the columns", columns.start, columns.end)?;
        check.at_least("row_step", source.row_step, 1)?;
        let stride = bytes_of_a_row(check, source)?;
        if stride > 0 {
            check.equal("bytes beyond whole rows", source.bytes.len() % stride, 0)?;
        }
        // Without columns there is no telling how many rows there are: as many as are asked for.
        let stored_rows = match source.encoding {
            Encoding::Int4(int4) if int4.order != Int4Order::Awq => {
                source.bytes.len().checked_div(stride).map(|words| words.saturating_mul(8))
            }
            _ => source.bytes.len().checked_div(stride),
        };
        let stored_columns = Some(source.stored_columns);
        let (outputs, inputs) = match source.transposed {
            false => (stored_rows, stored_columns),
            true => (stored_columns, stored_rows),
        };
        if let Some(inputs) = inputs {
            check.at_most("end of the columns", columns.end, inputs)?;
        }
        if let Some(outputs) = outputs
            && let Some(last) = rows.end.checked_sub(1)
        {
            let last = last_of_head(check, last, source.paired)?;
            let last = check.product("end of the rows", &[last, source.row_step])?;
            let last = check.fits("end of the rows", source.first_row, last, outputs)?;
            // An empty run may begin at the end.
            check.fits("end of the rows", last, usize::from(!rows.is_empty()), outputs)?;
        }
        let decoder = decoder(check, source, stored_rows.unwrap_or(0))?;
        let empty = rows.is_empty() || columns.is_empty();
        let start = if source.paired.is_some() { 0 } else { rows.start };
        Ok(Reader {
            bytes: source.bytes,
            decoder,
            stride,
            first: if empty { 0 } else { source.first_row + start * source.row_step },
            step: if empty { 0 } else { source.row_step },
            start: columns.start,
            transposed: source.transposed,
            paired: source.paired.map(|head| (head, rows.start)),
            rows: rows.len(),
            columns: columns.len(),
        })
    }

    /// Inputs of output `row` of the part, widened. `out` holds `columns` values.
    pub(crate) fn read(&self, row: usize, out: &mut [f32]) {
        let at = self.place(row);
        if self.transposed {
            for (i, value) in out.iter_mut().enumerate() {
                *value = self.element(self.start + i, at);
            }
            return;
        }
        let start = self.start;
        // Words of eight rows have no bytes of one row.
        let bytes = self.bytes.get(at * self.stride..).unwrap_or_default();
        match self.decoder {
            Decoder::F32 => widen(&bytes[start * 4..], out, f32::from_le_bytes),
            Decoder::F16 => widen(&bytes[start * 2..], out, half_to_f32),
            Decoder::Bf16 => widen(&bytes[start * 2..], out, bf16_to_f32),
            Decoder::Blocks(format) => blocks(format, bytes, start, out),
            Decoder::Fp8 { .. } | Decoder::Mxfp4 { .. } | Decoder::Int4(_) => {
                for (i, value) in out.iter_mut().enumerate() {
                    *value = self.element(at, start + i);
                }
            }
        }
    }

    /// The bytes that [`Reader::read`] touches for all rows, neighbouring runs joined.
    pub(crate) fn touched(&self) -> Vec<Range<usize>> {
        if self.rows == 0 || self.columns == 0 {
            return Vec::new();
        }
        let outputs = (0..self.rows).map(|row| self.place(row));
        let inputs = self.start..self.start + self.columns;
        let mut runs: Vec<Range<usize>> = Vec::new();
        let mut touch = |row: usize, columns: Range<usize>| {
            let run = self.run(row, columns);
            match runs.last_mut() {
                Some(last) if last.start <= run.start && run.start <= last.end => {
                    last.end = last.end.max(run.end);
                }
                _ => runs.push(run),
            }
        };
        if !self.transposed {
            outputs.for_each(|row| touch(row, inputs.clone()));
            return runs;
        }
        let (first, last) =
            outputs.fold((usize::MAX, 0), |(first, last), at| (first.min(at), last.max(at)));
        inputs.for_each(|row| touch(row, first..last + 1));
        runs
    }

    /// The bytes of some columns of a stored row.
    fn run(&self, row: usize, columns: Range<usize>) -> Range<usize> {
        let Range { start, end } = columns;
        let (row, columns) = match self.decoder {
            Decoder::F32 => (row, 4 * start..4 * end),
            Decoder::F16 | Decoder::Bf16 => (row, 2 * start..2 * end),
            Decoder::Fp8 { .. } => (row, start..end),
            Decoder::Mxfp4 { .. } => (row, start / 2..end.div_ceil(2)),
            Decoder::Blocks(format) => {
                let (elements, bytes) = (format.elements(), format.bytes());
                (row, start / elements * bytes..end.div_ceil(elements) * bytes)
            }
            Decoder::Int4(int4) => int4.run(row, start..end),
        };
        row * self.stride + columns.start..row * self.stride + columns.end
    }

    /// The stored row (column, if transposed) of an output of the part.
    fn place(&self, row: usize) -> usize {
        let row = self.paired.map_or(row, |(head, first)| stored_row(first + row, head));
        self.first + row * self.step
    }

    /// One stored element.
    #[inline(always)]
    fn element(&self, row: usize, column: usize) -> f32 {
        if let Decoder::Int4(int4) = &self.decoder {
            return int4.element(self.bytes, row, column);
        }
        let bytes = &self.bytes[row * self.stride..][..self.stride];
        match self.decoder {
            Decoder::F32 => f32::from_le_bytes(bytes.as_chunks().0[column]),
            Decoder::F16 => half_to_f32(bytes.as_chunks().0[column]),
            Decoder::Bf16 => bf16_to_f32(bytes.as_chunks().0[column]),
            Decoder::Fp8 { scales, scale_type, block, across } => {
                let scale = plain(scale_type, scales, row / block * across + column / block);
                FP8[usize::from(bytes[column])] * scale
            }
            Decoder::Mxfp4 { scales } => {
                // Half a byte each: twice the stride is the number of columns.
                let scale = scales[(row * self.stride * 2 + column) / MX_BLOCK];
                let code = bytes[column / 2] >> (column % 2 * 4) & 15;
                FP4[usize::from(code)] * power_of_two(scale)
            }
            Decoder::Blocks(format) => {
                let mut one = [0.0];
                blocks(format, bytes, column, &mut one);
                one[0]
            }
            Decoder::Int4(int4) => int4.element(self.bytes, row, column),
        }
    }
}

/// See [`WeightSource::touched`].
pub(crate) fn touched(source: &WeightSource<'_>) -> Result<Vec<Range<usize>>, DeviceError> {
    Ok(Reader::new(source)?.touched())
}

/// Elements of a row of blocks from column `start` on. A block is decoded as a whole.
fn blocks(format: BlockFormat, row: &[u8], start: usize, out: &mut [f32]) {
    let (elements, bytes) = (format.elements(), format.bytes());
    let mut block = [0.0; BLOCK_MAX];
    let mut done = 0;
    while done < out.len() {
        let (number, within) = ((start + done) / elements, (start + done) % elements);
        let count = (elements - within).min(out.len() - done);
        format.decode(&row[number * bytes..][..bytes], &mut block);
        out[done..done + count].copy_from_slice(&block[within..within + count]);
        done += count;
    }
}

/// Where logical row `row` stands among heads whose halves stand between each other.
fn stored_row(row: usize, head: usize) -> usize {
    let (within, half) = (row % head, head / 2);
    row - within + 2 * (within % half) + within / half
}

/// The last row that a part up to `last` may touch: any of its head.
fn last_of_head(check: Check, last: usize, head: Option<usize>) -> Result<usize, DeviceError> {
    let Some(head) = head else { return Ok(last) };
    check.at_least("rows of a head", head, 2)?;
    check.equal("rows of a head % 2", head % 2, 0)?;
    check.fits("end of the head", last - last % head, head - 1, usize::MAX)
}

/// A plain number of many.
#[inline(always)]
fn plain(stored: StoredType, bytes: &[u8], at: usize) -> f32 {
    match stored {
        StoredType::F32 => f32::from_le_bytes(bytes.as_chunks().0[at]),
        StoredType::F16 => half_to_f32(bytes.as_chunks().0[at]),
        StoredType::Bf16 => bf16_to_f32(bytes.as_chunks().0[at]),
    }
}

fn size_of(stored: StoredType) -> usize {
    match stored {
        StoredType::F32 => 4,
        StoredType::F16 | StoredType::Bf16 => 2,
    }
}

fn half_to_f32(bytes: [u8; 2]) -> f32 {
    half::f16::from_le_bytes(bytes).to_f32()
}

fn bf16_to_f32(bytes: [u8; 2]) -> f32 {
    from_bf16(u16::from_le_bytes(bytes))
}

fn widen<const N: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn([u8; N]) -> f32) {
    for (value, &bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = f(bytes);
    }
}

fn bytes_of_a_row(check: Check, source: &WeightSource<'_>) -> Result<usize, DeviceError> {
    let columns = source.stored_columns;
    let size = match source.encoding {
        Encoding::Plain(stored) => size_of(stored),
        Encoding::Fp8Blocks { .. } => 1,
        Encoding::Mxfp4 { .. } => {
            check.equal("stored_columns % 32", columns % MX_BLOCK, 0)?;
            check.equal("transposed", usize::from(source.transposed), 0)?;
            return Ok(columns / 2);
        }
        Encoding::Blocks(format) => {
            check.equal("stored_columns % block", columns % format.elements(), 0)?;
            return Ok(columns / format.elements() * format.bytes());
        }
        Encoding::Int4(int4) => {
            check.equal("stored_columns % 8", columns % 8, 0)?;
            check.equal("row_step", source.row_step, 1)?;
            match int4.order {
                Int4Order::Awq => return Ok(columns / 2),
                Int4Order::Gptq { .. } => 4,
            }
        }
    };
    check.product("bytes of a stored row", &[columns, size])
}

fn decoder<'a>(
    check: Check,
    source: &WeightSource<'a>,
    stored_rows: usize,
) -> Result<Decoder<'a>, DeviceError> {
    let columns = source.stored_columns;
    Ok(match source.encoding {
        Encoding::Plain(StoredType::F32) => Decoder::F32,
        Encoding::Plain(StoredType::F16) => Decoder::F16,
        Encoding::Plain(StoredType::Bf16) => Decoder::Bf16,
        Encoding::Fp8Blocks { scales, scale_type, block } => {
            check.at_least("block", block, 1)?;
            let across = columns.div_ceil(block);
            let down = stored_rows.div_ceil(block);
            let expected =
                check.product("bytes of the scales", &[down, across, size_of(scale_type)])?;
            check.equal("bytes of the scales", scales.len(), expected)?;
            Decoder::Fp8 { scales, scale_type, block, across }
        }
        Encoding::Mxfp4 { scales } => {
            let expected = check.product("scales", &[stored_rows, columns / MX_BLOCK])?;
            check.equal("scales", scales.len(), expected)?;
            Decoder::Mxfp4 { scales }
        }
        Encoding::Blocks(format) => Decoder::Blocks(format),
        Encoding::Int4(int4) => Decoder::Int4(Int4Reader::new(check, &int4, stored_rows, columns)?),
    })
}
