//! Sixteen f32 lanes, in three instruction sets.
//!
//! A kernel is written once over [`Lanes`] and compiled for each set, so that the same operations
//! run in the same order and the same bits follow by construction: every operation here is exact
//! or correctly rounded, and the one reduction ([`Lanes::sum`]) has a fixed tree. (The payload of
//! a NaN is not part of that promise.)
//!
//! `vdpbf16ps` is left out on purpose: it adds two products at once, flushes denormals and ignores
//! the rounding mode, so no other class could give its bits. VNNI is used where it is found: its
//! integer sums are exact, hence not a class of their own.

mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use super::class::KernelClass;

/// Lanes in a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen lanes of an instruction set. A value is a proof that this processor has it, so the
/// methods are safe to call.
pub(crate) trait Lanes: Copy + Send + Sync {
    /// 16 x f32.
    type F: Copy;
    /// 16 x i32.
    type I: Copy;
    /// Sums of products of half bytes with bytes, eight of them at most.
    type H: Copy;

    /// Rows in a register tile of floating-point products.
    const FLOAT_ROWS: usize;
    /// Rows in a register tile of integer products.
    const INT_ROWS: usize;
    /// Panels walked side by side when there is one row.
    const PANELS: usize;
    /// Query heads (4 or 2) that share a pass over keys and values.
    const HEADS: usize;
    /// Keys (2 or 1) that they are multiplied with at once: sums of all heads fit the registers.
    const KEYS: usize;
    /// Vectors (4 or 1) of values likewise.
    const VECTORS: usize;
    /// Whether a tile's sums leave no registers for both halves of a panel: then floating-point
    /// products take one half after the other.
    const NARROW: bool;
    /// Whether bytes are multiplied as pairs of 16 bits ([`Lanes::pairs`], [`Lanes::dot2`]) or
    /// four at a time ([`Lanes::dot4`]).
    const PAIRS: bool;

    /// Asks for the memory at `bytes` ahead of `from`, which need not exist.
    #[inline(always)]
    fn prefetch<T>(self, from: &T, bytes: usize) {
        let _ = (from, bytes);
    }

    fn splat(self, value: f32) -> Self::F;
    fn load(self, from: &[f32; LANES]) -> Self::F;
    fn store(self, value: Self::F, to: &mut [f32; LANES]);
    /// Widens bfloat16 values.
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F;
    /// Widens pairs of bfloat16 values: the low halves, then the high halves.
    fn load_bf16_pairs(self, from: &[u32; LANES]) -> (Self::F, Self::F);
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// Adds all lanes: `i + 8`, then `i + 4`, then `i + 2`, then `i + 1`.
    fn sum(self, value: Self::F) -> f32;

    /// The first step of [`Lanes::sum`]: adds lanes `i` and `i + 8`.
    fn fold(self, value: Self::F, to: &mut [f32; LANES / 2]);
    /// The other steps, of eight folded vectors.
    #[inline(always)]
    fn sum_folded(self, folded: &[[f32; LANES / 2]; 8]) -> [f32; 8] {
        folded.map(|row| {
            let four: [f32; 4] = std::array::from_fn(|i| row[i] + row[i + 4]);
            (four[0] + four[2]) + (four[1] + four[3])
        })
    }

    fn splat_i(self, value: i32) -> Self::I;
    /// Four unsigned bytes per lane.
    fn load_bytes(self, from: &[[u8; 4]; LANES]) -> Self::I;
    /// The low halves of all bytes, and the high ones.
    fn nibbles(self, bytes: Self::I) -> (Self::I, Self::I);
    /// `acc + sum of four products` of unsigned bytes with signed bytes, exactly.
    fn dot4(self, acc: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I;
    /// The even and the odd bytes, each widened to 16 bits.
    fn pairs(self, bytes: Self::I) -> (Self::I, Self::I);
    /// `acc + sum of two products` of signed 16-bit numbers, exactly.
    fn dot2(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// No products of half bytes.
    fn no_half_bytes(self) -> Self::H;
    /// `acc + four products` of bytes from 0 to 15 with signed bytes other than -128, exactly as
    /// long as at most eight are added up.
    fn half_bytes(self, acc: Self::H, unsigned: Self::I, signed: Self::I) -> Self::H;
    /// `start` + the sums.
    fn sum_half_bytes(self, start: Self::I, sums: Self::H) -> Self::I;
    /// Converts; exact below 2^24.
    fn to_f32(self, value: Self::I) -> Self::F;
}

/// A piece of work that is compiled for each instruction set. `run` must be `inline(always)`.
pub(crate) trait Kernel {
    type Output;
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// The instruction set that a device uses.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Simd {
    Portable(portable::Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512<false>),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(avx512::Avx512<true>),
}

impl Simd {
    /// `None` where this processor lacks the class.
    pub(crate) fn new(class: KernelClass) -> Option<Simd> {
        match class {
            KernelClass::Portable => Some(Simd::Portable(portable::Portable)),
            #[cfg(target_arch = "x86_64")]
            KernelClass::Avx2 => avx2::Avx2::detect().map(Simd::Avx2),
            #[cfg(target_arch = "x86_64")]
            KernelClass::Avx512 => avx512::Avx512::<true>::detect()
                .map(Simd::Avx512Vnni)
                .or_else(|| avx512::Avx512::<false>::detect().map(Simd::Avx512)),
            #[cfg(not(target_arch = "x86_64"))]
            KernelClass::Avx2 | KernelClass::Avx512 => None,
        }
    }

    /// The same class without VNNI, to check that it gives the same bits.
    #[cfg(test)]
    pub(crate) fn without_vnni(self) -> Simd {
        match self {
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512Vnni(_) => avx512::Avx512::<false>::detect().map_or(self, Simd::Avx512),
            other => other,
        }
    }

    /// Rows in a register tile: (floating point, integer).
    pub(crate) fn tile_rows(self) -> (usize, usize) {
        struct Rows;
        impl Kernel for Rows {
            type Output = (usize, usize);
            #[inline(always)]
            fn run<L: Lanes>(self, _: L) -> (usize, usize) {
                (L::FLOAT_ROWS, L::INT_ROWS)
            }
        }
        self.run(Rows)
    }

    /// See [`Lanes::PAIRS`].
    pub(crate) fn has_pairs(self) -> bool {
        struct Pairs;
        impl Kernel for Pairs {
            type Output = bool;
            #[inline(always)]
            fn run<L: Lanes>(self, _: L) -> bool {
                L::PAIRS
            }
        }
        self.run(Pairs)
    }

    /// Runs `kernel` compiled for this instruction set.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Simd::Portable(lanes) => kernel.run(lanes),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the token exists only where the features were detected.
            Simd::Avx2(lanes) => unsafe { avx2::run(lanes, kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Simd::Avx512(lanes) => unsafe { avx512::run(lanes, kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Simd::Avx512Vnni(lanes) => unsafe { avx512::run_vnni(lanes, kernel) },
        }
    }
}
