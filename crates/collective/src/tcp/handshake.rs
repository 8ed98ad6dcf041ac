//! How two ranks agree that a connection joins them.
//!
//! TLS comes first: neither side reads a byte of these messages from anybody but a node of the
//! group, and the dialler from nobody but the very node it looks for. Which of that node's ranks
//! has dialled is what the messages say; the acceptor holds it against the certificate.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustls::{ClientConnection, ServerConnection, Stream};

use super::secure::{Secure, Secured};
use crate::frame::{Membership, field};
use crate::link::CollectiveError;

/// Bytes of every message here.
const MESSAGE_BYTES: usize = 40;

const MAGIC: u32 = u32::from_le_bytes(*b"PHXH");
const VERSION: u16 = 1;

/// How long a stranger may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long one attempt to reach an address, and one answer, may take.
const ATTEMPT: Duration = Duration::from_secs(2);

/// Attempts in a row to which not even the peer's machine answers, after which the way to it is
/// cut. One that only loads is reached: its port is open.
const UNANSWERED: u32 = 3;

/// Longest pause between two attempts to reach a peer.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// How often a dialler that waits looks whether it should stop.
const GLANCE: Duration = Duration::from_millis(50);

/// The group as one rank sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    pub(super) membership: Membership,
    pub(super) rank: usize,
    pub(super) size: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    /// Dialler: here I am.
    Hello = 1,
    /// Acceptor: you are expected.
    Welcome = 2,
    /// Dialler: this connection it is.
    Ready = 3,
    /// Acceptor: you are not, because I am of another group or epoch (see the membership).
    OtherEpoch = 4,
    /// Acceptor: your group has another size, or your rank cannot dial mine.
    OtherShape = 5,
    /// Acceptor: your rank is connected already.
    Taken = 6,
    /// Acceptor: your certificate is not that of the node which holds your rank.
    OtherNode = 7,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Message {
    step: Step,
    membership: Membership,
    from: u32,
    to: u32,
    size: u32,
}

impl Message {
    fn new(step: Step, group: &Group, to: usize) -> Self {
        Self {
            step,
            membership: group.membership,
            from: group.rank as u32,
            to: to as u32,
            size: group.size as u32,
        }
    }

    /// Magic (4), version (2), step (1), zero (1), group (8), epoch (8), from (4), to (4),
    /// size (4), zero (4); little endian.
    fn encode(&self) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = self.step as u8;
        bytes[8..16].copy_from_slice(&self.membership.group.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.membership.epoch.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.from.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.to.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.size.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; MESSAGE_BYTES]) -> Option<Self> {
        use Step::{Hello, OtherEpoch, OtherNode, OtherShape, Ready, Taken, Welcome};
        let steps = [Hello, Welcome, Ready, OtherEpoch, OtherShape, Taken, OtherNode];
        let step = steps.into_iter().find(|&step| step as u8 == bytes[6])?;
        let known = u32::from_le_bytes(field(bytes, 0)) == MAGIC
            && u16::from_le_bytes(field(bytes, 4)) == VERSION
            && bytes[7] == 0
            && bytes[36..] == [0; 4];
        known.then(|| Self {
            step,
            membership: Membership {
                group: u64::from_le_bytes(field(bytes, 8)),
                epoch: u64::from_le_bytes(field(bytes, 16)),
            },
            from: u32::from_le_bytes(field(bytes, 24)),
            to: u32::from_le_bytes(field(bytes, 28)),
            size: u32::from_le_bytes(field(bytes, 32)),
        })
    }
}

/// Someone who connected and has not yet proved to be a member. Its stream never blocks.
pub(super) struct Applicant {
    stream: TcpStream,
    tls: ServerConnection,
    until: Instant,
    bytes: [u8; MESSAGE_BYTES],
    filled: usize,
    /// The rank that was welcomed and must still say ready.
    welcomed: Option<usize>,
}

/// Where an applicant stands.
pub(super) enum Progress {
    Waiting,
    /// Turned away, gone or out of time.
    Gone,
    /// Turned away, because it is of another group or epoch.
    Stale,
    /// The connection is this rank's.
    Member(usize),
}

