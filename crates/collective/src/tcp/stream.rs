//! A link over established connections.
//!
//! A receive reads in the calling thread, straight from the socket: one wake-up per frame. A small
//! frame is sealed and written by the caller as well, for it fits the socket's buffer. A large one,
//! or what the buffer did not take, goes to a writer thread of that peer, so that two ranks which
//! send to each other at the same time cannot block each other. An idle link costs nothing; a
//! receive that has to wait looks now and then whether another peer has died, for then its frame
//! may never come.
//!
//! A link that is dropped in order says goodbye ([`Farewell`]), and TLS that nothing follows,
//! before it closes; one that ends because a peer failed says which peer. A connection that ends
//! without either means a process that died or a link that was aborted.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read as _, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::handshake::is_pause;
use super::secure::{Cipher, Reader, Secured};
use crate::frame::{
    Farewell, FrameHeader, HEADER_BYTES, Kind, Membership, decode_values, encode_frame, field,
};
use crate::link::{
    Abort, AbortHandle, CollectiveError, DEFAULT_TIMEOUT, Link, PENDING_FRAMES, check_peer,
    deadline_after,
};

/// Frames up to this many bytes are written by the caller.
const INLINE_BYTES: usize = 64 * 1024;

/// Bytes of a large frame that are sealed and written at a time: enough to keep the socket busy,
/// little enough not to keep a receive from the lock for long.
const SEAL_BYTES: usize = 64 * 1024;

/// How long a write may block before the caller leaves the rest to the writer thread.
const WRITE_SLICE: Duration = Duration::from_millis(10);

/// How long a receive reads before it looks after the other peers, and at its own deadline.
const READ_SLICE: Duration = Duration::from_millis(20);

/// At most so many bytes are read ahead of one peer to see whether its connection has ended. An end
/// behind more than that is seen when the frames before it are received.
const AHEAD_BYTES: usize = 1 << 20;

/// How long a link that has failed takes to say why.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// How long a dropped link goes on writing what its peers have not taken yet.
const LINGER: Duration = Duration::from_secs(1);

/// One rank's connections. Dropping it closes them, after what was sent is written.
pub struct TcpLink {
    shared: Arc<Shared>,
    membership: Membership,
    rank: usize,
    timeout: Duration,
    /// By rank; `None` for this one.
    peers: Vec<Option<Peer>>,
    writers: Vec<JoinHandle<()>>,
    broken: Option<CollectiveError>,
    /// Where frames of another incarnation are counted.
    stale: Arc<AtomicU64>,
}

/// What this thread needs of one connection.
struct Peer {
    reader: Reader,
    cipher: Arc<Cipher>,
    /// The frame that is being received.
    incoming: Vec<u8>,
    /// Bytes of later frames, read while looking whether the peer has died; empty as a rule.
    ahead: VecDeque<u8>,
    /// How the connection ended, once that was seen.
    end: Option<End>,
    outgoing: Vec<u8>,
    /// Its ciphertext.
    sealed: Vec<u8>,
    outbox: Arc<Outbox>,
}

/// How a peer's connection has ended.
#[derive(Debug, Clone, Copy)]
enum End {
    /// Without a word.
    Died,
    Left(Farewell),
}

impl End {
    /// Whether nobody need wait for anything any more: not so where one has left in order.
    fn of_the_group(self) -> bool {
        matches!(self, Self::Died) || self.accused().is_some()
    }

    fn accused(self) -> Option<usize> {
        match self {
            Self::Died => None,
            Self::Left(farewell) => farewell.accused,
        }
    }
}

/// What an abort handle holds of a link.
struct Shared {
    aborted: AtomicBool,
    outboxes: Vec<Arc<Outbox>>,
}

impl Abort for Shared {
    fn abort(&self) {
        // Set before the streams close, so that whoever wakes there reads it.
        self.aborted.store(true, Ordering::SeqCst);
        self.outboxes.iter().for_each(|outbox| outbox.close());
    }
}

/// Encoded frames that wait for one peer's writer thread.
struct Outbox {
    stream: TcpStream,
    cipher: Arc<Cipher>,
    state: Mutex<OutState>,
    changed: Condvar,
}

