//! Groups that lose their workers in the middle of answers: no client sees an error, and every
//! answer is byte for byte that of a cluster that nobody disturbed.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Ground, Http, PATIENCE, Process, demo_model};

/// A cluster whose workers die and come back.
pub(crate) struct Ward {
    pub(crate) ground: Ground,
    pub(crate) coordinator: Process,
    /// By number; `None` while it is dead.
    pub(crate) workers: Vec<Option<Process>>,
}

impl Ward {
    /// A group of `ranks` ranks, and spare workers.
    pub(crate) fn start(ranks: usize, spares: usize) -> Self {
        let (ground, model) = (Ground::new(), demo_model());
        let coordinator = ground.founder(&model, "127.0.0.1:0", &["--ranks", &ranks.to_string()]);
        let at = coordinator.cluster();
        let name = |number: usize| format!("worker-{}", number + 1);
        let workers = (0..ranks + spares)
            .map(|number| Some(ground.worker(&model, &name(number), &at, &[])))
            .collect();
        coordinator.http().ready();
        Self { ground, coordinator, workers }
    }

    pub(crate) fn http(&self) -> Http {
        self.coordinator.http()
    }

    pub(crate) fn status(&self) -> Value {
        self.ground.status(&self.coordinator.cluster())
    }

    pub(crate) fn holders(&self) -> Vec<usize> {
        holders(&self.status())
    }

    pub(crate) fn kill(&mut self, worker: usize) {
        if let Some(mut process) = self.workers[worker].take() {
            process.kill();
        }
    }

    pub(crate) fn revive(&mut self, worker: usize) {
        let name = format!("worker-{}", worker + 1);
        let again = self.ground.worker_again(&demo_model(), &name, &self.coordinator.cluster());
        self.workers[worker] = Some(again);
    }

    /// Waits until every worker has joined and the group serves on as many ranks as are wished.
    pub(crate) fn whole(&self) {
        self.http().wait("to be whole again", || is_whole(&self.status(), self.workers.len()));
    }
}

/// The workers, by their places, whose nodes hold a rank of a group that serves, by rank.
pub(crate) fn holders(status: &Value) -> Vec<usize> {
    let groups = status["groups"].as_array().into_iter().flatten();
    let serving = groups.filter(|group| group["phase"] == "serving");
    let ranks = serving.flat_map(|group| group["ranks"].as_array().into_iter().flatten());
    let number = |rank: &Value| {
        let mut nodes = status["nodes"].as_array().into_iter().flatten();
        let node = nodes.find(|node| node["node"] == rank["node"])?;
        let name = node["name"].as_str()?.strip_prefix("worker-")?.parse::<usize>().ok()?;
        Some(name - 1)
    };
    ranks.filter_map(number).collect()
}

/// Whether every one of so many workers has joined and the group serves as wished.
pub(crate) fn is_whole(status: &Value, workers: usize) -> bool {
    let nodes = status["nodes"].as_array().into_iter().flatten();
    let ready = nodes.filter(|node| node["role"] == "worker" && node["state"] == "ready");
    let deployment = &status["deployments"][0];
    ready.count() == workers && deployment["waiting_for"] == "" && deployment["degraded"] == ""
}

/// Numbers that look random and are the same in every run.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Requests of every kind, long enough to be hit.
pub(crate) fn requests() -> Vec<(&'static str, Value)> {
    let chat = json!([{"role": "user", "content": "Who goes there? Speak, and be brief."}]);
    let completion = |body: Value| ("/v1/completions", body);
    let mut all = vec![
        completion(json!({"prompt": "Once more unto the", "max_tokens": 180, "temperature": 0})),
        completion(json!({"prompt": "The king said", "max_tokens": 120, "temperature": 0.9,
                          "top_p": 0.95, "seed": 11, "n": 2})),
        completion(json!({"prompt": "Alas, poor", "max_tokens": 100, "temperature": 0,
                          "logprobs": 3, "echo": true})),
        completion(json!({"prompt": ["In the night", "By day"], "max_tokens": 90,
                          "temperature": 0.7, "top_k": 40, "seed": 5, "logprobs": 0})),
        completion(json!({"prompt": "Now is the winter of", "max_tokens": 150, "temperature": 0.8,
                          "seed": 3, "stop": ["the k", " lord", "zz"], "min_tokens": 60})),
        (
            "/v1/chat/completions",
            json!({"messages": chat, "max_tokens": 110, "temperature": 0.8,
                          "seed": 9, "repetition_penalty": 1.2, "frequency_penalty": 0.4,
                          "presence_penalty": 0.3}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": chat, "max_tokens": 90, "n": 2, "seed": 21,
                          "temperature": 1.0, "logprobs": true, "top_logprobs": 4}),
        ),
    ];
    for (_, body) in &mut all {
        body["model"] = json!("demo");
        body["ignore_eos"] = json!(true);
    }
    // Each streamed and whole, side by side.
    let both = |(path, body): (&'static str, Value)| {
        let mut streamed = body.clone();
        streamed["stream"] = json!(true);
        streamed["stream_options"] = json!({"include_usage": true});
        [(path, streamed), (path, body)]
    };
    all.into_iter().flat_map(both).collect()
}

