//! What configs of the newer families can get wrong is refused by the field's name.

#![allow(clippy::unwrap_used, reason = "a test may stop at once")]

use model::{ConfigError, ModelSpec};
use serde_json::{Map, Value, json};

const V2: &str = include_str!("fixtures/deepseek-v2.json");
const V3: &str = include_str!("fixtures/deepseek-v3.json");
const FP8: &str = include_str!("fixtures/deepseek-v3-fp8.json");
const GEMMA2: &str = include_str!("fixtures/gemma2.json");
const GEMMA3: &str = include_str!("fixtures/gemma3.json");
const OSS: &str = include_str!("fixtures/gpt-oss.json");
const MXFP4: &str = include_str!("fixtures/gpt-oss-mxfp4.json");
const PHI3: &str = include_str!("fixtures/phi3.json");
const QWEN2: &str = include_str!("fixtures/qwen2.json");
const QWEN3: &str = include_str!("fixtures/qwen3.json");
const QWEN3_MOE: &str = include_str!("fixtures/qwen3-moe.json");

/// The config with some fields set, or removed where the value is the string "absent". A dot leads
/// into nested objects.
fn changed(config: &str, changes: &Value) -> String {
    let mut root: Map<String, Value> = serde_json::from_str(config).unwrap();
    for (field, value) in changes.as_object().unwrap() {
        let (mut map, mut field) = (&mut root, field.as_str());
        while let Some((outer, rest)) = field.split_once('.') {
            map = map.get_mut(outer).unwrap().as_object_mut().unwrap();
            field = rest;
        }
        if value == "absent" {
            map.remove(field).unwrap();
        } else {
            map.insert(field.to_owned(), value.clone());
        }
    }
    Value::Object(root).to_string()
}

fn refused(config: &str, changes: Value) -> String {
    match ModelSpec::from_config(&changed(config, &changes)) {
        Ok(_) => panic!("accepted {changes}"),
        Err(error) => error.to_string(),
    }
}

/// Each change is refused with a message that starts so.
fn all_refused(config: &str, cases: &[(Value, &str)]) {
    for (changes, message) in cases {
        let found = refused(config, changes.clone());
        assert!(found.starts_with(message), "{changes}: {found}");
    }
}

#[test]
fn deepseek_v3() {
    all_refused(
        V3,
        &[
            (
                json!({"num_key_value_heads": 4}),
                "field `num_key_value_heads` is 4; understood is 8",
            ),
            (json!({"kv_lora_rank": "absent"}), "field `kv_lora_rank` is missing"),
            (json!({"kv_lora_rank": 0}), "field `kv_lora_rank` is 0"),
            (json!({"q_lora_rank": "48"}), "field `q_lora_rank` is a string"),
            (
                json!({"qk_rope_head_dim": 15}),
                "field `qk_rope_head_dim` is 15, not a multiple of 2",
            ),
            (
                json!({"qk_nope_head_dim": 65536, "num_attention_heads": 65536,
                "num_key_value_heads": 65536}),
                "the config describes 4296015872 query channels",
            ),
            (json!({"head_dim": 24}), "field `head_dim` is 24; understood is 16"),
            (json!({"rope_interleave": false}), "field `rope_interleave` is false"),
            (json!({"attention_bias": true}), "field `attention_bias` is true"),
            (json!({"moe_layer_freq": 2}), "field `moe_layer_freq` is 2"),
            (json!({"scoring_func": "softmax"}), "field `scoring_func` is \"softmax\""),
            (json!({"topk_method": "greedy"}), "field `topk_method` is \"greedy\""),
            (
                json!({"n_group": 3}),
                "field `n_routed_experts` is 8, not a multiple of 3 (`n_group`)",
            ),
            (json!({"n_group": 8}), "field `n_group` is 8, expected 1 to 4"),
            (json!({"topk_group": 5}), "field `topk_group` is 5, expected 1 to 4"),
            (json!({"topk_group": 1}), "field `num_experts_per_tok` is 3, expected 1 to 2"),
            (json!({"n_shared_experts": "absent"}), "field `n_shared_experts` is missing"),
            (
                json!({"n_shared_experts": 65536, "moe_intermediate_size": 16777216}),
                "the config describes 1099511627776 shared feed-forward columns",
            ),
            (json!({"routed_scaling_factor": 0}), "field `routed_scaling_factor` is 0.0"),
            (json!({"routed_scaling_factor": 1e39}), "field `routed_scaling_factor` is 1e39"),
            (json!({"rope_scaling.mscale": "absent"}), "field `rope_scaling.mscale` is missing"),
            (
                json!({"rope_scaling.mscale_all_dim": null}),
                "field `rope_scaling.mscale_all_dim` is missing",
            ),
            (json!({"rope_scaling.beta_slow": 32}), "field `rope_scaling.beta_slow` is 32.0"),
            (
                json!({"rope_scaling.truncate": 1}),
                "field `rope_scaling.truncate` is a whole number",
            ),
            (
                json!({"rope_scaling.finetuned": true}),
                "field `rope_scaling.finetuned` is not understood for family deepseek_v3",
            ),
            (
                json!({"rope_scaling.type": "longrope"}),
                "field `rope_scaling.rope_type` is \"longrope\"; \
                 understood is default, linear, llama3 or yarn",
            ),
            (json!({"num_nextn_predict_layers": -1}), "field `num_nextn_predict_layers` is -1"),
        ],
    );
}