impl Applicant {
    pub(super) fn new(stream: TcpStream, tls: ServerConnection) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let until = Instant::now() + PATIENCE;
        Ok(Self { stream, tls, until, bytes: [0; MESSAGE_BYTES], filled: 0, welcomed: None })
    }

    /// Reads what has come and answers it. Never blocks.
    pub(super) fn advance(
        &mut self,
        group: &Group,
        members: &BTreeMap<usize, Secured>,
        secure: &dyn Secure,
    ) -> Progress {
        loop {
            // The handshake goes on by itself until there is something to read.
            let mut stream = Stream::new(&mut self.tls, &mut self.stream);
            match stream.read(&mut self.bytes[self.filled..]) {
                Ok(0) => return Progress::Gone,
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let late = Instant::now() >= self.until;
                    return if late { Progress::Gone } else { Progress::Waiting };
                }
                Err(_) => return Progress::Gone,
            }
            if self.filled < MESSAGE_BYTES {
                continue;
            }
            self.filled = 0;
            let Some(message) = Message::decode(&self.bytes) else { return Progress::Gone };
            match self.welcomed {
                None => {
                    let shown = self.tls.peer_certificates().and_then(|shown| shown.first());
                    let holds =
                        |rank| shown.is_some_and(|certificate| secure.holds(certificate, rank));
                    let answer = verdict(&message, group, members, &holds);
                    let reply = Message::new(answer, group, message.from as usize).encode();
                    let mut stream = Stream::new(&mut self.tls, &mut self.stream);
                    let sent = stream.write(&reply).is_ok_and(|n| n == MESSAGE_BYTES)
                        && stream.flush().is_ok();
                    if answer == Step::OtherEpoch {
                        return Progress::Stale;
                    }
                    if answer != Step::Welcome || !sent {
                        return Progress::Gone;
                    }
                    self.welcomed = Some(message.from as usize);
                }
                Some(peer) => {
                    let expected = Message { step: Step::Ready, ..hello_of(group, peer) };
                    // Two connections of one rank may both have been welcomed; the first wins.
                    let taken = members.contains_key(&peer);
                    return match message == expected && !taken {
                        true => Progress::Member(peer),
                        false => Progress::Gone,
                    };
                }
            }
        }
    }

    /// The connection of a member, blocking again.
    pub(super) fn into_secured(self) -> Option<Secured> {
        self.stream.set_nonblocking(false).ok()?;
        Some(Secured { stream: self.stream, tls: self.tls.into() })
    }
}

/// What a member `peer` says to this rank.
fn hello_of(group: &Group, peer: usize) -> Message {
    Message::new(Step::Hello, &Group { rank: peer, ..*group }, group.rank)
}

fn verdict(
    message: &Message,
    group: &Group,
    members: &BTreeMap<usize, Secured>,
    holds: &dyn Fn(usize) -> bool,
) -> Step {
    let from = message.from as usize;
    if message.membership != group.membership {
        Step::OtherEpoch
    } else if *message != hello_of(group, from) || from <= group.rank || from >= group.size {
        Step::OtherShape
    } else if !holds(from) {
        Step::OtherNode
    } else if members.contains_key(&from) {
        Step::Taken
    } else {
        Step::Welcome
    }
}

/// Connects to a lower rank, trying again until the deadline or until `stop`.
///
/// `Err(Some)` is why the peer would not, `Timeout` where nothing comes back from its address;
/// final if it comes before the deadline. `Err(None)`: no answer worth telling.
pub(super) fn dial(
    group: &Group,
    peer: usize,
    address: SocketAddr,
    deadline: Instant,
    stop: &AtomicBool,
    secure: &dyn Secure,
) -> Result<Secured, Option<CollectiveError>> {
    let mut pause = Duration::from_millis(2);
    let mut reason = None;
    let mut unanswered = 0;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || stop.load(Ordering::SeqCst) {
            return Err(reason);
        }
        let stream = TcpStream::connect_timeout(&address, left.min(ATTEMPT));
        unanswered = if is_silence(&stream) { unanswered + 1 } else { 0 };
        if unanswered == UNANSWERED {
            return Err(Some(CollectiveError::Timeout { peer, sequence: 0 }));
        }
        let answer = stream.and_then(|stream| {
            let tls = secure.dial(peer).map_err(io::Error::other)?;
            introduce(stream, tls, group, peer, deadline, stop)
        });
        match answer {
            Ok((secured, Step::Welcome, _)) => return Ok(secured),
            Ok((_, step, theirs)) => {
                let error = refusal(group, peer, step, theirs);
                if theirs.group == group.membership.group && theirs.epoch > group.membership.epoch {
                    // Epochs only grow: it will never come back to ours.
                    return Err(Some(error));
                }
                reason = Some(error);
            }
            // A peer that is not as far yet may know another group's nodes, so that one tries
            // again.
            Err(error) => {
                reason = match distrust(&error) {
                    Some(reason) => Some(CollectiveError::Refused { peer, reason }),
                    // Not there yet, or lost in between.
                    None => reason,
                }
            }
        }
        thread::sleep(pause.min(deadline.saturating_duration_since(Instant::now())));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Whether an attempt ended without a word from the other machine.
fn is_silence(attempt: &io::Result<TcpStream>) -> bool {
    attempt.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut)
}

