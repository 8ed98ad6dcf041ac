//! Biases of every projection, against a closed form: with values and gates that depend on biases
//! alone, what a layer adds to the stream can be written down.

use std::sync::Arc;

use decoder::Checkpoint;
use model::ModelSpec;
use tests::group::{Setup, greedy, run};

const HIDDEN: usize = 16;
const HEADS: usize = 8;
const KV_HEADS: usize = 4;
const DIM: usize = 2;
const WIDTH: usize = 24;
const VOCAB: usize = 20;
const EPSILON: f64 = 1e-5;

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "vocab_size": 20,
    "rms_norm_eps": 1e-5, "attention_bias": true, "mlp_bias": true}"#;

/// Values that look random and are the same each time.
fn values(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 + seed * 101 + 11) % 64) as f32 / 32.0 - 1.0).collect()
}

/// The tensors of the one layer and what stands around it, with their shapes.
fn tensors() -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let layer = |name: &str| format!("model.layers.0.{name}");
    let (q, kv) = (HEADS * DIM, KV_HEADS * DIM);
    let matrix = |name: String, rows, columns, seed| {
        (name, vec![rows, columns], values(seed, rows * columns))
    };
    let zero = |name: String, rows, columns| (name, vec![rows, columns], vec![0.0; rows * columns]);
    let vector = |name: String, count, seed| (name, vec![count], values(seed, count));
    vec![
        matrix("model.embed_tokens.weight".into(), VOCAB, HIDDEN, 1),
        matrix("lm_head.weight".into(), VOCAB, HIDDEN, 2),
        vector("model.norm.weight".into(), HIDDEN, 3),
        vector(layer("input_layernorm.weight"), HIDDEN, 4),
        vector(layer("post_attention_layernorm.weight"), HIDDEN, 5),
        matrix(layer("self_attn.q_proj.weight"), q, HIDDEN, 6),
        vector(layer("self_attn.q_proj.bias"), q, 7),
        matrix(layer("self_attn.k_proj.weight"), kv, HIDDEN, 8),
        vector(layer("self_attn.k_proj.bias"), kv, 9),
        zero(layer("self_attn.v_proj.weight"), kv, HIDDEN),
        vector(layer("self_attn.v_proj.bias"), kv, 10),
        matrix(layer("self_attn.o_proj.weight"), HIDDEN, q, 11),
        vector(layer("self_attn.o_proj.bias"), HIDDEN, 12),
        zero(layer("mlp.gate_proj.weight"), WIDTH, HIDDEN),
        vector(layer("mlp.gate_proj.bias"), WIDTH, 13),
        zero(layer("mlp.up_proj.weight"), WIDTH, HIDDEN),
        vector(layer("mlp.up_proj.bias"), WIDTH, 14),
        matrix(layer("mlp.down_proj.weight"), HIDDEN, WIDTH, 15),
        vector(layer("mlp.down_proj.bias"), HIDDEN, 16),
    ]
}

/// A safetensors file.
fn file(tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let begin = data.len();
        values.iter().for_each(|value| data.extend_from_slice(&value.to_le_bytes()));
        let offsets = [begin, data.len()];
        let entry = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
        header.insert(name.clone(), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend(data);
    file
}

/// `out[r] = sum_c matrix[r, c] * x[c] + bias[r]`.
fn affine(matrix: &[f32], x: &[f64], bias: &[f32]) -> Vec<f64> {
    let row = |(row, bias): (&[f32], &f32)| {
        row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>() + f64::from(*bias)
    };
    matrix.chunks_exact(x.len()).zip(bias).map(row).collect()
}

/// Logits after a token, whatever came before it.
fn logits(token: usize) -> Vec<f64> {
    let tensors = tensors();
    let of = |suffix: &str| -> &[f32] {
        let found = tensors.iter().find(|(name, ..)| name.ends_with(suffix));
        &found.expect("a tensor").2
    };
    // Every key has the same value: the bias. Neighbouring query heads share a KV head.
    let value = |i: usize| {
        let (head, column) = (i / DIM, i % DIM);
        f64::from(of("v_proj.bias")[head / (HEADS / KV_HEADS) * DIM + column])
    };
    let attended: Vec<f64> = (0..HEADS * DIM).map(value).collect();
    let gated = |(gate, up): (&f32, &f32)| {
        let (gate, up) = (f64::from(*gate), f64::from(*up));
        gate / (1.0 + (-gate).exp()) * up
    };
    let inner: Vec<f64> = of("gate_proj.bias").iter().zip(of("up_proj.bias")).map(gated).collect();
    let attention = affine(of("o_proj.weight"), &attended, of("o_proj.bias"));
    let feed_forward = affine(of("down_proj.weight"), &inner, of("down_proj.bias"));
    let embedding = &of("embed_tokens.weight")[token * HIDDEN..(token + 1) * HIDDEN];
    let stream: Vec<f64> =
        (0..HIDDEN).map(|i| f64::from(embedding[i]) + attention[i] + feed_forward[i]).collect();
    let square = stream.iter().map(|x| x * x).sum::<f64>() / HIDDEN as f64;
    let scale = 1.0 / (square + EPSILON).sqrt();
    let normed: Vec<f64> = stream
        .iter()
        .zip(of("model.norm.weight"))
        .map(|(x, w)| x * scale * f64::from(*w))
        .collect();
    affine(of("lm_head.weight"), &normed, &[0.0; VOCAB])
}

#[test]
fn every_bias_is_added_once_on_any_number_of_ranks() {
    let spec = Arc::new(ModelSpec::from_config(CONFIG).expect("a config"));
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("model.safetensors"), file(&tensors())).expect("written");
    let checkpoint = Arc::new(Checkpoint::open(directory.path(), &spec).expect("a checkpoint"));
    let prompt = [3, 0, 19, 7, 7];
    for ranks in [1, 2, 3, 8] {
        let trace = run(&spec, &checkpoint, &Setup::even(ranks), &[greedy(&prompt, 1)]);
        for (position, token) in prompt.iter().enumerate() {
            let got = &trace.logits[&(0, position)];
            for (got, want) in got.iter().zip(logits(*token as usize)) {
                assert!((f64::from(*got) - want).abs() < 1e-4, "{ranks} ranks: {got}, not {want}");
            }
        }
    }
}
