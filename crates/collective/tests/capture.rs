//! What somebody sees who listens on the wire between two ranks.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use collective::{FrameHeader, Kind, Link};
use support::nodes::node;
use support::{HERE, SOON, bits, endpoints};

/// Everything that passes through a proxy, in both directions.
type Tape = Arc<Mutex<Vec<u8>>>;

/// Passes connections on to `target` and records them.
fn proxy(target: SocketAddr) -> (SocketAddr, Tape) {
    let tape = Tape::default();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("its address");
    let record = Arc::clone(&tape);
    thread::spawn(move || {
        for near in listener.incoming() {
            let near = near.expect("a connection");
            let far = TcpStream::connect(target).expect("the target listens");
            for (from, to) in [(&near, &far), (&far, &near)] {
                let (from, to) = (from.try_clone(), to.try_clone());
                let (from, to) = (from.expect("a handle"), to.expect("a handle"));
                let record = Arc::clone(&record);
                thread::spawn(move || pass(from, to, &record));
            }
        }
    });
    (address, tape)
}

fn pass(mut from: TcpStream, mut to: TcpStream, record: &Mutex<Vec<u8>>) {
    let mut bytes = [0; 64 << 10];
    while let Ok(count) = from.read(&mut bytes) {
        record.lock().expect("not poisoned").extend(&bytes[..count]);
        if count == 0 || to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Write);
}

/// Four weights in a row are seen, and so is the header of a frame.
fn shows(tape: &Tape, values: &[f32]) -> (usize, bool, bool) {
    let tape = tape.lock().expect("not poisoned");
    let some: Vec<u8> = values[..4].iter().flat_map(|value| value.to_le_bytes()).collect();
    let header = header(0).encode();
    let holds = |part: &[u8]| tape.windows(part.len()).any(|window| window == part);
    (tape.len(), holds(&some), holds(&header[..8]))
}

fn header(elements: u64) -> FrameHeader {
    FrameHeader { membership: HERE, sequence: 1, kind: Kind::Partials, from: 0, elements }
}

#[test]
fn neither_weights_nor_frames_are_seen_between_ranks() {
    let values: Vec<f32> = (0..5000).map(|number| 1.0 + number as f32 / 7.0).collect();
    let endpoints = endpoints(2);
    let (near, tape) = proxy(endpoints[0].local_addr());
    let peers = [near, endpoints[1].local_addr()];
    thread::scope(|scope| {
        for (rank, endpoint) in endpoints.iter().enumerate() {
            let (peers, values) = (&peers, &values);
            scope.spawn(move || {
                let link = endpoint.connect(HERE, rank, peers, &node(rank), SOON);
                let mut link = link.expect("connected");
                let mut into = vec![0.0; values.len()];
                link.send(1 - rank, Kind::Partials, 1, values).expect("sent");
                link.receive(1 - rank, Kind::Partials, 1, &mut into).expect("received");
                assert_eq!(bits(&into), bits(values));
            });
        }
    });
    let (length, weights, frame) = shows(&tape, &values);
    assert!(length > 2 * 4 * values.len(), "the proxy has seen {length} bytes only");
    assert!(!weights && !frame, "the wire shows what it must not");

    // The same bytes without TLS, past the same eyes: they do see.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let (near, tape) = proxy(listener.local_addr().expect("its address"));
    let sending = thread::spawn(move || {
        let mut stream = TcpStream::connect(near).expect("the proxy");
        stream.write_all(&header(values.len() as u64).encode()).expect("sent");
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        stream.write_all(&bytes).expect("sent");
        values
    });
    let (mut stream, _) = listener.accept().expect("the proxy connects");
    std::io::copy(&mut stream, &mut std::io::sink()).expect("an end");
    let values = sending.join().expect("no panic");
    let (_, weights, frame) = shows(&tape, &values);
    assert!(weights && frame, "this test would see nothing anyway");
}
