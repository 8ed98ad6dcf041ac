//! `phalanx demo`: the first thing a stranger types.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{PATIENCE, output, phalanx, source};

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
fn chaos_costs_a_pause_and_no_byte() {
    let shown = demo(&["--chaos"]);
    assert_eq!(shown["same"], true, "{shown}");
    assert_eq!(shown["digest_undisturbed"], shown["digest_disturbed"]);
    assert_eq!(shown["ranks_left"], 2, "{shown}");
    assert!(shown["pause_ms"].as_f64().is_some_and(|pause| pause > 0.0), "{shown}");
    let bytes = |name: &str| shown[name].as_f64().expect("a count of bytes");
    let again = bytes("bytes_read_again") / bytes("bytes_lost");
    assert!((0.5..=1.1).contains(&again), "{again} of what was lost was read: {shown}");
    let told = shown["timeline"].to_string();
    for part in ["fenced", "epoch 2 is planned", "epoch 2 serves", "next token"] {
        assert!(told.contains(part), "{part:?} is not in {told}");
    }
    // Whether it died within a step or between two, somebody noticed at once.
    let noticed = [
        "rank 0 closed its link",
        "has left because of rank 0",
        "steps from rank 0 broke",
        "rank 0 on node 2 died",
    ];
    assert!(noticed.iter().any(|how| told.contains(how)), "{told}");
    assert_eq!(shown["error"], Value::Null);
    // The same again with another prompt, beside a cluster of another size that nobody disturbs.
    let prompt = ["--prompt", "Who goes there?"];
    let shown = demo(&[&["--chaos"], &prompt[..]].concat());
    let undisturbed = demo(&[&["--workers", "2"], &prompt[..]].concat());
    assert_eq!(shown["digest_disturbed"], undisturbed["digest"]);
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
        (vec!["--workers", "1", "--chaos"], "--chaos"),
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

/// Starts a demo that goes on serving, and waits until it says so.
fn lasting_demo() -> (Child, BTreeSet<u32>) {
    let mut command = phalanx();
    command.current_dir(source(".")).args(["demo", "--port", "0", "--max-tokens", "8"]);
    let mut demo = command.stdout(Stdio::piped()).spawn().expect("a demo");
    let lines = BufReader::new(demo.stdout.take().expect("its standard output")).lines();
    let said = lines.map_while(Result::ok).find(|line| line.contains("goes on serving"));
    assert!(said.is_some(), "the demo ended");
    let children = children_of(demo.id());
    assert_eq!(children.len(), 4, "one coordinator and three workers");
    (demo, children)
}

/// Processes whose parent is `parent`, as the kernel lists them.
fn children_of(parent: u32) -> BTreeSet<u32> {
    let entries = std::fs::read_dir("/proc").expect("a proc file system");
    let numbers = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
    numbers.filter(|pid| parent_of(*pid) == Some(parent)).collect()
}

fn parent_of(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

/// A process that has ended may still be listed as a zombie until its new parent looks.
fn alive(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    status.is_ok_and(|text| !text.contains("State:\tZ") && text.contains("phalanx"))
}

fn all_end(children: &BTreeSet<u32>) {
    let deadline = Instant::now() + PATIENCE;
    while children.iter().any(|pid| alive(*pid)) {
        assert!(Instant::now() < deadline, "a process of the demo is left behind");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn ctrl_c_ends_every_process_it_started() {
    let (mut demo, children) = lasting_demo();
    let sent = Command::new("kill").args(["-INT", &demo.id().to_string()]).status();
    assert!(sent.expect("the kill command").success());
    assert!(demo.wait().expect("a demo that ends").success());
    assert!(children.iter().all(|pid| !alive(*pid)), "a child outlives the demo");
}

#[test]
fn a_killed_demo_leaves_no_process_behind() {
    let (mut demo, children) = lasting_demo();
    demo.kill().expect("a demo to kill");
    demo.wait().expect("a killed demo");
    all_end(&children);
}

#[test]
fn a_reader_that_has_seen_enough_is_no_panic() {
    let mut command = phalanx();
    command.current_dir(source(".")).args(["demo", "--once", "--max-tokens", "8"]);
    let mut demo = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a demo");
    drop(demo.stdout.take());
    let output = demo.wait_with_output().expect("a demo that ends");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!errors.contains("panicked"), "{errors}");
}
