//! A request body as named fields, each taken once, so that nothing is ignored by accident and
//! every refusal names its field.

use std::cell::RefCell;
use std::fmt;
use std::ops::RangeInclusive;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::error::Category;
use serde_json::{Map, Value};

use crate::error::ApiError;

/// One prompt of a completions request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// The fields not taken yet.
#[derive(Debug)]
pub(crate) struct Fields {
    map: Map<String, Value>,
    prompts: Option<Vec<Prompt>>,
}

impl Fields {
    /// Parses a body. `batch`: most prompts in a list.
    pub(crate) fn parse(body: &[u8], batch: usize) -> Result<Self, ApiError> {
        let place = RefCell::new(Place::default());
        let mut json = serde_json::Deserializer::from_slice(body);
        let parsed = BodySeed { batch, place: &place }
            .deserialize(&mut json)
            .and_then(|fields| json.end().map(|()| fields));
        parsed.map_err(|error| {
            let Place { field, note } = place.into_inner();
            match (error.classify(), note, field) {
                (Category::Data, Some(note), Some(field)) => ApiError::invalid(&field, note),
                (Category::Data, _, Some(field)) if field == "prompt" => {
                    ApiError::invalid(&field, PROMPT_SHAPE)
                }
                (Category::Data, ..) => {
                    ApiError::malformed("the body must be a JSON object".to_owned(), None)
                }
                // Only syntax is described, with line and column: no text of the body.
                (.., field) => ApiError::malformed(format!("malformed JSON: {error}"), field),
            }
        })
    }

    /// A field's value; null is as good as absent.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// The completions prompts.
    pub(crate) fn prompts(&mut self) -> Result<Vec<Prompt>, ApiError> {
        match self.prompts.take() {
            None => Err(ApiError::missing("prompt")),
            Some(prompts) if prompts.is_empty() => {
                Err(ApiError::invalid("prompt", "the prompt is empty"))
            }
            Some(prompts) => Ok(prompts),
        }
    }

    /// Whether a prompt was given.
    pub(crate) fn has_prompt(&self) -> bool {
        self.prompts.is_some()
    }

    pub(crate) fn number(
        &mut self,
        name: &str,
        range: RangeInclusive<f32>,
    ) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_f64().map(as_f32);
        match number.filter(|n| range.contains(n)) {
            Some(number) => Ok(Some(number)),
            None => {
                let (from, to) = range.into_inner();
                let message = format!("'{name}' must be a number from {from} to {to}");
                Err(ApiError::invalid(name, message))
            }
        }
    }

    pub(crate) fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_i64().filter(|n| range.contains(n)) {
            Some(number) => Ok(Some(number)),
            None => {
                let (from, to) = range.into_inner();
                let message = format!("'{name}' must be an integer from {from} to {to}");
                Err(ApiError::invalid(name, message))
            }
        }
    }

    /// A count, from `least` to `most`.
    pub(crate) fn count(
        &mut self,
        name: &str,
        least: usize,
        most: usize,
    ) -> Result<Option<usize>, ApiError> {
        let bound = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let found = self.integer(name, bound(least)..=bound(most))?;
        Ok(found.and_then(|n| usize::try_from(n).ok()))
    }

    pub(crate) fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(_) => Err(ApiError::invalid(name, format!("'{name}' must be true or false"))),
        }
    }

    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(ApiError::invalid(name, format!("'{name}' must be a string"))),
        }
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(_) => Err(ApiError::invalid(name, format!("'{name}' must be an object"))),
        }
    }

    pub(crate) fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(_) => Err(ApiError::invalid(name, format!("'{name}' must be a list"))),
        }
    }

    /// A list of at most `most` token ids below `vocab`.
    pub(crate) fn ids(
        &mut self,
        name: &str,
        most: usize,
        vocab: usize,
    ) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(list) = self.list(name)? else { return Ok(None) };
        if list.len() > most {
            let message = format!("'{name}' may hold at most {most} ids");
            return Err(ApiError::invalid(name, message));
        }
        let id = |value: &Value| value.as_u64().and_then(|id| known_id(id, vocab));
        match list.iter().map(id).collect() {
            Some(ids) => Ok(Some(ids)),
            None => {
                let message = format!("'{name}' must hold token ids below {vocab}");
                Err(ApiError::invalid(name, message))
            }
        }
    }

    /// Takes fields that may be sent and change no answer.
    pub(crate) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.map.remove(*name);
        }
    }

    /// Takes fields that this server does not act on; refuses one that would change an answer.
    /// Empty values, false and the value in `neutral` would not.
    pub(crate) fn refuse(&mut self, names: &[&str], neutral: &Value) -> Result<(), ApiError> {
        for name in names {
            let Some(value) = self.take(name) else { continue };
            let idle = match &value {
                Value::Bool(flag) => !flag,
                Value::String(text) => text.is_empty(),
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                _ => false,
            };
            if !idle && value != *neutral {
                return Err(ApiError::unsupported(name));
            }
        }
        Ok(())
    }

    /// Refuses what nobody took. An ignored field would give another answer than was asked for.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        match self.map.iter().find(|(_, value)| !value.is_null()) {
            Some((name, _)) => Err(ApiError::unknown_field(name)),
            None if self.prompts.is_some() => Err(ApiError::unknown_field("prompt")),
            None => Ok(()),
        }
    }
}

