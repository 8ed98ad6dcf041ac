//! `phalanx model inspect`: what it says of models, whole and as a config alone, and of nodes.

use std::path::Path;

use serde_json::Value;

use crate::gguf;
use crate::harness::{golden_model, phalanx, source};

fn inspect(model: &Path, options: &[&str]) -> (bool, String, String) {
    let mut command = phalanx();
    let output = command.args(["model", "inspect"]).arg(model).args(options).output();
    let output = output.expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (output.status.success(), text(output.stdout), text(output.stderr))
}

fn json(model: &Path, options: &[&str]) -> Value {
    let (ok, out, err) = inspect(model, &[options, &["--output", "json"]].concat());
    assert!(ok, "{err}");
    serde_json::from_str(&out).expect("JSON")
}

fn deepseek_v3() -> std::path::PathBuf {
    source("crates/model/tests/fixtures/published/deepseek-v3.json")
}

#[test]
fn deepseek_v3_by_its_config_alone() {
    let all = json(&deepseek_v3(), &[]);
    assert_eq!(all["family"], "deepseek_v3");
    assert_eq!(all["parameters"], 671_026_419_200_u64);
    let active = all["active_parameters"].as_f64().expect("a number");
    assert!((37e9..38.5e9).contains(&active), "{active}");
    assert_eq!(all["computed"]["bf16"]["kv_bytes_per_token"], 70_272);
    assert_eq!(all["computed"]["f32"]["weight_bytes"], 4 * 671_026_419_200_u64);
    // As published: 688.6 GB with the prediction layer, which is not served.
    let stored = all["stored_bytes"].as_object().expect("sizes");
    let stored: u64 = stored.values().filter_map(Value::as_u64).sum();
    assert!((670_000_000_000..676_000_000_000).contains(&stored), "{stored}");
    assert_eq!(all["not_served"][0], "model.layers.61.");
    assert_eq!(all["stripes"]["max"], 128);
    for ranks in [16, 32] {
        let plans = json(&deepseek_v3(), &["--ranks", &ranks.to_string()])["plans"].clone();
        let int8 = plans.as_array().expect("plans").iter().find(|p| p["compute"] == "int8");
        let held = int8.expect("int8")["ranks"].as_array().expect("ranks");
        assert_eq!(held.len(), ranks);
        for rank in held {
            let bytes = rank["weight_bytes"].as_u64().expect("bytes");
            let even = 671_026_419_200 * 9 / 8 / ranks as u64;
            assert!((even..even * 5 / 4).contains(&bytes), "{ranks} ranks: {bytes}, {even}");
        }
    }
}

#[test]
fn nodes_that_are_enough_and_nodes_that_are_not() {
    let enough = json(&deepseek_v3(), &["--nodes", "2x8xH200", "--kv-tokens", "65536"]);
    let plan = |all: &Value, compute: &str| {
        let plans = all["plans"].as_array().expect("plans");
        plans.iter().find(|plan| plan["compute"] == compute).expect("a plan").clone()
    };
    let int8 = plan(&enough, "int8");
    assert_eq!(int8["ranks"].as_array().expect("it fits").len(), 16);
    assert!(int8["kv_tokens_with_room"].as_u64().expect("a number") > 65_536);
    let f32 = plan(&enough, "f32");
    assert!(f32["error"].as_str().expect("it does not fit").contains("lacks"));
    let needed = f32["devices_that_would_do"].as_u64().expect("a number");
    assert!((17..=32).contains(&needed), "{needed}");

    let (ok, out, err) = inspect(&deepseek_v3(), &["--nodes", "4x64GiB"]);
    assert!(ok, "{err}");
    assert!(out.contains("does not fit") && out.contains("would do"), "{out}");
    let (ok, out, _) = inspect(&deepseek_v3(), &["--nodes", "2x8xH200", "--kv-tokens", "65536"]);
    assert!(ok && out.contains("fits on 16 ranks (16 stripes)"), "{out}");
}

#[test]
fn a_directory_with_its_licence_and_its_files() {
    let copy = tempfile::tempdir().expect("a directory");
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(golden_model("llama3").join(name), copy.path().join(name)).expect("copied");
    }
    let front = "---\nlicense: apache-2.0\n---\n# A model\n";
    std::fs::write(copy.path().join("README.md"), front).expect("written");
    let all = json(copy.path(), &[]);
    assert_eq!(all["licences"][0]["text"], "apache-2.0");
    assert_eq!(all["files"]["count"], 1);
    assert_eq!(all["tokenizer"]["usable"], true);
    let stored = all["stored_bytes"]["bf16"].as_u64().expect("bytes");
    let on_disk = all["files"]["bytes"].as_u64().expect("bytes");
    assert!(stored <= on_disk && on_disk < stored + 65_536, "{stored} {on_disk}");
    let (ok, out, err) = inspect(copy.path(), &[]);
    assert!(ok && out.contains("apache-2.0 (README.md: license)"), "{out}{err}");
}

