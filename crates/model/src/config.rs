//! Reading `config.json`: every field is read, known to be without effect, or refused by name.
//!
//! A family reads its fields through [`Fields`], which remembers what was asked for. What is left
//! over must stand in the family's list of fields without effect, have the only value whose meaning
//! is implemented, or be null; anything else could change results and is an error.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::families;
use crate::spec::{Family, ModelSpec};

/// Longest config that is read: published ones are a few kilobytes.
const CONFIG_LIMIT: usize = 4 << 20;

/// Longest piece of a config that an error message repeats.
const QUOTE_LIMIT: usize = 128;

/// Why a config was refused. Each names the field.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// The text is longer than any real config.
    #[error("the config has {bytes} bytes, more than {limit}")]
    TooLarge {
        /// Its length in bytes.
        bytes: usize,
        /// The cap in bytes.
        limit: usize,
    },
    /// The text is not JSON.
    #[error("the config is not valid JSON: {message}")]
    NotJson {
        /// The parser's words, with line and column.
        message: String,
    },
    /// The text is JSON, but no object.
    #[error("the config is {found}, not an object")]
    NotAnObject {
        /// What it is.
        found: &'static str,
    },
    /// No family understands the architecture.
    #[error("architecture {found} is not understood; understood are {understood}")]
    UnknownArchitecture {
        /// What the config names.
        found: String,
        /// All that are understood, comma-separated.
        understood: String,
    },
    /// A field without which the model is not determined.
    #[error("field `{field}` is missing")]
    Missing {
        /// The field.
        field: String,
    },
    /// A field of another JSON type than its meaning needs.
    #[error("field `{field}` is {found}, expected {expected}")]
    WrongType {
        /// The field.
        field: String,
        /// What would be right.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A number outside what can be meant.
    #[error("field `{field}` is {value}, expected {allowed}")]
    OutOfRange {
        /// The field.
        field: String,
        /// Its value.
        value: String,
        /// The values that are accepted.
        allowed: String,
    },
    /// A known field with a value whose meaning is not implemented.
    #[error("field `{field}` is {value}; understood is {understood}")]
    Unsupported {
        /// The field.
        field: String,
        /// Its value.
        value: String,
        /// The values that are implemented.
        understood: String,
    },
    /// A field that the family does not know; it might change results.
    #[error("field `{field}` is not understood for family {family}")]
    UnknownField {
        /// The family.
        family: &'static str,
        /// The field.
        field: String,
    },
    /// Two fields that say different things about one property.
    #[error("fields `{field}` and `{other}` contradict each other")]
    Conflict {
        /// One field.
        field: String,
        /// The other.
        other: String,
    },
    /// A count that has to be a multiple of another.
    #[error("field `{field}` is {value}, not a multiple of {divisor} (`{by}`)")]
    NotDivisible {
        /// The field.
        field: String,
        /// Its value.
        value: usize,
        /// The field that has to divide it.
        by: String,
        /// That field's value.
        divisor: usize,
    },
    /// Each field is plausible, together they are not.
    #[error("the config describes {count} {what}, more than {limit}")]
    TooBig {
        /// What is counted.
        what: &'static str,
        /// How many there would be.
        count: u128,
        /// The cap.
        limit: u128,
    },
}

impl ConfigError {
    /// The field at fault, where it is one.
    pub fn field(&self) -> Option<&str> {
        match self {
            ConfigError::Missing { field }
            | ConfigError::WrongType { field, .. }
            | ConfigError::OutOfRange { field, .. }
            | ConfigError::Unsupported { field, .. }
            | ConfigError::UnknownField { field, .. }
            | ConfigError::Conflict { field, .. }
            | ConfigError::NotDivisible { field, .. } => Some(field),
            ConfigError::TooLarge { .. }
            | ConfigError::NotJson { .. }
            | ConfigError::NotAnObject { .. }
            | ConfigError::UnknownArchitecture { .. }
            | ConfigError::TooBig { .. } => None,
        }
    }
}

/// Whether a field stands in the config: absent and null differ for some fields.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Given<T> {
    Absent,
    Null,
    Value(T),
}

impl<T> Given<T> {
    /// The value; the config class' default where the field is absent; `None` for null.
    pub(crate) fn or_absent(self, default: Option<T>) -> Option<T> {
        match self {
            Given::Absent => default,
            Given::Null => None,
            Given::Value(value) => Some(value),
        }
    }

    /// The value, with absent and null meaning the same.
    pub(crate) fn value(self) -> Option<T> {
        self.or_absent(None)
    }
}

