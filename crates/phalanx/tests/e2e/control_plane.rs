//! Three coordinators as real processes: leaders that are killed, stopped and cut off while answers
//! stream; whole clusters that end and come back.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Ground, Http, PATIENCE, Process, demo_model};

/// Leaders that the short form of a test kills.
const KILLS: usize = 2;

/// Coordinators and workers of one cluster.
pub(crate) struct Fleet {
    pub(crate) ground: Ground,
    /// By node number; the founder is node 1.
    pub(crate) coordinators: Vec<(u64, Process)>,
    pub(crate) workers: Vec<Process>,
}

fn signal(process: &Process, name: &str) {
    let sent = Command::new("kill").args([name, &process.id().to_string()]).status();
    assert!(sent.expect("a signal").success());
}

impl Fleet {
    /// `coordinators` voters, and `workers` workers that serve the demo's model on `ranks` ranks.
    pub(crate) fn start(coordinators: usize, workers: usize, ranks: usize) -> Self {
        let (ground, model) = (Ground::new(), demo_model());
        let count = ranks.to_string();
        let founder = ground.founder(&model, "127.0.0.1:0", &["--ranks", &count]);
        let mut fleet = Self { ground, coordinators: vec![(1, founder)], workers: Vec::new() };
        (1..coordinators).for_each(|_| fleet.join());
        for number in 1..=workers {
            let name = format!("worker-{number}");
            let worker = fleet.ground.worker(&model, &name, &fleet.addresses(), &[]);
            fleet.workers.push(worker);
        }
        fleet.coordinators.iter().for_each(|(_, one)| one.http().ready());
        fleet
    }

    /// One more coordinator, until it has a vote.
    fn join(&mut self) {
        let number = self.ground.next();
        let name = format!("coordinator-{number}");
        let started =
            self.ground.coordinator(&demo_model(), &name, "127.0.0.1:0", &self.addresses());
        let voters = self.voters().len();
        let until = Instant::now() + PATIENCE;
        let node = loop {
            let status = self.status();
            let known = status["nodes"].as_array().into_iter().flatten();
            let node =
                known.filter(|node| node["name"] == name.as_str()).find_map(|n| n["node"].as_u64());
            if let Some(node) = node
                && voters_of(&status).contains(&node)
            {
                break node;
            }
            assert!(Instant::now() < until, "{name} gets no vote: {status}");
            std::thread::sleep(Duration::from_millis(50));
        };
        assert_eq!(self.voters().len(), voters + 1);
        self.coordinators.push((node, started));
    }

    pub(crate) fn addresses(&self) -> String {
        let all: Vec<String> = self.coordinators.iter().map(|(_, one)| one.cluster()).collect();
        all.join(",")
    }

    pub(crate) fn status(&self) -> Value {
        self.ground.status(&self.addresses())
    }

    fn voters(&self) -> Vec<u64> {
        voters_of(&self.status())
    }

    fn leader(&self) -> u64 {
        let until = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if let Some(leader) = status["control"]["leader"].as_u64()
                && status["current"] == true
            {
                return leader;
            }
            assert!(Instant::now() < until, "nobody leads: {status}");
        }
    }

    fn coordinator(&self, node: u64) -> &Process {
        &self.coordinators.iter().find(|(id, _)| *id == node).expect("that coordinator").1
    }

    /// Takes a coordinator out of the fleet's books.
    fn take(&mut self, node: u64) -> Process {
        let at = self.coordinators.iter().position(|(id, _)| *id == node).expect("that one");
        self.coordinators.remove(at).1
    }

    /// Starts a coordinator again where it was.
    fn again(&mut self, node: u64, listen: &str) {
        let (model, name) = (demo_model(), format!("coordinator-{node}"));
        let started = self.ground.coordinator(&model, &name, listen, &self.addresses());
        self.coordinators.push((node, started));
    }

    /// Kills every process, all at once as far as that goes, and starts all of them again, each at
    /// the cluster address it had. HTTP may be served elsewhere.
    pub(crate) fn end_and_begin(&mut self) {
        let listens: Vec<(u64, String)> =
            self.coordinators.iter().map(|(node, one)| (*node, one.cluster())).collect();
        self.coordinators.iter_mut().for_each(|(_, one)| one.kill());
        self.workers.iter_mut().for_each(Process::kill);
        let workers = self.workers.len();
        (self.coordinators, self.workers) = (Vec::new(), Vec::new());
        let addresses: Vec<String> = listens.iter().map(|(_, listen)| listen.clone()).collect();
        for (node, listen) in &listens {
            let name = format!("coordinator-{node}");
            let all = addresses.join(",");
            let started = self.ground.coordinator(&demo_model(), &name, listen, &all);
            self.coordinators.push((*node, started));
        }
        for number in 1..=workers {
            let (name, model) = (format!("worker-{number}"), demo_model());
            self.workers.push(self.ground.worker_again(&model, &name, &addresses.join(",")));
        }
    }

    /// A change, through whoever answers; whether it was accepted.
    pub(crate) fn change(&self, args: &[&str]) -> bool {
        self.ground.operate(&self.addresses(), args).status.success()
    }
}