#[test]
fn a_gguf_file_is_inspected_as_the_directory_it_was_made_from() {
    for name in ["qwen3-moe", "deepseek-v3"] {
        let (file, directory) = (json(&gguf::file(name), &[]), json(&golden_model(name), &[]));
        for field in ["family", "parameters", "active_parameters", "computed", "stripes", "layers"]
        {
            assert_eq!(file[field], directory[field], "{name}: {field}");
        }
        assert_eq!(file["tokenizer"]["usable"], true);
        let stored = file["stored_bytes"].as_object().expect("sizes");
        // Norms and routers stay f32 when a file is made.
        assert_eq!(stored.keys().collect::<Vec<_>>(), ["bf16", "f32"], "{name}");
        let sum: u64 = stored.values().filter_map(Value::as_u64).sum();
        let on_disk = file["files"]["bytes"].as_u64().expect("bytes");
        assert!(sum < on_disk && on_disk < sum + 65_536, "{name}: {sum} {on_disk}");
    }
    let whole = json(&gguf::file("qwen3-moe"), &["--nodes", "2x2x1GiB", "--experts", "whole"]);
    assert_eq!(whole["experts"], "whole");
    assert_eq!(whole["plans"][0]["ranks"].as_array().expect("it fits").len(), 4);
    let options = ["--nodes", "2x2x1GiB", "--experts", "whole"];
    let (ok, out, err) = inspect(&gguf::file("qwen3-moe"), &options);
    assert!(ok && out.contains("experts whole") && out.contains("12-15"), "{out}{err}");
}

#[test]
fn what_a_gguf_file_says_of_its_licence_is_said() {
    let bytes = std::fs::read(gguf::file("qwen3")).expect("a file");
    let copy = tempfile::tempdir().expect("a directory");
    let path = copy.path().join("model.gguf");
    std::fs::write(
        &path,
        gguf::with_text(&bytes, "general.license", "apache-2.0 (see LICENSE file)"),
    )
    .expect("written");
    let all = json(&path, &[]);
    assert_eq!(all["licences"][0]["text"], "apache-2.0 (see LICENSE file)");
    assert_eq!(all["licences"][0]["place"], "general.license");
    std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("written");
    let (ok, _, err) = inspect(&path, &[]);
    assert!(!ok && err.contains("model.gguf: tensor ") && err.contains("beyond"), "{err}");
}