/// The fields of one JSON object, remembering which were read.
pub(crate) struct Fields<'a> {
    family: &'static str,
    prefix: &'static str,
    map: &'a Map<String, Value>,
    read: BTreeSet<&'static str>,
}

impl<'a> Fields<'a> {
    /// `prefix` goes before field names in errors, e.g. `rope_scaling.`.
    pub(crate) fn new(
        family: &'static str,
        prefix: &'static str,
        map: &'a Map<String, Value>,
    ) -> Self {
        Self { family, prefix, map, read: BTreeSet::new() }
    }

    pub(crate) fn family(&self) -> &'static str {
        self.family
    }

    /// The field's name as errors give it.
    pub(crate) fn path(&self, field: &str) -> String {
        format!("{}{}", self.prefix, quote(field))
    }

    /// Whether the field says something.
    pub(crate) fn stands(&self, field: &str) -> bool {
        self.map.get(field).is_some_and(|value| !value.is_null())
    }

    fn get(&mut self, field: &'static str) -> Given<&'a Value> {
        self.read.insert(field);
        match self.map.get(field) {
            None => Given::Absent,
            Some(Value::Null) => Given::Null,
            Some(value) => Given::Value(value),
        }
    }

    /// Reads with `convert`, which says `None` where the JSON type is wrong.
    fn typed<T>(
        &mut self,
        field: &'static str,
        expected: &'static str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Given<T>, ConfigError> {
        match self.get(field) {
            Given::Absent => Ok(Given::Absent),
            Given::Null => Ok(Given::Null),
            Given::Value(value) => match convert(value) {
                Some(value) => Ok(Given::Value(value)),
                None => Err(self.wrong_type(field, expected, value)),
            },
        }
    }

    fn wrong_type(&self, field: &str, expected: &'static str, found: &Value) -> ConfigError {
        ConfigError::WrongType { field: self.path(field), expected, found: type_name(found) }
    }

    pub(crate) fn missing(&self, field: &str) -> ConfigError {
        ConfigError::Missing { field: self.path(field) }
    }

    /// A whole number within `allowed`, where the field stands.
    pub(crate) fn count_given(
        &mut self,
        field: &'static str,
        allowed: RangeInclusive<usize>,
    ) -> Result<Given<usize>, ConfigError> {
        let number = self.typed(field, "a whole number", |value| {
            // A negative whole number is of the right type and out of range.
            value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from))
        })?;
        let Given::Value(number) = number else {
            return Ok(match number {
                Given::Absent => Given::Absent,
                _ => Given::Null,
            });
        };
        match usize::try_from(number).ok().filter(|number| allowed.contains(number)) {
            Some(number) => Ok(Given::Value(number)),
            None => Err(ConfigError::OutOfRange {
                field: self.path(field),
                value: number.to_string(),
                allowed: format!("{} to {}", allowed.start(), allowed.end()),
            }),
        }
    }

    /// A whole number within `1..=limit` that the config must give.
    pub(crate) fn count(
        &mut self,
        field: &'static str,
        limit: usize,
    ) -> Result<usize, ConfigError> {
        self.count_given(field, 1..=limit)?.value().ok_or_else(|| self.missing(field))
    }

    /// A finite number for which `allowed` holds, where the field stands.
    pub(crate) fn number_given(
        &mut self,
        field: &'static str,
        what: &'static str,
        allowed: impl Fn(f64) -> bool,
    ) -> Result<Given<f64>, ConfigError> {
        let number = self.typed(field, "a number", Value::as_f64)?;
        if let Given::Value(value) = number
            && !(value.is_finite() && allowed(value))
        {
            return Err(ConfigError::OutOfRange {
                field: self.path(field),
                value: format!("{value:?}"),
                allowed: what.to_owned(),
            });
        }
        Ok(number)
    }

    /// A number that the config must give.
    pub(crate) fn number(
        &mut self,
        field: &'static str,
        what: &'static str,
        allowed: impl Fn(f64) -> bool,
    ) -> Result<f64, ConfigError> {
        self.number_given(field, what, allowed)?.value().ok_or_else(|| self.missing(field))
    }

    /// A truth value.
    pub(crate) fn truth(&mut self, field: &'static str) -> Result<Given<bool>, ConfigError> {
        self.typed(field, "true or false", Value::as_bool)
    }

    /// A truth value; null counts as absent, and absent is false.
    pub(crate) fn flag(&mut self, field: &'static str) -> Result<bool, ConfigError> {
        Ok(self.truth(field)?.value().unwrap_or(false))
    }

    /// A string.
    pub(crate) fn text(&mut self, field: &'static str) -> Result<Given<&'a str>, ConfigError> {
        self.typed(field, "a string", Value::as_str)
    }

    /// A list of strings.
    pub(crate) fn texts(
        &mut self,
        field: &'static str,
    ) -> Result<Given<Vec<&'a str>>, ConfigError> {
        self.typed(field, "a list of strings", |value| {
            value.as_array()?.iter().map(Value::as_str).collect()
        })
    }

    /// A list of whole numbers.
    pub(crate) fn counts(&mut self, field: &'static str) -> Result<Given<Vec<u64>>, ConfigError> {
        self.typed(field, "a list of whole numbers", |value| {
            value.as_array()?.iter().map(Value::as_u64).collect()
        })
    }

    /// A nested object.
    pub(crate) fn object(
        &mut self,
        field: &'static str,
    ) -> Result<Given<&'a Map<String, Value>>, ConfigError> {
        self.typed(field, "an object", Value::as_object)
    }

    /// One token id or a list of them, each below `vocab`.
    pub(crate) fn tokens(
        &mut self,
        field: &'static str,
        vocab: usize,
    ) -> Result<Given<Vec<u32>>, ConfigError> {
        const EXPECTED: &str = "a token id or a list of them";
        let given = self.get(field);
        let Given::Value(value) = given else {
            return Ok(match given {
                Given::Absent => Given::Absent,
                _ => Given::Null,
            });
        };
        let listed = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let mut tokens: Vec<u32> = Vec::new();
        for item in listed {
            if item.as_i64().is_none() && item.as_u64().is_none() {
                return Err(self.wrong_type(field, EXPECTED, item));
            }
            let token = item.as_u64().and_then(|id| u32::try_from(id).ok());
            match token.filter(|&id| (id as usize) < vocab) {
                Some(id) if !tokens.contains(&id) => tokens.push(id),
                Some(_) => {}
                None => {
                    return Err(ConfigError::OutOfRange {
                        field: self.path(field),
                        value: quote(&item.to_string()),
                        allowed: format!("token ids below the vocabulary of {vocab}"),
                    });
                }
            }
        }
        Ok(Given::Value(tokens))
    }

    /// A field of which only one value is implemented. Absent and null mean that value.
    pub(crate) fn only(&mut self, field: &'static str, value: &Value) -> Result<(), ConfigError> {
        let Given::Value(given) = self.get(field) else {
            return Ok(());
        };
        // 1 and 1.0 are the same number but different JSON values.
        let same_number = given.as_f64().is_some() && given.as_f64() == value.as_f64();
        if given == value || same_number {
            return Ok(());
        }
        Err(self.unsupported(field, given, value.to_string()))
    }

    /// The same for a field that must be there.
    pub(crate) fn required(
        &mut self,
        field: &'static str,
        value: &Value,
    ) -> Result<(), ConfigError> {
        match self.map.get(field) {
            None | Some(Value::Null) => Err(self.missing(field)),
            Some(_) => self.only(field, value),
        }
    }

    pub(crate) fn unsupported(
        &self,
        field: &str,
        value: &Value,
        understood: String,
    ) -> ConfigError {
        let value = match value {
            Value::Array(_) | Value::Object(_) => type_name(value).to_owned(),
            other => quote(&other.to_string()),
        };
        ConfigError::Unsupported { field: self.path(field), value, understood }
    }

    /// Refuses whatever was neither read nor stands in `without_effect`. A null says nothing, so
    /// it passes; a false does not, since it may switch off what is otherwise on.
    pub(crate) fn finish(self, without_effect: &[&[&str]]) -> Result<(), ConfigError> {
        for (field, value) in self.map {
            let known = self.read.contains(field.as_str())
                || value.is_null()
                || without_effect.iter().any(|list| list.contains(&field.as_str()));
            if !known {
                let field = self.path(field);
                return Err(ConfigError::UnknownField { family: self.family, field });
            }
        }
        Ok(())
    }
}