/// When something was awaited, and until when.
pub(crate) type Gap = (Instant, Instant);

/// Everything that a client is shown of an answer, without what each has of its own; chunks by
/// choice. Also how long each event took.
pub(crate) fn shown(http: &Http, path: &str, body: &Value, gaps: &mut Vec<Gap>) -> String {
    try_shown(http, path, body, gaps).expect("an answer")
}

/// The same; `None` where there is nobody who answers. One that has begun must come whole.
pub(crate) fn try_shown(
    http: &Http,
    path: &str,
    body: &Value,
    gaps: &mut Vec<Gap>,
) -> Option<String> {
    let own = |mut value: Value| {
        assert!(value.get("error").is_none(), "an error to a client: {value}");
        if let Some(fields) = value.as_object_mut() {
            fields.remove("id");
            fields.remove("created");
        }
        value
    };
    let mut last = Instant::now();
    if body["stream"] != true {
        let answer = serde_json::from_reader(http.try_stream(path, body)?);
        return Some(own(answer.expect("a whole answer in JSON")).to_string());
    }
    let mut by_choice: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for line in http.try_stream(path, body)?.lines() {
        let line = line.expect("a stream that is not cut off");
        let Some(data) = line.strip_prefix("data: ") else { continue };
        let now = Instant::now();
        gaps.push((last, now));
        last = now;
        if data == "[DONE]" {
            return Some(format!("{by_choice:?}"));
        }
        let event = own(serde_json::from_str(data).expect("an event in JSON"));
        let choice = event["choices"][0]["index"].as_u64().unwrap_or(u64::MAX);
        by_choice.entry(choice).or_default().push(event.to_string());
    }
    panic!("the stream ended without [DONE]")
}

/// Clients that ask for everything again and again, and compare.
pub(crate) struct Clients {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicUsize>,
    gaps: Arc<Mutex<Vec<Gap>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    pub(crate) fn start(http: &Http, gold: &Arc<Vec<String>>, count: usize) -> Self {
        let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let gaps = Arc::new(Mutex::new(Vec::new()));
        let client = |number: usize| {
            let (http, gold, stop) = (http.clone(), Arc::clone(gold), Arc::clone(&stop));
            let (answers, gaps) = (Arc::clone(&answers), Arc::clone(&gaps));
            std::thread::spawn(move || {
                let requests = requests();
                let mut at = number;
                while !stop.load(Ordering::SeqCst) {
                    let (path, body) = &requests[at % requests.len()];
                    let mut seen = Vec::new();
                    let same = shown(&http, path, body, &mut seen);
                    assert_eq!(same, gold[at % requests.len()], "other bytes: {path} {body}");
                    gaps.lock().expect("not poisoned").extend(seen);
                    answers.fetch_add(1, Ordering::SeqCst);
                    at += 3;
                }
            })
        };
        let threads = (0..count).map(client).collect();
        Self { stop, answers, gaps, threads }
    }

    pub(crate) fn count(&self) -> usize {
        self.answers.load(Ordering::SeqCst)
    }

    pub(crate) fn broken(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// How many answers there were, all of them right; and how long each event took.
    pub(crate) fn end(self) -> (usize, Vec<Gap>) {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|thread| thread.join().expect("a client without error"));
        let gaps = std::mem::take(&mut *self.gaps.lock().expect("not poisoned"));
        (self.answers.load(Ordering::SeqCst), gaps)
    }
}

