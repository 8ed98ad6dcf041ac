//! Faults that go on for minutes: churn, workers that stand still, far more load than there is
//! room for. Most have a short form in the ordinary suite; the long ones are run by
//! `cargo test -p phalanx --test e2e -- --ignored --nocapture chaos::`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Cluster, Http, Process, demo_model};
use crate::survive::{Clients, Dice, Ward, gold, percentile, signal};

/// Descriptors that connections which come and go by themselves may differ by.
const DESCRIPTORS: usize = 6;
/// Restarts of the short form of churn, and of the long one: five minutes at ten seconds each.
const CHURN: (u64, u64) = (3, 30);
/// Restarts before anything is measured: by then the worker that stays has held the whole model.
const WARM: u64 = 2;
/// Between two restarts of the long form.
const EVERY: Duration = Duration::from_secs(10);
/// Workers that the long form stops and continues.
const STOPS: usize = 100;
/// Clients at once that give the group as much as it can do.
const SATURATING: usize = 16;
/// And that many times as many.
const OVERLOAD: usize = 50;

/// What a process takes.
#[derive(Debug, Clone, Copy)]
struct Usage {
    /// KiB of memory.
    resident: u64,
    descriptors: usize,
}

impl Usage {
    fn of(process: &Process) -> Self {
        let at = format!("/proc/{}", process.id());
        let status = std::fs::read_to_string(format!("{at}/status")).expect("a process that runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok());
        let resident = resident.unwrap_or_else(|| panic!("no VmRSS in {status}"));
        let descriptors = std::fs::read_dir(format!("{at}/fd")).expect("its descriptors").count();
        Self { resident, descriptors }
    }
}

/// Kills one worker and starts it again, so many times, under mixed load; afterwards nothing that
/// was taken for it is left with those that stayed.
fn churn(restarts: u64, every: Duration) {
    let mut ward = Ward::start(2, 1);
    let http = ward.http();
    let gold = gold(&http);
    let mut victim = 0;
    let mut restart = |ward: &mut Ward, clients: &Clients| {
        let began = Instant::now();
        // The last worker and the coordinator stay.
        let holds = ward.holders();
        victim = holds.into_iter().find(|one| *one < 2 && *one != victim).unwrap_or(1 - victim);
        ward.kill(victim);
        std::thread::sleep(every.min(Duration::from_millis(500)));
        ward.revive(victim);
        let before = clients.count();
        http.wait("to go on", || clients.count() > before || clients.broken());
        assert!(!clients.broken(), "a client ended");
        std::thread::sleep(every.saturating_sub(began.elapsed()));
    };
    // Everything that is allocated once is, before what there is is written down.
    let clients = Clients::start(&http, &gold, 6);
    (0..WARM).for_each(|_| restart(&mut ward, &clients));
    clients.end();
    let before = at_rest(&ward);
    let clients = Clients::start(&http, &gold, 6);
    (0..restarts).for_each(|_| restart(&mut ward, &clients));
    let (answers, _) = clients.end();
    let mut after = at_rest(&ward);
    http.wait("to let go of descriptors", || {
        after = at_rest(&ward);
        let few = |(one, other): (&Usage, &Usage)| {
            one.descriptors.abs_diff(other.descriptors) <= DESCRIPTORS
        };
        before.iter().zip(&after).all(few)
    });
    println!("{restarts} restarts, {answers} answers");
    for ((who, before), after) in ["coordinator", "worker-3"].iter().zip(&before).zip(&after) {
        println!("{who}: before {before:?}, after {after:?}");
    }
}

/// What those that stay take, once all is whole and nothing is done.
fn at_rest(ward: &Ward) -> [Usage; 2] {
    ward.whole();
    let http = ward.http();
    http.wait("to be idle", || http.metric("phalanx_kv_blocks_used") == 0.0);
    assert_eq!(http.metric("phalanx_integrity"), 1.0);
    [&ward.coordinator, ward.workers[2].as_ref().expect("it stays")].map(Usage::of)
}

#[test]
fn restarts_leave_nothing_behind() {
    churn(CHURN.0, Duration::from_secs(2));
}

/// The long form: five minutes.
#[test]
#[ignore = "takes minutes"]
fn five_minutes_of_churn() {
    churn(CHURN.1, EVERY);
}

/// Stops random ranks for 0.1 to 5 s and lets them go on, under load.
fn stops(trials: usize) {
    let ward = Ward::start(2, 1);
    let http = ward.http();
    let gold = gold(&http);
    let clients = Clients::start(&http, &gold, 4);
    let mut dice = Dice(0x57a1);
    for trial in 0..trials {
        let answered = clients.count();
        http.wait("to answer", || clients.count() > answered || clients.broken());
        let holders = ward.holders();
        if holders.is_empty() {
            continue;
        }
        let picked = usize::try_from(dice.below(holders.len() as u64)).expect("small");
        let victim = ward.workers[holders[picked]].as_ref().expect("a worker");
        signal(victim, "-STOP");
        std::thread::sleep(Duration::from_millis(100 + dice.below(4_900)));
        signal(victim, "-CONT");
        assert!(!clients.broken(), "a client ended in trial {trial}");
    }
    let answered = clients.count();
    http.wait("to go on", || clients.count() >= answered + 8 || clients.broken());
    let (answers, _) = clients.end();
    println!(
        "{trials} trials, {answers} answers, each with the bytes of the undisturbed one; {} \
         sequences resumed, {} tokens and {} calls of another epoch refused",
        http.metric("phalanx_sequences_resumed_total"),
        http.metric("phalanx_stale_tokens_total"),
        http.metric("phalanx_stale_calls_total"),
    );
    ward.whole();
    http.wait("to be idle", || http.metric("phalanx_kv_blocks_used") == 0.0);
}

/// The long form: about seven minutes.
#[test]
#[ignore = "takes minutes"]
fn a_hundred_workers_that_stand_still() {
    stops(STOPS);
}

/// What clients were told, and how many tokens they got whole.
#[derive(Default)]
struct Told {
    tokens: AtomicU64,
    answers: AtomicUsize,
    refused: AtomicUsize,
    /// Anything that is no answer and no refusal as it should be.
    wrong: AtomicUsize,
}

/// So many clients that ask again as soon as they are answered, or when a refusal says so.
struct Crowd {
    stop: Arc<AtomicBool>,
    told: Arc<Told>,
    threads: Vec<JoinHandle<()>>,
}

impl Crowd {
    fn start(http: &Http, count: usize) -> Self {
        let (stop, told) = (Arc::new(AtomicBool::new(false)), Arc::new(Told::default()));
        let client = |number: usize| {
            let (http, stop, told) = (http.clone(), Arc::clone(&stop), Arc::clone(&told));
            let work = move || {
                while !stop.load(Ordering::SeqCst) {
                    ask(&http, number, &told);
                }
            };
            let thread = std::thread::Builder::new().stack_size(256 << 10);
            thread.spawn(work).expect("a thread")
        };
        let threads = (0..count).map(client).collect();
        Self { stop, told, threads }
    }

