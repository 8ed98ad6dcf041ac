//! Model files that are damaged while workers run: a start finds out by itself, a repair must too.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use tempfile::TempDir;

use crate::harness::{Process, demo_model};
use crate::survive::{Clients, Ward, gold};

/// A copy of the demo model, for one worker.
fn copy() -> TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    for entry in fs::read_dir(demo_model()).expect("a model") {
        let path = entry.expect("an entry").path();
        let target = directory.path().join(path.file_name().expect("a name"));
        fs::copy(&path, target).expect("a copy");
    }
    directory
}

/// Overwrites a few bytes in each of many places of the weights, in place.
fn spoil(model: &Path) {
    let path = model.join("model.safetensors");
    let length = path.metadata().expect("weights").len();
    let mut file = fs::File::options().write(true).open(path).expect("weights");
    for at in (length / 2..length - 8).step_by(100_000) {
        file.seek(SeekFrom::Start(at)).expect("a place");
        file.write_all(&[0x3f; 8]).expect("written");
    }
}

/// Cuts the weights short, in place.
fn cut(model: &Path) {
    let path = model.join("model.safetensors");
    let length = path.metadata().expect("weights").len();
    let file = fs::File::options().write(true).open(path).expect("weights");
    file.set_len(length / 2).expect("cut");
}

/// Each of two spares is tried in its turn, cannot load, and is left out.
#[test]
fn a_repair_takes_nothing_from_a_file_that_was_damaged_meanwhile() {
    let mut ward = Ward::start(2, 0);
    let (at, models) = (ward.coordinator.cluster(), [copy(), copy()]);
    for (model, name) in models.iter().zip(["worker-3", "worker-4"]) {
        ward.workers.push(Some(ward.ground.worker(model.path(), name, &at, &[])));
    }
    let http = ward.http();
    let gold = gold(&http);
    ward.whole();
    spoil(models[0].path());
    cut(models[1].path());
    let clients = Clients::start(&http, &gold, 4);
    let goal = clients.count() + 2;
    http.wait("to answer", || clients.count() >= goal || clients.broken());
    let victim = ward.holders()[1];
    ward.kill(victim);
    let goal = clients.count() + 8;
    http.wait("to go on", || clients.count() >= goal || clients.broken());
    println!("{} answers", clients.end().0);
    let status = ward.status();
    assert!(status["groups"][0]["epoch"].as_u64() > Some(3), "{status}");
    assert_eq!(ward.holders(), [1 - victim], "{status}");
    for (number, worker) in ward.workers.iter_mut().enumerate() {
        assert_eq!(worker.as_mut().is_some_and(Process::runs), number != victim);
    }
}
