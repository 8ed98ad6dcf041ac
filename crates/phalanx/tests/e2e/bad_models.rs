//! Model directories that lie: refused at the start, with the file, tensor or field by name.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{golden_model, output, phalanx};

/// A copy of a golden checkpoint to be spoilt.
fn copy(name: &str) -> TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    for entry in fs::read_dir(golden_model(name)).expect("a model") {
        let path = entry.expect("an entry").path();
        let target = directory.path().join(path.file_name().expect("a name"));
        fs::copy(&path, target).expect("a copy");
    }
    directory
}

/// `phalanx serve` must end with an error that contains every one of `named`.
fn refused(model: &Path, named: &[&str]) {
    let output = output(phalanx().arg("serve").arg(model).args(["--port", "0", "--log", "error"]));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "taken, though it should name {named:?}");
    assert!(!errors.contains("panicked"), "{errors}");
    for part in named {
        assert!(errors.contains(part), "{part:?} is not named: {errors}");
    }
}

fn change_config(model: &Path, change: impl FnOnce(&mut Value)) {
    let path = model.join("config.json");
    let mut config = serde_json::from_str(&fs::read_to_string(&path).expect("a config"));
    change(config.as_mut().expect("JSON"));
    fs::write(path, config.expect("JSON").to_string()).expect("written");
}

#[test]
fn configs_that_are_not_understood() {
    let cases: [(&str, Value, &[&str]); 6] = [
        ("architectures", json!(["MambaForCausalLM"]), &["MambaForCausalLM"]),
        ("attention_gate", json!(2.5), &["attention_gate"]),
        ("hidden_act", json!("gelu"), &["hidden_act"]),
        ("num_key_value_heads", json!(3), &["num_key_value_heads"]),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0}), &["yarn"]),
        ("rms_norm_eps", json!(-1.0), &["rms_norm_eps"]),
    ];
    for (field, value, named) in cases {
        let model = copy("llama3");
        change_config(model.path(), |config| config[field] = value);
        refused(model.path(), named);
    }
    let model = copy("llama3");
    fs::write(model.path().join("config.json"), "{\"model_type\": ").expect("written");
    refused(model.path(), &["config.json"]);
    fs::remove_file(model.path().join("config.json")).expect("removed");
    refused(model.path(), &["config.json"]);
}

#[test]
fn weights_that_lie() {
    let model = copy("llama3");
    let path = model.path().join("model.safetensors");
    let whole = fs::read(&path).expect("weights");
    fs::write(&path, &whole[..whole.len() - 1000]).expect("written");
    refused(model.path(), &["model.safetensors"]);

    let mut lying = whole.clone();
    lying[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&path, lying).expect("written");
    refused(model.path(), &["model.safetensors"]);

    fs::write(&path, b"short").expect("written");
    refused(model.path(), &["model.safetensors"]);

    let text = String::from_utf8_lossy(&whole[..20_000]).into_owned();
    let renamed = text.find("model.layers.1.mlp.up_proj.weight").expect("a tensor");
    let mut missing = whole.clone();
    missing[renamed] = b'n';
    fs::write(&path, missing).expect("written");
    refused(model.path(), &["model.layers.1.mlp.up_proj.weight"]);

    fs::write(&path, &whole).expect("written");
    change_config(model.path(), |config| config["intermediate_size"] = json!(128));
    refused(model.path(), &["model.safetensors", "mlp", "256", "128"]);
}

#[test]
fn pickles_and_empty_directories() {
    let model = copy("llama3");
    fs::remove_file(model.path().join("model.safetensors")).expect("removed");
    refused(model.path(), &["model.safetensors"]);
    fs::write(model.path().join("pytorch_model.bin"), b"\x80\x02").expect("written");
    refused(model.path(), &["pytorch_model.bin", "pickle"]);
    refused(Path::new("no-such-directory"), &["no-such-directory"]);
}

#[test]
fn files_that_are_no_files() {
    let model = copy("llama3");
    for name in ["config.json", "model.safetensors"] {
        let path = model.path().join(name);
        let kept = fs::read(&path).expect("a file");
        fs::remove_file(&path).expect("removed");
        std::os::unix::fs::symlink("/dev/zero", &path).expect("a link");
        refused(model.path(), &[name, "regular file"]);
        fs::remove_file(&path).expect("removed");
        fs::write(&path, kept).expect("written");
    }
}

#[test]
fn options_that_no_machine_can_follow() {
    let model = golden_model("llama3");
    let cases: [&[&str]; 6] = [
        &["--threads", "1000000"],
        &["--max-num-batched-tokens", "1"],
        &["--max-num-seqs", "5000000000"],
        &["--ranks", "9"],
        &["--max-model-len", "513"],
        &["--served-model-name", ""],
    ];
    for options in cases {
        let mut serve = phalanx();
        serve.arg("serve").arg(&model).args(["--port", "0", "--log", "error"]);
        let output = output(serve.args(options));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{options:?} was taken");
        assert!(errors.contains(options[0]), "{options:?} is not named: {errors}");
    }
    let chat = output(phalanx().args(["chat", "--temperature", "NaN", "--prompt", "x"]));
    assert!(String::from_utf8_lossy(&chat.stderr).contains("--temperature"));
}

#[test]
fn indexes_that_point_elsewhere() {
    let model = copy("mixtral");
    let path = model.path().join("model.safetensors.index.json");
    let index = fs::read_to_string(&path).expect("an index");
    let outside = index.replace("model-00001-of-00002.safetensors", "../secret.safetensors");
    fs::write(&path, outside).expect("written");
    refused(model.path(), &["index.json"]);
    let absent = index.replace("model-00001-of-00002.safetensors", "absent.safetensors");
    fs::write(&path, absent).expect("written");
    refused(model.path(), &["absent.safetensors"]);
}

#[test]
fn a_model_that_does_not_fit_says_how_much_is_missing() {
    let model = golden_model("llama3");
    let options = ["--port", "0", "--memory", "1MiB", "--log", "error"];
    let output = output(phalanx().arg("serve").arg(model).args(options));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    for part in ["lacks 13.19 MiB (13831680 bytes)", "device 0", "--memory"] {
        assert!(errors.contains(part), "{part:?} is not named: {errors}");
    }
}
