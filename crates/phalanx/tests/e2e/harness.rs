//! Processes of the command under test, and a small HTTP client.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything may take before a test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The command under test.
pub(crate) fn phalanx() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_phalanx"));
    command.env_remove("PHALANX_LOG");
    command
}

/// A directory of the source tree.
pub(crate) fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// The demo's model.
pub(crate) fn demo_model() -> PathBuf {
    source("models/demo")
}

/// A golden checkpoint.
pub(crate) fn golden_model(name: &str) -> PathBuf {
    source("tests/golden").join(name)
}

/// A supervised process: it ends when this value is dropped.
pub(crate) struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    /// Where it listens.
    pub(crate) addresses: Value,
}

impl Process {
    /// Starts `phalanx ARGS --supervised` and waits until it listens.
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::launch(phalanx(), args)
    }

    /// The same with a command of one's own, which ends in that of `phalanx`.
    pub(crate) fn launch(mut command: Command, args: &[&str]) -> Self {
        command.args(["--log", "warn"]).args(args).arg("--supervised");
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a process");
        let stdin = child.stdin.take();
        let mut line = String::new();
        let stdout = child.stdout.take().expect("its standard output");
        BufReader::new(stdout).read_line(&mut line).expect("its first line");
        let addresses = serde_json::from_str(&line).unwrap_or_else(|error| {
            let _ = child.wait();
            panic!("{args:?} did not start: {error}: {line:?}")
        });
        Self { child, stdin, addresses }
    }

    /// Where it serves HTTP.
    pub(crate) fn http(&self) -> Http {
        Http { base: format!("http://{}", self.addresses["http"].as_str().expect("an address")) }
    }

    /// Where nodes reach it.
    pub(crate) fn cluster(&self) -> String {
        self.addresses["cluster"].as_str().expect("an address").to_owned()
    }

    /// Its number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended.
    pub(crate) fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Asks it to end, and waits until it has.
    pub(crate) fn terminate(&mut self) {
        let sent = Command::new("kill").args(["-TERM", &self.id().to_string()]).status();
        assert!(sent.expect("the kill command").success());
        let ended = self.child.wait().expect("a process that ends");
        assert!(ended.success(), "it ended with {ended}");
    }

    /// Kills it at once, without a chance to say goodbye.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("a process to kill");
        self.child.wait().expect("a killed process");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !std::thread::panicking() {
            panic!("a process did not end when its parent let go of it");
        }
    }
}

/// Where the nodes of a cluster keep their identities and logs; gone with the test.
pub(crate) struct Ground {
    directory: tempfile::TempDir,
    /// Coordinators that have had a name so far.
    coordinators: std::cell::Cell<u64>,
}

impl Ground {
    /// Makes a new cluster, none of which runs yet.
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let ground = Self { directory, coordinators: std::cell::Cell::new(1) };
        let made = output(phalanx().args(["init", "--data", &ground.data("coordinator-1")]));
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        ground
    }

    /// A node's data directory.
    pub(crate) fn data(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().expect("a path in UTF-8").to_owned()
    }

    /// The operator's credential.
    pub(crate) fn operator(&self) -> String {
        self.data("coordinator-1/operator.pem")
    }

    /// A join token for one node.
    pub(crate) fn token(&self, role: &str) -> String {
        let data = self.data("coordinator-1");
        let made = output(phalanx().args(["token", "--data", &data, "--role", role]));
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        String::from_utf8(made.stdout).expect("text").trim().to_owned()
    }

    /// Starts a worker that joins through `coordinators`.
    pub(crate) fn worker(
        &self,
        model: &Path,
        name: &str,
        coordinators: &str,
        options: &[&str],
    ) -> Process {
        let path = model.to_str().expect("a path in UTF-8");
        let (data, token) = (self.data(name), self.token("worker"));
        let mut args = vec!["worker", path, "--coordinator", coordinators, "--data", &data];
        args.extend(["--name", name, "--token", &token, "--threads", "1"]);
        args.extend(options);
        Process::start(&args)
    }

    /// Starts the first coordinator, or again.
    pub(crate) fn founder(&self, model: &Path, listen: &str, options: &[&str]) -> Process {
        let path = model.to_str().expect("a path in UTF-8");
        let data = self.data("coordinator-1");
        let mut args = vec!["coordinator", path, "--port", "0", "--listen", listen];
        args.extend(["--data", &data, "--name", "coordinator-1"]);
        args.extend(options);
        Process::start(&args)
    }

    /// A number for another coordinator's name.
    pub(crate) fn next(&self) -> u64 {
        self.coordinators.set(self.coordinators.get() + 1);
        self.coordinators.get()
    }

    /// Starts a coordinator that joins, or again.
    pub(crate) fn coordinator(
        &self,
        model: &Path,
        name: &str,
        listen: &str,
        coordinators: &str,
    ) -> Process {
        let path = model.to_str().expect("a path in UTF-8");
        let (data, token) = (self.data(name), self.token("coordinator"));
        let mut args = vec!["coordinator", path, "--port", "0", "--listen", listen];
        args.extend(["--data", &data, "--name", name, "--token", &token]);
        if !coordinators.is_empty() {
            args.extend(["--join", coordinators]);
        }
        Process::start(&args)
    }

    /// Starts a worker again, with the identity it has.
    pub(crate) fn worker_again(&self, model: &Path, name: &str, coordinators: &str) -> Process {
        let path = model.to_str().expect("a path in UTF-8");
        let data = self.data(name);
        let args = ["worker", path, "--coordinator", coordinators, "--data", &data];
        Process::start(&[&args[..], &["--name", name, "--threads", "1"]].concat())
    }

    /// Runs an operator's command.
    pub(crate) fn operate(&self, coordinators: &str, args: &[&str]) -> Output {
        operate(&self.operator(), coordinators, args)
    }

    /// What the cluster looks like.
    pub(crate) fn status(&self, coordinators: &str) -> Value {
        status(&self.operator(), coordinators, &[])
    }
}

