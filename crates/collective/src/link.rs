//! What moves frames between ranks, how it is stopped, and everything that can go wrong.

use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::frame::{Kind, Membership};

/// How long a receive waits for its frame unless [`Link::set_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// Frames to one peer that may wait to be taken before a further send blocks.
///
/// A collective never has more than three of its frames under way to one peer that also sends,
/// so only one-way traffic (gathers that run ahead of the root) ever meets the bound.
pub(crate) const PENDING_FRAMES: usize = 8;

/// Why a collective failed. Ranks are group ranks; sequence numbers count exchanges.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// The peer has gone: its process ended, or its link was dropped or aborted.
    #[error("rank {peer} closed its link (exchange {sequence})")]
    Closed {
        /// The peer.
        peer: usize,
        /// The exchange that noticed.
        sequence: u64,
    },
    /// The peer has left, and says that another did not do its part.
    #[error("rank {by} has left because of rank {peer} (exchange {sequence})")]
    Accused {
        /// Who left.
        by: usize,
        /// Whom it says it left for.
        peer: usize,
        /// The exchange that was told.
        sequence: u64,
    },
    /// The peer's frame did not come, or ours was not taken, within the link's timeout.
    #[error("rank {peer} did not answer in time (exchange {sequence})")]
    Timeout {
        /// The peer.
        peer: usize,
        /// The exchange that waited.
        sequence: u64,
    },
    /// This link was aborted through its [`AbortHandle`].
    #[error("the collective was aborted")]
    Aborted,
    /// The peer belongs to another group or another incarnation of this one.
    #[error("rank {peer} is of {got}, this link is of {expected}")]
    WrongEpoch {
        /// The peer.
        peer: usize,
        /// This link's membership.
        expected: Membership,
        /// The peer's.
        got: Membership,
    },
    /// A frame is not the one that comes next.
    #[error("rank {peer} sent exchange {got}, expected {expected}")]
    OutOfOrder {
        /// The peer.
        peer: usize,
        /// The exchange this rank is in.
        expected: u64,
        /// The frame's.
        got: u64,
    },
    /// A size or kind differs from what this rank expects. `peer` is this rank itself where the
    /// caller's own tensors do not fit.
    #[error("rank {peer}, exchange {sequence}: {what} is {got}, expected {expected}")]
    Mismatch {
        /// Who sent or gave it.
        peer: usize,
        /// The exchange.
        sequence: u64,
        /// Which size.
        what: &'static str,
        /// What would fit.
        expected: u64,
        /// What came.
        got: u64,
    },
    /// What the peer sent is no frame of this protocol.
    #[error("rank {peer} sent no valid frame (exchange {sequence}): {what}")]
    Malformed {
        /// The peer.
        peer: usize,
        /// The exchange.
        sequence: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The operating system refused an operation on the peer's connection.
    #[error("connection to rank {peer} failed (exchange {sequence}): {kind}")]
    Io {
        /// The peer.
        peer: usize,
        /// The exchange; 0 while the group forms.
        sequence: u64,
        /// What it said.
        kind: io::ErrorKind,
    },
    /// A listening address could not be had.
    #[error("cannot listen for peers: {kind}")]
    Bind {
        /// What the operating system said.
        kind: io::ErrorKind,
    },
    /// Some ranks did not connect before the deadline.
    #[error("ranks {missing:?} did not join {membership} in time")]
    Unformed {
        /// What was to be formed.
        membership: Membership,
        /// Who is missing, ascending.
        missing: Vec<usize>,
    },
    /// A peer would not have this rank.
    #[error("rank {peer} refused this rank: {reason}")]
    Refused {
        /// The peer.
        peer: usize,
        /// Its reason.
        reason: &'static str,
    },
    /// A group was described in a way that cannot be.
    #[error("{what} is {got}, which does not fit {limit}")]
    Invalid {
        /// Which argument.
        what: &'static str,
        /// Its value.
        got: u64,
        /// What it must agree with.
        limit: u64,
    },
}

