//! Blocks of numbers as GGUF files store them: a few scales, then small integers.
//!
//! The arithmetic is that of the format's own Python package, operation by operation in f32, so
//! that every value has the same bits.

/// Block formats by their published names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types, reason = "the names are the format's own")]
pub enum BlockFormat {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Mxfp4,
}

/// The most elements of any block.
pub(crate) const BLOCK_MAX: usize = 256;

/// A block's values; the first [`BlockFormat::elements`] count.
pub(crate) type Block = [f32; BLOCK_MAX];

/// Twice the values of MXFP4's codes. Both codes of zero give the positive one here.
const MXFP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

impl BlockFormat {
    /// All of them.
    pub const ALL: [BlockFormat; 11] = [
        BlockFormat::Q4_0,
        BlockFormat::Q4_1,
        BlockFormat::Q5_0,
        BlockFormat::Q5_1,
        BlockFormat::Q8_0,
        BlockFormat::Q2_K,
        BlockFormat::Q3_K,
        BlockFormat::Q4_K,
        BlockFormat::Q5_K,
        BlockFormat::Q6_K,
        BlockFormat::Mxfp4,
    ];

    /// Elements of a block.
    pub fn elements(self) -> usize {
        match self {
            BlockFormat::Q2_K
            | BlockFormat::Q3_K
            | BlockFormat::Q4_K
            | BlockFormat::Q5_K
            | BlockFormat::Q6_K => 256,
            _ => 32,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            BlockFormat::Q4_0 => 18,
            BlockFormat::Q4_1 => 20,
            BlockFormat::Q5_0 => 22,
            BlockFormat::Q5_1 => 24,
            BlockFormat::Q8_0 => 34,
            BlockFormat::Q2_K => 84,
            BlockFormat::Q3_K => 110,
            BlockFormat::Q4_K => 144,
            BlockFormat::Q5_K => 176,
            BlockFormat::Q6_K => 210,
            BlockFormat::Mxfp4 => 17,
        }
    }

    /// The values of one block. `bytes` holds [`BlockFormat::bytes`] of them.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut Block) {
        match self {
            BlockFormat::Q4_0 => small(Small { bits: 4, low: None, bytes }, out),
            BlockFormat::Q4_1 => small(Small { bits: 4, low: Some(2), bytes }, out),
            BlockFormat::Q5_0 => small(Small { bits: 5, low: None, bytes }, out),
            BlockFormat::Q5_1 => small(Small { bits: 5, low: Some(2), bytes }, out),
            BlockFormat::Q8_0 => {
                let d = half(bytes, 0);
                for (value, q) in out.iter_mut().zip(&bytes[2..34]) {
                    *value = f32::from(*q as i8) * d;
                }
            }
            BlockFormat::Q2_K => q2_k(bytes, out),
            BlockFormat::Q3_K => q3_k(bytes, out),
            BlockFormat::Q4_K => q4_or_5_k(bytes, None, &bytes[16..144], out),
            BlockFormat::Q5_K => q4_or_5_k(bytes, Some(&bytes[16..48]), &bytes[48..176], out),
            BlockFormat::Q6_K => q6_k(bytes, out),
            BlockFormat::Mxfp4 => {
                // Half of 2^(e - 127), since the table is doubled.
                let e = u32::from(bytes[0]);
                let d = f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 });
                for (i, q) in bytes[1..17].iter().enumerate() {
                    out[i] = d * f32::from(MXFP4[usize::from(q & 15)]);
                    out[i + 16] = d * f32::from(MXFP4[usize::from(q >> 4)]);
                }
            }
        }
    }
}

/// The f16 at a byte.
fn half(bytes: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// A block of 32 with one scale.
struct Small<'a> {
    bits: u32,
    /// Where the smallest value stands; without it zero is in the middle.
    low: Option<usize>,
    bytes: &'a [u8],
}

