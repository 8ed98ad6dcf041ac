//! Rotary embeddings as configs spell them.

use serde_json::{Map, Value, json};

use crate::config::{ConfigError, Fields, Given};
use crate::spec::RopeScaling;

/// What a config says of rotary embeddings, before anyone knows which columns turn.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Turns {
    pub(crate) theta: f64,
    pub(crate) scaling: RopeScaling,
    /// What the config's `mscale_all_dim` multiplies query and key with, each (DeepSeek).
    pub(crate) query_scale: f64,
}

/// One rope object: theta where it stands there, the scaling, and `Turns::query_scale`.
#[derive(Debug, Clone, PartialEq)]
struct Object {
    theta: Option<f64>,
    scaling: RopeScaling,
    query_scale: f64,
}

/// The rope types that most classes implement, and those with YaRN.
pub(crate) const TYPES: &[&str] = &["default", "linear", "llama3"];
pub(crate) const WITH_YARN: &[&str] = &["default", "linear", "llama3", "yarn"];

/// What rope needs to know of the rest of the config.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RopeDefaults {
    pub(crate) theta: f64,
    /// `max_position_embeddings`, the original context where no other is given.
    pub(crate) context: usize,
    /// The rope types that the family's class implements.
    pub(crate) types: &'static [&'static str],
}

