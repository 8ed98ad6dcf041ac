//! `phalanx demo --chaos`: the same question twice, and a worker killed in the middle of the
//! second answer.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::json;
use tokio::sync::mpsc;
use wire::pb;

use super::processes::Processes;
use super::show::Show;
use crate::args;
use crate::http::{Answer, Api};
use crate::operator::Operator;
use crate::process;

/// The kill comes when this part of the answer's tokens has come.
const KILL_AT: u32 = 3;
/// How long the cluster's own story may take to arrive after the answer has.
const STORY: Duration = Duration::from_secs(10);

/// Something that happened, and when after the kill.
struct Moment {
    at: Duration,
    what: String,
}

/// Who is killed.
struct Victim {
    /// Its process.
    name: String,
    node: u64,
    stripes: Vec<u32>,
    /// What it had read of the model's files.
    bytes: u64,
}

/// What came of it.
struct Outcome {
    victim: Victim,
    digests: [String; 2],
    /// As far as it came.
    answer: Answer,
    /// What the client saw instead of the rest, where it saw an error.
    error: Option<String>,
    /// Between the last token before the kill and the first one after.
    pause: Duration,
    bytes_read: u64,
    ranks_left: usize,
    timeline: Vec<Moment>,
}

/// Asks twice, kills in between, and says what it saw.
///
/// # Errors
/// An answer differs from the other, or the client saw an error.
pub(super) async fn tell(
    args: &args::Demo,
    (operator, http, status): (&Operator, SocketAddr, &pb::StatusReply),
    processes: &mut Processes,
    show: &Show,
) -> anyhow::Result<()> {
    let victim = victim(status).context("no group serves")?;
    show.note("\nFirst, undisturbed.");
    show.question(super::prompt(args));
    let (gold, _) = super::ask(args, http, show).await?;
    show.note(&format!(
        "\n\nOnce more; after a third of it, {} is killed with kill -9. It leads the group.",
        victim.name
    ));
    show.question(super::prompt(args));
    let outcome = disturb(args, (operator, http), processes, show, victim, &gold).await?;
    let same = outcome.error.is_none() && outcome.answer == gold;
    if args.json {
        process::line(&as_json(&outcome, same).to_string()).context("standard output")?;
    } else {
        tale(&outcome, same).iter().for_each(|line| show.note(line));
    }
    if let Some(error) = &outcome.error {
        bail!("the client saw an error: {error}");
    }
    ensure!(same, "the disturbed answer is not the undisturbed one");
    Ok(())
}

/// The worker of rank 0, which schedules: nobody is missed more.
fn victim(status: &pb::StatusReply) -> Option<Victim> {
    let group = status.groups.iter().find(|group| group.phase == "serving")?;
    let rank = group.plan.as_ref()?.ranks.first()?;
    let node = status.nodes.iter().find(|node| node.node == rank.node)?;
    let loaded = group.progress.iter().find(|one| one.rank == rank.rank);
    Some(Victim {
        name: node.name.clone(),
        node: rank.node,
        stripes: rank.stripes.clone(),
        bytes: loaded.map_or(0, |one| one.bytes_read),
    })
}

