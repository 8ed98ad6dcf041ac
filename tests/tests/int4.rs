//! AWQ and GPTQ checkpoints against the same weights multiplied out.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use decoder::Checkpoint;
use model::ModelSpec;
use tests::files::Files;
use tests::group::{Setup, Trace, greedy, run};

/// A packed checkpoint, and the one with its weights as f32.
const PAIRS: [(&str, &str); 5] = [
    ("awq", "plain"),
    ("gptq", "plain"),
    ("gptq-v2", "plain"),
    ("gptq-listed", "plain-listed"),
    ("gptq-one-group", "plain-one-group"),
];

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("int4").join(name)
}

fn config(name: &str) -> String {
    std::fs::read_to_string(directory(name).join("config.json")).expect("a config")
}

fn trace(path: &Path, config: &str, ranks: usize) -> Trace {
    let spec = Arc::new(ModelSpec::from_config(config).expect("a config that is understood"));
    let checkpoint = Arc::new(Checkpoint::open(path, &spec).expect("a whole checkpoint"));
    let prompt: Vec<u32> = (0..40).map(|i| i * 7 % 96).collect();
    run(&spec, &checkpoint, &Setup::even(ranks), &[greedy(&prompt, 12)])
}

#[test]
fn packed_weights_are_those_that_were_multiplied_out() {
    for (packed, plain) in PAIRS {
        let want = trace(&directory(plain), &config(plain), 1);
        let got = trace(&directory(packed), &config(packed), 1);
        let pairs = want.logits.values().flatten().zip(got.logits.values().flatten());
        let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{packed}: largest difference {worst:.2e}");
        assert!(worst <= 1e-3, "{packed}: {worst}");
        assert_eq!(want.generated, got.generated, "{packed}");
    }
}

#[test]
fn packed_weights_are_exact_on_any_number_of_ranks() {
    for (packed, _) in PAIRS {
        let want = trace(&directory(packed), &config(packed), 1);
        for ranks in [2, 3, 8] {
            let got = trace(&directory(packed), &config(packed), ranks);
            assert_eq!(want.digest(0), got.digest(0), "{packed} on {ranks} ranks");
        }
    }
}

#[test]
fn another_reading_is_noticed() {
    // Zeros that are taken for those of the other version, and groups taken in order.
    for (name, from, to) in [
        ("gptq", r#""desc_act": false"#, r#""desc_act": false, "checkpoint_format": "gptq_v2""#),
        ("gptq-v2", r#""gptq_v2""#, r#""gptq""#),
    ] {
        let changed = config(name).replace(from, to);
        assert_ne!(changed, config(name));
        let (want, got) =
            (trace(&directory(name), &config(name), 1), { trace(&directory(name), &changed, 1) });
        assert_ne!(want.digest(0), got.digest(0), "{name}");
    }
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let refused = |config: &str| ModelSpec::from_config(config).expect_err("refused").to_string();
    for (from, to, named) in [
        (r#""bits": 4"#, r#""bits": 8"#, "quantization_config.bits"),
        (r#""group_size": 32"#, r#""group_size": 12"#, "quantization_config.group_size"),
        (r#""gemm""#, r#""gemv""#, "quantization_config.version"),
        (r#""zero_point": true"#, r#""zero_point": false"#, "quantization_config.zero_point"),
        (r#""bits": 4"#, r#""bits": 4, "rotated": true"#, "quantization_config.rotated"),
    ] {
        let changed = config("awq").replace(from, to);
        assert_ne!(changed, config("awq"), "{from} is not there");
        let error = refused(&changed);
        assert!(error.contains(named), "{error}");
    }
    let marlin = r#""desc_act": false, "checkpoint_format": "marlin""#;
    let error = refused(&config("gptq").replace(r#""desc_act": false"#, marlin));
    assert!(error.contains("checkpoint_format") && error.contains("marlin"), "{error}");
}

#[test]
fn tensors_that_are_missing_or_of_another_shape_are_refused() {
    const FILE: &str = "model.safetensors";
    let open = |name: &str, from: &str, to: &str| {
        let mut files = Files::read(&directory(name));
        files.rewrite(FILE, from, to);
        let folder = tempfile::tempdir().expect("a directory");
        files.write(folder.path());
        let spec = ModelSpec::from_config(&config(name)).expect("a config");
        let opened = Checkpoint::open(folder.path(), &spec).err();
        opened.unwrap_or_else(|| panic!("{to} is taken")).to_string()
    };
    for (name, tensor) in [
        ("awq", "model.layers.1.mlp.down_proj.scales"),
        ("awq", "model.layers.1.mlp.down_proj.qzeros"),
        ("gptq-listed", "model.layers.1.mlp.down_proj.g_idx"),
        ("gptq", "model.layers.0.self_attn.q_proj.qweight"),
    ] {
        let error = open(name, tensor, &tensor.replace("layers", "lagers"));
        assert!(error.contains(tensor) && error.contains("missing"), "{error}");
    }
    let entry = |shape| {
        format!(r#""model.layers.0.mlp.up_proj.scales": {{"dtype": "F16", "shape": [{shape}]"#)
    };
    let error = open("awq", &entry("2, 128"), &entry("4, 064").replace("064", " 64"));
    assert!(error.contains("up_proj.scales") && error.contains("[4, 64]"), "{error}");
}
