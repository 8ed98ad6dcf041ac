//! Threads that share the tasks of one operation.
//!
//! A step is hundreds of operations of some ten to some thousand microseconds each, so how long it
//! takes to hand one out counts: helpers that have just worked look for the next operation for a
//! while before they sleep, and nothing is allocated or queued. Whoever works takes the next task
//! off a common counter; an operation that its caller has finished is closed, so a helper that
//! is slow to wake delays nobody.

use crate::DeviceError;
use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Work below this many operations (about 20 us of one core) is not worth sharing.
const WORTH_SHARING: usize = 200_000;

/// How long a helper without work looks for some before it sleeps: longer than what lies between
/// two operations of a step, short beside what it costs to be woken when a step comes.
const ALERT: Duration = Duration::from_micros(100);

/// Looks between two looks at the clock.
const LOOKS: usize = 64;

/// The calling thread and `threads - 1` helpers. Who runs which task never shows in results.
pub(crate) struct Team {
    crew: Arc<Crew>,
    helpers: Vec<JoinHandle<()>>,
    /// Held by whoever has the helpers; another caller works alone meanwhile.
    turn: Mutex<()>,
}

/// What the threads of a team share.
struct Crew {
    /// The operation's number (high half), [`OPEN`], and how many helpers are at work on it.
    state: AtomicU64,
    /// Written by the thread that has the turn, while the operation is closed and nobody works.
    job: UnsafeCell<Option<Job>>,
    /// Helpers that sleep or are about to.
    asleep: AtomicUsize,
    ended: AtomicBool,
    bed: Mutex<()>,
    wake: Condvar,
    /// What a helper panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only as its documentation says and read only by helpers that counted
// themselves in while the operation was open; `state` orders the two.
unsafe impl Sync for Crew {}
// SAFETY: as above; what a job points to is `Sync`.
unsafe impl Send for Crew {}

/// The operation under way, its lifetime forgotten: `Team::share` outlives every use.
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn() + Sync));

/// Helpers may join the operation.
const OPEN: u64 = 1 << 31;
/// One operation, or one helper.
const OPERATION: u64 = 1 << 32;

