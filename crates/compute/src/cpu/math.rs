//! Elementary functions with the same bits in every kernel class.
//!
//! The platform's `exp` may differ between C libraries; this one is a fixed sequence of correctly
//! rounded operations. It is plain Rust that the compiler vectorises where a kernel inlines it.

/// 1.5 * 2^23: adding it leaves the nearest integer (ties to even) in the low mantissa bits.
const ROUNDER: f32 = 12_582_912.0;

/// `e^x` to within 1.2 units in the last place (2 among denormal results); 0 below about -104,
/// infinity above about 88.73, NaN for NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // ln 2 in two parts; the first has few enough bits for `n * LN2_HIGH` to be exact.
    const LN2_HIGH: f32 = f32::from_bits(0x3f31_7200);
    const LN2_LOW: f32 = 1.428_606_8e-6;
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -105.0 { -105.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUNDER);
    let n = shifted - ROUNDER;
    let r = (-n).mul_add(LN2_LOW, (-n).mul_add(LN2_HIGH, x));
    // |r| <= ln 2 / 2, so the first term left out is below 0.1 units in the last place.
    let mut p = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = r.mul_add(p, coefficient);
    }
    // Two factors, so that results near infinity and among denormals need no case of their own.
    let n = shifted.to_bits().wrapping_sub(ROUNDER.to_bits()) as i32;
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// `2^n` for `-126 <= n <= 127`.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// `x / (1 + e^-x)`, written so that the exponential never overflows: `-0` at `-infinity`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    let x = if x < -200.0 { -200.0 } else { x };
    let z = exp(-x.abs());
    let numerator = if x < 0.0 { x * z } else { x };
    numerator / (1.0 + z)
}

/// `1 / (1 + e^-x)`; never overflows on the way.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    let z = exp(-x.abs());
    let numerator = if x < 0.0 { z } else { 1.0 };
    numerator / (1.0 + z)
}

/// The hyperbolic tangent to within 3 units in the last place; odd.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let far = 1.0 - 2.0 / (exp(2.0 * a) + 1.0);
    // Near zero the difference would cancel. Taylor's series in x^2 up to x^15: the first term
    // left out is below 1e-8 of the result at 0.5.
    let square = x * x;
    let mut p = -929_569.0 / 638_512_875.0;
    for coefficient in [
        21_844.0 / 6_081_075.0,
        -1_382.0 / 155_925.0,
        62.0 / 2_835.0,
        -17.0 / 315.0,
        2.0 / 15.0,
        -1.0 / 3.0,
    ] {
        p = square.mul_add(p, coefficient);
    }
    let near = x.mul_add(square * p, x);
    (if a < 0.5 { near } else { far }).copysign(x)
}

/// `cap * tanh(x / cap)`.
#[inline(always)]
pub(crate) fn soft_capped(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

/// `0.5 * x * (1 + tanh(v))` with `v = sqrt(2 / pi) * (x + 0.044715 * x^3)`, as
/// `x * sigmoid(2 * v)`, which is the same number without the cancellation: `-0` at `-infinity`.
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    const TWICE_ROOT: f32 = 2.0 * 0.797_884_6;
    // Where the sigmoid is 0 anyway; keeps an infinity from being multiplied by it.
    let x = if x < -200.0 { -200.0 } else { x };
    let cube = x * x * x;
    x * sigmoid(TWICE_ROOT * 0.044_715_f32.mul_add(cube, x))
}

/// `(u + 1) * (g * sigmoid(alpha * g))` with `g` at most `limit` and `u` within `+-limit`; NaN
/// stays NaN.
#[inline(always)]
pub(crate) fn clamped_swiglu(g: f32, u: f32, alpha: f32, limit: f32) -> f32 {
    let g = if g > limit { limit } else { g };
    // Far below, the product is 0 (at infinity it would be NaN).
    let g = if g < f32::MIN { f32::MIN } else { g };
    let u = if u > limit { limit } else { u };
    let u = if u < -limit { -limit } else { u };
    (u + 1.0) * (g * sigmoid(alpha * g))
}

/// The nearest bfloat16, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    (if x.is_nan() { (bits >> 16) | 0x40 } else { rounded }) as u16
}

/// Exact.
#[inline(always)]
pub(crate) fn from_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// A block of at most 32 values as signed bytes times a scale; the bytes beyond are zero.
///
/// With `m` the largest magnitude: `scale = m / 127` and `q = round(x * (127 / m))`, ties to even.
/// A block with `m < 2^-100` (whose reciprocal could overflow) is all zero with scale 0. A block
/// that holds an infinity or NaN is all zero with scale NaN, so that the damage shows in results.
#[inline(always)]
pub(crate) fn quantise(values: &[f32], q: &mut [i8; 32]) -> f32 {
    const TINY: u32 = (127 - 100) << 23;
    const INFINITE: u32 = 0x7f80_0000;
    let magnitude = values.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    *q = [0; 32];
    if magnitude < TINY {
        return 0.0;
    }
    if magnitude >= INFINITE {
        return f32::NAN;
    }
    let m = f32::from_bits(magnitude);
    let inverse = 127.0 / m;
    for (q, v) in q.iter_mut().zip(values) {
        let shifted = v * inverse + ROUNDER;
        *q = shifted.to_bits().wrapping_sub(ROUNDER.to_bits()) as i8;
    }
    m / 127.0
}

