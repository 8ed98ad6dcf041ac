//! Links between threads of one process.
//!
//! One bounded queue for each ordered pair of ranks. Frames carry the same header as on the wire
//! and are checked by the same code, so that what passes here passes there.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::frame::{Frame, FrameHeader, Kind, Membership};
use crate::link::{
    Abort, AbortHandle, CollectiveError, DEFAULT_TIMEOUT, Link, PENDING_FRAMES, check_peer,
    deadline_after,
};

/// One link per rank, all of the same group incarnation.
pub fn links(size: usize, membership: Membership) -> Vec<LocalLink> {
    let channels = (0..size * size).map(|_| Channel::default()).collect();
    let hub = Arc::new(Hub { size, channels, lost: AtomicUsize::new(NOBODY) });
    (0..size)
        .map(|rank| {
            let end = Arc::new(End { hub: hub.clone(), rank, aborted: AtomicBool::new(false) });
            LocalLink { end, membership, timeout: DEFAULT_TIMEOUT, broken: None }
        })
        .collect()
}

/// The frames under way from one rank to one other.
#[derive(Default)]
struct Channel {
    state: Mutex<ChannelState>,
    changed: Condvar,
}

#[derive(Default)]
struct ChannelState {
    frames: VecDeque<Frame>,
    /// Buffers that came free, for the next frames.
    spare: Vec<Vec<f32>>,
    /// One of the two ends is gone.
    closed: bool,
}

impl Channel {
    fn lock(&self) -> MutexGuard<'_, ChannelState> {
        // No code that can panic runs under the lock, so a poisoned state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when something is to be seen, or after [`ALERT`].
    fn await_alert(&self) {
        let until = Instant::now() + ALERT;
        loop {
            let state = self.lock();
            if !state.frames.is_empty() || state.closed || Instant::now() >= until {
                return;
            }
            drop(state);
            thread::yield_now();
        }
    }

    /// Waits for a change; `None` once the deadline has passed.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, ChannelState>,
        deadline: Instant,
    ) -> Option<MutexGuard<'a, ChannelState>> {
        let left = deadline.checked_duration_since(Instant::now()).filter(|d| !d.is_zero())?;
        let (state, _) =
            self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        Some(state)
    }
}

/// How long a receive gives way to other threads before it sleeps. Ranks that compute in step are
/// waited for about as long as that, and to be woken from sleep takes longer (measured: a round
/// trip of 69 us when both sides sleep). Giving way costs nothing where a thread has work to do.
const ALERT: Duration = Duration::from_micros(40);

/// No rank has this number.
const NOBODY: usize = usize::MAX;

struct Hub {
    size: usize,
    /// The rank that all others end for: the first that aborted, or was accused.
    lost: AtomicUsize,
    /// From `i` to `j` at `i * size + j`.
    channels: Vec<Channel>,
}

impl Hub {
    fn channel(&self, from: usize, to: usize) -> &Channel {
        &self.channels[from * self.size + to]
    }

