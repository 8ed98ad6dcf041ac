//! Coordinators and workers on hosts of their own, and links between them that are cut: both ways,
//! one way, around a coordinator, around a worker.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::control_plane::long;
use crate::harness::{self, Ground, Http, PATIENCE, Process, demo_model};
use crate::network::{self, Host};

/// The cluster port of every coordinator: hosts of their own need no free ones.
const CLUSTER: u16 = 8100;
/// The length of a lease, as it is unless said otherwise.
const LEASE: Duration = Duration::from_secs(3);
/// Terms that a cut and its healing may take: one for the leader that follows, and one more for
/// an election that was split on busy cores.
const TERMS: u64 = 3;

/// A process and the host it runs on.
struct Placed {
    host: Host,
    process: Process,
}

impl Placed {
    fn at(&self) -> String {
        self.process.cluster()
    }
}

/// Three coordinators and some workers, each on a host of its own.
struct Field {
    ground: Ground,
    coordinators: Vec<Placed>,
    workers: Vec<Placed>,
}

impl Field {
    fn start(workers: usize) -> Self {
        let (ground, model) = (Ground::new(), demo_model());
        let path = model.to_str().expect("a path in UTF-8");
        let mut coordinators: Vec<Placed> = Vec::new();
        for number in 1..=3 {
            let name = format!("coordinator-{number}");
            let host = Host::new(&format!("c{number}"), number);
            let (data, token) = (ground.data(&name), ground.token("coordinator"));
            let listen = format!("{}:{CLUSTER}", host.address);
            let mut args = vec!["coordinator", path, "--port", "8000", "--host", &host.address];
            args.extend(["--listen", &listen, "--data", &data, "--name", &name]);
            let founder = coordinators.first().map(Placed::at);
            match &founder {
                None => args.extend(["--ranks", "1"]),
                Some(founder) => args.extend(["--join", founder, "--token", &token]),
            }
            let process = Process::launch(host.phalanx(), &args);
            coordinators.push(Placed { host, process });
        }
        let mut field = Self { ground, coordinators, workers: Vec::new() };
        field.until("three votes", |field| voters(&field.status()) == 3);
        (1..=workers).for_each(|number| field.join(path, number));
        field.coordinators.iter().for_each(|one| one.process.http().ready());
        field.until("all workers", |field| {
            let status = field.status();
            (1..=workers).all(|number| state(&status, &format!("worker-{number}")) == "ready")
        });
        field
    }

    fn join(&mut self, model: &str, number: usize) {
        let name = format!("worker-{number}");
        let host = Host::new(&format!("w{number}"), 10 + number);
        let (data, token) = (self.ground.data(&name), self.ground.token("worker"));
        let (listen, all) = (format!("{}:8200", host.address), self.addresses());
        let mut args = vec!["worker", model, "--coordinator", &all, "--listen", &listen];
        args.extend(["--data", &data, "--token", &token, "--name", &name, "--threads", "1"]);
        let log = std::fs::File::create(self.log(&name)).expect("a file for its log");
        let mut command = host.phalanx();
        command.stderr(log);
        let process = Process::launch(command, &args);
        self.workers.push(Placed { host, process });
    }

    /// What a worker says goes to a file.
    fn log(&self, worker: &str) -> PathBuf {
        self.ground.data(&format!("{worker}.log")).into()
    }

    fn addresses(&self) -> String {
        let all: Vec<String> = self.coordinators.iter().map(Placed::at).collect();
        all.join(",")
    }

    /// The addresses of all coordinators but one.
    fn others(&self, leader: usize) -> String {
        let others = self.coordinators.iter().enumerate().filter(|(at, _)| *at != leader);
        others.map(|(_, one)| one.at()).collect::<Vec<_>>().join(",")
    }

    fn status(&self) -> Value {
        self.ground.status(&self.addresses())
    }

    /// What one coordinator knows without asking the others.
    fn local(&self, coordinator: usize) -> Value {
        harness::status(&self.ground.operator(), &self.coordinators[coordinator].at(), &["--local"])
    }

    /// The coordinator that leads, by its place among them, and its term.
    fn leader(&self) -> (usize, u64) {
        let mut found = None;
        self.until("a leader", |field| {
            let status = field.status();
            let control = &status["control"];
            let name = status["nodes"].as_array().into_iter().flatten();
            let mut name = name.filter(|node| node["node"] == control["leader"]);
            let name = name.next().and_then(|node| node["name"].as_str());
            let at = name.and_then(|name| name.strip_prefix("coordinator-")?.parse().ok());
            found = at.zip(control["term"].as_u64()).filter(|_| status["current"] == true);
            found.is_some()
        });
        let (number, term): (usize, u64) = found.expect("a leader");
        (number - 1, term)
    }

    fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !holds(self) {
            assert!(Instant::now() < until, "it takes too long: {what}: {}", self.status());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The worker that holds the only group, by its place among them, and the group's epoch.
    fn holder(&self, status: &Value) -> Option<(usize, u64)> {
        let groups = status["groups"].as_array()?.iter();
        let mut serving = groups.filter(|group| group["phase"] == "serving");
        let group = serving.next()?;
        let mut nodes = status["nodes"].as_array()?.iter();
        let node = nodes.find(|node| node["node"] == group["ranks"][0]["node"])?;
        let number: usize = node["name"].as_str()?.strip_prefix("worker-")?.parse().ok()?;
        Some((number - 1, group["epoch"].as_u64()?))
    }

    fn heal(&self) {
        self.coordinators.iter().chain(&self.workers).for_each(|one| one.host.heal());
    }

    /// Waits until every coordinator has applied the same log to the same state, and knows the
    /// same leader; that term.
    fn agree(&self) -> u64 {
        let mut term = None;
        self.until("agreement", |field| {
            let views: Vec<Value> = (0..3).map(|at| field.local(at)["control"].take()).collect();
            for (one, other) in [(0, 1), (1, 2), (0, 2)] {
                if views[one]["applied"] == views[other]["applied"] {
                    assert_eq!(views[one]["state_hash"], views[other]["state_hash"], "{views:?}");
                }
            }
            term = views[0]["term"].as_u64();
            let parts = ["applied", "state_hash", "leader", "term"];
            let agreed = |part: &&str| views.iter().all(|view| view[*part] == views[0][*part]);
            parts.iter().all(agreed) && views[0]["leader"].is_u64()
        });
        term.expect("a term")
    }
}

fn voters(status: &Value) -> usize {
    let members = status["control"]["members"].as_array().into_iter().flatten();
    members.filter(|member| member["part"] == "voter").count()
}

fn state<'a>(status: &'a Value, node: &str) -> &'a str {
    let mut nodes = status["nodes"].as_array().into_iter().flatten();
    nodes.find(|one| one["name"] == node).and_then(|one| one["state"].as_str()).unwrap_or("")
}

/// Which packets of the leader are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Both,
    /// The leader is not heard.
    Outgoing,
    /// The leader hears nobody.
    Incoming,
}

impl Cut {
    fn apply(self, inner: &[&Host], outer: &[&Host]) {
        for (one, other) in inner.iter().flat_map(|one| outer.iter().map(move |two| (one, two))) {
            if self != Self::Incoming {
                other.deaf_to(one);
            }
            if self != Self::Outgoing {
                one.deaf_to(other);
            }
        }
    }
}

/// Tells threads to stop, also where a test fails before it would.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// What the leader that is cut off says of itself, watched from outside.
struct Watch {
    stop: AtomicBool,
    /// The newest revision that was acknowledged elsewhere.
    acknowledged: AtomicU64,
}

/// What was seen of it.
#[derive(Debug, Default)]
struct Seen {
    /// When it no longer called itself the leader.
    stepped_down: Option<Duration>,
    /// Answers that said they were current, and the others.
    current: usize,
    old: usize,
}

impl Watch {
    /// Asks again and again; an answer that calls itself current must hold everything that was
    /// acknowledged before it was asked for.
    fn run(&self, operator: &str, address: &str, began: Instant) -> Seen {
        let mut seen = Seen::default();
        while !self.stop.load(Ordering::SeqCst) {
            let glance = harness::status(operator, address, &["--local"])["control"].take();
            if seen.stepped_down.is_none() && glance["leader"] != glance["answers"] {
                seen.stepped_down = Some(began.elapsed());
            }
            let acknowledged = self.acknowledged.load(Ordering::SeqCst);
            let status = harness::status(operator, address, &[]);
            if status["current"] != true {
                seen.old += 1;
                continue;
            }
            let revision = status["revision"].as_u64().expect("a revision");
            assert!(
                revision >= acknowledged,
                "an old state was shown as current: {revision} after {acknowledged}: {status}"
            );
            seen.current += 1;
        }
        seen
    }
}

