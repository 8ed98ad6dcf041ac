//! Links over TCP: one connection between every two ranks.
//!
//! The rank with the higher number dials. A connection counts only after three messages (hello,
//! welcome, ready), so that both sides know of it and one given up by its dialler is not mistaken
//! for a member. Every connection is mutual TLS, and each end holds the other's certificate against
//! the node that the group names for its rank ([`Secure`]); there is no plaintext.

mod handshake;
mod secure;
mod stream;

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::frame::Membership;
use crate::link::{CollectiveError, deadline_after};
use handshake::{Applicant, Group, Progress, dial};
use secure::Secured;

pub use secure::Secure;
pub use stream::TcpLink;

/// Pause between two looks at the listener while a group forms.
const POLL: Duration = Duration::from_millis(2);

/// Unfinished handshakes kept at a time; beyond it the oldest is dropped. A member finishes within
/// milliseconds, so what has waited longest is a stray.
const APPLICANTS: usize = 64;

/// A listening address, good for any number of group incarnations, one at a time.
pub struct Endpoint {
    listener: TcpListener,
    address: SocketAddr,
    /// Held while a group forms.
    forming: Mutex<()>,
    /// Grows with every call of `connect` and `cancel`; an older `connect` then gives up.
    turn: AtomicU64,
    /// Frames and connections of another incarnation that were refused.
    stale: Arc<AtomicU64>,
}

impl Endpoint {
    /// Listens on `address` (port 0: any free one). `Bind` where that cannot be had.
    pub fn bind(address: impl ToSocketAddrs) -> Result<Self, CollectiveError> {
        let bind = || -> io::Result<Self> {
            let listener = TcpListener::bind(address)?;
            // Accepting must not outlast the deadline, and accept knows no timeout.
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            let (forming, turn) = (Mutex::new(()), AtomicU64::new(0));
            Ok(Self { listener, address, forming, turn, stale: Arc::default() })
        };
        bind().map_err(|error| CollectiveError::Bind { kind: error.kind() })
    }

    /// Where it listens, with the port that was found.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// How many frames and connections of another group or epoch were refused here so far.
    pub fn stale(&self) -> u64 {
        self.stale.load(Ordering::Relaxed)
    }

    /// Makes a running [`Endpoint::connect`] give up with `Aborted`.
    pub fn cancel(&self) {
        self.turn.fetch_add(1, Ordering::SeqCst);
    }

    /// Connects rank `rank` to all others of its group, within `timeout`. `peers[r]` is where rank
    /// `r` listens; the own entry is not used. `secure` knows who may hold which rank. The ranks
    /// may
    /// start in any order; whoever does not belong (another's certificate, another group, epoch or
    /// size, a rank taken, noise) is turned away, and forming goes on.
    ///
    /// A later call, for the next epoch, makes an earlier one that still runs give up (`Aborted`).
    /// Errors: `Invalid` arguments, `Unformed` with the missing ranks, `WrongEpoch` at once when a
    /// peer is already further than this rank, or at the deadline the reason a peer last gave.
    pub fn connect(
        &self,
        membership: Membership,
        rank: usize,
        peers: &[SocketAddr],
        secure: &dyn Secure,
        timeout: Duration,
    ) -> Result<TcpLink, CollectiveError> {
        if rank >= peers.len() || u32::try_from(peers.len()).is_err() {
            return Err(CollectiveError::Invalid {
                what: "rank",
                got: rank as u64,
                limit: peers.len() as u64,
            });
        }
        let turn = self.turn.fetch_add(1, Ordering::SeqCst) + 1;
        let _only = self.forming.lock().unwrap_or_else(PoisonError::into_inner);
        let group = Group { membership, rank, size: peers.len() };
        let forming = Forming {
            endpoint: self,
            turn,
            group,
            secure,
            deadline: deadline_after(timeout),
            stop: AtomicBool::new(false),
        };
        let streams = forming.all(peers)?;
        TcpLink::new(membership, rank, streams, Arc::clone(&self.stale))
    }
}

