//! The calibration file: what devices and wires can do, in the units in which people measure it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use planner::predict::{Rates, Wire};
use serde::Deserialize;

use super::nodes::Kind;
use crate::model_dir;

/// The name under which a file describes devices that are given by their memory alone.
const PROCESSOR: &str = "processor";

/// Rates by name of a device.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Calibration {
    devices: BTreeMap<String, Device>,
}

/// One kind of device; `planner::predict::Rates` says what each number is.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Device {
    /// Who measured it, when, with what. Shown beside every prediction that rests on it.
    source: String,
    memory_gb_s: f64,
    f32_tflops: f64,
    bf16_tflops: f64,
    eight_bit_tflops: f64,
    layer_ops: f64,
    op_gap_us: f64,
    wire_bytes: f64,
    within: Way,
    between: Way,
    flat: bool,
    efficiency: f64,
    spread: f64,
    excess: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Way {
    latency_us: f64,
    gb_s: f64,
}

impl Way {
    fn wire(&self) -> Wire {
        Wire { latency: self.latency_us * 1e-6, bandwidth: self.gb_s * 1e9 }
    }
}

impl Device {
    fn rates(&self) -> Rates {
        Rates {
            memory: self.memory_gb_s * 1e9,
            f32: self.f32_tflops * 1e12,
            bf16: self.bf16_tflops * 1e12,
            eight_bit: self.eight_bit_tflops * 1e12,
            layer_ops: self.layer_ops,
            op_gap: self.op_gap_us * 1e-6,
            wire_bytes: self.wire_bytes,
            within: self.within.wire(),
            between: self.between.wire(),
            flat: self.flat,
            efficiency: self.efficiency,
            spread: self.spread,
            excess: self.excess,
        }
    }
}

/// The rates that are known, and where they come from.
pub(crate) struct Known(BTreeMap<String, (Rates, String)>);

impl Known {
    /// What a file says, and for devices that it does not name what is built in.
    pub(crate) fn read(path: Option<&Path>) -> anyhow::Result<Known> {
        let Some(path) = path else { return Ok(Known(BTreeMap::new())) };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = model_dir::text(path)?.with_context(|| format!("there is no {name}"))?;
        Self::parse(&text).with_context(|| name)
    }

    fn parse(text: &str) -> anyhow::Result<Known> {
        let file: Calibration = serde_json::from_str(text)?;
        let mut known = BTreeMap::new();
        for (name, device) in &file.devices {
            let rates = device.rates();
            rates.check().with_context(|| format!("devices.{name}"))?;
            let source = device.source.chars().filter(|c| !c.is_control()).take(200).collect();
            known.insert(name.to_ascii_uppercase(), (rates, source));
        }
        Ok(Known(known))
    }

    /// Rates of a kind of device and their source.
    pub(crate) fn of(&self, kind: &Kind) -> anyhow::Result<(Rates, String)> {
        let name = if kind.gpu { kind.device.as_str() } else { PROCESSOR };
        if let Some((rates, source)) = self.0.get(&name.to_ascii_uppercase()) {
            return Ok((*rates, source.clone()));
        }
        let built_in = kind.gpu.then(|| Rates::published(name)).flatten();
        let rates = built_in.with_context(|| {
            format!("no rates are built in for {name}: give them with --calibration FILE")
        })?;
        Ok((rates, BUILT_IN.to_owned()))
    }
}

/// What the built-in rates are; `planner::predict::Rates` has it number by number.
const BUILT_IN: &str = "built in: data sheets, assumptions, and an efficiency fitted to published \
                        steps of another engine";

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"{"devices": {"processor": {"source": "a test", "memory_gb_s": 20,
        "f32_tflops": 0.2, "bf16_tflops": 0.4, "eight_bit_tflops": 0.6, "layer_ops": 12,
        "op_gap_us": 5, "wire_bytes": 4, "within": {"latency_us": 10, "gb_s": 8},
        "between": {"latency_us": 50, "gb_s": 1.25}, "flat": true, "efficiency": 0.8,
        "spread": 0.2, "excess": 2}}}"#;

    fn kind(text: &str) -> Kind {
        super::super::nodes(text).expect("nodes").kinds[0].clone()
    }

    #[test]
    fn units_become_seconds_bytes_and_operations() {
        let known = Known::parse(FILE).expect("a calibration");
        let (rates, source) = known.of(&kind("4x64GiB")).expect("rates");
        assert_eq!((rates.memory, rates.f32, source.as_str()), (20e9, 0.2e12, "a test"));
        assert_eq!(rates.between, Wire { latency: 50.0 * 1e-6, bandwidth: 1.25e9 });
        let (built_in, source) = known.of(&kind("8xh200")).expect("built in");
        assert_eq!(built_in, Rates::h200());
        assert!(source.contains("another engine"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, named) in [
            ("\"flat\": true, ", "", "flat"),
            ("\"flat\"", "\"fat\"", "fat"),
            ("\"efficiency\": 0.8", "\"efficiency\": 1.8", "devices.processor: efficiency is 1.8"),
            ("\"gb_s\": 8", "\"gb_s\": -8", "within.bandwidth"),
            ("{\"devices\"", "[\"devices\"", "line 1"),
        ] {
            let text = FILE.replacen(from, to, 1);
            assert_ne!(text, FILE, "{from}");
            let error = Known::parse(&text).err().expect(named);
            assert!(format!("{error:#}").contains(named), "{error:#}");
        }
        let known = Known::parse(FILE).expect("a calibration");
        let error = known.of(&kind("A100")).expect_err("no rates");
        assert!(error.to_string().contains("A100"), "{error}");
        let error = Known::read(None).expect("none").of(&kind("64GiB")).expect_err("none");
        assert!(error.to_string().contains("processor"), "{error}");
    }
}
