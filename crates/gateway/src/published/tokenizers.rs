//! Published tokenizers give the ids that their publishers list, and ids become text one at a time
//! as they do all at once.

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use serde_json::Value;

use super::{TOKENIZERS, data, text, tokenizer};
use crate::detokenizer::Detokenizer;
use crate::tokenizer::Tokenizer;

/// What stands between the texts of a list of cases.
const BETWEEN: &str = "\n__ggml_vocab_test__\n";

/// Texts and their ids, as llama.cpp publishes them for a vocabulary.
fn cases(folder: &Path, vocabulary: &str) -> Vec<(String, Vec<u32>)> {
    let file = |end: &str| text(&folder.join(format!("ggml-vocab-{vocabulary}.gguf.{end}")));
    let ids = |line: &str| -> Vec<u32> {
        line.split_whitespace().map(|id| id.parse().expect("an id")).collect()
    };
    let (texts, lines) = (file("inp"), file("out"));
    let cases: Vec<_> =
        texts.split(BETWEEN).map(str::to_owned).zip(lines.split('\n').map(ids)).collect();
    assert!(cases.len() >= 46, "{vocabulary}: only {} cases", cases.len());
    cases
}

/// Every published case of a vocabulary, against a tokenizer made for it.
fn agrees(tokenizer: &Tokenizer, folder: &Path, vocabulary: &str) {
    for (text, want) in cases(folder, vocabulary) {
        let got = tokenizer.encode(&text, false).expect("encodes");
        assert_eq!(got, want, "{vocabulary}: {text:?}");
    }
}

#[test]
fn llama_vocabularies_give_the_published_ids() {
    let Some(folder) = data("tokenizers/ggml-vocab") else { return };
    for (file, vocabulary) in
        [("llama2/tokenizer.json", "llama-spm"), ("llama3.2/tokenizer.json", "llama-bpe")]
    {
        let tokenizer = tokenizer(file).expect("beside the cases");
        agrees(&tokenizer, &folder, vocabulary);
    }
}

/// The ids of a published conversation, of its text between control tokens, and of its template.
struct Sample {
    name: String,
    version: &'static str,
    ids: Vec<u32>,
    /// As the vocabulary spells the tokens.
    spelled: String,
}

fn samples(folder: &Path) -> Vec<Sample> {
    let mut found = Vec::new();
    let mut folders: Vec<_> =
        std::fs::read_dir(folder).expect("samples").map(|e| e.expect("an entry").path()).collect();
    folders.sort();
    for folder in folders {
        for version in ["v1", "v2", "v3"] {
            let ids = folder.join(format!("tokens_{version}.json"));
            if !ids.exists() {
                continue;
            }
            let ids: Value = serde_json::from_str(&text(&ids)).expect("JSON");
            let ids = ids["tokens"].as_array().expect("a list").iter();
            found.push(Sample {
                name: folder.file_name().expect("a name").to_string_lossy().into_owned(),
                version,
                ids: ids.map(|id| id.as_u64().expect("an id") as u32).collect(),
                spelled: text(&folder.join(format!("text_{version}.txt"))),
            });
        }
    }
    found
}

/// The vocabulary puts a space before every text between control tokens, as its published texts
/// show; so one is taken away before.
fn ids_of_spelled(tokenizer: &Tokenizer, spelled: &str) -> Vec<u32> {
    let plain = spelled.replace("<0x0A>", "\n").replace('\u{2581}', " ");
    let marker = tokenizer.marker();
    let mut joined = String::new();
    let mut rest = plain.as_str();
    while !rest.is_empty() {
        let at = |name: &str| rest.find(name).map(|at| (at, name.len()));
        let names = ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]"];
        let others = ["[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"];
        let known = names.into_iter().chain(others);
        let known = known.filter(|name| tokenizer.encode(name, false).is_ok_and(|i| i.len() == 1));
        let (at, length) = known.filter_map(at).min().unwrap_or((rest.len(), 0));
        joined.push_str(rest[..at].strip_prefix(' ').unwrap_or(&rest[..at]));
        joined.push_str(&rest[at..at + length]);
        rest = &rest[at + length..];
    }
    tokenizer.encode_chat(&joined, &marker).expect("encodes")
}

#[test]
fn mistral_vocabularies_give_the_published_ids() {
    let Some(folder) = data("tokenizers/mistral/samples") else { return };
    let samples = samples(&folder);
    assert!(samples.len() >= 13, "only {} samples", samples.len());
    let [first, third] = ["v1", "v3"]
        .map(|v| tokenizer(&format!("mistral/tokenizer.{v}.json")).expect("beside the samples"));
    for sample in samples {
        let tokenizer = if sample.version == "v1" { &first } else { &third };
        let place = format!("{} {}", sample.name, sample.version);
        assert_eq!(ids_of_spelled(tokenizer, &sample.spelled), sample.ids, "{place}");
        let words = sample.ids.iter().map(|id| tokenizer.name(*id).expect("a word"));
        let spelled = words.collect::<String>().replace("<0x0A>", "\n");
        let want = sample.spelled.replace(' ', "\u{2581}").replace("<0x0A>", "\n");
        assert_eq!(spelled, want, "{place}");
    }
}

fn pieces(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), skip);
    let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
    pieces.push(detokenizer.finish());
    pieces
}

/// Ids of texts, of any words, and of words of few bytes, which are cut within characters.
fn any_ids(tokenizer: &Arc<Tokenizer>) -> impl Strategy<Value = Vec<u32>> + use<> {
    let last = (0u32..1 << 20).take_while(|id| *id < 256 || tokenizer.name(*id).is_some()).last();
    let last = last.unwrap_or(0);
    let of_text = Arc::clone(tokenizer);
    let text = "[a-z \u{e9}\u{65e5}\u{1f642}\u{301}\r\n\t0-9<|>]{0,30}";
    let from_text = text.prop_map(move |text| of_text.encode(&text, false).expect("encodes"));
    let any = prop::collection::vec(0..last + 3, 0..12);
    let short = prop::collection::vec(0u32..300, 0..12);
    prop::collection::vec(prop_oneof![from_text, any, short], 0..5).prop_map(|v| v.concat())
}

#[test]
fn ids_become_the_same_text_one_at_a_time() {
    for name in TOKENIZERS {
        let Some(tokenizer) = tokenizer(name) else { return };
        let mut runner = TestRunner::new(Config::with_cases(400));
        let cases = (any_ids(&tokenizer), any::<bool>());
        let result = runner.run(&cases, |(ids, skip)| {
            let pieces = pieces(&tokenizer, &ids, skip);
            let whole = tokenizer.decode(&ids, skip);
            prop_assert_eq!(pieces.concat(), whole);
            Ok::<_, TestCaseError>(())
        });
        result.unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn texts_come_back_as_they_were_and_no_character_is_cut() {
    let texts = "[a-zA-Z \u{e9}\u{df}\u{65e5}\u{672c}\u{1f642}\u{200d}\u{301}0-9.,'\"\r\n\t]{1,60}";
    for name in TOKENIZERS {
        let Some(tokenizer) = tokenizer(name) else { return };
        let mut runner = TestRunner::new(Config::with_cases(200));
        let result = runner.run(&(texts,), |(text,)| {
            let ids = tokenizer.encode(&text, false).expect("encodes");
            let pieces = pieces(&tokenizer, &ids, true);
            prop_assert!(pieces.iter().all(|p| !p.contains(char::REPLACEMENT_CHARACTER)));
            prop_assert_eq!(pieces.concat(), text);
            Ok::<_, TestCaseError>(())
        });
        result.unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}
