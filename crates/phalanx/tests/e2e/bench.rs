//! `phalanx bench`: its figures as a table and as JSON.

use serde_json::Value;

use crate::harness::{phalanx, source};

fn bench(options: &[&str]) -> (bool, String, String) {
    let mut command = phalanx();
    let output = command.arg("bench").arg(source("models/demo")).args(options).output();
    let output = output.expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[test]
fn figures_stand_beside_the_machine_they_were_measured_on() {
    let few = ["--compute", "bf16,q8", "--prefill", "16", "--decode", "0", "--repeat", "1"];
    let (ok, out, err) = bench(&[&few[..], &["--ranks", "2", "--output", "json"]].concat());
    assert!(ok, "{err}");
    let report: Value = serde_json::from_str(&out).expect("JSON");
    let runs = report["runs"].as_array().expect("runs");
    let computes: Vec<_> = runs.iter().map(|run| run["compute"].as_str()).collect();
    assert_eq!(computes, [Some("bf16"), Some("int8")]);
    for run in runs {
        assert_eq!((&run["ranks"], &run["cases"][0]["case"]["prefill"]), (&2.into(), &16.into()));
        let case = &run["cases"][0];
        let number = |value: &Value| value.as_f64().expect("a number");
        let (rate, limit) =
            (number(&case["tokens_per_second"]), number(&case["limit_tokens_per_second"]));
        assert!((number(&case["share_of_limit"]) - rate / limit).abs() < 1e-9);
        assert!(number(&case["machine"]["read_bytes_per_second"]) > 1e8);
    }
}

#[test]
fn a_table_has_a_line_for_each_case() {
    let few = ["--compute", "f32", "--prefill", "8", "--decode", "2", "--context", "8"];
    let (ok, out, err) = bench(&[&few[..], &["--repeat", "1", "--steps", "1"]].concat());
    assert!(ok, "{err}");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 3, "{out}");
    assert!(lines[1].contains("prefill 8") && lines[2].contains("decode 2 at 8"), "{out}");
}

#[test]
fn nonsense_is_refused() {
    for options in [["--repeat", "0"], ["--steps", "0"], ["--kernels", "sse"], ["--ranks", "99"]] {
        let (ok, _, err) = bench(&options);
        assert!(!ok, "{options:?}");
        assert!(err.contains(options[1]) || err.contains(options[0]), "{err}");
    }
}
