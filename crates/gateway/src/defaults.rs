//! Sampling parameters where a request names none: the model's `generation_config.json`.

use serde_json::Value;

use crate::config::GatewayError;

/// What is used for a parameter that the request leaves out.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SamplingDefaults {
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    pub(crate) top_k: u32,
    pub(crate) min_p: f32,
    pub(crate) repetition_penalty: f32,
}

impl Default for SamplingDefaults {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl SamplingDefaults {
    /// Reads `generation_config.json`. A model that says `do_sample: false` describes greedy
    /// decoding for other programs; its numbers are then no defaults for sampling.
    pub(crate) fn new(text: Option<&str>) -> Result<Self, GatewayError> {
        let broken =
            |reason: String| GatewayError::ModelFile { file: "generation_config.json", reason };
        let mut this = Self::default();
        let Some(text) = text else { return Ok(this) };
        let value: Value = serde_json::from_str(text).map_err(|e| broken(e.to_string()))?;
        if value["do_sample"] == Value::Bool(false) {
            return Ok(this);
        }
        let number = |name: &str, from: f64, to: f64| match &value[name] {
            Value::Null => Ok(None),
            found => match found.as_f64().filter(|n| (from..=to).contains(n)) {
                Some(number) => Ok(Some(number)),
                None => Err(broken(format!("{name} is not a number from {from} to {to}"))),
            },
        };
        let small = f64::from(f32::MIN_POSITIVE);
        let set = |field: &mut f32, found: Option<f64>| {
            if let Some(number) = found {
                #[expect(clippy::cast_possible_truncation, reason = "parameters are f32")]
                {
                    *field = number as f32;
                }
            }
        };
        set(&mut this.temperature, number("temperature", 0.0, 100.0)?);
        set(&mut this.top_p, number("top_p", small, 1.0)?);
        set(&mut this.min_p, number("min_p", 0.0, 1.0)?);
        set(&mut this.repetition_penalty, number("repetition_penalty", small, 100.0)?);
        if number("top_k", -1.0, f64::from(u32::MAX))?.is_some() {
            let top_k = value["top_k"].as_i64().unwrap_or(0).max(0);
            this.top_k = u32::try_from(top_k).unwrap_or(0);
        }
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_numbers_unless_sampling_is_off() {
        let read = |text: &str| SamplingDefaults::new(Some(text));
        let given = read(r#"{"temperature": 0.5, "top_p": 0.75, "top_k": 50}"#).expect("reads");
        assert_eq!((given.temperature, given.top_p, given.top_k), (0.5, 0.75, 50));
        let off = read(r#"{"do_sample": false, "temperature": 0.5}"#).expect("reads");
        assert_eq!(off, SamplingDefaults::default());
        assert!(read(r#"{"top_p": 0}"#).is_err());
        assert!(read("{").is_err());
    }
}