/// Runs the command of the operator whose credential is in the file `identity`.
pub(crate) fn operate(identity: &str, coordinators: &str, args: &[&str]) -> Output {
    let mut command = phalanx();
    command.args(args).args(["--coordinator", coordinators, "--identity", identity]);
    output(&mut command)
}

/// What the cluster looks like to that operator.
pub(crate) fn status(identity: &str, coordinators: &str, options: &[&str]) -> Value {
    let args = [&["status", "--output", "json"], options].concat();
    let shown = operate(identity, coordinators, &args);
    let errors = String::from_utf8_lossy(&shown.stderr).into_owned();
    serde_json::from_slice(&shown.stdout).unwrap_or_else(|_| panic!("no status: {errors}"))
}

/// A coordinator with workers as processes of their own.
pub(crate) struct Cluster {
    pub(crate) workers: Vec<Process>,
    pub(crate) coordinator: Process,
    pub(crate) ground: Ground,
    model: PathBuf,
}

impl Cluster {
    /// Starts one worker per rank, with more options for the coordinator.
    pub(crate) fn start(model: &Path, ranks: usize, options: &[&str]) -> Self {
        let ground = Ground::new();
        let count = ranks.to_string();
        let mut args = vec!["--ranks", &count];
        args.extend(options);
        let coordinator = ground.founder(model, "127.0.0.1:0", &args);
        let model = model.to_owned();
        let mut cluster = Self { workers: Vec::new(), coordinator, ground, model };
        (0..ranks).for_each(|_| cluster.join());
        cluster.http().ready();
        cluster
    }

    /// Starts another worker.
    pub(crate) fn join(&mut self) {
        let name = format!("worker-{}", self.workers.len() + 1);
        let coordinator = self.coordinator.cluster();
        self.workers.push(self.ground.worker(&self.model, &name, &coordinator, &[]));
    }

    pub(crate) fn http(&self) -> Http {
        self.coordinator.http()
    }
}

/// Serves a model from one process.
pub(crate) fn serve(model: &Path, options: &[&str]) -> Process {
    let mut args = vec!["serve", model.to_str().expect("a path in UTF-8"), "--port", "0"];
    args.extend(options);
    let process = Process::start(&args);
    process.http().ready();
    process
}

/// Runs a command that is expected to end by itself.
pub(crate) fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().expect("a process")
}

/// A server's API.
#[derive(Clone)]
pub(crate) struct Http {
    pub(crate) base: String,
}

impl Http {
    fn agent() -> ureq::Agent {
        let config = ureq::Agent::config_builder().http_status_as_error(false);
        config.timeout_global(Some(PATIENCE)).build().into()
    }