#[test]
fn deepseek_v2() {
    all_refused(
        V2,
        &[
            (json!({"topk_method": "noaux_tc"}), "field `topk_method` is \"noaux_tc\""),
            (json!({"norm_topk_prob": true}), "field `norm_topk_prob` is true"),
            (json!({"scoring_func": "sigmoid"}), "field `scoring_func` is \"sigmoid\""),
            (json!({"n_group": null}), "field `n_group` is missing"),
            (json!({"num_nextn_predict_layers": 1}), "field `num_nextn_predict_layers` is not"),
        ],
    );
}

#[test]
fn quantised() {
    all_refused(
        FP8,
        &[
            (
                json!({"quantization_config.quant_method": "hqq"}),
                "field `quantization_config.quant_method` is \"hqq\"; understood is \"fp8\"",
            ),
            (
                json!({"quantization_config.quant_method": "awq"}),
                "field `quantization_config.bits` is missing",
            ),
            (
                json!({"quantization_config.quant_method": "absent"}),
                "field `quantization_config.quant_method` is missing",
            ),
            (json!({"quantization_config.fmt": "e5m2"}), "field `quantization_config.fmt` is"),
            (
                json!({"quantization_config.weight_block_size": [64, 128]}),
                "field `quantization_config.weight_block_size` is a list",
            ),
            (
                json!({"quantization_config.weight_block_size": null}),
                "field `quantization_config.weight_block_size` is missing",
            ),
            (
                json!({"quantization_config.activation_scheme": "static"}),
                "field `quantization_config.activation_scheme` is \"static\"",
            ),
            (json!({"quantization_config.bits": 8}), "field `quantization_config.bits` is not"),
        ],
    );
    all_refused(
        MXFP4,
        &[
            (
                json!({"quantization_config.quant_method": "fp8"}),
                "field `quantization_config.quant_method` is \"fp8\"; understood is \"mxfp4\"",
            ),
            (json!({"intermediate_size": 80}), "field `intermediate_size` is 80, not a multiple"),
            (json!({"hidden_size": 100}), "field `hidden_size` is 100, not a multiple of 32"),
        ],
    );
    for config in [GEMMA2, PHI3, QWEN2] {
        let fp8 = json!({"quantization_config": {"quant_method": "fp8"}});
        assert!(refused(config, fp8).starts_with("field `quantization_config` is \"fp8\""));
    }
    // Families that understand it take the whole of what is published.
    let fp8 = json!({"quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
        "quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0",
        "modules_to_not_convert": ["lm_head"]}});
    for config in [V2, V3, QWEN3, QWEN3_MOE] {
        let spec = ModelSpec::from_config(&changed(config, &fp8)).unwrap();
        assert_eq!(spec.format, model::Format::Fp8Blocks);
    }
}

