//! Random commands, sensible and not: invariants hold, refusals leave no trace, replay agrees, and
//! a state that was written down goes on as the one that wrote it.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;

use cluster::{
    ClusterState, Command, Coordinator, Deployment, Epoch, Event, Group, GroupId, Observation,
    Outcome, Phase, Proposal, Refusal, RequestId, Role, Standing, reconcile,
};
use planner::{NodeId, ShardPlan};
use proptest::prelude::*;
use support::{apply, deployment, enrol, model, node, plan_on};

#[derive(Debug, Clone)]
enum Act {
    One(Option<u8>, Command),
    /// The lease of a node that is there, under its incarnation of now.
    Lease(u64, u8),
    ReadyAll,
    Reconcile,
    WriteDown,
}

fn wish() -> impl Strategy<Value = Deployment> {
    let nodes = proptest::collection::btree_set((1u64..9).prop_map(NodeId), 0..4);
    (any::<bool>(), 1usize..5, 0usize..4, nodes).prop_map(|(other, ranks, replicas, nodes)| {
        let name = if other { "other" } else { "tiny" }.to_owned();
        let nodes = if nodes.len() < 3 { Default::default() } else { nodes };
        Deployment { name, replicas, nodes, ..deployment(ranks) }
    })
}

fn node_command() -> impl Strategy<Value = Command> {
    let process = || (1u64..9, 0u64..4).prop_map(|(node, incarnation)| (NodeId(node), incarnation));
    prop_oneof![
        6 => (0u8..4, proptest::bool::weighted(0.1)).prop_map(|(token, forged)| {
            let coordinator = (token == 3) != forged;
            let role = if coordinator { Role::Coordinator } else { Role::Worker };
            enrol(token, 3, role, "n")
        }),
        8 => (1u64..9, 1usize..3, 0u64..3).prop_map(|(number, devices, boot)| {
            let info = cluster::NodeInfo { boot, ..node(number, devices) };
            Command::Join { node: NodeId(number), info }
        }),
        1 => (1u64..9, 1u64..9).prop_map(|(id, number)| {
            Command::Join { node: NodeId(id), info: node(number, 1) }
        }),
        1 => process().prop_map(|(node, incarnation)| Command::Lost { node, incarnation }),
        1 => process().prop_map(|(node, incarnation)| Command::Suspect { node, incarnation }),
        1 => process().prop_map(|(node, incarnation)| Command::Recover { node, incarnation }),
        1 => (1u64..9).prop_map(|node| Command::Drain { node: NodeId(node) }),
        1 => (1u64..9).prop_map(|node| Command::Undrain { node: NodeId(node) }),
        1 => (1u64..9).prop_map(|node| Command::Leave { node: NodeId(node) }),
        1 => (1u64..9).prop_map(|node| {
            let (cluster_address, http_address) = ("a:1".to_owned(), "a:2".to_owned());
            let model_digests = std::collections::BTreeSet::new();
            let at = Coordinator { cluster_address, http_address, model_digests };
            Command::SetCoordinator { node: NodeId(node), at }
        }),
        1 => Just(Command::Found { name: "first".to_owned() }),
    ]
}

