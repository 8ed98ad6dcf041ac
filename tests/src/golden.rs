//! Golden checkpoints in `tests/golden`: tiny models with logits and continuations that the
//! reference implementation computed in f32.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use decoder::Checkpoint;
use model::ModelSpec;
use model::safetensors::parse_header;
use serde_json::Value;

/// Every golden checkpoint.
pub const NAMES: [&str; 19] = [
    "llama3",
    "llama-tied-f32",
    "llama-kv2-oddvocab",
    "mistral-window",
    "mixtral",
    "deepseek-v2-lite",
    "deepseek-v2",
    "deepseek-v3",
    "deepseek-v3-fp8",
    "qwen2",
    "qwen2-moe",
    "qwen3",
    "qwen3-moe",
    "gpt-oss",
    "gpt-oss-mxfp4",
    "phi3",
    "gemma2",
    "gemma3",
    "granite",
];

/// One golden checkpoint.
pub struct Golden {
    /// Its directory.
    pub directory: PathBuf,
    /// What its config says.
    pub spec: Arc<ModelSpec>,
    /// Its weights.
    pub checkpoint: Arc<Checkpoint>,
    /// Its prompts by name.
    pub prompts: BTreeMap<String, Prompt>,
    /// Tokens generated per prompt.
    pub generate: usize,
    /// By name of a mistake: how far it moves the reference's logprobs.
    pub mistakes: BTreeMap<String, Distance>,
}

/// Differences of logprobs: of the 20 most likely tokens at each generated token of each prompt,
/// the reference's continuation being fed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distance {
    /// The largest.
    pub max: f64,
    /// The mean.
    pub mean: f64,
}

/// One prompt with what the reference made of it.
pub struct Prompt {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The greedy continuation.
    pub greedy_ids: Vec<u32>,
    /// How far the best logit was ahead of the second, at each generated token.
    pub margins: Vec<f64>,
    /// `[vocab]`, after the last prompt token.
    pub last_logits: Vec<f32>,
    /// `[ids.len() * vocab]`, only for the prompt "short".
    pub all_logits: Option<Vec<f32>>,
    /// By generated token: the 20 most likely ids with their logprobs.
    pub top: Vec<Vec<(u32, f32)>>,
}

/// The directory of a golden checkpoint.
pub fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// Loads a golden checkpoint.
///
/// # Panics
/// Where it is not as it should be: this is for tests.
pub fn load(name: &str) -> Golden {
    let directory = directory(name);
    let config = std::fs::read_to_string(directory.join("config.json")).expect("config.json");
    let spec = ModelSpec::from_config(&config).expect("a config that is understood");
    let checkpoint = Checkpoint::open(&directory, &spec).expect("a whole checkpoint");
    let text = std::fs::read_to_string(directory.join("golden.json")).expect("golden.json");
    let json: Value = serde_json::from_str(&text).expect("golden.json");
    let blob = std::fs::read(directory.join("golden.safetensors")).expect("golden.safetensors");
    let prompts = json["prompts"].as_object().expect("prompts");
    let prompts = prompts.iter().map(|(name, p)| (name.clone(), prompt(name, p, &blob))).collect();
    let number = |value: &Value| value.as_f64().expect("a number");
    let mistakes = json["sensitivity"].as_object().expect("sensitivity").iter();
    Golden {
        directory,
        spec: Arc::new(spec),
        checkpoint: Arc::new(checkpoint),
        prompts,
        generate: json["max_new_tokens"].as_u64().expect("max_new_tokens") as usize,
        mistakes: mistakes
            .map(|(name, d)| {
                let distance = Distance { max: number(&d["max"]), mean: number(&d["mean"]) };
                (name.clone(), distance)
            })
            .collect(),
    }
}

fn prompt(name: &str, json: &Value, blob: &[u8]) -> Prompt {
    let ids = |field: &str| -> Vec<u32> {
        let list = json[field].as_array().expect("a list of ids");
        list.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    let margins = json["margins"].as_array().expect("margins");
    let floats = |tensor: &str| -> Option<Vec<f32>> {
        let words = words(blob, &format!("{name}.{tensor}"))?;
        Some(words.into_iter().map(f32::from_bits).collect())
    };
    let top_ids = words(blob, &format!("{name}.top_ids")).expect("top_ids");
    let top_logprobs = floats("top_logprobs").expect("top_logprobs");
    let pairs: Vec<(u32, f32)> = top_ids.into_iter().zip(top_logprobs).collect();
    Prompt {
        ids: ids("ids"),
        greedy_ids: ids("greedy_ids"),
        margins: margins.iter().map(|m| m.as_f64().expect("a margin")).collect(),
        last_logits: floats("last_logits").expect("last_logits"),
        all_logits: floats("all_logits"),
        top: pairs.chunks(20).map(<[_]>::to_vec).collect(),
    }
}

/// The 32-bit words of a tensor, where the file holds it.
fn words(blob: &[u8], tensor: &str) -> Option<Vec<u32>> {
    let header = parse_header("golden.safetensors", blob).expect("golden.safetensors");
    let info = header.get(tensor)?;
    let bytes = &blob[info.range.clone()];
    let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    Some(bytes.chunks_exact(4).map(word).collect())
}
