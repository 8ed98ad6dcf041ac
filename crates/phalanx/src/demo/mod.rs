//! `phalanx demo`: a real cluster on this machine, from nothing to a streamed answer.

mod chaos;
mod processes;
mod show;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::json;
use wire::pb;

use crate::args;
use crate::http::{Answer, Api};
use crate::model_dir::ModelDir;
use crate::operator::Operator;
use crate::process;
use processes::Processes;
use show::Show;

/// How long the ranks may take to load before the demo gives up.
const READY: Duration = Duration::from_secs(120);
/// Makes the demo's answer the same on every machine and for every number of workers.
const SEED: u64 = 4;
/// The model answers as short as its books' speeches; a show needs a few lines.
const MIN_TOKENS: u32 = 60;

/// What the model is asked unless somebody asks something else.
const PROMPT: &str = "What news of the war, my lord?";
/// And where the answer is to be disturbed.
const LONG_PROMPT: &str = "\
My lord, I come from the northern shore, where three nights we kept our watch beneath the walls. \
The first night there was rain, and nothing stirred but the sea. The second night a light went up \
on the old tower, and by it we saw their ships, more than I could number, with black sails, lying \
close under the cliff. Our captain sent two riders to the king, and neither is returned. On the \
third night, a little before the dawn, they came upon us with ladders and with fire. We threw them \
down, and they came again; we threw them down, and they came again; and when the sun was up there \
were of all our company but forty that could stand. Yet the gate is shut, and the bridge is held, \
and not a stone of the wall is theirs. The soldiers ask for bread, and for arrows, and for a word \
from you. What shall I tell them, my lord? Shall we hold the wall another night, or come away?";

/// What the model is asked.
fn prompt(args: &args::Demo) -> &str {
    args.prompt.as_deref().unwrap_or(if args.chaos { LONG_PROMPT } else { PROMPT })
}

pub(crate) async fn run(args: args::Demo) -> anyhow::Result<()> {
    ensure!(!prompt(&args).trim().is_empty(), "--prompt must not be empty");
    ensure!(args.workers > 0, "--workers must be at least 1");
    ensure!(args.max_tokens > 0, "--max-tokens must be at least 1");
    if args.chaos {
        ensure!(args.workers > 1, "--chaos needs --workers 2 or more: somebody must survive");
        ensure!(args.max_tokens >= 16, "--chaos needs --max-tokens 16 or more");
    }
    let directory = model_directory(args.model.as_deref())?;
    let model = ModelDir::open(&directory)?;
    let stripes = planner::stripes::default_count(&model.spec);
    ensure!(
        args.workers <= stripes,
        "--workers {} is more than the {stripes} stripes of the model",
        args.workers
    );
    let shutdown = process::shutdown(false)?;
    // Where workers are killed on purpose, the others need not complain about it.
    let mut processes = Processes::new(if args.chaos { "off" } else { "error" })?;
    let shown = tokio::select! {
        result = tell(&args, &model, &mut processes) => result,
        () = shutdown.cancelled() => Ok(()),
    };
    let keep = shown.is_ok() && !args.once && !args.json && !shutdown.is_cancelled();
    let ended = if keep {
        tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            error = processes.first_to_end() => Err(error),
        }
    } else {
        shown
    };
    processes.end().await;
    ended
}

/// Starts the cluster, watches it load and lets it answer.
async fn tell(
    args: &args::Demo,
    model: &ModelDir,
    processes: &mut Processes,
) -> anyhow::Result<()> {
    let show = Show::new(!args.json);
    let began = Instant::now();
    show.opening(model, args.workers);
    let coordinator = processes.coordinator(&model.path, port(args), args.workers).await?;
    let http = coordinator.http.context("the coordinator serves no HTTP")?;
    for number in 1..=args.workers {
        processes.worker(&model.path, coordinator.cluster, number).await?;
    }
    let operator = Operator::new(&processes.reach(coordinator.cluster))?;
    let status = tokio::select! {
        status = loaded(&operator, args.workers, &show) => status?,
        error = processes.first_to_end() => return Err(error),
    };
    let ready = began.elapsed();
    show.plan(&status, model)?;
    if args.chaos {
        chaos::tell(args, (&operator, http, &status), processes, &show).await?;
        if !args.once && !args.json {
            show.next(http, &model.name);
        }
        return Ok(());
    }
    show.question(prompt(args));
    let (answer, timing) = ask(args, http, &show).await?;
    ensure!(!answer.text.is_empty(), "the model answered nothing");
    let digest = blake3::hash(answer.text.as_bytes()).to_hex().to_string();
    if args.json {
        let line = json!({
            "text": answer.text,
            "digest": digest,
            "finish_reason": answer.finish_reason,
            "model": model.name,
            "ranks": args.workers,
            "stripes": status.groups.first().and_then(|g| g.plan.as_ref()).map(|p| p.stripes),
            "tokens": answer.tokens,
            "tokens_per_second": timing.tokens_per_second(answer.tokens),
            "time_to_first_token_ms": timing.first.as_secs_f64() * 1e3,
            "ready_ms": ready.as_secs_f64() * 1e3,
        });
        process::line(&line.to_string()).context("standard output")?;
    } else {
        show.figures(&answer, &timing, &digest, ready);
        if !args.once {
            show.next(http, &model.name);
        }
    }
    Ok(())
}

