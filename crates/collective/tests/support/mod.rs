//! Groups of ranks as threads, over every kind of link, and data that shows a changed order.

#![allow(dead_code, unreachable_pub, reason = "no test file uses all of it")]

pub mod nodes;

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use collective::tcp::{Endpoint, TcpLink};
use collective::{CollectiveError, Link, Membership, TreeCollective, local};

pub const HERE: Membership = Membership { group: 9, epoch: 4 };
pub const SOON: Duration = Duration::from_secs(20);

/// Makes a group of so many ranks.
pub type Make = fn(usize) -> Vec<Box<dyn Link>>;

/// Every kind of link, by name.
pub const KINDS: [(&str, Make); 2] = [("local", local), ("tcp", tcp)];

fn local(size: usize) -> Vec<Box<dyn Link>> {
    local::links(size, HERE).into_iter().map(|link| Box::new(link) as Box<dyn Link>).collect()
}

fn tcp(size: usize) -> Vec<Box<dyn Link>> {
    let endpoints = endpoints(size);
    let links = connect_all(&endpoints, HERE).into_iter();
    links.map(|link| Box::new(link.expect("connected")) as Box<dyn Link>).collect()
}

pub fn endpoints(size: usize) -> Vec<Endpoint> {
    (0..size).map(|_| Endpoint::bind("127.0.0.1:0").expect("a free port")).collect()
}

pub fn addresses(endpoints: &[Endpoint]) -> Vec<SocketAddr> {
    endpoints.iter().map(Endpoint::local_addr).collect()
}

pub fn connect_all(
    endpoints: &[Endpoint],
    membership: Membership,
) -> Vec<Result<TcpLink, CollectiveError>> {
    let peers = addresses(endpoints);
    each(endpoints.iter().enumerate().collect(), |(rank, endpoint)| {
        endpoint.connect(membership, rank, &peers, &nodes::node(rank), SOON)
    })
}

/// Runs `task` on every item at the same time; results in the order of the items.
pub fn each<T: Send, R: Send>(items: Vec<T>, task: impl Fn(T) -> R + Sync) -> Vec<R> {
    let task = &task;
    thread::scope(|scope| {
        let running: Vec<_> =
            items.into_iter().map(|item| scope.spawn(move || task(item))).collect();
        running.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

pub fn collectives(
    links: Vec<Box<dyn Link>>,
    stripes: usize,
    owners: &[Vec<usize>],
) -> Vec<TreeCollective> {
    let new = |link| TreeCollective::new(link, stripes, owners.to_vec()).expect("a partition");
    links.into_iter().map(new).collect()
}

/// Even runs, the first ranks taking one more.
pub fn even(stripes: usize, ranks: usize) -> Vec<Vec<usize>> {
    let cut = |rank: usize| (rank * stripes).div_ceil(ranks);
    (0..ranks).map(|rank| (cut(rank)..cut(rank + 1)).collect()).collect()
}

/// The ways in which this suite spreads 8 stripes.
pub fn layouts() -> Vec<Vec<Vec<usize>>> {
    let mut layouts: Vec<_> = [1, 2, 3, 4, 5, 7, 8].map(|ranks| even(8, ranks)).into();
    layouts.push(vec![(0..6).collect(), vec![6, 7]]);
    layouts.push(vec![vec![1, 3, 5, 7], vec![0, 2, 4, 6]]);
    layouts.push(vec![vec![2, 7], vec![0, 1, 4, 5, 6], vec![3]]);
    layouts.push(vec![vec![4, 5, 6, 7], vec![], vec![0, 1, 2, 3]]);
    layouts
}

/// Values of very different sizes, both zeros and subnormals: another order of adding shows.
pub fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    let mut value = move || {
        let (shape, fraction) = (next() % 16, next() as f32 / u32::MAX as f32 - 0.5);
        match shape {
            0 => -0.0,
            1 => f32::from_bits(next() % 0x0080_0000),
            2 => fraction * 1.0e12,
            3..6 => fraction * 1.0e4,
            _ => fraction,
        }
    };
    (0..count).map(|_| value()).collect()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