/// What the demo model answers to all of them, asked of whichever cluster comes first: the bytes
/// are the same on every number of ranks.
pub(crate) fn gold(http: &Http) -> Arc<Vec<String>> {
    static GOLD: OnceLock<Arc<Vec<String>>> = OnceLock::new();
    let answer = |(path, body): &(&'static str, Value)| shown(http, path, body, &mut Vec::new());
    Arc::clone(GOLD.get_or_init(|| Arc::new(requests().iter().map(answer).collect())))
}

/// What a series of kills came to.
struct Toll {
    answers: usize,
    /// By kill: the longest that any stream waited over it.
    pauses: Vec<Duration>,
}

/// Kills holders of the group at random moments under load; each comes back a moment later.
fn kills(ward: &mut Ward, kills: usize, seed: u64) -> Toll {
    let http = ward.http();
    let gold = gold(&http);
    let clients = Clients::start(&http, &gold, 6);
    let mut dice = Dice(seed);
    let mut moments = Vec::new();
    let mut answered = clients.count();
    while moments.len() < kills {
        std::thread::sleep(Duration::from_millis(200 + dice.below(1_300)));
        // Kills may overtake a repair, but not for ever: somebody has got on in between.
        http.wait("to answer", || clients.count() > answered || clients.broken());
        answered = clients.count();
        let holders = ward.holders();
        if holders.is_empty() {
            continue;
        }
        let victim = holders[dice.below(holders.len() as u64) as usize];
        moments.push(Instant::now());
        ward.kill(victim);
        std::thread::sleep(Duration::from_millis(dice.below(600)));
        ward.revive(victim);
        assert!(!clients.broken(), "a client ended after {} kills", moments.len());
    }
    // Everybody gets on once more.
    let goal = clients.count() + 12;
    let until = Instant::now() + PATIENCE;
    while clients.count() < goal && !clients.broken() {
        assert!(Instant::now() < until, "the load stands still");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (answers, gaps) = clients.end();
    let over = |moment: &Instant| {
        let hit = gaps.iter().filter(|(from, to)| from <= moment && moment < to);
        hit.map(|(_, to)| *to - *moment).max()
    };
    let mut pauses: Vec<Duration> = moments.iter().filter_map(over).collect();
    pauses.sort();
    http.wait("to be idle", || http.metric("phalanx_kv_blocks_used") == 0.0);
    assert_eq!(http.metric("phalanx_integrity"), 1.0);
    Toll { answers, pauses }
}

/// Of ascending times: the one that so many per cent do not exceed.
pub(crate) fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let last = sorted.len().saturating_sub(1);
    sorted.get(last * percent / 100).copied().unwrap_or_default()
}

fn print(what: &str, toll: &Toll, http: &Http) {
    println!(
        "{what}: {} answers, {} kills under streams, pauses p50 {:?} p99 {:?}, {} resumed",
        toll.answers,
        toll.pauses.len(),
        percentile(&toll.pauses, 50),
        percentile(&toll.pauses, 99),
        http.metric("phalanx_sequences_resumed_total"),
    );
}

#[test]
fn killed_workers_are_pauses_and_the_bytes_are_the_same() {
    let mut ward = Ward::start(2, 1);
    let toll = kills(&mut ward, 6, 0x5eed);
    let http = ward.http();
    print("2 ranks and a spare, 6 kills", &toll, &http);
    assert!(http.metric("phalanx_sequences_resumed_total") > 0.0, "nothing was hit");
}

/// The long form: `cargo test -p phalanx --test e2e -- --ignored two_hundred_kills --nocapture`.
#[test]
#[ignore = "takes minutes"]
fn two_hundred_kills() {
    let mut all = Vec::new();
    for (ranks, spares, count) in
        [(2, 0, 34), (2, 1, 34), (3, 0, 33), (3, 1, 33), (4, 0, 33), (4, 1, 33)]
    {
        let mut ward = Ward::start(ranks, spares);
        let toll = kills(&mut ward, count, 7 + ranks as u64 * 10 + spares as u64);
        print(&format!("{ranks} ranks, {spares} spare, {count} kills"), &toll, &ward.http());
        ward.whole();
        all.extend(toll.pauses);
    }
    all.sort();
    let (p50, p99) = (percentile(&all, 50), percentile(&all, 99));
    println!("all: {} kills hit streams, p50 {p50:?}, p99 {p99:?}", all.len());
}

/// One kill each of fresh groups: what is read again is what was lost, give or take a tenth, and
/// much less is in nobody's hands meanwhile.
#[test]
#[ignore = "takes minutes"]
fn no_more_is_read_again_than_was_lost() {
    for (ranks, spares) in [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)] {
        for rank in [0, ranks - 1] {
            let mut ward = Ward::start(ranks, spares);
            let read = |status: &Value| -> Vec<f64> {
                let ranks = status["groups"][0]["ranks"].as_array().into_iter().flatten();
                ranks.map(|rank| rank["bytes_read"].as_f64().expect("a count")).collect()
            };
            let lost = read(&ward.status())[rank];
            let epoch = ward.status()["groups"][0]["epoch"].as_u64();
            let victim = ward.holders()[rank];
            let http = ward.http();
            let clients = Clients::start(&http, &gold(&http), 2);
            ward.kill(victim);
            let mut status = Value::Null;
            http.wait("to serve again", || {
                status = ward.status();
                let group = &status["groups"][0];
                group["phase"] == "serving" && group["epoch"].as_u64() > epoch
            });
            let again: f64 = read(&status).iter().sum();
            clients.end();
            let share = again / lost;
            println!("{ranks} ranks, {spares} spare, rank {rank}: {share:.2} of it read again");
            assert!((0.5..=1.1).contains(&share), "{again} bytes of {lost}");
        }
    }
}

