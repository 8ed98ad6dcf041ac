//! GGUF files that lie about themselves: each is refused, and the message names what is wrong.

#![allow(clippy::unwrap_used, reason = "a test may stop at once")]

use model::gguf::{Gguf, TensorType};
use model::{Attention, RopeScaling};
use proptest::prelude::*;

/// Writes files, well-formed ones unless told otherwise.
#[derive(Clone, Default)]
struct Writer {
    entries: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: usize,
    counts: Option<(u64, u64)>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl Writer {
    /// A metadata entry with its type and the value's bytes.
    fn entry(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.entries.push([&text(key)[..], &kind.to_le_bytes(), value].concat());
        self
    }

    /// A tensor of some dimensions (in the file's order), type and offset.
    fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let mut entry = text(name);
        entry.extend((dims.len() as u32).to_le_bytes());
        entry.extend(dims.iter().flat_map(|n| n.to_le_bytes()));
        entry.extend(kind.to_le_bytes());
        entry.extend(offset.to_le_bytes());
        self.tensors.push(entry);
        self
    }

    fn data(mut self, bytes: usize) -> Self {
        self.data = bytes;
        self
    }

    fn write(&self) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        let real = (self.tensors.len() as u64, self.entries.len() as u64);
        let (tensors, entries) = self.counts.unwrap_or(real);
        file.extend(tensors.to_le_bytes());
        file.extend(entries.to_le_bytes());
        file.extend(self.entries.concat());
        file.extend(self.tensors.concat());
        if self.data > 0 {
            file.resize(file.len().next_multiple_of(32) + self.data, 0);
        }
        file
    }
}

fn refused(writer: &Writer, named: &[&str]) {
    let bytes = writer.write();
    let error = Gguf::parse("w.gguf", &bytes).expect_err("it lies").to_string();
    for part in named.iter().chain(&["w.gguf"]) {
        assert!(error.contains(part), "{part:?} is not named: {error}");
    }
}

fn two_tensors() -> Writer {
    Writer::default().tensor("a", &[32, 2], 0, 0).tensor("b", &[8], 0, 256).data(288)
}

#[test]
fn well_formed_files_are_read() {
    let writer = two_tensors()
        .entry("k.text", 8, &text("hello"))
        .entry(
            "k.list",
            9,
            &[&5u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[1, 0, 0, 0, 2, 0, 0, 0]].concat(),
        )
        .entry("k.small", 6, &1e-6f32.to_le_bytes());
    let bytes = writer.write();
    let gguf = Gguf::parse("w.gguf", &bytes).unwrap();
    let a = gguf.tensor("a").unwrap();
    // The file gives the innermost dimension first.
    assert_eq!((a.kind, &a.shape[..], a.range.len()), (TensorType::F32, &[2, 32][..], 256));
    assert_eq!(gguf.tensor("b").unwrap().range.start, a.range.end);
    assert_eq!(gguf.value("k.text").unwrap().text(), Some("hello"));
    let list = gguf.value("k.list").unwrap().array().unwrap();
    assert_eq!(list.values().map(|v| v.whole()).collect::<Vec<_>>(), [Some(1), Some(2)]);
    assert_eq!(gguf.value("k.small"), Some(&model::gguf::Value::Number(1e-6)));
}

/// The least that a Llama needs to have a spec.
fn llama(more: &[(&str, u32, Vec<u8>)]) -> Result<model::ModelSpec, String> {
    let count = |count: u32| (4, count.to_le_bytes().to_vec());
    let number = |number: f32| (6, number.to_le_bytes().to_vec());
    let keys = [
        ("general.architecture", (8, text("llama"))),
        ("llama.block_count", count(1)),
        ("llama.embedding_length", count(8)),
        ("llama.feed_forward_length", count(8)),
        ("llama.context_length", count(64)),
        ("llama.attention.head_count", count(2)),
        ("llama.attention.layer_norm_rms_epsilon", number(1e-5)),
    ];
    let mut writer = Writer::default().tensor("token_embd.weight", &[8, 5], 0, 0).data(160);
    for (key, (kind, value)) in &keys {
        writer = writer.entry(key, *kind, value);
    }
    for (key, kind, value) in more {
        writer = writer.entry(key, *kind, value);
    }
    let bytes = writer.write();
    let gguf = Gguf::parse("w.gguf", &bytes).unwrap();
    gguf.spec().map_err(|error| error.to_string())
}

fn scaling(spec: &model::ModelSpec) -> &RopeScaling {
    match &spec.layers[0].attention {
        Attention::Grouped(grouped) => &grouped.rope.scaling,
        Attention::Latent(_) => panic!("a Llama"),
    }
}

#[test]
fn a_rope_factor_alone_is_linear() {
    let factor = || ("llama.rope.scaling.factor", 6, 8f32.to_le_bytes().to_vec());
    assert_eq!(scaling(&llama(&[]).unwrap()), &RopeScaling::None);
    let alone = llama(&[factor()]).unwrap();
    assert_eq!(scaling(&alone), &RopeScaling::Linear { factor: 8.0 });
    let none = llama(&[factor(), ("llama.rope.scaling.type", 8, text("none"))]).unwrap();
    assert_eq!(scaling(&none), &RopeScaling::None);
}

