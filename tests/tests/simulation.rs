//! The control plane, simulated: seeds that once failed, some thousand others, and the proof that
//! the checkers bite.
//!
//! `cargo run --release -p tests --bin simulate -- --seeds 100000` is the long form.

use std::fs;
use std::path::Path;
use std::time::Instant;

use tests::sim::run::{MUTATIONS, Mutation, run, run_many};
use tests::sim::story::tell;

/// Seeds of every test run.
const SEEDS: u64 = 2_000;
/// Seeds within which each mutation must be caught.
const PATIENCE: u64 = 200;

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The seeds of a file: a number in each line that is neither empty nor a comment.
fn seeds(file: &Path) -> Vec<u64> {
    let text = fs::read_to_string(file).expect("a file of seeds is text");
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| line.parse().expect("a seed is a number")).collect()
}

#[test]
fn seeds_that_once_failed_pass() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    let mut files: Vec<_> =
        fs::read_dir(folder).expect("a folder of seeds").map(|file| file.unwrap().path()).collect();
    files.sort();
    let known: Vec<u64> = files.iter().flat_map(|file| seeds(file)).collect();
    assert!(!known.is_empty());
    for seed in known {
        if let Err(failed) = run(seed, None, false) {
            panic!("{failed}");
        }
    }
}

#[test]
fn two_thousand_seeds_pass() {
    let begun = Instant::now();
    match run_many(10_000, SEEDS, None, threads(), |_| {}) {
        Ok(stats) => {
            println!("{stats}; {:.1} s", begun.elapsed().as_secs_f64());
            // A simulation in which nothing happens would pass too.
            assert!(stats.elections > SEEDS && stats.crashes > SEEDS && stats.changes > SEEDS);
            assert!(stats.commits > 50 * SEEDS && stats.reads > 20 * SEEDS);
            assert!(stats.restored > SEEDS / 2 && stats.forged > 100 && stats.faults.len() == 12);
        }
        Err(failed) => panic!("{failed}"),
    }
}

#[test]
fn a_seed_replays() {
    for seed in [3, 4, 5] {
        let first = run(seed, None, false).unwrap_or_else(|failed| panic!("{failed}"));
        let second = run(seed, None, false).unwrap_or_else(|failed| panic!("{failed}"));
        assert_eq!(first, second);
    }
}

#[test]
fn every_mutation_is_caught() {
    for (name, mutation) in MUTATIONS {
        let caught = run_many(0, PATIENCE, Some(mutation), threads(), |_| {});
        let failed = caught.expect_err(&format!("{name} went by in {PATIENCE} seeds"));
        println!("{name}: {failed}");
        // Without it, the very same run is one in which nothing is wrong.
        assert!(run(failed.seed, None, false).is_ok(), "{name}: the seed fails by itself");
        assert_eq!(Mutation::named(name), Some(mutation));
    }
}

#[test]
fn stories_are_told_as_they_are_written() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("stories");
    let mut told = 0;
    for file in fs::read_dir(folder).expect("a folder of stories") {
        let path = file.unwrap().path();
        let story = fs::read_to_string(&path).expect("a story is text");
        let ends = tell(&story).unwrap_or_else(|violation| panic!("{path:?}: {violation}"));
        assert_eq!(ends.trim(), story.trim(), "{path:?} as it comes out:\n{ends}");
        told += 1;
    }
    assert!(told > 2);
}
