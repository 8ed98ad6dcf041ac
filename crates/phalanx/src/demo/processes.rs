//! The processes of the demo cluster: started, watched, and ended with this one.
//!
//! Each child holds the other end of a pipe as its standard input and ends when that closes, so
//! none is left behind even if this process is killed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow, bail};
use identity::{ClusterCa, OPERATOR_FILE, Role, TOKEN_LIFE};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::args;
use crate::init;
use crate::process::Announcement;

/// How long a child may take to end once its standard input is closed.
const GRACE: Duration = Duration::from_secs(5);
/// How long a child may take to say where it listens.
const START: Duration = Duration::from_secs(60);
/// The coordinator's name.
const COORDINATOR: &str = "coordinator";
/// Between two looks at the children.
const LOOK: Duration = Duration::from_millis(100);

/// Child processes by name, and the identities they show each other.
pub(crate) struct Processes {
    children: Vec<(String, Child)>,
    private: TempDir,
    ca: ClusterCa,
    /// How much the children say.
    log: &'static str,
}

impl Processes {
    /// A new cluster, none of which runs yet.
    pub(crate) fn new(log: &'static str) -> anyhow::Result<Self> {
        let private = tempfile::Builder::new().prefix("phalanx-demo-").tempdir();
        let private = private.context("a private temporary directory")?;
        let ca = init::found(&private.path().join(COORDINATOR), "demo")?;
        Ok(Self { children: Vec::new(), private, ca, log })
    }

    fn data(&self, name: &str) -> PathBuf {
        self.private.path().join(name)
    }

    /// How an operator reaches the coordinator.
    pub(crate) fn reach(&self, coordinator: SocketAddr) -> args::Reach {
        args::Reach {
            coordinator: vec![coordinator.to_string()],
            identity: self.data(COORDINATOR).join(OPERATOR_FILE),
            output: args::Output::Table,
        }
    }

    /// Starts the coordinator and returns where it listens.
    pub(crate) async fn coordinator(
        &mut self,
        model: &Path,
        port: u16,
        ranks: usize,
    ) -> anyhow::Result<Announcement> {
        let mut command = phalanx(self.log)?;
        command.arg("coordinator").arg(model).arg("--data").arg(self.data(COORDINATOR));
        command.args(["--port", &port.to_string(), "--ranks", &ranks.to_string()]);
        command.args(["--listen", "127.0.0.1:0"]);
        self.start(COORDINATOR.to_owned(), command).await
    }

    /// Starts a worker that joins the coordinator.
    pub(crate) async fn worker(
        &mut self,
        model: &Path,
        coordinator: SocketAddr,
        number: usize,
    ) -> anyhow::Result<()> {
        let name = format!("worker-{number}");
        let token = self.ca.token(Role::Worker, 1, TOKEN_LIFE, SystemTime::now())?;
        let mut command = phalanx(self.log)?;
        command.arg("worker").arg(model).args(["--name", &name, "--threads", "1"]);
        command.arg("--data").arg(self.data(&name)).env("PHALANX_TOKEN", token.to_token()?);
        command.args(["--coordinator", &coordinator.to_string()]);
        self.start(name, command).await.map(|_| ())
    }

    async fn start(&mut self, name: String, mut command: Command) -> anyhow::Result<Announcement> {
        command.arg("--supervised").stdin(Stdio::piped()).stdout(Stdio::piped());
        command.kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("cannot start the {name}"))?;
        let stdout = child.stdout.take().context("a child without standard output")?;
        self.children.push((name.clone(), child));
        let mut line = String::new();
        let mut reader = BufReader::new(stdout);
        let read = tokio::time::timeout(START, reader.read_line(&mut line)).await;
        match read {
            Ok(Ok(bytes)) if bytes > 0 => serde_json::from_str(&line).context("its first line"),
            Ok(_) => bail!("the {name} ended before it listened"),
            Err(_) => bail!("the {name} did not listen within {} s", START.as_secs()),
        }
    }

    /// Ends a child at once, without a chance to say goodbye, and takes it off the list.
    pub(crate) async fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        let at = self.children.iter().position(|(known, _)| known == name);
        let at = at.with_context(|| format!("there is no {name} to kill"))?;
        let (_, mut child) = self.children.remove(at);
        child.kill().await.with_context(|| format!("the {name} cannot be killed"))
    }

    /// Waits until any child ends, which none should.
    pub(crate) async fn first_to_end(&mut self) -> anyhow::Error {
        loop {
            for (name, child) in &mut self.children {
                match child.try_wait() {
                    Ok(None) => {}
                    Ok(Some(status)) => return anyhow!("the {name} ended: {status}"),
                    Err(error) => return anyhow!("the {name} cannot be watched: {error}"),
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Ends all children: politely first.
    pub(crate) async fn end(&mut self) {
        for (_, child) in &mut self.children {
            drop(child.stdin.take());
        }
        for (name, child) in &mut self.children {
            if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
                eprintln!("the {name} does not end; killing it");
                // It may have ended in this moment, which is as well.
                let _ = child.kill().await;
            }
        }
        self.children.clear();
    }
}

/// This very binary, quiet: the demo speaks for its processes.
fn phalanx(log: &str) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("the path of this program")?);
    command.args(["--log", log]);
    Ok(command)
}
