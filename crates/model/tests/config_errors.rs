//! Everything a config can get wrong is refused by the field's name.

#![allow(clippy::unwrap_used, reason = "a test may stop at once")]

use model::{ConfigError, ModelSpec};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const LLAMA: &str = include_str!("fixtures/llama3.json");
const MISTRAL: &str = include_str!("fixtures/mistral-window.json");
const MIXTRAL: &str = include_str!("fixtures/mixtral.json");

/// One of every way to read a config.
const CONFIGS: [&str; 16] = [
    LLAMA,
    MISTRAL,
    MIXTRAL,
    include_str!("fixtures/deepseek-v2.json"),
    include_str!("fixtures/deepseek-v2-lite.json"),
    include_str!("fixtures/deepseek-v3-fp8.json"),
    include_str!("fixtures/gemma2.json"),
    include_str!("fixtures/gemma3.json"),
    include_str!("fixtures/gpt-oss-mxfp4.json"),
    include_str!("fixtures/granite.json"),
    include_str!("fixtures/phi3.json"),
    include_str!("fixtures/qwen2.json"),
    include_str!("fixtures/published/qwen1.5-moe-a2.7b.json"),
    include_str!("fixtures/qwen2-moe.json"),
    include_str!("fixtures/qwen3.json"),
    include_str!("fixtures/qwen3-moe.json"),
];

/// The config with some fields set, or removed where the value is the string "absent".
fn changed(config: &str, changes: Value) -> String {
    let mut map: Map<String, Value> = serde_json::from_str(config).unwrap();
    for (field, value) in changes.as_object().unwrap() {
        if value == "absent" {
            map.remove(field).unwrap();
        } else {
            map.insert(field.clone(), value.clone());
        }
    }
    Value::Object(map).to_string()
}

fn refused(config: &str, changes: Value) -> ConfigError {
    ModelSpec::from_config(&changed(config, changes.clone()))
        .expect_err(&format!("accepted {changes}"))
}

