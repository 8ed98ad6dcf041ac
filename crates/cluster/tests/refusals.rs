//! Every refusal by name; `support::apply` also checks that none leaves a trace.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;

use cluster::{
    ClusterState, Code, Command, Coordinator, Epoch, Event, GroupId, IntegrityError, Model,
    Observation, Phase, Proposal, Refusal, Rejected, RequestId, RestoreError, Role, Standing,
    reconcile, waiting_for,
};
use planner::NodeId;
use support::{
    apply, deployment, enrol, join, joined, model, node, plan_on, ready, restarted, settle,
};

/// The field that is refused, and how it is spoilt.
type Case<T> = (&'static str, fn(&mut T));

fn place(group: u64, epoch: u64, ids: &[u64]) -> Command {
    let (group, epoch, plan) = (GroupId(group), Epoch(epoch), plan_on(ids));
    Command::Place { group, deployment: "tiny".to_owned(), epoch, plan }
}

fn refuse(state: &mut ClusterState, command: Command) -> Rejected {
    apply(state, command).unwrap_err()
}

#[test]
fn another_digest_is_named() {
    let mut state = joined(2, 1);
    apply(&mut state, enrol(1, 9, Role::Worker, "w2")).unwrap();
    let mut info = node(2, 1);
    info.model_digests = BTreeSet::from(["def456".to_owned()]);
    let (expected, got) = ("abc123".to_owned(), "def456".to_owned());
    let rejected = refuse(&mut state, Command::Join { node: NodeId(2), info });
    assert_eq!(rejected, Rejected::WrongDigest { expected, got });
    apply(&mut state, Command::Join { node: NodeId(2), info: node(2, 1) }).unwrap();

    // A second model is a model, too; its nodes serve none of the first one's ranks.
    let other = Model { name: "other".to_owned(), digest: "def456".to_owned(), ..model() };
    apply(&mut state, Command::RegisterModel(other)).unwrap();
    apply(&mut state, enrol(1, 9, Role::Worker, "w3")).unwrap();
    let mut info = node(3, 1);
    info.model_digests = BTreeSet::from(["def456".to_owned()]);
    apply(&mut state, Command::Join { node: NodeId(3), info }).unwrap();
    let rejected = refuse(&mut state, place(1, 1, &[1, 3]));
    assert!(matches!(rejected, Rejected::WrongDigest { .. }), "{rejected}");
    settle(&mut state);
    let nodes = state.groups()[&GroupId(1)].nodes();
    assert_eq!(nodes, BTreeSet::from([NodeId(1), NodeId(2)]));
}

#[test]
fn deployments_that_nobody_could_serve() {
    let mut state = ClusterState::new();
    assert_eq!(waiting_for(&state, "tiny").unwrap(), "no model is deployed");
    apply(&mut state, Command::RegisterModel(model())).unwrap();
    let cases: [Case<cluster::Deployment>; 14] = [
        ("model", |d| d.name.clear()),
        ("stripes", |d| d.stripes = Some(0)),
        ("stripes", |d| d.stripes = Some(1000)),
        ("ranks", |d| d.ranks = 0),
        ("ranks", |d| d.ranks = 9),
        ("replicas", |d| d.replicas = 0),
        ("replicas", |d| d.replicas = 65),
        ("nodes", |d| d.nodes = (0..1025).map(NodeId).collect()),
        ("context", |d| d.context = 0),
        ("kv_blocks", |d| d.kv_blocks = usize::MAX),
        ("block_tokens", |d| d.block_tokens = 0),
        ("block_tokens", |d| d.block_tokens = 1 << 40),
        ("step_tokens", |d| d.step_tokens = 3),
        ("max_sequences", |d| d.max_sequences = 0),
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
    assert_eq!(waiting_for(&state, "else").unwrap(), "else is not deployed");
    let rejected = refuse(&mut state, Command::Deploy(deployment(2)));
    assert_eq!(rejected, Rejected::AlreadyDeployed { name: "tiny".to_owned() });
}

#[test]
fn models_that_are_none() {
    let mut state = ClusterState::new();
    let cases: [Case<Model>; 4] = [
        ("name", |m| m.name = "\t".to_owned()),
        ("digest", |m| m.digest = "xyz".to_owned()),
        ("digest", |m| m.digest = "ABC123".to_owned()),
        ("spec", |m| Arc::make_mut(&mut m.spec).vocab = 0),
    ];
    for (field, spoil) in cases {
        let mut wrong = model();
        spoil(&mut wrong);
        match refuse(&mut state, Command::RegisterModel(wrong)) {
            Rejected::BadModel(bad) => assert_eq!(bad.field, field),
            other => panic!("{field}: {other}"),
        }
    }
    apply(&mut state, Command::RegisterModel(model())).unwrap();
    let mut other = model();
    Arc::make_mut(&mut other.spec).context += 1;
    let rejected = refuse(&mut state, Command::RegisterModel(other));
    assert_eq!(rejected, Rejected::OtherModel { digest: "abc123".to_owned() });
}

#[test]
fn nodes_that_nobody_could_reach() {
    let mut state = joined(2, 1);
    apply(&mut state, enrol(1, 9, Role::Worker, "w2")).unwrap();
    let second = |info| Command::Join { node: NodeId(2), info };
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
        match refuse(&mut state, second(wrong)) {
            Rejected::BadNode(bad) => assert_eq!(bad.field, field),
            other => panic!("{field}: {other}"),
        }
    }
    let mut twin = node(2, 1);
    twin.collective_addresses = node(1, 1).collective_addresses;
    let address = twin.collective_addresses[0].clone();
    let rejected = refuse(&mut state, second(twin.clone()));
    assert_eq!(rejected, Rejected::AddressTaken { node: NodeId(1), address });
    // Once the first is lost, its addresses are free; then it cannot have them back.
    apply(&mut state, Command::Lost { node: NodeId(1), incarnation: 1 }).unwrap();
    apply(&mut state, second(twin)).unwrap();
    let rejected = refuse(&mut state, Command::Join { node: NodeId(1), info: node(1, 1) });
    assert!(matches!(rejected, Rejected::AddressTaken { node: NodeId(2), .. }), "{rejected}");
}

#[test]
fn tokens_that_let_in_nobody() {
    let mut state = ClusterState::new();
    let token = |spoil: fn(&mut u32, &mut u64)| {
        let (mut uses, mut expires) = (1, 1_000_000);
        spoil(&mut uses, &mut expires);
        let Command::Enrol { token, now, role, name, .. } = enrol(1, 1, Role::Worker, "w") else {
            unreachable!()
        };
        Command::Enrol { token, uses_max: uses, expires, now, role, name }
    };
    for (field, wrong) in [
        ("uses_max", token(|uses, _| *uses = 0)),
        ("expires", token(|_, expires| *expires = 899_999)),
    ] {
        match refuse(&mut state, wrong) {
            Rejected::BadToken(bad) => assert_eq!(bad.field, field),
            other => panic!("{field}: {other}"),
        }
    }
    let rejected = refuse(&mut state, enrol(1, 1, Role::Worker, ""));
    assert!(matches!(rejected, Rejected::BadName(_)), "{rejected}");
    let first = enrol(1, 1, Role::Worker, "w");
    apply(&mut state, first.clone()).unwrap();
    assert_eq!(refuse(&mut state, first).code(), Code::Denied);
    let rejected = refuse(&mut state, enrol(1, 1, Role::Coordinator, "w"));
    assert!(matches!(rejected, Rejected::TokenChanged { .. }), "{rejected}");
}

#[test]
fn tokens_are_remembered_until_nobody_could_use_them() {
    let mut state = ClusterState::new();
    let with = |token: u64, expires, now| {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&token.to_le_bytes());
        let (token, name) = (cluster::TokenId(id), "w".to_owned());
        Command::Enrol { token, uses_max: 1, expires, now, role: Role::Worker, name }
    };
    // Nodes are bounded as well, so each leaves again.
    for number in 0..1024 {
        apply(&mut state, with(number, 1000, 500)).unwrap();
        apply(&mut state, Command::Leave { node: NodeId(number + 1) }).unwrap();
    }
    assert_eq!(state.tokens().len(), 1024);
    let rejected = refuse(&mut state, with(5000, 9000, 1000));
    assert_eq!(rejected, Rejected::Full { what: "tokens in use", limit: 1024 });
    // Clocks may differ by less than an hour.
    refuse(&mut state, with(5000, 9000, 4600));
    apply(&mut state, with(5000, 9000, 4601)).unwrap();
    assert_eq!(state.tokens().len(), 1);
    assert_eq!(state.nodes().keys().next_back(), Some(&NodeId(1025)));
    assert!((1..=1024).all(|id| state.removed(NodeId(id))) && !state.removed(NodeId(1025)));
    assert!(!state.removed(NodeId(1026)) && !state.removed(NodeId(0)));
}

