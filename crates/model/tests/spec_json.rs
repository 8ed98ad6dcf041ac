//! A spec written as JSON comes back as it was, bit for bit; a lying one is refused, not believed.

#![allow(clippy::unwrap_used, reason = "a test may stop at once")]
#![allow(clippy::disallowed_methods, reason = "the golden configs stand in files")]

use std::path::Path;

use model::{
    Attention, FeedForward, Format, GgufFormat, Int4Format, Int4Packing, LatentUp, ModelSpec,
    RopeScaling, SpecProblem,
};
use proptest::prelude::*;
use serde_json::{Value, json};

/// The specs of all golden checkpoints and of all published configs that tests keep.
fn specs() -> Vec<(String, ModelSpec)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for entry in root.join("../../tests/golden").read_dir().unwrap() {
        files.push(entry.unwrap().path().join("config.json"));
    }
    for entry in root.join("tests/fixtures/published").read_dir().unwrap() {
        files.push(entry.unwrap().path());
    }
    files.retain(|path| path.extension().is_some_and(|kind| kind == "json") && path.exists());
    files.sort();
    let specs = files.iter().map(|path| {
        let config = std::fs::read_to_string(path).unwrap();
        (path.display().to_string(), ModelSpec::from_config(&config).unwrap())
    });
    specs.collect()
}

#[test]
fn every_golden_spec_comes_back() {
    let specs = specs();
    assert!(specs.len() > 20, "{} configs", specs.len());
    for (name, spec) in specs {
        let json = spec.to_json();
        let back = ModelSpec::from_json(&json).unwrap_or_else(|why| panic!("{name}: {why}"));
        assert_eq!(back, spec, "{name}");
        assert_eq!(back.to_json(), json, "{name}");
        assert!(json.len() < 8 << 10, "{name} takes {} bytes", json.len());
    }
}

fn golden(name: &str) -> ModelSpec {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    ModelSpec::from_config(&std::fs::read_to_string(path.join("config.json")).unwrap()).unwrap()
}

/// The same model as GGUF files and 4-bit checkpoints have it.
fn in_blocks(name: &str) -> ModelSpec {
    let mut spec = golden(name);
    let packing = Int4Packing::Gptq { zeros_less_one: true, listed: false };
    spec.format = match name {
        "phi3" => Format::Int4(Int4Format { packing, group: Some(32) }),
        _ => Format::Gguf(GgufFormat { block: 256 }),
    };
    for layer in &mut spec.layers {
        match &mut layer.attention {
            Attention::Grouped(grouped) => {
                let by = (1..=grouped.rope.dims / 2).map(|n| n as f32 / 3.0).collect();
                grouped.rope.scaling = RopeScaling::Divided { by };
            }
            Attention::Latent(latent) => latent.up = LatentUp::Split,
        }
    }
    spec
}