fn refusal(group: &Group, peer: usize, step: Step, theirs: Membership) -> CollectiveError {
    match step {
        Step::OtherEpoch => {
            CollectiveError::WrongEpoch { peer, expected: group.membership, got: theirs }
        }
        Step::Taken => CollectiveError::Refused { peer, reason: "its rank is connected already" },
        Step::OtherNode => {
            CollectiveError::Refused { peer, reason: "our certificate is not that of our rank" }
        }
        _ => CollectiveError::Refused { peer, reason: "it knows a group of another shape" },
    }
}

/// What is wrong between two nodes' certificates, if that is why a connection failed.
fn distrust(error: &io::Error) -> Option<&'static str> {
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        rustls::Error::AlertReceived(_) => Some("it refused our certificate"),
        rustls::Error::InvalidCertificate(_) => Some("its certificate is not that of its node"),
        _ => Some("it does not speak TLS as we do"),
    }
}

/// Repeats what may run into the stream's timeout, until it is done, `until`, or `stop`.
fn patiently<T>(
    until: Instant,
    stop: &AtomicBool,
    mut attempt: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    loop {
        match attempt() {
            Err(error) if is_pause(error.kind()) => {
                if Instant::now() >= until || stop.load(Ordering::SeqCst) {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            result => return result,
        }
    }
}

/// Shakes hands, says hello, waits for the answer and, if welcome, says ready.
fn introduce(
    mut stream: TcpStream,
    mut tls: ClientConnection,
    group: &Group,
    peer: usize,
    deadline: Instant,
    stop: &AtomicBool,
) -> io::Result<(Secured, Step, Membership)> {
    let until = deadline.min(Instant::now() + ATTEMPT);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(GLANCE))?;
    while tls.is_handshaking() {
        patiently(until, stop, || tls.complete_io(&mut stream))?;
    }
    say(&mut tls, &mut stream, &Message::new(Step::Hello, group, peer))?;
    let mut bytes = [0; MESSAGE_BYTES];
    let mut filled = 0;
    while filled < MESSAGE_BYTES {
        let into = &mut bytes[filled..];
        match patiently(until, stop, || Stream::new(&mut tls, &mut stream).read(into))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
    }
    let answer = Message::decode(&bytes).ok_or(io::ErrorKind::InvalidData)?;
    let expected = Message {
        step: Step::Welcome,
        from: peer as u32,
        to: group.rank as u32,
        ..Message::new(Step::Welcome, group, peer)
    };
    if answer.step == Step::Welcome {
        if answer != expected {
            return Err(io::ErrorKind::InvalidData.into());
        }
        say(&mut tls, &mut stream, &Message::new(Step::Ready, group, peer))?;
    }
    Ok((Secured { stream, tls: tls.into() }, answer.step, answer.membership))
}

/// Writes a message; the stream has no timeout for writing, and room for one.
fn say(tls: &mut ClientConnection, stream: &mut TcpStream, message: &Message) -> io::Result<()> {
    let mut stream = Stream::new(tls, stream);
    stream.write_all(&message.encode())?;
    stream.flush()
}

/// Whether a read or write merely ran into its timeout or was interrupted.
pub(super) fn is_pause(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(kind, Interrupted | TimedOut | WouldBlock)
}