impl Crew {
    /// Waits for an operation other than number `seen` and joins it; `None` when the team ends.
    fn join(&self, seen: u64) -> Option<u64> {
        let mut since = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if let Some(number) = self.try_join(seen) {
                    return Some(number);
                }
                std::hint::spin_loop();
            }
            if self.ended.load(Ordering::SeqCst) {
                return None;
            }
            if since.elapsed() >= ALERT {
                self.sleep(seen);
                since = Instant::now();
            }
        }
    }

    fn try_join(&self, seen: u64) -> Option<u64> {
        let state = self.state.load(Ordering::SeqCst);
        let joinable = state & OPEN != 0 && state / OPERATION != seen;
        let (acquire, order) = (Ordering::SeqCst, Ordering::Relaxed);
        let joined =
            joinable && self.state.compare_exchange(state, state + 1, acquire, order).is_ok();
        joined.then_some(state / OPERATION)
    }

    /// Returns when there may be something to do.
    fn sleep(&self, seen: u64) {
        let mut bed = lock(&self.bed);
        self.asleep.fetch_add(1, Ordering::SeqCst);
        // Whoever opens an operation looks at `asleep` afterwards, so one of the two is seen.
        loop {
            let state = self.state.load(Ordering::SeqCst);
            let work = state & OPEN != 0 && state / OPERATION != seen;
            if work || self.ended.load(Ordering::SeqCst) {
                break;
            }
            bed = self.wake.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake_all(&self) {
        if self.asleep.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.bed));
            self.wake.notify_all();
        }
    }

    /// A helper's life.
    fn help(&self) {
        let mut seen = 0;
        while let Some(number) = self.join(seen) {
            seen = number;
            // SAFETY: this helper is counted in, so whoever opened the operation waits for it
            // before the job goes away or is replaced.
            let result = catch_unwind(AssertUnwindSafe(|| unsafe {
                if let Some(Job(work)) = *self.job.get() {
                    (*work)();
                }
            }));
            if let Err(panic) = result {
                lock(&self.panic).get_or_insert(panic);
            }
            self.state.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code that can panic runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Closes the operation and waits until no helper works on it, also when its caller panics.
struct Close<'a>(&'a Crew);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::SeqCst);
        let mut looks = 0_usize;
        while !self.0.state.load(Ordering::SeqCst).is_multiple_of(OPERATION) {
            looks += 1;
            // The helper is in its last task. Where it lost its processor, this one is to have it.
            if looks.is_multiple_of(1024) { thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

impl Team {
    pub(crate) fn new(threads: usize) -> Result<Team, DeviceError> {
        if threads == 0 {
            return Err(DeviceError::NoThreads);
        }
        let crew = Arc::new(Crew {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            asleep: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
            bed: Mutex::new(()),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        });
        // Made first, so that the helpers so far end where one cannot be started.
        let mut team = Team { crew, helpers: Vec::new(), turn: Mutex::new(()) };
        for number in 1..threads {
            let crew = Arc::clone(&team.crew);
            let helper = thread::Builder::new()
                .name(format!("compute-{number}"))
                .spawn(move || crew.help())
                .map_err(|e| DeviceError::Threads { wanted: threads, reason: e.to_string() })?;
            team.helpers.push(helper);
        }
        Ok(team)
    }

    /// Threads, the caller's included.
    pub(crate) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// How many threads `operations` deserve.
    pub(crate) fn hands(&self, operations: usize) -> usize {
        if operations < WORTH_SHARING { 1 } else { self.threads() }
    }

    /// Calls `work(scratch, task)` once for every task below `tasks`, on at most
    /// `scratches.len()` threads with a scratch each, the caller's among them.
    pub(crate) fn run<S: Send>(
        &self,
        tasks: usize,
        scratches: &mut [S],
        work: impl Fn(&mut S, usize) + Sync,
    ) {
        let next = AtomicUsize::new(0);
        let tasks_of = |scratch: &mut S| {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    return;
                }
                work(scratch, task);
            }
        };
        let Some((own, others)) = scratches.split_first_mut() else { return };
        if tasks < 2 || others.is_empty() || self.helpers.is_empty() {
            return tasks_of(own);
        }
        let (seats, count) = (AtomicUsize::new(0), others.len());
        let shared = Disjoint::new(others);
        let help = || {
            let seat = seats.fetch_add(1, Ordering::Relaxed);
            if seat < count {
                // SAFETY: every helper has a seat of its own.
                tasks_of(&mut unsafe { shared.slice(seat, 1) }[0]);
            }
        };
        self.share(&help, || tasks_of(own));
    }

    /// Runs `own` while helpers run `help`. Returns when all have returned.
    fn share(&self, help: &(dyn Fn() + Sync), own: impl FnOnce()) {
        // A caller beside this one, or a task of an operation, works alone.
        let turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            // A caller panicked in its own part; the helpers are as good as ever.
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => return own(),
        };
        // SAFETY: only the lifetime changes. The job is used until `Close` has waited for the last
        // helper, which happens before this function returns or unwinds.
        let job: *const (dyn Fn() + Sync + 'static) = unsafe { std::mem::transmute(help) };
        let crew = &*self.crew;
        // Left behind where the caller panicked, too.
        drop(lock(&crew.panic).take());
        // SAFETY: this thread has the turn, the operation before is closed and left by everybody.
        unsafe { *crew.job.get() = Some(Job(job)) };
        let number = crew.state.load(Ordering::SeqCst) / OPERATION;
        // Number 0 is what helpers begin with; it is never an operation's.
        let number = if number == u64::from(u32::MAX) { 1 } else { number + 1 };
        crew.state.store((number * OPERATION) | OPEN, Ordering::SeqCst);
        let close = Close(crew);
        crew.wake_all();
        own();
        drop(close);
        let panicked = lock(&crew.panic).take();
        if let Some(panic) = panicked {
            drop(turn);
            resume_unwind(panic);
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

impl Drop for Team {
    fn drop(&mut self) {
        self.crew.ended.store(true, Ordering::SeqCst);
        drop(lock(&self.crew.bed));
        self.crew.wake.notify_all();
        for helper in self.helpers.drain(..) {
            // A helper cannot panic: it catches what its work does.
            let _ = helper.join();
        }
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
    fn operations_in_quick_and_slow_succession_are_all_done() {
        let team = Team::new(3).unwrap();
        for round in 0..2_000 {
            if round % 500 == 0 {
                // Long enough for the helpers to fall asleep.
                thread::sleep(ALERT * 20);
            }
            let done: Vec<AtomicUsize> = (0..round % 7 + 2).map(|_| AtomicUsize::new(0)).collect();
            team.run(done.len(), &mut [0; 3], |own, task| {
                *own += 1;
                done[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn helpers_take_part() {
        let team = Team::new(2).unwrap();
        let mut tasks = [0; 2];
        let met = AtomicUsize::new(0);
        // Each of two tasks waits for the other, so one thread alone would never end.
        team.run(2, &mut tasks, |own, _| {
            *own += 1;
            met.fetch_add(1, Ordering::SeqCst);
            while met.load(Ordering::SeqCst) < 2 {
                thread::yield_now();
            }
        });
        assert_eq!(tasks, [1, 1]);
    }

    #[test]
    fn callers_side_by_side_and_within_each_other_are_served() {
        let team = Team::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        team.run(4, &mut [(); 2], |(), _| {
                            team.run(3, &mut [(); 2], |(), _| {
                                sum.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 200 * 4 * 3);
    }

    #[test]
    fn a_panic_anywhere_reaches_the_caller_and_ends_no_helper() {
        let team = Team::new(2).unwrap();
        for bad in 0..16 {
            let both = AtomicUsize::new(0);
            let run = || {
                team.run(16, &mut [(); 2], |(), task| {
                    both.fetch_add(1, Ordering::SeqCst);
                    assert_ne!(task, bad, "on purpose");
                });
            };
            let result = catch_unwind(AssertUnwindSafe(run));
            assert!(result.is_err(), "task {bad}");
        }
        let mut values = vec![0; 64];
        team.each(&mut values, 1, 1_000_000, |first, part| {
            part.iter_mut().enumerate().for_each(|(i, v)| *v = first + i);
        });
        assert!(values.iter().enumerate().all(|(i, v)| i == *v));
    }

    #[test]
    fn a_team_needs_a_thread() {
        assert_eq!(Team::new(0).err(), Some(DeviceError::NoThreads));
    }
}
