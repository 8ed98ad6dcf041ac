//! One rank's communicator: joined, watched, aborted.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::library::{Config, Handle, IN_PROGRESS, Nccl, SUCCESS, SUM, code_of};
use super::{NcclError, Rendezvous};
use crate::frame::Membership;
use crate::link::{Abort, AbortHandle, deadline_after};

/// Between two looks at a communicator; a step is a hundred times as long.
const PAUSE: Duration = Duration::from_micros(50);

/// Where a rank stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its group and incarnation.
    pub membership: Membership,
    /// Its number.
    pub rank: usize,
    /// Ranks of the group.
    pub size: usize,
}

/// What the numbers of a buffer are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Element {
    /// IEEE 754 binary16.
    F16 = 6,
    /// IEEE 754 binary32.
    F32 = 7,
    /// bfloat16.
    Bf16 = 9,
}

/// One rank's part of a group incarnation. The first error is final; one that is dropped without
/// [`Communicator::finish`] is aborted.
pub struct Communicator {
    shared: Arc<Shared>,
    place: Place,
    /// How long a call may be in progress.
    patience: Duration,
}

struct Shared {
    nccl: Nccl,
    aborted: AtomicBool,
    state: Mutex<State>,
    /// An abort has come to its end.
    ended: Condvar,
    /// Itself, for the thread that aborts.
    me: Weak<Shared>,
}

struct State {
    /// None once somebody aborts or destroys it.
    handle: Option<Owned>,
    failed: Option<NcclError>,
    /// An abort is under way.
    aborting: bool,
    /// What the abort answered.
    answer: c_int,
}

/// A communicator that was neither destroyed nor aborted.
struct Owned(Handle);

// SAFETY: NCCL ties communicators to no thread, only forbids two at a time; the handle is used
// under the lock, or by the one thread that has taken it.
unsafe impl Send for Owned {}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs between two changes of the state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Aborts what there is, on a thread of its own: NCCL may block there, and whoever is within a
    /// call has the lock.
    fn abort_apart(&self) -> Result<(), NcclError> {
        self.aborted.store(true, Ordering::SeqCst);
        let Some(shared) = self.me.upgrade() else { return Ok(()) };
        let abort = move || {
            let mut state = shared.lock();
            let Some(Owned(handle)) = state.handle.take() else { return };
            state.aborting = true;
            // Those who ask meanwhile hear at once that it was aborted.
            drop(state);
            // SAFETY: the handle was taken, so nobody else uses it now or later.
            let answer = unsafe { (shared.nccl.api.abort)(handle) };
            let mut state = shared.lock();
            (state.aborting, state.answer) = (false, answer);
            shared.ended.notify_all();
        };
        let started = thread::Builder::new().name("nccl-abort".to_owned()).spawn(abort);
        started.map(drop).map_err(|error| NcclError::Thread { kind: error.kind() })
    }
}

impl Abort for Shared {
    fn abort(&self) {
        // Without a thread the flag still ends every wait, and whoever waited tries again.
        let _ = self.abort_apart();
    }
}

impl Communicator {
    /// Joins the other ranks. Call it on a thread whose current CUDA device is the rank's.
    ///
    /// # Errors
    /// `WrongEpoch`, `OtherVersion`, `Invalid` before NCCL is asked; `Call`, `Noticed` where it
    /// fails; `Deadline` where not all ranks have come within `patience`. After any error the
    /// attempt is aborted, and this rendezvous is spent.
    pub fn join(
        nccl: &Nccl,
        rendezvous: &Rendezvous,
        place: Place,
        patience: Duration,
    ) -> Result<Self, NcclError> {
        check(nccl, rendezvous, place)?;
        let call = "ncclCommInitRankConfig";
        let mut handle: Handle = std::ptr::null_mut();
        let mut config = Config::not_blocking();
        let (size, rank) = (place.size as c_int, place.rank as c_int);
        let id = rendezvous.raw_id();
        // SAFETY: the signature is NCCL's; handle and configuration live through the call, and NCCL
        // copies the latter.
        let result = unsafe { (nccl.api.init)(&raw mut handle, size, id, rank, &raw mut config) };
        let handle = (!handle.is_null()).then_some(Owned(handle));
        let nothing = handle.is_none();
        let state = State { handle, failed: None, aborting: false, answer: SUCCESS };
        let shared = Arc::new_cyclic(|me| Shared {
            nccl: nccl.clone(),
            aborted: AtomicBool::new(false),
            state: Mutex::new(state),
            ended: Condvar::new(),
            me: Weak::clone(me),
        });
        let joined = Self { shared, place, patience };
        // An error after a handle was given leaves `joined`, whose drop aborts it.
        if nothing || !taken(result) {
            return Err(joined.shared.nccl.refused(call, result, None));
        }
        joined.settle(call, deadline_after(patience), patience)?;
        Ok(joined)
    }

