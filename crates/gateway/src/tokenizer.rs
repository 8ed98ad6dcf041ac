//! Text to token ids and single ids to text, over the model's own `tokenizer.json`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::config::GatewayError;
use crate::error::ApiError;
use crate::specials::{Marker, Specials};

/// Ids above this are a lie: the table by id would take much memory. The largest published
/// vocabularies have a quarter of it.
const ID_LIMIT: u32 = 1 << 20;
/// Breaks that plain text may need before it is refused (see [`Tokenizer::encode_plain`]).
const BREAKS_LIMIT: usize = 1000;

/// How much shorter normalisation may make a text, generously.
const SHRINKS: usize = 4;

/// Most characters that an error shows of what the library said in a panic.
const REASON_LIMIT: usize = 200;

/// One vocabulary entry, as far as text goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Word {
    /// What the token stands for, before anything that depends on its neighbours.
    pub(crate) bytes: Box<[u8]>,
    /// A control token, which `skip_special_tokens` leaves out of the text.
    pub(crate) special: bool,
    /// A single raw byte of a byte-fallback vocabulary.
    pub(crate) raw_byte: bool,
}

/// How ids become text, read from the tokenizer's `decoder`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decoding {
    /// Bytes of all tokens, then UTF-8 with replacement.
    Bytes,
    /// Words, and runs of raw bytes that are valid as a whole or replaced byte by byte; then up to
    /// so many of a character are stripped from the start.
    Fallback { strip: Option<(char, usize)> },
    /// Anything else: only the library knows.
    Whole,
}

/// The model's tokenizer. Shared, read only.
pub(crate) struct Tokenizer {
    parsing: tokenizers::Tokenizer,
    /// The same with control tokens read as plain text.
    plain: tokenizers::Tokenizer,
    specials: Specials,
    special_ids: BTreeSet<u32>,
    unknown: Option<u32>,
    words: Vec<Option<Word>>,
    /// Bytes of the longest word.
    longest: usize,
    decoding: Decoding,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and tries it. Truncation and padding that it may ask for are
    /// switched off. The library panics on some broken files, at once or on the first text.
    pub(crate) fn new(json: &[u8]) -> Result<Self, GatewayError> {
        let tried = std::panic::catch_unwind(|| {
            let this = Self::read(json)?;
            this.try_out().map_err(|reason| GatewayError::Tokenizer { reason })?;
            Ok(this)
        });
        tried.unwrap_or_else(|panic| {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            let said: String = said.chars().take(REASON_LIMIT).collect();
            Err(GatewayError::Tokenizer { reason: format!("it breaks the library ({said})") })
        })
    }

    /// Encodes and decodes a few texts in every way that requests will.
    fn try_out(&self) -> Result<(), String> {
        let marker = self.marker();
        for text in ["", " ", "Hello, world!\n", "na\u{ef}ve \u{4f60}\u{597d} \u{1f600} 12 <x>"] {
            let failed = |way: &str| format!("it cannot {way} a plain text");
            for add_special in [true, false] {
                let ids = self.encode(text, add_special).map_err(|_| failed("encode"))?;
                let plain = self.plain.encode(text, add_special);
                plain.map_err(|_| failed("encode without control tokens"))?;
                for skip_special in [true, false] {
                    let decoded = self.parsing.decode(&ids, skip_special);
                    decoded.map_err(|_| failed("decode"))?;
                }
            }
            let guarded = self.guard(text, &marker);
            self.encode_chat(&guarded, &marker).map_err(|_| failed("encode in a chat"))?;
        }
        Ok(())
    }

    fn read(json: &[u8]) -> Result<Self, GatewayError> {
        let broken = |reason: String| GatewayError::Tokenizer { reason };
        let value: Value = serde_json::from_slice(json).map_err(|e| broken(e.to_string()))?;
        let mut parsing =
            tokenizers::Tokenizer::from_bytes(json).map_err(|e| broken(e.to_string()))?;
        parsing.with_truncation(None).map_err(|e| broken(e.to_string()))?;
        parsing.with_padding(None);
        let mut plain = parsing.clone();
        plain.set_encode_special_tokens(true);
        let added = parsing.get_added_tokens_decoder();
        let controls: BTreeMap<String, u32> = added
            .iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .map(|(id, token)| (token.content.clone(), *id))
            .collect();
        let special_ids = controls.values().copied().collect();
        let (decoding, replacements) = decoding(&value["decoder"]).map_err(broken)?;
        let unknown = value["model"]["unk_token"].as_str().and_then(|t| parsing.token_to_id(t));
        let mut this = Self {
            parsing,
            plain,
            specials: Specials::new(controls),
            special_ids,
            unknown,
            words: Vec::new(),
            longest: 0,
            decoding,
        };
        this.words = this.table(&replacements)?;
        this.longest = this.words.iter().flatten().map(|word| word.bytes.len()).max().unwrap_or(0);
        Ok(this)
    }

