//! Stored forms: what is fused, scaled or not to be read, and checkpoints that lie about it.

use std::sync::Arc;

use decoder::{Checkpoint, CheckpointError};
use model::{Attention, FeedForward, Format, ModelSpec};
use tempfile::TempDir;
use tests::files::Files;
use tests::golden::{self, Golden};
use tests::group::{Setup, greedy, run};

const FILE: &str = "model.safetensors";

/// A golden checkpoint whose header says something else.
fn rewritten(name: &str, from: &str, to: &str) -> TempDir {
    let mut files = Files::read(&golden::directory(name));
    files.rewrite(FILE, from, to);
    let directory = tempfile::tempdir().expect("a directory");
    files.write(directory.path());
    directory
}

/// Opening must fail and name all of `named`.
fn refused(opened: Result<Checkpoint, CheckpointError>, named: &[&str]) {
    let error = opened.err().map(|error| error.to_string());
    let error = error.unwrap_or_else(|| panic!("taken, though it should name {named:?}"));
    for part in named {
        assert!(error.contains(part), "{part:?} is not named: {error}");
    }
}

#[test]
fn scales_that_are_missing_or_of_another_shape_are_refused() {
    let cases = [
        ("deepseek-v3-fp8", "layers.1.self_attn.kv_b_proj.weight_scale_inv"),
        ("gpt-oss-mxfp4", "layers.1.mlp.experts.gate_up_proj_scales"),
        ("gpt-oss-mxfp4", "layers.0.mlp.experts.down_proj_blocks"),
    ];
    for (name, tensor) in cases {
        let directory = rewritten(name, tensor, &tensor.replace("layers", "lagers"));
        let spec = &golden::load(name).spec;
        refused(Checkpoint::open(directory.path(), spec), &[tensor, "missing"]);
    }
    let tensor = "model.layers.0.self_attn.kv_b_proj.weight_scale_inv";
    let header = format!("\"{tensor}\":{{\"dtype\":\"F32\",\"shape\":[");
    let directory =
        rewritten("deepseek-v3-fp8", &format!("{header}3,1]"), &format!("{header}1,3]"));
    let spec = &golden::load("deepseek-v3-fp8").spec;
    refused(Checkpoint::open(directory.path(), spec), &[FILE, tensor, "[1, 3]", "[3, 1]"]);
}

#[test]
fn types_that_an_encoding_does_not_have_are_refused() {
    let tensor = "model.layers.0.mlp.down_proj.weight_scale_inv";
    let header = |dtype| format!("\"{tensor}\":{{\"dtype\":\"{dtype}\"");
    let directory = rewritten("deepseek-v3-fp8", &header("F32"), &header("I32"));
    let spec = &golden::load("deepseek-v3-fp8").spec;
    refused(Checkpoint::open(directory.path(), spec), &[FILE, tensor, "I32", "F32"]);

    let tensor = "model.layers.0.mlp.experts.down_proj_scales";
    let header = |dtype| format!("\"{tensor}\":{{\"dtype\":\"{dtype}\"");
    let directory = rewritten("gpt-oss-mxfp4", &header("U8"), &header("I8"));
    let spec = &golden::load("gpt-oss-mxfp4").spec;
    refused(Checkpoint::open(directory.path(), spec), &[FILE, tensor, "I8", "U8"]);

    // FP8 where the config does not say so.
    let mut spec = ModelSpec::clone(&golden::load("deepseek-v3-fp8").spec);
    spec.format = Format::Plain;
    refused(Checkpoint::open(&golden::directory("deepseek-v3-fp8"), &spec), &["F8_E4M3"]);
}

#[test]
fn layers_outside_the_plain_path_are_ignored_only_where_the_spec_says_so() {
    let golden = golden::load("deepseek-v3");
    let mut spec = ModelSpec::clone(&golden.spec);
    assert!(!spec.ignored_prefixes.is_empty());
    spec.ignored_prefixes.clear();
    refused(Checkpoint::open(&golden.directory, &spec), &["model.layers.3.", "no place"]);
}

#[test]
fn fused_tensors_of_another_shape_are_refused() {
    let mut spec = ModelSpec::clone(&golden::load("phi3").spec);
    for layer in &mut spec.layers {
        if let Attention::Grouped(attention) = &mut layer.attention {
            attention.kv_heads = 2;
        }
    }
    let tensor = "model.layers.0.self_attn.qkv_proj.weight";
    let opened = Checkpoint::open(&golden::directory("phi3"), &spec);
    refused(opened, &[FILE, tensor, "[256, 128]", "[192, 128]"]);
}