/// What a JSON value is, for errors.
fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(number) if number.is_f64() => "a fractional number",
        Value::Number(_) => "a whole number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Untrusted text for a message: short, and without control characters that could forge log lines.
pub(crate) fn quote(text: &str) -> String {
    let printable = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    let mut quoted: String = text.chars().take(QUOTE_LIMIT).map(printable).collect();
    if text.chars().nth(QUOTE_LIMIT).is_some() {
        quoted.push_str("...");
    }
    quoted
}

fn parse_object(json: &str) -> Result<Map<String, Value>, ConfigError> {
    if json.len() > CONFIG_LIMIT {
        return Err(ConfigError::TooLarge { bytes: json.len(), limit: CONFIG_LIMIT });
    }
    match serde_json::from_str(json) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(ConfigError::NotAnObject { found: type_name(&other) }),
        Err(error) => Err(ConfigError::NotJson { message: error.to_string() }),
    }
}

impl ModelSpec {
    /// Reads the text of a published `config.json`, in the style of any transformers version.
    ///
    /// # Errors
    /// Whatever is not understood, missing or impossible, naming the field.
    pub fn from_config(config_json: &str) -> Result<ModelSpec, ConfigError> {
        let map = parse_object(config_json)?;
        let family = family_of(&map)?;
        let mut fields = Fields::new(family.name(), "", &map);
        // Both were read to find the family.
        fields.read.extend(["architectures", "model_type"]);
        let spec = families::spec(family, &mut fields)?;
        fields.finish(&families::without_effect(family))?;
        check_size(&spec)?;
        Ok(spec)
    }