/// One attempt to bring a group together.
struct Forming<'a> {
    endpoint: &'a Endpoint,
    turn: u64,
    group: Group,
    secure: &'a dyn Secure,
    deadline: Instant,
    /// Set when the outcome is known, for the dialling threads.
    stop: AtomicBool,
}

impl Forming<'_> {
    /// Streams to all other ranks.
    fn all(&self, peers: &[SocketAddr]) -> Result<BTreeMap<usize, Secured>, CollectiveError> {
        thread::scope(|scope| {
            let dials: Vec<_> = (0..self.group.rank)
                .map(|peer| {
                    let address = peers[peer];
                    scope.spawn(move || {
                        let (group, deadline, stop) = (&self.group, self.deadline, &self.stop);
                        let result = dial(group, peer, address, deadline, stop, self.secure);
                        if matches!(result, Err(Some(_))) {
                            // No use in going on without this peer.
                            self.stop.store(true, Ordering::SeqCst);
                        }
                        result
                    })
                })
                .collect();
            let accepted = self.accept(&|| dials.iter().all(|dial| dial.is_finished()));
            self.stop.store(true, Ordering::SeqCst);
            let mut streams = accepted?;
            let mut refusal = None;
            for (peer, dial) in dials.into_iter().enumerate() {
                match dial.join() {
                    Ok(Ok(stream)) => {
                        streams.insert(peer, stream);
                    }
                    Ok(Err(error)) => refusal = refusal.or(error),
                    // A panic there is a defect; it must not pass for an absent peer.
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            self.judge(streams, refusal)
        })
    }

    fn judge(
        &self,
        streams: BTreeMap<usize, Secured>,
        refusal: Option<CollectiveError>,
    ) -> Result<BTreeMap<usize, Secured>, CollectiveError> {
        let missing: Vec<usize> = (0..self.group.size)
            .filter(|peer| *peer != self.group.rank && !streams.contains_key(peer))
            .collect();
        if missing.is_empty() {
            return Ok(streams);
        }
        if self.superseded() {
            return Err(CollectiveError::Aborted);
        }
        let membership = self.group.membership;
        Err(refusal.unwrap_or(CollectiveError::Unformed { membership, missing }))
    }

    fn superseded(&self) -> bool {
        self.endpoint.turn.load(Ordering::SeqCst) != self.turn
    }

    /// Takes in the higher ranks until all are there and `dialled`, or time is up.
    fn accept(
        &self,
        dialled: &dyn Fn() -> bool,
    ) -> Result<BTreeMap<usize, Secured>, CollectiveError> {
        let mut members = BTreeMap::new();
        let mut applicants: Vec<Applicant> = Vec::new();
        let wanted = self.group.size - self.group.rank - 1;
        loop {
            self.take_in(&mut applicants);
            let mut waiting = Vec::with_capacity(applicants.len());
            for mut applicant in applicants {
                match applicant.advance(&self.group, &members, self.secure) {
                    Progress::Waiting => waiting.push(applicant),
                    Progress::Gone => {}
                    Progress::Stale => {
                        self.endpoint.stale.fetch_add(1, Ordering::Relaxed);
                    }
                    Progress::Member(peer) => {
                        if let Some(secured) = applicant.into_secured() {
                            members.entry(peer).or_insert(secured);
                        }
                    }
                }
            }
            applicants = waiting;
            let failed = self.stop.load(Ordering::SeqCst) || self.superseded();
            if failed || Instant::now() >= self.deadline || (members.len() == wanted && dialled()) {
                return Ok(members);
            }
            thread::sleep(POLL);
        }
    }

    /// New connections become applicants.
    fn take_in(&self, applicants: &mut Vec<Applicant>) {
        // An error other than "none" belongs to one connection or to a passing shortage of
        // descriptors; either way the next look may succeed.
        while let Ok((stream, _)) = self.endpoint.listener.accept() {
            let tls = self.secure.accept().map_err(io::Error::other);
            if let Ok(applicant) = tls.and_then(|tls| Applicant::new(stream, tls)) {
                applicants.push(applicant);
            }
            if applicants.len() > APPLICANTS {
                applicants.remove(0);
            }
        }
    }
}
