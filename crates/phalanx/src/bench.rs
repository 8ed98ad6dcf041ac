//! `phalanx bench`: speed beside what the machine can do, for people and for programs.

use std::time::Duration;

use ::worker::bench::{self, Case, Figure, Plan};
use anyhow::{Context, ensure};
use model::ComputeType;
use serde_json::{Value, json};

use crate::args::{self, Kept, Output};
use crate::config;
use crate::model_dir::ModelDir;
use crate::process;

/// The header of the table, as wide as [`row`].
const HEADER: &str = "compute ranks x threads  case                     tokens/s    [min - max]  \
                      limit  share  read GB/s  f32 GFLOP/s  int8 GOP/s  collectives";

pub(crate) fn run(args: &args::Bench) -> anyhow::Result<()> {
    ensure!(args.repeat > 0, "--repeat must be at least 1");
    ensure!(args.steps > 0, "--steps must be at least 1");
    let model = ModelDir::open(&args.model)?;
    let kernels = args.kernels.as_deref().map(str::parse).transpose().context("--kernels")?;
    let table = args.output == Output::Table;
    if table {
        process::line(HEADER)?;
    }
    let mut runs = Vec::new();
    for &kept in &args.compute {
        for &ranks in &args.ranks {
            let plan = Plan {
                directory: model.path.clone(),
                spec: model.spec.clone(),
                compute: compute(kept),
                ranks,
                threads: config::threads(args.threads, ranks)?,
                kernels,
                cases: cases(args),
                repeat: args.repeat,
                steps: args.steps,
            };
            let mut failed = Ok(());
            let outcome = bench::bench(&plan, &mut |figure| {
                if table && failed.is_ok() {
                    failed = process::line(&row(&plan, figure));
                }
            });
            let outcome = outcome?;
            failed.context("standard output")?;
            runs.push(json(&plan, outcome.loading, &outcome.figures));
        }
    }
    if !table {
        let report = json!({ "model": model.name, "runs": runs });
        process::line(&report.to_string()).context("standard output")?;
    }
    Ok(())
}

fn compute(kept: Kept) -> ComputeType {
    match kept {
        Kept::F32 => ComputeType::F32,
        Kept::Bf16 => ComputeType::Bf16,
        Kept::Q8 => ComputeType::Int8,
        Kept::Q4 => ComputeType::Int4,
    }
}

/// What is run: zeros leave a case out.
fn cases(args: &args::Bench) -> Vec<Case> {
    let given = |list: &[usize]| list.iter().copied().filter(|n| *n > 0).collect::<Vec<_>>();
    let context = args.context;
    let mut cases: Vec<_> =
        given(&args.prefill).into_iter().map(|tokens| Case::Prefill { tokens }).collect();
    let decode = given(&args.decode).into_iter();
    cases.extend(decode.map(|sequences| Case::Decode { sequences, context }));
    let depth = given(&args.depth).into_iter();
    cases.extend(depth.map(|context| Case::Decode { sequences: 1, context }));
    cases
}

fn name(case: Case) -> String {
    match case {
        Case::Prefill { tokens } => format!("prefill {tokens}"),
        Case::Decode { sequences, context } => format!("decode {sequences} at {context}"),
    }
}

fn row(plan: &Plan, figure: &Figure) -> String {
    let rates = &figure.rates;
    let [least, most] = [rates.first(), rates.last()].map(|rate| rate.copied().unwrap_or(0.0));
    let limits = &figure.limits;
    format!(
        "{:<7} {:>5} x {:<7}  {:<22} {:>10.2} {:>14}  {:>5.0}  {:>4.0}%  {:>9.1}  {:>11.0}  \
         {:>10.0}  {:>10.1}%",
        plan.compute.name(),
        plan.ranks,
        plan.threads,
        name(figure.case),
        figure.rate(),
        format!("{least:.1} - {most:.1}"),
        figure.bound.rate(),
        figure.share() * 100.0,
        limits.read / 1e9,
        limits.float / 1e9,
        limits.int8 / 1e9,
        figure.collectives * 100.0,
    )
}

fn json(plan: &Plan, loading: Duration, figures: &[Figure]) -> Value {
    json!({
        "compute": plan.compute.name(),
        "ranks": plan.ranks,
        "threads": plan.threads,
        "loading_seconds": loading.as_secs_f64(),
        "cases": figures.iter().map(figure_json).collect::<Vec<_>>(),
    })
}

fn figure_json(figure: &Figure) -> Value {
    let (limits, bound) = (&figure.limits, &figure.bound);
    let case = match figure.case {
        Case::Prefill { tokens } => json!({ "prefill": tokens }),
        Case::Decode { sequences, context } => {
            json!({ "sequences": sequences, "context": context })
        }
    };
    json!({
        "case": case,
        "tokens_per_second": figure.rate(),
        "all": figure.rates,
        "limit_tokens_per_second": bound.rate(),
        "share_of_limit": figure.share(),
        "share_in_collectives": figure.collectives,
        "bytes_per_step": bound.bytes,
        "operations_per_step": bound.operations,
        "machine": {
            "kernels": limits.class.to_string(),
            "threads": limits.threads,
            "read_bytes_per_second": limits.read,
            "f32_operations_per_second": limits.float,
            "int8_operations_per_second": limits.int8,
        },
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Args, Command};

    #[test]
    fn zeros_leave_cases_out() {
        let cases = |line: &str| {
            let args = Args::parse_from(line.split(' '));
            let Command::Bench(args) = args.command else { unreachable!("typed as bench") };
            cases(&args).into_iter().map(name).collect::<Vec<_>>()
        };
        let all = ["prefill 512", "decode 1 at 128", "decode 8 at 128", "decode 32 at 128"];
        assert_eq!(cases("phalanx bench m"), all);
        let few = cases("phalanx bench m --prefill 0 --decode 4 --context 9 --depth 7,0");
        assert_eq!(few, ["decode 4 at 9", "decode 1 at 7"]);
    }
}
