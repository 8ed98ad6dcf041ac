//! `phalanx demo`: the first thing a stranger types.

use serde_json::Value;

use crate::harness::{output, phalanx, source};

fn demo(options: &[&str]) -> Value {
    let mut command = phalanx();
    command.current_dir(source(".")).args(["demo", "--json", "--max-tokens", "40"]);
    let output = output(command.args(options));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert_eq!(errors, "", "the demo complains");
    serde_json::from_slice(&output.stdout).expect("one line of JSON")
}

#[test]
fn any_number_of_workers_gives_the_same_answer() {
    let three = demo(&[]);
    assert_eq!(three["ranks"], 3);
    assert_eq!(three["stripes"], 8);
    assert!(three["text"].as_str().is_some_and(|text| !text.is_empty()));
    assert!(three["tokens_per_second"].as_f64().is_some_and(|speed| speed > 0.0));
    for workers in ["1", "2", "5"] {
        let other = demo(&["--workers", workers]);
        assert_eq!(three["text"], other["text"], "{workers} workers");
        assert_eq!(three["digest"], other["digest"], "{workers} workers");
    }
}

#[test]
fn once_prints_the_plan_the_answer_and_the_figures() {
    let mut command = phalanx();
    command.current_dir(source("docs")).args(["demo", "--once", "--max-tokens", "8"]);
    let output = output(command.args(["--prompt", "Who goes there?"]));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for part in ["8 stripes on 3 ranks", "> Who goes there?", "tokens per second", "Digest"] {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

#[test]
fn options_that_cannot_be_are_refused_by_name() {
    let refused = [
        (vec!["--workers", "9"], "--workers 9"),
        (vec!["--workers", "0"], "--workers"),
        (vec!["--prompt", " "], "--prompt"),
        (vec!["--model", "no/such/model"], "no/such/model"),
    ];
    for (options, named) in refused {
        let output = output(phalanx().arg("demo").arg("--json").args(&options));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{options:?} was taken");
        assert!(errors.contains(named), "{options:?}: {errors}");
    }
}