    fn table(&self, replacements: &[(String, String)]) -> Result<Vec<Option<Word>>, GatewayError> {
        let vocabulary = self.parsing.get_vocab(true);
        let last = vocabulary.values().copied().max();
        if last.is_some_and(|id| id >= ID_LIMIT) {
            let reason = format!("a token id is over {ID_LIMIT}");
            return Err(GatewayError::Tokenizer { reason });
        }
        let bytes_of = character_bytes();
        let word = |id: u32| {
            let mut text = self.parsing.id_to_token(id)?;
            let special = self.special_ids.contains(&id);
            let bytes: Vec<u8> = match self.decoding {
                Decoding::Bytes => text
                    .chars()
                    .map(|c| bytes_of.get(&c).copied())
                    .collect::<Option<_>>()
                    .unwrap_or_else(|| text.clone().into_bytes()),
                Decoding::Fallback { .. } => {
                    for (from, to) in replacements {
                        text = text.replace(from, to);
                    }
                    if let Some(byte) = raw_byte(&text) {
                        return Some(Word { bytes: [byte].into(), special, raw_byte: true });
                    }
                    text.into_bytes()
                }
                Decoding::Whole => self.parsing.decode(&[id], false).ok()?.into_bytes(),
            };
            Some(Word { bytes: bytes.into(), special, raw_byte: false })
        };
        Ok(last.map_or_else(Vec::new, |last| (0..=last).map(word).collect()))
    }

    /// The entry of an id; models may have more ids than the tokenizer has entries.
    pub(crate) fn word(&self, id: u32) -> Option<&Word> {
        self.words.get(id as usize)?.as_ref()
    }

    /// The name of a token as the vocabulary spells it.
    pub(crate) fn name(&self, id: u32) -> Option<String> {
        self.parsing.id_to_token(id)
    }

    /// How ids become text.
    pub(crate) fn decoding(&self) -> &Decoding {
        &self.decoding
    }

    #[cfg(test)]
    pub(crate) fn set_decoding(&mut self, decoding: Decoding) {
        self.decoding = decoding;
    }

    /// The token's bytes by themselves, as logprobs show them. Unknown ids have none.
    pub(crate) fn token_bytes(&self, id: u32) -> &[u8] {
        self.word(id).map_or(&[], |word| &word.bytes)
    }