/// All messages, one per case, as a reader would see them.
fn messages(config: &str, cases: &[Value]) -> String {
    let lines = cases.iter().map(|changes| {
        let message = refused(config, changes.clone()).to_string();
        // The families that are understood are not what these cases are about.
        message.split("; understood are ").next().unwrap_or_default().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn text_that_is_no_config() {
    let refused = |text: &str| ModelSpec::from_config(text).unwrap_err();
    assert!(matches!(refused(""), ConfigError::NotJson { .. }));
    assert!(matches!(refused("{"), ConfigError::NotJson { .. }));
    assert!(matches!(refused(r#"{"rms_norm_eps": NaN}"#), ConfigError::NotJson { .. }));
    assert!(matches!(refused(r#"{"rope_theta": 1e999}"#), ConfigError::NotJson { .. }));
    assert!(matches!(refused(&"[".repeat(100_000)), ConfigError::NotJson { .. }));
    assert_eq!(refused("[]"), ConfigError::NotAnObject { found: "a list" });
    assert!(matches!(refused(&" ".repeat((4 << 20) + 1)), ConfigError::TooLarge { .. }));
    assert_eq!(refused("{}"), ConfigError::Missing { field: "architectures".to_owned() });
}

#[test]
fn architectures() {
    let cases = [
        json!({"architectures": ["GPT2LMHeadModel"]}),
        json!({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}),
        json!({"architectures": "LlamaForCausalLM"}),
        json!({"architectures": [7]}),
        json!({"architectures": "absent", "model_type": "gpt2"}),
        json!({"architectures": "absent", "model_type": "absent"}),
        json!({"architectures": [], "model_type": 3}),
        json!({"architectures": ["MistralForCausalLM"]}),
        json!({"model_type": "gemma"}),
    ];
    insta::assert_snapshot!(messages(LLAMA, &cases), @"
    architecture GPT2LMHeadModel is not understood
    architecture [\"LlamaForCausalLM\",\"MistralForCausalLM\"] is not understood
    field `architectures` is a string, expected a list of names
    field `architectures` is a whole number, expected a list of names
    architecture gpt2 is not understood
    field `architectures` is missing
    field `model_type` is a whole number, expected a string
    fields `architectures` and `model_type` contradict each other
    fields `architectures` and `model_type` contradict each other
    ");
}

#[test]
fn messages_name_what_is_understood_and_stay_short() {
    let message = refused(LLAMA, json!({"architectures": ["x\n".repeat(1000)]})).to_string();
    assert!(message.len() < 600 && !message.contains('\n'), "{message}");
    assert!(message.contains("LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM"));
    let message = refused(LLAMA, json!({"y\u{7}".repeat(1000): 1})).to_string();
    assert!(message.len() < 600 && !message.contains('\u{7}'), "{message}");
}

#[test]
fn every_dimension_is_required() {
    let fields = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "vocab_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_local_experts",
        "num_experts_per_tok",
    ];
    for field in fields {
        let missing = ConfigError::Missing { field: field.to_owned() };
        assert_eq!(refused(MIXTRAL, json!({ field: "absent" })), missing);
        assert_eq!(refused(MIXTRAL, json!({ field: null })), missing);
        for wrong in [json!("8"), json!([8]), json!(8.5), json!(true), json!({})] {
            match refused(MIXTRAL, json!({ field: wrong })) {
                ConfigError::WrongType { field: named, .. } => assert_eq!(named, field),
                other => panic!("{field}: {other}"),
            }
        }
        for wrong in [json!(0), json!(-1), json!(1u64 << 31), json!(u64::MAX)] {
            match refused(MIXTRAL, json!({ field: wrong })) {
                ConfigError::OutOfRange { field: named, .. } => assert_eq!(named, field),
                other => panic!("{field}: {other}"),
            }
        }
    }
}

#[test]
fn numbers_that_do_not_fit_together() {
    let cases = [
        json!({"num_key_value_heads": 3}),
        json!({"num_key_value_heads": 16}),
        json!({"head_dim": 15}),
        json!({"head_dim": "absent", "hidden_size": 100}),
        json!({"num_attention_heads": 65536, "head_dim": 65536}),
        json!({"num_hidden_layers": 4096, "intermediate_size": 16777216, "hidden_size": 16777216}),
    ];
    insta::assert_snapshot!(messages(LLAMA, &cases), @"
    field `num_attention_heads` is 8, not a multiple of 3 (`num_key_value_heads`)
    field `num_attention_heads` is 8, not a multiple of 16 (`num_key_value_heads`)
    field `head_dim` is 15, not a multiple of 2 (`pairs of the rotary embedding`)
    field `hidden_size` is 100, not a multiple of 8 (`num_attention_heads`)
    the config describes 4294967296 query channels per layer, more than 16777216
    the config describes 3458791056718430208 parameters, more than 70368744177664
    ");
    let cases = [
        json!({"num_experts_per_tok": 9}),
        json!({"num_hidden_layers": 4096, "num_local_experts": 65536}),
    ];
    insta::assert_snapshot!(messages(MIXTRAL, &cases), @"
    field `num_experts_per_tok` is 9, expected 1 to 8
    the config describes 805359619 tensors, more than 1048576
    ");
}

#[test]
fn real_numbers() {
    let cases = [
        json!({"rms_norm_eps": 0.0}),
        json!({"rms_norm_eps": -1e-5}),
        json!({"rms_norm_eps": 1e-60}),
        json!({"rms_norm_eps": 1.5}),
        json!({"rms_norm_eps": "1e-5"}),
        json!({"rope_theta": 0.5}),
        json!({"rope_theta": -10000.0}),
        json!({"rope_theta": [10000.0]}),
    ];
    insta::assert_snapshot!(messages(LLAMA, &cases), @"
    field `rms_norm_eps` is 0.0, expected a positive number up to 1
    field `rms_norm_eps` is -1e-5, expected a positive number up to 1
    field `rms_norm_eps` is 1e-60, expected a positive number up to 1
    field `rms_norm_eps` is 1.5, expected a positive number up to 1
    field `rms_norm_eps` is a string, expected a number
    field `rope_theta` is 0.5, expected a number of at least 1
    field `rope_theta` is -10000.0, expected a number of at least 1
    field `rope_theta` is a list, expected a number
    ");
}

#[test]
fn rope_scaling() {
    let llama3 = |change: Value| {
        let mut scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        });
        for (field, value) in change.as_object().unwrap() {
            scaling[field] = value.clone();
        }
        json!({ "rope_scaling": scaling })
    };
    let cases = [
        json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
        json!({"rope_scaling": {"type": "linear"}}),
        json!({"rope_scaling": {"type": "linear", "factor": 0.5}}),
        json!({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}),
        json!({"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}),
        json!({"rope_scaling": {"factor": 2.0}}),
        json!({"rope_scaling": {}}),
        json!({"rope_scaling": "linear"}),
        llama3(json!({"high_freq_factor": 1.0})),
        llama3(json!({"low_freq_factor": 0.0})),
        llama3(json!({"factor": null})),
        llama3(json!({"original_max_position_embeddings": -8192})),
        json!({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        json!({"rope_scaling": null,
               "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        json!({"rope_scaling": null, "rope_parameters": {
               "rope_type": "default", "partial_rotary_factor": 0.5}}),
        json!({"partial_rotary_factor": 0.5}),
    ];
    insta::assert_snapshot!(messages(LLAMA, &cases), @"
    field `rope_scaling.rope_type` is \"yarn\"; understood is default, linear or llama3
    field `rope_scaling.rope_type` is \"dynamic\"; understood is default, linear or llama3
    field `rope_scaling.factor` is missing
    field `rope_scaling.factor` is 0.5, expected a number of at least 1
    field `rope_scaling.mscale` is not understood for family llama
    fields `rope_scaling.rope_type` and `rope_scaling.type` contradict each other
    field `rope_scaling.rope_type` is missing
    field `rope_scaling.rope_type` is missing
    field `rope_scaling` is a string, expected an object
    field `rope_scaling.high_freq_factor` is 1.0, expected more than low_freq_factor
    field `rope_scaling.low_freq_factor` is 0.0, expected a positive number
    field `rope_scaling.factor` is missing
    field `rope_scaling.original_max_position_embeddings` is -8192.0, expected a positive number
    fields `rope_parameters` and `rope_scaling` contradict each other
    fields `rope_parameters` and `rope_theta` contradict each other
    field `rope_parameters.partial_rotary_factor` is 0.5; understood is 1.0
    field `partial_rotary_factor` is 0.5; understood is 1.0
    ");
}

#[test]
fn tokens() {
    let cases = [
        json!({"eos_token_id": 512}),
        json!({"eos_token_id": -1}),
        json!({"eos_token_id": [1, 2.5]}),
        json!({"eos_token_id": "</s>"}),
        json!({"eos_token_id": [1, null]}),
        json!({"bos_token_id": 4294967296u64}),
    ];
    insta::assert_snapshot!(messages(LLAMA, &cases), @"
    field `eos_token_id` is 512, expected token ids below the vocabulary of 512
    field `eos_token_id` is -1, expected token ids below the vocabulary of 512
    field `eos_token_id` is a fractional number, expected a token id or a list of them
    field `eos_token_id` is a string, expected a token id or a list of them
    field `eos_token_id` is null, expected a token id or a list of them
    field `bos_token_id` is 4294967296, expected token ids below the vocabulary of 512
    ");
}

#[test]
fn what_is_not_understood() {
    let cases = [
        json!({"hidden_act": "gelu"}),
        json!({"hidden_act": 1}),
        json!({"pretraining_tp": 2}),
        json!({"quantization_config": {"quant_method": "fp8"}}),
        json!({"is_decoder": true}),
        json!({"pruned_heads": {"0": [1]}}),
        json!({"attention_bias": "yes"}),
        json!({"tie_word_embeddings": 1}),
        json!({"auto_map": {"AutoModelForCausalLM": "modeling_llama.Custom"}}),
        json!({"sliding_window": 4096}),
        json!({"logit_scale": 0.5}),
        json!({"use_qk_norm": false}),
    ];
    insta::assert_snapshot!(messages(LLAMA, &cases), @"
    field `hidden_act` is \"gelu\"; understood is \"silu\"
    field `hidden_act` is 1; understood is \"silu\"
    field `pretraining_tp` is 2; understood is 1
    field `quantization_config` is \"fp8\"; understood is awq or gptq
    field `is_decoder` is true; understood is false
    field `pruned_heads` is an object; understood is {}
    field `attention_bias` is a string, expected true or false
    field `tie_word_embeddings` is a whole number, expected true or false
    field `auto_map` is not understood for family llama
    field `sliding_window` is not understood for family llama
    field `logit_scale` is not understood for family llama
    field `use_qk_norm` is not understood for family llama
    ");
    let cases = [
        json!({"attention_bias": true}),
        json!({"mlp_bias": true}),
        json!({"sliding_window": 0}),
        json!({"sliding_window": "24"}),
        json!({"num_local_experts": 8}),
        json!({"pretraining_tp": 4}),
    ];
    insta::assert_snapshot!(messages(MISTRAL, &cases), @"
    field `attention_bias` is true; understood is false
    field `mlp_bias` is true; understood is false
    field `sliding_window` is 0, expected 1 to 1073741824
    field `sliding_window` is a string, expected a whole number
    field `num_local_experts` is not understood for family mistral
    field `pretraining_tp` is 4; understood is 1
    ");
}

#[test]
fn fields_without_effect_are_without_effect() {
    let base = ModelSpec::from_config(LLAMA).unwrap();
    let changes = json!({
        "attention_dropout": 0.5, "initializer_range": 9, "use_cache": false, "pad_token_id": -1,
        "torch_dtype": "float16", "dtype": "float32", "transformers_version": "9",
        "_name_or_path": "x", "pretraining_tp": 1.0, "unknown": null, "is_decoder": false,
        "pruned_heads": {}, "quantization_config": null, "max_sequence_length": 1,
    });
    assert_eq!(ModelSpec::from_config(&changed(LLAMA, changes)), Ok(base));
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0i64..20_000).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(&["linear", "llama3", "default", "yarn"][..]).prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    let key = prop_oneof![
        Just("rope_type"),
        Just("type"),
        Just("factor"),
        Just("rope_theta"),
        Just("low_freq_factor"),
    ];
    leaf.prop_recursive(2, 8, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone().prop_map(str::to_owned), inner), 0..4)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Any values in any of the fields: a spec whose table can be built, or an error.
    #[test]
    fn strange_values_never_panic(
        base in prop::sample::select(&CONFIGS[..]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any_json()), 1..4),
        added in any_json(),
    ) {
        let mut map: Map<String, Value> = serde_json::from_str(base).unwrap();
        let fields: Vec<String> = map.keys().cloned().collect();
        for (at, value) in changes {
            map.insert(at.get(&fields).clone(), value);
        }
        map.insert("rope_parameters".to_owned(), added);
        if let Ok(spec) = ModelSpec::from_config(&Value::Object(map).to_string()) {
            prop_assert!(spec.parameters() > 0);
            prop_assert!(spec.active_parameters() <= spec.parameters());
        }
    }

    #[test]
    fn strange_text_never_panics(text in ".{0,64}", at in 0usize..900, cut in 0usize..40) {
        prop_assert!(ModelSpec::from_config(&text).is_err());
        // A piece of a real config replaced.
        let at = at.min(LLAMA.len());
        let end = (at + cut).min(LLAMA.len());
        let _ = ModelSpec::from_config(&format!("{}{text}{}", &LLAMA[..at], &LLAMA[end..]));
    }
}
