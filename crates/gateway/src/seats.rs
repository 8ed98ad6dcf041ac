//! Which connections are idle, so that they give way when all places are taken.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use axum::body::Body;
use hyper::body::{Body as HttpBody, Bytes, Frame, SizeHint};
use tokio::sync::Notify;

/// One connection's place.
#[derive(Debug, Default)]
pub(crate) struct Seat {
    /// Requests whose answers are not written yet.
    open: AtomicUsize,
    /// Requests so far.
    served: AtomicUsize,
    leave: Notify,
}

impl Seat {
    /// A request has arrived; it is open until the result is dropped.
    pub(crate) fn begin(self: &Arc<Self>) -> Open {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.served.fetch_add(1, Ordering::Relaxed);
        Open(Arc::clone(self))
    }

    /// Waits until the place is wanted; says whether the connection never had a request, so that
    /// nothing is lost where it is cut.
    pub(crate) async fn wanted(&self) -> bool {
        self.leave.notified().await;
        self.served.load(Ordering::Relaxed) == 0
    }
}

/// An open request.
#[derive(Debug)]
pub(crate) struct Open(Arc<Seat>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All places by the order of their connections.
#[derive(Debug, Default)]
pub(crate) struct Seats {
    next: u64,
    taken: BTreeMap<u64, Arc<Seat>>,
}

impl Seats {
    pub(crate) fn taken(&self) -> usize {
        self.taken.len()
    }

    pub(crate) fn take(&mut self) -> (u64, Arc<Seat>) {
        let (number, seat) = (self.next, Arc::new(Seat::default()));
        self.next += 1;
        self.taken.insert(number, Arc::clone(&seat));
        (number, seat)
    }

    pub(crate) fn free(&mut self, number: u64) {
        self.taken.remove(&number);
    }

    /// Makes the oldest connection without an open request give way, where there is one.
    pub(crate) fn give_way(&mut self) -> bool {
        let idle = |(_, seat): &(&u64, &Arc<Seat>)| seat.open.load(Ordering::Relaxed) == 0;
        let Some(number) = self.taken.iter().find(idle).map(|(number, _)| *number) else {
            return false;
        };
        if let Some(seat) = self.taken.remove(&number) {
            seat.leave.notify_one();
        }
        true
    }
}

/// An answer's body that keeps its request open until it is written.
pub(crate) struct Kept {
    pub(crate) body: Body,
    /// Held for its drop.
    pub(crate) _open: Open,
}

impl HttpBody for Kept {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