    /// Remembers whom everybody ends for. The first stays; later ones are its consequences.
    fn lose(&self, rank: usize) {
        let _ = self.lost.compare_exchange(NOBODY, rank, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Ends every wait of every rank because of `rank`, for what they wait for may never come.
    fn abort(&self, rank: usize) {
        self.lose(rank);
        self.close(rank);
        for channel in &self.channels {
            // Under the lock, so that nobody is between looking and waiting.
            drop(channel.lock());
            channel.changed.notify_all();
        }
    }

    /// Closes every channel that ends at `rank`. Frames already sent can still be received.
    fn close(&self, rank: usize) {
        for peer in 0..self.size {
            for channel in [self.channel(rank, peer), self.channel(peer, rank)] {
                channel.lock().closed = true;
                channel.changed.notify_all();
            }
        }
    }
}

/// What an abort handle holds of a link.
struct End {
    hub: Arc<Hub>,
    rank: usize,
    aborted: AtomicBool,
}

impl Abort for End {
    fn abort(&self) {
        // Set before the channels close, so that whoever wakes here reads it.
        self.aborted.store(true, Ordering::SeqCst);
        self.hub.abort(self.rank);
    }
}

/// One rank's end. Dropping it closes it for every peer.
pub struct LocalLink {
    end: Arc<End>,
    membership: Membership,
    timeout: Duration,
    broken: Option<CollectiveError>,
}

impl LocalLink {
    fn header(&self, from: usize, kind: Kind, sequence: u64, elements: usize) -> FrameHeader {
        FrameHeader {
            membership: self.membership,
            sequence,
            kind,
            from: from as u32,
            elements: elements as u64,
        }
    }

    fn check_usable(&self, peer: usize) -> Result<(), CollectiveError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        if self.end.aborted.load(Ordering::SeqCst) {
            return Err(CollectiveError::Aborted);
        }
        check_peer(peer, self.rank(), self.size())
    }

    fn closed(&self, peer: usize, sequence: u64) -> CollectiveError {
        if self.end.aborted.load(Ordering::SeqCst) {
            return CollectiveError::Aborted;
        }
        let lost = self.end.hub.lost.load(Ordering::SeqCst);
        let peer = if [NOBODY, self.end.rank].contains(&lost) { peer } else { lost };
        CollectiveError::Closed { peer, sequence }
    }

    /// Keeps the first error, and lets the others know whose fault it is.
    fn fail(&mut self, error: &CollectiveError) {
        if let Some(peer) = error.peer() {
            self.end.hub.lose(peer);
        }
        self.broken = Some(error.clone());
    }

    fn put(&self, to: usize, header: FrameHeader, values: &[f32]) -> Result<(), CollectiveError> {
        let sequence = header.sequence;
        let deadline = deadline_after(self.timeout);
        let channel = self.end.hub.channel(self.rank(), to);
        let mut buffer = channel.lock().spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(values);
        let mut state = channel.lock();
        while !state.closed && state.frames.len() >= PENDING_FRAMES {
            state = channel
                .wait(state, deadline)
                .ok_or(CollectiveError::Timeout { peer: to, sequence })?;
        }
        if state.closed {
            return Err(self.closed(to, sequence));
        }
        state.frames.push_back(Frame { header, values: buffer });
        drop(state);
        channel.changed.notify_all();
        Ok(())
    }

    fn take(&self, expected: FrameHeader, into: &mut [f32]) -> Result<(), CollectiveError> {
        let (from, sequence) = (expected.from as usize, expected.sequence);
        let deadline = deadline_after(self.timeout);
        let channel = self.end.hub.channel(from, self.rank());
        channel.await_alert();
        let mut state = channel.lock();
        let frame = loop {
            if self.end.aborted.load(Ordering::SeqCst) {
                return Err(CollectiveError::Aborted);
            }
            if let Some(frame) = state.frames.pop_front() {
                break frame;
            }
            let lost = self.end.hub.lost.load(Ordering::SeqCst);
            if state.closed || ![NOBODY, self.end.rank].contains(&lost) {
                return Err(self.closed(from, sequence));
            }
            state = channel
                .wait(state, deadline)
                .ok_or(CollectiveError::Timeout { peer: from, sequence })?;
        };
        let was_full = state.frames.len() + 1 >= PENDING_FRAMES;
        drop(state);
        if was_full {
            channel.changed.notify_all();
        }
        frame.header.check(&expected)?;
        into.copy_from_slice(&frame.values);
        channel.lock().spare.push(frame.values);
        Ok(())
    }
}

impl Link for LocalLink {
    fn rank(&self) -> usize {
        self.end.rank
    }

    fn size(&self) -> usize {
        self.end.hub.size
    }

    fn membership(&self) -> Membership {
        self.membership
    }

    fn send(
        &mut self,
        to: usize,
        kind: Kind,
        sequence: u64,
        values: &[f32],
    ) -> Result<(), CollectiveError> {
        self.check_usable(to)?;
        let header = self.header(self.rank(), kind, sequence, values.len());
        self.put(to, header, values).inspect_err(|error| self.fail(error))
    }

    fn receive(
        &mut self,
        from: usize,
        kind: Kind,
        sequence: u64,
        into: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.check_usable(from)?;
        let expected = self.header(from, kind, sequence, into.len());
        self.take(expected, into).inspect_err(|error| self.fail(error))
    }

    fn accuse(&mut self, peer: usize) {
        if self.broken.is_none() {
            self.fail(&CollectiveError::Closed { peer, sequence: 0 });
            self.end.hub.abort(self.end.rank);
        }
    }

    fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    fn abort_handle(&self) -> AbortHandle {
        AbortHandle::new(&self.end)
    }
}

impl Drop for LocalLink {
    fn drop(&mut self) {
        if self.broken.is_some() || thread::panicking() {
            self.end.hub.abort(self.end.rank);
        } else {
            self.end.hub.close(self.end.rank);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Membership = Membership { group: 1, epoch: 2 };

    #[test]
    fn a_frame_of_another_epoch_is_refused_and_stores_nothing() {
        let mut pair = links(2, HERE);
        let mut second = pair.pop().expect("rank 1");
        let mut first = pair.pop().expect("rank 0");
        let old = Membership { group: 1, epoch: 1 };
        second.membership = old;
        second.send(0, Kind::Partials, 0, &[5.0]).expect("queued");
        let mut into = [7.0];
        let refused = CollectiveError::WrongEpoch { peer: 1, expected: HERE, got: old };
        let result = first.receive(1, Kind::Partials, 0, &mut into);
        assert_eq!(result, Err(refused.clone()));
        assert_eq!(into, [7.0]);
        // The first error is final.
        assert_eq!(first.send(1, Kind::Barrier, 1, &[]), Err(refused));
    }

    #[test]
    fn buffers_are_reused() {
        let mut pair = links(2, HERE);
        let mut second = pair.pop().expect("rank 1");
        let mut first = pair.pop().expect("rank 0");
        let mut into = [0.0; 4];
        for sequence in 0..100 {
            first.send(1, Kind::Partials, sequence, &[1.0; 4]).expect("sent");
            second.receive(0, Kind::Partials, sequence, &mut into).expect("received");
        }
        assert_eq!(first.end.hub.channel(0, 1).lock().spare.len(), 1);
    }
}
