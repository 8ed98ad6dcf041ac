//! Configs as models of the newer families publish them; their parameter counts are public
//! knowledge.

#![allow(clippy::unwrap_used, reason = "a test may stop at once")]

use model::{
    Activation, Attention, Experts, FeedForward, Format, GroupScore, Grouped, Groups, Latent,
    ModelSpec, Pairs, Part, RopeScaling, Score, Sharding, Shared,
};

const DEEPSEEK_V2_LITE: &str = include_str!("fixtures/published/deepseek-v2-lite.json");
const DEEPSEEK_V2: &str = include_str!("fixtures/published/deepseek-v2.json");
const DEEPSEEK_V3: &str = include_str!("fixtures/published/deepseek-v3.json");
const QWEN_2_5_7B: &str = include_str!("fixtures/published/qwen2.5-7b.json");
const QWEN_1_5_MOE: &str = include_str!("fixtures/published/qwen1.5-moe-a2.7b.json");
const QWEN_3_8B: &str = include_str!("fixtures/published/qwen3-8b.json");
const QWEN_3_30B: &str = include_str!("fixtures/published/qwen3-30b-a3b.json");
const GPT_OSS_20B: &str = include_str!("fixtures/published/gpt-oss-20b.json");
const GPT_OSS_120B: &str = include_str!("fixtures/published/gpt-oss-120b.json");
const PHI_3_MINI: &str = include_str!("fixtures/published/phi-3-mini-4k.json");
const GEMMA_2_2B: &str = include_str!("fixtures/published/gemma-2-2b.json");
const GEMMA_3_1B: &str = include_str!("fixtures/published/gemma-3-1b.json");
const GRANITE_2B: &str = include_str!("fixtures/published/granite-3.0-2b.json");

fn read(config: &str) -> ModelSpec {
    ModelSpec::from_config(config).unwrap()
}

/// The config with one piece of its text replaced.
fn with(config: &str, from: &str, to: &str) -> String {
    assert!(config.contains(from), "{from}");
    config.replace(from, to)
}

fn grouped(spec: &ModelSpec, layer: usize) -> &Grouped {
    match &spec.layers[layer].attention {
        Attention::Grouped(grouped) => grouped,
        other => panic!("{other:?}"),
    }
}

fn latent(spec: &ModelSpec) -> &Latent {
    match &spec.layers[0].attention {
        Attention::Latent(latent) => latent,
        other => panic!("{other:?}"),
    }
}

fn experts(spec: &ModelSpec, layer: usize) -> &Experts {
    match &spec.layers[layer].feed_forward {
        FeedForward::Experts(experts) => experts,
        other => panic!("{other:?}"),
    }
}

