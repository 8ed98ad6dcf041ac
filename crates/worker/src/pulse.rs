//! What a rank is doing, seen from other threads: the step it runs, whom it waits for and since
//! when, and what steps usually take.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use collective::{AbortHandle, Collective, CollectiveError, Kind, Link, Membership};
use compute::{CpuDevice, Device};
use decoder::Place;
use wire::pb;

use crate::rank::Failure;

/// A step may take this long whatever is usual.
const FLOOR: Duration = Duration::from_millis(500);
/// And so many times what is usual.
const TIMES: f64 = 20.0;
/// As long as nothing is usual yet.
const UNUSUAL: Duration = Duration::from_secs(2);
/// A step that is late, and of which nothing was seen for this long, does not get on. Others would
/// have ended one that waits; this one computes, or its thread hangs.
const STUCK: Duration = Duration::from_secs(10);
/// Steps that usual is made of, and how many there must be to call anything usual.
const SAMPLES: usize = 256;
const SAMPLES_MIN: usize = 8;

/// What steps take. A long prefill may well be late: that is a reason to ask, and no more.
#[derive(Debug, Default)]
struct Pace {
    /// Seconds that each of the last steps took.
    samples: VecDeque<f64>,
}

impl Pace {
    fn add(&mut self, took: Duration) {
        if self.samples.len() == SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back(took.as_secs_f64());
    }

    /// After how long a step is late: 20 times the 99th of a hundred, and half a second at least;
    /// two seconds while too few were seen.
    fn limit(&self) -> Duration {
        if self.samples.len() < SAMPLES_MIN {
            return UNUSUAL;
        }
        let mut sorted: Vec<f64> = self.samples.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let p99 = sorted[(sorted.len() - 1) * 99 / 100];
        Duration::try_from_secs_f64(TIMES * p99).unwrap_or(Duration::MAX).max(FLOOR)
    }
}

/// A step under way.
#[derive(Debug, Clone, Copy)]
struct Running {
    since: Instant,
    /// Collectives entered so far.
    calls: usize,
    /// When it was last seen to get on.
    moved: Instant,
}

#[derive(Default)]
struct State {
    rank: usize,
    steps: u64,
    layers: usize,
    running: Option<Running>,
    waits: Option<(usize, Instant)>,
    pace: Pace,
    link: Option<AbortHandle>,
    verdict: Option<Failure>,
    stalled: String,
}

/// A rank's state as others see it. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Pulse {
    state: Arc<Mutex<State>>,
}

/// What one look at a rank shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Look {
    pub(crate) steps: u64,
    /// How long the step under way has taken.
    pub(crate) running: Option<Duration>,
    /// The rank it waits for, and for how long.
    pub(crate) waits: Option<(usize, Duration)>,
    pub(crate) place: String,
    /// What the group waits for, where that takes too long.
    pub(crate) stalled: String,
}

impl Look {
    pub(crate) fn to_wire(&self) -> pb::PulseReply {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let waits_for = self.waits.and_then(|(peer, _)| u32::try_from(peer).ok());
        pb::PulseReply {
            steps: self.steps,
            running_ms: self.running.map(ms),
            waits_for,
            waits_ms: self.waits.map_or(0, |(_, time)| ms(time)),
            place: self.place.clone(),
            stalled: self.stalled.clone(),
        }
    }

    pub(crate) fn from_wire(reply: pb::PulseReply) -> Self {
        let ms = Duration::from_millis;
        let peer = reply.waits_for.and_then(|peer| usize::try_from(peer).ok());
        Self {
            steps: reply.steps,
            running: reply.running_ms.map(ms),
            waits: peer.map(|peer| (peer, ms(reply.waits_ms))),
            place: reply.place,
            stalled: reply.stalled,
        }
    }
}

impl Pulse {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rank has met its peers and is about to run steps of a model with that many layers.
    pub(crate) fn ready(&self, layers: usize, link: AbortHandle) {
        let mut state = self.lock();
        state.layers = layers;
        state.link = Some(link);
    }

    pub(crate) fn begin(&self) {
        let now = Instant::now();
        self.lock().running = Some(Running { since: now, calls: 0, moved: now });
    }

    /// The step is done, or failed.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        if let Some(Running { since, .. }) = state.running.take() {
            state.pace.add(since.elapsed());
        }
        state.steps += 1;
        state.stalled.clear();
    }

    fn call(&self) {
        if let Some(running) = &mut self.lock().running {
            running.calls += 1;
            running.moved = Instant::now();
        }
    }

    fn waits(&self, peer: Option<usize>) {
        self.lock().waits = peer.map(|peer| (peer, Instant::now()));
    }

    pub(crate) fn look(&self) -> Look {
        let state = self.lock();
        let calls = state.running.map_or(0, |running| running.calls);
        let place = calls.checked_sub(1).map(|call| Place::of(call, state.layers).to_string());
        Look {
            steps: state.steps,
            running: state.running.map(|running| running.since.elapsed()),
            waits: state.waits.map(|(peer, since)| (peer, since.elapsed())),
            place: place.unwrap_or_default(),
            stalled: state.stalled.clone(),
        }
    }

    /// Whether the step under way takes longer than is usual.
    pub(crate) fn is_late(&self) -> bool {
        let state = self.lock();
        state.running.is_some_and(|running| running.since.elapsed() > state.pace.limit())
    }

    /// In words, that the step under way does not get on. A part of it may take as long as the
    /// whole may before it is late: busy is not dead.
    pub(crate) fn stuck(&self) -> Option<String> {
        let state = self.lock();
        let Running { moved, calls, .. } = state.running?;
        let (limit, silent) = (state.pace.limit().max(STUCK), moved.elapsed());
        (silent > limit).then(|| {
            let place = calls.checked_sub(1).map(|call| Place::of(call, state.layers).to_string());
            let place = place.unwrap_or_else(|| "beginning".to_owned());
            let (rank, ms) = (state.rank, silent.as_millis());
            format!("rank {rank} has not advanced for {ms} ms, since the {place} of its step")
        })
    }

    /// Says what the group's step waits for, while that step lasts.
    pub(crate) fn stalls(&self, why: &str) {
        let mut state = self.lock();
        if state.running.is_some() {
            why.clone_into(&mut state.stalled);
        }
    }

    /// Ends the rank's collectives for a reason that the rank itself cannot know.
    pub(crate) fn condemn(&self, failure: Failure) {
        let mut state = self.lock();
        state.verdict = Some(failure);
        let link = state.link.clone();
        drop(state);
        if let Some(link) = link {
            link.abort();
        }
    }

    /// The reason, if its collectives were ended for one.
    pub(crate) fn verdict(&self) -> Option<Failure> {
        self.lock().verdict.clone()
    }
}