#[test]
fn specs_of_other_formats_come_back() {
    for name in ["llama3", "phi3", "deepseek-v3", "gpt-oss"] {
        let spec = in_blocks(name);
        assert_eq!(ModelSpec::from_json(&spec.to_json()), Ok(spec), "{name}");
    }
    // One that was written before latents could be stored in two ways.
    let spec = golden("deepseek-v3");
    let before = spec.to_json().replace(r#","up":"joined""#, "");
    assert!(before.len() < spec.to_json().len());
    assert_eq!(ModelSpec::from_json(&before), Ok(spec));
}

#[test]
fn formats_that_no_file_has_are_refused() {
    let refused = |spec: ModelSpec| ModelSpec::from_json(&spec.to_json()).unwrap_err().field;
    let mut spec = in_blocks("llama3");
    for block in [0, usize::MAX] {
        spec.format = Format::Gguf(GgufFormat { block });
        assert_eq!(refused(spec.clone()), "format");
    }
    for by in [vec![1.0; 3], vec![0.0; 8], vec![-1.0; 8]] {
        let mut spec = in_blocks("llama3");
        let Attention::Grouped(grouped) = &mut spec.layers[0].attention else { unreachable!() };
        assert_eq!(grouped.rope.dims, 16);
        grouped.rope.scaling = RopeScaling::Divided { by };
        assert_eq!(refused(spec), "rope.scaling");
    }
}

#[test]
fn scales_are_positive_numbers() {
    for wrong in [0.0, -1.0, f32::NAN] {
        let scale = Some(wrong);
        let spec = golden("granite");
        let embedding = ModelSpec { embedding_scale: scale, ..spec.clone() };
        let branch = ModelSpec { branch_scale: scale, ..spec.clone() };
        let logit = ModelSpec { logit_scale: scale, ..spec };
        let named = [embedding, branch, logit].map(|spec| spec.check().unwrap_err().field);
        assert_eq!(named, ["embedding_scale", "branch_scale", "logit_scale"]);
    }
}

proptest! {
    /// Every positive finite number, down to the subnormal ones.
    #[test]
    fn floats_keep_their_bits(
        scale in 1u32..0x7f80_0000,
        theta in 0x3ff0_0000_0000_0000u64..0x7ff0_0000_0000_0000,
    ) {
        let mut spec = golden("llama3");
        let (scale, theta) = (f32::from_bits(scale), f64::from_bits(theta));
        spec.norm_eps = scale;
        for layer in &mut spec.layers {
            let Attention::Grouped(grouped) = &mut layer.attention else { unreachable!() };
            grouped.scale = scale;
            grouped.rope.theta = theta;
            grouped.rope.scaling = RopeScaling::Linear { factor: theta };
        }
        let back = ModelSpec::from_json(&spec.to_json()).unwrap();
        let Attention::Grouped(grouped) = &back.layers[0].attention else { unreachable!() };
        prop_assert_eq!(back.norm_eps.to_bits(), scale.to_bits());
        prop_assert_eq!(grouped.scale.to_bits(), scale.to_bits());
        prop_assert_eq!(grouped.rope.theta.to_bits(), theta.to_bits());
        prop_assert_eq!(back, spec);
    }

    /// One leaf replaced by something hostile: refused, or a spec that may be asked anything.
    #[test]
    fn a_lie_is_refused_or_harmless(
        which in 0usize..17,
        leaf in any::<prop::sample::Index>(),
        lie in lie(),
    ) {
        let specs = ["llama3", "gemma2", "gemma3", "gpt-oss", "gpt-oss-mxfp4", "deepseek-v2",
            "deepseek-v2-lite", "deepseek-v3", "deepseek-v3-fp8", "mixtral", "phi3", "qwen2",
            "qwen3-moe"];
        let spec = match specs.get(which) {
            Some(name) => golden(name),
            None => in_blocks(["llama3", "phi3", "deepseek-v3", "gpt-oss"][which - specs.len()]),
        };
        let mut value: Value = serde_json::from_str(&spec.to_json()).unwrap();
        let count = leaves(&mut value).len();
        *leaves(&mut value)[leaf.index(count)] = lie;
        if let Ok(spec) = ModelSpec::from_json(&value.to_string()) {
            prop_assert_eq!(ModelSpec::from_json(&spec.to_json()), Ok(spec.clone()));
            prop_assert!(!spec.tensors().is_empty());
        }
    }

    #[test]
    fn damaged_text_is_an_error(
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<bool>(),
    ) {
        let mut bytes = golden("deepseek-v3").to_json().into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if cut {
            bytes.truncate(at);
        }
        if let Ok(text) = String::from_utf8(bytes) {
            let _ = ModelSpec::from_json(&text);
        }
    }
}

fn lie() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!(null)),
        Just(json!(true)),
        Just(json!("x")),
        Just(json!([])),
        Just(json!({})),
        Just(json!(-1)),
        Just(json!(1e300)),
        Just(json!(1e-300)),
        Just(json!(-0.0)),
        Just(json!(u64::MAX)),
        (0u64..9).prop_map(|number| json!(number)),
        (0u32..64).prop_map(|bits| json!(1u64 << bits)),
        any::<f64>().prop_map(|number| json!(number)),
    ]
}

/// Everything in a JSON value that is no object or list.
fn leaves(value: &mut Value) -> Vec<&mut Value> {
    match value {
        Value::Object(map) => map.iter_mut().flat_map(|(_, inner)| leaves(inner)).collect(),
        Value::Array(list) => list.iter_mut().flat_map(leaves).collect(),
        leaf => vec![leaf],
    }
}

#[test]
fn what_divides_or_allocates_is_checked() {
    type Spoil = fn(&mut ModelSpec);
    fn grouped(spec: &mut ModelSpec) -> &mut model::Grouped {
        match &mut spec.layers[0].attention {
            Attention::Grouped(grouped) => grouped,
            Attention::Latent(_) => unreachable!(),
        }
    }
    let cases: [(&str, SpecProblem, Spoil); 10] = [
        ("hidden", SpecProblem::OutOfRange, |s| s.hidden = 0),
        ("layers", SpecProblem::OutOfRange, |s| s.layers.clear()),
        ("bos or eos", SpecProblem::OutOfRange, |s| s.eos = vec![u32::MAX]),
        ("norm_eps", SpecProblem::NotANumber, |s| s.norm_eps = f32::NAN),
        ("kv_heads", SpecProblem::OutOfRange, |s| grouped(s).kv_heads = 0),
        ("heads", SpecProblem::Uneven, |s| grouped(s).kv_heads = 3),
        ("heads", SpecProblem::OutOfRange, |s| grouped(s).head_dim = 1 << 16),
        ("rope.dims", SpecProblem::Uneven, |s| grouped(s).rope.dims = 5),
        ("window", SpecProblem::OutOfRange, |s| grouped(s).window = Some(0)),
        ("spec", SpecProblem::TooBig, |s| {
            let FeedForward::Dense(dense) = &mut s.layers[0].feed_forward else { unreachable!() };
            dense.width = 1 << 24;
            s.hidden = 1 << 24;
        }),
    ];
    let mut spoilt = golden("llama3");
    grouped(&mut spoilt).heads = 1 << 12;
    assert_eq!(spoilt.check(), Ok(()));
    for (field, problem, spoil) in cases {
        let mut spec = golden("llama3");
        if field == "heads" && problem == SpecProblem::OutOfRange {
            grouped(&mut spec).heads = 1 << 12;
        }
        spoil(&mut spec);
        let why = spec.check().unwrap_err();
        assert_eq!((why.field, why.problem), (field, problem));
        // What the writer did not check the reader refuses.
        ModelSpec::from_json(&spec.to_json()).unwrap_err();
    }
    let long = format!("{}{}", " ".repeat(ModelSpec::JSON_MAX), golden("llama3").to_json());
    assert_eq!(ModelSpec::from_json(&long).unwrap_err().problem, SpecProblem::NotASpec);
}