    /// Its place.
    pub fn place(&self) -> Place {
        self.place
    }

    /// One look: whether NCCL has noticed an error, or still works at a call.
    ///
    /// # Errors
    /// `Noticed`, `Call`, `Aborted`; final, and then the communicator is aborted.
    pub fn check(&self) -> Result<bool, NcclError> {
        let mut state = self.usable()?;
        let handle = handle_of(&state)?;
        let mut noticed = SUCCESS;
        // SAFETY: the handle is live, and the lock keeps others out.
        let result = unsafe { (self.shared.nccl.api.async_error)(handle, &raw mut noticed) };
        let error = if result != SUCCESS {
            self.shared.nccl.refused("ncclCommGetAsyncError", result, Some(handle))
        } else if noticed == SUCCESS || noticed == IN_PROGRESS {
            return Ok(noticed == SUCCESS);
        } else {
            let Place { membership, rank, .. } = self.place;
            let text = self.shared.nccl.text(noticed, Some(handle));
            NcclError::Noticed { membership, rank, code: code_of(noticed), text }
        };
        state.failed = Some(error.clone());
        drop(state);
        Err(self.give_up(error))
    }

    /// Waits until `done` says so, looking for errors meanwhile: for a step whose collectives were
    /// enqueued, `done` asks the stream.
    ///
    /// # Errors
    /// As [`Communicator::check`]; `Deadline` after `limit`.
    pub fn wait(&self, limit: Duration, mut done: impl FnMut() -> bool) -> Result<(), NcclError> {
        let deadline = deadline_after(limit);
        loop {
            self.check()?;
            if done() {
                return Ok(());
            }
            self.pause("a step", deadline, limit)?;
        }
    }

    /// Enqueues the sum over all ranks of `count` elements.
    ///
    /// # Errors
    /// `Call`, `Noticed`, `Deadline`, `Aborted`; final.
    ///
    /// # Safety
    /// `send` and `receive` are device memory of `count` elements each, the same or apart, and
    /// `stream` is a stream of this rank's device; all stay alive until the stream has passed this.
    pub unsafe fn all_reduce(
        &self,
        send: *const c_void,
        receive: *mut c_void,
        count: usize,
        element: Element,
        stream: *mut c_void,
    ) -> Result<(), NcclError> {
        let all_reduce = self.shared.nccl.api.all_reduce;
        self.enqueue("ncclAllReduce", |handle| {
            // SAFETY: by the caller; the handle is live and locked.
            unsafe { all_reduce(send, receive, count, element as c_int, SUM, handle, stream) }
        })
    }

    /// Enqueues a gather: `count` elements of every rank, in rank order, on all of them.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    ///
    /// # Safety
    /// As [`Communicator::all_reduce`], with room for `size * count` elements at `receive`.
    pub unsafe fn all_gather(
        &self,
        send: *const c_void,
        receive: *mut c_void,
        count: usize,
        element: Element,
        stream: *mut c_void,
    ) -> Result<(), NcclError> {
        let all_gather = self.shared.nccl.api.all_gather;
        self.enqueue("ncclAllGather", |handle| {
            // SAFETY: by the caller; the handle is live and locked.
            unsafe { all_gather(send, receive, count, element as c_int, handle, stream) }
        })
    }

    /// Leaves in order: waits until all that was enqueued is done on every rank, and lets go.
    ///
    /// # Errors
    /// `Call`, `Noticed`, `Aborted`; `Deadline` after `limit`. The communicator is then aborted.
    pub fn finish(self, limit: Duration) -> Result<(), NcclError> {
        let finalize = self.shared.nccl.api.finalize;
        let deadline = deadline_after(limit);
        // SAFETY: the handle is live and locked.
        self.call("ncclCommFinalize", |handle| unsafe { finalize(handle) })?;
        self.settle("ncclCommFinalize", deadline, limit)?;
        let owned = self.shared.lock().handle.take();
        let Some(Owned(handle)) = owned else { return Err(NcclError::Aborted) };
        // SAFETY: taken, so nobody else uses it now or later. After finalizing this does not block.
        let result = unsafe { (self.shared.nccl.api.destroy)(handle) };
        if taken(result) {
            return Ok(());
        }
        Err(self.shared.nccl.refused("ncclCommDestroy", result, None))
    }

