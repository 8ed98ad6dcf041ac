//! How long sums between ranks take: `cargo bench -p collective`.
//!
//! Prints the median and the 99th percentile of one call on rank 0, ranks being threads of this
//! process on loopback. The size is that of the sum; every rank holds its even share of 8 stripes.
//! TCP is what nodes use: TLS on every connection. The last lines are one f32 forth and back: the
//! floor under everything else.

#[path = "../tests/support/nodes.rs"]
#[allow(dead_code, unreachable_pub, reason = "tests use the rest")]
mod nodes;

use std::thread;
use std::time::{Duration, Instant};

use collective::tcp::Endpoint;
use collective::{Kind, Link, Membership, TreeCollective, local};

const GROUP: Membership = Membership { group: 1, epoch: 1 };

fn links(kind: &str, size: usize) -> Vec<Box<dyn Link>> {
    if kind == "local" {
        return local::links(size, GROUP).into_iter().map(|l| Box::new(l) as Box<_>).collect();
    }
    let endpoints: Vec<_> =
        (0..size).map(|_| Endpoint::bind("127.0.0.1:0").expect("a free port")).collect();
    let peers: Vec<_> = endpoints.iter().map(Endpoint::local_addr).collect();
    let connecting = endpoints.into_iter().enumerate().map(|(rank, endpoint)| {
        let peers = peers.clone();
        thread::spawn(move || {
            endpoint.connect(GROUP, rank, &peers, &nodes::node(rank), Duration::from_secs(10))
        })
    });
    let connecting: Vec<_> = connecting.collect();
    let join = |thread: thread::JoinHandle<Result<_, _>>| {
        Box::new(thread.join().expect("no panic").expect("connected")) as Box<dyn Link>
    };
    connecting.into_iter().map(join).collect()
}

/// Runs `call` on every rank and prints rank 0's times.
fn measure(
    name: &str,
    rounds: usize,
    links: Vec<Box<dyn Link>>,
    make: impl Fn(Box<dyn Link>) -> Box<dyn FnMut(u64)> + Sync,
) {
    let make = &make;
    thread::scope(|scope| {
        for link in links {
            scope.spawn(move || {
                let first = link.rank() == 0;
                let mut call = make(link);
                let mut times = Vec::with_capacity(rounds);
                let warm_up = rounds / 10;
                for round in 0..rounds + warm_up {
                    let started = Instant::now();
                    call(round as u64);
                    times.push(started.elapsed());
                }
                if first {
                    times.drain(..warm_up);
                    times.sort();
                    let (median, late) = (times[rounds / 2], times[rounds * 99 / 100]);
                    println!("{name:<36} median {median:>10.1?}   p99 {late:>10.1?}");
                }
            });
        }
    });
}

fn sum(kind: &str, ranks: usize, bytes: usize, rounds: usize, split: Option<usize>) {
    let elements = bytes / 4;
    let cut = |rank: usize| (rank * 8).div_ceil(ranks);
    let owners: Vec<Vec<usize>> = (0..ranks).map(|r| (cut(r)..cut(r + 1)).collect()).collect();
    let way = if split == Some(usize::MAX) { " direct" } else { "" };
    let name = format!("sum {:>5} KiB  {kind:<5}  {ranks} ranks{way}", bytes / 1024);
    measure(&name, rounds, links(kind, ranks), |link| {
        let rank = link.rank();
        let mut group = TreeCollective::new(link, 8, owners.clone()).expect("a partition");
        if let Some(split) = split {
            group.set_split_bytes(split);
        }
        let partials = vec![1.0; owners[rank].len() * elements];
        let mut out = vec![0.0; elements];
        Box::new(move |_| group.sum_values(&partials, 1, &mut out).expect("a sum"))
    });
}

fn main() {
    for kind in ["local", "tcp"] {
        sum(kind, 1, 4 << 10, 5000, None);
        for ranks in [2, 3] {
            sum(kind, ranks, 4 << 10, 5000, None);
            sum(kind, ranks, 64 << 10, 2000, None);
            sum(kind, ranks, 1 << 20, 200, None);
        }
        sum(kind, 3, 1 << 20, 200, Some(usize::MAX));
        let name = format!("ping-pong 4 B  {kind}");
        measure(&name, 5000, links(kind, 2), |mut link| {
            let mut value = [0.0];
            Box::new(move |round| {
                if link.rank() == 0 {
                    link.send(1, Kind::Partials, round, &value).expect("sent");
                    link.receive(1, Kind::Partials, round, &mut value).expect("received");
                } else {
                    link.receive(0, Kind::Partials, round, &mut value).expect("received");
                    link.send(0, Kind::Partials, round, &value).expect("sent");
                }
            })
        });
    }
}