#[test]
fn a_node_is_what_its_certificate_says() {
    let mut state = ClusterState::new();
    apply(&mut state, Command::Found { name: "c1".to_owned() }).unwrap();
    apply(&mut state, enrol(1, 9, Role::Worker, "w2")).unwrap();
    let at = |cluster_address: &str| Coordinator {
        cluster_address: cluster_address.to_owned(),
        http_address: "h:80".to_owned(),
        model_digests: BTreeSet::new(),
    };
    let set = |node, at| Command::SetCoordinator { node: NodeId(node), at };
    let rejected = refuse(&mut state, set(2, at("h:81")));
    assert_eq!(rejected, Rejected::WrongRole { node: NodeId(2), role: Role::Worker });
    let rejected = refuse(&mut state, set(1, at("h")));
    assert!(matches!(rejected, Rejected::BadNode(_)), "{rejected}");
    apply(&mut state, set(1, at("h:81"))).unwrap();
    assert_eq!(state.coordinators().map(|(id, _)| id).collect::<Vec<_>>(), [NodeId(1)]);
    // A coordinator may compute besides.
    apply(&mut state, Command::Join { node: NodeId(1), info: node(1, 1) }).unwrap();
    let rejected = refuse(&mut state, Command::Leave { node: NodeId(1) });
    assert_eq!(rejected, Rejected::LastCoordinator { node: NodeId(1) });
}

