//! The tokenizer in a GGUF file's metadata, as the files that a model directory has.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json, json};

use super::pre::{self, Splits};
use super::{Gguf, GgufError, Value};
use crate::config::quote;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const KINDS: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const TEMPLATE: &str = "tokenizer.chat_template";

/// Most tokens of a vocabulary.
const TOKENS_MAX: usize = 1 << 22;
/// Bytes of the longest word that merging can make: longer ones stand for themselves, and trying
/// all their halves would take time in their square.
const WORD_MAX: usize = 512;
/// What a pair of tokens takes beside its text, in bytes, about.
const PAIR: usize = 200;
/// Most bytes that all pairs may take. Published vocabularies of 256 thousand tokens have under six
/// hundred thousand of them: half of this.
const PAIRS_MAX: usize = 256 << 20;
/// What stands for a space within words of SentencePiece vocabularies.
const SPACE: &str = "\u{2581}";

/// Kinds of tokens, by their codes.
const NORMAL: u64 = 1;
const UNKNOWN_KIND: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// What a model directory has in files of these names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerFiles {
    /// `tokenizer.json`.
    pub tokenizer: String,
    /// `tokenizer_config.json`: the texts of special tokens and the chat template.
    pub config: String,
}

/// A vocabulary.
struct Words<'a> {
    texts: Vec<&'a str>,
    kinds: Vec<u64>,
}

