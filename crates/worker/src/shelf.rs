//! Weights without a rank: what a device held when its rank ended, for the next one.
//!
//! A group that is repaired goes on within moments, mostly on the same devices; what those hold
//! already need not be read again. Nothing stays for long: a worker whose lease has run out keeps
//! nothing, and what no rank asks for is freed after a while.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use compute::CpuDevice;
use decoder::Kept;

/// How long weights wait for a rank.
const KEEP: Duration = Duration::from_secs(60);
/// And where they were loaded for one that others have to load for, too.
const PREPARED: Duration = Duration::from_secs(3_600);

/// What a device held: weights of the model of a digest, and until when they wait.
struct Waiting {
    until: Instant,
    digest: String,
    weights: Kept<CpuDevice>,
}

/// By device: its weights. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Shelf {
    kept: Arc<Mutex<BTreeMap<usize, Waiting>>>,
}

impl Shelf {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, Waiting>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a device's weights here, which are of the model `digest`.
    pub(crate) fn put(&self, device: usize, digest: &str, weights: Kept<CpuDevice>) {
        self.put_for(device, digest, weights, KEEP);
    }

    fn put_for(&self, device: usize, digest: &str, weights: Kept<CpuDevice>, keep: Duration) {
        if !weights.is_empty() {
            let (until, digest) = (Instant::now() + keep, digest.to_owned());
            self.lock().insert(device, Waiting { until, digest, weights });
        }
    }

    /// Loads what a rank will need, with the help of what the device holds, and leaves it here.
    /// Where that fails, what was there or was loaded stays.
    ///
    /// # Errors
    /// Those of `load`.
    pub(crate) fn fill(
        &self,
        device: usize,
        digest: &str,
        load: impl FnOnce(&mut Option<Kept<CpuDevice>>) -> Result<Kept<CpuDevice>, String>,
    ) -> Result<(), String> {
        let mut before = self.take(device, digest);
        let loaded = load(&mut before);
        if let Some(before) = before {
            self.put(device, digest, before);
        }
        self.put_for(device, digest, loaded?, PREPARED);
        Ok(())
    }

    /// Takes what the device held, for its next rank, which is of the model `digest`. Weights of
    /// another model are freed: it may have the same tensors and other numbers in them.
    pub(crate) fn take(&self, device: usize, digest: &str) -> Option<Kept<CpuDevice>> {
        let waiting = self.lock().remove(&device).filter(|waiting| waiting.digest == digest);
        waiting.map(|waiting| waiting.weights)
    }

    /// Frees what has waited too long.
    pub(crate) fn expire(&self) {
        let now = Instant::now();
        self.lock().retain(|_, waiting| waiting.until > now);
    }

    /// Whether nothing waits here.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Frees everything.
    pub(crate) fn clear(&self) {
        self.lock().clear();
    }
}