#[test]
fn plans_that_the_state_contradicts() {
    let mut state = joined(2, 4);
    apply(&mut state, Command::Lost { node: NodeId(3), incarnation: 1 }).unwrap();
    let wrong = |node, standing| Rejected::WrongStanding { node: NodeId(node), standing };
    assert_eq!(refuse(&mut state, place(1, 1, &[1, 3])), wrong(3, "lost"));
    apply(&mut state, Command::Drain { node: NodeId(4) }).unwrap();
    assert_eq!(refuse(&mut state, place(1, 1, &[1, 4])), wrong(4, "draining"));
    apply(&mut state, Command::Leave { node: NodeId(3) }).unwrap();
    let rejected = refuse(&mut state, place(1, 1, &[1, 3]));
    assert_eq!(rejected, Rejected::NodeGone { node: NodeId(3) });
    let rejected = refuse(&mut state, place(1, 1, &[1, 7]));
    assert_eq!(rejected, Rejected::UnknownNode { node: NodeId(7) });
    apply(&mut state, Command::Undrain { node: NodeId(4) }).unwrap();
    let rejected = refuse(&mut state, place(1, 1, &[1, 2, 4]));
    assert_eq!(rejected, Rejected::OtherPlan { stripes: 8, ranks: 3 });

    let spoilt = |spoil: fn(&mut planner::ShardPlan)| {
        let mut plan = plan_on(&[1, 2]);
        spoil(&mut plan);
        let deployment = "tiny".to_owned();
        Command::Place { group: GroupId(1), deployment, epoch: Epoch(1), plan }
    };
    let rejected = refuse(&mut state, spoilt(|plan| plan.ranks[0].stripes = vec![7]));
    assert!(matches!(rejected, Rejected::BadPlan(_)), "{rejected}");
    let rejected = refuse(&mut state, spoilt(|plan| plan.ranks[1].device = 1));
    assert_eq!(rejected, Rejected::UnknownDevice { node: NodeId(2), device: 1 });
    let rejected = refuse(&mut state, spoilt(|plan| plan.ranks[1].kv_bytes = u64::MAX));
    assert!(matches!(rejected, Rejected::TooSmall { node: NodeId(2), .. }), "{rejected}");
}