/// What a writer thread can be given.
enum Item {
    /// An encoded frame.
    Frame(Vec<u8>),
    /// Ciphertext that the caller could not write whole.
    Sealed(Vec<u8>),
    /// The link ends here.
    Last(Farewell),
}

#[derive(Default)]
struct OutState {
    queue: VecDeque<Item>,
    /// Buffers that came free, for the next frames.
    spare: Vec<Vec<u8>>,
    /// The writer is busy with a frame that it has taken from the queue.
    writing: bool,
    /// Write what there is, then end.
    finish: bool,
    /// Nothing can be written any more.
    closed: bool,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, OutState> {
        // No code that can panic runs under the lock, so a poisoned state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change; `None` once the deadline has passed.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, OutState>,
        deadline: Instant,
    ) -> Option<MutexGuard<'a, OutState>> {
        let left = deadline.checked_duration_since(Instant::now()).filter(|d| !d.is_zero())?;
        let (state, _) =
            self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        Some(state)
    }

    fn is_idle(&self) -> bool {
        let state = self.lock();
        state.queue.is_empty() && !state.writing && !state.closed
    }

    /// Ends the connection in both directions and wakes everyone who waits for it.
    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
        // It fails only where the connection has ended already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// The writer thread: frames in order until told to finish or the connection fails.
    fn run(&self) {
        let mut sealed = Vec::new();
        while let Some(item) = self.next() {
            let (written, spare) = match item {
                Item::Frame(frame) => (self.write_frame(&frame, &mut sealed), Some(frame)),
                Item::Sealed(sealed) => (self.write(&sealed), Some(sealed)),
                Item::Last(farewell) => {
                    sealed.clear();
                    let last = self.cipher.seal_last(&farewell.encode(), &mut sealed);
                    (last.is_ok() && self.write(&sealed), None)
                }
            };
            let mut state = self.lock();
            state.writing = false;
            state.closed |= !written;
            state.spare.extend(spare);
            drop(state);
            self.changed.notify_all();
        }
    }

    fn next(&self) -> Option<Item> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(item) = state.queue.pop_front() {
                state.writing = true;
                return Some(item);
            }
            if state.finish {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn write_frame(&self, frame: &[u8], sealed: &mut Vec<u8>) -> bool {
        frame.chunks(SEAL_BYTES).all(|chunk| {
            sealed.clear();
            self.cipher.seal(chunk, sealed).is_ok() && self.write(sealed)
        })
    }

    fn write(&self, sealed: &[u8]) -> bool {
        let mut done = 0;
        while done < sealed.len() {
            match write_some(&self.stream, &sealed[done..]) {
                Ok(count) => done += count,
                Err(_) => return false,
            }
            if self.lock().closed {
                return false;
            }
        }
        true
    }

    /// Queues an item, waiting while too many are queued; gives back a buffer that came free.
    fn push(&self, item: Item, deadline: Instant) -> Result<Vec<u8>, Stuck> {
        let mut state = self.lock();
        while !state.closed && state.queue.len() >= PENDING_FRAMES {
            state = self.wait(state, deadline).ok_or(Stuck::Late)?;
        }
        if state.closed {
            return Err(Stuck::Closed);
        }
        state.queue.push_back(item);
        let spare = state.spare.pop().unwrap_or_default();
        drop(state);
        self.changed.notify_all();
        Ok(spare)
    }

    /// Waits until everything is written, or nothing more can be, or the deadline.
    fn flush(&self, deadline: Instant) {
        let mut state = self.lock();
        state.finish = true;
        self.changed.notify_all();
        while !state.closed && (state.writing || !state.queue.is_empty()) {
            match self.wait(state, deadline) {
                Some(next) => state = next,
                None => return,
            }
        }
    }
}

/// Why a frame could not be queued.
enum Stuck {
    Late,
    Closed,
}

/// Writes what the socket takes within its write timeout; 0 if nothing.
fn write_some(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    match stream.write(bytes) {
        Ok(0) => Err(io::ErrorKind::WriteZero.into()),
        Err(error) if is_pause(error.kind()) => Ok(0),
        result => result,
    }
}