/// Cuts the leader off from the other coordinators, writes beside it, and heals.
fn cut_off(field: &Field, cut: Cut) {
    let (leader, before) = field.leader();
    let answer = field.coordinators[leader].process.http().complete(&long("Alas,", 20));
    let (address, others) = (field.coordinators[leader].at(), field.others(leader));
    let far = field.coordinators.iter().enumerate().filter(|(at, _)| *at != leader);
    let far: Vec<&Host> = far.map(|(_, one)| &one.host).collect();
    // A change that moves nothing: the worker that holds the group goes on holding it.
    let (holder, _) = field.holder(&field.status()).expect("a group that serves");
    let idle = format!("worker-{}", 2 - holder);
    let watch = Watch { stop: AtomicBool::new(false), acknowledged: AtomicU64::new(0) };
    let began = Instant::now();
    cut.apply(&[&field.coordinators[leader].host], &far);
    let (written, seen) = std::thread::scope(|scope| {
        let operator = field.ground.operator();
        let (watch, address) = (&watch, &address);
        let stop = Stop(&watch.stop);
        let watched = scope.spawn(move || watch.run(&operator, address, began));
        let mut written = None;
        for undo in [&[][..], &["--undo"], &[], &["--undo"]] {
            let drain = [&["drain", idle.as_str()], undo].concat();
            let done = field.ground.operate(&others, &drain);
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            written.get_or_insert(began.elapsed());
            let status = field.ground.status(&others);
            assert_eq!(status["current"], true, "{status}");
            let revision = status["revision"].as_u64().expect("a revision");
            watch.acknowledged.store(revision, Ordering::SeqCst);
            let http = field.coordinators[leader].process.http();
            assert_eq!(http.complete(&long("Alas,", 20))["choices"], answer["choices"]);
        }
        std::thread::sleep(Duration::from_secs(2));
        drop(stop);
        (written, watched.join().expect("a watch that saw nothing old"))
    });
    let stepped_down = seen.stepped_down.expect("a leader that steps down");
    assert!(seen.old > 0, "nobody confirms what a leader that is cut off says: {seen:?}");
    let refused = cut == Cut::Both && {
        let refused = field.ground.operate(&address, &["drain", &idle]);
        assert!(!refused.status.success(), "a leader that is cut off accepted a change");
        true
    };
    field.heal();
    let healed = Instant::now();
    let after = field.agree();
    println!(
        "{cut:?}: stepped down after {stepped_down:?}, a write after {written:?}, agreement \
         {:?} after healing, terms {before} to {after}, refused: {refused}, {seen:?}",
        healed.elapsed()
    );
    std::thread::sleep(Duration::from_secs(2));
    let settled = field.agree();
    assert!(settled <= before + TERMS, "leadership flaps: {before}, {after}, {settled}");
}

#[test]
fn a_leader_that_is_cut_off_steps_down_and_shows_nothing_old_as_current() {
    let test = "partition::a_leader_that_is_cut_off_steps_down_and_shows_nothing_old_as_current";
    network::inside(test, &[], || {
        let field = Field::start(2);
        [Cut::Both, Cut::Outgoing, Cut::Incoming].into_iter().for_each(|cut| cut_off(&field, cut));
    });
}

#[test]
fn a_gateway_on_the_small_side_answers_from_the_worker_it_reaches() {
    let test = "partition::a_gateway_on_the_small_side_answers_from_the_worker_it_reaches";
    network::inside(test, &[], || {
        let field = Field::start(2);
        let (leader, term) = field.leader();
        let (worker, epoch) = field.holder(&field.status()).expect("a group that serves");
        let small = [&field.coordinators[leader].host, &field.workers[worker].host];
        let all = field.coordinators.iter().chain(&field.workers).map(|one| &one.host);
        let far: Vec<&Host> = all.filter(|host| !small.contains(host)).collect();
        let http = field.coordinators[leader].process.http();
        let answer = http.complete(&long("Alas,", 20));
        let began = Instant::now();
        Cut::Both.apply(&small, &far);
        // The worker hears from its side that nobody leads, so it goes on beyond its lease, while
        // the others give its stripes to the other worker.
        let others = field.others(leader);
        let (mut moved, mut answers) = (None, 0);
        while moved.is_none() || began.elapsed() < 3 * LEASE {
            assert_eq!(http.complete(&long("Alas,", 20))["choices"], answer["choices"]);
            answers += 1;
            let status = field.ground.status(&others);
            let now = field.holder(&status).filter(|(at, now)| *at != worker && *now > epoch);
            moved = moved.or_else(|| now.map(|_| began.elapsed()));
            assert!(began.elapsed() < PATIENCE, "the group does not move: {status}");
        }
        for (at, one) in field.coordinators.iter().enumerate().filter(|(at, _)| *at != leader) {
            let same = one.process.http().complete(&long("Alas,", 20));
            assert_eq!(same["choices"], answer["choices"], "coordinator {at}");
        }
        field.heal();
        let after = field.agree();
        println!("{answers} answers on the small side; elsewhere the group moved in {moved:?}");
        assert!(after <= term + TERMS, "leadership flaps: {term}, {after}");
        field.until("the small side to let go", |field| {
            let status = field.status();
            field.holder(&status).is_some_and(|(at, _)| at != worker)
                && state(&status, &format!("worker-{}", worker + 1)) == "ready"
        });
        let same = http.complete(&long("Alas,", 20));
        assert_eq!(same["choices"], answer["choices"]);
    });
}

