//! Groups that are moved while they serve.

use super::*;

/// A worker that serves alone where two are wished for, and one that is about to join it: their
/// sessions, and the incarnation that serves.
fn alone_for_long() -> (Bench, [SessionId; 2], GroupId, Epoch) {
    let mut bench = Bench::new(2, 2);
    let first = bench.open(1, Vec::new());
    let second = bench.open(2, Vec::new());
    let (group, epoch, _) = bench.group();
    for (rank, session) in [first, second].into_iter().enumerate() {
        bench.report(session, Report::Ready { group, epoch, rank });
    }
    bench.mute = true;
    bench.input(Input::Died { session: second });
    let (_, epoch, _) = bench.group();
    bench.report(first, Report::Ready { group, epoch, rank: 0 });
    beats(&mut bench, &[first], 3_000);
    let second = bench.open(2, Vec::new());
    assert_eq!(bench.group(), (group, epoch, Phase::Serving));
    (bench, [first, second], group, epoch)
}

fn beats(bench: &mut Bench, sessions: &[SessionId], milliseconds: u64) {
    for _ in 0..milliseconds / 100 {
        bench.wait(100);
        for &session in sessions {
            bench.report(session, Report::Heartbeat(Vec::new()));
        }
    }
}

/// What a session was told to prepare since the last look.
fn told(bench: &mut Bench, session: SessionId) -> Vec<(Epoch, usize)> {
    let orders = bench.take(session).into_iter();
    let told = orders.filter_map(|order| match order {
        Order::Prepare(form) => Some((form.epoch, form.plan.ranks.len())),
        _ => None,
    });
    told.collect()
}

#[test]
fn a_group_serves_until_those_that_join_it_have_loaded() {
    let (mut bench, [first, second], group, epoch) = alone_for_long();
    let both = [first, second];
    beats(&mut bench, &both, 60_000);
    assert_eq!(told(&mut bench, second), [(epoch.next(), 2)], "told once");
    assert_eq!(told(&mut bench, first), [], "it has what it needs");
    assert_eq!(bench.group(), (group, epoch, Phase::Serving), "however long it takes");
    // Of another incarnation: it changes nothing.
    bench.report(second, Report::Prepared { group, epoch, error: None });
    assert_eq!((bench.group().1, bench.leader.stale_reports()), (epoch, 1));
    bench.report(second, Report::Prepared { group, epoch: epoch.next(), error: None });
    assert_eq!(bench.group(), (group, epoch.next(), Phase::Forming));
    assert_eq!(bench.holders().len(), 2);
}

#[test]
fn who_cannot_load_costs_nobody_a_pause() {
    let (mut bench, [first, second], group, epoch) = alone_for_long();
    let both = [first, second];
    let mut rests = Vec::new();
    for _ in 0..9 {
        let began = bench.now;
        while told(&mut bench, second).is_empty() {
            beats(&mut bench, &both, 100);
        }
        rests.push(bench.now - began);
        let error = Some("model.safetensors is no longer what it was".to_owned());
        bench.report(second, Report::Prepared { group, epoch: epoch.next(), error });
        assert_eq!(bench.group(), (group, epoch, Phase::Serving));
    }
    assert!(rests.is_sorted() && rests[8] >= 64_000, "{rests:?}");
    // The group is repaired at once all the same.
    let reason = "a link broke".to_owned();
    bench.report(first, Report::Failed { group, epoch, rank: 0, reason, blames: None });
    beats(&mut bench, &both, 300);
    assert_eq!(bench.group(), (group, epoch.next(), Phase::Forming));
}

#[test]
fn what_is_prepared_stays_so_while_nothing_can_be_decided() {
    let (mut bench, [first, second], group, epoch) = alone_for_long();
    let both = [first, second];
    beats(&mut bench, &both, 6_000);
    bench.refuses = true;
    bench.report(second, Report::Prepared { group, epoch: epoch.next(), error: None });
    for _ in 0..20 {
        bench.proposed.clear();
        beats(&mut bench, &both, 10_000);
    }
    assert_eq!(bench.group(), (group, epoch, Phase::Serving));
    bench.refuses = false;
    beats(&mut bench, &both, 3_000);
    assert_eq!(bench.group(), (group, epoch.next(), Phase::Forming));
}

#[test]
fn who_comes_anew_is_told_again() {
    let (mut bench, [first, second], _, epoch) = alone_for_long();
    beats(&mut bench, &[first, second], 6_000);
    assert_eq!(told(&mut bench, second), [(epoch.next(), 2)]);
    // Its session breaks, and with it perhaps the order.
    let again = bench.open(2, Vec::new());
    beats(&mut bench, &[first, again], 200);
    assert_eq!(told(&mut bench, again), [(epoch.next(), 2)]);
    // Another leader knows nothing of it.
    bench.input(Input::Follow);
    bench.input(Input::Lead);
    let held = Held { group: bench.group().0, epoch, rank: 0, ready: true };
    let (first, again) = (bench.open(1, vec![held]), bench.open(2, Vec::new()));
    beats(&mut bench, &[first, again], 6_000);
    assert_eq!(told(&mut bench, again), [(epoch.next(), 2)]);
}