#[test]
fn scales_of_attention_are_positive_numbers() {
    for scale in [0.0_f64, -1.0, 1e300] {
        let key = ("llama.attention.scale", 12, scale.to_le_bytes().to_vec());
        let error = llama(&[key]).unwrap_err();
        assert!(error.contains("llama.attention.scale is no positive number"), "{error}");
    }
    let spec = llama(&[("llama.attention.scale", 6, 0.5f32.to_le_bytes().to_vec())]).unwrap();
    assert!(matches!(&spec.layers[0].attention, Attention::Grouped(own) if own.scale == 0.5));
}

/// Latent attention has its scale and its rope from elsewhere.
#[test]
fn latent_attention_takes_no_scale_and_no_divisors() {
    let mut file = Writer::default().tensor("token_embd.weight", &[8, 5], 0, 0);
    for (key, value) in [
        ("block_count", 1u32),
        ("embedding_length", 8),
        ("feed_forward_length", 8),
        ("context_length", 64),
        ("attention.head_count", 2),
        ("attention.kv_lora_rank", 4),
        ("attention.key_length", 6),
        ("attention.value_length", 4),
        ("rope.dimension_count", 2),
        ("leading_dense_block_count", 1),
        ("expert_count", 2),
        ("expert_used_count", 1),
        ("expert_shared_count", 1),
        ("expert_feed_forward_length", 8),
    ] {
        file = file.entry(&format!("deepseek2.{key}"), 4, &value.to_le_bytes());
    }
    let epsilon = "deepseek2.attention.layer_norm_rms_epsilon";
    file = file.entry(epsilon, 6, &1e-6f32.to_le_bytes());
    file = file.entry("general.architecture", 8, &text("deepseek2"));
    let spec = |file: Writer| {
        let bytes = file.write();
        Gguf::parse("w.gguf", &bytes).unwrap().spec().map_err(|error| error.to_string())
    };
    assert!(spec(file.clone().data(160)).is_ok(), "{:?}", spec(file.clone().data(160)));
    let scaled = file.clone().entry("deepseek2.attention.scale", 6, &0.5f32.to_le_bytes());
    let error = spec(scaled.data(160)).unwrap_err();
    assert!(error.contains("deepseek2.attention.scale has no meaning here"), "{error}");
    let mut bytes = file.tensor("rope_freqs.weight", &[1], 0, 160).data(164).write();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&1f32.to_le_bytes());
    let error = Gguf::parse("w.gguf", &bytes).unwrap().spec().unwrap_err().to_string();
    assert!(error.contains("rope_freqs.weight has no meaning"), "{error}");
}

/// All substrings of one word: every token can be put together in as many ways as it is long.
#[test]
fn vocabularies_that_can_be_put_together_in_too_many_ways() {
    let letters: Vec<char> = ('\u{4e00}'..).take(190).collect();
    let mut words: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    for begin in 0..letters.len() {
        words.extend((begin + 1..=letters.len()).map(|end| letters[begin..end].iter().collect()));
    }
    let list = |kind: u32, values: Vec<u8>| {
        [&kind.to_le_bytes()[..], &(words.len() as u64).to_le_bytes(), &values].concat()
    };
    let kinds = (0..words.len()).flat_map(|id| [2i32, 3, 3].get(id).unwrap_or(&1).to_le_bytes());
    let scores = (0..words.len()).flat_map(|id| (-(id as f32)).to_le_bytes());
    let writer = two_tensors()
        .entry("tokenizer.ggml.model", 8, &text("llama"))
        .entry("tokenizer.ggml.tokens", 9, &list(8, words.iter().flat_map(|w| text(w)).collect()))
        .entry("tokenizer.ggml.token_type", 9, &list(5, kinds.collect()))
        .entry("tokenizer.ggml.scores", 9, &list(6, scores.collect()));
    let bytes = writer.write();
    let error = Gguf::parse("w.gguf", &bytes).unwrap().tokenizer().unwrap_err().to_string();
    assert!(words.len() < 20_000 && error.contains("in too many ways"), "{error}");
}

#[test]
fn other_formats_and_versions() {
    let message = |bytes: &[u8]| Gguf::parse("w.gguf", bytes).unwrap_err().to_string();
    assert!(message(b"").contains("does not begin"));
    assert!(message(b"GGUX\x03\0\0\0").contains("does not begin"));
    assert!(message(b"GGUF\x01\0\0\0").contains("version 1 "));
    // The other byte order.
    assert!(message(b"GGUF\0\0\0\x03").contains("version 50331648"));
    assert!(message(b"GGUF\x03\0\0\0\x01").contains("number of tensors"));
}