/// Streams that follow each other until told to stop: how many ended whole, and how many broke.
fn streams(http: &Http, stop: &AtomicBool) -> [usize; 2] {
    let mut body = long("Once more", 900);
    body["stream"] = Value::Bool(true);
    let mut ended = [0, 0];
    while !stop.load(Ordering::SeqCst) {
        let (status, text) = http.post_raw("/v1/completions", body.to_string().as_bytes());
        match (status, text.contains("data: [DONE]") && !text.contains("\"error\"")) {
            (200, true) => ended[0] += 1,
            (200, false) => ended[1] += 1,
            // Nobody serves until the group has moved.
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    ended
}

/// Waits until a worker has let go, another holds its group, and all gateways answer from there.
fn moves(field: &Field, worker: usize, epoch: u64, began: Instant) -> u64 {
    let name = format!("worker-{}", worker + 1);
    field.until("the worker to let go", |field| {
        let log = std::fs::read_to_string(field.log(&name)).expect("its log");
        log.contains("the lease ran out")
    });
    let let_go = began.elapsed();
    let mut now = None;
    field.until("the group to move", |field| {
        now = field.holder(&field.status()).filter(|(at, now)| *at != worker && *now > epoch);
        now.is_some()
    });
    println!(
        "{name} let go after {let_go:?}; elsewhere the group served after {:?}",
        began.elapsed()
    );
    for one in &field.coordinators {
        one.process.http().wait("to know the group's place", || {
            one.process.http().post("/v1/completions", &long("Alas,", 20)).0 == 200
        });
    }
    now.expect("a group").1
}

#[test]
fn a_worker_that_is_cut_off_lets_go_of_its_groups_and_comes_back() {
    let test = "partition::a_worker_that_is_cut_off_lets_go_of_its_groups_and_comes_back";
    network::inside(test, &[], || {
        let field = Field::start(2);
        let (_, term) = field.leader();
        let (first, epoch) = field.holder(&field.status()).expect("a group that serves");
        let all = || field.coordinators.iter().chain(&field.workers).map(|one| &one.host);
        let alone = &field.workers[first].host;
        let began = Instant::now();
        Cut::Both.apply(&[alone], &all().filter(|host| *host != alone).collect::<Vec<_>>());
        let epoch = moves(&field, first, epoch, began);
        field.heal();
        field.until("it to come back", |field| {
            state(&field.status(), &format!("worker-{}", first + 1)) == "ready"
        });
        // Now the other one, and only its session: gateways still reach it, and what it streams
        // ends because it lets go, not because nobody hears it.
        let second = 1 - first;
        let host = &field.workers[second].host;
        let stop = AtomicBool::new(false);
        let [whole, broken] = std::thread::scope(|scope| {
            let http = field.coordinators[0].process.http();
            let (stop, guard) = (&stop, Stop(&stop));
            let streaming = scope.spawn(move || streams(&http, stop));
            std::thread::sleep(Duration::from_millis(500));
            let began = Instant::now();
            for one in &field.coordinators {
                one.host.deaf(&format!("ip saddr {} tcp dport {CLUSTER}", host.address));
                host.deaf(&format!("ip saddr {} tcp sport {CLUSTER}", one.host.address));
            }
            moves(&field, second, epoch, began);
            drop(guard);
            streaming.join().expect("streams that end")
        });
        println!("of its streams {whole} ended whole and {broken} with an error");
        assert_eq!(broken, 0, "a stream did not go on elsewhere");
        field.heal();
        let after = field.agree();
        assert!(after <= term + TERMS, "leadership flaps: {term}, {after}");
        field.until("it to come back", |field| {
            state(&field.status(), &format!("worker-{}", second + 1)) == "ready"
        });
    });
}
