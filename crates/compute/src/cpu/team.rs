//! Threads that share the tasks of one operation.

use crate::DeviceError;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Work below this many operations (about 20 us of one core) is not worth waking a thread for.
const WORTH_SHARING: usize = 200_000;

/// The calling thread and `threads - 1` helpers. Who runs which task never shows in results.
pub(crate) struct Team {
    pool: Option<ThreadPool>,
    threads: usize,
}

impl Team {
    pub(crate) fn new(threads: usize) -> Result<Team, DeviceError> {
        if threads == 0 {
            return Err(DeviceError::NoThreads);
        }
        let pool = (threads > 1)
            .then(|| {
                ThreadPoolBuilder::new()
                    .num_threads(threads - 1)
                    .thread_name(|i| format!("compute-{}", i + 1))
                    .build()
            })
            .transpose()
            .map_err(|error| DeviceError::Threads { wanted: threads, reason: error.to_string() })?;
        Ok(Team { pool, threads })
    }

    /// Threads, the caller's included.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// How many threads `operations` deserve.
    pub(crate) fn hands(&self, operations: usize) -> usize {
        if operations < WORTH_SHARING { 1 } else { self.threads }
    }

    /// Calls `work(scratch, task)` once for every task below `tasks`, on at most
    /// `scratches.len()` threads with a scratch each. The caller works too, so that a call whose
    /// helpers are slow to wake loses nothing.
    pub(crate) fn run<S: Send>(
        &self,
        tasks: usize,
        scratches: &mut [S],
        work: impl Fn(&mut S, usize) + Sync,
    ) {
        let next = AtomicUsize::new(0);
        let share = |scratch: &mut S| {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    return;
                }
                work(scratch, task);
            }
        };
        let Some((own, others)) = scratches.split_first_mut() else { return };
        match &self.pool {
            Some(pool) if tasks > 1 && !others.is_empty() => pool.in_place_scope(|scope| {
                for scratch in others.iter_mut().take(tasks - 1) {
                    scope.spawn(|_| share(scratch));
                }
                share(own);
            }),
            _ => share(own),
        }
    }

    /// Splits `values` into runs of `per_item` elements and calls `work(first item, items)` on
    /// disjoint groups of them. `cost` is the number of operations per item.
    pub(crate) fn each<T: Send + Sync>(
        &self,
        values: &mut [T],
        per_item: usize,
        cost: usize,
        work: impl Fn(usize, &mut [T]) + Sync,
    ) {
        if per_item == 0 || values.is_empty() {
            return;
        }
        let items = values.len() / per_item;
        let hands = self.hands(items.saturating_mul(cost));
        let per_task = if hands == 1 { items } else { items.div_ceil(hands * 4) }.max(1);
        let chunk = per_task * per_item;
        let (total, shared) = (values.len(), Disjoint::new(values));
        self.run(total.div_ceil(chunk), &mut vec![(); hands], |(), task| {
            let start = task * chunk;
            // SAFETY: tasks are handed out once each and their ranges do not overlap.
            let part = unsafe { shared.slice(start, chunk.min(total - start)) };
            work(task * per_task, part);
        });
    }
}

/// A slice of which several threads change different parts.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `slice`, whose callers promise that parts do not overlap; then it is
// no more than handing each thread its own `&mut [T]`.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(values: &'a mut [T]) -> Self {
        Disjoint { start: values.as_mut_ptr(), len: values.len(), owner: PhantomData }
    }

    /// `len` elements from `start` on. Panics beyond the end.
    ///
    /// # Safety
    /// No two slices that live at the same time may overlap.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that parts do not overlap")]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part of a slice beyond its end");
        // SAFETY: in bounds as just checked, of a slice borrowed mutably for `'a`; the caller
        // promises that nobody else holds these elements.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_visited_once() {
        for threads in [1, 2, 3] {
            let team = Team::new(threads).unwrap();
            for items in [0, 1, 2, 7, 40] {
                let mut values = vec![0; items * 3];
                team.each(&mut values, 3, 1_000_000, |first, part| {
                    for (i, item) in part.chunks_mut(3).enumerate() {
                        item.iter_mut().for_each(|v| *v += first + i + 1);
                    }
                });
                let expected: Vec<usize> = (0..items * 3).map(|i| i / 3 + 1).collect();
                assert_eq!(values, expected);
            }
        }
    }

    #[test]
    fn a_team_needs_a_thread() {
        assert_eq!(Team::new(0).err(), Some(DeviceError::NoThreads));
    }
}
