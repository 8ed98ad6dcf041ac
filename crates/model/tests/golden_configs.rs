//! Configs of the golden checkpoints, as two versions of transformers wrote them.

#![allow(clippy::unwrap_used, reason = "a test may stop at once")]

use model::{
    Activation, Attention, Dense, Experts, Family, FeedForward, Format, Grouped, ModelSpec, Pairs,
    Part, Rope, RopeScaling, Router, Score,
};

fn grouped(spec: &ModelSpec) -> &Grouped {
    match &spec.layers[0].attention {
        Attention::Grouped(grouped) => grouped,
        other => panic!("{other:?}"),
    }
}

fn rope(theta: f64, dims: usize, scaling: RopeScaling) -> Rope {
    Rope { theta, dims, pairs: Pairs::Halves, scaling }
}

#[test]
fn llama3() {
    let spec = ModelSpec::from_config(include_str!("fixtures/llama3.json")).unwrap();
    assert_eq!(
        (spec.family, spec.hidden, spec.vocab, spec.context),
        (Family::Llama, 128, 512, 512)
    );
    assert_eq!((spec.norm_eps, spec.tied, spec.bos), (1e-5, false, Some(0)));
    assert_eq!((spec.layers.len(), &spec.eos[..]), (3, &[1][..]));
    assert_eq!((spec.format, &spec.ignored_prefixes[..]), (Format::Plain, &[][..]));
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 64.0,
    };
    let expected = Grouped {
        heads: 8,
        kv_heads: 4,
        head_dim: 16,
        qkv_bias: false,
        out_bias: false,
        qk_norm: false,
        sinks: false,
        softcap: None,
        scale: 0.25,
        window: None,
        rope: rope(500_000.0, 16, scaling),
    };
    assert_eq!(*grouped(&spec), expected);
    assert!(spec.layers.iter().all(|layer| *layer == spec.layers[0]));
    let dense = FeedForward::Dense(Dense { width: 256, bias: false, activation: Activation::Silu });
    assert_eq!(spec.layers[0].feed_forward, dense);
}

#[test]
fn llama_tied_in_the_newer_style() {
    let spec = ModelSpec::from_config(include_str!("fixtures/llama-tied-f32.json")).unwrap();
    assert!(spec.tied);
    assert_eq!(grouped(&spec).rope, rope(10_000.0, 16, RopeScaling::None));
    assert_eq!(spec.tensor(None, Part::Head), None);
    assert!(spec.tensors().iter().all(|tensor| tensor.part != Part::Head));
}

#[test]
fn llama_kv2_oddvocab() {
    let spec = ModelSpec::from_config(include_str!("fixtures/llama-kv2-oddvocab.json")).unwrap();
    assert_eq!((spec.vocab, grouped(&spec).kv_heads, grouped(&spec).head_dim), (509, 2, 32));
    assert_eq!(spec.tensor(None, Part::Head).map(|head| head.shape), Some(vec![509, 128]));
    // 8 heads of 32 are wider than the residual stream.
    let query = spec.tensor(Some(0), Part::Query).map(|query| query.shape);
    assert_eq!(query, Some(vec![256, 128]));
}

#[test]
fn mistral_window() {
    let spec = ModelSpec::from_config(include_str!("fixtures/mistral-window.json")).unwrap();
    assert_eq!((spec.family, grouped(&spec).window), (Family::Mistral, Some(24)));
}

#[test]
fn mixtral() {
    let spec = ModelSpec::from_config(include_str!("fixtures/mixtral.json")).unwrap();
    assert_eq!((spec.family, grouped(&spec).window), (Family::Mixtral, None));
    // `head_dim` is null: 128 / 8.
    assert_eq!((grouped(&spec).head_dim, grouped(&spec).rope.theta), (16, 1_000_000.0));
    let experts = Experts {
        count: 8,
        chosen: 2,
        width: 96,
        bias: false,
        activation: Activation::Silu,
        router: Router { renormalise: true, ..Router::plain(Score::Softmax) },
        shared: None,
    };
    assert_eq!(spec.layers[0].feed_forward, FeedForward::Experts(experts));
}

/// The older style's rope fields as one object, as newer versions write them.
fn newer(config: &str) -> String {
    let mut map: serde_json::Map<String, serde_json::Value> = serde_json::from_str(config).unwrap();
    let mut rope = match map.remove("rope_scaling") {
        Some(serde_json::Value::Object(mut rope)) => {
            if let Some(kind) = rope.remove("type") {
                rope.insert("rope_type".to_owned(), kind);
            }
            rope
        }
        _ => serde_json::Map::from_iter([("rope_type".to_owned(), "default".into())]),
    };
    rope.insert("rope_theta".to_owned(), map.remove("rope_theta").unwrap());
    map.insert("rope_parameters".to_owned(), rope.into());
    serde_json::Value::Object(map).to_string()
}

#[test]
fn both_styles_say_the_same() {
    for config in [
        include_str!("fixtures/deepseek-v2.json"),
        include_str!("fixtures/deepseek-v2-lite.json"),
        include_str!("fixtures/deepseek-v3.json"),
        include_str!("fixtures/deepseek-v3-fp8.json"),
        include_str!("fixtures/gemma2.json"),
        include_str!("fixtures/gpt-oss.json"),
        include_str!("fixtures/gpt-oss-mxfp4.json"),
        include_str!("fixtures/phi3.json"),
        include_str!("fixtures/qwen2.json"),
        include_str!("fixtures/qwen3.json"),
    ] {
        let spec = ModelSpec::from_config(config).unwrap();
        assert_eq!(ModelSpec::from_config(&newer(config)).unwrap(), spec);
    }
    // Gemma 3 has two ropes; its golden config is of the newer style.
    let config = include_str!("fixtures/gemma3.json");
    let mut map: serde_json::Map<String, serde_json::Value> = serde_json::from_str(config).unwrap();
    map.remove("rope_parameters").unwrap();
    map.insert("rope_scaling".to_owned(), serde_json::json!({"type": "linear", "factor": 8}));
    let older = serde_json::Value::Object(map.clone()).to_string();
    let spec = ModelSpec::from_config(config).unwrap();
    assert_eq!(ModelSpec::from_config(&older).unwrap(), spec);
    // The list of types wins over a pattern of its own; without it the pattern counts.
    map.remove("layer_types").unwrap();
    map.insert("_sliding_window_pattern".to_owned(), 3.into());
    let older = serde_json::Value::Object(map).to_string();
    assert_eq!(ModelSpec::from_config(&older).unwrap(), spec);
}
