//! The lease: until when nobody else may hold this worker's ranks.
//!
//! It counts from when a heartbeat was sent, not from when its answer came: so it ends here before
//! it ends at the leader, whose clock started later.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Before the first welcome there is nothing to fence.
const UNKNOWN: Duration = Duration::from_secs(1);
/// The answer to a heartbeat may take this part of the lease before the session is given up, so
/// that there is time left to find another leader.
const PATIENCE: u32 = 4;

/// Shared between the session and whoever watches it.
pub(super) struct Lease {
    state: Mutex<State>,
}

struct State {
    length: Duration,
    until: Instant,
}

impl Default for Lease {
    fn default() -> Self {
        let state = State { length: UNKNOWN, until: Instant::now() };
        Self { state: Mutex::new(state) }
    }
}

impl Lease {
    /// A leader grants a lease of this length, as of `began`.
    pub(super) fn granted(&self, began: Instant, length: Duration) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = State { length, until: began + length };
    }

    /// A heartbeat that was sent then was answered.
    pub(super) fn renewed(&self, sent: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.until = state.until.max(sent + state.length);
    }

    /// A coordinator says that nobody leads: nobody can give our ranks away just now.
    pub(super) fn attested(&self) {
        self.renewed(Instant::now());
    }

    /// How long it lasts.
    pub(super) fn left(&self) -> Duration {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.until.saturating_duration_since(Instant::now())
    }
}

/// The heartbeats of one session.
pub(super) struct Beats {
    began: Instant,
    interval: Option<tokio::time::Interval>,
    patience: Duration,
    /// When those were sent that are not answered yet.
    sent: VecDeque<Instant>,
}

impl Beats {
    /// None are sent before the welcome.
    pub(super) fn new() -> Self {
        let patience = UNKNOWN;
        Self { began: Instant::now(), interval: None, patience, sent: VecDeque::new() }
    }

    /// Starts them; returns when the session began.
    pub(super) fn start(&mut self, every: Duration, lease_ms: u64) -> Instant {
        self.patience = Duration::from_millis(lease_ms) / PATIENCE;
        let mut interval = tokio::time::interval(every);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.interval = Some(interval);
        self.began
    }

    /// Waits until the next one is due and takes it as sent.
    pub(super) async fn next(&mut self) {
        match &mut self.interval {
            Some(interval) => {
                interval.tick().await;
                self.sent.push_back(Instant::now());
            }
            None => std::future::pending().await,
        }
    }

    /// One was answered: when it was sent.
    pub(super) fn answered(&mut self) -> Option<Instant> {
        self.sent.pop_front()
    }

    /// Whether the oldest has waited too long for its answer.
    pub(super) fn unanswered(&self) -> bool {
        self.sent.front().is_some_and(|sent| sent.elapsed() > self.patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_counts_from_the_heartbeat_that_was_answered() {
        let lease = Lease::default();
        assert!(lease.left().is_zero());
        let began = Instant::now();
        lease.granted(began, Duration::from_secs(100));
        assert!(lease.left() <= Duration::from_secs(100));
        let sent = began + Duration::from_secs(10);
        lease.renewed(sent);
        assert!(lease.left() > Duration::from_secs(105));
        // An answer to an older heartbeat takes nothing away.
        lease.renewed(began);
        assert!(lease.left() > Duration::from_secs(105));
        lease.granted(began, Duration::ZERO);
        assert!(lease.left().is_zero());
    }
}