    /// Aborts: what is under way on this rank ends, here at once and at the peers when they notice.
    ///
    /// # Errors
    /// `Deadline` where NCCL does not return from it within `limit` (it goes on trying, and the
    /// process had better end); `Call` where it fails; `Thread`.
    pub fn abort(self, limit: Duration) -> Result<(), NcclError> {
        self.shared.abort_apart()?;
        let state = self.shared.lock();
        let busy = |state: &mut State| state.handle.is_some() || state.aborting;
        let waited = self.shared.ended.wait_timeout_while(state, limit, busy);
        let (state, late) = waited.unwrap_or_else(PoisonError::into_inner);
        let (call, answer) = ("ncclCommAbort", state.answer);
        drop(state);
        if late.timed_out() {
            return Err(NcclError::Deadline { call, limit });
        }
        if !taken(answer) {
            return Err(self.shared.nccl.refused(call, answer, None));
        }
        Ok(())
    }

    /// What stops this communicator from another thread: it is aborted, and whoever waits in it
    /// returns `Aborted`.
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle::new(&self.shared)
    }

    /// The state, unless there was an error before.
    fn usable(&self) -> Result<MutexGuard<'_, State>, NcclError> {
        let state = self.shared.lock();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        if self.shared.aborted.load(Ordering::SeqCst) {
            drop(state);
            return Err(self.give_up(NcclError::Aborted));
        }
        Ok(state)
    }

    /// Makes `error` the final one unless there is one, and aborts without waiting.
    fn give_up(&self, error: NcclError) -> NcclError {
        self.shared.lock().failed.get_or_insert_with(|| error.clone());
        // Where no thread can be had, the process keeps a communicator that nobody uses.
        let _ = self.shared.abort_apart();
        error
    }

    /// Makes one call.
    fn call(
        &self,
        name: &'static str,
        call: impl FnOnce(Handle) -> c_int,
    ) -> Result<bool, NcclError> {
        let mut state = self.usable()?;
        let handle = handle_of(&state)?;
        let result = call(handle);
        if taken(result) {
            return Ok(result == SUCCESS);
        }
        let error = self.shared.nccl.refused(name, result, Some(handle));
        state.failed = Some(error.clone());
        drop(state);
        Err(self.give_up(error))
    }

    /// Makes a call that is done once NCCL has taken it.
    fn enqueue(
        &self,
        name: &'static str,
        call: impl FnOnce(Handle) -> c_int,
    ) -> Result<(), NcclError> {
        if self.call(name, call)? {
            return Ok(());
        }
        self.settle(name, deadline_after(self.patience), self.patience)
    }

    /// Waits until NCCL is no longer in progress.
    fn settle(
        &self,
        call: &'static str,
        deadline: Instant,
        limit: Duration,
    ) -> Result<(), NcclError> {
        while !self.check()? {
            self.pause(call, deadline, limit)?;
        }
        Ok(())
    }

    fn pause(
        &self,
        call: &'static str,
        deadline: Instant,
        limit: Duration,
    ) -> Result<(), NcclError> {
        if Instant::now() >= deadline {
            return Err(self.give_up(NcclError::Deadline { call, limit }));
        }
        thread::sleep(PAUSE);
        Ok(())
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if self.shared.lock().handle.is_some() {
            // As in `give_up`.
            let _ = self.shared.abort_apart();
        }
    }
}

/// Whether NCCL has done the call, or goes on with it by itself.
fn taken(result: c_int) -> bool {
    result == SUCCESS || result == IN_PROGRESS
}

fn handle_of(state: &State) -> Result<Handle, NcclError> {
    state.handle.as_ref().map(|owned| owned.0).ok_or(NcclError::Aborted)
}

/// Refuses what NCCL would find out late, or never.
fn check(nccl: &Nccl, rendezvous: &Rendezvous, place: Place) -> Result<(), NcclError> {
    let (expected, got) = (place.membership, rendezvous.membership());
    if expected != got {
        return Err(NcclError::WrongEpoch { expected, got });
    }
    let (ours, theirs) = (nccl.version(), rendezvous.version());
    if ours != theirs {
        return Err(NcclError::OtherVersion { ours, theirs });
    }
    let (size, rank) = (place.size as u64, place.rank as u64);
    if place.size != rendezvous.size() {
        let limit = rendezvous.size() as u64;
        return Err(NcclError::Invalid { what: "size of the group", got: size, limit });
    }
    if rank >= size {
        return Err(NcclError::Invalid { what: "rank", got: rank, limit: size });
    }
    Ok(())
}
