//! Collectives of one rank, kept, so that this rank can run again alone.
//!
//! A [`Recorder`] stands before any [`Collective`] and keeps what goes into each call and what
//! comes out. A [`Replayer`] answers the same calls from a [`Recording`] without a peer, and
//! compares what the rank puts in: to the bit, or within a relative distance where another device
//! computes. Since every answer is the recorded one, an error in one layer does not hide the next.

use compute::Device;

use crate::link::{AbortHandle, CollectiveError};
use crate::tree_collective::Collective;

mod file;
mod replay;

pub use file::RecordingError;
pub use replay::{Checked, ReplayError, Replayer, Tolerance};

/// Which collective a call was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Operation {
    /// [`Collective::sum_stripes`].
    Sum = 1,
    /// [`Collective::gather_columns`].
    Gather = 2,
    /// [`Collective::barrier`].
    Barrier = 3,
}

impl std::fmt::Display for Operation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(match self {
            Self::Sum => "sum",
            Self::Gather => "gather",
            Self::Barrier => "barrier",
        })
    }
}

/// One call of one rank.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// Which collective.
    pub operation: Operation,
    /// Rows of a sum; 0 for others.
    pub rows: u64,
    /// By stripe: columns of a gather; empty for others.
    pub widths: Vec<u64>,
    /// What this rank put in.
    pub input: Vec<f32>,
    /// What it got; empty where it gets nothing (gathers of ranks other than 0, barriers).
    pub output: Vec<f32>,
}

/// All calls of one rank, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Recording {
    /// The rank.
    pub rank: u32,
    /// Ranks of the group.
    pub size: u32,
    /// Its calls.
    pub calls: Vec<Call>,
}

/// Keeps the calls of the collective behind it.
pub struct Recorder<D: Device> {
    inner: Box<dyn Collective<D>>,
    recording: Recording,
    /// Bytes that the file would have so far.
    bytes: u64,
    limit: u64,
    /// Why the recording is not whole: the first reason stays.
    broken: Option<RecordingError>,
}

impl<D: Device> Recorder<D> {
    /// Records the calls to `inner`, up to `limit` bytes of the file that it would make. The calls
    /// themselves go on beyond it.
    pub fn new(inner: Box<dyn Collective<D>>, limit: u64) -> Self {
        let (rank, size) = (inner.rank() as u32, inner.size() as u32);
        let recording = Recording { rank, size, calls: Vec::new() };
        Self { inner, recording, bytes: file::FRAME_BYTES, limit, broken: None }
    }

    /// The recording.
    ///
    /// # Errors
    /// [`RecordingError::TooLarge`] and [`RecordingError::Failed`]: a part of a run is not given
    /// out as if it were the whole.
    pub fn finish(self) -> Result<Recording, RecordingError> {
        match self.broken {
            None => Ok(self.recording),
            Some(error) => Err(error),
        }
    }

    /// Whether the next call, with so many numbers, is to be kept.
    fn keeps(&mut self, widths: usize, values: usize) -> bool {
        if self.broken.is_some() {
            return false;
        }
        self.bytes = self.bytes.saturating_add(file::call_bytes(widths, values));
        if self.bytes > self.limit {
            let (bytes, limit) = (self.bytes, self.limit);
            self.broken = Some(RecordingError::TooLarge { bytes, limit });
        }
        self.broken.is_none()
    }

    /// Keeps a call that went well, and that one did not.
    fn keep(
        &mut self,
        call: Option<Call>,
        result: Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        match (&result, call) {
            (Ok(()), Some(call)) => self.recording.calls.push(call),
            (Ok(()), None) => {}
            (Err(source), _) => {
                let call = self.recording.calls.len() as u64;
                let source = source.clone();
                self.broken.get_or_insert(RecordingError::Failed { call, source });
            }
        }
        result
    }
}

impl<D: Device> Collective<D> for Recorder<D> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn sum_stripes(
        &mut self,
        device: &D,
        partials: &D::Tensor,
        rows: usize,
        out: &mut D::Tensor,
    ) -> Result<(), CollectiveError> {
        let values = device.host(partials).len() + device.host(out).len();
        let kept = self.keeps(0, values);
        let result = self.inner.sum_stripes(device, partials, rows, out);
        let call = kept.then(|| Call {
            operation: Operation::Sum,
            rows: rows as u64,
            widths: Vec::new(),
            input: device.host(partials).to_vec(),
            output: device.host(out).to_vec(),
        });
        self.keep(call, result)
    }

    fn gather_columns(
        &mut self,
        device: &D,
        part: &D::Tensor,
        widths: &[usize],
        out: &mut D::Tensor,
    ) -> Result<(), CollectiveError> {
        // Elsewhere `out` keeps whatever it held.
        let root = self.rank() == 0;
        let got = |out: &D::Tensor| if root { device.host(out).to_vec() } else { Vec::new() };
        let values = device.host(part).len() + if root { device.host(out).len() } else { 0 };
        let kept = self.keeps(widths.len(), values);
        let result = self.inner.gather_columns(device, part, widths, out);
        let call = kept.then(|| Call {
            operation: Operation::Gather,
            rows: 0,
            widths: widths.iter().map(|&width| width as u64).collect(),
            input: device.host(part).to_vec(),
            output: got(out),
        });
        self.keep(call, result)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        let kept = self.keeps(0, 0);
        let result = self.inner.barrier();
        let call = kept.then(|| Call {
            operation: Operation::Barrier,
            rows: 0,
            widths: Vec::new(),
            input: Vec::new(),
            output: Vec::new(),
        });
        self.keep(call, result)
    }

    fn accuse(&mut self, peer: usize) {
        let call = self.recording.calls.len() as u64;
        let source = CollectiveError::Closed { peer, sequence: call };
        self.broken.get_or_insert(RecordingError::Failed { call, source });
        self.inner.accuse(peer);
    }

    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }
}
