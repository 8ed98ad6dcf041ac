//! Four-bit words with scales and zeros in groups along the inputs: AWQ and GPTQ.

use std::ops::Range;

use crate::check::Check;
use crate::{DeviceError, Int4, Int4Order};

/// Which nibble of an AWQ word holds each of its eight outputs.
const AWQ_NIBBLE: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Words of a matrix `[inputs, outputs]` with what turns them into numbers.
#[derive(Clone, Copy)]
pub(crate) struct Int4Reader<'a> {
    scales: &'a [[u8; 2]],
    zeros: &'a [[u8; 4]],
    groups: Option<&'a [[u8; 4]]>,
    group: usize,
    order: Int4Order,
    outputs: usize,
}

impl<'a> Int4Reader<'a> {
    /// Checks scales, zeros and groups of a matrix with so many inputs and outputs.
    pub(crate) fn new(
        check: Check,
        int4: &Int4<'a>,
        inputs: usize,
        outputs: usize,
    ) -> Result<Self, DeviceError> {
        let Int4 { scales, zeros, groups, group, order } = *int4;
        check.at_least("group", group, 1)?;
        let mut count = inputs.div_ceil(group);
        if let Some(groups) = groups {
            let bytes = check.product("groups of inputs", &[inputs, 4])?;
            check.equal("groups of inputs", groups.len(), bytes)?;
            count = scales.len() / 2 / outputs.max(1);
            for number in groups.as_chunks::<4>().0 {
                check.below("group of an input", u32::from_le_bytes(*number) as usize, count)?;
            }
        }
        let bytes = check.product("bytes of the scales", &[count, outputs, 2])?;
        check.equal("bytes of the scales", scales.len(), bytes)?;
        let bytes = check.product("bytes of the zeros", &[count, outputs / 8, 4])?;
        check.equal("bytes of the zeros", zeros.len(), bytes)?;
        Ok(Self {
            scales: scales.as_chunks().0,
            zeros: zeros.as_chunks().0,
            groups: groups.map(|groups| groups.as_chunks().0),
            group,
            order,
            outputs,
        })
    }

    /// The row of words that an input stands in, and the bytes of some outputs within it.
    pub(crate) fn run(&self, input: usize, outputs: Range<usize>) -> (usize, Range<usize>) {
        match self.order {
            Int4Order::Awq => (input, outputs.start / 8 * 4..outputs.end.div_ceil(8) * 4),
            Int4Order::Gptq { .. } => (input / 8, outputs.start * 4..outputs.end * 4),
        }
    }

    /// The weight from an input to an output: a difference of small integers times an f16, which
    /// f32 holds exactly.
    #[inline(always)]
    pub(crate) fn element(&self, words: &[u8], input: usize, output: usize) -> f32 {
        let words = words.as_chunks::<4>().0;
        let group = match self.groups {
            Some(groups) => u32::from_le_bytes(groups[input]) as usize,
            None => input / self.group,
        };
        let zero = u32::from_le_bytes(self.zeros[group * (self.outputs / 8) + output / 8]);
        let (word, nibble, zero) = match self.order {
            Int4Order::Awq => {
                let nibble = AWQ_NIBBLE[output % 8];
                let word = words[input * (self.outputs / 8) + output / 8];
                (word, nibble, zero >> (4 * nibble) & 15)
            }
            Int4Order::Gptq { zero_offset } => {
                let zero = (zero >> (4 * (output % 8)) & 15) + u32::from(zero_offset);
                // The sum stays within four bits.
                (words[input / 8 * self.outputs + output], (input % 8) as u32, zero & 15)
            }
        };
        let q = u32::from_le_bytes(word) >> (4 * nibble) & 15;
        let scale = half::f16::from_le_bytes(self.scales[group * self.outputs + output]);
        (q as f32 - zero as f32) * scale.to_f32()
    }
}