    /// Status and body of a GET.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let response = Self::agent().get(format!("{}{path}", self.base)).call();
        let mut response = response.expect("an answer");
        (response.status().as_u16(), response.body_mut().read_to_string().expect("a body"))
    }

    /// Status of a GET that may take no longer, if it is answered.
    pub(crate) fn status_within(&self, path: &str, limit: Duration) -> Option<u16> {
        let config = ureq::Agent::config_builder().http_status_as_error(false);
        let agent: ureq::Agent = config.timeout_global(Some(limit)).build().into();
        let answer = agent.get(format!("{}{path}", self.base)).call();
        answer.ok().map(|answer| answer.status().as_u16())
    }

    /// Status, seconds of `Retry-After` and body of a POST, if it is answered at all.
    pub(crate) fn try_post(&self, path: &str, body: &Value) -> Option<(u16, Option<u64>, String)> {
        let request = Self::agent().post(format!("{}{path}", self.base));
        let mut response = request.send_json(body).ok()?;
        let after = response.headers().get("retry-after").and_then(|value| value.to_str().ok());
        let after = after.and_then(|value| value.parse().ok());
        let text = response.body_mut().read_to_string().ok()?;
        Some((response.status().as_u16(), after, text))
    }

    /// Status and body of a POST with an idempotency key, if it is answered at all.
    pub(crate) fn try_post_keyed(
        &self,
        path: &str,
        body: &Value,
        key: &str,
    ) -> Option<(u16, String)> {
        let request = Self::agent().post(format!("{}{path}", self.base));
        let mut response = request.header("idempotency-key", key).send_json(body).ok()?;
        let text = response.body_mut().read_to_string().ok()?;
        Some((response.status().as_u16(), text))
    }

    /// Status and body of a POST of raw bytes.
    pub(crate) fn post_raw(&self, path: &str, body: &[u8]) -> (u16, String) {
        let request = Self::agent().post(format!("{}{path}", self.base));
        let request = request.header("content-type", "application/json");
        let mut response = request.send(body).expect("an answer");
        (response.status().as_u16(), response.body_mut().read_to_string().expect("a body"))
    }

    /// Status and JSON of a POST.
    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.post_raw(path, body.to_string().as_bytes());
        let json = serde_json::from_str(&text);
        (status, json.unwrap_or_else(|e| panic!("{path} answered {text:?}: {e}")))
    }

    /// A completion that must succeed.
    pub(crate) fn complete(&self, body: &Value) -> Value {
        let (status, json) = self.post("/v1/completions", body);
        assert_eq!(status, 200, "{json}");
        json
    }

    /// Streams an answer to its end; returns its text.
    pub(crate) fn stream_whole(&self, path: &str, body: &Value) -> String {
        let mut body = body.clone();
        body["stream"] = Value::Bool(true);
        let mut text = String::new();
        for line in self.stream(path, &body).lines() {
            let line = line.expect("a stream that is not cut off");
            match line.strip_prefix("data: ") {
                Some("[DONE]") => return text,
                Some(data) => {
                    let event: Value = serde_json::from_str(data).expect("an event in JSON");
                    assert!(event.get("error").is_none(), "{event}");
                    text.push_str(event["choices"][0]["text"].as_str().unwrap_or_default());
                }
                None => {}
            }
        }
        panic!("the stream ended without [DONE]")
    }

    /// A stream's reader; dropping it disconnects.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> impl BufRead + use<> {
        self.try_stream(path, body).expect("an answer")
    }

    /// The body of an answer that must be a good one, as it comes, if there is an answer at all.
    pub(crate) fn try_stream(&self, path: &str, body: &Value) -> Option<impl BufRead + use<>> {
        let request = Self::agent().post(format!("{}{path}", self.base));
        let mut response = request.send_json(body).ok()?;
        let status = response.status();
        assert_eq!(status, 200, "{}", response.body_mut().read_to_string().unwrap_or_default());
        let reader: Box<dyn Read> = Box::new(response.into_body().into_reader());
        Some(BufReader::new(reader))
    }

    /// Waits until the server is healthy.
    pub(crate) fn ready(&self) {
        self.wait("to be healthy", || self.get("/health").0 == 200);
    }

    /// Waits until something holds.
    pub(crate) fn wait(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds() {
            assert!(Instant::now() < deadline, "{} took too long {what}", self.base);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The value of a metric, summed over its labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        let lines = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']))
        });
        let values: Vec<f64> = lines
            .filter_map(|line| line.rsplit(' ').next().and_then(|value| value.parse().ok()))
            .collect();
        assert!(!values.is_empty(), "{name} is not among the metrics");
        values.iter().sum()
    }
}
