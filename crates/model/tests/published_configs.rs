//! Configs as the well-known models publish them; their parameter counts are public knowledge.

#![allow(clippy::unwrap_used, reason = "a test may stop at once")]

use model::{Attention, FeedForward, Grouped, ModelSpec, Part, RopeScaling, Sharding};

fn grouped(spec: &ModelSpec) -> &Grouped {
    match &spec.layers[0].attention {
        Attention::Grouped(grouped) => grouped,
        other => panic!("{other:?}"),
    }
}

const LLAMA_2_7B: &str = r#"{
  "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
  "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
  "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
  "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
  "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
  "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
  "use_cache": true, "vocab_size": 32000 }"#;

const LLAMA_3_1_8B_INSTRUCT: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": { "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3" },
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 128256 }"#;

const LLAMA_3_2_1B: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu",
  "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
  "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": { "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3" },
  "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256 }"#;

const LLAMA_1_7B: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 11008, "max_position_embeddings": 2048, "max_sequence_length": 2048,
  "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
  "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": false,
  "torch_dtype": "float16", "transformers_version": "4.28.0.dev0", "use_cache": true,
  "vocab_size": 32000 }"#;

const MISTRAL_7B_V01: &str = r#"{
  "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000 }"#;

const MISTRAL_7B_V03: &str = r#"{
  "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
  "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0",
  "use_cache": true, "vocab_size": 32768 }"#;

const MIXTRAL_8X7B: &str = r#"{
  "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
  "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
  "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
  "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
  "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.36.0.dev0", "use_cache": true, "vocab_size": 32000 }"#;

/// Parameters by the table, and by a walk over all layers for the active ones.
#[test]
fn parameter_counts() {
    let cases = [
        ("Llama 1 7B", LLAMA_1_7B, 6_738_415_616, 6_738_415_616),
        ("Llama 2 7B", LLAMA_2_7B, 6_738_415_616, 6_738_415_616),
        ("Llama 3.1 8B", LLAMA_3_1_8B_INSTRUCT, 8_030_261_248, 8_030_261_248),
        ("Llama 3.2 1B", LLAMA_3_2_1B, 1_235_814_400, 1_235_814_400),
        ("Mistral 7B v0.1", MISTRAL_7B_V01, 7_241_732_096, 7_241_732_096),
        ("Mistral 7B v0.3", MISTRAL_7B_V03, 7_248_023_552, 7_248_023_552),
        ("Mixtral 8x7B", MIXTRAL_8X7B, 46_702_792_704, 12_879_925_248),
    ];
    for (name, config, total, active) in cases {
        let spec = ModelSpec::from_config(config).unwrap();
        assert_eq!((spec.parameters(), spec.active_parameters()), (total, active), "{name}");
    }
}