/// The published totals; the active ones are those published with embedding and head added.
#[test]
fn parameter_counts() {
    let cases = [
        ("DeepSeek-V2-Lite", DEEPSEEK_V2_LITE, 15_706_484_224, 2.66e9),
        ("DeepSeek-V2", DEEPSEEK_V2, 235_741_434_880, 21.4e9),
        ("DeepSeek-V3", DEEPSEEK_V3, 671_026_419_200, 37.6e9),
        ("Qwen2.5-7B", QWEN_2_5_7B, 7_615_616_512, 7.62e9),
        ("Qwen1.5-MoE-A2.7B", QWEN_1_5_MOE, 14_315_784_192, 2.69e9),
        ("Qwen3-8B", QWEN_3_8B, 8_190_735_360, 8.19e9),
        ("Qwen3-30B-A3B", QWEN_3_30B, 30_532_122_624, 3.35e9),
        ("gpt-oss-20b", GPT_OSS_20B, 20_914_757_184, 4.19e9),
        ("gpt-oss-120b", GPT_OSS_120B, 116_829_156_672, 5.7e9),
        ("Phi-3-mini", PHI_3_MINI, 3_821_079_552, 3.82e9),
        ("gemma-2-2b", GEMMA_2_2B, 2_614_341_888, 2.61e9),
        ("gemma-3-1b", GEMMA_3_1B, 999_885_952, 1.0e9),
        ("granite-3.0-2b", GRANITE_2B, 2_533_531_648, 2.53e9),
    ];
    let mut wrong = Vec::new();
    for (name, config, total, active) in cases {
        let spec = read(config);
        let found = (spec.parameters(), spec.active_parameters());
        if found.0 != total || (found.1 as f64 / active - 1.0).abs() > 0.01 {
            wrong.push((name, found));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn granite() {
    let spec = read(GRANITE_2B);
    assert_eq!((spec.embedding_scale, spec.branch_scale), (Some(12.0), Some(0.22)));
    assert_eq!((spec.logit_scale, grouped(&spec, 0).scale), (Some(0.125), 1.0 / 64.0));
    for wrong in ["0", "-1", "\"x\"", "1e39"] {
        let config =
            with(GRANITE_2B, "\"logits_scaling\": 8.0", &format!("\"logits_scaling\": {wrong}"));
        let refused = ModelSpec::from_config(&config).unwrap_err().to_string();
        assert!(refused.contains("field `logits_scaling`"), "{refused}");
    }
}

#[test]
fn deepseek() {
    let v3 = read(DEEPSEEK_V3);
    assert_eq!(
        (v3.format, &v3.ignored_prefixes[..]),
        (Format::Fp8Blocks, &["model.layers.61.".to_owned()][..])
    );
    assert!(matches!(v3.layers[2].feed_forward, FeedForward::Dense(_)));
    let mixture = experts(&v3, 3);
    let groups = Groups { count: 8, chosen: 4, by: GroupScore::TopTwoSum };
    assert_eq!((mixture.count, mixture.chosen, mixture.width), (256, 8, 2048));
    assert_eq!(mixture.shared, Some(Shared { width: 2048, gated: false }));
    assert_eq!((mixture.router.score, mixture.router.groups), (Score::Sigmoid, Some(groups)));
    assert_eq!((mixture.router.scale, mixture.router.renormalise), (2.5, true));
    assert!(mixture.router.correction && !mixture.router.bias);
    let attention = latent(&v3);
    assert_eq!((attention.heads, attention.query_rank, attention.kv_rank), (128, Some(1536), 512));
    assert_eq!((attention.nope_dim, attention.rope_dim, attention.value_dim), (128, 64, 128));
    assert!((attention.scale - 0.135_233_8).abs() < 1e-6, "{}", attention.scale);
    assert_eq!((attention.rope.pairs, attention.rope.dims), (Pairs::Interleaved, 64));
    let yarn = RopeScaling::Yarn {
        factor: 40.0,
        original_context: 4096.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        magnitude: 1.0,
    };
    assert_eq!(attention.rope.scaling, yarn);

    let lite = read(DEEPSEEK_V2_LITE);
    assert_eq!((latent(&lite).query_rank, lite.format), (None, Format::Plain));
    assert!((latent(&lite).scale - 0.114_721_4).abs() < 1e-6, "{}", latent(&lite).scale);
    let mixture = experts(&lite, 1);
    assert_eq!(mixture.shared, Some(Shared { width: 2816, gated: false }));
    assert_eq!((mixture.router.score, mixture.router.groups), (Score::Softmax, None));
    assert_eq!((mixture.router.scale, mixture.router.renormalise), (1.0, false));
    assert!(!mixture.router.correction);

    let v2 = experts(&read(DEEPSEEK_V2), 1).router.clone();
    let groups = Groups { count: 8, chosen: 3, by: GroupScore::Max };
    assert_eq!((v2.groups, v2.scale), (Some(groups), 16.0));
}

#[test]
fn the_table_of_deepseek_v3() {
    let spec = read(DEEPSEEK_V3);
    let line = |part| {
        let tensor = spec.tensor(Some(60), part).unwrap();
        let encoded = tensor.stored.encoding != model::Encoding::Plain;
        (tensor.shape, tensor.sharding, encoded)
    };
    let cases = [
        (Part::QueryDown, vec![1536, 7168], Sharding::Replicated, true),
        (Part::QueryDownNorm, vec![1536], Sharding::Replicated, false),
        (Part::QueryUp, vec![24576, 1536], Sharding::QueryHeads, true),
        (Part::LatentDown, vec![576, 7168], Sharding::Replicated, true),
        (Part::LatentNorm, vec![512], Sharding::Replicated, false),
        (Part::LatentUp, vec![32768, 512], Sharding::QueryHeads, true),
        (Part::Output, vec![7168, 16384], Sharding::QueryHeadColumns, true),
        (Part::Router, vec![256, 7168], Sharding::Replicated, false),
        (Part::RouterCorrection, vec![256], Sharding::Replicated, false),
        (Part::ExpertDown(255), vec![7168, 2048], Sharding::WidthColumns, true),
        (Part::SharedGate, vec![2048, 7168], Sharding::Width, true),
        (Part::SharedDown, vec![7168, 2048], Sharding::WidthColumns, true),
    ];
    for (part, shape, sharding, encoded) in cases {
        assert_eq!(line(part), (shape, sharding, encoded), "{part:?}");
    }
    for absent in [Part::Query, Part::Key, Part::Gate, Part::SharedRouter, Part::RouterBias] {
        assert_eq!(spec.tensor(Some(60), absent), None);
    }
}

#[test]
fn qwen() {
    let spec = read(QWEN_2_5_7B);
    let attention = grouped(&spec, 0);
    assert!(attention.qkv_bias && !attention.out_bias && !attention.qk_norm);
    assert!((0..28).all(|layer| grouped(&spec, layer).window.is_none()));
    // Switched on, the upper layers have it.
    let on = with(QWEN_2_5_7B, r#""use_sliding_window": false"#, r#""use_sliding_window": true"#);
    let on = with(&on, r#""max_window_layers": 28"#, r#""max_window_layers": 20"#);
    let spec = read(&on);
    assert_eq!((grouped(&spec, 19).window, grouped(&spec, 20).window), (None, Some(131_072)));
    // A longer context by YaRN, as the model card says.
    let long = r#""rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768,
        "type": "yarn"}, "rope_theta""#;
    let spec = read(&with(QWEN_2_5_7B, r#""rope_theta""#, long));
    match grouped(&spec, 0).rope.scaling {
        RopeScaling::Yarn { magnitude, .. } => assert!((magnitude - 1.138_629_4).abs() < 1e-6),
        ref other => panic!("{other:?}"),
    }

    let spec = read(QWEN_1_5_MOE);
    let mixture = experts(&spec, 0);
    assert_eq!(mixture.shared, Some(Shared { width: 5632, gated: true }));
    assert_eq!((mixture.count, mixture.chosen, mixture.router.renormalise), (60, 4, false));
    let gate = spec.tensor(Some(23), Part::SharedRouter).unwrap();
    assert_eq!(gate.name, "model.layers.23.mlp.shared_expert_gate.weight");
    assert_eq!((gate.shape, gate.sharding), (vec![1, 2048], Sharding::Replicated));
    let shared = spec.tensor(Some(23), Part::SharedUp).unwrap().name;
    assert_eq!(shared, "model.layers.23.mlp.shared_expert.up_proj.weight");

    let spec = read(QWEN_3_30B);
    assert!(grouped(&spec, 0).qk_norm && !grouped(&spec, 0).qkv_bias);
    assert_eq!((experts(&spec, 47).count, experts(&spec, 47).router.renormalise), (128, true));
    let sparse = with(QWEN_3_30B, r#""decoder_sparse_step": 1"#, r#""decoder_sparse_step": 2"#);
    let sparse = with(&sparse, r#""mlp_only_layers": []"#, r#""mlp_only_layers": [3]"#);
    let layers = read(&sparse).layers;
    let is_sparse = |layer: usize| matches!(layers[layer].feed_forward, FeedForward::Experts(_));
    assert_eq!([0, 1, 2, 3, 4, 5].map(is_sparse), [false, true, false, false, false, true]);
}

#[test]
fn gpt_oss() {
    let spec = read(GPT_OSS_120B);
    let (even, odd) = (grouped(&spec, 0), grouped(&spec, 1));
    assert_eq!((even.window, odd.window), (Some(128), None));
    assert!(even.sinks && even.qkv_bias && even.out_bias && even.scale == 0.125);
    match even.rope.scaling {
        RopeScaling::Yarn { truncate, magnitude, .. } => {
            assert!(!truncate && (magnitude - 1.346_574).abs() < 1e-6);
        }
        ref other => panic!("{other:?}"),
    }
    let mixture = experts(&spec, 0);
    assert_eq!(mixture.activation, Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 });
    assert_eq!((mixture.router.score, mixture.router.bias), (Score::SoftmaxOfChosen, true));
    let up = spec.tensor(Some(35), Part::ExpertUp(127)).unwrap();
    assert_eq!(up.name, "model.layers.35.mlp.experts.gate_up_proj_blocks");
    assert_eq!(up.stored.shape, [128, 5760, 90, 16]);
    assert_eq!((up.stored.slab, up.stored.first_row, up.stored.row_step), (Some(127), 1, 2));
    // Where the list of types is absent, windows come first.
    let start = GPT_OSS_20B.find(r#""layer_types""#).unwrap();
    let end = GPT_OSS_20B[start..].find("],").unwrap() + start + 2;
    let spec = read(&[&GPT_OSS_20B[..start], &GPT_OSS_20B[end..]].concat());
    assert_eq!((grouped(&spec, 22).window, grouped(&spec, 23).window), (Some(128), None));
}

#[test]
fn phi3() {
    let spec = read(PHI_3_MINI);
    assert_eq!((grouped(&spec, 0).window, grouped(&spec, 0).head_dim), (Some(2047), 96));
    let value = spec.tensor(Some(31), Part::Value).unwrap();
    assert_eq!(value.name, "model.layers.31.self_attn.qkv_proj.weight");
    assert_eq!((value.stored.shape, value.stored.first_row), (vec![9216, 3072], 6144));
    let up = spec.tensor(Some(31), Part::Up).unwrap();
    assert_eq!((up.stored.shape, up.stored.first_row), (vec![16384, 3072], 8192));
    let long =
        r#""rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}"#;
    let error = ModelSpec::from_config(&with(PHI_3_MINI, r#""rope_scaling": null"#, long));
    assert_eq!(
        error.unwrap_err().to_string(),
        r#"field `rope_scaling.rope_type` is "longrope"; understood is default"#,
    );
}

#[test]
fn gemma() {
    let spec = read(GEMMA_2_2B);
    assert!(spec.tied && spec.norm_plus_one && spec.layers[0].post_norms);
    assert_eq!((spec.embedding_scale, spec.logit_softcap), (Some(48.0), Some(30.0)));
    let (even, odd) = (grouped(&spec, 0), grouped(&spec, 1));
    assert_eq!((even.window, odd.window), (Some(4096), None));
    assert_eq!((even.softcap, even.scale, even.qk_norm), (Some(50.0), 0.0625, false));
    let FeedForward::Dense(dense) = &spec.layers[0].feed_forward else { panic!() };
    assert_eq!(dense.activation, Activation::GeluTanh);

    let spec = read(GEMMA_3_1B);
    assert!(spec.tied && spec.norm_plus_one && spec.layers[0].post_norms);
    assert_eq!((spec.logit_softcap, spec.embedding_scale), (None, Some(1152f32.sqrt())));
    let windows: Vec<usize> =
        (0..26).filter(|&layer| grouped(&spec, layer).window.is_none()).collect();
    assert_eq!(windows, [5, 11, 17, 23]);
    let (local, global) = (grouped(&spec, 0), grouped(&spec, 5));
    assert_eq!((local.window, local.softcap, local.qk_norm), (Some(512), None, true));
    assert_eq!((local.rope.theta, global.rope.theta), (1e4, 1e6));
    // Scaling is the global rope's alone.
    let scaled = r#""rope_scaling": {"factor": 8.0, "rope_type": "linear"}"#;
    let spec = read(&with(GEMMA_3_1B, r#""rope_scaling": null"#, scaled));
    assert_eq!(grouped(&spec, 0).rope.scaling, RopeScaling::None);
    assert_eq!(grouped(&spec, 5).rope.scaling, RopeScaling::Linear { factor: 8.0 });
}
