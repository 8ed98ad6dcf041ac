//! What a chat template may build in one step: the template engine's filters and methods whose
//! result can be far larger than what went in, under limits.
//!
//! The engine charges fuel by the byte (one unit pays for 64) before it repeats, joins or adds
//! strings, so `template_fuel` bounds those, doubling in a loop included. What it does not bound
//! is bounded here: widths of formats, formats and joins that show an argument many times, texts
//! of lists (which may hold the same large thing many times), pieces of a split, sums of strings,
//! and JSON. No text of over [`TEXT_LIMIT`] bytes goes in or comes out of these.
//!
//! One operator stays out of reach: `~` with a list that repeats itself (`'' ~ [x] * 1000000`)
//! writes the whole list before the engine charges for it.

use std::fmt::{self, Write};

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Rest, Value as Jinja, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, filters};

/// Most bytes of a text that a guarded filter or method takes or makes.
pub(crate) const TEXT_LIMIT: usize = 16 << 20;
/// Most digits of a width, precision or index in a format: less than 10,000 characters.
const DIGITS: usize = 4;
/// Longest escape of one byte in a `repr`, and of one character in HTML.
const EXPANSION: usize = 6;

/// Puts the guarded versions in place of the engine's, and takes away what has none.
pub(crate) fn guard(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    for name in ["pprint", "urlencode"] {
        environment.remove_filter(name);
    }
    environment.remove_global("debug");
    let plain: [(&str, Jinja); 8] = [
        ("upper", Jinja::from_function(filters::upper)),
        ("lower", Jinja::from_function(filters::lower)),
        ("title", Jinja::from_function(filters::title)),
        ("capitalize", Jinja::from_function(filters::capitalize)),
        ("trim", Jinja::from_function(filters::trim)),
        ("string", Jinja::from_function(filters::string)),
        ("escape", Jinja::from_function(filters::escape)),
        ("e", Jinja::from_function(filters::escape)),
    ];
    for (name, filter) in plain {
        environment.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            filter.call(state, &texts(args.into_values())?)
        });
    }
    environment.add_filter("split", |state: &mut State, args: Rest<ValueOrKwargs>| {
        let args = texts(args.into_values())?;
        let separator = args.get(1).and_then(Jinja::as_str);
        charge_pieces(state, args.first().and_then(Jinja::as_str).unwrap_or(""), separator)?;
        Jinja::from_function(filters::split).call(state, &args)
    });
    environment.add_filter("lines", |state: &mut State, value: &Jinja| {
        let value = text(value)?;
        charge_pieces(state, value.as_str().unwrap_or(""), Some("\n"))?;
        filters::lines(&value)
    });
    environment.add_filter("indent", indent);
    environment.add_filter("replace", replace);
    environment.add_filter("join", join);
    environment.add_filter("sum", sum);
    environment.add_filter("format", |value: &Jinja, args: Rest<ValueOrKwargs>| {
        formatted(FormatStyle::Printf, value, args.into_values())
    });
}

/// What a template gets that wants more than there is.
pub(crate) fn too_much() -> Error {
    Error::new(ErrorKind::OutOfFuel, "a value would be too large")
}

/// Counts what is written into it and takes no more than the limit.
#[derive(Default)]
struct Room(String);

