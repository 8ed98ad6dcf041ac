//! GGUF files: the header, the model that it describes, and its tokenizer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use model::gguf::Gguf;

fuzz_target!(|data: &[u8]| {
    let Ok(gguf) = Gguf::parse("model.gguf", data) else { return };
    let mut ranges = Vec::new();
    for (name, info) in gguf.tensors() {
        assert!(info.range.start <= info.range.end && info.range.end <= data.len());
        assert!(gguf.tensor(name).is_some());
        let blocks = info.shape.iter().product::<usize>() / info.kind.block();
        assert_eq!(blocks * info.kind.block_bytes(), info.range.len());
        ranges.push((info.range.start, info.range.end));
    }
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|two| two[0].1 <= two[1].0), "tensors overlap");
    if let Ok(spec) = gguf.spec() {
        // What a file says is no less checked than what a peer says.
        assert_eq!(spec.check(), Ok(()));
        assert!(spec.tensors().len() > 1);
    }
    if let Ok(files) = gguf.tokenizer() {
        let json: serde_json::Value = serde_json::from_str(&files.tokenizer).expect("JSON");
        assert!(json["model"]["vocab"].is_object());
    }
});
