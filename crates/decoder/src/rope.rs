//! Rotary frequencies from their published formulas, evaluated in f32 as the references do.

use compute::{DeviceError, RopeTable};
use model::{Rope, RopeScaling};

/// The rotary table of one attention layer for positions `0..positions`.
pub(crate) fn table(
    rope: &Rope,
    head_dim: usize,
    positions: usize,
) -> Result<RopeTable, DeviceError> {
    RopeTable::new(head_dim, &frequencies(rope, head_dim), positions)
}

/// `head_dim / 2` angular frequencies, scaled.
fn frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    let base = (0..head_dim / 2).map(|i| {
        let exponent = (2 * i) as f64 / head_dim as f64;
        (1.0 / libm::pow(rope.theta, exponent)) as f32
    });
    match rope.scaling {
        RopeScaling::None => base.collect(),
        RopeScaling::Linear { factor } => base.map(|f| f / factor as f32).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => base
            .map(|f| {
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
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_frequencies_fall_from_one_by_theta() {
        let f = frequencies(&Rope { theta: 10000.0, scaling: RopeScaling::None }, 8);
        assert_eq!(f, [1.0, 0.1, 0.01, 0.001]);
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let rope = Rope { theta: 10000.0, scaling: RopeScaling::Linear { factor: 4.0 } };
        assert_eq!(frequencies(&rope, 4), [0.25, 0.0025]);
    }

    #[test]
    fn llama3_scaling_keeps_short_waves_and_divides_long_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        let plain = frequencies(&Rope { theta: 5e5, scaling: RopeScaling::None }, 128);
        let scaled = frequencies(&Rope { theta: 5e5, scaling }, 128);
        assert_eq!(plain[0], scaled[0]);
        assert_eq!(plain[63] / 8.0, scaled[63]);
        let ratios: Vec<f32> = plain.iter().zip(&scaled).map(|(p, s)| p / s).collect();
        assert!(ratios.windows(2).all(|w| w[0] <= w[1] + 1e-4), "the ramp is monotone: {ratios:?}");
        assert!(ratios.iter().any(|r| *r > 1.01 && *r < 7.9), "some lie on the ramp");
    }
}
