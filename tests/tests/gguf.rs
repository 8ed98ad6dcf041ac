//! GGUF files against the package that made them and the checkpoints they were made from.

#[path = "../gguf/unpack.rs"]
mod unpack;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use compute::{BlockFormat, CpuDevice, Device, Encoding, Precision, StoredType, WeightSource};
use decoder::{Checkpoint, CheckpointError};
use model::gguf::{Gguf, GgufError};
use model::{Attention, Format, GgufFormat, LatentUp, ModelSpec, Part, RopeScaling};
use tests::golden::{self, Golden};
use tests::group::{Setup, Trace, greedy, reads_its_stripes_only, run};

/// Fixtures: golden checkpoint, layers kept (at most), type of matrices.
const MODELS: [(&str, usize, &str); 15] = [
    ("llama3", ALL, "bf16"),
    ("llama-tied-f32", ALL, "f32"),
    ("mistral-window", ALL, "bf16"),
    ("mixtral", ALL, "bf16"),
    ("qwen2", ALL, "bf16"),
    // The format has no dense layers between those with experts.
    ("qwen2-moe", 1, "bf16"),
    ("qwen3", ALL, "bf16"),
    ("qwen3-moe", ALL, "bf16"),
    ("deepseek-v2", ALL, "bf16"),
    ("deepseek-v2-lite", ALL, "bf16"),
    ("deepseek-v3", ALL, "bf16"),
    ("gpt-oss-mxfp4", ALL, "bf16"),
    ("phi3", ALL, "bf16"),
    ("gemma2", ALL, "bf16"),
    ("gemma3", ALL, "bf16"),
];
const ALL: usize = usize::MAX;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("gguf")
}

fn file(name: &str, kind: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    unpack::unpacked(&root, Path::new(env!("CARGO_TARGET_TMPDIR")), name, kind)
}

/// A fixture as it is served.
fn open(path: &Path) -> (Arc<ModelSpec>, Arc<Checkpoint>) {
    let bytes = std::fs::read(path).expect("a fixture");
    let gguf = Gguf::parse("model.gguf", &bytes).expect("a GGUF file");
    let spec = gguf.spec().expect("a model");
    let checkpoint = Checkpoint::open(path, &spec).expect("a whole checkpoint");
    (Arc::new(spec), Arc::new(checkpoint))
}

/// A golden checkpoint, or the first layers of it.
fn first_layers(name: &str, layers: usize) -> (Golden, Arc<ModelSpec>, Arc<Checkpoint>) {
    let golden = golden::load(name);
    let mut spec = ModelSpec::clone(&golden.spec);
    let layers = layers.min(spec.layers.len());
    let rest = (layers..spec.layers.len()).map(|layer| format!("model.layers.{layer}."));
    spec.ignored_prefixes.extend(rest);
    spec.layers.truncate(layers);
    let checkpoint = Checkpoint::open(&golden.directory, &spec).expect("a whole checkpoint");
    (golden, Arc::new(spec), Arc::new(checkpoint))
}

fn trace(
    spec: &Arc<ModelSpec>,
    checkpoint: &Arc<Checkpoint>,
    prompt: &[u32],
    ranks: usize,
) -> Trace {
    run(spec, checkpoint, &Setup::even(ranks), &[greedy(prompt, 12)])
}

/// The spec of a checkpoint with what a GGUF file may say in its own way taken from `of`.
fn alike(spec: &ModelSpec, of: &ModelSpec) -> ModelSpec {
    let mut spec = spec.clone();
    spec.format = of.format;
    spec.norm_plus_one = of.norm_plus_one;
    spec.ignored_prefixes.clear();
    // The format has one name for three families.
    spec.family = of.family;
    for (layer, other) in spec.layers.iter_mut().zip(&of.layers) {
        match (&mut layer.attention, &other.attention) {
            (Attention::Grouped(grouped), Attention::Grouped(other)) => {
                if matches!(grouped.rope.scaling, RopeScaling::Llama3 { .. }) {
                    grouped.rope.scaling = other.rope.scaling.clone();
                }
            }
            (Attention::Latent(latent), Attention::Latent(other)) => latent.up = other.up,
            _ => {}
        }
    }
    spec
}

#[test]
fn values_of_every_block_format_are_those_of_the_package() {
    let device = CpuDevice::new(1, None).expect("a CPU device");
    for format in BlockFormat::ALL {
        let name = format!("{format:?}").replace("Mxfp4", "MXFP4");
        let path = fixtures().join("blocks").join(format!("{name}.bin"));
        let whole = std::fs::read(path).expect("a fixture");
        let (bytes, values) = whole.split_at(2048 / format.elements() * format.bytes());
        let want: Vec<u32> =
            values.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        assert_eq!(want.len(), 2048, "{name}");
        // Whole rows, a run that begins and ends within blocks, and the matrix turned over.
        for (columns, transposed) in [(0..512, false), (37..301, false), (0..4, true)] {
            let rows = if transposed { 5..300 } else { 0..4 };
            let source = WeightSource {
                encoding: Encoding::Blocks(format),
                transposed,
                ..WeightSource::plain(bytes, StoredType::F32, 512, rows.clone(), columns.clone())
            };
            let matrix = device.pack(&source, Precision::F32).expect("packed");
            let ids: Vec<Option<u32>> = (0..rows.len() as u32).map(Some).collect();
            let mut out = device.tensor(rows.len(), columns.len()).expect("a tensor");
            device.embed(&matrix, &ids, 0, &mut out).expect("read back");
            for (at, got) in device.host(&out).iter().enumerate() {
                let (row, column) = (at / columns.len(), at % columns.len() + columns.start);
                let place = match transposed {
                    false => row * 512 + column,
                    true => column * 512 + rows.start + row,
                };
                assert_eq!(got.to_bits(), want[place], "{name} at {row}, {column}");
            }
        }
    }
}

