//! What holds of collectives over any kind of link.

mod support;

use std::thread;
use std::time::{Duration, Instant};

use collective::{CollectiveError, Kind, Link, TreeCollective, tree};
use support::{KINDS, bits, collectives, each, even, layouts, values};

/// This rank's rows of `[stripes, elements]`.
fn part_of(leaves: &[f32], owned: &[usize], elements: usize) -> Vec<f32> {
    owned.iter().flat_map(|&s| leaves[s * elements..(s + 1) * elements].to_vec()).collect()
}

#[test]
fn sums_have_the_bits_of_one_rank_whoever_holds_what() {
    for (kind, make) in KINDS {
        for owners in layouts() {
            let group = collectives(make(owners.len()), 8, &owners);
            let items = group.into_iter().zip(&owners).collect();
            let digests = each(items, |(mut rank, owned): (TreeCollective, &Vec<usize>)| {
                // Sizes go up and down, so that reused buffers would show old values; the larger
                // ones go the way that splits elements among ranks.
                rank.set_split_bytes(3000);
                let mut sums = Vec::new();
                for (call, (rows, columns)) in
                    [(1, 7), (5, 500), (2, 3), (0, 4), (3, 257), (1, 1)].into_iter().enumerate()
                {
                    let elements = rows * columns;
                    let leaves = values(8 * elements, call as u32);
                    let mut out = vec![f32::NAN; elements];
                    let partials = part_of(&leaves, owned, elements);
                    rank.sum_values(&partials, rows, &mut out).expect("a sum");
                    let mut whole = vec![0.0; elements];
                    assert!(tree::sum_tree(8, &leaves, &mut whole));
                    assert_eq!(bits(&out), bits(&whole), "{kind} {owners:?} {rows}x{columns}");
                    sums.push(bits(&out));
                }
                sums
            });
            assert!(digests.windows(2).all(|pair| pair[0] == pair[1]));
        }
    }
}

#[test]
fn the_data_shows_another_order() {
    let leaves = values(8 * 500, 1);
    let mut whole = vec![0.0; 500];
    assert!(tree::sum_tree(8, &leaves, &mut whole));
    let mut in_a_row = leaves[..500].to_vec();
    for stripe in leaves[500..].chunks(500) {
        in_a_row.iter_mut().zip(stripe).for_each(|(sum, value)| *sum += value);
    }
    let differing = whole.iter().zip(&in_a_row).filter(|(a, b)| a.to_bits() != b.to_bits());
    assert!(differing.count() > 100);
}

#[test]
fn splitting_by_elements_gives_the_same_bits() {
    for (kind, make) in KINDS {
        // Fewer elements than ranks leaves some ranks without a share.
        for (ranks, elements) in [(3, 100_000), (5, 3), (7, 1001)] {
            let owners = even(8, ranks);
            let leaves = values(8 * elements, 77);
            let sums = [0, usize::MAX].map(|split| {
                let group = collectives(make(ranks), 8, &owners).into_iter().zip(&owners);
                each(group.collect(), |(mut rank, owned): (TreeCollective, &Vec<usize>)| {
                    rank.set_split_bytes(split);
                    let mut out = vec![0.0; elements];
                    rank.sum_values(&part_of(&leaves, owned, elements), 1, &mut out).expect("sum");
                    bits(&out)
                })
            });
            assert_eq!(sums[0], sums[1], "{kind}");
        }
    }
}

#[test]
fn large_frames_in_both_directions_do_not_deadlock() {
    for (_, make) in KINDS {
        let elements = 4 << 20;
        each(make(3), |mut link| {
            let values = vec![link.rank() as f32; elements];
            let mut into = vec![0.0; elements];
            let peers: Vec<_> = (0..3).filter(|&peer| peer != link.rank()).collect();
            for sequence in 0..2 {
                for &peer in &peers {
                    link.send(peer, Kind::Partials, sequence, &values).expect("sent");
                }
            }
            for sequence in 0..2 {
                for &peer in &peers {
                    link.receive(peer, Kind::Partials, sequence, &mut into).expect("received");
                    assert!(into.iter().all(|&value| value == peer as f32));
                }
            }
        });
    }
}

#[test]
fn a_small_frame_does_not_overtake_a_large_one() {
    for (_, make) in KINDS {
        each(make(2), |mut link| {
            let peer = 1 - link.rank();
            let large = values(3 << 20, link.rank() as u32);
            link.send(peer, Kind::Partials, 0, &large).expect("sent");
            link.send(peer, Kind::Sums, 1, &[1.5]).expect("sent");
            link.send(peer, Kind::Barrier, 2, &[]).expect("sent");
            let mut into = vec![0.0; large.len()];
            link.receive(peer, Kind::Partials, 0, &mut into).expect("received");
            assert_eq!(bits(&into), bits(&values(3 << 20, peer as u32)));
            let mut one = [0.0];
            link.receive(peer, Kind::Sums, 1, &mut one).expect("received");
            assert_eq!(one, [1.5]);
            link.receive(peer, Kind::Barrier, 2, &mut []).expect("received");
        });
    }
}

