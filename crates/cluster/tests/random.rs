//! Random commands, sensible and not: invariants hold, refusals leave no trace, replay agrees.

#![allow(clippy::unwrap_used)]

mod support;

use cluster::{ClusterState, Command, Epoch, GroupId, Phase, reconcile};
use planner::NodeId;
use proptest::prelude::*;
use support::{apply, deployment, node, plan_on};

#[derive(Debug, Clone)]
enum Act {
    Join(u64, usize),
    Lost(u64),
    Ready(u64, u64, usize),
    ReadyAll,
    Retire(u64, u64),
    Place(u64, u64, Vec<u64>),
    Reconcile,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (1u64..8, 1usize..3).prop_map(|(n, d)| Act::Join(n, d)),
        2 => (1u64..12).prop_map(Act::Lost),
        2 => (0u64..6, 0u64..6, 0usize..4).prop_map(|(g, e, r)| Act::Ready(g, e, r)),
        2 => Just(Act::ReadyAll),
        1 => (0u64..6, 0u64..6).prop_map(|(g, e)| Act::Retire(g, e)),
        1 => (0u64..9, 0u64..9, proptest::collection::vec(1u64..9, 3))
            .prop_map(|(g, e, nodes)| Act::Place(g, e, nodes)),
        4 => Just(Act::Reconcile),
    ]
}

fn commands(state: &ClusterState, act: &Act) -> Vec<Command> {
    match act {
        Act::Join(number, devices) => vec![Command::Join(node(*number, *devices))],
        Act::Lost(number) => vec![Command::Lost { node: NodeId(*number) }],
        Act::Ready(group, epoch, rank) => {
            vec![Command::RankReady { group: GroupId(*group), epoch: Epoch(*epoch), rank: *rank }]
        }
        Act::ReadyAll => {
            let forming = state.groups().iter().filter(|(_, g)| g.phase == Phase::Forming);
            let ready = forming.flat_map(|(&group, g)| {
                let epoch = g.epoch;
                (0..g.plan.ranks.len()).map(move |rank| Command::RankReady { group, epoch, rank })
            });
            ready.collect()
        }
        Act::Retire(group, epoch) => vec![Command::Retire {
            group: GroupId(*group),
            epoch: Epoch(*epoch),
            reason: "asked".to_owned(),
        }],
        Act::Place(group, epoch, nodes) => vec![Command::Place {
            group: GroupId(*group),
            epoch: Epoch(*epoch),
            plan: plan_on(nodes),
        }],
        Act::Reconcile => reconcile(state),
    }
}

/// Numbers, epochs, phases and lost nodes never go back.
fn check_forward(before: &ClusterState, after: &ClusterState) {
    let last = |state: &ClusterState| {
        let groups = state.groups().iter().next_back();
        groups.map_or((0, 0), |(id, group)| (id.0, group.epoch.0))
    };
    assert!(last(after) >= last(before));
    for (id, group) in after.groups() {
        match before.groups().get(id) {
            Some(old) => {
                assert_eq!((old.epoch, &old.plan), (group.epoch, &group.plan));
                assert!(old.phase as u8 <= group.phase as u8);
            }
            None => assert!(last(before) < (id.0, group.epoch.0)),
        }
    }
    for (id, node) in after.nodes() {
        if let Some(old) = before.nodes().get(id) {
            assert!(old.alive || !node.alive, "a lost node came back under its number");
        }
    }
}

proptest! {
    #[test]
    fn invariants_hold_and_replay_agrees(acts in proptest::collection::vec(act(), 1..60)) {
        let mut state = ClusterState::new();
        let mut accepted = Vec::new();
        let first = Command::Deploy(deployment(3));
        apply(&mut state, first.clone()).unwrap();
        accepted.push((state.index(), first));
        for act in &acts {
            let proposed = commands(&state, act);
            for command in proposed {
                let before = state.clone();
                let sound = matches!(act, Act::Reconcile | Act::ReadyAll);
                let result = apply(&mut state, command.clone());
                prop_assert!(!sound || result.is_ok(), "{act:?}: {result:?}");
                check_forward(&before, &state);
                if result.is_ok() {
                    accepted.push((state.index(), command));
                }
            }
            if let Act::Reconcile = act {
                prop_assert!(reconcile(&state).is_empty(), "reconcile does not settle");
            }
            if let Some(route) = state.route("tiny") {
                prop_assert_eq!(state.groups()[&route.group].phase, Phase::Serving);
            }
        }
        let mut replayed = ClusterState::new();
        for (index, command) in accepted {
            replayed.apply(index, command).unwrap();
        }
        prop_assert_eq!(replayed, state);
    }
}