fn voters_of(status: &Value) -> Vec<u64> {
    let members = status["control"]["members"].as_array().into_iter().flatten();
    let voters = members.filter(|member| member["part"] == "voter");
    voters.filter_map(|member| member["node"].as_u64()).collect()
}

/// A request for a long answer, always the same.
pub(crate) fn long(prompt: &str, tokens: usize) -> Value {
    json!({
        "model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": true,
    })
}

/// Streams answers until told to stop; every one of them must end whole.
pub(crate) struct Load {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    threads: Vec<std::thread::JoinHandle<usize>>,
}

impl Load {
    /// `streams` at once, spread over the gateways.
    pub(crate) fn start(gateways: &[Http], streams: usize) -> Self {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stream = |number: usize| {
            let http = gateways[number % gateways.len()].clone();
            let stop = std::sync::Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut ended = 0;
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    let body = long(&format!("No {number}, said the king"), 200);
                    let answer = http.stream_whole("/v1/completions", &body);
                    assert!(!answer.is_empty());
                    ended += 1;
                }
                ended
            })
        };
        let threads = (0..streams).map(stream).collect();
        Self { stop, threads }
    }

    /// How many streams ended; none of them with an error.
    pub(crate) fn end(self) -> usize {
        self.stop.store(true, std::sync::atomic::Ordering::SeqCst);
        self.threads.into_iter().map(|thread| thread.join().expect("streams that end whole")).sum()
    }
}