#[test]
fn gathers_put_columns_in_stripe_order_on_rank_0_only() {
    let widths = [3, 1, 4, 0, 5, 9, 2, 6];
    let starts: Vec<usize> = (0..8).map(|s| widths[..s].iter().sum()).collect();
    let (rows, total) = (4, 30);
    let whole = values(rows * total, 5);
    for (kind, make) in KINDS {
        for owners in layouts() {
            let group = collectives(make(owners.len()), 8, &owners).into_iter().zip(&owners);
            let items = group.enumerate().collect();
            each(items, |(number, (mut rank, owned)): (_, (TreeCollective, &Vec<usize>))| {
                let mut part = Vec::new();
                for row in whole.chunks(total) {
                    for &s in owned {
                        part.extend_from_slice(&row[starts[s]..starts[s] + widths[s]]);
                    }
                }
                for _ in 0..2 {
                    let mut out = vec![f32::NAN; rows * total];
                    rank.gather_values(&part, &widths, &mut out).expect("gathered");
                    match number {
                        0 => assert_eq!(bits(&out), bits(&whole), "{kind} {owners:?}"),
                        _ => assert!(out.iter().all(|value| value.is_nan())),
                    }
                    rank.wait_for_all().expect("all there");
                }
            });
        }
    }
}

#[test]
fn nobody_passes_a_barrier_before_the_last_has_come() {
    for (_, make) in KINDS {
        let group = collectives(make(3), 3, &even(3, 3));
        let times = each(group.into_iter().enumerate().collect(), |(number, mut rank)| {
            if number == 1 {
                thread::sleep(Duration::from_millis(80));
            }
            let before = Instant::now();
            rank.wait_for_all().expect("all there");
            (before, Instant::now())
        });
        let last = times.iter().map(|(before, _)| *before).max();
        assert!(times.iter().all(|(_, after)| Some(*after) >= last));
    }
}

#[test]
fn an_abort_ends_blocked_and_later_operations_here_and_at_the_peers() {
    for (kind, make) in KINDS {
        let mut group = collectives(make(3), 3, &even(3, 3));
        // Rank 2 never sends, so both others block.
        let third = group.pop().expect("rank 2");
        let handle = group[0].link_abort_handle();
        let started = Instant::now();
        let stopper = thread::spawn(move || {
            thread::sleep(Duration::from_millis(60));
            handle.abort();
            handle.abort();
        });
        let errors = each(group, |mut rank| {
            let error = rank.wait_for_all().expect_err("blocked, then stopped");
            let again = rank.sum_values(&[1.0], 1, &mut [0.0]).expect_err("stays failed");
            assert_eq!(error, again);
            error
        });
        stopper.join().expect("no panic");
        assert!(started.elapsed() < Duration::from_secs(5), "{kind}");
        assert_eq!(errors[0], CollectiveError::Aborted, "{kind}");
        // Rank 1 was waiting for rank 2, which is alive and silent.
        assert_eq!(errors[1], CollectiveError::Closed { peer: 0, sequence: 0 }, "{kind}");
        drop(third);
    }
}

#[test]
fn a_peer_that_dies_is_noticed_at_once() {
    for (kind, make) in KINDS {
        let mut links = make(2);
        let dying = links.pop().expect("rank 1");
        let mut survivor = links.pop().expect("rank 0");
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(dying);
        });
        let started = Instant::now();
        let result = survivor.receive(1, Kind::Partials, 3, &mut [0.0; 9]);
        killer.join().expect("no panic");
        let closed = CollectiveError::Closed { peer: 1, sequence: 3 };
        assert_eq!(result, Err(closed.clone()), "{kind}");
        assert!(started.elapsed() < Duration::from_secs(2), "{kind}");
        assert_eq!(survivor.send(1, Kind::Partials, 4, &[1.0]), Err(closed), "{kind}");
    }
}

#[test]
fn a_peer_that_leaves_in_order_does_not_end_waits_for_others() {
    for (kind, make) in KINDS {
        let mut links = make(3);
        let mut slow = links.pop().expect("rank 2");
        let leaving = links.pop().expect("rank 1");
        let mut waiting = links.pop().expect("rank 0");
        // What it leaves unread makes its end a reset.
        waiting.send(1, Kind::Partials, 0, &[1.0]).expect("sent");
        drop(leaving);
        let sender = thread::spawn(move || {
            thread::sleep(Duration::from_millis(120));
            slow.send(0, Kind::Partials, 0, &[2.5])
        });
        let mut into = [0.0];
        assert_eq!(waiting.receive(2, Kind::Partials, 0, &mut into), Ok(()), "{kind}");
        assert_eq!((into, sender.join().expect("no panic")), ([2.5], Ok(())));
    }
}

