//! What changes under clients that never notice: the model behind a name, and every process, one
//! after the other.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Ground, Http, PATIENCE, Process, demo_model, operate, serve};
use crate::survive::{requests, shown, try_shown};

/// The name that clients use.
const ALIAS: &str = "chat";

/// The demo's model and another one of the same shape: other weights, other template.
struct Pair {
    directory: TempDir,
}

impl Pair {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let next = directory.path().join("next");
        std::fs::create_dir(&next).expect("a directory");
        for entry in std::fs::read_dir(demo_model()).expect("the model") {
            let from = entry.expect("an entry").path();
            let to = next.join(from.file_name().expect("a name"));
            std::fs::copy(&from, &to).expect("a copy");
        }
        let template = next.join("chat_template.jinja");
        let text = std::fs::read_to_string(&template).expect("the template");
        let other = text.replace("<|assistant|>", "<|assistant|>My lord,");
        assert_ne!(text, other);
        std::fs::write(template, other).expect("a template");
        turn(&next.join("model.safetensors"), "model.layers.0.self_attn.v_proj.weight");
        Self { directory }
    }

    fn next(&self) -> PathBuf {
        self.directory.path().join("next")
    }

    /// What each request is answered with by either model, undisturbed, under the alias.
    fn gold(&self) -> [Vec<String>; 2] {
        let of = |model: &Path| {
            let alone = serve(model, &["--served-model-name", ALIAS, "--ranks", "2"]);
            let asked = asked();
            let answer =
                |(path, body): &(&str, Value)| shown(&alone.http(), path, body, &mut Vec::new());
            asked.iter().map(answer).collect::<Vec<_>>()
        };
        let both = [of(&demo_model()), of(&self.next())];
        let differ = both[0].iter().zip(&both[1]).all(|(one, other)| one != other);
        assert!(differ, "the models cannot be told apart");
        both
    }
}

/// Turns the rows of a tensor: the first half becomes the second.
fn turn(file: &Path, tensor: &str) {
    let mut bytes = std::fs::read(file).expect("the weights");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    let offset = |at: usize| header[tensor]["data_offsets"][at].as_u64().expect("an offset");
    let data = &mut bytes[8 + length..][offset(0) as usize..offset(1) as usize];
    data.rotate_left(data.len() / 2);
    std::fs::write(file, bytes).expect("the weights");
}

/// Requests of every kind, for the alias.
fn asked() -> Vec<(&'static str, Value)> {
    let mut all = requests();
    all.iter_mut().for_each(|(_, body)| body["model"] = json!(ALIAS));
    all
}

/// A cluster whose processes all have both models.
struct Town {
    ground: Ground,
    pair: Pair,
    coordinators: Vec<Process>,
    workers: Vec<Process>,
}

impl Town {
    /// Deploys the demo model as `one`, for clients who ask for the alias.
    fn begin(&self, ranks: usize) {
        self.deploy("one", "demo", ranks);
        self.run(&["alias", ALIAS, "--to", "one"]);
        for http in self.gateways() {
            http.wait("to know the alias", || http.get("/v1/models/chat").0 == 200);
        }
    }

    /// Nothing is deployed yet.
    fn start(coordinators: usize, workers: usize) -> Self {
        let mut town = Self {
            ground: Ground::new(),
            pair: Pair::new(),
            coordinators: Vec::new(),
            workers: Vec::new(),
        };
        for number in 1..=coordinators {
            let started = town.coordinator(number, "127.0.0.1:0", true);
            town.coordinators.push(started);
            town.until("to have a vote", |status| voters(status) == number);
        }
        for number in 1..=workers {
            let started = town.worker(number, true);
            town.workers.push(started);
        }
        let joined = |status: &Value| of_state(status, "ready") == workers;
        town.until("to have workers", joined);
        let model = |status: &Value| status["models"].as_array().map(Vec::len) == Some(2);
        town.until("to know the models", model);
        town
    }

    fn models(&self) -> [String; 2] {
        [demo_model(), self.pair.next()].map(|path| path.to_str().expect("UTF-8").to_owned())
    }

    fn coordinator(&self, number: usize, listen: &str, new: bool) -> Process {
        let name = format!("coordinator-{number}");
        let ([one, two], data, others) = (self.models(), self.ground.data(&name), self.addresses());
        let mut args = vec!["coordinator", &one, &two, "--port", "0", "--listen", listen];
        // Answers of a debug build on busy cores may take long.
        args.extend(["--data", &data, "--name", &name, "--grace", "120s"]);
        if number > 1 {
            args.extend(["--join", &others]);
        }
        let token = self.ground.token("coordinator");
        if number > 1 && new {
            args.extend(["--token", &token]);
        }
        Process::start(&args)
    }