/// Kills the leader so many times under 16 streams; how long each time until a write was accepted.
fn kill_leaders(kills: usize) -> Vec<Duration> {
    let mut fleet = Fleet::start(3, 4, 4);
    let mut pauses = Vec::new();
    for kill in 0..kills {
        let leader = fleet.leader();
        let mut process = fleet.take(leader);
        let listen = process.cluster();
        // Clients of the killed one lose their connection, as with any server.
        let gateways: Vec<Http> = fleet.coordinators.iter().map(|(_, one)| one.http()).collect();
        let load = Load::start(&gateways, 16);
        std::thread::sleep(Duration::from_millis(300));
        process.kill();
        let began = Instant::now();
        let undo: &[&str] = if kill % 2 == 0 { &[] } else { &["--undo"] };
        let drain = [&["drain", "worker-4"], undo].concat();
        assert!(fleet.change(&drain), "the change was not accepted");
        pauses.push(began.elapsed());
        println!("kill {kill}: leader {leader}, {} streams, {:?}", load.end(), pauses[kill]);
        fleet.again(leader, &listen);
        let until = Instant::now() + PATIENCE;
        while fleet.coordinator(leader).http().get("/health").0 != 200 {
            assert!(Instant::now() < until, "the killed one does not come back");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    pauses.sort();
    pauses
}

#[test]
fn a_killed_leader_breaks_no_stream_and_another_answers_writes() {
    kill_leaders(KILLS);
}

/// The long form: `cargo test --release -p phalanx --test e2e -- --ignored fifty --nocapture`.
#[test]
#[ignore = "minutes; run it by hand, on quiet cores"]
fn fifty_kills_of_the_leader() {
    let pauses = kill_leaders(50);
    println!(
        "until a write was accepted: p50 {:?}, p99 {:?}, longest {:?}",
        pauses[pauses.len() / 2],
        pauses[pauses.len() * 99 / 100],
        pauses[pauses.len() - 1]
    );
}

#[test]
fn a_stopped_leader_is_replaced_and_never_shows_an_old_state_as_current() {
    let fleet = Fleet::start(3, 1, 1);
    let leader = fleet.leader();
    let (stopped, address) = (fleet.coordinator(leader), fleet.coordinator(leader).cluster());
    let others: Vec<String> = fleet
        .coordinators
        .iter()
        .filter(|(id, _)| *id != leader)
        .map(|(_, c)| c.cluster())
        .collect();
    let others = others.join(",");
    for round in 0..3 {
        signal(stopped, "-STOP");
        let undo: &[&str] = if round % 2 == 0 { &[] } else { &["--undo"] };
        let drain = [&["drain", "worker-1"], undo].concat();
        assert!(fleet.ground.operate(&others, &drain).status.success());
        signal(stopped, "-CONT");
        // At once, before it can have heard of its successor.
        let status = fleet.ground.status(&address);
        let nodes = status["nodes"].as_array().expect("nodes");
        let worker = nodes.iter().find(|node| node["name"] == "worker-1").expect("the worker");
        let expected = if round % 2 == 0 { "draining" } else { "ready" };
        assert!(
            status["current"] == false || worker["state"] == expected,
            "an old state was shown as current: {status}"
        );
        // Leadership goes back to where it can be stopped again.
        let until = Instant::now() + PATIENCE;
        while fleet.leader() != leader {
            fleet.change(&["members", "transfer", &leader.to_string()]);
            assert!(Instant::now() < until, "leadership does not move");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

#[test]
fn without_a_majority_changes_are_refused_and_answers_go_on() {
    let mut fleet = Fleet::start(3, 2, 2);
    let before = fleet.coordinators[2].1.http().complete(&long("Alas,", 20));
    let (a, b) = (fleet.coordinators[0].0, fleet.coordinators[1].0);
    fleet.take(a).kill();
    fleet.take(b).kill();
    let http = fleet.coordinators[0].1.http();
    // Longer than any lease: workers must not fence themselves while nobody can decide.
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        let answer = http.complete(&long("Alas,", 20));
        assert_eq!(answer["choices"], before["choices"]);
    }
    assert!(!fleet.change(&["drain", "worker-1"]), "a minority accepted a change");
    let status = fleet.status();
    assert_eq!(status["current"], false, "{status}");
    assert_eq!(http.complete(&long("Alas,", 20))["choices"], before["choices"]);
}

#[test]
fn a_cluster_that_was_killed_comes_back_as_it_was() {
    let mut fleet = Fleet::start(3, 2, 2);
    assert!(fleet.change(&["deploy", "second", "--model", "demo", "--ranks", "1"]));
    assert!(fleet.change(&["undeploy", "second"]));
    assert!(fleet.change(&["drain", "worker-2"]));
    assert!(fleet.change(&["drain", "worker-2", "--undo"]));
    // Without what no log says: how much was read.
    let held = |group: &Value| {
        let mut ranks = group["ranks"].clone();
        for rank in ranks.as_array_mut().expect("ranks") {
            rank.as_object_mut().expect("a rank").remove("bytes_read");
        }
        ranks
    };
    let placement = |status: &Value| {
        let groups = status["groups"].as_array().expect("groups").iter();
        let serving = groups.filter(|group| group["phase"] == "serving");
        serving.map(|g| (g["group"].clone(), g["deployment"].clone(), held(g))).collect::<Vec<_>>()
    };
    let before = fleet.status();
    let answer = fleet.coordinators[0].1.http().complete(&long("Alas,", 20));
    fleet.end_and_begin();
    // The state comes back as it was written, with a group that nobody holds any more; its next
    // incarnation is placed as soon as the workers' new processes have joined.
    let epoch = |status: &Value| status["groups"][0]["epoch"].as_u64();
    let until = Instant::now() + PATIENCE;
    let after = loop {
        let status = fleet.status();
        let again = epoch(&status) > epoch(&before);
        if again && placement(&status).len() == placement(&before).len() {
            break status;
        }
        assert!(Instant::now() < until, "it does not serve again: {status}");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(placement(&after), placement(&before));
    assert_eq!(after["nodes"].as_array().map(Vec::len), before["nodes"].as_array().map(Vec::len));
    assert_eq!(after["deployments"][0]["name"], "demo");
    let http = fleet.coordinators[1].1.http();
    http.wait("to have heard of it", || http.post("/v1/completions", &long("Alas,", 20)).0 == 200);
    assert_eq!(http.complete(&long("Alas,", 20))["choices"], answer["choices"]);
}

#[test]
fn members_come_and_go_under_load() {
    let mut fleet = Fleet::start(1, 1, 1);
    let founder = fleet.coordinators[0].1.http();
    let load = Load::start(&[founder], 4);
    for _ in 0..4 {
        fleet.join();
    }
    assert_eq!(fleet.voters().len(), 5);
    for node in [4, 5] {
        let removed = fleet.coordinators.iter().rev().map(|(id, _)| *id).next().unwrap_or(node);
        assert!(fleet.change(&["members", "remove", &removed.to_string()]));
        let mut process = fleet.take(removed);
        let until = Instant::now() + PATIENCE;
        while fleet.voters().contains(&removed) {
            assert!(Instant::now() < until, "node {removed} keeps its vote");
            std::thread::sleep(Duration::from_millis(50));
        }
        // It was told, or it is shut out; either way it disturbs nobody.
        let term = fleet.status()["control"]["term"].clone();
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(fleet.status()["control"]["term"], term, "a removed member disturbs");
        process.kill();
    }
    assert_eq!(fleet.voters().len(), 3);
    println!("{} streams ended while members came and went", load.end());
}

/// It has some seconds to end what it does for its clients; until then workers serve it.
#[test]
fn a_coordinator_that_is_removed_ends_the_answers_of_its_clients() {
    let mut fleet = Fleet::start(3, 1, 1);
    let gone = fleet.coordinators.iter().map(|(id, _)| *id).max().expect("three");
    let process = fleet.take(gone);
    let load = Load::start(&[process.http()], 2);
    assert!(fleet.change(&["members", "remove", &gone.to_string()]));
    let until = Instant::now() + PATIENCE;
    while fleet.voters().contains(&gone) {
        assert!(Instant::now() < until, "node {gone} keeps its vote");
        std::thread::sleep(Duration::from_millis(50));
    }
    // Longer than others take to shut it out, and shorter than its farewell.
    std::thread::sleep(Duration::from_secs(5));
    println!("{} streams ended whole at a coordinator that was removed", load.end());
}

/// It comes back with a log in which it is a member, and hears from the others that it is none.
#[test]
fn a_coordinator_that_was_removed_while_it_was_off_ends_when_it_is_back() {
    let mut fleet = Fleet::start(3, 1, 1);
    let gone = fleet.coordinators.iter().map(|(id, _)| *id).max().expect("three");
    fleet.take(gone).kill();
    assert!(fleet.change(&["members", "remove", &gone.to_string()]));
    let until = Instant::now() + PATIENCE;
    while fleet.voters().contains(&gone) {
        assert!(Instant::now() < until, "node {gone} keeps its vote");
        std::thread::sleep(Duration::from_millis(50));
    }
    // No list of others: it finds them in its log.
    let mut command = crate::harness::phalanx();
    let data = fleet.ground.data("coordinator-3");
    command.arg("coordinator").arg(demo_model()).args(["--data", &data, "--name", "coordinator-3"]);
    let ended = crate::harness::output(command.args(["--listen", "127.0.0.1:0", "--port", "0"]));
    let errors = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success());
    assert!(errors.contains("this coordinator was removed from the cluster"), "{errors}");
    assert_eq!(fleet.voters().len(), 2);
}

/// A founder whose volume is new, while its credential comes from elsewhere, as that of a pod does.
#[test]
fn a_founder_without_a_volume_does_not_found_a_second_cluster() {
    let mut fleet = Fleet::start(3, 1, 1);
    let others: Vec<String> = fleet.coordinators[1..].iter().map(|one| one.1.cluster()).collect();
    drop(fleet.take(1));
    for file in ["raft.redb", "raft.begun"] {
        std::fs::remove_file(fleet.ground.data(&format!("coordinator-1/{file}"))).expect("a file");
    }
    let mut command = crate::harness::phalanx();
    command.arg("coordinator").arg(demo_model()).args(["--join", &others.join(",")]);
    command.args(["--data", &fleet.ground.data("coordinator-1")]);
    let refused = crate::harness::output(command.args(["--listen", "127.0.0.1:0", "--port", "0"]));
    let errors = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success());
    assert!(errors.contains("the log of this coordinator is gone"), "{errors}");
    assert!(fleet.leader() > 1);
}

#[test]
fn a_log_that_is_gone_is_not_begun_anew() {
    let ground = Ground::new();
    let model = demo_model();
    drop(ground.founder(&model, "127.0.0.1:0", &[]));
    std::fs::remove_file(ground.data("coordinator-1/raft.redb")).expect("a log to remove");
    let mut command = crate::harness::phalanx();
    command.arg("coordinator").arg(&model).args(["--data", &ground.data("coordinator-1")]);
    let refused = crate::harness::output(command.args(["--listen", "127.0.0.1:0", "--port", "0"]));
    let errors = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success());
    assert!(errors.contains("log") && errors.contains("token"), "{errors}");
}