/// Three ranks of a group in which the last has failed because of rank 0, and has been dropped.
fn accused(links: Vec<Box<dyn Link>>, told: bool) -> (Box<dyn Link>, Box<dyn Link>) {
    let mut links = links.into_iter();
    let (mut first, mut second, mut last) = match (links.next(), links.next(), links.next()) {
        (Some(first), Some(second), Some(last)) => (first, second, last),
        _ => panic!("three links"),
    };
    // What it leaves unread makes its end a reset.
    second.send(2, Kind::Partials, 0, &[1.0]).expect("sent");
    if told {
        last.accuse(0);
    } else {
        last.set_timeout(Duration::from_millis(50));
        let late = CollectiveError::Timeout { peer: 0, sequence: 0 };
        assert_eq!(last.receive(0, Kind::Partials, 0, &mut [0.0]), Err(late));
    }
    drop(last);
    // And its end has come before anybody looks.
    thread::sleep(Duration::from_millis(50));
    first.set_timeout(Duration::from_millis(200));
    (first, second)
}

#[test]
fn who_fails_because_of_a_peer_is_not_blamed_for_it() {
    for (kind, make) in KINDS {
        for told in [false, true] {
            // In a wait for the one that left, for the accused itself, and while sending.
            let (_first, mut second) = accused(make(3), told);
            let result = second.receive(2, Kind::Partials, 0, &mut [0.0]);
            assert_eq!(result.map_err(|e| e.peer()), Err(Some(0)), "{kind} {told}");
            let (_first, mut second) = accused(make(3), told);
            let result = second.receive(0, Kind::Partials, 0, &mut [0.0]);
            assert_eq!(result.map_err(|e| e.peer()), Err(Some(0)), "{kind} {told}");
            let (_first, mut second) = accused(make(3), told);
            let mut sends = (1..).map(|n| second.send(2, Kind::Partials, n, &[1.0]));
            let result = sends.find(Result::is_err).expect("a refused send");
            assert_eq!(result.map_err(|e| e.peer()), Err(Some(0)), "{kind} {told}");
            // The accused knows better.
            let (mut first, _second) = accused(make(3), told);
            let result = first.receive(2, Kind::Partials, 0, &mut [0.0]);
            assert_eq!(result.map_err(|e| e.peer()), Err(Some(2)), "{kind} {told}");
        }
    }
}

#[test]
fn what_was_sent_before_a_link_was_dropped_arrives() {
    for (_, make) in KINDS {
        let mut links = make(2);
        let mut leaving = links.pop().expect("rank 1");
        let mut staying = links.pop().expect("rank 0");
        let large = values(1 << 20, 8);
        let sender = thread::spawn({
            let large = large.clone();
            move || leaving.send(0, Kind::Gather, 0, &large)
        });
        let mut into = vec![0.0; 1 << 20];
        assert_eq!(staying.receive(1, Kind::Gather, 0, &mut into), Ok(()));
        assert_eq!(sender.join().expect("no panic"), Ok(()));
        assert_eq!(bits(&into), bits(&large));
        let next = staying.receive(1, Kind::Gather, 1, &mut into);
        assert_eq!(next, Err(CollectiveError::Closed { peer: 1, sequence: 1 }));
    }
}

#[test]
fn a_receive_is_late_by_its_own_deadline() {
    for (_, make) in KINDS {
        let mut links = make(3);
        links[0].set_timeout(Duration::from_millis(60));
        let started = Instant::now();
        let result = links[0].receive(2, Kind::Sums, 17, &mut [0.0]);
        assert_eq!(result, Err(CollectiveError::Timeout { peer: 2, sequence: 17 }));
        let waited = started.elapsed();
        assert!(waited >= Duration::from_millis(55) && waited < Duration::from_secs(3));
    }
}

#[test]
fn a_peer_that_takes_nothing_stops_the_sender_in_time() {
    for (_, make) in KINDS {
        let mut links = make(2);
        links[0].set_timeout(Duration::from_millis(200));
        let values = vec![1.0; 1 << 20];
        let sent = (0..64).try_for_each(|n| links[0].send(1, Kind::Gather, n, &values));
        assert!(matches!(sent, Err(CollectiveError::Timeout { peer: 1, .. })), "{sent:?}");
    }
}

/// Rank 1 sends one frame; what rank 0 makes of it, with the value it had before.
fn exchange(
    mut links: Vec<Box<dyn Link>>,
    sent: (Kind, u64, usize),
    wanted: (Kind, u64, usize),
) -> Result<(), CollectiveError> {
    links[1].send(0, sent.0, sent.1, &vec![1.0; sent.2]).expect("sent");
    let mut into = vec![2.0; wanted.2];
    let result = links[0].receive(1, wanted.0, wanted.1, &mut into);
    assert!(into.iter().all(|&value| value == if result.is_ok() { 1.0 } else { 2.0 }));
    result
}