impl CollectiveError {
    /// The rank that did not do its part: it is gone, late, or sends what cannot be.
    pub fn peer(&self) -> Option<usize> {
        match self {
            Self::Closed { peer, .. }
            | Self::Accused { peer, .. }
            | Self::Timeout { peer, .. }
            | Self::WrongEpoch { peer, .. }
            | Self::OutOfOrder { peer, .. }
            | Self::Mismatch { peer, .. }
            | Self::Malformed { peer, .. }
            | Self::Io { peer, .. } => Some(*peer),
            Self::Unformed { missing, .. } => missing.first().copied(),
            Self::Aborted | Self::Bind { .. } | Self::Refused { .. } | Self::Invalid { .. } => None,
        }
    }
}

/// Something that can be stopped from another thread.
pub trait Abort: Send + Sync {
    /// Makes every blocked and later operation fail at once, here and (as closed) at the peers.
    fn abort(&self);
}

/// Stops a link from any thread. It does not keep the link alive.
#[derive(Clone)]
pub struct AbortHandle {
    target: Weak<dyn Abort>,
}

impl AbortHandle {
    /// A handle that stops `target` while that exists.
    pub fn new<A: Abort + 'static>(target: &Arc<A>) -> Self {
        let target: Weak<A> = Arc::downgrade(target);
        Self { target }
    }

    /// Makes every blocked and later operation of the link fail with
    /// [`CollectiveError::Aborted`], and those of its peers with it as closed. Never blocks for
    /// long, may be called more than once, and does nothing once the link is gone.
    pub fn abort(&self) {
        if let Some(target) = self.target.upgrade() {
            target.abort();
        }
    }
}

impl std::fmt::Debug for AbortHandle {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("AbortHandle").finish_non_exhaustive()
    }
}

/// Ordered frames to and from every other rank of one group incarnation.
///
/// The first error of a link is final: every later operation returns it again, for after it
/// nobody knows what the peers have seen. A link that is dropped in order is closed to those who
/// wait for it; one that was aborted, or whose process died, also ends its peers' waits for others.
/// One that ends because a peer failed says which, so that nobody blames the messenger.
pub trait Link: Send {
    /// This rank.
    fn rank(&self) -> usize;

    /// Ranks in the group, at least 1.
    fn size(&self) -> usize;

    /// Which incarnation of which group this link serves.
    fn membership(&self) -> Membership;

    /// Hands `values` over for rank `to`. Returns before the peer has taken them; blocks only
    /// when several earlier frames are still waiting for it, and then no longer than the timeout.
    fn send(
        &mut self,
        to: usize,
        kind: Kind,
        sequence: u64,
        values: &[f32],
    ) -> Result<(), CollectiveError>;

    /// Waits for the next frame of rank `from` and stores its values. The frame must be of this
    /// kind, sequence number and length; any other is refused and `into` is left as it was.
    fn receive(
        &mut self,
        from: usize,
        kind: Kind,
        sequence: u64,
        into: &mut [f32],
    ) -> Result<(), CollectiveError>;

    /// Ends the link because `peer` failed in a way that the link itself cannot see, and tells the
    /// others so. Nothing where it has ended already.
    fn accuse(&mut self, peer: usize);

    /// How long an operation may block; [`DEFAULT_TIMEOUT`] at first.
    fn set_timeout(&mut self, timeout: Duration);

    /// What stops this link from another thread.
    fn abort_handle(&self) -> AbortHandle;
}

/// Checks that `peer` is another rank of the group, so that it can be sent to or received from.
pub(crate) fn check_peer(peer: usize, rank: usize, size: usize) -> Result<(), CollectiveError> {
    if peer >= size || peer == rank {
        return Err(CollectiveError::Invalid {
            what: "peer rank",
            got: peer as u64,
            limit: size as u64,
        });
    }
    Ok(())
}

/// When something that starts now and may take `timeout` is late; at most a day ahead, so that no
/// timeout is too long for the clock.
pub(crate) fn deadline_after(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(Duration::from_secs(24 * 60 * 60))
}