impl Gguf<'_> {
    /// Whether there is a tokenizer, of whatever kind.
    pub fn has_tokenizer(&self) -> bool {
        self.value(MODEL).is_some()
    }

    /// The tokenizer as a model directory has it.
    ///
    /// # Errors
    /// A kind of tokenizer that is not understood, or lists that do not fit each other; each error
    /// names the key.
    pub fn tokenizer(&self) -> Result<TokenizerFiles, GgufError> {
        let words = self.words()?;
        let kind = self.value(MODEL).and_then(Value::text);
        let (model, pieces) = match kind {
            Some("gpt2") => self.byte_pairs(&words)?,
            Some("llama") => self.sentence_pieces(&words)?,
            None => return Err(self.bad_key(MODEL, "is missing or no text")),
            Some(other) => {
                let problem = format!("is {}; understood are gpt2 and llama", quote(other));
                return Err(self.bad_key(MODEL, problem));
            }
        };
        let added = words.texts.iter().zip(&words.kinds).enumerate();
        let added =
            added.filter(|(_, (_, kind))| matches!(**kind, UNKNOWN_KIND | CONTROL | USER_DEFINED));
        let added: Vec<Json> = added
            .map(|(id, (text, kind))| {
                json!({
                    "id": id, "content": text, "special": *kind != USER_DEFINED,
                    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                })
            })
            .collect();
        let (bos, eos) = (self.special(BOS, &words)?, self.special(EOS, &words)?);
        let mut config = Map::new();
        for (name, token) in [("bos_token", bos), ("eos_token", eos)] {
            config.extend(token.map(|(_, text)| (name.to_owned(), json!(text))));
        }
        if let Some(template) = self.value(TEMPLATE) {
            let text = template.text().ok_or_else(|| self.bad_key(TEMPLATE, "is no text"))?;
            config.insert("chat_template".to_owned(), json!(text));
        }
        let begins = self.flag(ADD_BOS)?.unwrap_or(pieces.begins);
        let ends = self.flag(ADD_EOS)?.unwrap_or(false);
        if begins && bos.is_none() {
            return Err(self.bad_key(BOS, "is missing, though texts begin with it"));
        }
        if ends && eos.is_none() {
            return Err(self.bad_key(EOS, "is missing, though texts end with it"));
        }
        let around = around(bos.filter(|_| begins), eos.filter(|_| ends));
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": pieces.normalizer,
            "pre_tokenizer": pieces.pre_tokenizer,
            "post_processor": around,
            "decoder": pieces.decoder,
            "model": model,
        });
        let config = Json::Object(config).to_string();
        Ok(TokenizerFiles { tokenizer: tokenizer.to_string(), config })
    }

    fn words(&self) -> Result<Words<'_>, GgufError> {
        let list = self.value(TOKENS).and_then(Value::array);
        let list = list.ok_or_else(|| self.bad_key(TOKENS, "is missing or no array"))?;
        if list.is_empty() || list.len() > TOKENS_MAX {
            return Err(self.bad_key(TOKENS, format!("does not hold 1 to {TOKENS_MAX} tokens")));
        }
        let texts = list.texts().ok_or_else(|| self.bad_key(TOKENS, "holds what is no text"))?;
        let kinds = match self.value(KINDS) {
            None => vec![NORMAL; texts.len()],
            Some(kinds) => {
                let kinds = kinds.array().filter(|kinds| kinds.len() == texts.len());
                let kinds = kinds.and_then(|kinds| kinds.values().map(|k| k.whole()).collect());
                kinds.ok_or_else(|| self.bad_key(KINDS, "does not hold a kind for each token"))?
            }
        };
        Ok(Words { texts, kinds })
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.truth().map(Some).ok_or_else(|| self.bad_key(key, "is not true or false"))
    }

    /// The id and the text of a special token.
    fn special<'w>(
        &self,
        key: &str,
        words: &Words<'w>,
    ) -> Result<Option<(u64, &'w str)>, GgufError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let id = value.whole();
        let text = id.and_then(|id| words.texts.get(usize::try_from(id).ok()?));
        match id.zip(text) {
            Some((id, text)) => Ok(Some((id, text))),
            None => Err(self.bad_key(key, "is no token")),
        }
    }

    /// Each text once, with its id.
    fn ids<'w>(&self, words: &Words<'w>) -> Result<BTreeMap<&'w str, usize>, GgufError> {
        let mut ids = BTreeMap::new();
        for (id, text) in words.texts.iter().enumerate() {
            if let Some(first) = ids.insert(*text, id) {
                let problem = format!("has {} as {first} and as {id}", quote(text));
                return Err(self.bad_key(TOKENS, problem));
            }
        }
        Ok(ids)
    }

    /// Byte-level pairs, merged in the order of a list.
    fn byte_pairs(&self, words: &Words<'_>) -> Result<(Json, Pieces), GgufError> {
        let name = self.value(PRE).and_then(Value::text);
        let name = name.ok_or_else(|| self.bad_key(PRE, "is missing or no text"))?;
        let known = pre::NAMES.iter().find(|(known, _)| *known == name);
        let (_, splits) = known.ok_or_else(|| {
            let names: Vec<&str> = pre::NAMES.iter().map(|(known, _)| *known).collect();
            let problem = format!("is {}; understood are {}", quote(name), names.join(", "));
            self.bad_key(PRE, problem)
        })?;
        let merges = self.value(MERGES).and_then(Value::array).and_then(|list| list.texts());
        let merges =
            merges.ok_or_else(|| self.bad_key(MERGES, "is missing or no array of texts"))?;
        let mut pairs = Vec::with_capacity(merges.len());
        for merge in merges {
            // A part may begin with a space, not be one.
            let cut = merge.char_indices().skip(1).find(|(_, c)| *c == ' ');
            let halves = cut.map(|(at, _)| (&merge[..at], &merge[at + 1..]));
            let Some((left, right)) = halves.filter(|(_, right)| !right.is_empty()) else {
                return Err(self.bad_key(MERGES, format!("has {}, no pair", quote(merge))));
            };
            pairs.push(json!([left, right]));
        }
        let ids = self.ids(words)?;
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": splits.whole_words, "vocab": ids, "merges": pairs,
        });
        Ok((model, Pieces::bytes(splits)))
    }

    /// SentencePiece vocabularies: whichever pair makes the word of the highest score is merged
    /// first. That is the order of this list of pairs.
    fn sentence_pieces(&self, words: &Words<'_>) -> Result<(Json, Pieces), GgufError> {
        let scores = self.value(SCORES).and_then(Value::array);
        let scores = scores.filter(|scores| scores.len() == words.texts.len());
        let scores: Option<Vec<f64>> = scores.and_then(|scores| {
            scores
                .values()
                .map(|score| match score {
                    Value::Number(score) if !score.is_nan() => Some(score),
                    _ => None,
                })
                .collect()
        });
        let scores =
            scores.ok_or_else(|| self.bad_key(SCORES, "does not hold a number for each token"))?;
        let ids = self.ids(words)?;
        let mut made: Vec<usize> = (0..words.texts.len())
            .filter(|id| words.kinds[*id] == NORMAL && words.texts[*id].len() <= WORD_MAX)
            .collect();
        made.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
        let (mut pairs, mut bytes) = (Vec::new(), 0);
        for text in made.into_iter().map(|id| words.texts[id]) {
            let cuts = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
            let mut halves: Vec<_> = cuts
                .filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?, left, right)))
                .collect();
            // Equal in what they make: the likelier halves first.
            halves.sort_by(|a, b| {
                let worst = |(l, r, ..): &(usize, usize, &str, &str)| scores[*l].min(scores[*r]);
                worst(b).total_cmp(&worst(a)).then(a.0.cmp(&b.0))
            });
            bytes += halves.len() * (PAIR + text.len());
            if bytes > PAIRS_MAX {
                let problem = "can be put together in too many ways";
                return Err(self.bad_key(TOKENS, problem));
            }
            pairs.extend(halves.into_iter().map(|(.., left, right)| json!([left, right])));
        }
        let unknown = self.special(UNKNOWN, words)?.map(|(_, text)| text);
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": unknown,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false, "vocab": ids, "merges": pairs,
        });
        let prefix = self.flag(PREFIX)?.unwrap_or(true);
        Ok((model, Pieces::spaces(prefix)))
    }
}

