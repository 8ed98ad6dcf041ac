//! The tokenizers of published GGUF vocabularies give the ids that their publishers list.
//!
//! The files are under licences of their own and not in this repository: they are read from the
//! folder `shared` beside the checkout, or from where `PHALANX_SHARED` says.

use std::io::Write;
use std::path::{Path, PathBuf};

use model::gguf::Gguf;

/// What stands between the texts of a list of cases.
const BETWEEN: &str = "\n__ggml_vocab_test__\n";

fn folder() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let told = std::env::var_os("PHALANX_SHARED").map(PathBuf::from);
    let found = told.clone().unwrap_or_else(beside).join("data/tokenizers/ggml-vocab");
    if found.exists() {
        return Some(found);
    }
    assert!(told.is_none(), "PHALANX_SHARED names a folder without {}", found.display());
    // Not by the macros, whose words the test runner keeps to itself.
    let _ = writeln!(std::io::stderr(), "SKIPPED: no published vocabularies beside the checkout");
    None
}

/// Texts and their ids, without what a text begins with.
fn cases(folder: &Path, vocabulary: &str) -> (Vec<String>, Vec<Vec<u32>>) {
    let file = |end: &str| {
        let path = folder.join(format!("ggml-vocab-{vocabulary}.gguf.{end}"));
        std::fs::read_to_string(path).expect("cases beside the vocabulary")
    };
    let ids = |line: &str| -> Vec<u32> {
        line.split_whitespace().map(|id| id.parse().expect("an id")).collect()
    };
    let texts: Vec<String> = file("inp").split(BETWEEN).map(str::to_owned).collect();
    let wanted: Vec<Vec<u32>> = file("out").split('\n').map(ids).take(texts.len()).collect();
    assert!(wanted.len() >= 46, "{vocabulary}: only {} cases", wanted.len());
    (texts, wanted)
}

#[test]
fn gguf_vocabularies_give_the_published_ids() {
    let Some(folder) = folder() else { return };
    // The token that texts begin with, by what the file says.
    for (vocabulary, begin) in [
        ("deepseek-coder", Some(32_013)),
        ("deepseek-llm", Some(100_000)),
        ("llama-spm", Some(1)),
        ("phi-3", Some(1)),
    ] {
        let name = format!("ggml-vocab-{vocabulary}.gguf");
        let bytes = std::fs::read(folder.join(&name)).expect("a vocabulary");
        let gguf = Gguf::parse(&name, &bytes).unwrap_or_else(|e| panic!("{e}"));
        let files = gguf.tokenizer().unwrap_or_else(|e| panic!("{e}"));
        let (texts, wanted) = cases(&folder, vocabulary);
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let got = gateway::try_tokenizer(files.tokenizer.as_bytes(), &texts);
        let got = got.unwrap_or_else(|e| panic!("{vocabulary}: {e}"));
        for ((text, got), want) in texts.iter().zip(got).zip(wanted) {
            let want: Vec<u32> = begin.into_iter().chain(want).collect();
            assert_eq!(got, want, "{vocabulary}: {text:?}");
        }
    }
}
