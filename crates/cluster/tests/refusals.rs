//! Every refusal by name; `support::apply` also checks that none leaves a trace.

#![allow(clippy::unwrap_used)]

mod support;

use cluster::{ClusterState, Command, Epoch, GroupId, Phase, Rejected, reconcile, waiting_for};
use planner::NodeId;
use support::{apply, deployment, joined, node, plan_on};

/// The field that is refused, and how it is spoilt.
type Case<T> = (&'static str, fn(&mut T));

fn place(group: u64, epoch: u64, ids: &[u64]) -> Command {
    Command::Place { group: GroupId(group), epoch: Epoch(epoch), plan: plan_on(ids) }
}

fn refuse(state: &mut ClusterState, command: Command) -> Rejected {
    apply(state, command).unwrap_err()
}

#[test]
fn another_digest_is_named() {
    let mut state = joined(2, 1);
    let mut other = node(2, 1);
    other.model_digest = "def456".to_owned();
    let (expected, got) = ("abc123".to_owned(), "def456".to_owned());
    let rejected = refuse(&mut state, Command::Join(other));
    assert_eq!(rejected, Rejected::WrongDigest { expected, got });
    apply(&mut state, Command::Join(node(2, 1))).unwrap();
}

#[test]
fn deployments_that_nobody_could_serve() {
    let mut state = ClusterState::new();
    assert_eq!(waiting_for(&state).unwrap(), "no model is deployed");
    let cases: [Case<cluster::Deployment>; 9] = [
        ("model", |d| d.model.clear()),
        ("digest", |d| d.digest = "xyz".to_owned()),
        ("stripes", |d| d.stripes = Some(0)),
        ("stripes", |d| d.stripes = Some(1000)),
        ("ranks", |d| d.ranks = 0),
        ("ranks", |d| d.ranks = 9),
        ("context", |d| d.context = 0),
        ("kv_blocks", |d| d.kv_blocks = usize::MAX),
        ("block_tokens", |d| d.block_tokens = 0),
    ];
    for (field, spoil) in cases {
        let mut wrong = deployment(3);
        spoil(&mut wrong);
        match refuse(&mut state, Command::Deploy(wrong)) {
            Rejected::BadDeployment(bad) => assert_eq!(bad.field, field),
            other => panic!("{field}: {other}"),
        }
    }
    apply(&mut state, Command::Deploy(deployment(3))).unwrap();
    apply(&mut state, Command::Deploy(deployment(3))).unwrap();
    let rejected = refuse(&mut state, Command::Deploy(deployment(2)));
    assert_eq!(rejected, Rejected::AlreadyDeployed { model: "tiny".to_owned() });
}

#[test]
fn nodes_that_nobody_could_reach() {
    let mut state = joined(2, 1);
    let cases: [Case<cluster::NodeInfo>; 8] = [
        ("name", |n| n.name = "x".repeat(129)),
        ("name", |n| n.name = "a\nb".to_owned()),
        ("worker_address", |n| n.worker_address = "nowhere".to_owned()),
        ("collective_addresses", |n| n.collective_addresses.clear()),
        ("collective_addresses", |n| n.collective_addresses[0] = "h:0".to_owned()),
        ("devices", |n| n.devices.clear()),
        ("devices", |n| n.devices[0].weight = f64::NAN),
        ("devices", |n| n.devices[0].weight = 0.0),
    ];
    for (field, spoil) in cases {
        let mut wrong = node(2, 1);
        spoil(&mut wrong);
        match refuse(&mut state, Command::Join(wrong)) {
            Rejected::BadNode(bad) => assert_eq!(bad.field, field),
            other => panic!("{field}: {other}"),
        }
    }
    let mut twin = node(2, 1);
    twin.collective_addresses = node(1, 1).collective_addresses;
    let address = twin.collective_addresses[0].clone();
    let rejected = refuse(&mut state, Command::Join(twin));
    assert_eq!(rejected, Rejected::AddressTaken { node: NodeId(1), address });
    // Once the first is lost, its addresses are free and its number is not.
    apply(&mut state, Command::Lost { node: NodeId(1) }).unwrap();
    apply(&mut state, Command::Join(node(1, 1))).unwrap();
    assert_eq!(state.nodes().keys().map(|id| id.0).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn plans_that_the_state_contradicts() {
    let mut state = joined(2, 3);
    apply(&mut state, Command::Lost { node: NodeId(3) }).unwrap();
    let node3 = NodeId(3);
    assert_eq!(refuse(&mut state, place(1, 1, &[1, 3])), Rejected::NodeGone { node: node3 });
    let rejected = refuse(&mut state, place(1, 1, &[1, 7]));
    assert_eq!(rejected, Rejected::UnknownNode { node: NodeId(7) });
    let rejected = refuse(&mut state, place(1, 1, &[1]));
    assert_eq!(rejected, Rejected::OtherPlan { stripes: 8, ranks: 1 });

    let spoilt = |spoil: fn(&mut planner::ShardPlan)| {
        let mut plan = plan_on(&[1, 2]);
        spoil(&mut plan);
        Command::Place { group: GroupId(1), epoch: Epoch(1), plan }
    };
    let rejected = refuse(&mut state, spoilt(|plan| plan.ranks[0].stripes = vec![7]));
    assert!(matches!(rejected, Rejected::BadPlan(_)), "{rejected}");
    let rejected = refuse(&mut state, spoilt(|plan| plan.ranks[1].device = 1));
    assert_eq!(rejected, Rejected::UnknownDevice { node: NodeId(2), device: 1 });
    let rejected = refuse(&mut state, spoilt(|plan| plan.ranks[1].kv_bytes = u64::MAX));
    assert!(matches!(rejected, Rejected::TooSmall { node: NodeId(2), .. }), "{rejected}");

    apply(&mut state, place(4, 6, &[1, 2])).unwrap();
    let rejected = refuse(&mut state, place(4, 7, &[1, 2]));
    assert_eq!(rejected, Rejected::StaleGroup { group: GroupId(4), last: GroupId(4) });
    let rejected = refuse(&mut state, place(5, 6, &[1, 2]));
    assert_eq!(rejected, Rejected::StaleEpoch { epoch: Epoch(6), last: Epoch(6) });
    let rejected = refuse(&mut state, place(5, 7, &[1, 2]));
    assert_eq!(rejected, Rejected::DeviceTaken { node: NodeId(1), device: 0 });
}

#[test]
fn the_log_only_goes_forward() {
    let mut state = joined(2, 1);
    let index = state.index();
    let rejected = state.apply(index, Command::Join(node(5, 1))).unwrap_err();
    assert_eq!(rejected, Rejected::StaleIndex { index, applied: index });
    state.apply(index + 10, Command::Join(node(5, 1))).unwrap();
    assert_eq!(state.index(), index + 10);
}

#[test]
fn what_is_kept_for_information_is_bounded() {
    let mut state = joined(2, 2);
    for _ in 0..100 {
        let alive = |state: &ClusterState| {
            state.nodes().iter().filter(|(_, n)| n.alive).map(|(&id, _)| id).next_back().unwrap()
        };
        let commands = reconcile(&state);
        assert_eq!(commands.len(), 1);
        commands.into_iter().for_each(|command| drop(apply(&mut state, command).unwrap()));
        let node_lost = alive(&state);
        let number = state.nodes()[&node_lost].info.name[1..].parse::<u64>().unwrap();
        apply(&mut state, Command::Lost { node: node_lost }).unwrap();
        apply(&mut state, Command::Join(node(number, 1))).unwrap();
    }
    assert!(state.groups().len() <= 8 && state.nodes().len() <= 34);
    assert_eq!(state.groups().keys().next_back(), Some(&GroupId(100)));
    // Two at first, one more each time: forgetting a node frees no number.
    assert_eq!(state.nodes().keys().next_back(), Some(&NodeId(102)));
}

#[test]
fn a_long_reason_is_cut_at_a_character() {
    let mut state = joined(1, 1);
    apply(&mut state, place(1, 1, &[1])).unwrap();
    let reason = "é".repeat(1000).split_off(2) + "x";
    let retire = Command::Retire { group: GroupId(1), epoch: Epoch(1), reason };
    apply(&mut state, retire.clone()).unwrap();
    let group = &state.groups()[&GroupId(1)];
    assert_eq!(group.phase, Phase::Retired);
    assert_eq!(group.reason.len(), 512);
    assert_eq!(refuse(&mut state, retire), Rejected::GroupGone { group: GroupId(1) });
}

#[test]
fn a_spare_stays_idle_until_it_is_needed() {
    let mut state = joined(2, 3);
    for command in reconcile(&state) {
        apply(&mut state, command).unwrap();
    }
    let first = state.groups()[&GroupId(1)].nodes();
    assert_eq!(first.len(), 2);
    assert!(reconcile(&state).is_empty());
    let gone = *first.iter().next().unwrap();
    apply(&mut state, Command::Lost { node: gone }).unwrap();
    for command in reconcile(&state) {
        apply(&mut state, command).unwrap();
    }
    let second = &state.groups()[&GroupId(2)];
    assert!(second.epoch > state.groups()[&GroupId(1)].epoch);
    assert!(!second.nodes().contains(&gone));
}

#[test]
fn a_shortage_of_memory_is_said() {
    let mut state = ClusterState::new();
    apply(&mut state, Command::Deploy(deployment(1))).unwrap();
    let mut small = node(1, 1);
    small.devices[0].memory_bytes = 1000;
    apply(&mut state, Command::Join(small)).unwrap();
    assert!(reconcile(&state).is_empty());
    let waiting = waiting_for(&state).unwrap();
    assert!(waiting.contains("bytes"), "{waiting}");
}

#[test]
fn nodes_are_bounded() {
    let mut state = joined(1, 0);
    for number in 1..=1024 {
        state.apply(state.index() + 1, Command::Join(node(number, 1))).unwrap();
    }
    let rejected = refuse(&mut state, Command::Join(node(1025, 1)));
    assert_eq!(rejected, Rejected::TooManyNodes { limit: 1024 });
}
