//! Headers and indexes of safetensors files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use model::safetensors::{Index, parse_header};

fuzz_target!(|data: &[u8]| {
    if let Ok(header) = parse_header("model.safetensors", data) {
        for (name, info) in header.tensors() {
            assert!(info.range.start <= info.range.end && info.range.end <= data.len());
            assert!(header.get(name).is_some());
        }
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(index) = Index::parse("model.safetensors.index.json", text)
    {
        for (name, file) in index.tensors() {
            assert!(!file.contains(['/', '\\']), "a file outside of the directory");
            assert!(index.file_of(name).is_ok());
        }
    }
});
