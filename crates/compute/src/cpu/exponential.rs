//! Double-precision exponentials for sampling: many at a time, with the bits of the `libm` crate.
//!
//! The function of that crate is a fixed sequence of correctly rounded operations (FreeBSD's
//! `e_exp.c`, without fused multiply-adds). Here the same sequence stands without branches, so that
//! the compiler runs it over lanes; a test compares the two bit by bit.

use super::class::KernelClass;
use super::lanes::{Kernel, Lanes, Simd};

/// 1.5 * 2^52: adding it leaves an integer in the low mantissa bits.
const ROUNDER: f64 = 6_755_399_441_055_744.0;
const LN2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
const LN2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);
const INVERSE_LN2: f64 = f64::from_bits(0x3ff7_1547_652b_82fe);
const P1: f64 = f64::from_bits(0x3fc5_5555_5555_553e);
const P2: f64 = f64::from_bits(0xbf66_c16c_16be_bd93);
const P3: f64 = f64::from_bits(0x3f11_566a_af25_de2c);
const P4: f64 = f64::from_bits(0xbebb_bd41_c5d2_6bf1);
const P5: f64 = f64::from_bits(0x3e66_3769_72be_a4d0);

/// `e^x` for `x <= 0` (NaN for NaN), with the bits of `libm::exp`.
#[inline(always)]
fn exp(x: f64) -> f64 {
    // The high word decides, as there.
    let high = (x.to_bits() >> 32) & 0x7fff_ffff;
    let n = (INVERSE_LN2 * x - 0.5).trunc();
    let n = if high >= 0x3ff0_a2b2 { n } else { -1.0 };
    let n = if high > 0x3fd6_2e42 { n } else { 0.0 };
    let (hi, lo) = (x - n * LN2_HIGH, n * LN2_LOW);
    let r = hi - lo;
    let square = r * r;
    let c = r - square * (P1 + square * (P2 + square * (P3 + square * (P4 + square * P5))));
    let y = 1.0 + (r * c / (2.0 - c) - lo + hi);
    // Two factors: the first product is exact, so what is denormal is rounded once.
    let half = (n * 0.5).floor();
    let y = y * power_of_two(half) * power_of_two(n - half);
    let y = if high <= 0x3e30_0000 { 1.0 + x } else { y };
    if x < -745.133_219_101_941_1 { 0.0 } else { y }
}

/// `2^n` for a whole `n` with `-1022 <= n <= 1023`.
#[inline(always)]
fn power_of_two(n: f64) -> f64 {
    f64::from_bits((n + ROUNDER).to_bits().wrapping_add(1023) << 52)
}

/// Makes of each score its weight `e^((score - highest) / temperature)`, where no score is above
/// `highest`: the bits of plain arithmetic and `libm::exp`, in any kernel class.
pub fn exp_weights(scores: &mut [f64], highest: f64, temperature: f64) {
    let weigh = Weigh { scores, highest, temperature };
    match Simd::new(KernelClass::detect()) {
        Some(simd) => simd.run(weigh),
        None => weigh.all(),
    }
}

struct Weigh<'a> {
    scores: &'a mut [f64],
    highest: f64,
    temperature: f64,
}

impl Weigh<'_> {
    #[inline(always)]
    fn all(self) {
        for score in self.scores {
            *score = exp((*score - self.highest) / self.temperature);
        }
    }
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        self.all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same(x: f64) {
        let mut one = [x];
        exp_weights(&mut one, 0.0, 1.0);
        let want = libm::exp(x);
        assert_eq!(one[0].to_bits(), want.to_bits(), "exp({x:e}): {:e}, not {want:e}", one[0]);
        assert_eq!(exp(x).to_bits(), want.to_bits(), "exp({x:e}) one by one");
    }

    #[test]
    fn edges_have_the_bits_of_libm() {
        let near = |x: f64| (-40..40).map(move |i: i64| (x.to_bits() as i64 + i) as u64);
        let edges = [
            5e-324,
            1e-300,
            3.7e-9,
            0.346_573_590_279_972_65,
            1.039_720_770_839_918,
            0.5,
            1.0,
            708.396_418_532_264_1,
            709.78,
            744.44,
            745.133_219_101_941_1,
            745.2,
            746.0,
            1e10,
            1e300,
        ];
        for bits in edges.into_iter().flat_map(near) {
            same(-f64::from_bits(bits));
        }
        // Where the high word alone decides.
        for word in [0x3e30_0000_u64, 0x3fd6_2e42, 0x3ff0_a2b2, 0x4086_232b] {
            for word in [word - 1, word, word + 1] {
                for low in [0, 1, 0x7fff_ffff, 0xffff_ffff] {
                    same(-f64::from_bits(word << 32 | low));
                }
            }
        }
        same(0.0);
        same(-0.0);
        same(f64::NEG_INFINITY);
        assert!(exp(f64::NAN).is_nan());
    }

    #[test]
    fn a_million_numbers_have_the_bits_of_libm() {
        let (mut state, mut numbers) = (1_u64, Vec::new());
        for i in 0..1_000_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040);
            let uniform = (state >> 11) as f64 / (1_u64 << 53) as f64;
            // Of every magnitude, and evenly over where results are no zeros.
            let any = f64::from_bits(state >> 1 & 0x43ff_ffff_ffff_ffff);
            numbers.push(if i % 2 == 0 { -746.0 * uniform } else { -any });
        }
        let mut weights = numbers.clone();
        exp_weights(&mut weights, 0.0, 1.0);
        for (x, weight) in numbers.iter().zip(weights) {
            assert_eq!(weight.to_bits(), libm::exp(*x).to_bits(), "exp({x:e})");
        }
    }

    #[test]
    fn temperature_divides_first() {
        let mut scores = [1.5, -2.0, 0.3];
        exp_weights(&mut scores, 1.5, 0.7);
        assert_eq!(scores, [1.5, -2.0, 0.3].map(|s: f64| libm::exp((s - 1.5) / 0.7)));
    }
}