    /// Takes the token ids of a `generation_config.json`: its `eos_token_id` are added to the
    /// config's (instruction-tuned models list several), its `bos_token_id` counts where the
    /// config names none. Other entries are sampling defaults and not this crate's matter.
    ///
    /// # Errors
    /// Not JSON, or ids that are none; the spec is then unchanged.
    pub fn with_generation_config(&mut self, json: &str) -> Result<(), ConfigError> {
        let map = parse_object(json)?;
        let mut fields = Fields::new(self.family.name(), "", &map);
        let eos = fields.tokens("eos_token_id", self.vocab)?.value().unwrap_or_default();
        let bos = fields.tokens("bos_token_id", self.vocab)?.value().unwrap_or_default();
        for id in eos {
            if !self.eos.contains(&id) {
                self.eos.push(id);
            }
        }
        self.bos = self.bos.or(bos.first().copied());
        Ok(())
    }
}

/// The family by `architectures`, or by `model_type` where that is absent; both must agree.
fn family_of(map: &Map<String, Value>) -> Result<Family, ConfigError> {
    let mut fields = Fields::new("", "", map);
    let model_type = fields.text("model_type")?.value();
    let architectures = fields.typed("architectures", "a list of names", Value::as_array)?.value();
    let by_type = model_type.and_then(Family::from_model_type);
    let unknown = |found: &str| ConfigError::UnknownArchitecture {
        found: quote(found),
        understood: Family::ALL.map(Family::architecture).join(", "),
    };
    let named = match architectures.map(Vec::as_slice) {
        None | Some([]) => {
            let found = model_type.ok_or_else(|| fields.missing("architectures"))?;
            return by_type.ok_or_else(|| unknown(found));
        }
        Some([Value::String(name)]) => name,
        Some([other]) => return Err(fields.wrong_type("architectures", "a list of names", other)),
        Some(several) => return Err(unknown(&Value::from(several.to_vec()).to_string())),
    };
    let family = Family::from_architecture(named).ok_or_else(|| unknown(named))?;
    if model_type.is_some() && by_type != Some(family) {
        return Err(ConfigError::Conflict {
            field: "architectures".to_owned(),
            other: "model_type".to_owned(),
        });
    }
    Ok(family)
}

/// Refuses what no machine could list or hold, before anyone allocates for it.
pub(crate) fn check_size(spec: &ModelSpec) -> Result<(), ConfigError> {
    const TENSORS: u128 = 1 << 20;
    const PARAMETERS: u128 = 1 << 46;
    // Roughly, so that nothing is listed before the count is known to be small.
    let of_layer = |layer: &crate::LayerSpec| match &layer.feed_forward {
        crate::FeedForward::Experts(experts) => 13 + 3 * experts.count as u128,
        crate::FeedForward::Dense(_) => 16,
    };
    let tensors = spec.layers.iter().map(of_layer).sum::<u128>() + 3;
    if tensors > TENSORS {
        return Err(ConfigError::TooBig { what: "tensors", count: tensors, limit: TENSORS });
    }
    let elements =
        |tensor: &crate::TensorSpec| -> u128 { tensor.shape.iter().map(|&n| n as u128).product() };
    let mut parameters: u128 = 2 * spec.vocab as u128 * spec.hidden as u128;
    let mut first = 0;
    // Models have runs of equal layers; one of each run tells the whole.
    for run in spec.layers.chunk_by(|a, b| a == b) {
        let layer: u128 = spec.layer_tensors(first).iter().map(elements).sum();
        parameters += run.len() as u128 * layer;
        first += run.len();
    }
    if parameters > PARAMETERS {
        let what = "parameters";
        return Err(ConfigError::TooBig { what, count: parameters, limit: PARAMETERS });
    }
    Ok(())
}