    /// Tokens per second of whole answers within the next `time`, from now on.
    fn goodput(&self, time: Duration) -> f64 {
        let (before, began) = (self.told.tokens.load(Ordering::SeqCst), Instant::now());
        std::thread::sleep(time);
        let tokens = self.told.tokens.load(Ordering::SeqCst) - before;
        f64::from(u32::try_from(tokens).expect("few tokens")) / began.elapsed().as_secs_f64()
    }

    fn end(self) -> Arc<Told> {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|thread| thread.join().expect("a client"));
        self.told
    }
}

/// One request, whole.
fn ask(http: &Http, number: usize, told: &Told) {
    let body = json!({"model": "demo", "prompt": format!("Say {number}:"), "max_tokens": 24,
                      "temperature": 0, "ignore_eos": true});
    match http.try_post("/v1/completions", &body) {
        Some((200, _, text)) => {
            let answer: Value = serde_json::from_str(&text).expect("an answer in JSON");
            let tokens = answer["usage"]["completion_tokens"].as_u64().expect("a count");
            told.tokens.fetch_add(tokens, Ordering::SeqCst);
            told.answers.fetch_add(1, Ordering::SeqCst);
        }
        Some((429 | 503, Some(seconds), _)) => {
            told.refused.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_secs(seconds));
        }
        other => {
            let first = told.wrong.fetch_add(1, Ordering::SeqCst) == 0;
            if first {
                println!("neither an answer nor a refusal: {other:?}");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// How long health takes to answer, until told to stop: by path, ascending; how many were not 200.
fn probes(http: &Http, path: &'static str, stop: &AtomicBool) -> (Vec<Duration>, usize) {
    let (mut times, mut bad) = (Vec::new(), 0);
    while !stop.load(Ordering::SeqCst) {
        let began = Instant::now();
        let status = http.status_within(path, Duration::from_secs(10));
        times.push(began.elapsed());
        bad += usize::from(status != Some(200));
        std::thread::sleep(Duration::from_millis(100));
    }
    times.sort();
    (times, bad)
}

/// Fifty times the load that saturates, for a minute.
#[test]
#[ignore = "takes minutes"]
fn fifty_times_too_much() {
    let cluster = Cluster::start(&demo_model(), 1, &["--max-num-seqs", "16"]);
    let http = cluster.http();
    let usage = || (Usage::of(&cluster.coordinator), Usage::of(&cluster.workers[0]));
    let crowd = Crowd::start(&http, SATURATING);
    crowd.goodput(Duration::from_secs(5));
    let peak = crowd.goodput(Duration::from_secs(20));
    assert_eq!(crowd.end().wrong.load(Ordering::SeqCst), 0);
    let calm = usage();
    let crowd = Crowd::start(&http, SATURATING * OVERLOAD);
    crowd.goodput(Duration::from_secs(10));
    let early = usage();
    let stop = AtomicBool::new(false);
    let (goodput, live, ready) = std::thread::scope(|scope| {
        let live = scope.spawn(|| probes(&http, "/livez", &stop));
        let ready = scope.spawn(|| probes(&http, "/readyz", &stop));
        let goodput = crowd.goodput(Duration::from_secs(60));
        stop.store(true, Ordering::SeqCst);
        (goodput, live.join().expect("probes"), ready.join().expect("probes"))
    });
    let late = usage();
    let told = crowd.end();
    let count = |counter: &AtomicUsize| counter.load(Ordering::SeqCst);
    println!(
        "peak {peak:.0} tokens/s, under {OVERLOAD} times the load {goodput:.0}: {:.2} of it; {} \
         answers, {} refused, {} wrong",
        goodput / peak,
        count(&told.answers),
        count(&told.refused),
        count(&told.wrong)
    );
    for (path, (times, bad)) in [("/livez", &live), ("/readyz", &ready)] {
        let [p50, p99] = [50, 99].map(|percent| percentile(times, percent));
        println!("{path}: {} probes, {bad} not 200, p50 {p50:?}, p99 {p99:?}", times.len());
    }
    println!("coordinator and worker: calm {calm:?}, early {early:?}, late {late:?}");
    assert_eq!(count(&told.wrong), 0, "an answer that is none");
    assert_eq!((live.1, ready.1), (0, 0), "busy was reported dead");
    let bounded = |early: Usage, late: Usage| late.resident < early.resident * 3 / 2 + (64 << 10);
    assert!(bounded(early.0, late.0) && bounded(early.1, late.1), "memory grows");
    http.wait("to be idle", || http.metric("phalanx_kv_blocks_used") == 0.0);
    assert_eq!(http.metric("phalanx_integrity"), 1.0);
}