#[test]
fn gemma() {
    for config in [GEMMA2, GEMMA3] {
        all_refused(
            config,
            &[
                (json!({"hidden_activation": "gelu"}), "field `hidden_activation` is \"gelu\""),
                (json!({"hidden_act": "silu"}), "field `hidden_act` is \"silu\""),
                (
                    json!({"use_bidirectional_attention": true}),
                    "field `use_bidirectional_attention` is true",
                ),
                (json!({"query_pre_attn_scalar": 0}), "field `query_pre_attn_scalar` is 0.0"),
                (json!({"attn_logit_softcapping": -1}), "field `attn_logit_softcapping` is -1.0"),
                (json!({"final_logit_softcapping": "x"}), "field `final_logit_softcapping` is a"),
                (json!({"sliding_window": null}), "field `sliding_window` is missing"),
                (json!({"layer_types": ["full_attention"]}), "field `layer_types` is a list of 1"),
                (json!({"layer_types": 3}), "field `layer_types` is a whole number"),
            ],
        );
    }
    let types = json!(["full_attention", "chunked_attention"]);
    all_refused(GEMMA2, &[(json!({ "layer_types": types }), "field `layer_types` is \"chunked")]);
    all_refused(
        GEMMA3,
        &[
            (
                json!({"rope_parameters.full_attention": "absent"}),
                "field `rope_parameters.full_attention` is missing",
            ),
            (
                json!({"rope_parameters.sliding_attention.rope_type": "yarn"}),
                "field `rope_parameters.sliding_attention.rope_type` is \"yarn\"",
            ),
            (json!({"rope_parameters.other": {}}), "field `rope_parameters.other` is not"),
            (
                json!({"rope_theta": 1e6}),
                "fields `rope_theta` and `rope_parameters` contradict each other",
            ),
            (json!({"rope_local_base_freq": 0.5}), "field `rope_local_base_freq` is 0.5"),
            (json!({"sliding_window_pattern": 0}), "field `sliding_window_pattern` is 0"),
        ],
    );
}

/// The window stands under two names in some published configs of Gemma 2.
#[test]
fn a_window_that_is_named_twice() {
    all_refused(
        GEMMA2,
        &[(
            json!({"sliding_window_size": 77}),
            "fields `sliding_window_size` and `sliding_window` contradict each other",
        )],
    );
    let mut config: Value = serde_json::from_str(GEMMA2).unwrap();
    let plain = ModelSpec::from_config(&config.to_string()).unwrap();
    config["sliding_window_size"] = config["sliding_window"].clone();
    assert_eq!(ModelSpec::from_config(&config.to_string()).unwrap(), plain);
}

#[test]
fn gpt_oss_and_phi3() {
    all_refused(
        OSS,
        &[
            (json!({"rope_scaling": "absent"}), "field `rope_scaling` is missing"),
            (
                json!({"experts_per_token": 2}),
                "fields `experts_per_token` and `num_experts_per_tok` contradict each other",
            ),
            (json!({"swiglu_limit": 0}), "field `swiglu_limit` is 0.0"),
            (json!({"swiglu_alpha": "x"}), "field `swiglu_alpha` is a string"),
            (json!({"num_local_experts": 3}), "field `num_experts_per_tok` is 4"),
            (json!({"sliding_window": null}), "field `sliding_window` is missing"),
            (json!({"attention_bias": 1}), "field `attention_bias` is a whole number"),
        ],
    );
    all_refused(
        PHI3,
        &[
            (
                json!({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}),
                "field `rope_scaling.rope_type` is \"longrope\"",
            ),
            (json!({"rope_scaling": {"type": "su"}}), "field `rope_scaling.rope_type` is \"su\""),
            (json!({"partial_rotary_factor": 0.75}), "field `partial_rotary_factor` is 0.75"),
            (json!({"attention_bias": true}), "field `attention_bias` is true"),
            (json!({"num_local_experts": 16}), "field `num_local_experts` is not understood"),
        ],
    );
}