/// A digest over all logits of a short prompt.
fn digest(golden: &Golden, spec: ModelSpec, checkpoint: Checkpoint) -> String {
    let request = greedy(&golden.prompts["unicode"].ids, 4);
    let (spec, checkpoint) = (Arc::new(spec), Arc::new(checkpoint));
    run(&spec, &checkpoint, &Setup::even(2), &[request]).digest(0)
}

#[test]
fn plain_tensors_in_an_fp8_checkpoint_are_taken_as_they_are() {
    let golden = golden::load("deepseek-v3");
    let spec = ModelSpec::clone(&golden.spec);
    let mixed = ModelSpec { format: Format::Fp8Blocks, ..spec.clone() };
    let open = |spec: &ModelSpec| Checkpoint::open(&golden.directory, spec).expect("a checkpoint");
    let (plain, scaled) = (open(&spec), open(&mixed));
    assert_eq!(digest(&golden, spec, plain), digest(&golden, mixed, scaled));
}

/// `deepseek-v2-lite` with a gate for its shared experts: one bf16 for every weight of it.
fn with_shared_gate(golden: &Golden, weight: u16, halve: bool) -> (ModelSpec, Checkpoint) {
    let mut spec = ModelSpec::clone(&golden.spec);
    let mut files = Files::read(&golden.directory);
    let mut gates = serde_json::Map::new();
    let mut index = serde_json::Map::new();
    let bytes = 2 * spec.hidden;
    for (number, layer) in spec.layers.iter_mut().enumerate() {
        let FeedForward::Experts(experts) = &mut layer.feed_forward else { continue };
        let shared = experts.shared.as_mut().expect("shared experts");
        shared.gated = !halve;
        if halve {
            let down = format!("model.layers.{number}.mlp.shared_experts.down_proj.weight");
            for element in files.tensor(&down).chunks_exact_mut(2) {
                // One less in the exponent of a bf16 that is not tiny.
                let bits = u16::from_le_bytes([element[0], element[1]]);
                let half = if bits & 0x7f80 > 0x0080 { bits - 0x0080 } else { 0 };
                element.copy_from_slice(&half.to_le_bytes());
            }
        } else {
            let name = format!("model.layers.{number}.mlp.shared_expert_gate.weight");
            let start = gates.len() * bytes;
            let entry = serde_json::json!({
                "dtype": "BF16", "shape": [1, spec.hidden], "data_offsets": [start, start + bytes]
            });
            gates.insert(name.clone(), entry);
            index.insert(name, "model-gates.safetensors".into());
        }
    }
    let header = model::safetensors::parse_header(FILE, &files.0[FILE]).expect("a header");
    index.extend(header.tensors().map(|(name, _)| (name.to_owned(), FILE.into())));
    let body = weight.to_le_bytes().repeat(gates.len() * bytes / 2);
    let text = serde_json::Value::Object(gates).to_string();
    let file = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &body].concat();
    if !halve {
        files.0.insert("model-gates.safetensors".to_owned(), file);
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": index }).to_string();
    files.0.insert("model.safetensors.index.json".to_owned(), index.into_bytes());
    let directory = tempfile::tempdir().expect("a directory");
    files.write(directory.path());
    let checkpoint = Checkpoint::open(directory.path(), &spec).expect("a checkpoint");
    (spec, checkpoint)
}

#[test]
fn a_gate_of_zeros_halves_what_shared_experts_give() {
    let golden = golden::load("deepseek-v2-lite");
    let of = |(spec, checkpoint)| digest(&golden, spec, checkpoint);
    let halved = of(with_shared_gate(&golden, 0, true));
    assert_eq!(of(with_shared_gate(&golden, 0, false)), halved, "sigmoid(0) is one half");
    // 0.5 in bf16.
    assert_ne!(of(with_shared_gate(&golden, 0x3f00, false)), halved, "the gate changes nothing");
}

#[test]
fn a_tied_head_that_is_another_matrix_is_refused_and_a_copy_is_not() {
    let mut spec = ModelSpec::clone(&golden::load("llama3").spec);
    spec.tied = true;
    let whole = std::fs::read(golden::directory("llama3").join(FILE)).expect("weights");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join(FILE);
    std::fs::write(&path, &whole).expect("written");
    refused(Checkpoint::open(directory.path(), &spec), &[FILE, "lm_head.weight", "ties"]);

    let header = model::safetensors::parse_header(FILE, &whole).expect("a header");
    let range = |tensor: &str| header.get(tensor).expect("a tensor").range.clone();
    let mut copy = whole.clone();
    copy.copy_within(range("model.embed_tokens.weight"), range("lm_head.weight").start);
    std::fs::write(&path, &copy).expect("written");
    assert!(Checkpoint::open(directory.path(), &spec).is_ok());
}