/// Rope from either style: `rope_theta` with `rope_scaling`, or `rope_parameters` holding both.
pub(crate) fn rope(fields: &mut Fields<'_>, defaults: RopeDefaults) -> Result<Turns, ConfigError> {
    let mut theta = theta_of(fields)?.map(|theta| ("rope_theta", theta));
    let mut scaling: Option<(&str, (RopeScaling, f64))> = None;
    for (name, prefix) in
        [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")]
    {
        let Some(map) = fields.object(name)?.value() else {
            continue;
        };
        let inner = object(fields.family(), prefix, map, defaults)?;
        if let Some(inner_theta) = inner.theta {
            agree(&mut theta, name, inner_theta)?;
        }
        agree(&mut scaling, name, (inner.scaling, inner.query_scale))?;
    }
    let (scaling, query_scale) = scaling.map_or((RopeScaling::None, 1.0), |(_, value)| value);
    Ok(Turns { theta: theta.map_or(defaults.theta, |(_, theta)| theta), scaling, query_scale })
}

/// Keeps the value that two places give, if it is the same.
pub(crate) fn agree<T: PartialEq>(
    known: &mut Option<(&'static str, T)>,
    name: &'static str,
    value: T,
) -> Result<(), ConfigError> {
    match known {
        Some((other, before)) if *before != value => {
            Err(ConfigError::Conflict { field: name.to_owned(), other: (*other).to_owned() })
        }
        _ => {
            *known = Some((name, value));
            Ok(())
        }
    }
}

fn theta_of(fields: &mut Fields<'_>) -> Result<Option<f64>, ConfigError> {
    Ok(fields.number_given("rope_theta", "a number of at least 1", |theta| theta >= 1.0)?.value())
}

/// One rope object as [`Turns`], for configs that have one per layer type.
pub(crate) fn turns(
    family: &'static str,
    prefix: &'static str,
    map: &Map<String, Value>,
    defaults: RopeDefaults,
) -> Result<Turns, ConfigError> {
    let Object { theta, scaling, query_scale } = object(family, prefix, map, defaults)?;
    Ok(Turns { theta: theta.unwrap_or(defaults.theta), scaling, query_scale })
}

fn object(
    family: &'static str,
    prefix: &'static str,
    map: &Map<String, Value>,
    defaults: RopeDefaults,
) -> Result<Object, ConfigError> {
    let mut fields = Fields::new(family, prefix, map);
    let theta = theta_of(&mut fields)?;
    fields.only("partial_rotary_factor", &json!(1.0))?;
    // Older configs say `type`; some carry both.
    let kind = match (fields.text("rope_type")?, fields.text("type")?) {
        (Given::Value(kind), Given::Value(old)) if kind != old => {
            return Err(ConfigError::Conflict {
                field: fields.path("rope_type"),
                other: fields.path("type"),
            });
        }
        (Given::Value(kind), _) | (_, Given::Value(kind)) => kind,
        // Only theta in it: an object of the newer style without a type means no scaling.
        _ if theta.is_some() && map.len() == 1 => "default",
        _ => return Err(ConfigError::Missing { field: fields.path("rope_type") }),
    };
    if !defaults.types.contains(&kind) {
        let kind = Value::from(kind);
        return Err(fields.unsupported("rope_type", &kind, listed(defaults.types)));
    }
    let mut query_scale = 1.0;
    let scaling = match kind {
        "linear" => RopeScaling::Linear { factor: factor(&mut fields)? },
        "llama3" => llama3(&mut fields)?,
        "yarn" => {
            let (scaling, scale) = yarn(&mut fields, defaults.context)?;
            query_scale = scale;
            scaling
        }
        _ => RopeScaling::None,
    };
    fields.finish(&[])?;
    Ok(Object { theta, scaling, query_scale })
}

/// `a, b or c`.
fn listed(names: &[&str]) -> String {
    match names {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        _ => names.concat(),
    }
}

fn factor(fields: &mut Fields<'_>) -> Result<f64, ConfigError> {
    fields.number("factor", "a number of at least 1", |factor| factor >= 1.0)
}

fn positive(value: f64) -> bool {
    value > 0.0
}

fn llama3(fields: &mut Fields<'_>) -> Result<RopeScaling, ConfigError> {
    let factor = factor(fields)?;
    let low = fields.number("low_freq_factor", "a positive number", positive)?;
    // The ramp divides by the difference of the two.
    let high = fields.number("high_freq_factor", "more than low_freq_factor", |high| high > low)?;
    let original_context =
        fields.number("original_max_position_embeddings", "a positive number", positive)?;
    Ok(RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_context,
    })
}

/// The scaling, and what `mscale_all_dim` multiplies query and key with, each.
fn yarn(fields: &mut Fields<'_>, context: usize) -> Result<(RopeScaling, f64), ConfigError> {
    const POSITIVE: &str = "a positive number";
    // Beyond any that is published, and far from what f32 cannot hold.
    const MODERATE: &str = "a positive number up to 1000";
    let moderate = |value: f64| value > 0.0 && value <= 1000.0;
    let factor = factor(fields)?;
    let original = fields
        .number_given("original_max_position_embeddings", POSITIVE, positive)?
        .value()
        .unwrap_or(context as f64);
    let beta_fast = fields.number_given("beta_fast", POSITIVE, positive)?.value().unwrap_or(32.0);
    let slow = |slow: f64| slow > 0.0 && slow < beta_fast;
    let beta_slow = fields.number_given("beta_slow", "between 0 and beta_fast", slow)?;
    let beta_slow = beta_slow.value().unwrap_or(1.0);
    let truncate = fields.truth("truncate")?.value().unwrap_or(true);
    let given = fields.number_given("attention_factor", MODERATE, moderate)?.value();
    let mscale = fields.number_given("mscale", MODERATE, moderate)?.value();
    let all_dim = fields.number_given("mscale_all_dim", MODERATE, moderate)?.value();
    let by = |weight: f64| 0.1 * weight * factor.ln() + 1.0;
    let (magnitude, query_scale) = match (mscale, all_dim) {
        (Some(mscale), Some(all_dim)) => (by(mscale) / by(all_dim), by(all_dim)),
        (None, None) => (by(1.0), 1.0),
        // The model codes disagree on what one without the other means.
        (Some(_), None) => {
            return Err(ConfigError::Missing { field: fields.path("mscale_all_dim") });
        }
        (None, Some(_)) => return Err(ConfigError::Missing { field: fields.path("mscale") }),
    };
    let scaling = RopeScaling::Yarn {
        factor,
        original_context: original,
        beta_fast,
        beta_slow,
        truncate,
        magnitude: given.unwrap_or(magnitude) as f32,
    };
    Ok((scaling, query_scale))
}
