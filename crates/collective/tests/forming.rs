//! How groups form over TCP, and what is kept out of them.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use collective::tcp::{Endpoint, Secure, TcpLink};
use collective::{CollectiveError, FrameHeader, Kind, Link, Membership};
use identity::{ClusterCa, NODE_LIFE, Role, TOKEN_LIFE, Tls};
use rustls::pki_types::UnixTime;
use rustls::time_provider::TimeProvider;
use rustls::{ClientConnection, StreamOwned};
use support::nodes::{Node, ca, credential, node};
use support::{HERE, SOON, addresses, connect_all, each, endpoints};

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const READY: u8 = 3;
const OTHER_EPOCH: u8 = 4;
const OTHER_SHAPE: u8 = 5;
const TAKEN: u8 = 6;
const OTHER_NODE: u8 = 7;

/// A handshake message as it stands on the wire, written out independently of the crate.
fn message(step: u8, membership: Membership, from: u32, to: u32, size: u32) -> Vec<u8> {
    let mut bytes = b"PHXH\x01\0".to_vec();
    bytes.extend([step, 0]);
    bytes.extend(membership.group.to_le_bytes());
    bytes.extend(membership.epoch.to_le_bytes());
    bytes.extend(from.to_le_bytes());
    bytes.extend(to.to_le_bytes());
    bytes.extend(size.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

/// A connection without TLS.
fn bare(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("listening");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    stream
}

type Stream = StreamOwned<ClientConnection, TcpStream>;

/// A connection to rank 0 from somebody.
fn dial_as(caller: &Node, address: SocketAddr) -> Stream {
    StreamOwned::new(caller.dial(0).expect("TLS"), bare(address))
}

/// A connection to rank 0 from the node that holds rank 1.
fn dial(address: SocketAddr) -> Stream {
    dial_as(&node(1), address)
}

/// Sends a message and returns the step of the answer, or `None` where the connection is closed.
fn ask(stream: &mut (impl Read + Write), bytes: &[u8]) -> Option<u8> {
    stream.write_all(bytes).ok()?;
    let mut answer = [0; 40];
    stream.read_exact(&mut answer).ok().map(|()| answer[6])
}

type Forming = (SocketAddr, thread::JoinHandle<Result<TcpLink, CollectiveError>>);

/// Rank 0 of two, forming in the background.
fn forming() -> Forming {
    forming_as(node(0))
}

fn forming_as(first: Node) -> Forming {
    let endpoint = Endpoint::bind("127.0.0.1:0").expect("a free port");
    let address = endpoint.local_addr();
    let running = thread::spawn(move || endpoint.connect(HERE, 0, &[address; 2], &first, SOON));
    (address, running)
}

/// A stream that rank 0 has taken for rank 1.
fn join(address: SocketAddr) -> Stream {
    let mut stream = dial(address);
    assert_eq!(ask(&mut stream, &message(HELLO, HERE, 1, 0, 2)), Some(WELCOME));
    stream.write_all(&message(READY, HERE, 1, 0, 2)).expect("sent");
    stream
}

#[test]
fn ranks_may_start_at_different_times() {
    let endpoints = endpoints(4);
    let peers = addresses(&endpoints);
    let links = each(endpoints.iter().enumerate().collect(), |(rank, endpoint)| {
        thread::sleep(Duration::from_millis([120, 0, 60, 30][rank]));
        endpoint.connect(HERE, rank, &peers, &node(rank), SOON)
    });
    let sizes: Vec<_> = links.iter().map(|link| link.as_ref().map(Link::size)).collect();
    assert_eq!(sizes, [Ok(4); 4]);
}

#[test]
fn a_rank_that_listens_late_is_found() {
    let first = Endpoint::bind("127.0.0.1:0").expect("a free port");
    let peers = [first.local_addr(), first.local_addr()];
    drop(first);
    let dialler = Endpoint::bind("127.0.0.1:0").expect("a free port");
    thread::scope(|scope| {
        let second = scope.spawn(|| dialler.connect(HERE, 1, &peers, &node(1), SOON));
        thread::sleep(Duration::from_millis(150));
        let first = Endpoint::bind(peers[0]).expect("the same port again");
        assert!(first.connect(HERE, 0, &peers, &node(0), SOON).is_ok());
        assert!(second.join().expect("no panic").is_ok());
    });
}

#[test]
fn one_endpoint_serves_one_epoch_after_another() {
    let endpoints = endpoints(3);
    for epoch in 1..6 {
        let membership = Membership { group: 1, epoch };
        let links = connect_all(&endpoints, membership);
        each(links, |link| {
            let mut link = link.expect("connected");
            assert_eq!(link.membership(), membership);
            let rank = link.rank();
            for peer in (0..3).filter(|&peer| peer != rank) {
                link.send(peer, Kind::Partials, epoch, &[rank as f32]).expect("sent");
            }
            for peer in (0..3).filter(|&peer| peer != rank) {
                let mut into = [9.0];
                link.receive(peer, Kind::Partials, epoch, &mut into).expect("received");
                assert_eq!(into, [peer as f32]);
            }
        });
    }
}

#[test]
fn missing_ranks_are_named() {
    let endpoints = endpoints(4);
    let peers = addresses(&endpoints);
    let started = Instant::now();
    let items = endpoints.iter().enumerate().filter(|(rank, _)| rank % 2 == 1).collect();
    let results = each(items, |(rank, endpoint)| {
        endpoint.connect(HERE, rank, &peers, &node(rank), Duration::from_millis(300)).map(|_| ())
    });
    assert!(started.elapsed() < Duration::from_secs(3));
    let missing = CollectiveError::Unformed { membership: HERE, missing: vec![0, 2] };
    assert_eq!(results, [Err(missing.clone()), Err(missing)]);
}

#[test]
fn strays_are_turned_away_and_forming_goes_on() {
    let (address, running) = forming();
    // Silent ones, more than are kept waiting, and one that stops in the middle of a hello.
    let silent: Vec<_> = (0..70).map(|_| bare(address)).collect();
    let mut halting = dial(address);
    halting.write_all(&message(HELLO, HERE, 1, 0, 2)[..20]).expect("sent");
    let mut noise = bare(address);
    assert_eq!(ask(&mut noise, &[0xA5; 40]), None);
    let mut web = bare(address);
    assert_eq!(ask(&mut web, b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n"), None);

    let said = |bytes: Vec<u8>| ask(&mut dial(address), &bytes);
    let other = |group, epoch| message(HELLO, Membership { group, epoch }, 1, 0, 2);
    assert_eq!(said(other(9, 3)), Some(OTHER_EPOCH));
    assert_eq!(said(other(9, 5)), Some(OTHER_EPOCH));
    assert_eq!(said(other(8, 4)), Some(OTHER_EPOCH));
    assert_eq!(said(message(HELLO, HERE, 1, 0, 3)), Some(OTHER_SHAPE));
    assert_eq!(said(message(HELLO, HERE, 1, 1, 2)), Some(OTHER_SHAPE));
    assert_eq!(said(message(HELLO, HERE, 0, 0, 2)), Some(OTHER_SHAPE));
    assert_eq!(said(message(HELLO, HERE, 2, 0, 2)), Some(OTHER_SHAPE));
    assert_eq!(said(message(READY, HERE, 1, 0, 2)), Some(OTHER_SHAPE));
    assert!(!running.is_finished());

    let _member = join(address);
    assert!(running.join().expect("no panic").is_ok());
    drop(silent);
}

#[test]
fn a_connection_given_up_before_ready_is_no_member() {
    let (address, running) = forming();
    for _ in 0..3 {
        let mut lost = dial(address);
        assert_eq!(ask(&mut lost, &message(HELLO, HERE, 1, 0, 2)), Some(WELCOME));
    }
    let mut wrong = dial(address);
    assert_eq!(ask(&mut wrong, &message(HELLO, HERE, 1, 0, 2)), Some(WELCOME));
    assert_eq!(ask(&mut wrong, &message(HELLO, HERE, 1, 0, 2)), None);
    assert!(!running.is_finished());
    let _member = join(address);
    assert!(running.join().expect("no panic").is_ok());
}

#[test]
fn a_rank_joins_once() {
    let endpoint = Endpoint::bind("127.0.0.1:0").expect("a free port");
    let address = endpoint.local_addr();
    let running = thread::spawn(move || endpoint.connect(HERE, 0, &[address; 3], &node(0), SOON));
    let enter = |from: u32| {
        let mut stream = dial_as(&node(from as usize), address);
        let step = ask(&mut stream, &message(HELLO, HERE, from, 0, 3));
        stream.write_all(&message(READY, HERE, from, 0, 3)).ok();
        (stream, step)
    };
    let (mut first, step) = enter(2);
    assert_eq!(step, Some(WELCOME));
    // Another is welcome only until that ready has been read.
    let rank = node(2);
    let second = || ask(&mut dial_as(&rank, address), &message(HELLO, HERE, 2, 0, 3));
    let answers: Vec<_> =
        std::iter::repeat_with(second).take(50).skip_while(|step| *step == Some(WELCOME)).collect();
    assert!(!answers.is_empty() && answers.iter().all(|step| *step == Some(TAKEN)));
    assert_eq!(enter(1).1, Some(WELCOME));
    let mut link = running.join().expect("no panic").expect("connected");
    // The link's rank 2 is the one that came first.
    let header =
        FrameHeader { membership: HERE, sequence: 0, kind: Kind::Barrier, from: 2, elements: 0 };
    first.write_all(&header.encode()).expect("sent");
    assert_eq!(link.receive(2, Kind::Barrier, 0, &mut []), Ok(()));
}

#[test]
fn a_rank_of_the_past_learns_that_it_is() {
    let endpoints = endpoints(2);
    let peers = addresses(&endpoints);
    let now = Membership { group: 9, epoch: 5 };
    thread::scope(|scope| {
        let ahead =
            scope.spawn(|| endpoints[0].connect(now, 0, &peers, &node(0), SOON).map(|_| ()));
        let started = Instant::now();
        let behind = endpoints[1].connect(HERE, 1, &peers, &node(1), SOON).map(|_| ());
        let wrong = CollectiveError::WrongEpoch { peer: 0, expected: HERE, got: now };
        assert_eq!(behind, Err(wrong));
        assert_eq!((endpoints[0].stale(), endpoints[1].stale()), (1, 0), "it was turned away");
        assert!(started.elapsed() < Duration::from_secs(5));
        // Under the right epoch the same endpoint is welcome.
        assert!(endpoints[1].connect(now, 1, &peers, &node(1), SOON).is_ok());
        assert_eq!(ahead.join().expect("no panic"), Ok(()));
    });
}

#[test]
fn a_later_connect_supersedes_an_earlier_one() {
    let endpoints = endpoints(2);
    let peers = addresses(&endpoints);
    let now = Membership { group: 9, epoch: 5 };
    thread::scope(|scope| {
        let earlier =
            scope.spawn(|| endpoints[0].connect(HERE, 0, &peers, &node(0), SOON).map(|_| ()));
        thread::sleep(Duration::from_millis(50));
        let later =
            scope.spawn(|| endpoints[0].connect(now, 0, &peers, &node(0), SOON).map(|_| ()));
        assert_eq!(earlier.join().expect("no panic"), Err(CollectiveError::Aborted));
        assert!(endpoints[1].connect(now, 1, &peers, &node(1), SOON).is_ok());
        assert_eq!(later.join().expect("no panic"), Ok(()));
        // The dialling side can be stopped as well.
        let waiting =
            scope.spawn(|| endpoints[1].connect(now, 1, &peers, &node(1), SOON).map(|_| ()));
        thread::sleep(Duration::from_millis(50));
        endpoints[1].cancel();
        assert_eq!(waiting.join().expect("no panic"), Err(CollectiveError::Aborted));
    });
}

#[test]
fn impossible_arguments_are_refused() {
    let endpoint = Endpoint::bind("127.0.0.1:0").expect("a free port");
    let address = endpoint.local_addr();
    for (rank, count) in [(0, 0), (2, 2), (usize::MAX, 3)] {
        let peers = vec![address; count];
        let result = endpoint.connect(HERE, rank, &peers, &node(0), Duration::MAX);
        assert!(matches!(result, Err(CollectiveError::Invalid { .. })));
    }
    assert!(endpoint.connect(HERE, 0, &[address], &node(0), Duration::MAX).is_ok());
    assert!(matches!(Endpoint::bind(address), Err(CollectiveError::Bind { .. })));
}

/// What a link makes of bytes that a member sends.
fn receive_raw(bytes: &[u8]) -> Result<(), CollectiveError> {
    let (address, running) = forming();
    let mut stream = join(address);
    let mut link = running.join().expect("no panic").expect("connected");
    link.set_timeout(Duration::from_millis(500));
    stream.write_all(bytes).expect("sent");
    let mut into = [7.0; 2];
    let result = link.receive(1, Kind::Partials, 6, &mut into);
    let expected = if result.is_ok() { [1.0; 2] } else { [7.0; 2] };
    assert_eq!(into, expected);
    result
}

#[test]
fn frames_are_checked_as_they_stand_on_the_wire() {
    let good =
        FrameHeader { membership: HERE, sequence: 6, kind: Kind::Partials, from: 1, elements: 2 };
    let frame = |header: FrameHeader| {
        let values = [1.0_f32.to_le_bytes(), 1.0_f32.to_le_bytes()].concat();
        [header.encode().as_slice(), &values].concat()
    };
    assert_eq!(receive_raw(&frame(good)), Ok(()));
    for got in [Membership { group: 9, epoch: 3 }, Membership { group: 8, epoch: 4 }] {
        let wrong = CollectiveError::WrongEpoch { peer: 1, expected: HERE, got };
        assert_eq!(receive_raw(&frame(FrameHeader { membership: got, ..good })), Err(wrong));
    }
    let early = CollectiveError::OutOfOrder { peer: 1, expected: 6, got: 5 };
    assert_eq!(receive_raw(&frame(FrameHeader { sequence: 5, ..good })), Err(early));
    let claim = FrameHeader { elements: u64::MAX, ..good };
    assert!(matches!(receive_raw(&frame(claim)), Err(CollectiveError::Mismatch { .. })));
    let noise = receive_raw(&[0x5A; 56]);
    assert!(matches!(noise, Err(CollectiveError::Malformed { peer: 1, sequence: 6, .. })));
    let cut = receive_raw(&frame(good)[..50]);
    assert_eq!(cut, Err(CollectiveError::Timeout { peer: 1, sequence: 6 }));
}

#[test]
fn frames_of_another_epoch_are_counted_where_they_are_refused() {
    let endpoint = Arc::new(Endpoint::bind("127.0.0.1:0").expect("a free port"));
    let address = endpoint.local_addr();
    let own = Arc::clone(&endpoint);
    let running = thread::spawn(move || own.connect(HERE, 0, &[address; 2], &node(0), SOON));
    let mut stream = join(address);
    let mut link = running.join().expect("no panic").expect("connected");
    let membership = Membership { group: 9, epoch: 3 };
    let header =
        FrameHeader { membership, sequence: 6, kind: Kind::Partials, from: 1, elements: 1 };
    stream.write_all(&[header.encode().as_slice(), &[0; 4]].concat()).expect("sent");
    let refused = link.receive(1, Kind::Partials, 6, &mut [0.0]);
    assert!(matches!(refused, Err(CollectiveError::WrongEpoch { .. })));
    assert_eq!(endpoint.stale(), 1);
}

#[test]
fn a_frame_cut_by_the_peers_end_is_closed() {
    let (address, running) = forming();
    let mut stream = join(address);
    let mut link = running.join().expect("no panic").expect("connected");
    stream.write_all(b"PH").expect("sent");
    drop(stream);
    let result = link.receive(1, Kind::Partials, 6, &mut [0.0]);
    assert_eq!(result, Err(CollectiveError::Closed { peer: 1, sequence: 6 }));
}

#[test]
fn a_death_is_noticed_while_waiting_for_another() {
    let endpoint = Endpoint::bind("127.0.0.1:0").expect("a free port");
    let address = endpoint.local_addr();
    let running = thread::spawn(move || endpoint.connect(HERE, 0, &[address; 3], &node(0), SOON));
    let [_stalled, dying] = [1, 2].map(|from| {
        let mut stream = dial_as(&node(from as usize), address);
        assert_eq!(ask(&mut stream, &message(HELLO, HERE, from, 0, 3)), Some(WELCOME));
        stream.write_all(&message(READY, HERE, from, 0, 3)).expect("sent");
        stream
    });
    let mut link = running.join().expect("no panic").expect("connected");
    thread::scope(|scope| {
        let waiting = scope.spawn(|| link.receive(1, Kind::Partials, 6, &mut [0.0]));
        thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        drop(dying);
        let started = Instant::now();
        let result = waiting.join().expect("no panic");
        assert_eq!(result, Err(CollectiveError::Closed { peer: 2, sequence: 6 }));
        assert!(started.elapsed() < Duration::from_secs(1));
    });
}

/// What rank 0 of two answers somebody whom it must not take; it goes on forming.
fn turned_away((address, running): Forming, caller: &Node, member: &Node) -> Option<u8> {
    let hello = message(HELLO, HERE, 1, 0, 2);
    let answer = ask(&mut dial_as(caller, address), &hello);
    assert!(!running.is_finished());
    let mut member = dial_as(member, address);
    assert_eq!(ask(&mut member, &hello), Some(WELCOME));
    member.write_all(&message(READY, HERE, 1, 0, 2)).expect("sent");
    assert!(running.join().expect("no panic").is_ok());
    answer
}

#[test]
fn only_the_node_that_holds_a_rank_is_taken_for_it() {
    // A node of the group that holds another rank gets through the handshake and no further.
    assert_eq!(turned_away(forming(), &node(2), &node(1)), Some(OTHER_NODE));
    // Whoever is no node of the group does not get through the handshake.
    let now = SystemTime::now();
    let other = ClusterCa::create(now).expect("an authority");
    let foreign = other.node(101, Role::Worker, NODE_LIFE, now).expect("a credential");
    let both = vec![other.certificate().clone(), ca().certificate().clone()];
    let strangers = [
        credential(7),
        ca().node(101, Role::Coordinator, NODE_LIFE, now).expect("a credential"),
        ca().token(Role::Worker, 1, TOKEN_LIFE, now).expect("a token"),
        ca().operator("ops", NODE_LIFE, now).expect("an operator"),
        foreign.with_roots(both),
    ];
    for stranger in strangers {
        let who = format!("{stranger:?}");
        let stranger = Node { tls: Tls::new(stranger).expect("a good credential") };
        assert_eq!(turned_away(forming(), &stranger, &node(1)), None, "{who}");
    }
}

#[test]
fn a_rank_whose_certificate_has_expired_is_not_taken() {
    let (now, day) = (SystemTime::now(), Duration::from_secs(24 * 60 * 60));
    let lasting = |id| {
        let credential = ca().node(id, Role::Worker, 300 * day, now).expect("a credential");
        Tls::with_clock(credential, Arc::new(At(now + 100 * day))).expect("TLS")
    };
    let (first, member) = (Node { tls: lasting(100) }, Node { tls: lasting(101) });
    // By its own clock it is valid; by that of rank 0, 100 days later, it is not.
    assert_eq!(turned_away(forming_as(first), &node(1), &member), None);
}

/// A clock that stands still.
#[derive(Debug)]
struct At(SystemTime);

impl TimeProvider for At {
    fn current_time(&self) -> Option<UnixTime> {
        let since = self.0.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(since))
    }
}

#[test]
fn a_rank_is_dialled_at_its_own_node_only() {
    // Another node of the cluster listens where rank 0 should be.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("its address");
    let impostor = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        let mut tls = node(5).accept().expect("TLS");
        let failed = loop {
            match tls.complete_io(&mut stream) {
                Ok(_) if tls.is_handshaking() => {}
                Ok(_) => break None,
                Err(error) => break Some(error.kind()),
            }
        };
        (failed, tls.peer_certificates().is_some())
    });
    let endpoint = Endpoint::bind("127.0.0.1:0").expect("a free port");
    let soon = Duration::from_millis(800);
    let result = endpoint.connect(HERE, 1, &[address; 2], &node(1), soon);
    let reason = "its certificate is not that of its node";
    assert_eq!(result.map(|_| ()), Err(CollectiveError::Refused { peer: 0, reason }));
    // It was told so before it saw whose connection that was.
    assert_eq!(impostor.join().expect("no panic"), (Some(ErrorKind::InvalidData), false));
}
