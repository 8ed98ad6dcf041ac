//! One rank alone, with the answers that it got before.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use compute::Device;

use super::{Call, Operation, Recording};
use crate::link::{Abort, AbortHandle, CollectiveError};
use crate::tree_collective::Collective;

/// How close to its recorded contribution a rank must come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tolerance {
    /// The same bits: the same device, or one that computes in the same order.
    Bits,
    /// `|got - recorded| <= this * |recorded|`, norms over all values of a call.
    RelativeL2(f64),
}

/// How one call compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Checked {
    /// The call, from 0.
    pub call: u64,
    /// Which collective.
    pub operation: Operation,
    /// `|got - recorded| / |recorded|`; infinite where nothing but zeros was recorded and something
    /// else came.
    pub relative_l2: f64,
    /// The first value with other bits.
    pub first: Option<usize>,
    /// Whether that is within the tolerance.
    pub within: bool,
}

/// How a replay differs from what was recorded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ReplayError {
    /// A contribution is not the recorded one.
    #[error(
        "rank {rank}, call {call} ({operation}): the contribution differs from value {first} on, \
         by {relative_l2:.3e} in all ({more} later calls differ, too)"
    )]
    Diverged {
        /// The rank.
        rank: u32,
        /// The first such call, from 0.
        call: u64,
        /// Which collective.
        operation: Operation,
        /// The first value with other bits.
        first: usize,
        /// As in [`Checked`].
        relative_l2: f64,
        /// How many calls after it were off as well.
        more: usize,
    },
    /// A call is another one than was recorded.
    #[error("rank {rank}, call {call} ({operation}): {what} is {got}, recorded was {recorded}")]
    Other {
        /// The rank.
        rank: u32,
        /// The call, from 0.
        call: u64,
        /// Which collective was called.
        operation: Operation,
        /// Which property differs.
        what: &'static str,
        /// What was recorded.
        recorded: u64,
        /// What came.
        got: u64,
    },
    /// More calls than were recorded.
    #[error("rank {rank}, call {call} ({operation}): the recording has ended")]
    Ended {
        /// The rank.
        rank: u32,
        /// The call, from 0.
        call: u64,
        /// Which collective was called.
        operation: Operation,
    },
    /// Fewer calls than were recorded.
    #[error("rank {rank} made {made} calls, recorded were {recorded}")]
    Unfinished {
        /// The rank.
        rank: u32,
        /// Calls that were made.
        made: u64,
        /// Calls that were recorded.
        recorded: u64,
    },
    /// The replay was stopped.
    #[error("the replay of rank {rank} was stopped: {source}")]
    Stopped {
        /// The rank.
        rank: u32,
        /// How.
        source: CollectiveError,
    },
}

/// A [`Collective`] without peers. A contribution that differs is noted, and the recorded answer
/// given all the same; a call that was not recorded fails, and every one after it.
pub struct Replayer {
    recording: Recording,
    tolerance: Tolerance,
    checked: Vec<Checked>,
    failed: Option<(CollectiveError, ReplayError)>,
    stop: Arc<Stop>,
}

#[derive(Default)]
struct Stop(AtomicBool);