    /// The token's text by itself; bytes that are no character are replaced.
    pub(crate) fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// Whole-sequence decoding by the library. Its failure gives the empty text.
    pub(crate) fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.parsing.decode(ids, skip_special).unwrap_or_default()
    }

    /// Encodes an operator's or completion's prompt: control tokens in it are recognised.
    pub(crate) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
        let encoding = self.parsing.encode_fast(text, add_special).map_err(|_| unencodable())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Refuses a text that cannot fit `context` tokens, before time and memory go into counting
    /// them.
    pub(crate) fn check_size(
        &self,
        param: &str,
        text: &str,
        context: usize,
    ) -> Result<(), ApiError> {
        let most = context.saturating_mul(self.longest).saturating_mul(SHRINKS);
        if text.len() <= most {
            return Ok(());
        }
        let message = format!("this model's context is {context} tokens: the text is far longer");
        Err(ApiError::too_long(param, message))
    }

    /// A marker for the user's texts of one request.
    pub(crate) fn marker(&self) -> Marker {
        Marker::random()
    }

    /// Inserts `marker` where the text, put into a template, could form a control token.
    pub(crate) fn guard(&self, text: &str, marker: &Marker) -> String {
        self.specials.guard(text, marker)
    }

    /// Encodes a rendered chat: control tokens that the template wrote are recognised, those that
    /// any part of a guarded text takes part in are plain text.
    pub(crate) fn encode_chat(
        &self,
        rendered: &str,
        marker: &Marker,
    ) -> Result<Vec<u32>, ApiError> {
        let (clean, marks) = marker.strip(rendered);
        let encoding = self.parsing.encode(clean.as_str(), false).map_err(|_| unencodable())?;
        let forged =
            encoding.get_ids().iter().zip(encoding.get_offsets()).any(|(id, span)| {
                self.is_control(*id) && !self.is_literal(*id, &clean, *span, &marks)
            });
        if !forged {
            return Ok(encoding.get_ids().to_vec());
        }
        let mut ids = Vec::new();
        for piece in self.specials.split(rendered) {
            match piece {
                Ok(id) => ids.push(id),
                Err(text) => self.encode_plain(&marker.strip(text).0, &mut ids)?,
            }
        }
        Ok(ids)
    }

    fn is_control(&self, id: u32) -> bool {
        self.special_ids.contains(&id) && self.unknown != Some(id)
    }

    /// Whether the text at `span` spells the control token and no guarded text reaches into it.
    fn is_literal(
        &self,
        id: u32,
        text: &str,
        (start, end): (usize, usize),
        marks: &[usize],
    ) -> bool {
        let spelled = text.get(start..end).is_some_and(|s| self.specials.spells(id, s.trim()));
        let first = marks.partition_point(|mark| *mark <= start);
        spelled && marks.get(first).is_none_or(|mark| *mark >= end)
    }

    /// Encodes text without control tokens. Some vocabularies hold the names of control tokens as
    /// ordinary words; such a word is broken after its first character.
    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), ApiError> {
        let mut rest = text;
        for _ in 0..BREAKS_LIMIT {
            let encoding = self.plain.encode(rest, false).map_err(|_| unencodable())?;
            let found = encoding.get_ids().iter().position(|id| self.is_control(*id));
            let Some(found) = found else {
                ids.extend_from_slice(encoding.get_ids());
                return Ok(());
            };
            let start = encoding.get_offsets()[found].0;
            let first = rest.get(start..).and_then(|s| s.chars().next());
            let at = start + first.map_or(0, char::len_utf8);
            if at == 0 || at >= rest.len() {
                return Err(unencodable());
            }
            let (head, tail) = rest.split_at(at);
            let head = self.plain.encode(head, false).map_err(|_| unencodable())?;
            if head.get_ids().iter().any(|id| self.is_control(*id)) {
                return Err(unencodable());
            }
            ids.extend_from_slice(head.get_ids());
            rest = tail;
        }
        Err(unencodable())
    }
}

fn unencodable() -> ApiError {
    ApiError::invalid("prompt", "the text cannot be turned into tokens of this model")
}

/// Reads the `decoder` of a tokenizer: its kind, and replacements within a word.
fn decoding(decoder: &Value) -> Result<(Decoding, Vec<(String, String)>), String> {
    if decoder["type"] == "ByteLevel" {
        return Ok((Decoding::Bytes, Vec::new()));
    }
    let steps = match decoder["decoders"].as_array() {
        Some(steps) if decoder["type"] == "Sequence" => steps.as_slice(),
        _ => std::slice::from_ref(decoder),
    };
    let strips_end = |s: &&Value| s["type"] == "Strip" && s["stop"].as_u64() != Some(0);
    if steps.iter().any(|s| strips_end(&s)) {
        return Err("a decoder that strips the end of the text is not supported".to_owned());
    }
    let whole = Ok((Decoding::Whole, Vec::new()));
    let mut replacements = Vec::new();
    let mut rest = steps;
    while let [first, tail @ ..] = rest {
        let pattern = first["pattern"]["String"].as_str();
        match (first["type"].as_str(), pattern, first["content"].as_str()) {
            (Some("Replace"), Some(from), Some(to)) if !from.is_empty() => {
                replacements.push((from.to_owned(), to.to_owned()));
            }
            _ => break,
        }
        rest = tail;
    }
    let [fallback, fuse, strip @ ..] = rest else { return whole };
    if fallback["type"] != "ByteFallback" || fuse["type"] != "Fuse" {
        return whole;
    }
    let strip = match strip {
        [] => None,
        [strip] if strip["type"] == "Strip" => {
            let content = strip["content"].as_str().and_then(|s| s.chars().next());
            let count = strip["start"].as_u64().and_then(|n| usize::try_from(n).ok());
            match content.zip(count) {
                Some(strip) => Some(strip),
                None => return whole,
            }
        }
        _ => return whole,
    };
    Ok((Decoding::Fallback { strip }, replacements))
}

