//! `tojson` as chat templates expect it: Python's `json.dumps` without HTML escapes.

use minijinja::value::{Kwargs, Value as Jinja, ValueKind};
use minijinja::{Error, ErrorKind, State};
use serde_json::Value;

use crate::bounded::{TEXT_LIMIT, too_much};
use crate::generators::is_generator;

/// Deepest nesting that is written.
const DEPTH: usize = 128;
/// Widest indent and longest separator.
const INDENT: usize = 16;

/// The filter. Charges by the item, as a list may hold the same large thing many times.
pub(crate) fn to_json(state: &State, value: &Jinja, options: Kwargs) -> Result<String, Error> {
    let indent = options.get::<Option<usize>>("indent")?.map(|n| n.min(INDENT));
    let separators = options.get::<Option<Vec<Jinja>>>("separators")?;
    let separators: Option<Vec<&str>> =
        separators.as_ref().map(|list| list.iter().filter_map(Jinja::as_str).collect());
    let (item, key) = match separators.as_deref() {
        Some([item, key]) if item.len().max(key.len()) <= INDENT => (*item, *key),
        Some([_, _]) => return Err(too_much()),
        _ if indent.is_some() => (",", ": "),
        _ => (", ", ": "),
    };
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let mut dump = Dump { state, out: String::new(), indent, item, key, ascii, sort };
    dump.value(value, 0)?;
    let out = dump.out;
    options.assert_all_used()?;
    Ok(out)
}

/// A JSON writer with Python's options.
struct Dump<'s, 't, 'e> {
    state: &'s State<'t, 'e>,
    out: String,
    indent: Option<usize>,
    item: &'s str,
    key: &'s str,
    ascii: bool,
    sort: bool,
}

impl Dump<'_, '_, '_> {
    fn value(&mut self, value: &Jinja, depth: usize) -> Result<(), Error> {
        self.state.consume_fuel(1)?;
        if depth > DEPTH {
            return Err(too_much());
        }
        if is_generator(value) {
            return Err(broken("a generator is no JSON"));
        }
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => self.items(value, depth),
            ValueKind::Map => self.fields(value, depth),
            _ => match value.as_str() {
                Some(text) => self.string(text),
                None => self.push(&plain(value)?),
            },
        }
    }

    fn items(&mut self, value: &Jinja, depth: usize) -> Result<(), Error> {
        self.push("[")?;
        let mut empty = true;
        for item in value.try_iter()? {
            self.begin(empty, depth)?;
            self.value(&item, depth + 1)?;
            empty = false;
        }
        self.end(empty, depth, "]")
    }

    fn fields(&mut self, value: &Jinja, depth: usize) -> Result<(), Error> {
        let mut names: Vec<(String, Jinja)> = Vec::new();
        for name in value.try_iter()? {
            self.state.consume_fuel(1)?;
            let spelled = match name.as_str() {
                Some(text) => text.to_owned(),
                None if name.as_object().is_none() => plain(&name)?,
                None => return Err(broken("a map's key is no text")),
            };
            names.push((spelled, name));
        }
        if self.sort {
            names.sort_by(|a, b| a.0.cmp(&b.0));
        }
        self.push("{")?;
        let empty = names.is_empty();
        for (i, (spelled, name)) in names.iter().enumerate() {
            self.begin(i == 0, depth)?;
            self.string(spelled)?;
            self.push(self.key)?;
            self.value(&value.get_item(name)?, depth + 1)?;
        }
        self.end(empty, depth, "}")
    }

    fn begin(&mut self, first: bool, depth: usize) -> Result<(), Error> {
        if !first {
            self.push(self.item)?;
        }
        self.line(depth + 1)
    }

    fn end(&mut self, empty: bool, depth: usize, close: &str) -> Result<(), Error> {
        if !empty {
            self.line(depth)?;
        }
        self.push(close)
    }

    fn line(&mut self, depth: usize) -> Result<(), Error> {
        let Some(indent) = self.indent else { return Ok(()) };
        self.push("\n")?;
        // At most INDENT * DEPTH spaces.
        self.push(&" ".repeat(indent * depth))
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        if text.len() > TEXT_LIMIT - self.out.len() {
            return Err(too_much());
        }
        self.out.push_str(text);
        Ok(())
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        if text.len() > TEXT_LIMIT {
            return Err(too_much());
        }
        let quoted = Value::from(text).to_string();
        if !self.ascii {
            return self.push(&quoted);
        }
        for c in quoted.chars() {
            let mut bytes = [0; 4];
            if c.is_ascii() {
                self.push(c.encode_utf8(&mut bytes))?;
                continue;
            }
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                self.push(&format!("\\u{unit:04x}"))?;
            }
        }
        Ok(())
    }
}

/// A number, a truth value, nothing; what has no place in JSON is an error.
fn plain(value: &Jinja) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|e| broken("no JSON").with_source(e))
}

fn broken(reason: &'static str) -> Error {
    Error::new(ErrorKind::BadSerialization, reason)
}