/// A token id, where it is below `vocab`.
pub(crate) fn known_id(id: u64, vocab: usize) -> Option<u32> {
    u32::try_from(id).ok().filter(|id| usize::try_from(*id).is_ok_and(|id| id < vocab))
}

#[expect(clippy::cast_possible_truncation, reason = "parameters are f32 from here on")]
fn as_f32(number: f64) -> f32 {
    number as f32
}

const PROMPT_SHAPE: &str =
    "'prompt' must be a string, a list of strings, a list of token ids or a list of such lists";

/// Where the parser is, for the refusal.
#[derive(Default)]
struct Place {
    field: Option<String>,
    note: Option<String>,
}

struct BodySeed<'a> {
    batch: usize,
    place: &'a RefCell<Place>,
}

impl<'de> DeserializeSeed<'de> for BodySeed<'_> {
    type Value = Fields;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Fields, D::Error> {
        input.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for BodySeed<'_> {
    type Value = Fields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Fields, A::Error> {
        let mut fields = Fields { map: Map::new(), prompts: None };
        let mut null_prompt = false;
        while let Some(key) = access.next_key::<String>()? {
            self.place.borrow_mut().field = Some(key.clone());
            let twice = fields.map.contains_key(&key)
                || (key == "prompt" && (null_prompt || fields.prompts.is_some()));
            if twice {
                self.place.borrow_mut().note = Some("the field is given twice".to_owned());
                return Err(A::Error::custom("twice"));
            }
            if key == "prompt" {
                let seed = PromptSeed { batch: self.batch, place: self.place };
                fields.prompts = access.next_value_seed(seed)?;
                null_prompt = fields.prompts.is_none();
            } else {
                fields.map.insert(key, access.next_value()?);
            }
            self.place.borrow_mut().field = None;
        }
        Ok(fields)
    }
}

/// Reads prompts into typed lists: a list of a million ids never exists as JSON values.
struct PromptSeed<'a> {
    batch: usize,
    place: &'a RefCell<Place>,
}