/// Draining moves ranks away, and a coordinator has none.
#[test]
fn a_coordinator_is_not_drained() {
    let (mut state, node) = (ClusterState::new(), NodeId(1));
    apply(&mut state, Command::Found { name: "c1".to_owned() }).unwrap();
    let wrong = Rejected::WrongRole { node, role: Role::Coordinator };
    assert_eq!(refuse(&mut state, Command::Drain { node }), wrong);
    assert_eq!(refuse(&mut state, Command::Undrain { node }), wrong);
}

#[test]
fn numbers_and_epochs_that_were_given() {
    let mut state = joined(2, 2);
    let wrong_group =
        |group, last| Rejected::WrongGroup { group: GroupId(group), last: GroupId(last) };
    assert_eq!(refuse(&mut state, place(0, 1, &[1, 2])), wrong_group(0, 0));
    assert_eq!(refuse(&mut state, place(257, 1, &[1, 2])), wrong_group(257, 0));
    let wrong_epoch = |group, expected, got| Rejected::WrongEpoch {
        group: GroupId(group),
        expected: Epoch(expected),
        got: Epoch(got),
    };
    assert_eq!(refuse(&mut state, place(4, 2, &[1, 2])), wrong_epoch(4, 1, 2));
    apply(&mut state, place(4, 1, &[1, 2])).unwrap();
    assert_eq!(refuse(&mut state, place(4, 1, &[1, 2])), wrong_epoch(4, 2, 1));
    let rejected = refuse(&mut state, place(5, 1, &[1, 2]));
    let enough = Rejected::EnoughReplicas { deployment: "tiny".to_owned(), replicas: 1 };
    assert_eq!(rejected, enough);
    let twice = cluster::Deployment { replicas: 2, ..deployment(2) };
    apply(&mut state, Command::Deploy(twice)).unwrap();
    assert_eq!(refuse(&mut state, place(3, 1, &[1, 2])), wrong_group(3, 4));
    let rejected = refuse(&mut state, place(5, 1, &[1, 2]));
    assert_eq!(rejected, Rejected::DeviceTaken { node: NodeId(1), device: 0 });
    // Its own devices are no obstacle: the group moves onto them.
    let events = apply(&mut state, place(4, 2, &[2, 1])).unwrap();
    assert!(matches!(events[..], [Event::GroupFenced { .. }, Event::GroupPlaced { .. }]));
    let other = cluster::Deployment { name: "other".to_owned(), ..deployment(2) };
    apply(&mut state, Command::Deploy(other)).unwrap();
    let Command::Place { group, epoch, plan, .. } = place(4, 3, &[1, 2]) else { unreachable!() };
    let stolen = Command::Place { group, deployment: "other".to_owned(), epoch, plan };
    let rejected = refuse(&mut state, stolen);
    assert!(matches!(rejected, Rejected::OtherDeployment { .. }), "{rejected}");
}

#[test]
fn the_log_only_goes_forward() {
    let mut state = joined(2, 1);
    let index = state.index();
    let rejected = state.apply(index, Command::RotateCertificates).unwrap_err();
    assert_eq!(rejected, Rejected::StaleIndex { index, applied: index });
    state.apply(index + 10, Command::RotateCertificates).unwrap();
    assert_eq!((state.index(), state.generation()), (index + 10, 1));
}