impl Write for Room {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.len() > TEXT_LIMIT - self.0.len() {
            return Err(fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}

/// The value as text where it is a list or a map; else itself, where it is not too long.
pub(crate) fn text(value: &Jinja) -> Result<Jinja, Error> {
    if value.as_str().is_some_and(|s| s.len() > TEXT_LIMIT) {
        return Err(too_much());
    }
    if value.is_kwargs() || value.as_object().is_none() {
        return Ok(value.clone());
    }
    let mut room = Room::default();
    write!(room, "{value}").map_err(|_| too_much())?;
    Ok(Jinja::from(room.0))
}

/// [`text`] of each, in keyword arguments too.
fn texts(args: Vec<Jinja>) -> Result<Vec<Jinja>, Error> {
    let each = |value: Jinja| {
        if !value.is_kwargs() {
            return text(&value);
        }
        let given = Kwargs::try_from(value)?;
        let bounded = given.args().map(|name| {
            let value: Jinja = given.peek(name)?;
            Ok((name.to_owned(), text(&value)?))
        });
        Ok(bounded.collect::<Result<Kwargs, Error>>()?.into())
    };
    args.into_iter().map(each).collect()
}

/// Charges for the list that a split makes before it is made.
fn charge_pieces(state: &State, text: &str, separator: Option<&str>) -> Result<(), Error> {
    let pieces = match separator {
        Some("") | None => text.len(),
        Some(separator) => text.matches(separator).count(),
    };
    let cost = if separator.is_none() { text.split_whitespace().count() } else { pieces };
    state.consume_fuel(u64::try_from(cost).unwrap_or(u64::MAX))
}

fn within(bytes: usize) -> Result<(), Error> {
    if bytes <= TEXT_LIMIT { Ok(()) } else { Err(too_much()) }
}

/// Both kinds of formatting, with lists and maps as texts.
fn formatted(style: FormatStyle, pattern: &Jinja, args: Vec<Jinja>) -> Result<Jinja, Error> {
    let pattern = text(pattern)?;
    let pattern = pattern.as_str().unwrap_or("");
    let args = texts(args)?;
    let opener = if style == FormatStyle::Printf { '%' } else { '{' };
    let mut fields: usize = 0;
    let mut digits = None;
    for c in pattern.chars() {
        digits = match digits {
            _ if c == opener => {
                fields += 1;
                Some(0)
            }
            Some(count) if c.is_ascii_digit() => Some(count + 1),
            // A printf field ends with a letter, the other kind with its bracket.
            Some(_) if opener == '%' && c.is_ascii_alphabetic() => None,
            Some(_) if c == '}' && opener == '{' => None,
            Some(_) => Some(0),
            None => None,
        };
        if digits.is_some_and(|count| count > DIGITS) {
            return Err(too_much());
        }
    }
    let mut longest = 0;
    for value in &args {
        longest = longest.max(length(value)?);
    }
    // Twice the width, as digits may be grouped; and room for a number's own.
    let field = longest.saturating_mul(EXPANSION).saturating_add(2 * 10_usize.pow(5));
    within(fields.saturating_mul(field.min(TEXT_LIMIT)).saturating_add(pattern.len()))?;
    format(style, pattern, &args).map(Jinja::from)
}

/// Bytes of a text, the longest among keyword arguments.
fn length(value: &Jinja) -> Result<usize, Error> {
    if !value.is_kwargs() {
        return Ok(value.as_str().map_or(0, str::len));
    }
    let mut longest = 0;
    let given = Kwargs::try_from(value.clone())?;
    for name in given.args() {
        let value: Jinja = given.peek(name)?;
        longest = longest.max(value.as_str().map_or(0, str::len));
    }
    Ok(longest)
}

/// Every item's text with the joiner between.
fn joined(state: &State, joiner: &str, items: &Jinja, field: Option<&str>) -> Result<Jinja, Error> {
    let mut room = Room::default();
    for (i, item) in items.try_iter()?.enumerate() {
        state.consume_fuel(1)?;
        let item = match field {
            Some(field) => field.split('.').try_fold(item, |item, name| item.get_attr(name))?,
            None => item,
        };
        let written = if i > 0 { room.write_str(joiner) } else { Ok(()) };
        written.and_then(|()| write!(room, "{item}")).map_err(|_| too_much())?;
    }
    Ok(Jinja::from(room.0))
}

fn join(
    state: &State,
    value: &Jinja,
    joiner: Option<&Jinja>,
    attribute: Option<&str>,
    options: Kwargs,
) -> Result<Jinja, Error> {
    let joiner = match joiner {
        Some(joiner) => Some(joiner.clone()),
        None => options.get::<Option<Jinja>>("d")?,
    };
    let attribute = match attribute {
        Some(attribute) => Some(attribute),
        None => options.get("attribute")?,
    };
    options.assert_all_used()?;
    let joiner = text(&joiner.unwrap_or_else(|| Jinja::from("")))?;
    let joiner = joiner.to_string();
    joined(state, &joiner, value, attribute)
}

fn replace(value: &Jinja, old: &Jinja, new: &Jinja, count: Option<i64>) -> Result<Jinja, Error> {
    let [value, old, new] = [text(value)?, text(old)?, text(new)?].map(|v| v.to_string());
    let most = count.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    let found = value.matches(old.as_str()).count().min(most);
    within(value.len().saturating_add(found.saturating_mul(new.len())))?;
    Ok(Jinja::from(value.replacen(&old, &new, most)))
}

fn indent(state: &mut State, args: Rest<ValueOrKwargs>) -> Result<Jinja, Error> {
    let args = texts(args.into_values())?;
    let value = args.first().cloned().unwrap_or_default().to_string();
    let named = args.last().filter(|value| value.is_kwargs());
    let named = named.and_then(|value| value.get_attr("width").ok()).filter(|w| !w.is_undefined());
    let width = args.get(1).filter(|value| !value.is_kwargs()).cloned().or(named);
    let width = width.map_or(Some(4), |width| width.as_usize()).unwrap_or(0);
    let lines = value.matches('\n').count() + 1;
    within(lines.saturating_mul(width).saturating_add(value.len()))?;
    Jinja::from_function(filters::indent).call(state, &args)
}

/// Sums are of numbers: a sum of strings would grow without a charge.
fn sum(state: &mut State, args: Rest<ValueOrKwargs>) -> Result<Jinja, Error> {
    let args = args.into_values();
    let named = args.last().filter(|value| value.is_kwargs());
    let named = named.and_then(|value| value.get_attr("start").ok());
    let start = args.get(2).filter(|value| !value.is_kwargs()).cloned().or(named);
    if start.is_some_and(|start| !start.is_undefined() && !start.is_number()) {
        let message = "sum adds numbers only";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Jinja::from_function(filters::sum).call(state, &args)
}

/// Python's methods of strings, lists and maps.
fn method(state: &mut State, value: &Jinja, name: &str, args: &[Jinja]) -> Result<Jinja, Error> {
    let others = minijinja_contrib::pycompat::unknown_method_callback;
    if value.kind() == ValueKind::Seq && name == "count" {
        let length = value.len().ok_or_else(too_much)?;
        state.consume_fuel(u64::try_from(length).unwrap_or(u64::MAX))?;
        return others(state, value, name, args);
    }
    let Some(this) = value.as_str() else { return others(state, value, name, args) };
    within(this.len())?;
    match (name, args) {
        ("format", _) => formatted(FormatStyle::StrFormat, value, args.to_vec()),
        ("join", [items]) => joined(state, this, items, None),
        ("replace", [old, new]) if both_texts(old, new) => replace(value, old, new, None),
        ("replace", [old, new, count]) if both_texts(old, new) => {
            replace(value, old, new, count.as_i64())
        }
        ("split", _) => {
            charge_pieces(state, this, args.first().and_then(Jinja::as_str))?;
            others(state, value, name, args)
        }
        ("splitlines", _) => {
            charge_pieces(state, this, Some("\n"))?;
            others(state, value, name, args)
        }
        ("replace", _) => Err(Error::new(ErrorKind::InvalidOperation, "replace takes two texts")),
        _ => others(state, value, name, args),
    }
}

fn both_texts(old: &Jinja, new: &Jinja) -> bool {
    old.as_str().is_some() && new.as_str().is_some()
}