/// A block of at most 32 values as integers from 0 to 15, less 8 and times a scale; those beyond
/// stand for zero.
///
/// With `m` the first value of the largest magnitude: `scale = m / -8` and `q = 8 + x * (-8 / m)`,
/// a half rounded up and no more than 15, so that `m` itself is met. Tiny blocks and broken ones
/// are as in [`quantise`].
#[inline(always)]
pub(crate) fn quantise4(values: &[f32], q: &mut [u8; 32]) -> f32 {
    const TINY: f32 = f32::from_bits((127 - 100) << 23);
    *q = [8; 32];
    if values.iter().any(|v| !v.is_finite()) {
        return f32::NAN;
    }
    let m = values.iter().fold(0.0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    if m.abs() < TINY {
        return 0.0;
    }
    let inverse = -8.0 / m;
    for (q, v) in q.iter_mut().zip(values) {
        // Not negative, so that truncation rounds down.
        *q = (v * inverse + 8.5).clamp(0.0, 15.0) as u8;
    }
    m / -8.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance of `got` from the true value in units of the last place of f32.
    fn ulps(got: f32, exact: f64) -> f64 {
        let nearest = exact as f32;
        let step = (f64::from(f32::from_bits(nearest.to_bits() + 1)) - f64::from(nearest)).abs();
        (f64::from(got) - exact).abs() / step
    }

    #[test]
    fn exp_is_within_its_bound() {
        let steps = if cfg!(miri) { 500 } else { 2_000_000 };
        let (mut normal, mut denormal) = (0_f64, 0_f64);
        for i in 0..=steps {
            let x = -103.9 + (88.7 + 103.9) * (i as f64 / steps as f64);
            let x = x as f32;
            let exact = libm::exp(f64::from(x));
            let worst =
                if exact < f64::from(f32::MIN_POSITIVE) { &mut denormal } else { &mut normal };
            *worst = worst.max(ulps(exp(x), exact));
        }
        assert!(normal < 1.2, "{normal} ulp");
        assert!(denormal < 2.0, "{denormal} ulp among denormals");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-104.1), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(88.73), f32::INFINITY);
        assert!(exp(88.72).is_finite());
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-f32::NAN).is_nan());
    }

    #[test]
    fn silu_is_close_and_sound_far_out() {
        for i in -4000..=4000 {
            let x = i as f32 * 0.05;
            let exact = f64::from(x) / (1.0 + libm::exp(-f64::from(x)));
            let error = (f64::from(silu(x)) - exact).abs();
            // Below -87 the exponential is denormal: half its step, times x.
            assert!(error <= exact.abs() * 4e-7 + 2e-43, "silu({x}) = {} not {exact}", silu(x));
        }
        assert_eq!(silu(f32::INFINITY), f32::INFINITY);
        assert_eq!(silu(f32::NEG_INFINITY), 0.0);
        assert_eq!(silu(f32::MIN), 0.0);
        assert_eq!(silu(f32::MAX), f32::MAX);
        assert!(silu(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_within_its_bound() {
        let steps = if cfg!(miri) { 400 } else { 1_000_000 };
        let mut worst = 0_f64;
        for i in 1..=steps {
            let x = (12.0 * (i as f64 / steps as f64).powi(3)) as f32;
            worst = worst.max(ulps(tanh(x), libm::tanh(f64::from(x))));
            assert_eq!(tanh(-x).to_bits(), (-tanh(x)).to_bits());
        }
        assert!(worst < 3.0, "{worst} ulp");
        for x in [f32::MIN_POSITIVE, 1e-40, 1e-20, 0.0, -0.0] {
            assert_eq!(tanh(x).to_bits(), x.to_bits());
        }
        assert_eq!([tanh(f32::INFINITY), tanh(f32::MAX), tanh(-20.0)], [1.0, 1.0, -1.0]);
        assert!(tanh(f32::NAN).is_nan());
        // A cap far above changes little, one far below cuts.
        assert_eq!(soft_capped(1e-3, 50.0), 1e-3);
        assert_eq!(soft_capped(-1e9, 30.0), -30.0);
        assert_eq!(soft_capped(f32::INFINITY, 30.0), 30.0);
    }

    #[test]
    fn sigmoid_is_close_and_sound_far_out() {
        for i in -4000..=4000 {
            let x = i as f32 * 0.02;
            let exact = 1.0 / (1.0 + libm::exp(-f64::from(x)));
            let error = (f64::from(sigmoid(x)) - exact).abs();
            assert!(error <= exact * 3e-7, "sigmoid({x}) = {} not {exact}", sigmoid(x));
        }
        assert_eq!([sigmoid(f32::NEG_INFINITY), sigmoid(0.0), sigmoid(f32::MAX)], [0.0, 0.5, 1.0]);
        assert!(sigmoid(f32::NAN).is_nan());
    }

    #[test]
    fn gates_are_close_and_sound_far_out() {
        for i in -3000..=3000 {
            let x = i as f32 * 0.01;
            let v = f64::from(x);
            let inner = 0.797_884_560_802_865_4 * (v + 0.044_715 * v * v * v);
            // Written with the exponential: 1 + tanh would cancel in f64 too.
            let exact = v / (1.0 + libm::exp(-2.0 * inner));
            let error = (f64::from(gelu_tanh(x)) - exact).abs();
            // The argument's error counts as often as the argument is large.
            let bound = exact.abs() * 4e-7 * (1.0 + inner.abs()) + 2e-43;
            assert!(error <= bound, "gelu({x}) = {} not {exact}", gelu_tanh(x));
        }
        assert_eq!(gelu_tanh(f32::NEG_INFINITY), 0.0);
        assert_eq!(gelu_tanh(-1e30), 0.0);
        assert_eq!(gelu_tanh(f32::INFINITY), f32::INFINITY);
        assert!(gelu_tanh(f32::NAN).is_nan());

        for (g, u) in [(0.3_f64, -0.7_f64), (9.0, 8.0), (-40.0, -9.0), (-2.5, 6.9), (7.1, -7.1)] {
            let (g64, u64) = (g.min(7.0), u.clamp(-7.0, 7.0));
            let exact = (u64 + 1.0) * g64 / (1.0 + libm::exp(-1.702 * g64));
            let got = f64::from(clamped_swiglu(g as f32, u as f32, 1.702, 7.0));
            let bound = exact.abs() * 1e-6 * (1.0 + g64.abs());
            assert!((got - exact).abs() <= bound, "{got} is not {exact}");
        }
        assert_eq!(clamped_swiglu(f32::NEG_INFINITY, 1.0, 1.702, 7.0), 0.0);
        let most = clamped_swiglu(7.0, 7.0, 1.702, 7.0);
        assert_eq!(clamped_swiglu(f32::INFINITY, f32::INFINITY, 1.702, 7.0), most);
        assert!(clamped_swiglu(f32::NAN, 1.0, 1.702, 7.0).is_nan());
        assert!(clamped_swiglu(1.0, f32::NAN, 1.702, 7.0).is_nan());
    }

    #[test]
    fn bf16_agrees_with_half() {
        let mut bits = 0_u32;
        let stride = if cfg!(miri) { 40_000_003 } else { 65_521 };
        loop {
            let x = f32::from_bits(bits);
            let (got, expected) = (to_bf16(x), half::bf16::from_f32(x).to_bits());
            assert!(got == expected || x.is_nan() && from_bf16(got).is_nan(), "{x}");
            match bits.checked_add(stride) {
                Some(next) => bits = next,
                None => break,
            }
        }
        // Ties go to even, and the largest values round to infinity.
        assert_eq!(to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(from_bf16(to_bf16(f32::MAX)), f32::INFINITY);
        assert!(from_bf16(to_bf16(f32::from_bits(0x7f80_0001))).is_nan());
    }

    #[test]
    fn blocks_of_four_bits() {
        let mut q = [1; 32];
        assert_eq!(quantise4(&[2.0, -4.0, 0.25, 4.0], &mut q), 0.5);
        // What is opposite the largest magnitude is cut off at seven steps.
        assert_eq!(q[..5], [12, 0, 9, 15, 8]);
        for tiny in [0.0, -0.0, f32::MIN_POSITIVE] {
            assert_eq!(quantise4(&[tiny; 32], &mut q), 0.0);
            assert_eq!(q, [8; 32]);
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(quantise4(&[1.0, bad], &mut q).is_nan());
            assert_eq!(q, [8; 32]);
        }
    }

    #[test]
    fn quantised_blocks() {
        let mut q = [1; 32];
        assert_eq!(quantise(&[2.0, -1.0, 0.5, 0.0], &mut q), 2.0 / 127.0);
        // 63.5 and 31.75: a tie goes to the even neighbour.
        assert_eq!(q[..5], [127, -64, 32, 0, 0]);
        assert_eq!(quantise(&[0.0, -0.0], &mut q), 0.0);
        assert_eq!(q, [0; 32]);
        assert_eq!(quantise(&[f32::MIN_POSITIVE; 32], &mut q), 0.0);
        assert_eq!(q, [0; 32]);
        assert_eq!(quantise(&[f32::MAX, f32::MIN], &mut q), f32::MAX / 127.0);
        assert_eq!(q[..2], [127, -127]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(quantise(&[1.0, bad], &mut q).is_nan());
            assert_eq!(q, [0; 32]);
        }
        assert_eq!(quantise(&[], &mut q), 0.0);
    }
}
