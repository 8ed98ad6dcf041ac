//! Published vocabularies and chat templates, with what their publishers and the reference
//! implementation make of them.
//!
//! They are large, and some are under licences of their own, so most are not in this repository:
//! these tests read them from the folder `shared` beside the checkout, or from where
//! `PHALANX_SHARED` says, and without it check only the samples in `tests/fixtures/published`.

mod specials;
mod templates;
mod tokenizers;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::tokenizer::Tokenizer;

/// A path below the folder of published data, or a loud word where there is none.
fn data(path: &str) -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let told = std::env::var_os("PHALANX_SHARED").map(PathBuf::from);
    let found = told.clone().unwrap_or_else(beside).join("data").join(path);
    if found.exists() {
        return Some(found);
    }
    assert!(told.is_none(), "PHALANX_SHARED names a folder without data/{path}");
    // Not by the macros, whose words the test runner keeps to itself.
    let _ = writeln!(std::io::stderr(), "SKIPPED: no published data beside the checkout: {path}");
    None
}

/// The text of a file of published data that must be there.
fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The published `tokenizer.json` files.
const TOKENIZERS: [&str; 5] = [
    "deepseek-v3/tokenizer.json",
    "llama2/tokenizer.json",
    "llama3.2/tokenizer.json",
    "mistral/tokenizer.v1.json",
    "mistral/tokenizer.v3.json",
];

/// A published tokenizer, as the gateway reads it; each is read once.
fn tokenizer(name: &str) -> Option<Arc<Tokenizer>> {
    static READ: [OnceLock<Arc<Tokenizer>>; 5] = [const { OnceLock::new() }; 5];
    let path = data(&format!("tokenizers/{name}"))?;
    let number = TOKENIZERS.iter().position(|known| *known == name).expect("a known name");
    let read = || {
        let json = std::fs::read(path).expect("a tokenizer");
        Arc::new(Tokenizer::new(&json).unwrap_or_else(|e| panic!("{name}: {e}")))
    };
    Some(Arc::clone(READ[number].get_or_init(read)))
}
