//! The portable lanes: plain Rust, one element at a time as far as the language is concerned.

use super::{LANES, Lanes};

/// Available everywhere.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn each<T: Copy>(f: impl Fn(usize) -> T) -> [T; LANES] {
    std::array::from_fn(f)
}

impl Lanes for Portable {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type H = [i32; LANES];

    const FLOAT_ROWS: usize = 4;
    const INT_ROWS: usize = 4;
    const PANELS: usize = 1;
    const HEADS: usize = 2;
    const KEYS: usize = 2;
    const VECTORS: usize = 1;
    const NARROW: bool = false;
    const PAIRS: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        *from
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut [f32; LANES]) {
        *to = value;
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F {
        each(|i| f32::from_bits(u32::from(from[i]) << 16))
    }

    #[inline(always)]
    fn load_bf16_pairs(self, from: &[u32; LANES]) -> (Self::F, Self::F) {
        (each(|i| f32::from_bits(from[i] << 16)), each(|i| f32::from_bits(from[i] & 0xffff_0000)))
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        each(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sum(self, mut value: Self::F) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                value[i] += value[i + half];
            }
        }
        value[0]
    }

    #[inline(always)]
    fn fold(self, value: Self::F, to: &mut [f32; LANES / 2]) {
        *to = std::array::from_fn(|i| value[i] + value[i + LANES / 2]);
    }

    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        [value; LANES]
    }

    #[inline(always)]
    fn load_bytes(self, from: &[[u8; 4]; LANES]) -> Self::I {
        each(|i| i32::from_le_bytes(from[i]))
    }

    #[inline(always)]
    fn nibbles(self, bytes: Self::I) -> (Self::I, Self::I) {
        const LOW: i32 = 0x0f0f_0f0f;
        (each(|i| bytes[i] & LOW), each(|i| bytes[i] >> 4 & LOW))
    }

    #[inline(always)]
    fn dot4(self, acc: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I {
        each(|i| {
            let (u, s) = (unsigned[i].to_le_bytes(), signed[i].to_le_bytes());
            let products = (0..4).map(|j| i32::from(u[j]) * i32::from(s[j] as i8));
            products.fold(acc[i], i32::wrapping_add)
        })
    }

    #[inline(always)]
    fn pairs(self, bytes: Self::I) -> (Self::I, Self::I) {
        const EVEN: i32 = 0x00ff_00ff;
        (each(|i| bytes[i] & EVEN), each(|i| bytes[i] >> 8 & EVEN))
    }

    #[inline(always)]
    fn dot2(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I {
        let low = |v: i32| i32::from(v as i16);
        each(|i| {
            let products = [low(a[i]) * low(b[i]), (a[i] >> 16) * (b[i] >> 16)];
            products.into_iter().fold(acc[i], i32::wrapping_add)
        })
    }

    #[inline(always)]
    fn no_half_bytes(self) -> Self::H {
        [0; LANES]
    }

    #[inline(always)]
    fn half_bytes(self, acc: Self::H, unsigned: Self::I, signed: Self::I) -> Self::H {
        self.dot4(acc, unsigned, signed)
    }

    #[inline(always)]
    fn sum_half_bytes(self, start: Self::I, sums: Self::H) -> Self::I {
        each(|i| start[i] + sums[i])
    }

    #[inline(always)]
    fn to_f32(self, value: Self::I) -> Self::F {
        each(|i| value[i] as f32)
    }
}