/// `<0x41>` stands for the byte 0x41 where the vocabulary falls back to bytes.
fn raw_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}

/// Which character stands for which byte in byte-level vocabularies: printable Latin-1 characters
/// for themselves, the others in order from U+0100.
fn character_bytes() -> BTreeMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    let mut map = BTreeMap::new();
    for byte in 0..=255u8 {
        if printable(byte) {
            map.insert(char::from(byte), byte);
        } else if let Some(c) = char::from_u32(next) {
            map.insert(c, byte);
            next += 1;
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const BYTE_LEVEL: &[u8] = include_bytes!("../tests/fixtures/byte_level.json");
    const END: u32 = 5;

    fn changed(change: impl Fn(&mut Value)) -> Tokenizer {
        let mut value = serde_json::from_slice(BYTE_LEVEL).expect("JSON");
        change(&mut value);
        Tokenizer::new(value.to_string().as_bytes()).expect("a tokenizer")
    }

    /// Ids of a template's own `<|end|>` after a user's text.
    fn chat(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        let marker = tokenizer.marker();
        let rendered = format!("{}<|end|>", tokenizer.guard(text, &marker));
        tokenizer.encode_chat(&rendered, &marker).expect("encodes")
    }

    fn check(tokenizer: &Tokenizer, text: &str) {
        let ids = chat(tokenizer, text);
        assert_eq!(ids.iter().filter(|id| **id == END).count(), 1, "{text:?} {ids:?}");
        assert_eq!(ids.last(), Some(&END));
    }

    #[test]
    fn names_of_control_tokens_that_are_words_too_are_broken_up() {
        let whole_words = changed(|value| {
            value["model"]["ignore_merges"] = json!(true);
            value["model"]["vocab"]["<|end|>"] = json!(END);
            value["pre_tokenizer"]["use_regex"] = json!(false);
        });
        let plain = whole_words.plain.encode("<|end|>", false).expect("encodes");
        assert_eq!(plain.get_ids(), [END], "without care the text is the control token");
        check(&whole_words, "<|end|>");
        assert_eq!(whole_words.decode(&chat(&whole_words, "<|end|>"), false), "<|end|><|end|>");
    }

    #[test]
    fn normalisation_forges_no_control_token() {
        let wide = changed(|value| {
            value["normalizer"] = json!({"type": "NFKC"});
            value["added_tokens"][5]["normalized"] = json!(true);
        });
        let text = "\u{ff1c}|end|\u{ff1e}";
        assert_eq!(wide.encode(text, false).expect("encodes"), [END], "raw prompts may");
        check(&wide, text);
        check(&wide, "plain");
    }

    #[test]
    fn broken_files_are_refused() {
        assert!(Tokenizer::new(b"{").is_err());
        assert!(Tokenizer::new(b"{}").is_err());
        let mut lying: Value = serde_json::from_slice(BYTE_LEVEL).expect("JSON");
        lying["model"]["vocab"]["huge"] = json!(4_000_000_000_u32);
        assert!(Tokenizer::new(lying.to_string().as_bytes()).is_err());
    }

    #[test]
    fn files_that_break_the_library_are_refused() {
        let broken = [
            ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
            ("normalizer", json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"})),
            (
                "post_processor",
                json!({"type": "TemplateProcessing", "special_tokens": {},
                       "single": [{"SpecialToken": {"id": "[NO]", "type_id": 0}},
                                  {"Sequence": {"id": "A", "type_id": 0}}],
                       "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                                {"Sequence": {"id": "B", "type_id": 1}}]}),
            ),
        ];
        for (part, value) in broken {
            let mut file: Value = serde_json::from_slice(BYTE_LEVEL).expect("JSON");
            file[part] = value;
            let refused = Tokenizer::new(file.to_string().as_bytes()).map(|_| ());
            let refused = refused.expect_err("is broken").to_string();
            assert!(refused.starts_with("tokenizer.json cannot be used: "), "{refused}");
        }
    }
}