#[test]
fn absurd_counts_and_lengths() {
    for counts in [(u64::MAX, 0), (1 << 60, 0), (1000, 0)] {
        refused(&Writer { counts: Some(counts), ..two_tensors() }, &["tensors"]);
    }
    for counts in [(0, u64::MAX), (0, 1 << 40)] {
        refused(&Writer { counts: Some(counts), ..Writer::default() }, &["metadata entries"]);
    }
    let long = Writer::default().entry("key", 8, &u64::MAX.to_le_bytes());
    refused(&long, &["key", "longer than any"]);
    let beyond = Writer::default().entry("key", 8, &100u64.to_le_bytes());
    refused(&beyond, &["key", "does not fit"]);
    for (kind, count) in [(0u32, 1u64 << 40), (4, u64::MAX), (8, 1 << 61), (10, u64::MAX / 8 + 1)] {
        let list = [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
        refused(&Writer::default().entry("list", 9, &list), &["list", "does not fit"]);
    }
    refused(&Writer::default().tensor("t", &[1; 5], 0, 0).data(32), &["t", "5 dimensions"]);
    refused(&Writer::default().tensor("t", &[], 0, 0).data(32), &["t", "0 dimensions"]);
    refused(
        &Writer::default().tensor(&"n".repeat(300), &[8], 0, 0).data(32),
        &["name of tensor 0"],
    );
}

#[test]
fn values_that_cannot_be() {
    refused(&Writer::default().entry("key", 13, &[0; 8]), &["key", "type"]);
    refused(&Writer::default().entry("key", 7, &[2]), &["key", "truth value"]);
    let bad = [&2u64.to_le_bytes()[..], b"\xff\xfe"].concat();
    refused(&Writer::default().entry("key", 8, &bad), &["key", "UTF-8"]);
    refused(&Writer::default().entry("k", 0, &[1]).entry("k", 0, &[1]), &["k", "twice"]);
    // Arrays of arrays, as deep as the file is long.
    let mut nested = Vec::new();
    for _ in 0..10_000 {
        nested.extend(9u32.to_le_bytes());
        nested.extend(1u64.to_le_bytes());
    }
    refused(&Writer::default().entry("deep", 9, &nested), &["deep", "array of arrays"]);
    for alignment in [0u32, 3, 4, 1 << 31] {
        let writer = two_tensors().entry("general.alignment", 4, &alignment.to_le_bytes());
        refused(&writer, &["general.alignment"]);
    }
}

#[test]
fn tensors_that_cannot_be() {
    let one =
        |dims: &[u64], kind, offset| Writer::default().tensor("t", dims, kind, offset).data(64);
    refused(&one(&[16], 99, 0), &["tensor t", "type 99"]);
    refused(&one(&[256], 16, 0), &["tensor t", "IQ2_XXS"]);
    refused(&one(&[16], 8, 0), &["tensor t", "16", "Q8_0"]);
    refused(&one(&[128], 12, 0), &["tensor t", "128", "Q4_K"]);
    refused(&one(&[u64::MAX, 2], 0, 0), &["tensor t", "2^64"]);
    refused(&one(&[1 << 62, 1], 0, 0), &["tensor t", "2^64"]);
    refused(&one(&[1 << 40], 0, 0), &["tensor t", "beyond"]);
    refused(&one(&[16], 0, 8), &["tensor t", "multiple of 32"]);
    refused(&one(&[16], 0, 32), &["tensor t", "belong to none"]);
    refused(&one(&[17], 0, 0), &["tensor t", "beyond"]);
    let high = Writer::default().tensor("t", &[8], 0, u64::MAX - 31).data(32);
    refused(&high, &["tensor t"]);
    let over = Writer::default().tensor("a", &[32], 0, 0).tensor("b", &[8], 0, 32).data(128);
    refused(&over, &["tensor b", "overlaps tensor a"]);
    let twice = Writer::default().tensor("a", &[8], 0, 0).tensor("a", &[8], 0, 32).data(64);
    refused(&twice, &["tensor a", "twice"]);
    let hole = Writer::default().tensor("a", &[8], 0, 0).tensor("b", &[8], 0, 96).data(128);
    refused(&hole, &["tensor b", "belong to none"]);
}

proptest! {
    /// Any change of any file is read or refused; nothing panics, and what is read lies within.
    #[test]
    fn damaged_files_are_read_or_refused(
        cut in 0usize..400,
        changes in prop::collection::vec((0usize..400, any::<u8>()), 0..8),
    ) {
        let list = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &text("x"), &text("yz")].concat();
        let mut bytes = two_tensors()
            .entry("general.architecture", 8, &text("llama"))
            .entry("tokenizer.ggml.tokens", 9, &list)
            .entry("llama.block_count", 4, &1u32.to_le_bytes())
            .write();
        for (at, byte) in changes {
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
        }
        bytes.truncate(bytes.len().saturating_sub(cut));
        if let Ok(gguf) = Gguf::parse("w.gguf", &bytes) {
            for (_, info) in gguf.tensors() {
                prop_assert!(info.range.end <= bytes.len());
            }
            let _ = gguf.spec();
            let _ = gguf.tokenizer();
        }
    }
}