impl TcpLink {
    /// A link over one established, blocking connection to every other rank.
    pub(super) fn new(
        membership: Membership,
        rank: usize,
        streams: BTreeMap<usize, Secured>,
        stale: Arc<AtomicU64>,
    ) -> Result<Self, CollectiveError> {
        let size = streams.len() + 1;
        let mut link = Self {
            shared: Arc::new(Shared { aborted: AtomicBool::new(false), outboxes: Vec::new() }),
            membership,
            rank,
            timeout: DEFAULT_TIMEOUT,
            peers: (0..size).map(|_| None).collect(),
            writers: Vec::new(),
            broken: None,
            stale,
        };
        let mut outboxes = Vec::new();
        for (peer, stream) in streams {
            let failed = |e: io::Error| CollectiveError::Io { peer, sequence: 0, kind: e.kind() };
            let entry = Peer::new(stream).map_err(failed)?;
            outboxes.push(entry.outbox.clone());
            let outbox = entry.outbox.clone();
            link.peers[peer] = Some(entry);
            let name = format!("collective-{rank}-{peer}");
            let writer = thread::Builder::new().name(name).spawn(move || outbox.run());
            link.writers.push(writer.map_err(failed)?);
        }
        link.shared = Arc::new(Shared { aborted: AtomicBool::new(false), outboxes });
        Ok(link)
    }

    fn header(&self, from: usize, kind: Kind, sequence: u64, elements: usize) -> FrameHeader {
        FrameHeader {
            membership: self.membership,
            sequence,
            kind,
            from: from as u32,
            elements: elements as u64,
        }
    }

    fn is_aborted(&self) -> bool {
        self.shared.aborted.load(Ordering::SeqCst)
    }

    fn check_usable(&self, peer: usize) -> Result<(), CollectiveError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        if self.is_aborted() {
            return Err(CollectiveError::Aborted);
        }
        check_peer(peer, self.rank, self.peers.len())
    }

    /// The error to report and keep; an abort explains everything that comes after it.
    fn fail(&mut self, error: CollectiveError) -> CollectiveError {
        if matches!(error, CollectiveError::WrongEpoch { .. }) {
            self.stale.fetch_add(1, Ordering::Relaxed);
        }
        if self.is_aborted() {
            self.broken = Some(CollectiveError::Aborted);
            return CollectiveError::Aborted;
        }
        if let Some(peer) = error.peer() {
            self.leave(Farewell { accused: Some(peer) }, LAST_WORDS);
        }
        self.broken = Some(error.clone());
        error
    }

    /// Says the last word to everyone but the accused, as far as that goes within `time`.
    fn leave(&mut self, farewell: Farewell, time: Duration) {
        let deadline = deadline_after(time);
        let others =
            self.peers.iter().enumerate().filter(|(peer, _)| farewell.accused != Some(*peer));
        let outboxes: Vec<_> =
            others.filter_map(|(_, peer)| Some(&peer.as_ref()?.outbox)).collect();
        for outbox in &outboxes {
            // It fails only where the writer has, and then nothing can be said.
            let _ = outbox.push(Item::Last(farewell), deadline);
        }
        outboxes.iter().for_each(|outbox| outbox.flush(deadline));
    }

    /// Why an operation failed: where the peer's connection has ended, it may have said why.
    fn cause(&mut self, error: CollectiveError) -> CollectiveError {
        let CollectiveError::Closed { peer: by, sequence } = error else { return error };
        let end = self.peers[by].as_mut().and_then(Peer::ended);
        match end.and_then(End::accused) {
            Some(peer) if peer != self.rank => CollectiveError::Accused { by, peer, sequence },
            _ => CollectiveError::Closed { peer: by, sequence },
        }
    }

    /// The connection to a rank that `check_usable` has passed.
    fn peer(&mut self, peer: usize) -> &mut Peer {
        self.peers[peer].as_mut().expect("every rank but this one has a connection")
    }
}

