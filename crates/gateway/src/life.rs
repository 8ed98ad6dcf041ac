//! Whether this process gets on: its runtime, and what else of it was given to be watched.
//!
//! A thread of its own counts how often it has looked since a task of the runtime has last run.
//! Counted are looks, not time: a process that was stopped, or had no processor, has not looked
//! either, and is not called dead for it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Between two looks, and between two beats of the runtime.
const LOOK: Duration = Duration::from_millis(100);
/// After so many looks without a beat the runtime does not get on: ten seconds, when others have
/// two for the longest answer of health.
const MISSED: u32 = 100;

/// Says what in this process does not get on, in words for an operator; `None` where all does.
/// It must not wait for anything.
pub type Vitals = Arc<dyn Fn() -> Option<String> + Send + Sync>;

/// The pulse of a runtime, and of what else was given.
pub(crate) struct Life {
    pulse: Arc<Pulse>,
    vitals: Vitals,
}

#[derive(Default)]
struct Pulse {
    missed: AtomicU32,
    /// Said in the log, once for each time.
    told: AtomicBool,
}

impl Life {
    /// Watches the runtime that this is called in, for as long as the value is there.
    ///
    /// # Errors
    /// The thread cannot be had.
    pub(crate) fn watch(vitals: Vitals) -> std::io::Result<Self> {
        let pulse = Arc::new(Pulse::default());
        let beating = Arc::downgrade(&pulse);
        tokio::spawn(beat(beating));
        let watched = Arc::downgrade(&pulse);
        let thread = std::thread::Builder::new().name("life".to_owned());
        thread.spawn(move || look(&watched))?;
        Ok(Self { pulse, vitals })
    }

    /// What does not get on, if anything.
    pub(crate) fn stalled(&self) -> Option<String> {
        match self.pulse.missed.load(Ordering::Relaxed) {
            missed if missed >= MISSED => Some("the gateway's runtime does not advance".to_owned()),
            _ => (self.vitals)(),
        }
    }
}

async fn beat(pulse: Weak<Pulse>) {
    while let Some(pulse) = pulse.upgrade() {
        pulse.missed.store(0, Ordering::Relaxed);
        pulse.told.store(false, Ordering::Relaxed);
        drop(pulse);
        tokio::time::sleep(LOOK).await;
    }
}

fn look(pulse: &Weak<Pulse>) {
    while let Some(pulse) = pulse.upgrade() {
        let missed = pulse.missed.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        // Whoever asks may get no answer at all, so the log says it as well.
        if missed >= MISSED && !pulse.told.swap(true, Ordering::Relaxed) {
            tracing::error!("the gateway's runtime does not advance");
        }
        drop(pulse);
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn well() -> Vitals {
        Arc::new(|| None)
    }

    /// Waits, without the runtime, until something holds.
    fn until(what: &str, holds: impl Fn() -> bool) {
        for _ in 0..6_000 {
            if holds() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("it took too long: {what}");
    }

    #[test]
    fn a_runtime_that_does_not_advance_is_told_from_one_that_does() {
        // Its only thread is this one: it runs while this test lets it.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = runtime.expect("a runtime");
        let life = runtime.block_on(async { Life::watch(well()).expect("a thread") });
        runtime.block_on(async { tokio::time::sleep(Duration::from_millis(500)).await });
        assert_eq!(life.stalled(), None);
        let stalled = || life.stalled().is_some_and(|why| why.contains("runtime"));
        until("the stall to be seen", stalled);
        runtime.block_on(async {
            while life.stalled().is_some() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
    }
}