fn group_command() -> impl Strategy<Value = Command> {
    let pair = || (0u64..6, 0u64..6).prop_map(|(group, epoch)| (GroupId(group), Epoch(epoch)));
    let reason = || "asked".to_owned();
    prop_oneof![
        (pair(), proptest::collection::vec(1u64..9, 3)).prop_map(|((group, epoch), nodes)| {
            let (deployment, plan) = ("tiny".to_owned(), plan_on(&nodes));
            Command::Place { group, deployment, epoch, plan }
        }),
        (pair(), 0usize..4).prop_map(|((group, epoch), rank)| Command::RankReady {
            group,
            epoch,
            rank
        }),
        pair().prop_map(|(group, epoch)| Command::Loading { group, epoch }),
        pair().prop_map(move |(group, epoch)| Command::Fence { group, epoch, reason: reason() }),
        pair().prop_map(move |(group, epoch)| Command::Retire { group, epoch, reason: reason() }),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let name = |other: bool| if other { "other" } else { "tiny" }.to_owned();
    let command = prop_oneof![
        10 => node_command(),
        4 => group_command(),
        4 => wish().prop_map(Command::Deploy),
        1 => any::<bool>().prop_map(move |other| Command::Undeploy { name: name(other) }),
        1 => any::<bool>().prop_map(move |other| Command::DrainDeployment { name: name(other) }),
        1 => (any::<bool>(), any::<bool>()).prop_map(move |(alias, other)| {
            let alias = if alias { "chat" } else { "other" }.to_owned();
            Command::Point { alias, deployment: name(other) }
        }),
        1 => Just(Command::Unpoint { alias: "chat".to_owned() }),
        1 => Just(Command::RegisterModel(model())),
        1 => Just(Command::ForgetModel { digest: "abc123".to_owned() }),
        1 => Just(Command::RotateCertificates),
    ];
    prop_oneof![
        10 => (proptest::option::weighted(0.2, 0u8..8), command)
            .prop_map(|(request, command)| Act::One(request, command)),
        3 => (1u64..9, 0u8..3).prop_map(|(node, what)| Act::Lease(node, what)),
        4 => Just(Act::ReadyAll),
        8 => Just(Act::Reconcile),
        1 => Just(Act::WriteDown),
    ]
}

fn proposals(state: &ClusterState, act: &Act) -> Vec<Proposal> {
    let commands = match act {
        Act::One(request, command) => {
            let request = request.map(|id| RequestId([id; 16]));
            return vec![Proposal { request, command: command.clone() }];
        }
        Act::Lease(number, what) => {
            let id = NodeId(*number);
            let entry = state.nodes().get(&id);
            let Some(entry) = entry.filter(|node| node.standing.present()) else {
                return Vec::new();
            };
            let (node, incarnation) = (id, entry.incarnation);
            vec![match what {
                0 => Command::Lost { node, incarnation },
                1 => Command::Suspect { node, incarnation },
                _ => Command::Recover { node, incarnation },
            }]
        }
        Act::ReadyAll => {
            let waiting = state.groups().iter().filter(|(_, group)| group.live());
            let ready = waiting.flat_map(|(&group, entry)| {
                let epoch = entry.epoch;
                (0..entry.plan.ranks.len()).map(move |rank| Command::RankReady {
                    group,
                    epoch,
                    rank,
                })
            });
            ready.collect()
        }
        Act::Reconcile => reconcile(state, &Observation::default()),
        Act::WriteDown => Vec::new(),
    };
    commands.into_iter().map(Proposal::from).collect()
}

/// What was once decided, to be compared with all that comes after.
#[derive(Default)]
struct History {
    /// By incarnation: who held what.
    plans: BTreeMap<(GroupId, Epoch), ShardPlan>,
    answers: BTreeMap<RequestId, Outcome>,
    last_node: u64,
    last_group: u64,
}

impl History {
    /// No stripe is held by two ranks within an epoch; epochs only grow; numbers are not reused;
    /// nobody comes back who left.
    fn check(&mut self, before: &ClusterState, after: &ClusterState) {
        for (&id, group) in after.groups() {
            if group.live() {
                let plan =
                    self.plans.entry((id, group.epoch)).or_insert_with(|| group.plan.clone());
                assert_eq!(*plan, group.plan, "two plans within epoch {}", group.epoch);
                assert!(group.holders().iter().enumerate().all(|(stripe, &holder)| {
                    let held = |rank: &&planner::RankPlan| rank.stripes.contains(&stripe);
                    group.plan.ranks.iter().filter(held).map(|rank| rank.rank).eq([holder])
                }));
            }
            match before.groups().get(&id) {
                Some(old) => check_step(old, group),
                None => assert!(id.0 > self.last_group && group.epoch == Epoch::FIRST),
            }
            self.last_group = self.last_group.max(id.0);
        }
        for (&id, node) in after.nodes() {
            match before.nodes().get(&id) {
                Some(old) => {
                    assert!(old.standing != Standing::Left || node == old, "node {} is back", id.0);
                    assert!(old.incarnation <= node.incarnation && old.role == node.role);
                }
                None => assert!(id.0 > self.last_node, "number {} was given twice", id.0),
            }
            self.last_node = self.last_node.max(id.0);
        }
        assert!(before.generation() <= after.generation());
    }

    /// Every answer under one request id is the first one.
    fn check_answer(&mut self, request: RequestId, state: &ClusterState) {
        let now = state.outcome(&request).unwrap();
        assert_eq!(self.answers.entry(request).or_insert_with(|| now.clone()), now);
    }
}

/// One command's step of a group.
fn check_step(old: &Group, new: &Group) {
    assert_eq!(old.deployment, new.deployment);
    assert!(old.epoch <= new.epoch, "an epoch went back");
    let forward = (old.phase as u8) <= (new.phase as u8);
    let within = match (old.phase, new.phase) {
        (Phase::Repairing, Phase::Forming) => true,
        (from, Phase::Repairing) => from == Phase::Repairing,
        _ => forward,
    };
    assert!(within || new.epoch > old.epoch, "{} -> {} within an epoch", old.phase, new.phase);
    assert!(old.phase != Phase::Retired || old == new, "a retired group changed");
}

/// Whether a proposal that ended so was to be expected of a sound proposer.
fn check_sound(act: &Act, result: &Result<Vec<Event>, cluster::Rejected>) {
    let sound = matches!(act, Act::Reconcile | Act::ReadyAll | Act::Lease(..));
    assert!(!sound || result.is_ok(), "{act:?}: {result:?}");
}

fn run(acts: &[Act]) {
    let mut state = ClusterState::new();
    let mut log = Vec::new();
    let mut history = History::default();
    let first = [
        Command::Found { name: "first".to_owned() },
        Command::RegisterModel(model()),
        Command::Deploy(deployment(3)),
    ];
    for command in first {
        apply(&mut state, command.clone()).unwrap();
        log.push((state.index(), Proposal::from(command)));
    }
    // A state that was written down half-way, and goes on beside the first.
    let mut twin: Option<ClusterState> = None;
    for act in acts {
        for proposal in proposals(&state, act) {
            let before = state.clone();
            let (index, request) = (before.index() + 1, proposal.request);
            let result = apply(&mut state, proposal.clone());
            check_sound(act, &result);
            history.check(&before, &state);
            if let Some(request) = request {
                history.check_answer(request, &state);
            }
            if let Some(twin) = &mut twin {
                assert_eq!(twin.apply(index, proposal.clone()), result);
            }
            log.push((index, proposal));
        }
        if let Act::Reconcile = act {
            assert_eq!(reconcile(&state, &Observation::default()), [], "it does not settle");
        }
        if let Act::WriteDown = act {
            twin = Some(ClusterState::restore(state.snapshot()).unwrap());
        }
        for name in ["tiny", "other"] {
            for route in state.routes(name) {
                assert_eq!(state.groups()[&route.group].phase, Phase::Serving);
                assert_eq!(state.groups()[&route.group].plan.ranks[0].node, route.leader);
            }
        }
    }
    let mut replayed = ClusterState::new();
    for (index, proposal) in log {
        // What was refused is refused again.
        let _ = replayed.apply(index, proposal);
    }
    assert_eq!(replayed, state);
    assert!(twin.is_none_or(|twin| twin == state));
}

proptest! {
    #[test]
    fn invariants_hold_and_replay_agrees(acts in proptest::collection::vec(act(), 1..80)) {
        run(&acts);
    }
}

#[test]
fn random_commands_reach_every_phase_and_many_refusals() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let mut phases = std::collections::BTreeSet::new();
    let (mut accepted, mut refused) = (0, std::collections::BTreeSet::new());
    for _ in 0..100 {
        let acts = proptest::collection::vec(act(), 60).new_tree(&mut runner).unwrap().current();
        let mut state = ClusterState::new();
        apply(&mut state, Command::Found { name: "first".to_owned() }).unwrap();
        apply(&mut state, Command::RegisterModel(model())).unwrap();
        apply(&mut state, Command::Deploy(deployment(3))).unwrap();
        for act in &acts {
            for proposal in proposals(&state, act) {
                match apply(&mut state, proposal) {
                    Ok(_) => accepted += 1,
                    Err(why) => drop(refused.insert(kind(&why))),
                }
                phases.extend(state.groups().values().map(|group| group.phase));
            }
        }
    }
    assert_eq!(phases.len(), 5, "{phases:?}");
    assert!(accepted > 800 && refused.len() > 15, "{accepted} accepted; {refused:?}");
}

/// The first word of a refusal's debug form: its variant.
fn kind(why: &cluster::Rejected) -> String {
    let text = format!("{why:?}");
    text.split([' ', '(']).next().unwrap().to_owned()
}

#[test]
fn a_refusal_is_remembered_as_it_was() {
    let mut state = ClusterState::new();
    apply(&mut state, Command::Found { name: "first".to_owned() }).unwrap();
    let request = Some(RequestId([1; 16]));
    let leave = || Proposal { request, command: Command::Leave { node: NodeId(9) } };
    let first = apply(&mut state, leave()).unwrap_err();
    // Something else would have come of it by now.
    for _ in 0..8 {
        apply(&mut state, enrol(1, 99, Role::Worker, "w")).unwrap();
    }
    let second = apply(&mut state, leave()).unwrap_err();
    assert_eq!(Refusal::from(&first), Refusal::from(&second));
    assert_eq!(first.to_string(), second.to_string());
    assert_eq!(state.nodes()[&NodeId(9)].standing, Standing::Enrolled);
}