#[test]
fn what_is_kept_for_information_is_bounded() {
    let mut state = joined(2, 2);
    for round in 0..100 {
        settle(&mut state);
        // A node leaves for ever; another machine comes.
        let (&gone, _) = state.nodes().iter().rfind(|(_, n)| n.standing.present()).unwrap();
        apply(&mut state, Command::Leave { node: gone }).unwrap();
        join(&mut state, round + 10, 1);
        let (&group, entry) = state.groups().iter().next_back().unwrap();
        let (epoch, reason) = (entry.epoch, "asked".to_owned());
        apply(&mut state, Command::Retire { group, epoch, reason }).unwrap();
    }
    assert_eq!((state.groups().len(), state.nodes().len()), (32, 34));
    assert_eq!(state.groups().keys().next_back(), Some(&GroupId(100)));
    // Two at first, one more each time: forgetting a node frees no number.
    assert_eq!(state.nodes().keys().next_back(), Some(&NodeId(102)));
    assert!(state.removed(NodeId(2)) && !state.nodes().contains_key(&NodeId(2)));
    let rejected = refuse(&mut state, Command::Join { node: NodeId(2), info: node(2, 1) });
    assert_eq!(rejected, Rejected::NodeGone { node: NodeId(2) });
}

#[test]
fn outcomes_are_remembered_up_to_a_number() {
    let mut state = ClusterState::new();
    let request = |number: u64| {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_le_bytes());
        RequestId(id)
    };
    let rotate =
        |number| Proposal { request: Some(request(number)), command: Command::RotateCertificates };
    for number in 0..4097 {
        state.apply(number + 1, rotate(number)).unwrap();
    }
    assert_eq!(state.outcome(&request(0)), None);
    assert!(state.outcome(&request(1)).is_some());
    let again = apply(&mut state, rotate(1)).unwrap();
    assert!(matches!(again[..], [Event::Repeated(done)] if done.index == 2), "{again:?}");
    assert_eq!(state.generation(), 4097);
    apply(&mut state, rotate(0)).unwrap();
    assert_eq!(state.generation(), 4098);
    assert_eq!(state.snapshot().outcomes.len(), 4096);
}

