//! Lanes on AVX-512: one register of sixteen.

use super::{Kernel, LANES, Lanes};
use std::arch::x86_64::*;

/// Proof that this processor has AVX-512 F, BW, VL and DQ; and VNNI where `VNNI`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool>(());

impl<const VNNI: bool> Avx512<VNNI> {
    pub(crate) fn detect() -> Option<Avx512<VNNI>> {
        let base = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma");
        let vnni = !VNNI || is_x86_feature_detected!("avx512vnni");
        (base && vnni).then_some(Avx512(()))
    }
}

/// Runs `kernel` with AVX-512 switched on for all that is inlined into it.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn run<K: Kernel>(lanes: Avx512<false>, kernel: K) -> K::Output {
    kernel.run(lanes)
}

/// As [`run`], with VNNI.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn run_vnni<K: Kernel>(lanes: Avx512<true>, kernel: K) -> K::Output {
    kernel.run(lanes)
}

/// Calls an intrinsic from a method of [`Avx512`].
macro_rules! avx512 {
    ($call:expr) => {
        // SAFETY: a value of `Avx512` exists only where the features were detected (VNNI only
        // with `VNNI`), and the only pointers read or written come from references to 16 elements.
        unsafe { $call }
    };
}

impl<const VNNI: bool> Lanes for Avx512<VNNI> {
    type F = __m512;
    type I = __m512i;
    type H = __m512i;

    // Twelve rows by two registers of outputs leave eight for weights and broadcasts.
    const FLOAT_ROWS: usize = 12;
    const INT_ROWS: usize = 8;
    const PANELS: usize = 4;
    const HEADS: usize = 4;
    const KEYS: usize = 2;
    const VECTORS: usize = 4;
    const NARROW: bool = false;
    const PAIRS: bool = !VNNI;

    #[inline(always)]
    fn prefetch<T>(self, from: &T, bytes: usize) {
        let at = (from as *const T).cast::<i8>().wrapping_add(bytes);
        for line in (0..size_of::<T>()).step_by(64) {
            avx512!(_mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line)));
        }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        avx512!(_mm512_set1_ps(value))
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        avx512!(_mm512_loadu_ps(from.as_ptr()))
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut [f32; LANES]) {
        avx512!(_mm512_storeu_ps(to.as_mut_ptr(), value))
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F {
        avx512!({
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        })
    }

    #[inline(always)]
    fn load_bf16_pairs(self, from: &[u32; LANES]) -> (Self::F, Self::F) {
        avx512!({
            let pairs = _mm512_loadu_si512(from.as_ptr().cast());
            let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            (
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
                _mm512_castsi512_ps(_mm512_and_si512(pairs, mask)),
            )
        })
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        avx512!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        avx512!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        avx512!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sum(self, value: Self::F) -> f32 {
        avx512!({
            let low = _mm512_castps512_ps256(value);
            let eight = _mm256_add_ps(low, _mm512_extractf32x8_ps::<1>(value));
            let low = _mm256_castps256_ps128(eight);
            let four = _mm_add_ps(low, _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }

    #[inline(always)]
    fn fold(self, value: Self::F, to: &mut [f32; LANES / 2]) {
        avx512!({
            let low = _mm512_castps512_ps256(value);
            let eight = _mm256_add_ps(low, _mm512_extractf32x8_ps::<1>(value));
            _mm256_storeu_ps(to.as_mut_ptr(), eight);
        })
    }

    #[inline(always)]
    fn sum_folded(self, folded: &[[f32; LANES / 2]; 8]) -> [f32; 8] {
        avx512!(super::avx2::sum_of_eight(folded))
    }

    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        avx512!(_mm512_set1_epi32(value))
    }

    #[inline(always)]
    fn load_bytes(self, from: &[[u8; 4]; LANES]) -> Self::I {
        avx512!(_mm512_loadu_si512(from.as_ptr().cast()))
    }

    #[inline(always)]
    fn nibbles(self, bytes: Self::I) -> (Self::I, Self::I) {
        avx512!({
            let low = _mm512_set1_epi8(15);
            let high = _mm512_srli_epi16::<4>(bytes);
            (_mm512_and_si512(bytes, low), _mm512_and_si512(high, low))
        })
    }

    #[inline(always)]
    fn dot4(self, acc: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I {
        if VNNI {
            return avx512!(_mm512_dpbusd_epi32(acc, unsigned, signed));
        }
        let (even, odd) = self.pairs(unsigned);
        let low = avx512!(_mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(signed)));
        let high = avx512!(_mm512_srai_epi16::<8>(signed));
        self.dot2(self.dot2(acc, even, low), odd, high)
    }

    #[inline(always)]
    fn pairs(self, bytes: Self::I) -> (Self::I, Self::I) {
        avx512!((_mm512_and_si512(bytes, _mm512_set1_epi16(0xff)), _mm512_srli_epi16::<8>(bytes)))
    }

    #[inline(always)]
    fn dot2(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I {
        avx512!(_mm512_add_epi32(acc, _mm512_madd_epi16(a, b)))
    }

    #[inline(always)]
    fn no_half_bytes(self) -> Self::H {
        avx512!(_mm512_setzero_si512())
    }

    #[inline(always)]
    fn half_bytes(self, acc: Self::H, unsigned: Self::I, signed: Self::I) -> Self::H {
        self.dot4(acc, unsigned, signed)
    }

    #[inline(always)]
    fn sum_half_bytes(self, start: Self::I, sums: Self::H) -> Self::I {
        avx512!(_mm512_add_epi32(start, sums))
    }

    #[inline(always)]
    fn to_f32(self, value: Self::I) -> Self::F {
        avx512!(_mm512_cvtepi32_ps(value))
    }
}
