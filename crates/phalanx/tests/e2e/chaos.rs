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
/// Restarts before anything is measured.
const WARM: u64 = 2;
/// What the memory of a process at rest may grow by under churn, in KiB, beside doubling: caches
/// and weights come and go with every group, and the allocator keeps some of what was freed.
const SLACK: u64 = 24 << 10;
/// Between two restarts of the long form.
const EVERY: Duration = Duration::from_secs(10);
/// Clusters side by side, and workers that the long form stops and continues in each.
const STOPS: (u64, usize) = (4, 250);
/// Clients at once that give the group as much as it can do.
const SATURATING: usize = 16;
/// And that many times as many.
const OVERLOAD: usize = 50;
/// More clients than a group's queue has places and the gateway has connections.
const CROWD: usize = 2_400;
/// How long overload and saturation last.
const OVERLOADED: Duration = Duration::from_secs(300);
const SATURATION: Duration = Duration::from_secs(600);

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

    /// Whether, under load all the while, it did not grow on and on since `early`.
    fn bounded_by(self, early: Self) -> bool {
        self.resident < early.resident * 3 / 2 + (64 << 10)
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
    // Everything that is allocated once is, before what there is is written down: the worker that
    // stays has held the whole model by then.
    let clients = Clients::start(&http, &gold, 6);
    (0..WARM).for_each(|_| restart(&mut ward, &clients));
    [0, 1].into_iter().for_each(|worker| ward.kill(worker));
    http.wait("to go on with one worker", || ward.holders() == [2] || clients.broken());
    let answered = clients.count();
    http.wait("to answer", || clients.count() > answered + 6 || clients.broken());
    [0, 1].into_iter().for_each(|worker| ward.revive(worker));
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
        assert!(after.resident <= 2 * before.resident + SLACK, "{who} keeps memory");
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

/// Stops random ranks and lets them go on, under load: mostly for about a second, where it is open
/// who is first, at times for 5 s, and now and then for 30 s.
fn stops(trials: usize, seed: u64) {
    let ward = Ward::start(2, 1);
    let http = ward.http();
    let gold = gold(&http);
    let clients = Clients::start(&http, &gold, 4);
    let mut dice = Dice(seed);
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
        std::thread::sleep(Duration::from_millis(match dice.below(100) {
            0 => 30_000,
            1..10 => 5_000,
            _ => 100 + dice.below(1_400),
        }));
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

/// The long form: about twenty minutes.
#[test]
#[ignore = "takes minutes"]
fn a_thousand_workers_that_stand_still() {
    std::thread::scope(|scope| {
        for ward in 0..STOPS.0 {
            scope.spawn(move || stops(STOPS.1, 0x57a1 + ward));
        }
    });
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

impl Told {
    fn count(&self) -> [usize; 3] {
        [&self.answers, &self.refused, &self.wrong].map(|count| count.load(Ordering::SeqCst))
    }
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

/// Health while clients do their worst, for so long: how many of a thousand probes of `/livez` and
/// `/readyz` were not 200, the worse of both; and the tokens per second of whole answers.
fn watched(http: &Http, crowd: &Crowd, time: Duration) -> (usize, f64) {
    let stop = AtomicBool::new(false);
    let (goodput, told) = std::thread::scope(|scope| {
        let paths = ["/livez", "/readyz"];
        let probing = paths.map(|path| (path, scope.spawn(|| probes(http, path, &stop))));
        let goodput = crowd.goodput(time);
        stop.store(true, Ordering::SeqCst);
        (goodput, probing.map(|(path, thread)| (path, thread.join().expect("probes"))))
    });
    let mut worst = 0;
    for (path, (times, bad)) in told {
        let [p50, p99] = [50, 99].map(|percent| percentile(&times, percent));
        println!("{path}: {} probes, {bad} not 200, p50 {p50:?}, p99 {p99:?}", times.len());
        worst = worst.max((bad * 1_000).div_ceil(times.len().max(1)));
    }
    (worst, goodput)
}

/// Ten minutes of as much as a group of two ranks can do.
#[test]
#[ignore = "takes minutes"]
fn ten_minutes_of_saturation() {
    let cluster = Cluster::start(&demo_model(), 2, &["--max-num-seqs", "16"]);
    let http = cluster.http();
    let crowd = Crowd::start(&http, 2 * SATURATING);
    let (bad, goodput) = watched(&http, &crowd, SATURATION);
    let [answers, refused, wrong] = crowd.end().count();
    println!("{goodput:.0} tokens/s, {answers} answers, {refused} refused, {wrong} wrong");
    assert_eq!((refused, wrong, bad), (0, 0, 0));
}

/// Fifty times the load that saturates, for five minutes.
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
    let (bad, goodput) = watched(&http, &crowd, OVERLOADED);
    let late = usage();
    let [answers, refused, wrong] = crowd.end().count();
    let share = goodput / peak;
    println!(
        "peak {peak:.0} tokens/s, under {OVERLOAD} times the load {goodput:.0}: {share:.2} of it; \
         {answers} answers, {refused} refused, {wrong} wrong"
    );
    println!("coordinator and worker: calm {calm:?}, early {early:?}, late {late:?}");
    assert_eq!(bad, 0, "busy was reported dead");
    assert_eq!(wrong, 0, "an answer that is none");
    assert!(late.0.bounded_by(early.0) && late.1.bounded_by(early.1), "memory grows");
    http.wait("to be idle", || http.metric("phalanx_kv_blocks_used") == 0.0);
    assert_eq!(http.metric("phalanx_integrity"), 1.0);
}

/// More clients than a group's queue and the gateway have places.
#[test]
#[ignore = "takes minutes"]
fn more_clients_than_places() {
    let cluster = Cluster::start(&demo_model(), 1, &["--max-num-seqs", "16"]);
    let http = cluster.http();
    let usage = || (Usage::of(&cluster.coordinator), Usage::of(&cluster.workers[0]));
    let crowd = Crowd::start(&http, SATURATING * OVERLOAD);
    let peak = crowd.goodput(Duration::from_secs(30));
    let late = usage();
    crowd.end();
    let crowd = Crowd::start(&http, CROWD);
    crowd.goodput(Duration::from_secs(10));
    let (bad, goodput) = watched(&http, &crowd, Duration::from_secs(60));
    let most = usage();
    let [answers, refused, wrong] = crowd.end().count();
    println!(
        "{CROWD} clients: {:.2} of the peak; {answers} answers, {refused} refused, {wrong} wrong; \
         {late:?}, {most:?}",
        goodput / peak
    );
    assert!(refused > 0, "there is a place for everybody");
    // A thousand and more that come each second overflow the kernel's own queue of connections.
    assert!(wrong * 20 <= answers + refused, "more than 5 of 100 got no answer");
    assert!(bad <= 20, "{bad} of 1,000 probes");
    assert!(most.0.bounded_by(late.0) && most.1.bounded_by(late.1), "memory grows");
    http.wait("to be idle", || http.metric("phalanx_kv_blocks_used") == 0.0);
}
