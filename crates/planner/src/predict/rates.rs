//! What devices and the wires between them can do, as somebody measured or published it.

use super::PredictError;

/// Latency and bandwidth of a way between two ranks: `n` bytes take `latency + n / bandwidth`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wire {
    /// Seconds until the first byte is there.
    pub latency: f64,
    /// Bytes per second that one rank sends or receives.
    pub bandwidth: f64,
}

/// One kind of device. All rates are what it reaches in practice, not what its sheet promises.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Bytes per second read from memory.
    pub memory: f64,
    /// f32 operations per second in products; a fused multiply-add is two.
    pub f32: f64,
    /// The same with bf16 operands.
    pub bf16: f64,
    /// The same with operands of 8 bits (and with 4-bit weights, which are widened to 8).
    pub eight_bit: f64,
    /// Operations started for each layer.
    pub layer_ops: f64,
    /// Seconds that pass between two of them.
    pub op_gap: f64,
    /// Bytes that a value takes on the wire in a sum: 4 in `exact`, 2 where sums are of bf16.
    pub wire_bytes: f64,
    /// Between ranks of one node.
    pub within: Wire,
    /// Between ranks of two nodes.
    pub between: Wire,
    /// Whether ranks of several nodes exchange each with every other, as over TCP, rather than
    /// first within their node.
    pub flat: bool,
    /// Share of the floor's speed that engines reach, fitted to measured steps.
    pub efficiency: f64,
    /// How far measured steps on one node were from the fit, at the most, as a share.
    pub spread: f64,
    /// Measured steps over several nodes took up to so many times the floor.
    pub excess: f64,
}

impl Rates {
    /// An NVIDIA H200 (SXM, NVLink). 85 % of 4.8 TB/s of memory; the rest as [`Rates::h100`].
    pub fn h200() -> Rates {
        Rates { memory: 0.85 * 4.8e12, ..Rates::h100() }
    }

    /// An NVIDIA H100 (SXM, NVLink).
    ///
    /// - Memory: 85 % of the 3.35 TB/s of NVIDIA's data sheet.
    /// - Products: 790 TFLOP/s in bf16, 80 % of the data sheet's dense rate; 1,550 in FP8, the most
    ///   that DeepGEMM's authors report; 54 in f32, 80 % of the data sheet.
    /// - Operations: 14 a layer, 2 us between them: an assumption, made before any comparison.
    /// - Within a node: 5 us and 400 GB/s, an assumption. It gives 12 us for a sum of 512 KiB over
    ///   6 ranks; 13 us are published for that (vLLM, issue 24111) where its own kernels sum, and
    ///   23 us with NCCL.
    /// - Between nodes: 12 us and 45 GB/s, 90 % of one 400 Gb/s adapter for each device: an
    ///   assumption.
    /// - Efficiency: fitted to SGLang 0.5.7 with DeepSeek-R1 in FP8 on 8 x H200, 8 to 64 requests
    ///   at once (InferenceX, issue 870); all four points are within the spread. Other engines and
    ///   models will have another one, this project's included: it has not been measured.
    /// - Excess: a 2 x 8 H100 run of July 2025 took 4.1 times this floor: SGLang, one request,
    ///   23.1 ms (tt-inference-server, issue 356).
    pub fn h100() -> Rates {
        Rates {
            memory: 0.85 * 3.35e12,
            f32: 54e12,
            bf16: 790e12,
            eight_bit: 1550e12,
            layer_ops: 14.0,
            op_gap: 2e-6,
            wire_bytes: 2.0,
            within: Wire { latency: 5e-6, bandwidth: 400e9 },
            between: Wire { latency: 12e-6, bandwidth: 45e9 },
            flat: false,
            efficiency: 0.67,
            spread: 0.15,
            excess: 4.1,
        }
    }

    /// The built-in rates of a device of this name, upper or lower case, where there are any.
    pub fn published(name: &str) -> Option<Rates> {
        match name.to_ascii_uppercase().as_str() {
            "H100" => Some(Rates::h100()),
            "H200" => Some(Rates::h200()),
            _ => None,
        }
    }

    /// Refuses what no device can have.
    ///
    /// # Errors
    /// [`PredictError::Rate`] naming the first.
    pub fn check(&self) -> Result<(), PredictError> {
        let positive = [
            ("memory", self.memory),
            ("f32", self.f32),
            ("bf16", self.bf16),
            ("eight_bit", self.eight_bit),
            ("wire_bytes", self.wire_bytes),
            ("within.bandwidth", self.within.bandwidth),
            ("between.bandwidth", self.between.bandwidth),
        ];
        let not_negative = [
            ("layer_ops", self.layer_ops),
            ("op_gap", self.op_gap),
            ("within.latency", self.within.latency),
            ("between.latency", self.between.latency),
        ];
        // Also false for what is no number.
        let (above_zero, from_zero) = (|v: f64| v > 0.0, |v: f64| v >= 0.0);
        demand(&positive, "must be positive and finite", above_zero)?;
        demand(&not_negative, "must not be negative, and finite", from_zero)?;
        demand(&[("efficiency", self.efficiency)], "must be above 0, at most 1", |v| {
            v > 0.0 && v <= 1.0
        })?;
        demand(&[("spread", self.spread)], "must be from 0 to below 1", |v| {
            (0.0..1.0).contains(&v)
        })?;
        demand(&[("excess", self.excess)], "must be at least 1, and finite", |v| v >= 1.0)
    }

    /// Least and most seconds of a step with this floor.
    pub(super) fn band(&self, floor: f64, nodes: usize) -> (f64, f64) {
        let step = floor / self.efficiency;
        let (low, high) = (step * (1.0 - self.spread), step * (1.0 + self.spread));
        // Nothing beyond one node was ever compared, so all that was seen is within.
        if nodes > 1 { (floor, high.max(floor * self.excess)) } else { (low, high) }
    }
}

fn demand(
    values: &[(&'static str, f64)],
    must: &'static str,
    holds: impl Fn(f64) -> bool,
) -> Result<(), PredictError> {
    match values.iter().find(|(_, value)| !(value.is_finite() && holds(*value))) {
        Some(&(what, value)) => Err(PredictError::Rate { what, value, must }),
        None => Ok(()),
    }
}
