//! What every role needs of its process: logs, signals, memory, a parent that may go away.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, bail};
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

/// Bytes of memory that are free for a model now: nine tenths of what the kernel calls available,
/// or of what the process's control groups allow if that is less.
pub(crate) fn free_memory() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let Some(available) = available(&text) else {
        bail!("the kernel does not tell the available memory; give --memory")
    };
    let group = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limit = memory_limit(&group, |path| std::fs::read_to_string(path).ok());
    Ok(available.min(limit.unwrap_or(u64::MAX)) / 10 * 9)
}

fn available(meminfo: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = rest.trim().trim_end_matches("kB").trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The least limit of the process's control group and of those above it (version 2). A container
/// and a service are not told of theirs by the kernel's available memory, and exceeding it is
/// death.
fn memory_limit(groups: &str, read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let own = Path::new("/sys/fs/cgroup").join(own);
    let above = own.ancestors().take_while(|path| path.starts_with("/sys/fs/cgroup"));
    let limits = above.filter_map(|path| read(&path.join("memory.max"))?.trim().parse().ok());
    limits.min()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{available, memory_limit};

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:  100 kB\nMemFree: 1 kB\nMemAvailable:      42 kB\n";
        assert_eq!(available(text), Some(42 * 1024));
        assert_eq!(available("MemTotal: 100 kB\n"), None);
    }

    #[test]
    fn the_least_limit_of_a_process_and_of_those_above_it_counts() {
        let files = [
            ("/sys/fs/cgroup/a/memory.max", "4096\n"),
            ("/sys/fs/cgroup/a/b/memory.max", "8192\n"),
            ("/sys/fs/cgroup/a/b/c/memory.max", "max\n"),
            // A container sees its own group as the root of all.
            ("/sys/fs/cgroup/memory.max", "65536\n"),
        ];
        let read = |path: &Path| {
            let found = files.iter().find(|(name, _)| Path::new(name) == path);
            found.map(|(_, text)| (*text).to_owned())
        };
        assert_eq!(memory_limit("1:cpu:/x\n0::/a/b/c\n", read), Some(4096));
        assert_eq!(memory_limit("0::/\n", read), Some(65536));
        assert_eq!(memory_limit("0::/a/b\n", |_| None), None);
        assert_eq!(memory_limit("1:memory:/a\n", read), None);
    }
}
