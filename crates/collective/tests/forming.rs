//! How groups form over TCP, and what is kept out of them.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use collective::tcp::{Endpoint, TcpLink};
use collective::{CollectiveError, FrameHeader, Kind, Link, Membership};
use support::{HERE, SOON, addresses, connect_all, each, endpoints};

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const READY: u8 = 3;
const OTHER_EPOCH: u8 = 4;
const OTHER_SHAPE: u8 = 5;
const TAKEN: u8 = 6;

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

fn dial(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("listening");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    stream
}

/// Sends a message and returns the step of the answer, or `None` where the connection is closed.
fn ask(stream: &mut TcpStream, bytes: &[u8]) -> Option<u8> {
    stream.write_all(bytes).expect("sent");
    let mut answer = [0; 40];
    stream.read_exact(&mut answer).ok().map(|()| answer[6])
}

/// Rank 0 of two, forming in the background.
fn forming() -> (SocketAddr, thread::JoinHandle<Result<TcpLink, CollectiveError>>) {
    let endpoint = Endpoint::bind("127.0.0.1:0").expect("a free port");
    let address = endpoint.local_addr();
    let running = thread::spawn(move || endpoint.connect(HERE, 0, &[address; 2], SOON));
    (address, running)
}

/// A stream that rank 0 has taken for rank 1.
fn join(address: SocketAddr) -> TcpStream {
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
        endpoint.connect(HERE, rank, &peers, SOON)
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
        let second = scope.spawn(|| dialler.connect(HERE, 1, &peers, SOON));
        thread::sleep(Duration::from_millis(150));
        let first = Endpoint::bind(peers[0]).expect("the same port again");
        assert!(first.connect(HERE, 0, &peers, SOON).is_ok());
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
        endpoint.connect(HERE, rank, &peers, Duration::from_millis(300)).map(|_| ())
    });
    assert!(started.elapsed() < Duration::from_secs(3));
    let missing = CollectiveError::Unformed { membership: HERE, missing: vec![0, 2] };
    assert_eq!(results, [Err(missing.clone()), Err(missing)]);
}

#[test]
fn strays_are_turned_away_and_forming_goes_on() {
    let (address, running) = forming();
    // Silent ones, more than are kept waiting, and one that stops in the middle of a hello.
    let silent: Vec<_> = (0..70).map(|_| dial(address)).collect();
    let mut halting = dial(address);
    halting.write_all(&message(HELLO, HERE, 1, 0, 2)[..20]).expect("sent");
    let mut noise = dial(address);
    assert_eq!(ask(&mut noise, &[0xA5; 40]), None);
    let mut web = dial(address);
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
    let running = thread::spawn(move || endpoint.connect(HERE, 0, &[address; 3], SOON));
    let enter = |from: u32| {
        let mut stream = dial(address);
        let step = ask(&mut stream, &message(HELLO, HERE, from, 0, 3));
        stream.write_all(&message(READY, HERE, from, 0, 3)).ok();
        (stream, step)
    };
    let (mut first, step) = enter(2);
    assert_eq!(step, Some(WELCOME));
    // Another is welcome only until that ready has been read.
    let second = || ask(&mut dial(address), &message(HELLO, HERE, 2, 0, 3));
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
        let ahead = scope.spawn(|| endpoints[0].connect(now, 0, &peers, SOON).map(|_| ()));
        let started = Instant::now();
        let behind = endpoints[1].connect(HERE, 1, &peers, SOON).map(|_| ());
        let wrong = CollectiveError::WrongEpoch { peer: 0, expected: HERE, got: now };
        assert_eq!(behind, Err(wrong));
        assert!(started.elapsed() < Duration::from_secs(5));
        // Under the right epoch the same endpoint is welcome.
        assert!(endpoints[1].connect(now, 1, &peers, SOON).is_ok());
        assert_eq!(ahead.join().expect("no panic"), Ok(()));
    });
}

#[test]
fn a_later_connect_supersedes_an_earlier_one() {
    let endpoints = endpoints(2);
    let peers = addresses(&endpoints);
    let now = Membership { group: 9, epoch: 5 };
    thread::scope(|scope| {
        let earlier = scope.spawn(|| endpoints[0].connect(HERE, 0, &peers, SOON).map(|_| ()));
        thread::sleep(Duration::from_millis(50));
        let later = scope.spawn(|| endpoints[0].connect(now, 0, &peers, SOON).map(|_| ()));
        assert_eq!(earlier.join().expect("no panic"), Err(CollectiveError::Aborted));
        assert!(endpoints[1].connect(now, 1, &peers, SOON).is_ok());
        assert_eq!(later.join().expect("no panic"), Ok(()));
        // The dialling side can be stopped as well.
        let waiting = scope.spawn(|| endpoints[1].connect(now, 1, &peers, SOON).map(|_| ()));
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
        let result = endpoint.connect(HERE, rank, &vec![address; count], Duration::MAX);
        assert!(matches!(result, Err(CollectiveError::Invalid { .. })));
    }
    assert!(endpoint.connect(HERE, 0, &[address], Duration::MAX).is_ok());
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
    let running = thread::spawn(move || endpoint.connect(HERE, 0, &[address; 3], SOON));
    let [_stalled, dying] = [1, 2].map(|from| {
        let mut stream = dial(address);
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
