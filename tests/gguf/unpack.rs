//! Makes a GGUF file of its delta and the golden checkpoint beside it; `make.py` says why.

use std::path::{Path, PathBuf};

/// Where a run of bytes that the delta holds itself is said to come from.
const LITERAL: u32 = u32::MAX;

/// The file of a golden checkpoint with matrices of a type, below `scratch`. `root` is the
/// repository's.
pub(crate) fn unpacked(root: &Path, scratch: &Path, golden: &str, kind: &str) -> PathBuf {
    let name = format!("{golden}-{kind}");
    let delta = std::fs::read(root.join("tests/gguf/models").join(format!("{name}.delta")));
    let delta = delta.unwrap_or_else(|e| panic!("{name}: {e}"));
    let whole = whole(&delta, &source(&root.join("tests/golden").join(golden)));
    // Tests of other processes may want it at the same time.
    let path = scratch.join(format!("{name}.gguf"));
    let own =
        scratch.join(format!("{name}.{}-{:?}", std::process::id(), std::thread::current().id()));
    std::fs::write(&own, whole).expect("written");
    std::fs::rename(own, &path).expect("renamed");
    path
}

/// The safetensors files in the order of their names, one after the other.
fn source(directory: &Path) -> Vec<u8> {
    let entries = std::fs::read_dir(directory).expect("a golden checkpoint");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.retain(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("model") && name.ends_with(".safetensors")
    });
    files.sort();
    files.iter().flat_map(|file| std::fs::read(file).expect("readable")).collect()
}

fn whole(mut delta: &[u8], source: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some((head, rest)) = delta.split_first_chunk::<8>() {
        let number =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (from, length) = (number(0), number(4) as usize);
        delta = rest;
        if from == LITERAL {
            let (literal, rest) = delta.split_at(length);
            whole.extend_from_slice(literal);
            delta = rest;
        } else {
            whole.extend_from_slice(&source[from as usize..][..length]);
        }
    }
    whole
}
