//! Links that are cut in the middle of answers, one way, both ways, again and again, or that lose
//! packets: no client sees an error or another byte, and the cluster always gets on.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Ground, Http, Process, demo_model};
use crate::network::{self, Host};
use crate::survive::{Clients, Dice, Gap, gold, holders, is_whole};

/// A worker and the host it runs on.
struct Placed {
    host: Host,
    _process: Process,
}

/// A coordinator and workers, each on a host of its own.
struct Web {
    ground: Ground,
    host: Host,
    coordinator: Process,
    workers: Vec<Placed>,
}

impl Web {
    fn start(ranks: usize, spares: usize) -> Self {
        let (ground, model) = (Ground::new(), demo_model());
        let path = model.to_str().expect("a path in UTF-8");
        let host = Host::new("c1", 1);
        let (data, count) = (ground.data("coordinator-1"), ranks.to_string());
        let listen = format!("{}:8100", host.address);
        let mut args = vec!["coordinator", path, "--port", "8000", "--host", &host.address];
        args.extend(["--listen", &listen, "--data", &data, "--name", "coordinator-1"]);
        args.extend(["--ranks", &count]);
        let coordinator = Process::launch(host.phalanx(), &args);
        let mut web = Self { ground, host, coordinator, workers: Vec::new() };
        (1..=ranks + spares).for_each(|number| web.join(path, number));
        web.http().ready();
        web.whole();
        web
    }

    fn join(&mut self, model: &str, number: usize) {
        let name = format!("worker-{number}");
        let host = Host::new(&format!("w{number}"), 10 + number);
        let (data, token) = (self.ground.data(&name), self.ground.token("worker"));
        let (listen, at) = (format!("{}:8200", host.address), self.coordinator.cluster());
        let mut args = vec!["worker", model, "--coordinator", &at, "--listen", &listen];
        args.extend(["--data", &data, "--token", &token, "--name", &name, "--threads", "1"]);
        let log = std::fs::File::create(self.log(number - 1)).expect("a file for its log");
        let mut command = host.phalanx();
        command.stderr(log);
        self.workers.push(Placed { _process: Process::launch(command, &args), host });
    }

    /// The file of what a worker says.
    fn log(&self, worker: usize) -> String {
        self.ground.data(&format!("worker-{}.log", worker + 1))
    }

    fn http(&self) -> Http {
        self.coordinator.http()
    }

    fn status(&self) -> Value {
        self.ground.status(&self.coordinator.cluster())
    }

    fn whole(&self) {
        self.http().wait("to be whole again", || is_whole(&self.status(), self.workers.len()));
    }

    /// Ranks of the group that serves, by their places among the workers.
    fn holders(&self) -> Vec<usize> {
        let mut found = Vec::new();
        self.http().wait("to serve", || {
            found = holders(&self.status());
            !found.is_empty()
        });
        found
    }

    /// Everybody that a worker speaks with.
    fn others(&self, worker: usize) -> Vec<&Host> {
        let workers = self.workers.iter().enumerate().filter(|(at, _)| *at != worker);
        workers.map(|(_, one)| &one.host).chain([&self.host]).collect()
    }

    fn heal(&self) {
        self.workers.iter().map(|one| &one.host).chain([&self.host]).for_each(Host::heal);
    }
}

/// Which packets of a worker are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Both,
    /// It is not heard.
    Outgoing,
    /// It hears nobody.
    Incoming,
}

const CUTS: [Cut; 3] = [Cut::Both, Cut::Outgoing, Cut::Incoming];

fn cut(web: &Web, worker: usize, how: Cut) {
    let own = &web.workers[worker].host;
    for other in web.others(worker) {
        if how != Cut::Incoming {
            other.deaf_to(own);
        }
        if how != Cut::Outgoing {
            own.deaf_to(other);
        }
    }
}

/// So many further answers, or the test ends; how long that took.
fn get_on(http: &Http, clients: &Clients, answers: usize, what: &str) -> Duration {
    let (goal, began) = (clients.count() + answers, Instant::now());
    http.wait(what, || clients.count() >= goal || clients.broken());
    assert!(!clients.broken(), "a client ended: {what}");
    began.elapsed()
}

/// The longest that any stream waited over what happened then: what was on its way still comes.
fn pause(gaps: &[Gap], moment: Instant) -> Option<Duration> {
    let soon = moment + Duration::from_secs(2);
    let hit = gaps.iter().filter(|(from, to)| *from < soon && moment < *to);
    hit.map(|(from, to)| *to - *from).max()
}

#[test]
fn a_worker_that_is_cut_off_in_the_middle_of_streams_costs_a_pause() {
    let test = "links::a_worker_that_is_cut_off_in_the_middle_of_streams_costs_a_pause";
    network::inside(test, &[], || {
        let web = Web::start(2, 1);
        let http = web.http();
        let gold = gold(&http);
        for (turn, how) in CUTS.into_iter().enumerate() {
            let clients = Clients::start(&http, &gold, 4);
            get_on(&http, &clients, 2, "to begin");
            let victim = web.holders()[turn % 2];
            let moment = Instant::now();
            cut(&web, victim, how);
            // Each client may have had one answer nearly whole, not two.
            get_on(&http, &clients, 5, "to go on without it");
            web.heal();
            get_on(&http, &clients, 5, "to go on with it");
            let (answers, gaps) = clients.end();
            let pause = pause(&gaps, moment);
            println!("{how:?} of worker-{}: {answers} answers, pause {pause:?}", victim + 1);
            web.whole();
        }
        let resumed = http.metric("phalanx_sequences_resumed_total");
        assert!(resumed > 0.0, "nothing was hit");
        http.wait("to be idle", || http.metric("phalanx_kv_blocks_used") == 0.0);
    });
}

