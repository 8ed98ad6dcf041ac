//! Lanes on AVX2 and FMA: two registers of eight.

use super::{Kernel, LANES, Lanes};
use std::arch::x86_64::*;

/// Proof that this processor has AVX2 and FMA.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Avx2> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Avx2(()))
    }
}

/// Runs `kernel` with AVX2 and FMA switched on for all that is inlined into it.
#[target_feature(enable = "avx2,fma")]
pub(super) fn run<K: Kernel>(lanes: Avx2, kernel: K) -> K::Output {
    kernel.run(lanes)
}

/// Calls an intrinsic from a method of [`Avx2`].
macro_rules! avx2 {
    ($call:expr) => {
        // SAFETY: a value of `Avx2` exists only where the features were detected, and the only
        // pointers read or written come from references to sixteen elements.
        unsafe { $call }
    };
}

impl Lanes for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    /// Pairs of products as 16 bits: eight pairs of `15 * 127` each stay below `2^15`.
    type H = [__m256i; 2];

    // Three rows by four registers of outputs leave four for weights and broadcasts; of integers,
    // half a panel at a time, six rows by two.
    const FLOAT_ROWS: usize = 3;
    const INT_ROWS: usize = 6;
    const PANELS: usize = 2;
    const HEADS: usize = 4;
    const KEYS: usize = 1;
    const VECTORS: usize = 1;
    const NARROW: bool = true;
    const PAIRS: bool = true;

    #[inline(always)]
    fn prefetch<T>(self, from: &T, bytes: usize) {
        let at = (from as *const T).cast::<i8>().wrapping_add(bytes);
        for line in (0..size_of::<T>()).step_by(64) {
            avx2!(_mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line)));
        }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        avx2!([_mm256_set1_ps(value); 2])
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        let at = from.as_ptr();
        avx2!([_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))])
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut [f32; LANES]) {
        let at = to.as_mut_ptr();
        avx2!({
            _mm256_storeu_ps(at, value[0]);
            _mm256_storeu_ps(at.add(8), value[1]);
        })
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F {
        let at = from.as_ptr().cast::<__m128i>();
        avx2!({
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(at));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.add(1)));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        })
    }

    #[inline(always)]
    fn load_bf16_pairs(self, from: &[u32; LANES]) -> (Self::F, Self::F) {
        let at = from.as_ptr().cast::<__m256i>();
        avx2!({
            let (a, b) = (_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1)));
            let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            (
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
                ],
                [
                    _mm256_castsi256_ps(_mm256_and_si256(a, mask)),
                    _mm256_castsi256_ps(_mm256_and_si256(b, mask)),
                ],
            )
        })
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        avx2!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        avx2!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        avx2!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn sum(self, value: Self::F) -> f32 {
        avx2!({
            let eight = _mm256_add_ps(value[0], value[1]);
            let low = _mm256_castps256_ps128(eight);
            let four = _mm_add_ps(low, _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }

    #[inline(always)]
    fn fold(self, value: Self::F, to: &mut [f32; LANES / 2]) {
        avx2!(_mm256_storeu_ps(to.as_mut_ptr(), _mm256_add_ps(value[0], value[1])))
    }

    #[inline(always)]
    fn sum_folded(self, folded: &[[f32; LANES / 2]; 8]) -> [f32; 8] {
        avx2!(sum_of_eight(folded))
    }

    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        avx2!([_mm256_set1_epi32(value); 2])
    }

    #[inline(always)]
    fn load_bytes(self, from: &[[u8; 4]; LANES]) -> Self::I {
        let at = from.as_ptr().cast::<__m256i>();
        avx2!([_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))])
    }

    #[inline(always)]
    fn nibbles(self, bytes: Self::I) -> (Self::I, Self::I) {
        avx2!({
            let low = _mm256_set1_epi8(15);
            let (a, b) = (bytes[0], bytes[1]);
            let high = [_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b)];
            (
                [_mm256_and_si256(a, low), _mm256_and_si256(b, low)],
                [_mm256_and_si256(high[0], low), _mm256_and_si256(high[1], low)],
            )
        })
    }

    #[inline(always)]
    fn dot4(self, acc: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I {
        // Not what the kernels use ([`Lanes::PAIRS`]): the signed side costs more than the sums.
        let (even, odd) = self.pairs(unsigned);
        let wide = avx2!({
            let up = [_mm256_slli_epi16::<8>(signed[0]), _mm256_slli_epi16::<8>(signed[1])];
            [_mm256_srai_epi16::<8>(up[0]), _mm256_srai_epi16::<8>(up[1])]
        });
        let high = avx2!([_mm256_srai_epi16::<8>(signed[0]), _mm256_srai_epi16::<8>(signed[1])]);
        self.dot2(self.dot2(acc, even, wide), odd, high)
    }

    #[inline(always)]
    fn pairs(self, bytes: Self::I) -> (Self::I, Self::I) {
        avx2!({
            let low = _mm256_set1_epi16(0xff);
            let even = [_mm256_and_si256(bytes[0], low), _mm256_and_si256(bytes[1], low)];
            (even, [_mm256_srli_epi16::<8>(bytes[0]), _mm256_srli_epi16::<8>(bytes[1])])
        })
    }

    #[inline(always)]
    fn dot2(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I {
        avx2!([
            _mm256_add_epi32(acc[0], _mm256_madd_epi16(a[0], b[0])),
            _mm256_add_epi32(acc[1], _mm256_madd_epi16(a[1], b[1])),
        ])
    }

    #[inline(always)]
    fn no_half_bytes(self) -> Self::H {
        avx2!([_mm256_setzero_si256(); 2])
    }

    #[inline(always)]
    fn half_bytes(self, acc: Self::H, unsigned: Self::I, signed: Self::I) -> Self::H {
        avx2!([
            _mm256_add_epi16(acc[0], _mm256_maddubs_epi16(unsigned[0], signed[0])),
            _mm256_add_epi16(acc[1], _mm256_maddubs_epi16(unsigned[1], signed[1])),
        ])
    }

    #[inline(always)]
    fn sum_half_bytes(self, start: Self::I, sums: Self::H) -> Self::I {
        self.dot2(start, sums, avx2!([_mm256_set1_epi16(1); 2]))
    }

    #[inline(always)]
    fn to_f32(self, value: Self::I) -> Self::F {
        avx2!([_mm256_cvtepi32_ps(value[0]), _mm256_cvtepi32_ps(value[1])])
    }
}

/// The sums of eight rows, each `((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))`: the rows are turned
/// into columns on the way, so that every addition does eight lanes' work.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn sum_of_eight(rows: &[[f32; LANES / 2]; 8]) -> [f32; 8] {
    // SAFETY: a row is eight floats, read from a reference to it.
    let row = |i: usize| unsafe { _mm256_loadu_ps(rows[i].as_ptr()) };
    // Lanes `i` and `i + 4` of rows `a` (low half of the result) and `b` (high half).
    let fours = |a: __m256, b: __m256| {
        let low = _mm256_permute2f128_ps::<0x20>(a, b);
        _mm256_add_ps(low, _mm256_permute2f128_ps::<0x31>(a, b))
    };
    let [a, b, c, d] = [
        fours(row(0), row(4)),
        fours(row(1), row(5)),
        fours(row(2), row(6)),
        fours(row(3), row(7)),
    ];
    // Lanes 0 + 2 and 1 + 3 of two rows side by side.
    let twos = |a: __m256, b: __m256| {
        let low = _mm256_shuffle_ps::<0b01_00_01_00>(a, b);
        _mm256_add_ps(low, _mm256_shuffle_ps::<0b11_10_11_10>(a, b))
    };
    let (ab, cd) = (twos(a, b), twos(c, d));
    let even = _mm256_shuffle_ps::<0b10_00_10_00>(ab, cd);
    let sums = _mm256_add_ps(even, _mm256_shuffle_ps::<0b11_01_11_01>(ab, cd));
    let mut out = [0.0; 8];
    // SAFETY: eight floats are written to as many.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sums) };
    out
}