/// When an answer's text came.
struct Timing {
    /// From the request to the first text.
    first: Duration,
    /// From the first text to the end.
    rest: Duration,
}

impl Timing {
    /// Tokens after the first one, per second.
    fn tokens_per_second(&self, tokens: u64) -> f64 {
        tokens.saturating_sub(1) as f64 / self.rest.as_secs_f64().max(1e-9)
    }
}

/// What the model is asked.
async fn question(args: &args::Demo, api: &Api) -> anyhow::Result<serde_json::Value> {
    Ok(json!({
        "model": api_model(api).await?,
        "messages": [{"role": "user", "content": prompt(args)}],
        "max_tokens": args.max_tokens,
        "min_tokens": MIN_TOKENS.min(args.max_tokens),
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": SEED,
        "stream": true,
        "stream_options": {"include_usage": true},
    }))
}

async fn ask(args: &args::Demo, http: SocketAddr, show: &Show) -> anyhow::Result<(Answer, Timing)> {
    let api = Api::new(&format!("http://{http}"));
    let body = question(args, &api).await?;
    let show = show.clone();
    tokio::task::spawn_blocking(move || {
        let began = Instant::now();
        let mut first = None;
        let answer = api.chat(&body, &mut |text| {
            first.get_or_insert_with(Instant::now);
            show.piece(text);
        })?;
        let first = first.unwrap_or_else(Instant::now);
        let timing = Timing { first: first - began, rest: first.elapsed() };
        Ok((answer, timing))
    })
    .await
    .context("the request was interrupted")?
}

async fn api_model(api: &Api) -> anyhow::Result<String> {
    let api = api.clone();
    tokio::task::spawn_blocking(move || api.first_model()).await.context("interrupted")?
}

/// Waits until the group serves, showing how each rank loads.
async fn loaded(
    operator: &Operator,
    workers: usize,
    show: &Show,
) -> anyhow::Result<pb::StatusReply> {
    let bars = show.bars(workers);
    let deadline = Instant::now() + READY;
    let mut waiting = String::new();
    while Instant::now() < deadline {
        // The coordinator may still be starting.
        if let Ok(status) = operator.status(true).await {
            bars.update(&status);
            if status.groups.iter().any(|group| group.phase == "serving") {
                bars.finish();
                return Ok(status);
            }
            let deployment = status.deployments.into_iter().next();
            waiting = deployment.map(|one| one.waiting_for).unwrap_or_default();
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    bail!("the cluster was not ready after {} s: {waiting}", READY.as_secs())
}

/// The usual port, or a free one where it is taken and nobody asked for it.
fn port(args: &args::Demo) -> u16 {
    match args.port {
        Some(port) => port,
        None if args.once || args.json => 0,
        None => match std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 8000)) {
            Ok(_) => 8000,
            Err(_) => 0,
        },
    }
}

/// The directory asked for, or `models/demo` here, above here, or above the binary.
fn model_directory(wanted: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(wanted) = wanted {
        return Ok(wanted.to_owned());
    }
    let here = std::env::current_dir().context("the current directory")?;
    let binary = std::env::current_exe().context("the path of this program")?;
    here.ancestors()
        .chain(binary.ancestors())
        .map(|above| above.join("models/demo"))
        .find(|candidate| candidate.join("config.json").is_file())
        .context("models/demo is not here; run in the source tree or give --model DIR")
}
