//! How two ranks agree that a connection joins them.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

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
        use Step::{Hello, OtherEpoch, OtherShape, Ready, Taken, Welcome};
        let steps = [Hello, Welcome, Ready, OtherEpoch, OtherShape, Taken];
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
    /// The connection is this rank's.
    Member(usize),
}

impl Applicant {
    pub(super) fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let until = Instant::now() + PATIENCE;
        Ok(Self { stream, until, bytes: [0; MESSAGE_BYTES], filled: 0, welcomed: None })
    }

    /// Reads what has come and answers it. Never blocks.
    pub(super) fn advance(
        &mut self,
        group: &Group,
        members: &BTreeMap<usize, TcpStream>,
    ) -> Progress {
        loop {
            match self.stream.read(&mut self.bytes[self.filled..]) {
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
                    let answer = verdict(&message, group, members);
                    let reply = Message::new(answer, group, message.from as usize).encode();
                    let sent = self.stream.write(&reply).is_ok_and(|n| n == MESSAGE_BYTES);
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

    /// The stream of a member, blocking again.
    pub(super) fn into_stream(self) -> Option<TcpStream> {
        self.stream.set_nonblocking(false).ok()?;
        Some(self.stream)
    }
}

/// What a member `peer` says to this rank.
fn hello_of(group: &Group, peer: usize) -> Message {
    Message::new(Step::Hello, &Group { rank: peer, ..*group }, group.rank)
}

fn verdict(message: &Message, group: &Group, members: &BTreeMap<usize, TcpStream>) -> Step {
    let from = message.from as usize;
    if message.membership != group.membership {
        Step::OtherEpoch
    } else if *message != hello_of(group, from) || from <= group.rank || from >= group.size {
        Step::OtherShape
    } else if members.contains_key(&from) {
        Step::Taken
    } else {
        Step::Welcome
    }
}

/// Connects to a lower rank, trying again until the deadline or until `stop`.
///
/// `Err(Some)` is why the peer would not; final if it comes before the deadline. `Err(None)`: no
/// answer worth telling.
pub(super) fn dial(
    group: &Group,
    peer: usize,
    address: SocketAddr,
    deadline: Instant,
    stop: &AtomicBool,
) -> Result<TcpStream, Option<CollectiveError>> {
    let mut pause = Duration::from_millis(2);
    let mut reason = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || stop.load(Ordering::SeqCst) {
            return Err(reason);
        }
        let stream = TcpStream::connect_timeout(&address, left.min(ATTEMPT));
        let answer = stream.and_then(|stream| introduce(stream, group, peer, deadline, stop));
        match answer {
            Ok((stream, Step::Welcome, _)) => return Ok(stream),
            Ok((_, step, theirs)) => {
                let error = refusal(group, peer, step, theirs);
                if theirs.group == group.membership.group && theirs.epoch > group.membership.epoch {
                    // Epochs only grow: it will never come back to ours.
                    return Err(Some(error));
                }
                reason = Some(error);
            }
            // Not there yet, or lost in between.
            Err(_) => {}
        }
        thread::sleep(pause.min(deadline.saturating_duration_since(Instant::now())));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn refusal(group: &Group, peer: usize, step: Step, theirs: Membership) -> CollectiveError {
    match step {
        Step::OtherEpoch => {
            CollectiveError::WrongEpoch { peer, expected: group.membership, got: theirs }
        }
        Step::Taken => CollectiveError::Refused { peer, reason: "its rank is connected already" },
        _ => CollectiveError::Refused { peer, reason: "it knows a group of another shape" },
    }
}

/// Says hello, waits for the answer and, if welcome, says ready.
fn introduce(
    mut stream: TcpStream,
    group: &Group,
    peer: usize,
    deadline: Instant,
    stop: &AtomicBool,
) -> io::Result<(TcpStream, Step, Membership)> {
    let until = deadline.min(Instant::now() + ATTEMPT);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(GLANCE))?;
    stream.write_all(&Message::new(Step::Hello, group, peer).encode())?;
    let mut bytes = [0; MESSAGE_BYTES];
    let mut filled = 0;
    while filled < MESSAGE_BYTES {
        match stream.read(&mut bytes[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if is_pause(error.kind()) => {
                if Instant::now() >= until || stop.load(Ordering::SeqCst) {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) => return Err(error),
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
        stream.write_all(&Message::new(Step::Ready, group, peer).encode())?;
    }
    Ok((stream, answer.step, answer.membership))
}

/// Whether a read or write merely ran into its timeout or was interrupted.
pub(super) fn is_pause(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(kind, Interrupted | TimedOut | WouldBlock)
}
