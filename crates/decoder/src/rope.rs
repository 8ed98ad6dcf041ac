//! Rotary frequencies from their published formulas, evaluated in f32 as the references do.

use compute::{DeviceError, RopePairs, RopeTable};
use model::{Pairs, Rope, RopeScaling};

/// The rotary table of one attention layer for positions `0..positions`.
pub(crate) fn table(rope: &Rope, positions: usize) -> Result<RopeTable, DeviceError> {
    let pairs = match rope.pairs {
        Pairs::Halves => RopePairs::Halves,
        Pairs::Interleaved => RopePairs::Interleaved,
    };
    let magnitude = match rope.scaling {
        RopeScaling::Yarn { magnitude, .. } => magnitude,
        RopeScaling::None
        | RopeScaling::Linear { .. }
        | RopeScaling::Divided { .. }
        | RopeScaling::Llama3 { .. } => 1.0,
    };
    RopeTable::new(pairs, &frequencies(rope), magnitude, positions)
}

/// `dims / 2` angular frequencies, scaled.
fn frequencies(rope: &Rope) -> Vec<f32> {
    let base = (0..rope.dims / 2).map(|i| {
        let exponent = (2 * i) as f64 / rope.dims as f64;
        (1.0 / libm::pow(rope.theta, exponent)) as f32
    });
    match &rope.scaling {
        RopeScaling::None => base.collect(),
        RopeScaling::Divided { by } => base.zip(by).map(|(f, by)| f / by).collect(),
        &RopeScaling::Linear { factor } => base.map(|f| f / factor as f32).collect(),
        &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            base.map(|f| {
                let wavelength = 2.0 * std::f32::consts::PI / f;
                let context = original_context as f32;
                let (low, high) = (low_freq_factor as f32, high_freq_factor as f32);
                if wavelength < context / high {
                    f
                } else if wavelength > context / low {
                    f / factor as f32
                } else {
                    let smooth = (context / wavelength - low) / (high - low);
                    (1.0 - smooth) * f / factor as f32 + smooth * f
                }
            })
            .collect()
        }
        &RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } => {
            let (low, high) = yarn_range(rope, original_context, (beta_fast, beta_slow), truncate);
            base.enumerate()
                .map(|(i, f)| {
                    let ramp = ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor as f32 * ramp + f * (1.0 - ramp)
                })
                .collect()
        }
    }
}

/// Between which pairs frequencies go over from kept to divided: those that turn `fast` and
/// `slow` times within the original context.
fn yarn_range(rope: &Rope, context: f64, (fast, slow): (f64, f64), truncate: bool) -> (f32, f32) {
    let dims = rope.dims as f64;
    let pair = |turns: f64| {
        let waves = libm::log(context / (turns * 2.0 * std::f64::consts::PI));
        dims * waves / (2.0 * libm::log(rope.theta))
    };
    let (mut low, mut high) = (pair(fast), pair(slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dims - 1.0));
    if low == high {
        // A step instead of a ramp, without a division by zero.
        high += 0.001;
    }
    (low as f32, high as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(theta: f64, dims: usize, scaling: RopeScaling) -> Rope {
        Rope { theta, dims, pairs: Pairs::Halves, scaling }
    }

    fn yarn(factor: f64, truncate: bool) -> RopeScaling {
        RopeScaling::Yarn {
            factor,
            original_context: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate,
            magnitude: 1.25,
        }
    }

    #[test]
    fn plain_frequencies_fall_from_one_by_theta() {
        let f = frequencies(&rope(10000.0, 8, RopeScaling::None));
        assert_eq!(f, [1.0, 0.1, 0.01, 0.001]);
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let scaling = RopeScaling::Linear { factor: 4.0 };
        assert_eq!(frequencies(&rope(10000.0, 4, scaling)), [0.25, 0.0025]);
    }

    #[test]
    fn llama3_scaling_keeps_short_waves_and_divides_long_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        let plain = frequencies(&rope(5e5, 128, RopeScaling::None));
        let scaled = frequencies(&rope(5e5, 128, scaling));
        assert_eq!(plain[0], scaled[0]);
        assert_eq!(plain[63] / 8.0, scaled[63]);
        let ratios: Vec<f32> = plain.iter().zip(&scaled).map(|(p, s)| p / s).collect();
        assert!(ratios.windows(2).all(|w| w[0] <= w[1] + 1e-4), "the ramp is monotone: {ratios:?}");
        assert!(ratios.iter().any(|r| *r > 1.01 && *r < 7.9), "some lie on the ramp");
    }

    #[test]
    fn yarn_frequencies_are_deepseeks() {
        let f = frequencies(&rope(10000.0, 64, yarn(40.0, true)));
        let known = [
            (9, 0.074_989_4),
            (10, 0.056_234_1),
            (11, 0.039_006_9),
            (16, 0.0055),
            (22, 1.778_28e-4),
            (23, 3.3338e-5),
            (31, 3.3338e-6),
        ];
        for (i, want) in known {
            assert!((f[i] / want - 1.0f32).abs() < 1e-4, "pair {i}: {} instead of {want}", f[i]);
        }
    }

    #[test]
    fn yarn_ranges_are_rounded_only_where_the_config_says_so() {
        let near = |(low, high): (f32, f32), want: (f32, f32)| {
            assert!((low - want.0).abs() < 1e-3 && (high - want.1).abs() < 1e-3, "{low} {high}");
        };
        let range = |rope: &Rope, truncate| yarn_range(rope, 4096.0, (32.0, 1.0), truncate);
        near(range(&rope(10000.0, 64, RopeScaling::None), true), (10.0, 23.0));
        let oss = rope(150_000.0, 64, RopeScaling::None);
        near(range(&oss, false), (8.0928, 17.3980));
        near(range(&oss, true), (8.0, 18.0));
        // Both ends at the last pair.
        let (low, high) = yarn_range(&rope(10.0, 4, RopeScaling::None), 1e9, (2.0, 1.0), true);
        assert!(low < high || low > 3.0, "{low} {high}");
    }

    #[test]
    fn yarn_multiplies_cosines_and_sines_by_its_magnitude() {
        let table = table(&rope(10000.0, 8, yarn(4.0, false)), 3).unwrap();
        assert_eq!((table.cos[0], table.sin[0]), (1.25, 0.0));
    }
}