/// Low nibbles are the first half of the block, high ones the second; fifth bits stand apart.
fn small(block: Small<'_>, out: &mut Block) {
    let Small { bits, low, bytes } = block;
    let d = half(bytes, 0);
    let rest = &bytes[2 + low.map_or(0, |_| 2)..];
    let (fifth, nibbles) = match (bits, rest) {
        (5, [a, b, c, d, nibbles @ ..]) => (u32::from_le_bytes([*a, *b, *c, *d]), nibbles),
        _ => (0, rest),
    };
    let middle = 1i16 << (bits - 1);
    let offset = if low.is_some() { 0 } else { middle };
    for (i, byte) in nibbles[..16].iter().enumerate() {
        for (at, nibble) in [(i, byte & 15), (i + 16, byte >> 4)] {
            let high = (fifth >> at & 1) as i16 * 16;
            let value = d * f32::from(i16::from(nibble) + high - offset);
            out[at] = match low {
                Some(low) => value + half(bytes, low),
                None => value,
            };
        }
    }
}

/// Bits `shift..` of the byte that holds element `i`, where each run of 32 bytes holds as many
/// runs of 32 elements as `per_byte`.
fn spread(bytes: &[u8], i: usize, per_byte: usize, shift: u32) -> u8 {
    let (run, within) = (i / 32, i % 32);
    bytes[run / per_byte * 32 + within] >> ((run % per_byte) as u32 * shift)
}

fn q2_k(bytes: &[u8], out: &mut Block) {
    let (scales, qs) = (&bytes[..16], &bytes[16..80]);
    let (d, d_low) = (half(bytes, 80), half(bytes, 82));
    for (i, value) in out.iter_mut().enumerate() {
        let scale = scales[i / 16];
        let (step, low) = (d * f32::from(scale & 15), d_low * f32::from(scale >> 4));
        *value = step * f32::from(spread(qs, i, 4, 2) & 3) - low;
    }
}

fn q3_k(bytes: &[u8], out: &mut Block) {
    let (mask, qs, packed) = (&bytes[..32], &bytes[32..96], &bytes[96..108]);
    let d = half(bytes, 108);
    for (i, value) in out.iter_mut().enumerate() {
        let number = i / 16;
        let low = packed[number % 8] >> (number / 8 * 4) & 15;
        let high = packed[8 + number % 4] >> (number / 4 * 2) & 3;
        let step = d * f32::from((low | high << 4) as i8 - 32);
        // A bit that is not set takes four away.
        let less = (spread(mask, i, 8, 1) & 1 ^ 1) << 2;
        *value = step * f32::from((spread(qs, i, 4, 2) & 3) as i8 - less as i8);
    }
}

/// Six bits of step and six of lowest value for each of eight runs of 32.
fn scale_and_low(packed: &[u8], run: usize) -> (u8, u8) {
    if run < 4 {
        return (packed[run] & 63, packed[run + 4] & 63);
    }
    let (steps, lows, low_bits) = (packed[run - 4], packed[run], packed[run + 4]);
    (low_bits & 15 | steps >> 2 & 48, low_bits >> 4 | lows >> 2 & 48)
}

fn q4_or_5_k(bytes: &[u8], fifth: Option<&[u8]>, qs: &[u8], out: &mut Block) {
    let (d, d_low, packed) = (half(bytes, 0), half(bytes, 2), &bytes[4..16]);
    for (run, values) in out.chunks_exact_mut(32).enumerate() {
        let (scale, low) = scale_and_low(packed, run);
        let (step, low) = (d * f32::from(scale), d_low * f32::from(low));
        for (i, value) in values.iter_mut().enumerate() {
            let i = run * 32 + i;
            let high = fifth.map_or(0, |fifth| spread(fifth, i, 8, 1) & 1);
            let q = spread(qs, i, 2, 4) & 15 | high << 4;
            *value = step * f32::from(q) - low;
        }
    }
}

fn q6_k(bytes: &[u8], out: &mut Block) {
    let (low, high, scales) = (&bytes[..128], &bytes[128..192], &bytes[192..208]);
    let d = half(bytes, 208);
    for (i, value) in out.iter_mut().enumerate() {
        // Runs of 64 bytes hold 64 elements in their low nibbles, then 64 in the high ones.
        let (run, within) = (i / 64, i % 64);
        let four = low[run / 2 * 64 + within] >> (run % 2 * 4) & 15;
        let two = spread(high, i, 4, 2) & 3;
        let step = d * f32::from(scales[i / 16] as i8);
        *value = step * f32::from((four | two << 4) as i8 - 32);
    }
}