/// No refusal is as long as a snapshot may claim.
#[test]
fn outcomes_from_elsewhere_are_bounded() {
    let restored = |length: usize| {
        let refusal = Refusal { code: Code::Denied, message: "x".repeat(length) };
        let mut snapshot = joined(1, 1).snapshot();
        snapshot.outcomes.push((RequestId([9; 16]), Err(refusal)));
        ClusterState::restore(snapshot)
    };
    assert!(restored(512).is_ok());
    let refused = restored(513).unwrap_err();
    assert_eq!(refused, RestoreError::Integrity(IntegrityError::Outcomes));
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
fn a_spare_stays_idle_until_it_is_needed_and_survivors_stay() {
    let mut state = joined(2, 4);
    settle(&mut state);
    let first = state.groups()[&GroupId(1)].nodes();
    assert_eq!(first, BTreeSet::from([NodeId(1), NodeId(2)]));
    apply(&mut state, Command::Lost { node: NodeId(1), incarnation: 1 }).unwrap();
    settle(&mut state);
    assert_eq!(state.groups()[&GroupId(1)].nodes(), BTreeSet::from([NodeId(2), NodeId(3)]));
    // The one that comes back with the lowest number of all takes nobody's place.
    apply(&mut state, Command::Join { node: NodeId(1), info: restarted(1, 2) }).unwrap();
    apply(&mut state, Command::Lost { node: NodeId(3), incarnation: 1 }).unwrap();
    settle(&mut state);
    assert_eq!(state.groups()[&GroupId(1)].nodes(), BTreeSet::from([NodeId(1), NodeId(2)]));
    assert_eq!(state.groups()[&GroupId(1)].epoch, Epoch(3));
}

#[test]
fn devices_of_one_node_serve_several_groups() {
    let mut state = joined(2, 0);
    let twice = cluster::Deployment { replicas: 2, ..deployment(2) };
    apply(&mut state, Command::Deploy(twice)).unwrap();
    join(&mut state, 1, 3);
    join(&mut state, 2, 1);
    settle(&mut state);
    ready(&mut state);
    let ranks = |group: u64| {
        let ranks = &state.groups()[&GroupId(group)].plan.ranks;
        ranks.iter().map(|rank| (rank.node.0, rank.device)).collect::<Vec<_>>()
    };
    assert_eq!((ranks(1), ranks(2)), (vec![(1, 0), (1, 1)], vec![(1, 2), (2, 0)]));
    assert_eq!(waiting_for(&state, "tiny"), None);
    assert_eq!(state.routes("tiny").len(), 2);
    assert_eq!(state.groups_on(NodeId(1)).count(), 2);
}

#[test]
fn nobody_is_placed_on_a_node_that_cannot_be_told() {
    let mut state = joined(1, 2);
    let seen = |nodes: &[u64]| Observation {
        reachable: Some(nodes.iter().copied().map(NodeId).collect()),
        ..Observation::default()
    };
    assert_eq!(reconcile(&state, &seen(&[])), []);
    let commands = reconcile(&state, &seen(&[2]));
    let [Command::Place { plan, .. }] = &commands[..] else { panic!("{commands:?}") };
    assert_eq!(plan.ranks[0].node, NodeId(2));
    commands.into_iter().for_each(|command| drop(apply(&mut state, command).unwrap()));
    // Where it is, it stays, whether its node can be told or not.
    assert_eq!(reconcile(&state, &seen(&[1])), []);
}

#[test]
fn a_shortage_of_memory_is_said() {
    let mut state = joined(1, 0);
    apply(&mut state, enrol(1, 9, Role::Worker, "small")).unwrap();
    let mut info = node(1, 1);
    info.devices[0].memory_bytes = 1000;
    apply(&mut state, Command::Join { node: NodeId(1), info }).unwrap();
    assert!(reconcile(&state, &Observation::default()).is_empty());
    let waiting = waiting_for(&state, "tiny").unwrap();
    assert!(waiting.contains("bytes"), "{waiting}");
}

#[test]
fn everything_is_bounded() {
    let mut state = joined(1, 0);
    for number in 1..=1024 {
        let command = enrol(1, u32::MAX, Role::Worker, &format!("w{number}"));
        state.apply(state.index() + 1, command).unwrap();
    }
    let rejected = refuse(&mut state, enrol(1, u32::MAX, Role::Worker, "w"));
    assert_eq!(rejected, Rejected::Full { what: "nodes", limit: 1024 });
    assert_eq!(rejected.code(), Code::Full);
    apply(&mut state, Command::Leave { node: NodeId(1) }).unwrap();
    apply(&mut state, enrol(1, u32::MAX, Role::Worker, "w")).unwrap();
    assert_eq!(state.nodes()[&NodeId(1025)].standing, Standing::Enrolled);

    for number in 1..64 {
        let digest = format!("{number:x}");
        apply(&mut state, Command::RegisterModel(Model { digest, ..model() })).unwrap();
    }
    let more = Model { digest: "ffff".to_owned(), ..model() };
    let rejected = refuse(&mut state, Command::RegisterModel(more));
    assert_eq!(rejected, Rejected::Full { what: "models", limit: 64 });

    let wish = |number: usize, replicas| {
        let name = format!("d{number}");
        Command::Deploy(cluster::Deployment { name, replicas, ..deployment(1) })
    };
    for number in 0..3 {
        apply(&mut state, wish(number, 64)).unwrap();
    }
    let rejected = refuse(&mut state, wish(3, 64));
    assert_eq!(rejected, Rejected::Full { what: "groups wished for", limit: 256 });
    for number in 3..63 {
        apply(&mut state, wish(number, 1)).unwrap();
    }
    let rejected = refuse(&mut state, wish(63, 1));
    assert_eq!(rejected, Rejected::Full { what: "deployments", limit: 64 });
}