#[test]
fn a_frame_that_is_not_the_next_is_refused() {
    for (_, make) in KINDS {
        let wanted = (Kind::Partials, 5, 3);
        assert_eq!(exchange(make(2), wanted, wanted), Ok(()));
        for got in [4, 6] {
            assert_eq!(
                exchange(make(2), (Kind::Partials, got, 3), wanted),
                Err(CollectiveError::OutOfOrder { peer: 1, expected: 5, got })
            );
        }
        let mismatch = |what, expected, got| {
            Err(CollectiveError::Mismatch { peer: 1, sequence: 5, what, expected, got })
        };
        assert_eq!(
            exchange(make(2), (Kind::Partials, 5, 100), wanted),
            mismatch("element count", 3, 100)
        );
        assert_eq!(exchange(make(2), (Kind::Sums, 5, 3), wanted), mismatch("frame kind", 1, 2));
    }
}

#[test]
fn wrong_sizes_are_errors_and_reach_the_peers() {
    for (_, make) in KINDS {
        let group = collectives(make(2), 8, &even(8, 2));
        let ranks = each(group.into_iter().enumerate().collect(), |(number, mut rank)| {
            let mut out = [0.0; 6];
            let partials = vec![0.0; if number == 0 { 4 * 6 } else { 4 * 6 + 1 }];
            let error = rank.sum_values(&partials, 2, &mut out).expect_err("rank 1 is wrong");
            // The rank stays, so that it is its failure that is noticed, not its end.
            (error, rank)
        });
        let errors: Vec<_> = ranks.iter().map(|(error, _)| error.clone()).collect();
        let what = "elements of the partials";
        assert_eq!(
            errors[1],
            CollectiveError::Mismatch { peer: 1, sequence: 0, what, expected: 24, got: 25 }
        );
        assert_eq!(errors[0], CollectiveError::Closed { peer: 1, sequence: 0 });
    }
    let wrong = |call: &dyn Fn(&mut TreeCollective) -> Result<(), CollectiveError>| {
        let mut group = collectives(KINDS[0].1(1), 2, &even(2, 1));
        let result = call(&mut group[0]);
        assert!(matches!(result, Err(CollectiveError::Mismatch { peer: 0, .. })), "{result:?}");
    };
    wrong(&|rank| rank.sum_values(&[0.0; 10], 3, &mut [0.0; 5]));
    wrong(&|rank| rank.sum_values(&[0.0; 10], 0, &mut [0.0; 5]));
    wrong(&|rank| rank.gather_values(&[0.0; 6], &[1, 1, 1], &mut [0.0; 6]));
    wrong(&|rank| rank.gather_values(&[0.0; 6], &[1, 2], &mut [0.0; 7]));
    wrong(&|rank| rank.gather_values(&[0.0; 3], &[1, 2], &mut [0.0; 6]));
    wrong(&|rank| rank.gather_values(&[0.0; 3], &[usize::MAX, 2], &mut [0.0; 6]));
}

#[test]
fn a_collective_needs_a_partition_of_the_stripes() {
    let new = |stripes, owners: Vec<Vec<usize>>| {
        let link = KINDS[0].1(2).remove(0);
        TreeCollective::new(link, stripes, owners).map(|_| ())
    };
    assert_eq!(new(3, vec![vec![0, 2], vec![1]]), Ok(()));
    let wrong = [
        vec![vec![0, 1, 2]],
        vec![vec![0, 1], vec![1, 2]],
        vec![vec![0], vec![1]],
        vec![vec![0, 1], vec![2, 3]],
        vec![vec![1, 0], vec![2]],
        vec![vec![0, 0], vec![1, 2]],
    ];
    for owners in wrong {
        let result = new(3, owners.clone());
        assert!(matches!(result, Err(CollectiveError::Invalid { .. })), "{owners:?}");
    }
    assert!(matches!(new(0, vec![vec![], vec![]]), Err(CollectiveError::Invalid { .. })));
}

#[test]
fn a_link_has_no_use_for_itself_or_strangers() {
    for (_, make) in KINDS {
        let mut link = make(2).remove(0);
        for peer in [0, 2, usize::MAX] {
            let invalid =
                CollectiveError::Invalid { what: "peer rank", got: peer as u64, limit: 2 };
            assert_eq!(link.send(peer, Kind::Barrier, 0, &[]), Err(invalid.clone()));
            assert_eq!(link.receive(peer, Kind::Barrier, 0, &mut []), Err(invalid));
        }
    }
}
