//! Activations, converted and laid out as the kernels read them.
//!
//! A tile of `h` rows is `[words][h]` of 32-bit words. In `F32` and `Bf16` there is a word per
//! inner position: the f32 value (rounded to bfloat16 in `Bf16`). In `Int8` and `Int4` a block of
//! 32 takes ten: its scale, -128 times the sum of its bytes (which undoes the offset of the packed
//! weights), and eight groups of four bytes. For instruction sets that multiply the bytes of
//! `Int8` as pairs of 16 bits it takes eighteen there: two for each group, bytes 0 and 2 and
//! bytes 1 and 3.

use super::super::lanes::{Kernel, Lanes, Simd};
use super::super::math::{from_bf16, quantise, to_bf16};
use super::super::team::Disjoint;
use super::super::tensor::CpuTensor;
use super::{Context, CpuMatrix, rank, tile_height};
use crate::check::resize;
use crate::{DeviceError, Precision, Segment};
use std::collections::BTreeMap;
use std::ops::Range;

/// Words that a block of 32 takes where its bytes stay bytes.
pub(super) const BYTE_WORDS: usize = 10;

/// Words that it takes where they are pairs.
pub(super) const PAIR_WORDS: usize = 18;

/// Words that a block of 32 of an integer precision takes.
fn block_words(simd: Simd, precision: Precision) -> usize {
    if precision == Precision::Int8 && simd.has_pairs() { PAIR_WORDS } else { BYTE_WORDS }
}

/// Rows in a full tile.
pub(super) fn tile_rows(simd: Simd, precision: Precision) -> usize {
    let (float, int) = simd.tile_rows();
    match precision {
        Precision::F32 | Precision::Bf16 => float,
        Precision::Int8 | Precision::Int4 => int,
    }
}

/// A rectangle of the activations in one precision; segments that read the same one share it.
struct Source {
    rows: Range<usize>,
    column: usize,
    inputs: usize,
    precision: Precision,
    /// Rows in a full tile, words per row, first word.
    tile: usize,
    words: usize,
    offset: usize,
}

/// Where every segment's activations are staged.
pub(super) struct Plan {
    sources: Vec<Source>,
    of_segment: Vec<usize>,
    words: usize,
}

impl Plan {
    pub(super) fn new(simd: Simd, segments: &[Segment<'_, CpuMatrix>]) -> Plan {
        let mut plan = Plan { sources: Vec::new(), of_segment: Vec::new(), words: 0 };
        let mut known = BTreeMap::new();
        for segment in segments {
            let (rows, column) = (segment.from_rows.clone(), segment.from_column);
            let (inputs, precision) = (segment.matrix.inputs, segment.matrix.precision());
            let key = (rows.start, rows.end, column, inputs, rank(precision));
            let index = *known.entry(key).or_insert_with(|| {
                let words = match precision {
                    Precision::F32 | Precision::Bf16 => inputs.next_multiple_of(2),
                    Precision::Int8 | Precision::Int4 => {
                        inputs.div_ceil(32) * block_words(simd, precision)
                    }
                };
                let (tile, offset) = (tile_rows(simd, precision), plan.words);
                plan.words = plan
                    .words
                    .saturating_add(words.saturating_mul(rows.len().next_multiple_of(tile)));
                plan.sources.push(Source { rows, column, inputs, precision, tile, words, offset });
                plan.sources.len() - 1
            });
            plan.of_segment.push(index);
        }
        plan
    }

    /// The first word of a segment's rows from `row` (the first of a tile) on.
    pub(super) fn offset(&self, segment: usize, row: usize) -> usize {
        let source = &self.sources[self.of_segment[segment]];
        source.offset + row * source.words
    }

    /// Fills `staged`, which keeps its memory if it has enough.
    pub(super) fn run(
        &self,
        context: Context<'_>,
        x: &CpuTensor,
        staged: &mut Vec<u32>,
    ) -> Result<(), DeviceError> {
        if staged.len() < self.words {
            staged.clear();
            resize(staged, self.words, 0)?;
        }
        let tiles: Vec<(&Source, usize)> = self
            .sources
            .iter()
            .flat_map(|s| (0..s.rows.len()).step_by(s.tile).map(move |row| (s, row)))
            .collect();
        let shared = Disjoint::new(staged);
        let mut hands = vec![(); context.team.hands(self.words.saturating_mul(4))];
        context.team.run(tiles.len(), &mut hands, |(), index| {
            let (source, row) = tiles[index];
            let height = tile_height(source.tile, source.rows.len() - row);
            let start = source.offset + row * source.words;
            // SAFETY: tiles lie one after the other, and each is one task.
            let to = unsafe { shared.slice(start, height * source.words) };
            context.simd.run(Stage { source, x, row, height, to });
        });
        Ok(())
    }
}

struct Stage<'a> {
    source: &'a Source,
    x: &'a CpuTensor,
    row: usize,
    height: usize,
    to: &'a mut [u32],
}

impl Kernel for Stage<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let Stage { source, x, row, height, to } = self;
        for r in 0..height {
            if row + r >= source.rows.len() {
                to.iter_mut().skip(r).step_by(height).for_each(|word| *word = 0);
                continue;
            }
            let values = &x.row(source.rows.start + row + r)[source.column..][..source.inputs];
            match source.precision {
                Precision::F32 => copy(values, r, height, to, f32::to_bits),
                Precision::Bf16 => {
                    copy(values, r, height, to, |v| from_bf16(to_bf16(v)).to_bits());
                }
                Precision::Int8 if L::PAIRS => copy_int::<PAIR_WORDS>(values, r, height, to),
                Precision::Int8 | Precision::Int4 => {
                    copy_int::<BYTE_WORDS>(values, r, height, to);
                }
            }
        }
    }
}

#[inline(always)]
fn copy(values: &[f32], r: usize, height: usize, to: &mut [u32], f: impl Fn(f32) -> u32) {
    // A single row lies in order, and then the loop can be vectorised.
    if height == 1 {
        to.iter_mut().zip(values).for_each(|(word, &value)| *word = f(value));
    } else {
        let words = to.iter_mut().skip(r).step_by(height);
        words.zip(values).for_each(|(word, &value)| *word = f(value));
    }
    // The position that makes an odd inner dimension even.
    if values.len() % 2 == 1 {
        to[values.len() * height + r] = 0;
    }
}

#[inline(always)]
fn copy_int<const WORDS: usize>(values: &[f32], r: usize, height: usize, to: &mut [u32]) {
    let blocks = to.chunks_exact_mut(WORDS * height);
    for (block, values) in blocks.zip(values.chunks(32)) {
        let mut q = [0; 32];
        let scale = quantise(values, &mut q);
        let sum: i32 = q.iter().map(|&q| i32::from(q)).sum();
        block[r] = scale.to_bits();
        block[height + r] = (-128 * sum) as u32;
        for (g, q) in q.as_chunks::<4>().0.iter().enumerate() {
            if WORDS == PAIR_WORDS {
                let pair = |a: i8, b: i8| u32::from(i16::from(a) as u16) | (b as i16 as u32) << 16;
                block[(2 + 2 * g) * height + r] = pair(q[0], q[2]);
                block[(3 + 2 * g) * height + r] = pair(q[1], q[3]);
            } else {
                block[(2 + g) * height + r] = u32::from_le_bytes(q.map(|q| q as u8));
            }
        }
    }
}