#[test]
fn a_node_that_drains_keeps_its_ranks_until_another_has_loaded_them() {
    let mut bench = Bench::new(1, 2);
    let (first, second) = (bench.open(1, Vec::new()), bench.open(2, Vec::new()));
    let (group, epoch, _) = bench.group();
    let at = bench.holders()[0].0;
    let (holder, other) = if at == 2 { (first, second) } else { (second, first) };
    bench.report(holder, Report::Ready { group, epoch, rank: 0 });
    bench.mute = true;
    let drained = bench.apply(Command::Drain { node: NodeId(at) }).unwrap();
    bench.input(Input::Changed { events: drained });
    beats(&mut bench, &[first, second], 20_000);
    assert_eq!(told(&mut bench, other), [(epoch.next(), 1)]);
    assert_eq!(bench.group(), (group, epoch, Phase::Serving));
    bench.report(other, Report::Prepared { group, epoch: epoch.next(), error: None });
    assert_eq!(bench.group(), (group, epoch.next(), Phase::Forming));
    assert_ne!(bench.holders()[0].0, at);
}

#[test]
fn one_that_loads_is_waited_for_and_one_that_hangs_is_not() {
    let (mut bench, [first, second], group, epoch) = alone_for_long();
    let both = [first, second];
    beats(&mut bench, &both, 6_000);
    assert_eq!(told(&mut bench, second).len(), 1);
    for bytes_read in 0..20 {
        beats(&mut bench, &both, 60_000);
        let (epoch, rank, bytes_total) = (epoch.next(), 1, 20);
        bench.report(second, Report::Progress { group, epoch, rank, bytes_read, bytes_total });
    }
    assert_eq!(told(&mut bench, second), [], "it is still at it");
    assert_eq!(bench.leader.stale_reports(), 0);
    // It says nothing any more, and is asked again after a rest: there is nobody else.
    beats(&mut bench, &both, 119_000);
    assert_eq!(told(&mut bench, second), []);
    beats(&mut bench, &both, 12_000);
    assert_eq!(told(&mut bench, second).len(), 1);
    assert_eq!(bench.group(), (group, epoch, Phase::Serving));
}

#[test]
fn a_node_that_cannot_load_does_not_keep_another_from_being_asked() {
    let mut bench = Bench::new(1, 3);
    let sessions = [bench.open(1, Vec::new()), bench.open(2, Vec::new())];
    let (group, epoch, _) = bench.group();
    let at = bench.holders()[0].0;
    let [holder, bad] = if at == 2 { sessions } else { [sessions[1], sessions[0]] };
    bench.report(holder, Report::Ready { group, epoch, rank: 0 });
    bench.mute = true;
    let drained = bench.apply(Command::Drain { node: NodeId(at) }).unwrap();
    bench.input(Input::Changed { events: drained });
    let fails = |bench: &mut Bench, times: usize, all: &[SessionId]| {
        for _ in 0..times {
            while told(bench, bad).is_empty() {
                beats(bench, all, 100);
            }
            let error = Some("it has become shorter".to_owned());
            bench.report(bad, Report::Prepared { group, epoch: epoch.next(), error });
        }
    };
    fails(&mut bench, 8, &sessions);
    // Long after, a good one comes. It is asked, and at once.
    beats(&mut bench, &sessions, 20_000);
    assert_eq!(told(&mut bench, bad), []);
    let good = bench.open(3, Vec::new());
    beats(&mut bench, &[holder, bad, good], 300);
    assert_eq!(told(&mut bench, good), [(epoch.next(), 1)]);
    // It fails once, too. The next one to be asked is not the one that has failed eight times.
    let error = Some("the disk was slow".to_owned());
    bench.report(good, Report::Prepared { group, epoch: epoch.next(), error });
    bench.take(bad);
    while told(&mut bench, bad).is_empty() && told(&mut bench, good).is_empty() {
        beats(&mut bench, &[holder, bad, good], 100);
    }
    assert_eq!(bench.group(), (group, epoch, Phase::Serving));
}

#[test]
fn plans_that_are_refused_again_and_again_do_not_fill_the_log() {
    let mut bench = Bench::new(1, 2);
    bench.conflicts = true;
    let first = bench.open(1, Vec::new());
    bench.proposed.clear();
    for _ in 0..6_000 {
        bench.wait(10);
        bench.report(first, Report::Heartbeat(Vec::new()));
    }
    let refused = bench.proposed.len();
    assert!((10..50).contains(&refused), "{refused} in a minute");
    // What changes the state is acted upon at once.
    bench.conflicts = false;
    bench.open(2, Vec::new());
    assert_eq!(bench.group().2, Phase::Forming);
}