#[test]
fn four_bit_checkpoints_are_weighed_as_they_are_stored() {
    for name in ["awq", "gptq"] {
        let (fixture, copy) = (source("tests/int4").join(name), tempfile::tempdir());
        let copy = copy.expect("a directory");
        let config = std::fs::read_to_string(fixture.join("config.json")).expect("a config");
        // What is not quantised is f32 there.
        let config = config.replacen('{', r#"{"torch_dtype": "float32","#, 1);
        std::fs::write(copy.path().join("config.json"), config).expect("written");
        let weights = "model.safetensors";
        std::fs::copy(fixture.join(weights), copy.path().join(weights)).expect("copied");
        let all = json(copy.path(), &[]);
        let stored = all["stored_bytes"].as_object().expect("sizes");
        let sum: u64 = stored.values().filter_map(Value::as_u64).sum();
        let on_disk = all["files"]["bytes"].as_u64().expect("bytes");
        assert!(stored.contains_key("int4"), "{name}");
        assert!(sum <= on_disk && on_disk < sum + 16_384, "{name}: {sum} {on_disk}");
    }
}

#[test]
fn what_cannot_be_inspected_gets_a_sentence() {
    let empty = tempfile::tempdir().expect("a directory");
    let broken = empty.path().join("config.json");
    for (content, options, says) in [
        (None, &[][..], "no config.json"),
        (Some("{"), &[], "not valid JSON"),
        (Some(r#"{"architectures": ["BertModel"]}"#), &[], "BertModel"),
        (None, &["--nodes", "2x8xH900"], "H900"),
    ] {
        match content {
            Some(content) => std::fs::write(&broken, content).expect("written"),
            None => drop(std::fs::remove_file(&broken)),
        }
        let (ok, _, err) = inspect(empty.path(), options);
        assert!(!ok && err.contains(says) && !err.contains("panicked"), "{says}: {err}");
    }
    for (options, says) in [
        (&["--ranks", "129"][..], "128"),
        (&["--ranks", "0"], "at least 1"),
        (&["--stripes", "200"], "1 to 128"),
        (&["--ranks", "9", "--stripes", "8"], "--stripes 8"),
        (&["--nodes", "4xH200", "--ranks", "8"], "4 devices"),
        (&["--kv-tokens", "0"], "at least 1"),
    ] {
        let (ok, _, err) = inspect(&deepseek_v3(), options);
        assert!(!ok && err.contains(says), "{options:?}: {err}");
    }
    let (ok, _, err) = inspect(Path::new("nowhere"), &[]);
    assert!(!ok && err.contains("nowhere"), "{err}");
    let (ok, _, err) = inspect(&golden_model("llama3").join("model.safetensors"), &[]);
    assert!(!ok && err.contains("neither"), "{err}");
}

#[test]
fn steps_on_gpus_are_predicted_and_said_to_be() {
    let options =
        ["--nodes", "1x8xH200", "--kv-tokens", "131072", "--predict", "--batch", "8,64", "--at"];
    let options = [&options[..], &["1536"]].concat();
    let (ok, out, err) = inspect(&deepseek_v3(), &options);
    assert!(ok && out.contains("PREDICTED, not measured, for ranks on 1 node"), "{out}{err}");
    assert!(out.contains("stored   decode 8 at 1536"), "{out}");
    assert!(out.contains("Rates of H200: built in") && out.contains("another engine"), "{out}");
    let all = json(&deepseek_v3(), &options)["predictions"].clone();
    assert_eq!(all["measured"], false);
    let steps = all["steps"].as_array().expect("steps");
    let step = steps.iter().find(|step| step["kept"] == "stored").expect("as it is stored");
    assert_eq!(step["work"]["decode"]["sequences"], 8);
    // Published for another engine: 12.8 ms.
    let seconds = step["predicted_seconds"].as_f64().expect("a number");
    assert!((0.85 * 0.0128..1.15 * 0.0128).contains(&seconds), "{seconds}");
    let parts = step["floor_seconds"].as_object().expect("parts");
    let part = |name: &str| parts[name].as_f64().expect("a number");
    let sum: f64 = ["weights", "kv", "matrix", "collectives", "gaps"].map(part).iter().sum();
    assert!((sum - part("total")).abs() < 1e-9, "{parts:?}");
    // What has no room is not predicted as if it had.
    let (ok, out, err) = inspect(&deepseek_v3(), &[&options[..], &["--batch", "4096"]].concat());
    assert!(ok && out.contains("Left out, stored: 6295552 tokens of cache"), "{out}{err}");
    assert!(json(&deepseek_v3(), &["--nodes", "1x8xH200"])["predictions"].is_null());
}

#[test]
fn steps_on_processors_are_predicted_from_a_calibration_file_only() {
    let model = golden_model("llama3");
    let options = ["--nodes", "2x1GiB", "--predict"];
    let (ok, _, err) = inspect(&model, &options);
    assert!(!ok && err.contains("processor") && err.contains("--calibration"), "{err}");
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("rates.json");
    let example = std::fs::read_to_string(source("docs/prediction.md")).expect("the page");
    let (_, example) = example.split_once("```json\n").expect("an example");
    let (example, _) = example.split_once("```").expect("its end");
    std::fs::write(&file, example).expect("written");
    let calibration = ["--calibration", file.to_str().expect("UTF-8"), "--batch", "1"];
    let options = [&options[..], &calibration].concat();
    let all = json(&model, &options)["predictions"].clone();
    let steps = all["steps"].as_array().expect("steps");
    // A decode and a prefill in each compute type; nothing is multiplied as it is stored.
    assert_eq!(steps.len(), 8, "{all}");
    assert!(steps.iter().all(|step| step["floor_seconds"]["collectives"].as_f64() > Some(0.0)));
    std::fs::write(&file, example.replace("\"efficiency\": 0.", "\"efficiency\": 7.")).expect("ok");
    let (ok, _, err) = inspect(&model, &options);
    assert!(!ok && err.contains("rates.json: devices.processor: efficiency is 7"), "{err}");
}