/// Sends a signal to a process.
pub(crate) fn signal(process: &Process, name: &str) {
    let sent = Command::new("kill").args([name, &process.id().to_string()]).status();
    assert!(sent.expect("the kill command").success());
}

#[test]
fn a_worker_that_stands_still_is_left_behind_and_nothing_of_it_is_shown() {
    let ward = Ward::start(2, 1);
    let http = ward.http();
    let gold = gold(&http);
    let clients = Clients::start(&http, &gold, 4);
    for turn in 0..2 {
        std::thread::sleep(Duration::from_millis(400));
        let holders = ward.holders();
        let victim = ward.workers[holders[turn % holders.len()]].as_ref().expect("a worker");
        signal(victim, "-STOP");
        if turn == 0 {
            // About as long as it takes to be left behind: either way is right.
            std::thread::sleep(Duration::from_millis(1_200));
        } else {
            // Others take its place: each client may have had one answer nearly whole, not two.
            let goal = clients.count() + 5;
            http.wait("to go on without it", || clients.count() >= goal || clients.broken());
        }
        signal(victim, "-CONT");
        assert!(!clients.broken(), "a client ended in turn {turn}");
    }
    std::thread::sleep(Duration::from_millis(500));
    let (answers, _) = clients.end();
    println!("{answers} answers");
    ward.whole();
}

/// It has loaded its part before the group is interrupted: nothing is read while streams wait.
#[test]
fn a_worker_that_comes_back_is_taken_in_when_it_has_loaded() {
    let mut ward = Ward::start(2, 0);
    let http = ward.http();
    let gold = gold(&http);
    let victim = ward.holders()[1];
    ward.kill(victim);
    http.wait("to go on narrow", || ward.holders() == [1 - victim]);
    let clients = Clients::start(&http, &gold, 4);
    ward.revive(victim);
    let revived = Instant::now();
    ward.whole();
    let whole = Instant::now();
    let before = clients.count();
    http.wait("to go on", || clients.count() > before + 4 || clients.broken());
    let (answers, gaps) = clients.end();
    let longest = gaps.iter().filter(|(from, to)| *to > revived && *from < whole);
    let longest = longest.map(|(from, to)| *to - *from).max();
    println!("{answers} answers, taken in again with a gap of {longest:?}");
    let status = ward.status();
    let ranks = status["groups"][0]["ranks"].as_array().expect("ranks");
    assert_eq!(ranks.len(), 2, "{status}");
    assert!(ranks.iter().all(|rank| rank["bytes_read"] == 0), "{status}");
}

#[test]
fn a_node_is_drained_and_taken_back_without_a_failed_request() {
    let ward = Ward::start(2, 1);
    let http = ward.http();
    let gold = gold(&http);
    let clients = Clients::start(&http, &gold, 4);
    let at = ward.coordinator.cluster();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(300));
        let name = format!("worker-{}", ward.holders()[0] + 1);
        let drained = ward.ground.operate(&at, &["drain", &name]);
        assert!(drained.status.success(), "{}", String::from_utf8_lossy(&drained.stderr));
        http.wait("to move its ranks", || {
            let holders = ward.holders();
            holders.len() == 2 && !holders.iter().any(|one| format!("worker-{}", one + 1) == name)
        });
        let undone = ward.ground.operate(&at, &["drain", &name, "--undo"]);
        assert!(undone.status.success(), "{}", String::from_utf8_lossy(&undone.stderr));
    }
    let before = clients.count();
    http.wait("to go on", || clients.count() > before || clients.broken());
    println!("{} answers", clients.end().0);
}