    fn worker(&self, number: usize, new: bool) -> Process {
        let name = format!("worker-{number}");
        let ([one, two], data, at) = (self.models(), self.ground.data(&name), self.addresses());
        let mut args = vec!["worker", &one, &two, "--coordinator", &at, "--data", &data];
        args.extend(["--name", &name, "--threads", "1"]);
        let token = self.ground.token("worker");
        if new {
            args.extend(["--token", &token]);
        }
        Process::start(&args)
    }

    fn addresses(&self) -> String {
        self.coordinators.iter().map(Process::cluster).collect::<Vec<_>>().join(",")
    }

    fn gateways(&self) -> Vec<Http> {
        self.coordinators.iter().map(Process::http).collect()
    }

    /// What the cluster looks like; patient, as every process may be busy starting.
    fn status(&self) -> Value {
        self.until("to say anything", |_| true)
    }

    fn until(&self, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            let shown = self.ground.operate(&self.addresses(), &["status", "--output", "json"]);
            let status: Option<Value> = serde_json::from_slice(&shown.stdout).ok();
            match status {
                Some(status) if holds(&status) => return status,
                status => assert!(Instant::now() < until, "too long {what}: {status:?}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// An operator's command that must succeed; what it printed.
    fn run(&self, args: &[&str]) -> String {
        let done = self.ground.operate(&self.addresses(), args);
        let errors = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{args:?}: {errors}");
        String::from_utf8(done.stdout).expect("text")
    }

    /// An operator's command that must fail; what it complained of.
    fn refused(&self, args: &[&str]) -> String {
        let done = self.ground.operate(&self.addresses(), args);
        assert!(!done.status.success(), "{args:?} was accepted");
        String::from_utf8(done.stderr).expect("text")
    }

    fn swap(&self, args: &[&str]) -> Value {
        let line = self.run(&[&["swap", ALIAS, "--output", "json"], args].concat());
        assert_eq!(line.lines().count(), 1, "{line}");
        serde_json::from_str(&line).expect("a line of JSON")
    }

    fn deploy(&self, name: &str, model: &str, ranks: usize) {
        self.run(&["deploy", name, "--model", model, "--ranks", &ranks.to_string()]);
        self.until("to serve", |status| serves(status, name));
    }
}

fn voters(status: &Value) -> usize {
    let members = status["control"]["members"].as_array().into_iter().flatten();
    members.filter(|member| member["part"] == "voter").count()
}

fn of_state(status: &Value, state: &str) -> usize {
    let nodes = status["nodes"].as_array().into_iter().flatten();
    nodes.filter(|node| node["role"] == "worker" && node["state"] == state).count()
}

fn serves(status: &Value, name: &str) -> bool {
    let deployments = status["deployments"].as_array().into_iter().flatten();
    deployments.filter(|one| one["name"] == name && one["waiting_for"] == "").count() == 1
}

fn names_of(list: &Value) -> Vec<&str> {
    let all = list.as_array().into_iter().flatten();
    all.filter_map(|one| one["name"].as_str()).collect()
}

/// Ranks of groups that are not over, by deployment.
fn ranks_of(status: &Value, deployment: &str) -> usize {
    let groups = status["groups"].as_array().into_iter().flatten();
    let live = groups.filter(|one| one["phase"] != "retired" && one["deployment"] == deployment);
    live.map(|group| group["ranks"].as_array().map_or(0, Vec::len)).sum()
}

fn steps(swap: &Value) -> Vec<&str> {
    let steps = swap["steps"].as_array().into_iter().flatten();
    steps.filter_map(|step| step["step"].as_str()).collect()
}

/// An answer that a client got.
#[derive(Debug, Clone, Copy)]
struct Got {
    /// From whose gateway.
    gateway: usize,
    began: Instant,
    ended: Instant,
    /// Which of the two models' answers it is.
    model: usize,
}

/// Clients that ask for everything again and again; each begins with a gateway of its own, and
/// goes to the next one where nobody answers.
struct Clients {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    gateways: Arc<Mutex<Vec<Http>>>,
    threads: Vec<JoinHandle<Vec<Got>>>,
}

impl Clients {
    fn start(gateways: Vec<Http>, gold: &Arc<[Vec<String>; 2]>, clients: usize) -> Self {
        let (stop, count) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let gateways = Arc::new(Mutex::new(gateways));
        let client = |number: usize| {
            let (gateways, gold, stop) = (gateways.clone(), Arc::clone(gold), stop.clone());
            let count = count.clone();
            std::thread::spawn(move || client(number, &gateways, &gold, (&stop, &count)))
        };
        let threads = (0..clients).map(client).collect();
        Self { stop, count, gateways, threads }
    }

    /// Waits for so many more answers.
    fn more(&self, answers: usize) {
        let goal = self.count.load(Ordering::SeqCst) + answers;
        let until = Instant::now() + PATIENCE;
        while self.count.load(Ordering::SeqCst) < goal {
            assert!(!self.threads.iter().any(JoinHandle::is_finished), "a client ended");
            assert!(Instant::now() < until, "the clients stand still");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn end(self) -> Vec<Got> {
        self.stop.store(true, Ordering::SeqCst);
        let threads = self.threads.into_iter();
        threads.flat_map(|thread| thread.join().expect("a client without error")).collect()
    }
}

fn client(
    number: usize,
    gateways: &Mutex<Vec<Http>>,
    gold: &[Vec<String>; 2],
    (stop, count): (&AtomicBool, &AtomicUsize),
) -> Vec<Got> {
    let (asked, mut got) = (asked(), Vec::new());
    let (mut at, mut gateway, mut turned) = (number, number, 0);
    while !stop.load(Ordering::SeqCst) {
        let which = at % asked.len();
        let (path, body) = &asked[which];
        let (http, of) = {
            let all = gateways.lock().expect("not poisoned");
            (all[gateway % all.len()].clone(), all.len())
        };
        let began = Instant::now();
        let Some(text) = try_shown(&http, path, body, &mut Vec::new()) else {
            (gateway, turned) = (gateway + 1, turned + 1);
            assert!(turned <= of, "nobody answers");
            continue;
        };
        let model = gold.iter().position(|answers| answers[which] == text);
        let model = model.unwrap_or_else(|| panic!("neither model's answer to {body}: {text}"));
        got.push(Got { gateway: gateway % of, began, ended: Instant::now(), model });
        count.fetch_add(1, Ordering::SeqCst);
        (at, turned) = (at + 3, 0);
    }
    got
}

/// What a swap's command was seen to do: when it began and ended, and in between, at the earliest
/// and at the latest, switched.
struct Seen {
    began: Instant,
    ended: Instant,
    switched: [Instant; 2],
}

fn watched(town: &Town, args: &[&str]) -> (Value, Seen) {
    let began = Instant::now();
    let done = town.swap(args);
    let ended = Instant::now();
    let seconds = |value: &Value| Duration::from_secs_f64(value.as_f64().expect("seconds"));
    let at = |name: &str| {
        let mut steps = done["steps"].as_array().into_iter().flatten();
        seconds(&steps.find(|step| step["step"] == name).expect("that step")["seconds"])
    };
    // The command's own clock starts a moment after ours, and stops a moment before.
    let after = seconds(&done["seconds"]).saturating_sub(at("switched"));
    let switched = [began + at("serves"), ended - after];
    (done, Seen { began, ended, switched })
}

/// Answers begun before the switch are the old model's to their end, those begun after it the new
/// one's; and at no gateway does the old one answer after the new one has.
fn check(got: &[Got], seen: &Seen, [old, new]: [usize; 2], (from, to): (Instant, Instant)) {
    let within: Vec<&Got> = got.iter().filter(|g| from <= g.began && g.began < to).collect();
    for g in &within {
        assert!(g.began > seen.began || g.model == old, "new before the swap: {g:?}");
        assert!(g.began < seen.ended || g.model == new, "old after the swap: {g:?}");
        let follows =
            |one: &&Got| one.gateway == g.gateway && one.model == new && one.ended <= g.began;
        let back = g.model == old && within.iter().copied().any(|one| follows(&one));
        assert!(!back, "the old one's after the new one's: {g:?}");
    }
    let [earliest, latest] = seen.switched;
    let over = within.iter().filter(|g| g.began < earliest && g.ended > latest);
    let over: Vec<_> = over.collect();
    println!(
        "{} answers, {} of them begun before the switch and ended after",
        within.len(),
        over.len()
    );
    assert!(!over.is_empty() && over.iter().all(|g| g.model == old), "{over:?}");
    assert!(within.iter().any(|g| g.model == new), "no answer of the new one");
}

#[test]
fn a_model_is_swapped_and_swapped_back_without_a_failed_request() {
    let town = Town::start(3, 4);
    let gold = Arc::new(town.pair.gold());
    town.begin(2);
    let clients = Clients::start(town.gateways(), &gold, 4);
    let start = Instant::now();
    clients.more(8);

    let (done, first) = watched(&town, &["--to", "two", "--model", "next"]);
    let all = ["room", "deployed", "serves", "switched", "draining", "rested", "freed"];
    assert_eq!(steps(&done), all, "{done}");
    assert_eq!((&done["before"], &done["rested"]), (&json!("one"), &json!(true)));
    let status = town.status();
    assert_eq!(names_of(&status["deployments"]), ["two"]);
    assert_eq!((ranks_of(&status, "one"), ranks_of(&status, "two")), (0, 2), "{status}");
    assert_eq!(status["aliases"][0]["deployment"], "two");
    for http in town.gateways() {
        http.ready();
        let card: Value = serde_json::from_str(&http.get("/v1/models/chat").1).expect("a card");
        assert_eq!((&card["id"], &card["root"]), (&json!(ALIAS), &json!("two")));
    }
    clients.more(8);
    let middle = Instant::now();
    clients.more(8);

    let (done, second) = watched(&town, &["--to", "one", "--model", "demo"]);
    assert_eq!(steps(&done), all, "{done}");
    let status = town.status();
    assert_eq!((ranks_of(&status, "one"), ranks_of(&status, "two")), (2, 0), "{status}");
    clients.more(8);
    let got = clients.end();
    check(&got, &first, [0, 1], (start, middle));
    check(&got, &second, [1, 0], (middle, Instant::now()));
}

#[test]
fn a_swap_without_room_says_what_is_missing_and_changes_nothing() {
    let town = Town::start(1, 2);
    town.begin(2);
    let before = town.status();
    let errors = town.refused(&["swap", ALIAS, "--to", "two", "--model", "next"]);
    let missing = "there is no room for two beside chat: 0 of 2 devices with the model are free";
    assert!(errors.contains(missing), "{errors}");
    let errors = town.refused(&["swap", ALIAS, "--to", "two", "--model", "next", "--ranks", "1"]);
    assert!(errors.contains("0 of 1 devices"), "{errors}");
    let errors = town.refused(&["swap", ALIAS, "--to", "next", "--ranks", "99"]);
    assert!(errors.contains("ranks"), "{errors}");
    let errors = town.refused(&["swap", "else", "--to", "next"]);
    assert!(errors.contains("else is no alias"), "{errors}");
    let after = town.status();
    for part in ["deployments", "aliases", "models"] {
        assert_eq!(after[part], before[part], "something was changed");
    }
    // Nor can what clients use be taken away under them.
    let errors = town.refused(&["undeploy", "one"]);
    assert!(errors.contains("the alias chat points at one"), "{errors}");
}

#[test]
fn a_swap_that_was_interrupted_goes_on_where_it_was() {
    let town = Town::start(1, 2);
    town.begin(1);
    // As if the command had ended once the new one was deployed.
    town.run(&["deploy", "next"]);
    let errors = town.refused(&["swap", ALIAS, "--to", "next", "--model", "demo"]);
    assert!(errors.contains("next is deployed otherwise"), "{errors}");
    let done = town.swap(&["--to", "next", "--model", "next", "--ranks", "1"]);
    assert_eq!(steps(&done), ["room", "serves", "switched", "draining", "rested", "freed"]);
    // As if it had ended after the switch.
    town.deploy("one", "demo", 1);
    town.run(&["alias", ALIAS, "--to", "one"]);
    let done = town.swap(&["--to", "one"]);
    assert_eq!(steps(&done), ["draining", "rested", "freed"]);
    assert_eq!(names_of(&town.status()["deployments"]), ["one"]);
    // And when there is nothing left to do.
    assert_eq!(steps(&town.swap(&["--to", "one"])), ["done"]);
}

/// Both models have the same tensors: what a device has kept of one must not become the other's.
#[test]
fn a_device_that_served_one_model_serves_the_other_with_its_own_weights() {
    let town = Town::start(1, 1);
    let gold = town.pair.gold();
    let http = town.gateways().remove(0);
    for (name, model, of) in [("one", "demo", 0), ("two", "next", 1), ("three", "demo", 0)] {
        town.deploy(name, model, 1);
        town.run(&["alias", ALIAS, "--to", name]);
        http.wait("to know it", || {
            let card: Value = serde_json::from_str(&http.get("/v1/models/chat").1).expect("JSON");
            card["root"] == name
        });
        for ((path, body), gold) in asked().iter().zip(&gold[of]).skip(8) {
            assert_eq!(shown(&http, path, body, &mut Vec::new()), *gold, "{name}");
        }
        town.run(&["alias", ALIAS, "--remove"]);
        town.run(&["undeploy", name]);
    }
}

#[test]
fn a_deployment_that_drains_ends_what_it_has_begun_and_begins_nothing() {
    use std::io::BufRead;

    let town = Town::start(1, 1);
    town.deploy("one", "demo", 1);
    let http = town.gateways().remove(0);
    let body = json!({"model": "one", "prompt": "Once more unto the", "max_tokens": 700,
                      "temperature": 0, "ignore_eos": true, "stream": true});
    let mut lines = http.stream("/v1/completions", &body).lines();
    lines.next().expect("a line").expect("text");
    let (who, at) = (town.ground.operator(), town.addresses());
    let drain = std::thread::spawn(move || {
        operate(&who, &at, &["undeploy", "one", "--drain", "--output", "json"])
    });
    town.until("to drain", |status| status["deployments"][0]["draining"] == true);
    http.wait("to refuse", || {
        let short = json!({"model": "one", "prompt": "No", "max_tokens": 1});
        let (status, answer) = http.post("/v1/completions", &short);
        assert!(status == 200 || status == 503, "{answer}");
        status == 503
    });
    let last = lines.map(|line| line.expect("a stream that is not cut off"));
    let last = last.filter(|line| !line.is_empty()).last();
    assert_eq!(last.as_deref(), Some("data: [DONE]"));
    let drained = drain.join().expect("a command that ends");
    let drained: Value = serde_json::from_slice(&drained.stdout).expect("a line of JSON");
    assert_eq!(
        (steps(&drained), &drained["rested"]),
        (vec!["draining", "rested", "freed"], &json!(true))
    );
    assert_eq!(names_of(&town.status()["deployments"]), [""; 0]);
}

#[test]
fn every_process_is_restarted_in_turn_without_a_failed_request() {
    let mut town = Town::start(3, 3);
    let gold = Arc::new(town.pair.gold());
    town.begin(2);
    let clients = Clients::start(town.gateways(), &gold, 4);
    clients.more(6);
    for number in 1..=town.workers.len() {
        let name = format!("worker-{number}");
        town.run(&["drain", &name]);
        let on = |status: &Value| {
            let nodes = status["nodes"].as_array().into_iter().flatten();
            let mut id =
                nodes.filter(|node| node["name"] == *name).map(|node| node["node"].clone());
            let id = id.next().expect("the worker");
            let groups = status["groups"].as_array().into_iter().flatten();
            let live = groups.filter(|group| group["phase"] != "retired");
            let mut ranks = live.flat_map(|group| group["ranks"].as_array().into_iter().flatten());
            ranks.any(|rank| rank["node"] == id)
        };
        town.until("to be moved", |status| !on(status) && serves(status, "one"));
        town.workers[number - 1].terminate();
        clients.more(2);
        town.workers[number - 1] = town.worker(number, false);
        town.until("to be back", |status| of_state(status, "draining") == 1);
        town.run(&["drain", &name, "--undo"]);
        town.until("to be open", |status| of_state(status, "ready") == 3);
        clients.more(2);
    }
    for number in 1..=town.coordinators.len() {
        let listen = town.coordinators[number - 1].cluster();
        town.coordinators[number - 1].terminate();
        clients.more(2);
        let again = town.coordinator(number, &listen, false);
        again.http().ready();
        clients.gateways.lock().expect("not poisoned")[number - 1] = again.http();
        town.coordinators[number - 1] = again;
        town.until("to be whole", |status| {
            let members = status["control"]["members"].as_array().into_iter().flatten();
            let active = members.filter(|member| member["active"] == true).count();
            status["current"] == true && voters(status) == 3 && active >= 1
        });
        clients.more(4);
    }
    let got = clients.end();
    assert!(got.iter().all(|one| one.model == 0));
    println!("{} answers while 3 workers and 3 coordinators were restarted", got.len());
}