async fn disturb(
    args: &args::Demo,
    (operator, http): (&Operator, SocketAddr),
    processes: &mut Processes,
    show: &Show,
    victim: Victim,
    gold: &Answer,
) -> anyhow::Result<Outcome> {
    let mut news = operator.watch().await?;
    let api = Api::new(&format!("http://{http}"));
    let body = super::question(args, &api).await?;
    let kill_at = u32::try_from(gold.tokens).unwrap_or(u32::MAX) / KILL_AT;
    let (pieces, mut coming) = mpsc::unbounded_channel();
    let shown = show.clone();
    let asking = tokio::task::spawn_blocking(move || {
        api.chat(&body, &mut |text| {
            shown.piece(text);
            // Whoever counts may have seen enough.
            let _ = pieces.send((Instant::now(), text.to_owned()));
        })
    });
    let (mut arrivals, mut came) = (Vec::new(), String::new());
    while let Some((arrival, text)) = coming.recv().await {
        arrivals.push(arrival);
        came.push_str(&text);
        if arrivals.len() as u64 >= u64::from(kill_at) {
            break;
        }
    }
    ensure!(!asking.is_finished(), "the answer was over before the worker could be killed");
    let killed = Instant::now();
    processes.kill(&victim.name).await?;
    show.piece(&format!(" [{} is killed] ", victim.name));
    let mut story = Story { killed, victim: victim.node, seen: Vec::new(), timeline: Vec::new() };
    let mut latest = None;
    let end = loop {
        tokio::select! {
            arrival = coming.recv() => match arrival {
                Some((arrival, text)) => {
                    arrivals.push(arrival);
                    came.push_str(&text);
                }
                None => break Instant::now(),
            },
            Ok(Some(status)) = news.message() => {
                story.add(&status);
                latest = Some(status);
            }
        }
    };
    let asked = asking.await.context("the request was interrupted")?;
    let (answer, error) = or_partial(asked, came, arrivals.len());
    // The answer may be through before the cluster has told everything.
    while end.elapsed() < STORY && !latest.as_ref().is_some_and(serves) {
        let Ok(Ok(Some(status))) = tokio::time::timeout(STORY, news.message()).await else { break };
        story.add(&status);
        latest = Some(status);
    }
    let pause = pause(&arrivals, killed);
    let (bytes_read, ranks_left) = repaired(&operator.status(true).await?);
    let mut timeline = story.timeline;
    if let Some(next) = arrivals.iter().find(|arrival| **arrival > killed + pause / 2) {
        let what = "the next token reaches the client".to_owned();
        timeline.push(Moment { at: *next - killed, what });
    }
    timeline.sort_by_key(|moment| moment.at);
    let digest = |answer: &Answer| blake3::hash(answer.text.as_bytes()).to_hex().to_string();
    let digests = [digest(gold), digest(&answer)];
    Ok(Outcome { victim, digests, answer, error, pause, bytes_read, ranks_left, timeline })
}

/// An answer, or as much of it as came and the error that the client saw.
fn or_partial(
    asked: anyhow::Result<Answer>,
    text: String,
    pieces: usize,
) -> (Answer, Option<String>) {
    match asked {
        Ok(answer) => (answer, None),
        Err(error) => {
            let partial = Answer { text, tokens: pieces as u64, ..Answer::default() };
            (partial, Some(format!("{error:#}")))
        }
    }
}

fn serves(status: &pb::StatusReply) -> bool {
    status.groups.iter().any(|group| group.phase == "serving" && group.epoch > 1)
}

/// The longest that the client waited for a piece which came after the kill.
fn pause(arrivals: &[Instant], killed: Instant) -> Duration {
    let gaps = arrivals.windows(2).filter(|pair| pair[1] > killed);
    gaps.map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}

/// Bytes that the ranks of the group read to form anew, and how many ranks there are.
fn repaired(status: &pb::StatusReply) -> (u64, usize) {
    let serving = status.groups.iter().find(|group| group.phase == "serving");
    let read = serving.map_or(0, |group| group.progress.iter().map(|one| one.bytes_read).sum());
    let plan = serving.and_then(|group| group.plan.as_ref());
    (read, plan.map_or(0, |plan| plan.ranks.len()))
}

/// The cluster's own account, as its state changes.
struct Story {
    killed: Instant,
    victim: u64,
    /// What was told already.
    seen: Vec<String>,
    timeline: Vec<Moment>,
}

