//! Reads the keys of one architecture, remembering which were read and what they became.

use std::collections::BTreeSet;

use serde_json::{Map, Value as Json};

use super::{Gguf, GgufError, Value};
use crate::config::ConfigError;

/// Most ids that end a sequence.
const IDS_MAX: usize = 64;

/// The keys of an architecture and the config they amount to so far.
pub(super) struct Keys<'g, 'a> {
    gguf: &'g Gguf<'a>,
    prefix: String,
    read: BTreeSet<String>,
    config: Map<String, Json>,
    /// Of a config's field: the key.
    origins: Vec<(&'static str, String)>,
}

impl<'g, 'a> Keys<'g, 'a> {
    pub(super) fn new(gguf: &'g Gguf<'a>, arch: &str) -> Self {
        let prefix = format!("{arch}.");
        Self { gguf, prefix, read: BTreeSet::new(), config: Map::new(), origins: Vec::new() }
    }

    pub(super) fn gguf(&self) -> &'g Gguf<'a> {
        self.gguf
    }

    /// The whole key.
    pub(super) fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// A value by the end of its key. An array of equal numbers, one for each layer, is the
    /// number.
    pub(super) fn value(&mut self, key: &str) -> Option<Value<'a>> {
        let path = self.path(key);
        let value = self.gguf.value(&path).copied();
        self.read.insert(path);
        value
    }

    fn typed<T>(
        &mut self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => match read(&value) {
                Some(read) => Ok(Some(read)),
                None => Err(self.gguf.bad_key(&self.path(key), format!("is not {expected}"))),
            },
        }
    }

    /// A whole number.
    pub(super) fn count(&mut self, key: &str) -> Result<Option<usize>, GgufError> {
        self.typed(key, "a whole number", |value| {
            same(value).and_then(|value| usize::try_from(value.whole()?).ok())
        })
    }

    /// A number.
    pub(super) fn number(&mut self, key: &str) -> Result<Option<f64>, GgufError> {
        self.typed(key, "a number", |value| match value {
            Value::Number(number) if number.is_finite() => Some(*number),
            Value::Whole(number) => Some(*number as f64),
            _ => None,
        })
    }

    /// A truth value.
    pub(super) fn truth(&mut self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "true or false", Value::truth)
    }

    /// A text.
    pub(super) fn text(&mut self, key: &str) -> Result<Option<&'a str>, GgufError> {
        self.typed(key, "a text", Value::text)
    }

    /// A factor that only has a meaning here where it is 1.
    pub(super) fn only_one(&mut self, key: &str) -> Result<(), GgufError> {
        match self.number(key)? {
            None | Some(1.0) => Ok(()),
            Some(_) => Err(self.gguf.bad_key(&self.path(key), "is understood only where it is 1")),
        }
    }

    /// A key whose value changes nothing.
    pub(super) fn without_effect(&mut self, key: &str) {
        self.value(key);
    }

    /// Puts a value where the config has it.
    pub(super) fn copy(&mut self, key: &str, field: &'static str) -> Result<(), GgufError> {
        let json =
            self.typed(key, "a number, or the same one for every layer", |value| {
                match same(value)? {
                    Value::Whole(number) => {
                        let number = i64::try_from(number).map(Json::from);
                        number.ok()
                    }
                    Value::Number(number) => serde_json::Number::from_f64(number).map(Json::Number),
                    _ => None,
                }
            })?;
        if let Some(json) = json {
            self.set(field, json);
            self.came_from(field, key);
        }
        Ok(())
    }

    /// Sets a field.
    pub(super) fn set(&mut self, field: &'static str, value: Json) {
        self.config.insert(field.to_owned(), value);
    }

    /// Sets a field as another one, where it is not set.
    pub(super) fn copy_default(&mut self, from: &str, to: &'static str) {
        if !self.config.contains_key(to)
            && let Some(value) = self.config.get(from).cloned()
        {
            self.set(to, value);
        }
    }

    /// Sets a field of an object that is set.
    pub(super) fn amend(&mut self, object: &str, field: &str, value: Json) {
        if let Some(Json::Object(map)) = self.config.get_mut(object) {
            map.insert(field.to_owned(), value);
        }
    }

    /// What is known of a field.
    pub(super) fn known(&self, field: &str) -> Option<&Json> {
        self.config.get(field)
    }

    /// Takes a field out again.
    pub(super) fn take(&mut self, field: &str) -> Option<Json> {
        self.config.remove(field)
    }

    /// Remembers which key a field came from, for errors.
    pub(super) fn came_from(&mut self, field: &'static str, key: &str) {
        let path = self.path(key);
        self.origins.push((field, path));
    }

    /// A token id as a field, null where there is none, and further ones in its list.
    pub(super) fn ids(
        &mut self,
        key: &str,
        field: &'static str,
        further: &[&str],
    ) -> Result<(), GgufError> {
        let mut ids = Vec::new();
        for key in std::iter::once(&key).chain(further) {
            let Some(value) = self.gguf.value(key) else { continue };
            let id = value.whole().filter(|id| u32::try_from(*id).is_ok());
            let id = id.ok_or_else(|| self.gguf.bad_key(key, "is no token id"))?;
            if !ids.contains(&id) && ids.len() < IDS_MAX {
                ids.push(id);
            }
        }
        let json = if ids.is_empty() { Json::Null } else { Json::from(ids) };
        self.config.insert(field.to_owned(), json);
        self.origins.push((field, key.to_owned()));
        Ok(())
    }

    /// The config, if nothing of the architecture is left over.
    ///
    /// # Errors
    /// A key that was not read: it might change results.
    pub(super) fn finish(&mut self) -> Result<Map<String, Json>, GgufError> {
        let own = |key: &&&str| key.starts_with(&self.prefix);
        match self.gguf.metadata.keys().filter(own).find(|key| !self.read.contains(**key)) {
            Some(key) => Err(self.gguf.bad_key(key, "is not understood")),
            None => Ok(std::mem::take(&mut self.config)),
        }
    }

    /// An error about a config's field as one about the key that it came from.
    pub(super) fn translate(&self, source: ConfigError) -> GgufError {
        let field = source.field().unwrap_or_default();
        let field = field.split('.').next().unwrap_or_default();
        let origin = self.origins.iter().rev().find(|(known, _)| *known == field);
        let key = origin.map_or_else(|| self.path("*"), |(_, key)| key.clone());
        GgufError::Config { file: self.gguf.file.clone(), key, source: Box::new(source) }
    }
}

/// The value, or the one that an array repeats.
fn same<'a>(value: &Value<'a>) -> Option<Value<'a>> {
    let Some(list) = value.array() else { return Some(*value) };
    let mut values = list.values();
    let first = values.next()?;
    values.all(|other| other == first).then_some(first)
}