/// What surrounds the model in a tokenizer.
struct Pieces {
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    begins: bool,
}

impl Pieces {
    fn bytes(splits: &Splits) -> Self {
        let mut steps: Vec<Json> = splits
            .patterns
            .iter()
            .map(|pattern| {
                json!({
                    "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated",
                    "invert": false,
                })
            })
            .collect();
        let bytes = |regex: bool| {
            json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": regex,
            })
        };
        steps.push(bytes(splits.ends_as_gpt2()));
        Self {
            normalizer: Json::Null,
            pre_tokenizer: json!({ "type": "Sequence", "pretokenizers": steps }),
            decoder: bytes(true),
            begins: splits.begins,
        }
    }

    fn spaces(prefix: bool) -> Self {
        let mut before = Vec::new();
        let mut after =
            vec![replace(SPACE, " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
        if prefix {
            before.push(json!({ "type": "Prepend", "prepend": SPACE }));
            after.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        before.push(replace(" ", SPACE));
        Self {
            normalizer: json!({ "type": "Sequence", "normalizers": before }),
            pre_tokenizer: Json::Null,
            decoder: json!({ "type": "Sequence", "decoders": after }),
            begins: true,
        }
    }
}

/// A step that puts one text for another.
fn replace(from: &str, to: &str) -> Json {
    json!({ "type": "Replace", "pattern": { "String": from }, "content": to })
}

/// What goes before and after every text.
fn around(bos: Option<(u64, &str)>, eos: Option<(u64, &str)>) -> Json {
    let mut special = Map::new();
    let mut token = |token: Option<(u64, &str)>| {
        token.map(|(id, text)| {
            let entry = json!({ "id": text, "ids": [id], "tokens": [text] });
            special.insert(text.to_owned(), entry);
            json!({ "SpecialToken": { "id": text, "type_id": 0 } })
        })
    };
    let (first, last) = (token(bos), token(eos));
    let one = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
    let list = |names: &[&str]| -> Vec<Json> {
        let texts = names.iter().map(|name| one(name));
        first.clone().into_iter().chain(texts).chain(last.clone()).collect()
    };
    let (single, pair) = (list(&["A"]), list(&["A", "B"]));
    json!({
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special,
    })
}