impl Story {
    fn add(&mut self, status: &pb::StatusReply) {
        let at = self.killed.elapsed();
        let node = status.nodes.iter().find(|node| node.node == self.victim);
        if let Some(node) = node.filter(|node| ["suspect", "lost"].contains(&&*node.standing)) {
            self.tell(at, format!("the cluster calls {} {}", node.name, node.standing));
        }
        for group in &status.groups {
            let epoch = group.epoch;
            // The state of a moment may have passed before it could be told; the reason stays.
            if epoch > 1 && !group.reason.is_empty() {
                self.tell(at, format!("epoch {} is fenced: {}", epoch - 1, group.reason));
            }
            match group.phase.as_str() {
                "forming" | "loading" if epoch > 1 => {
                    let plan = holdings(group, &status.nodes);
                    self.tell(at, format!("epoch {epoch} is planned: {plan}"));
                }
                "serving" if epoch > 1 => self.tell(at, format!("epoch {epoch} serves")),
                _ => {}
            }
        }
    }

    fn tell(&mut self, at: Duration, what: String) {
        if !self.seen.contains(&what) {
            self.seen.push(what.clone());
            self.timeline.push(Moment { at, what });
        }
    }
}

/// Who holds which stripes.
fn holdings(group: &pb::GroupStatus, nodes: &[pb::NodeStatus]) -> String {
    let ranks = group.plan.iter().flat_map(|plan| &plan.ranks);
    let one = |rank: &pb::RankPlan| {
        let name = nodes.iter().find(|node| node.node == rank.node).map(|node| node.name.as_str());
        let name = name.unwrap_or("a worker");
        format!("{name} holds {}", crate::status::runs(&rank.stripes))
    };
    ranks.map(one).collect::<Vec<_>>().join(", ")
}

/// To a tenth: what is below is noise.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e4).round() / 10.0
}

fn as_json(outcome: &Outcome, same: bool) -> serde_json::Value {
    let timeline = outcome.timeline.iter();
    let timeline = timeline.map(|one| json!({"ms": milliseconds(one.at), "what": one.what}));
    json!({
        "same": same,
        "error": outcome.error,
        "digest_undisturbed": outcome.digests[0],
        "digest_disturbed": outcome.digests[1],
        "text": outcome.answer.text,
        "tokens": outcome.answer.tokens,
        "killed": outcome.victim.name,
        "ranks_left": outcome.ranks_left,
        "pause_ms": milliseconds(outcome.pause),
        "bytes_lost": outcome.victim.bytes,
        "bytes_read_again": outcome.bytes_read,
        "timeline": timeline.collect::<Vec<_>>(),
    })
}

/// The show's last act, line by line.
fn tale(outcome: &Outcome, same: bool) -> Vec<String> {
    let stripes = crate::status::runs(&outcome.victim.stripes);
    let mut lines = vec![
        String::new(),
        String::new(),
        "What happened".to_owned(),
        format!("  {:>9}  {} dies, and with it stripes {stripes}", "0.0 ms", outcome.victim.name),
    ];
    for Moment { at, what } in &outcome.timeline {
        lines.push(format!("  {:>6.1} ms  {what}", milliseconds(*at)));
    }
    lines.push(String::new());
    let left = match outcome.ranks_left {
        1 => "one rank is left".to_owned(),
        ranks => format!("{ranks} ranks are left"),
    };
    let pause = milliseconds(outcome.pause);
    lines.push(match &outcome.error {
        None => format!("The client waited {pause:.0} ms and saw no error; {left}."),
        Some(error) => format!("The client saw an error, which must never be: {error}; {left}."),
    });
    lines.push(format!(
        "{} KiB of the model went with the worker, and {} KiB were read again.",
        outcome.victim.bytes >> 10,
        outcome.bytes_read >> 10,
    ));
    lines.push(format!("  undisturbed  {:.32}", outcome.digests[0]));
    lines.push(format!("  disturbed    {:.32}", outcome.digests[1]));
    lines.push(match same {
        true => "The same, to the last byte.".to_owned(),
        false => "They differ, which must never be.".to_owned(),
    });
    lines
}