/// Two workers that never reach each other, and nobody else: one of them serves. That it tries
/// both again, now and then, and in vain, costs pauses and no error.
#[test]
fn a_link_that_stays_dead_is_lived_with() {
    let test = "links::a_link_that_stays_dead_is_lived_with";
    network::inside(test, &[], || {
        let web = Web::start(2, 0);
        let http = web.http();
        let gold = gold(&http);
        let clients = Clients::start(&http, &gold, 3);
        get_on(&http, &clients, 2, "to begin");
        let [one, other] = [0, 1].map(|worker| &web.workers[worker].host);
        one.deaf_to(other);
        other.deaf_to(one);
        let epoch = || web.status()["groups"][0]["epoch"].as_u64().expect("an epoch");
        // It goes on alone, tries both, and goes on alone again.
        http.wait("to try again", || epoch() >= 4 || clients.broken());
        get_on(&http, &clients, 6, "to go on alone");
        assert_eq!(web.holders().len(), 1);
        web.heal();
        let (answers, gaps) = clients.end();
        let longest = gaps.iter().map(|(from, to)| *to - *from).max();
        println!("{answers} answers, the longest gap {longest:?}");
    });
}

#[test]
fn a_link_that_flaps_never_stops_the_cluster_for_good() {
    let test = "links::a_link_that_flaps_never_stops_the_cluster_for_good";
    network::inside(test, &[], || {
        let web = Web::start(2, 1);
        let http = web.http();
        let gold = gold(&http);
        let clients = Clients::start(&http, &gold, 4);
        let mut dice = Dice(0xf1a9);
        let victim = web.holders()[0];
        for _ in 0..12 {
            cut(&web, victim, CUTS[usize::try_from(dice.below(3)).expect("small")]);
            std::thread::sleep(Duration::from_millis(100 + dice.below(1_500)));
            web.heal();
            std::thread::sleep(Duration::from_millis(100 + dice.below(1_500)));
            assert!(!clients.broken(), "a client ended");
        }
        let during = clients.count();
        let took = get_on(&http, &clients, 8, "to get on once the link stands");
        println!("{during} answers while the link flapped; 8 more in {took:?}");
        clients.end();
        web.whole();
        http.wait("to be idle", || http.metric("phalanx_kv_blocks_used") == 0.0);
        assert_eq!(http.metric("phalanx_integrity"), 1.0);
    });
}

#[test]
fn a_link_between_ranks_that_loses_packets_changes_no_byte() {
    let test = "links::a_link_between_ranks_that_loses_packets_changes_no_byte";
    network::inside(test, &[], || {
        let web = Web::start(2, 1);
        let http = web.http();
        let gold = gold(&http);
        let clients = Clients::start(&http, &gold, 4);
        get_on(&http, &clients, 2, "to begin");
        let pair = web.holders();
        let [one, other] = [pair[0], pair[1]].map(|at| &web.workers[at].host);
        for (host, from) in [(one, other), (other, one)] {
            host.deaf(&format!("ip saddr {} numgen random mod 100 < 30", from.address));
        }
        let took = get_on(&http, &clients, 12, "to answer over what is left of the link");
        println!("12 answers in {took:?} with 30 % loss between {:?}", pair);
        web.heal();
        get_on(&http, &clients, 4, "to go on");
        clients.end();
        web.whole();
    });
}

#[test]
fn a_link_between_two_ranks_that_dies_in_silence_is_named_and_placed_around() {
    let test = "links::a_link_between_two_ranks_that_dies_in_silence_is_named_and_placed_around";
    network::inside(test, &[], || {
        let web = Web::start(2, 1);
        let http = web.http();
        let gold = gold(&http);
        let clients = Clients::start(&http, &gold, 4);
        get_on(&http, &clients, 4, "to know what steps take");
        let pair = web.holders();
        let [one, other] = [pair[0], pair[1]].map(|at| &web.workers[at].host);
        let moment = Instant::now();
        // Both still reach the coordinator, and it them.
        one.deaf_to(other);
        other.deaf_to(one);
        get_on(&http, &clients, 5, "to go on around the link");
        let around = web.holders();
        let apart = !pair.iter().all(|worker| around.contains(worker));
        assert!(apart, "the group is placed over the dead link again: {around:?}");
        let (_, gaps) = clients.end();
        println!("pause {:?}", pause(&gaps, moment));
        let logs: String = pair
            .iter()
            .map(|worker| std::fs::read_to_string(web.log(*worker)).expect("a log"))
            .collect();
        let named = |line: &&str| {
            line.contains("a step has taken")
                && line.contains("does not answer")
                && line.contains("rank 1 on node")
                && line.contains(", in the ")
        };
        let line = logs.lines().find(named);
        println!("{}", line.unwrap_or_else(|| panic!("nobody says which link: {logs}")));
        web.heal();
        web.whole();
    });
}
