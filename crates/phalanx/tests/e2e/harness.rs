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
        let mut command = phalanx();
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

    /// Kills it at once, without a chance to say goodbye.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("a process to kill");
        self.child.wait().expect("a killed process");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(10);
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

/// A coordinator with workers as processes of their own.
pub(crate) struct Cluster {
    pub(crate) workers: Vec<Process>,
    pub(crate) coordinator: Process,
    model: PathBuf,
}

impl Cluster {
    /// Starts one worker per rank, with more options for the coordinator.
    pub(crate) fn start(model: &Path, ranks: usize, options: &[&str]) -> Self {
        let path = model.to_str().expect("a path in UTF-8");
        let count = ranks.to_string();
        let mut args = vec!["coordinator", path, "--port", "0", "--listen", "127.0.0.1:0"];
        args.extend(["--ranks", &count]);
        args.extend(options);
        let coordinator = Process::start(&args);
        let mut cluster = Self { workers: Vec::new(), coordinator, model: model.to_owned() };
        (0..ranks).for_each(|_| cluster.join());
        cluster.http().ready();
        cluster
    }

    /// Starts another worker.
    pub(crate) fn join(&mut self) {
        let path = self.model.to_str().expect("a path in UTF-8").to_owned();
        let coordinator = self.coordinator.cluster();
        let args = ["worker", &path, "--coordinator", &coordinator, "--threads", "1"];
        self.workers.push(Process::start(&args));
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

    /// A stream's reader; dropping it disconnects.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> impl BufRead + use<> {
        let request = Self::agent().post(format!("{}{path}", self.base));
        let response = request.send_json(body).expect("an answer");
        assert_eq!(response.status(), 200);
        let reader: Box<dyn Read> = Box::new(response.into_body().into_reader());
        BufReader::new(reader)
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