/// The number that an f16 is.
fn half(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023) / 1024.0);
    let size = match exponent {
        0 => fraction * 2f64.powi(-14),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1.0 + fraction) * 2f64.powi(exponent - 15),
    };
    if bits >> 15 == 1 { -size } else { size }
}

#[test]
fn values_of_both_plain_types_of_two_bytes() {
    // The same bytes under either type.
    let path = file("qwen3", "bf16");
    let entry = |kind: u32| {
        let mut entry = b"blk.0.attn_output.weight".to_vec();
        entry.extend(2u32.to_le_bytes());
        entry.extend([192u64, 128].iter().flat_map(|n| n.to_le_bytes()));
        entry.extend(kind.to_le_bytes());
        entry
    };
    let directory = tempfile::tempdir().expect("a directory");
    let as_f16 = directory.path().join("f16.gguf");
    std::fs::write(&as_f16, changed(&path, &entry(30), &entry(1))).expect("written");
    let bytes = std::fs::read(&path).expect("a file");
    let gguf = Gguf::parse("model.gguf", &bytes).expect("well-formed");
    let range = gguf.tensor("blk.0.attn_output.weight").expect("there").range.clone();
    let halves: Vec<u16> =
        bytes[range].chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    let bf16 = |bits: u16| f64::from(f32::from_bits(u32::from(bits) << 16));
    let device = CpuDevice::new(1, None).expect("a CPU device");
    for (path, want) in [(&path, &bf16 as &dyn Fn(u16) -> f64), (&as_f16, &half)] {
        let checkpoint = open(path).1;
        let mut tensor = checkpoint.tensor(Some(0), Part::Output).expect("there");
        let source = tensor.source(0..128, 0..192).expect("read");
        let matrix = device.pack(&source, Precision::F32).expect("packed");
        let ids: Vec<Option<u32>> = (0..128).map(Some).collect();
        let mut out = device.tensor(128, 192).expect("a tensor");
        device.embed(&matrix, &ids, 0, &mut out).expect("read back");
        for (got, bits) in device.host(&out).iter().zip(&halves) {
            let want = want(*bits);
            assert!(f64::from(*got) == want || got.is_nan() && want.is_nan(), "{bits:04x}");
        }
    }
}

#[test]
fn a_file_is_the_model_it_was_made_from() {
    for (name, layers, kind) in MODELS {
        let (_, original, _) = first_layers(name, layers);
        let (spec, _) = open(&file(name, kind));
        assert_eq!(*spec, alike(&original, &spec), "{name}");
    }
    let split = |name: &str| match &open(&file(name, "bf16")).0.layers[0].attention {
        Attention::Latent(latent) => latent.up,
        Attention::Grouped(_) => panic!("{name} has latent attention"),
    };
    assert_eq!(split("deepseek-v2-lite"), LatentUp::Joined);
    assert_eq!(split("deepseek-v3"), LatentUp::Split);
}

#[test]
fn a_file_gives_the_logits_of_the_checkpoint_it_was_made_from() {
    for (name, layers, kind) in MODELS {
        let (golden, original, checkpoint) = first_layers(name, layers);
        let (spec, gguf) = open(&file(name, kind));
        for prompt in ["unicode", "medium"] {
            let ids = &golden.prompts[prompt].ids;
            let want = trace(&original, &checkpoint, ids, 1);
            let got = trace(&spec, &gguf, ids, 3);
            assert_eq!(want.generated, got.generated, "{name}: other tokens");
            if name == "llama3" {
                // Its frequencies are stored as quotients in f32, which rounds once more.
                let pairs = want.logits.values().flatten().zip(got.logits.values().flatten());
                let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-4, "{name}: {worst}");
            } else {
                assert_eq!(want.digest(0), got.digest(0), "{name}: other bits");
            }
        }
    }
}

#[test]
fn rows_of_query_and_key_are_put_back_in_order() {
    // The same file read without that is another model.
    let (golden, ..) = first_layers("mixtral", 1);
    let (spec, gguf) = open(&file("mixtral", "bf16"));
    let mut wrong = ModelSpec::clone(&spec);
    wrong.family = model::Family::Qwen3Moe;
    let wrong = Arc::new(wrong);
    let straight = Arc::new(Checkpoint::open(&file("mixtral", "bf16"), &wrong).expect("opened"));
    let ids = &golden.prompts["medium"].ids;
    let (right, wrong) = (trace(&spec, &gguf, ids, 1), trace(&wrong, &straight, ids, 1));
    assert_ne!(right.digest(0), wrong.digest(0), "the order changes nothing");
}