impl Peer {
    fn new(Secured { stream, tls }: Secured) -> io::Result<Self> {
        let cipher = Cipher::new(tls);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(READ_SLICE))?;
        stream.set_write_timeout(Some(WRITE_SLICE))?;
        let outbox = Outbox {
            stream: stream.try_clone()?,
            cipher: Arc::clone(&cipher),
            state: Mutex::new(OutState::default()),
            changed: Condvar::new(),
        };
        Ok(Self {
            reader: Reader::new(stream, Arc::clone(&cipher)),
            cipher,
            incoming: Vec::new(),
            ahead: VecDeque::new(),
            end: None,
            outgoing: Vec::new(),
            sealed: Vec::new(),
            outbox: Arc::new(outbox),
        })
    }

    /// Writes the frame in `outgoing`, or leaves it to the writer.
    fn send(&mut self, to: usize, sequence: u64, timeout: Duration) -> Result<(), CollectiveError> {
        let stuck = |stuck| match stuck {
            Stuck::Late => CollectiveError::Timeout { peer: to, sequence },
            Stuck::Closed => CollectiveError::Closed { peer: to, sequence },
        };
        let deadline = deadline_after(timeout);
        // While the writer has work a frame must queue behind it, and be sealed after it: records
        // are numbered. Only this thread queues, so an idle writer stays idle meanwhile.
        if self.outgoing.len() > INLINE_BYTES || !self.outbox.is_idle() {
            let frame = std::mem::take(&mut self.outgoing);
            self.outgoing = self.outbox.push(Item::Frame(frame), deadline).map_err(stuck)?;
            return Ok(());
        }
        let broken = |error: io::Error| broken_stream(to, sequence, &error);
        self.sealed.clear();
        self.cipher.seal(&self.outgoing, &mut self.sealed).map_err(broken)?;
        let mut done = 0;
        while done < self.sealed.len() {
            match write_some(&self.reader.stream, &self.sealed[done..]).map_err(broken)? {
                0 => {
                    self.sealed.drain(..done);
                    let sealed = std::mem::take(&mut self.sealed);
                    self.sealed =
                        self.outbox.push(Item::Sealed(sealed), deadline).map_err(stuck)?;
                    return Ok(());
                }
                count => done += count,
            }
        }
        Ok(())
    }

    /// Reads exactly the frame `expected`; its values go to `into` once all of them are there.
    fn receive(
        &mut self,
        expected: &FrameHeader,
        into: &mut [f32],
        deadline: Instant,
        others: &mut [Option<Peer>],
    ) -> Result<(), CollectiveError> {
        let length = HEADER_BYTES + size_of_val(into);
        // As large as the caller's own buffer, whatever the peer may claim.
        self.incoming.resize(length, 0);
        let mut filled = 0;
        while filled < HEADER_BYTES {
            filled += self.read_some(filled, expected, deadline, others)?;
        }
        if let Some(farewell) = Farewell::decode(&field(&self.incoming, 0)) {
            self.end = Some(End::Left(farewell));
            let (peer, sequence) = (expected.from as usize, expected.sequence);
            return Err(CollectiveError::Closed { peer, sequence });
        }
        FrameHeader::decode(&field(&self.incoming, 0), expected)?;
        while filled < length {
            filled += self.read_some(filled, expected, deadline, others)?;
        }
        decode_values(&self.incoming[HEADER_BYTES..], into);
        Ok(())
    }

    /// Reads what comes next of the frame, at least a byte.
    fn read_some(
        &mut self,
        filled: usize,
        expected: &FrameHeader,
        deadline: Instant,
        others: &mut [Option<Peer>],
    ) -> Result<usize, CollectiveError> {
        let (peer, sequence) = (expected.from as usize, expected.sequence);
        if !self.ahead.is_empty() {
            return Ok(self.ahead.read(&mut self.incoming[filled..]).unwrap_or(0));
        }
        loop {
            match self.reader.read(&mut self.incoming[filled..]) {
                Ok(0) => return Err(CollectiveError::Closed { peer, sequence }),
                Ok(count) => return Ok(count),
                Err(error) if is_pause(error.kind()) => {
                    let mut others = others.iter_mut().enumerate();
                    let ended = others.find_map(|(peer, other)| {
                        other.as_mut()?.ended()?.of_the_group().then_some(peer)
                    });
                    if let Some(peer) = ended {
                        return Err(CollectiveError::Closed { peer, sequence });
                    }
                    if Instant::now() >= deadline {
                        return Err(CollectiveError::Timeout { peer, sequence });
                    }
                }
                Err(error) => return Err(broken_stream(peer, sequence, &error)),
            }
        }
    }
}