#[test]
fn absent_fields_take_the_class_defaults() {
    let llama = ModelSpec::from_config(LLAMA_1_7B).unwrap();
    assert_eq!((grouped(&llama).kv_heads, grouped(&llama).head_dim), (32, 128));
    assert_eq!((grouped(&llama).rope.theta, llama.norm_eps), (10_000.0, 1e-6));

    let without = |config: &str, entry: &str| {
        assert!(config.contains(entry), "{entry}");
        ModelSpec::from_config(&config.replace(entry, "")).unwrap()
    };
    let mistral = without(MISTRAL_7B_V01, r#""sliding_window": 4096,"#);
    assert_eq!(grouped(&mistral).window, Some(4096));
    let mistral = without(MISTRAL_7B_V01, r#""rope_theta": 10000.0,"#);
    assert_eq!(grouped(&mistral).rope.theta, 10_000.0);
    let mistral = without(MISTRAL_7B_V01, r#""num_key_value_heads": 8,"#);
    assert_eq!(grouped(&mistral).kv_heads, 8);
    let mixtral = without(MIXTRAL_8X7B, r#""sliding_window": null,"#);
    assert_eq!(grouped(&mixtral).window, None);
    let mixtral = without(MIXTRAL_8X7B, r#""rope_theta": 1000000.0,"#);
    assert_eq!(grouped(&mixtral).rope.theta, 1_000_000.0);
    let mixtral = without(MIXTRAL_8X7B, r#""rms_norm_eps": 1e-05,"#);
    assert_eq!(mixtral.norm_eps, 1e-5);
    let llama = without(LLAMA_2_7B, r#""rms_norm_eps": 1e-05,"#);
    assert_eq!(llama.norm_eps, 1e-6);
    let llama = without(LLAMA_2_7B, r#""bos_token_id": 1, "eos_token_id": 2,"#);
    assert_eq!((llama.bos, &llama.eos[..]), (Some(1), &[2][..]));
    let llama = without(LLAMA_2_7B, r#""architectures": ["LlamaForCausalLM"],"#);
    assert_eq!(llama.family, model::Family::Llama);
}

#[test]
fn null_means_none() {
    let with = |from: &str, to: &str| {
        assert!(MISTRAL_7B_V01.contains(from), "{from}");
        ModelSpec::from_config(&MISTRAL_7B_V01.replace(from, to)).unwrap()
    };
    let spec = with(r#""sliding_window": 4096"#, r#""sliding_window": null"#);
    assert_eq!(grouped(&spec).window, None);
    let spec = with(r#""num_key_value_heads": 8"#, r#""num_key_value_heads": null"#);
    assert_eq!(grouped(&spec).kv_heads, 32);
    let spec = with(r#""eos_token_id": 2"#, r#""eos_token_id": null, "anything": null"#);
    assert!(spec.eos.is_empty());
    let spec = with(r#""bos_token_id": 1"#, r#""bos_token_id": null"#);
    assert_eq!(spec.bos, None);
}

#[test]
fn several_tokens_end_a_sequence() {
    let mut spec = ModelSpec::from_config(LLAMA_3_1_8B_INSTRUCT).unwrap();
    assert_eq!((spec.bos, &spec.eos[..]), (Some(128_000), &[128_001, 128_008, 128_009][..]));
    spec.with_generation_config(r#"{"bos_token_id": 5, "eos_token_id": [128009, 7]}"#).unwrap();
    // The config's bos stands; ends are united.
    assert_eq!((spec.bos, &spec.eos[..]), (Some(128_000), &[128_001, 128_008, 128_009, 7][..]));

    let before = spec.clone();
    for wrong in ["", "[]", r#"{"eos_token_id": "x"}"#, r#"{"eos_token_id": [3, 128256]}"#] {
        assert!(spec.with_generation_config(wrong).is_err(), "{wrong}");
        assert_eq!(spec, before);
    }
    let sampling = r#"{"do_sample": true, "temperature": 0.6, "transformers_version": "4"}"#;
    spec.with_generation_config(sampling).unwrap();
    assert_eq!(spec, before);
}

#[test]
fn rope_in_every_spelling() {
    let rope = |scaling: &str| {
        let config = LLAMA_2_7B.replace(r#""rope_scaling": null"#, scaling);
        let spec = ModelSpec::from_config(&config).unwrap();
        grouped(&spec).rope.clone()
    };
    let linear = RopeScaling::Linear { factor: 4.0 };
    for spelling in [
        r#""rope_scaling": {"type": "linear", "factor": 4.0}"#,
        r#""rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4}"#,
        r#""rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}"#,
        r#""rope_theta": 10000, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
           "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}"#,
    ] {
        assert_eq!(rope(spelling).scaling, linear, "{spelling}");
    }
    for spelling in [
        r#""rope_theta": 7.0, "rope_scaling": {"type": "default"}"#,
        r#""rope_parameters": {"rope_theta": 7.0}"#,
        r#""rope_parameters": {"rope_theta": 7.0, "rope_type": "default",
            "partial_rotary_factor": 1.0}"#,
    ] {
        let rope = rope(spelling);
        assert_eq!((rope.theta, rope.scaling), (7.0, RopeScaling::None), "{spelling}");
    }
}

#[test]
fn biases_have_tensors() {
    let biased =
        LLAMA_2_7B.replace(r#""use_cache": true"#, r#""attention_bias": true, "mlp_bias": true"#);
    let spec = ModelSpec::from_config(&biased).unwrap();
    assert!(grouped(&spec).qkv_bias && grouped(&spec).out_bias);
    assert!(matches!(&spec.layers[0].feed_forward, FeedForward::Dense(dense) if dense.bias));
    let names: Vec<String> = spec
        .layer_tensors(31)
        .into_iter()
        .filter(|tensor| tensor.name.ends_with(".bias"))
        .map(|tensor| format!("{} {:?} {:?}", tensor.name, tensor.shape, tensor.sharding))
        .collect();
    insta::assert_snapshot!(names.join("\n"), @"
    model.layers.31.self_attn.q_proj.bias [4096] QueryHeads
    model.layers.31.self_attn.k_proj.bias [4096] KvHeads
    model.layers.31.self_attn.v_proj.bias [4096] KvHeads
    model.layers.31.self_attn.o_proj.bias [4096] Replicated
    model.layers.31.mlp.gate_proj.bias [11008] Width
    model.layers.31.mlp.up_proj.bias [11008] Width
    model.layers.31.mlp.down_proj.bias [4096] Replicated
    ");
}

#[test]
fn the_table_of_a_mixture() {
    let spec = ModelSpec::from_config(MIXTRAL_8X7B).unwrap();
    let lines: Vec<String> = spec
        .tensors()
        .into_iter()
        .filter(|tensor| tensor.layer.is_none_or(|layer| layer == 1))
        .filter(|tensor| !tensor.name.contains("experts") || tensor.name.contains("experts.7"))
        .map(|tensor| format!("{} {:?} {:?}", tensor.name, tensor.shape, tensor.sharding))
        .collect();
    insta::assert_snapshot!(lines.join("\n"), @"
    model.embed_tokens.weight [32000, 4096] Vocab
    model.layers.1.input_layernorm.weight [4096] Replicated
    model.layers.1.self_attn.q_proj.weight [4096, 4096] QueryHeads
    model.layers.1.self_attn.k_proj.weight [1024, 4096] KvHeads
    model.layers.1.self_attn.v_proj.weight [1024, 4096] KvHeads
    model.layers.1.self_attn.o_proj.weight [4096, 4096] QueryHeadColumns
    model.layers.1.post_attention_layernorm.weight [4096] Replicated
    model.layers.1.block_sparse_moe.gate.weight [8, 4096] Replicated
    model.layers.1.block_sparse_moe.experts.7.w1.weight [14336, 4096] Width
    model.layers.1.block_sparse_moe.experts.7.w3.weight [14336, 4096] Width
    model.layers.1.block_sparse_moe.experts.7.w2.weight [4096, 14336] WidthColumns
    model.norm.weight [4096] Replicated
    lm_head.weight [32000, 4096] Vocab
    ");
}

#[test]
fn lookup_agrees_with_the_table() {
    for config in [LLAMA_3_2_1B, MIXTRAL_8X7B, MISTRAL_7B_V03] {
        let spec = ModelSpec::from_config(config).unwrap();
        for tensor in spec.tensors() {
            assert_eq!(spec.tensor(tensor.layer, tensor.part), Some(tensor));
        }
        assert_eq!(spec.tensor(Some(99), Part::Query), None);
        assert_eq!(spec.tensor(None, Part::Query), None);
        assert_eq!(spec.tensor(Some(0), Part::Head), None);
        assert_eq!(spec.tensor(Some(0), Part::ExpertUp(8)), None);
        assert_eq!(spec.tensor(Some(0), Part::QueryBias), None);
        assert_eq!(spec.layer_tensors(99), []);
        let replicated = |part| spec.tensor(Some(0), part).map(|tensor| tensor.sharding);
        assert_eq!(replicated(Part::AttentionNorm), Some(Sharding::Replicated));
    }
}