impl Abort for Stop {
    fn abort(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Replayer {
    /// Plays a recording.
    pub fn new(recording: Recording, tolerance: Tolerance) -> Self {
        let stop = Arc::new(Stop::default());
        Self { recording, tolerance, checked: Vec::new(), failed: None, stop }
    }

    /// The calls so far, those that differ among them.
    pub fn checked(&self) -> &[Checked] {
        &self.checked
    }

    /// Every call compared.
    ///
    /// # Errors
    /// [`ReplayError`]: the call that failed, else the first that was off, else that calls are
    /// missing.
    pub fn finish(self) -> Result<Vec<Checked>, ReplayError> {
        if let Some((_, error)) = self.failed {
            return Err(error);
        }
        let rank = self.recording.rank;
        let mut off = self.checked.iter().filter(|checked| !checked.within);
        if let Some(worst) = off.next() {
            let Checked { call, operation, relative_l2, .. } = *worst;
            let (first, more) = (worst.first.unwrap_or(0), off.count());
            return Err(ReplayError::Diverged { rank, call, operation, first, relative_l2, more });
        }
        let (made, recorded) = (self.checked.len() as u64, self.recording.calls.len() as u64);
        if made != recorded {
            return Err(ReplayError::Unfinished { rank, made, recorded });
        }
        Ok(self.checked)
    }

    fn fail(&mut self, error: CollectiveError, reason: ReplayError) -> CollectiveError {
        self.failed = Some((error.clone(), reason));
        error
    }

    /// Compares a call, and gives the recorded answer.
    fn answer(
        &mut self,
        operation: Operation,
        (rows, widths): (usize, &[usize]),
        input: &[f32],
        out: Option<&mut [f32]>,
    ) -> Result<(), CollectiveError> {
        if let Some((error, _)) = &self.failed {
            return Err(error.clone());
        }
        let (rank, call) = (self.recording.rank, self.checked.len() as u64);
        if self.stop.0.load(Ordering::SeqCst) {
            let source = CollectiveError::Aborted;
            return Err(self.fail(source.clone(), ReplayError::Stopped { rank, source }));
        }
        let Some(recorded) = self.recording.calls.get(self.checked.len()) else {
            let error = mismatch(rank, call, "calls", call, call + 1);
            return Err(self.fail(error, ReplayError::Ended { rank, call, operation }));
        };
        let length = out.as_ref().map_or(0, |out| out.len());
        if let Some((what, expected, got)) =
            difference(recorded, operation, (rows, widths), (input.len(), length))
        {
            let error = mismatch(rank, call, what, expected, got);
            let reason =
                ReplayError::Other { rank, call, operation, what, recorded: expected, got };
            return Err(self.fail(error, reason));
        }
        let (relative_l2, first) = distance(input, &recorded.input);
        let within = match self.tolerance {
            Tolerance::Bits => first.is_none(),
            // Not a number is within nothing.
            Tolerance::RelativeL2(most) => first.is_none() || relative_l2 <= most,
        };
        if let Some(out) = out {
            out.copy_from_slice(&recorded.output);
        }
        self.checked.push(Checked { call, operation, relative_l2, first, within });
        Ok(())
    }
}

fn mismatch(rank: u32, call: u64, what: &'static str, expected: u64, got: u64) -> CollectiveError {
    CollectiveError::Mismatch { peer: rank as usize, sequence: call, what, expected, got }
}

/// The first property in which a call is not the recorded one: which, recorded, got.
fn difference(
    recorded: &Call,
    operation: Operation,
    (rows, widths): (usize, &[usize]),
    (input, output): (usize, usize),
) -> Option<(&'static str, u64, u64)> {
    let number = |length: usize| length as u64;
    let pairs = [
        ("operation", recorded.operation as u64, operation as u64),
        ("rows", recorded.rows, number(rows)),
        ("number of widths", number(recorded.widths.len()), number(widths.len())),
        ("elements put in", number(recorded.input.len()), number(input)),
        ("elements wanted", number(recorded.output.len()), number(output)),
    ];
    let widths = recorded.widths.iter().zip(widths).map(|(a, b)| ("width", *a, *b as u64));
    pairs.into_iter().chain(widths).find(|(_, recorded, got)| recorded != got)
}

/// Relative L2 distance, and the first value with other bits.
fn distance(got: &[f32], recorded: &[f32]) -> (f64, Option<usize>) {
    let pairs = || got.iter().zip(recorded);
    let first = pairs().position(|(a, b)| a.to_bits() != b.to_bits());
    if first.is_none() {
        return (0.0, None);
    }
    let square = |value: f64| value * value;
    let off: f64 = pairs().map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let whole: f64 = recorded.iter().map(|value| square(f64::from(*value))).sum();
    let relative = match (off, whole) {
        (0.0, _) => 0.0,
        (_, 0.0) => f64::INFINITY,
        _ => (off / whole).sqrt(),
    };
    (relative, first)
}

impl<D: Device> Collective<D> for Replayer {
    fn rank(&self) -> usize {
        self.recording.rank as usize
    }

    fn size(&self) -> usize {
        self.recording.size as usize
    }

    fn sum_stripes(
        &mut self,
        device: &D,
        partials: &D::Tensor,
        rows: usize,
        out: &mut D::Tensor,
    ) -> Result<(), CollectiveError> {
        let (input, out) = (device.host(partials), device.host_mut(out));
        self.answer(Operation::Sum, (rows, &[]), input, Some(out))
    }

    fn gather_columns(
        &mut self,
        device: &D,
        part: &D::Tensor,
        widths: &[usize],
        out: &mut D::Tensor,
    ) -> Result<(), CollectiveError> {
        let root = self.recording.rank == 0;
        let out = root.then(|| device.host_mut(out));
        self.answer(Operation::Gather, (0, widths), device.host(part), out)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.answer(Operation::Barrier, (0, &[]), &[], None)
    }

    fn accuse(&mut self, peer: usize) {
        let (rank, sequence) = (self.recording.rank, self.checked.len() as u64);
        let source = CollectiveError::Closed { peer, sequence };
        self.failed.get_or_insert((source.clone(), ReplayError::Stopped { rank, source }));
    }

    fn abort_handle(&self) -> AbortHandle {
        AbortHandle::new(&self.stop)
    }
}