/// A link that says whom it waits for.
pub(crate) struct Watched {
    pub(crate) inner: Box<dyn Link>,
    pub(crate) pulse: Pulse,
}

impl Link for Watched {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn membership(&self) -> Membership {
        self.inner.membership()
    }

    fn send(
        &mut self,
        to: usize,
        kind: Kind,
        sequence: u64,
        values: &[f32],
    ) -> Result<(), CollectiveError> {
        self.inner.send(to, kind, sequence, values)
    }

    fn receive(
        &mut self,
        from: usize,
        kind: Kind,
        sequence: u64,
        into: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.pulse.waits(Some(from));
        let received = self.inner.receive(from, kind, sequence, into);
        self.pulse.waits(None);
        received
    }

    fn accuse(&mut self, peer: usize) {
        self.inner.accuse(peer);
    }

    fn set_timeout(&mut self, timeout: Duration) {
        self.inner.set_timeout(timeout);
    }

    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }
}

/// Collectives that are counted, so that it is known which one a step is in.
pub(crate) struct Counted {
    pub(crate) inner: Box<dyn Collective<CpuDevice>>,
    pub(crate) pulse: Pulse,
}

impl Collective<CpuDevice> for Counted {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn sum_stripes(
        &mut self,
        device: &CpuDevice,
        partials: &<CpuDevice as Device>::Tensor,
        rows: usize,
        out: &mut <CpuDevice as Device>::Tensor,
    ) -> Result<(), CollectiveError> {
        self.pulse.call();
        self.inner.sum_stripes(device, partials, rows, out)
    }

    fn gather_columns(
        &mut self,
        device: &CpuDevice,
        part: &<CpuDevice as Device>::Tensor,
        widths: &[usize],
        out: &mut <CpuDevice as Device>::Tensor,
    ) -> Result<(), CollectiveError> {
        self.pulse.call();
        self.inner.gather_columns(device, part, widths, out)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.inner.barrier()
    }

    fn accuse(&mut self, peer: usize) {
        self.inner.accuse(peer);
    }

    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_is_what_is_far_from_usual() {
        let mut pace = Pace::default();
        let ms = Duration::from_millis;
        for _ in 0..SAMPLES_MIN - 1 {
            pace.add(ms(5));
        }
        assert_eq!(pace.limit(), UNUSUAL, "nothing is usual yet");
        pace.add(ms(5));
        assert_eq!(pace.limit(), FLOOR);
        // What is slow for long is usual; a single slow step of many is not.
        pace.add(ms(400));
        (0..SAMPLES).for_each(|_| pace.add(ms(5)));
        assert_eq!(pace.limit(), FLOOR);
        (0..10).for_each(|_| pace.add(ms(100)));
        assert_eq!(pace.limit().as_millis(), 2_000);
    }

    #[test]
    fn stuck_is_late_and_without_a_sign() {
        let pulse = Pulse::default();
        let run = |silent: u64| {
            let mut state = pulse.lock();
            let since = Instant::now().checked_sub(Duration::from_secs(600)).expect("an uptime");
            let moved = Instant::now().checked_sub(Duration::from_secs(silent)).expect("as well");
            state.running = Some(Running { since, calls: 0, moved });
        };
        run(600);
        let why = pulse.stuck().expect("a step that hangs");
        assert!(why.contains("rank 0 has not advanced for 600"), "{why}");
        run(9);
        assert_eq!(pulse.stuck(), None, "it is slow, and has just entered a collective");
        (0..SAMPLES_MIN).for_each(|_| pulse.lock().pace.add(Duration::from_secs(1)));
        run(19);
        assert_eq!(pulse.stuck(), None, "so long may a part of such steps take");
        run(21);
        assert!(pulse.stuck().is_some());
        pulse.call();
        assert_eq!(pulse.stuck(), None, "it gets on");
        pulse.end();
        assert_eq!(pulse.stuck(), None, "nothing runs");
    }

    #[test]
    fn a_look_travels() {
        let look = Look {
            steps: 3,
            running: Some(Duration::from_millis(700)),
            waits: Some((1, Duration::from_millis(650))),
            place: Place::Attention { layer: 2 }.to_string(),
            stalled: "rank 1 does not answer".to_owned(),
        };
        assert_eq!(Look::from_wire(look.to_wire()), look);
        assert_eq!(Look::from_wire(Look::default().to_wire()), Look::default());
    }
}
