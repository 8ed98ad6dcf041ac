//! What every role needs of its process: logs, signals, memory, a parent that may go away.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// The line a supervised process writes once its addresses are bound.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Announcement {
    /// Where HTTP is served, by a coordinator.
    pub(crate) http: Option<SocketAddr>,
    /// Where nodes reach this process.
    pub(crate) cluster: SocketAddr,
}

/// Sends logs to standard error. A filter that cannot be read falls back to `info`, and says so.
pub(crate) fn log_to_stderr(filter: &str) {
    let parsed = EnvFilter::try_new(filter);
    let wrong = parsed.is_err();
    let filter_set = parsed.unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter_set)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    if wrong {
        tracing::warn!(filter, "the log filter cannot be read; using info");
    }
}

/// A token that is cancelled by Ctrl-C, by SIGTERM, or, where supervised, by the parent's end.
pub(crate) fn shutdown(supervised: bool) -> std::io::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let token = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let cancel = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = parent_gone(supervised) => {}
        }
        cancel.cancel();
        // A second signal ends the process at once, whatever hangs.
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        std::process::exit(130);
    });
    Ok(token)
}

/// Waits until standard input closes: the parent holds its other end.
async fn parent_gone(supervised: bool) {
    if !supervised {
        return std::future::pending().await;
    }
    let mut stdin = tokio::io::stdin();
    let mut buffer = [0; 64];
    while !matches!(stdin.read(&mut buffer).await, Ok(0) | Err(_)) {}
}

/// Tells the parent where this process listens.
pub(crate) fn announce(supervised: bool, announcement: &Announcement) -> anyhow::Result<()> {
    if supervised {
        line(&serde_json::to_string(announcement)?).context("the parent is gone")?;
    }
    Ok(())
}

/// Writes a line to standard output, which may be closed or full.
pub(crate) fn line(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Bytes of memory that are free for a model now: nine tenths of what the kernel calls available.
pub(crate) fn free_memory() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    match kib {
        Some(kib) => Ok(kib * 1024 / 10 * 9),
        None => anyhow::bail!("the kernel does not tell the available memory; give --memory"),
    }
}
