//! Runs the simulation: many seeds, or one with every step told.
//!
//! ```text
//! cargo run --release -p tests --bin simulate -- --seeds 100000
//! cargo run --release -p tests --bin simulate -- --seed 17 --trace
//! cargo run --release -p tests --bin simulate -- --story tests/stories/members.txt
//! ```

use std::process::ExitCode;
use std::time::Instant;

use tests::sim::run::{MUTATIONS, Mutation, run, run_many};
use tests::sim::story::tell;

/// What was typed.
struct Asked {
    first: u64,
    seeds: u64,
    seed: Option<u64>,
    story: Option<String>,
    mutation: Option<Mutation>,
    threads: usize,
    trace: bool,
}

fn asked() -> Result<Asked, String> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (seed, story, mutation) = (None, None, None);
    let mut asked = Asked { first: 0, seeds: 1_000, seed, story, mutation, threads, trace: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|error| error.to_string());
        match word.as_str() {
            "--first" => asked.first = number(value()?)?,
            "--seeds" => asked.seeds = number(value()?)?,
            "--seed" => asked.seed = Some(number(value()?)?),
            "--threads" => asked.threads = number(value()?)? as usize,
            "--story" => asked.story = Some(value()?),
            "--trace" => asked.trace = true,
            "--mutation" => {
                let name = value()?;
                let known = MUTATIONS.map(|(name, _)| name).join(", ");
                let mutation = Mutation::named(&name);
                asked.mutation = Some(mutation.ok_or(format!("{name} is none of {known}"))?);
            }
            other => return Err(format!("{other}: what is that?")),
        }
    }
    Ok(asked)
}

/// Prints a story with its pictures as they come out.
fn told(path: &str) -> ExitCode {
    let story = std::fs::read_to_string(path).map_err(|error| error.to_string());
    match story.and_then(|story| tell(&story).map_err(|violation| violation.to_string())) {
        Ok(text) => {
            println!("{}", text.trim());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{path}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn main() -> ExitCode {
    let asked = match asked() {
        Ok(asked) => asked,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    if let Some(path) = &asked.story {
        return told(path);
    }
    let begun = Instant::now();
    let ended = match asked.seed {
        Some(seed) => run(seed, asked.mutation, asked.trace).map(|passed| passed.stats),
        None => {
            let every = |done: u64| {
                if done > 0 && done.is_multiple_of(1_000) {
                    let rate = done as f64 / begun.elapsed().as_secs_f64();
                    eprintln!("{done} of {} seeds, {rate:.0} a second", asked.seeds);
                }
            };
            run_many(asked.first, asked.seeds, asked.mutation, asked.threads, every)
                .map_err(|failed| *failed)
        }
    };
    match ended {
        Ok(stats) => {
            println!("{stats}; {:.1} s", begun.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(failed) => {
            println!("{failed}");
            ExitCode::FAILURE
        }
    }
}