#[test]
fn quantised_files_are_exact_on_any_number_of_ranks() {
    let (golden, plain, whole) = first_layers("llama3", 1);
    let path = file("llama3", "q8_0");
    let (spec, gguf) = open(&path);
    assert_eq!(spec.format, Format::Gguf(GgufFormat { block: 32 }));
    let ids = &golden.prompts["medium"].ids;
    let want = trace(&spec, &gguf, ids, 1);
    for ranks in [2, 3, 5, 8] {
        assert_eq!(want.digest(0), trace(&spec, &gguf, ids, ranks).digest(0), "{ranks} ranks");
    }
    // Eight bits are close to sixteen and not the same.
    let whole = trace(&plain, &whole, ids, 1);
    let position = ids.len() - 1;
    let pairs = want.logits[&(0, position)].iter().zip(&whole.logits[&(0, position)]);
    let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("Q8_0 moves a logit by {worst:.2e} at most");
    assert!(worst > 1e-5 && worst < 0.2, "{worst}");
}

#[test]
fn a_rank_reads_its_stripes_only() {
    for (name, kind) in [("mixtral", "bf16"), ("qwen3-moe", "bf16"), ("llama3", "q8_0")] {
        let (spec, checkpoint) = open(&file(name, kind));
        reads_its_stripes_only(&spec, &checkpoint);
    }
}

/// The metadata and tensor entries of a fixture, changed by replacing bytes of the same length.
fn changed(path: &Path, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len(), "offsets stay");
    let mut bytes = std::fs::read(path).expect("a fixture");
    let at = bytes.windows(from.len()).position(|text| text == from).expect("the text is there");
    bytes[at..at + to.len()].copy_from_slice(to);
    bytes
}

fn refused(error: GgufError, named: &[&str]) {
    let text = error.to_string();
    for part in named.iter().chain(&["model.gguf"]) {
        assert!(text.contains(part), "{part:?} is not named: {text}");
    }
}

#[test]
fn metadata_that_mean_nothing_are_refused_by_key() {
    let path = file("qwen3", "bf16");
    let spec = |bytes: &[u8]| {
        let gguf = Gguf::parse("model.gguf", bytes).expect("well-formed");
        gguf.spec().expect_err("no model")
    };
    let bytes = changed(&path, b"qwen3.rope.freq_base", b"qwen3.rope.freq_basf");
    refused(spec(&bytes), &["qwen3.rope.freq_basf", "not understood"]);
    let bytes = changed(&path, b"qwen3.embedding_length", b"qwen9.embedding_length");
    refused(spec(&bytes), &["qwen3", "hidden_size", "missing"]);
    let architecture = |name: &[u8]| {
        let mut from = b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0".to_vec();
        let mut to = from.clone();
        from.extend(b"qwen3");
        to.extend(name);
        changed(&path, &from, &to)
    };
    refused(spec(&architecture(b"mamba")), &["general.architecture", "mamba", "llama"]);
    // A number of heads that does not divide.
    let mut from = b"qwen3.attention.head_count\x04\0\0\0\x08\0\0\0".to_vec();
    let mut to = from.clone();
    (from[30], to[30]) = (8, 7);
    refused(spec(&changed(&path, &from, &to)), &["qwen3.attention.head_count", "multiple"]);
}

#[test]
fn tensors_that_do_not_fit_the_model_are_refused_by_name() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("model.gguf");
    let open = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("written");
        let gguf = Gguf::parse("model.gguf", bytes).expect("well-formed");
        let opened = Checkpoint::open(&path, &gguf.spec().expect("a model"));
        opened.err().map(|error| error.to_string()).expect("refused")
    };
    let from = file("qwen3", "bf16");
    let error = open(&changed(&from, b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"));
    assert!(error.contains("blk.0.attn_q.weight is missing"), "{error}");
    // One of the right name and another shape: the key's is the value's, rows turned to columns.
    let bytes = changed(&from, b"blk.0.attn_q_norm.weight", b"blk.0.attn_r_norm.weight");
    let error = open(&bytes);
    assert!(error.contains("blk.0.attn_q_norm.weight is missing"), "{error}");
    // A tensor more than the model has.
    let mut spec = ModelSpec::clone(&self::open(&from).0);
    spec.tied = true;
    if let Attention::Grouped(grouped) = &mut spec.layers[0].attention {
        grouped.qk_norm = false;
    }
    let error = Checkpoint::open(&from, &spec).err().expect("refused");
    assert!(matches!(error, CheckpointError::Unexpected { .. }), "{error}");
    assert!(error.to_string().contains("blk.0.attn_k_norm.weight"), "{error}");
    spec.hidden = 64;
    let error = Checkpoint::open(&from, &spec).err().expect("refused").to_string();
    assert!(error.contains("token_embd.weight") && error.contains("[512, 128]"), "{error}");
}