impl Peer {
    /// How the connection has ended, if it has. Reads ahead as far as is allowed.
    fn ended(&mut self) -> Option<End> {
        if self.end.is_none() {
            // The writer, which shares the descriptor's mode, takes a refused write for a pause.
            let stream = &self.reader.stream;
            let looked = stream.set_nonblocking(true).map(|()| self.read_ahead());
            let back = self.reader.stream.set_nonblocking(false);
            self.end = looked.and_then(|end| back.map(|()| end)).unwrap_or(Some(End::Died));
        }
        self.end
    }

    /// As [`Peer::ended`], on a stream that does not block.
    fn read_ahead(&mut self) -> Option<End> {
        let mut bytes = [0; 4096];
        while self.ahead.len() < AHEAD_BYTES {
            match self.reader.read(&mut bytes) {
                Ok(count @ 1..) => self.ahead.extend(&bytes[..count]),
                Err(error) if is_pause(error.kind()) => return None,
                // TLS has said that nothing follows, or the connection was reset: perhaps only
                // because the peer left without having read all we sent, and said so before.
                Ok(0) | Err(_) => {
                    let start = self.ahead.len().saturating_sub(HEADER_BYTES);
                    let mut last = [0; HEADER_BYTES];
                    last.iter_mut().zip(self.ahead.range(start..)).for_each(|(to, b)| *to = *b);
                    return Some(Farewell::decode(&last).map_or(End::Died, End::Left));
                }
            }
        }
        None
    }
}

fn broken_stream(peer: usize, sequence: u64, error: &io::Error) -> CollectiveError {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionReset, InvalidData, NotConnected, UnexpectedEof,
        WriteZero,
    };
    match error.kind() {
        BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof
        | WriteZero => CollectiveError::Closed { peer, sequence },
        InvalidData => {
            CollectiveError::Malformed { peer, sequence, what: "its bytes are not those of TLS" }
        }
        kind => CollectiveError::Io { peer, sequence, kind },
    }
}

impl Link for TcpLink {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.peers.len()
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
        let header = self.header(self.rank, kind, sequence, values.len());
        let timeout = self.timeout;
        let peer = self.peer(to);
        encode_frame(&header, values, &mut peer.outgoing);
        peer.send(to, sequence, timeout).map_err(|error| {
            let error = self.cause(error);
            self.fail(error)
        })
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
        let deadline = deadline_after(self.timeout);
        // Taken out for the time being, so that all the others can be looked after.
        let mut peer = self.peers[from].take();
        let result = match &mut peer {
            Some(peer) => peer.receive(&expected, into, deadline, &mut self.peers),
            None => Err(CollectiveError::Closed { peer: from, sequence }),
        };
        self.peers[from] = peer;
        result.map_err(|error| {
            let error = self.cause(error);
            self.fail(error)
        })
    }

    fn accuse(&mut self, peer: usize) {
        if self.broken.is_none() {
            self.fail(CollectiveError::Closed { peer, sequence: 0 });
        }
    }

    fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    fn abort_handle(&self) -> AbortHandle {
        AbortHandle::new(&self.shared)
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        if self.broken.is_none() && !self.is_aborted() && !thread::panicking() {
            self.leave(Farewell { accused: None }, LINGER);
        }
        // Also where an abort handle or a writer still holds the descriptor.
        self.peers.iter().flatten().for_each(|peer| peer.outbox.close());
        for writer in self.writers.drain(..) {
            // A writer does not panic; if it did, there is nothing to do about it here.
            let _ = writer.join();
        }
    }
}