impl<'de> DeserializeSeed<'de> for PromptSeed<'_> {
    type Value = Option<Vec<Prompt>>;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Self::Value, D::Error> {
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for PromptSeed<'_> {
    type Value = Option<Vec<Prompt>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a prompt")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Some(vec![Prompt::Text(text.to_owned())]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let (mut prompts, mut ids) = (Vec::new(), Vec::new());
        while let Some(item) = access.next_element_seed(ItemSeed { nested: false })? {
            match item {
                Item::Id(id) => ids.push(id),
                Item::Prompt(prompt) if prompts.len() < self.batch => prompts.push(prompt),
                Item::Prompt(_) => {
                    let note = format!("at most {} prompts are taken at once", self.batch);
                    self.place.borrow_mut().note = Some(note);
                    return Err(A::Error::custom("batch"));
                }
            }
            if !ids.is_empty() && !prompts.is_empty() {
                return Err(A::Error::custom("mixed"));
            }
        }
        if !ids.is_empty() {
            prompts.push(Prompt::Ids(ids));
        }
        Ok(Some(prompts))
    }
}

enum Item {
    Id(u32),
    Prompt(Prompt),
}

struct ItemSeed {
    nested: bool,
}

impl<'de> DeserializeSeed<'de> for ItemSeed {
    type Value = Item;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Item, D::Error> {
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ItemSeed {
    type Value = Item;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a token id or a list of token ids")
    }

    fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<Item, E> {
        u32::try_from(id).map(Item::Id).map_err(|_| E::custom("id"))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Item, E> {
        if self.nested {
            return Err(E::custom("text in a list of ids"));
        }
        Ok(Item::Prompt(Prompt::Text(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Item, A::Error> {
        if self.nested {
            return Err(A::Error::custom("depth"));
        }
        let mut ids = Vec::new();
        while let Some(item) = access.next_element_seed(ItemSeed { nested: true })? {
            match item {
                Item::Id(id) => ids.push(id),
                Item::Prompt(_) => return Err(A::Error::custom("depth")),
            }
        }
        Ok(Item::Prompt(Prompt::Ids(ids)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(json: &str) -> Result<Vec<Prompt>, ApiError> {
        Fields::parse(format!("{{\"prompt\": {json}}}").as_bytes(), 3)?.prompts()
    }

    #[test]
    fn prompts_in_all_shapes() {
        let text = |t: &str| Prompt::Text(t.to_owned());
        assert_eq!(prompts("\"a\""), Ok(vec![text("a")]));
        assert_eq!(prompts("[\"a\", \"b\"]"), Ok(vec![text("a"), text("b")]));
        assert_eq!(prompts("[1, 2]"), Ok(vec![Prompt::Ids(vec![1, 2])]));
        let two = vec![Prompt::Ids(vec![1]), Prompt::Ids(vec![2, 3])];
        assert_eq!(prompts("[[1], [2, 3]]"), Ok(two));
        for bad in
            ["1", "[1, \"a\"]", "[[\"secret\"]]", "[-1]", "[1.5]", "[4294967296]", "[[[1]]]", "{}"]
        {
            let error = prompts(bad).expect_err(bad);
            assert_eq!((error.param.as_deref(), error.code), (Some("prompt"), "invalid_value"));
            assert_eq!(error.message, PROMPT_SHAPE);
        }
        assert!(prompts("[\"a\",\"b\",\"c\",\"d\"]").expect_err("four").message.contains("most 3"));
        assert_eq!(prompts("[]").expect_err("empty").message, "the prompt is empty");
        assert_eq!(prompts("null").expect_err("absent").code, "missing_required_parameter");
    }

    #[test]
    fn syntax_errors_name_the_field_they_are_in() {
        let error = |body: &str| Fields::parse(body.as_bytes(), 3).expect_err(body);
        assert_eq!(error("{\"temperature\": NaN}").param.as_deref(), Some("temperature"));
        assert_eq!(error("{\"top_p\": 1e999}").param.as_deref(), Some("top_p"));
        assert_eq!(error("{\"a\": 1, \"a\": 2}").message, "the field is given twice");
        for body in ["", "[]", "{", "{\"a\": 1} x", "\u{0}", "7"] {
            let error = error(body);
            assert_eq!((error.status.as_u16(), error.code), (400, "invalid_json"), "{body}");
        }
        let deep = format!("{{\"a\": {}1}}", "[".repeat(4000));
        assert_eq!(error(&deep).code, "invalid_json");
    }
}