#[test]
fn qwen() {
    all_refused(
        QWEN2,
        &[
            (json!({"use_mrope": true}), "field `use_mrope` is true"),
            (
                json!({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}),
                "fields `layer_types` and `use_sliding_window` contradict each other",
            ),
            (json!({"use_sliding_window": "yes"}), "field `use_sliding_window` is a string"),
            (json!({"max_window_layers": -1}), "field `max_window_layers` is -1"),
            (json!({"head_dim": 15}), "field `head_dim` is 15, not a multiple of 2"),
        ],
    );
    all_refused(
        QWEN3_MOE,
        &[
            (json!({"use_sliding_window": true}), "field `use_sliding_window` is true"),
            (
                json!({"num_experts": 8}),
                "fields `num_local_experts` and `num_experts` contradict each other",
            ),
            (json!({"num_local_experts": "absent"}), "field `num_experts` is missing"),
            (json!({"mlp_only_layers": [0.5]}), "field `mlp_only_layers` is a list"),
            (json!({"decoder_sparse_step": 0}), "field `decoder_sparse_step` is 0"),
            (json!({"moe_intermediate_size": "absent"}), "field `moe_intermediate_size` is"),
            (
                json!({"shared_expert_intermediate_size": 5}),
                "field `shared_expert_intermediate_size` is not understood",
            ),
        ],
    );
}

#[test]
fn a_window_that_is_off_says_nothing() {
    for config in [QWEN2, QWEN3, QWEN3_MOE] {
        let spec = ModelSpec::from_config(config).unwrap();
        for window in [0, 24] {
            let off = json!({"use_sliding_window": false, "sliding_window": window});
            assert_eq!(ModelSpec::from_config(&changed(config, &off)), Ok(spec.clone()));
        }
    }
    let on = json!({"use_sliding_window": true, "sliding_window": 0});
    assert!(refused(QWEN2, on).starts_with("field `sliding_window` is 0"));
}

#[test]
fn a_window_by_layer() {
    let on = json!({"use_sliding_window": true, "sliding_window": 24, "max_window_layers": 0,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"]});
    for config in [QWEN2, QWEN3] {
        let spec = ModelSpec::from_config(&changed(config, &on)).unwrap();
        let windows: Vec<Option<usize>> = spec
            .layers
            .iter()
            .map(|layer| match &layer.attention {
                model::Attention::Grouped(grouped) => grouped.window,
                model::Attention::Latent(_) => None,
            })
            .collect();
        assert_eq!(windows, [None, Some(24), None]);
    }
}

/// No field with any value of a wrong kind passes or panics in silence.
#[test]
fn every_field_is_looked_at() {
    for config in [V2, V3, FP8, GEMMA2, GEMMA3, OSS, MXFP4, PHI3, QWEN2, QWEN3, QWEN3_MOE] {
        let base = ModelSpec::from_config(config).unwrap();
        let map: Map<String, Value> = serde_json::from_str(config).unwrap();
        for field in map.keys() {
            for value in [json!([[]]), json!({"x": {}}), json!(-7.5), json!("x"), json!(-7)] {
                match ModelSpec::from_config(&changed(config, &json!({ field: value }))) {
                    // Without effect means without any.
                    Ok(spec) => assert_eq!(spec, base, "{field} {value}"),
                    Err(ConfigError::NotJson { message }) => panic!("{message}"),
                    Err(error) => {
                        let text = error.to_string();
                        let named = text.contains(&format!("`{field}"))
                            || text.starts_with("architecture")
                            || text.starts_with("the config describes");
                        assert!(named, "{field} {value}: {text}");
                    }
                }
            }
        }
    }
}
