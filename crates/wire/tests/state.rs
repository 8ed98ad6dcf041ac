//! Commands and the state come back from their bytes as they were, byte for byte and in all they do
//! afterwards; damaged bytes are refused or harmless, and never a panic.

#![allow(clippy::unwrap_used)]

#[path = "../../cluster/tests/support/mod.rs"]
mod support;

use std::collections::BTreeSet;

use ::model::ComputeType;
use cluster::{
    ClusterState, Command, Coordinator, Deployment, Epoch, GroupId, NodeInfo, Observation,
    Proposal, RequestId, Role, TokenId, reconcile,
};
use planner::{DeviceSpec, ExpertCut, NodeId, RankPlan, ShardPlan};
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use support::{apply, deployment, enrol, joined, model, node, ready, restarted, settle};
use wire::{
    COMMAND_MAX, STATE_MAX, WireError, decode_command, decode_state, encode_command, encode_state,
    state_hash,
};

fn text() -> impl Strategy<Value = String> {
    ".{0,12}"
}

fn node_info() -> impl Strategy<Value = NodeInfo> {
    let devices = vec((any::<u64>(), prop::num::f64::NORMAL), 0..4);
    (any::<u64>(), vec(text(), 5), vec(text(), 0..4), devices).prop_map(
        |(boot, texts, collective_addresses, devices)| {
            let [name, worker_address, digest, kernel_class, version] = &texts[..] else {
                unreachable!()
            };
            let device = |(memory_bytes, weight)| DeviceSpec { memory_bytes, weight };
            NodeInfo {
                boot,
                name: name.clone(),
                worker_address: worker_address.clone(),
                collective_addresses,
                devices: devices.into_iter().map(device).collect(),
                model_digests: BTreeSet::from([digest.clone(), name.clone()]),
                kernel_class: kernel_class.clone(),
                version: version.clone(),
            }
        },
    )
}

fn plan() -> impl Strategy<Value = ShardPlan> {
    let rank = (any::<u32>(), any::<u64>(), any::<u32>(), vec(0usize..4096, 0..5), any::<u64>());
    let rank = rank.prop_map(|(rank, node, device, stripes, weight_bytes)| RankPlan {
        rank: rank as usize,
        node: NodeId(node),
        device: device as usize,
        stripes,
        weight_bytes,
        kv_bytes: weight_bytes / 3,
    });
    (0usize..4096, vec(rank, 0..5)).prop_map(|(stripes, ranks)| ShardPlan { stripes, ranks })
}

fn wish() -> impl Strategy<Value = Deployment> {
    let sizes = vec((0u64..1 << 32).prop_map(|size| size as usize), 7);
    let nodes = btree_set(any::<u64>().prop_map(NodeId), 0..4);
    let kinds = (select(&ComputeType::ALL[..]), select(&ExpertCut::ALL[..]));
    (text(), text(), kinds, option::of(0usize..99), nodes, sizes).prop_map(
        |(name, digest, (compute, experts), stripes, nodes, sizes)| Deployment {
            name,
            digest,
            compute,
            experts,
            stripes,
            ranks: sizes[0],
            replicas: sizes[1],
            nodes,
            kv_blocks: sizes[2],
            block_tokens: sizes[3],
            max_sequences: sizes[4],
            step_tokens: sizes[5],
            context: sizes[6],
        },
    )
}

fn node_command() -> impl Strategy<Value = Command> {
    let id = || any::<u64>().prop_map(NodeId);
    let process = move || (id(), any::<u64>());
    let token = any::<[u8; 16]>().prop_map(TokenId);
    prop_oneof![
        text().prop_map(|name| Command::Found { name }),
        (token, any::<u32>(), any::<u64>(), any::<u64>(), any::<bool>(), text()).prop_map(
            |(token, uses_max, expires, now, worker, name)| {
                let role = if worker { Role::Worker } else { Role::Coordinator };
                Command::Enrol { token, uses_max, expires, now, role, name }
            }
        ),
        (id(), node_info()).prop_map(|(node, info)| Command::Join { node, info }),
        process().prop_map(|(node, incarnation)| Command::Suspect { node, incarnation }),
        process().prop_map(|(node, incarnation)| Command::Recover { node, incarnation }),
        process().prop_map(|(node, incarnation)| Command::Lost { node, incarnation }),
        id().prop_map(|node| Command::Drain { node }),
        id().prop_map(|node| Command::Undrain { node }),
        id().prop_map(|node| Command::Leave { node }),
        (id(), text(), text(), btree_set(text(), 0..3)).prop_map(
            |(node, cluster_address, http_address, model_digests)| {
                let at = Coordinator { cluster_address, http_address, model_digests };
                Command::SetCoordinator { node, at }
            }
        ),
        Just(Command::RotateCertificates),
    ]
}

fn other_command() -> impl Strategy<Value = Command> {
    let pair = || (any::<u64>(), any::<u64>()).prop_map(|(g, e)| (GroupId(g), Epoch(e)));
    prop_oneof![
        (text(), text()).prop_map(|(name, digest)| {
            Command::RegisterModel(cluster::Model { name, digest, ..model() })
        }),
        text().prop_map(|digest| Command::ForgetModel { digest }),
        wish().prop_map(Command::Deploy),
        text().prop_map(|name| Command::Undeploy { name }),
        text().prop_map(|name| Command::DrainDeployment { name }),
        (text(), text()).prop_map(|(alias, deployment)| Command::Point { alias, deployment }),
        text().prop_map(|alias| Command::Unpoint { alias }),
        (pair(), text(), plan()).prop_map(|((group, epoch), deployment, plan)| {
            Command::Place { group, deployment, epoch, plan }
        }),
        pair().prop_map(|(group, epoch)| Command::Loading { group, epoch }),
        (pair(), any::<u32>()).prop_map(|((group, epoch), rank)| {
            Command::RankReady { group, epoch, rank: rank as usize }
        }),
        (pair(), text()).prop_map(|((group, epoch), reason)| Command::Fence {
            group,
            epoch,
            reason
        }),
        (pair(), text()).prop_map(|((group, epoch), reason)| Command::Retire {
            group,
            epoch,
            reason
        }),
    ]
}

fn proposal() -> impl Strategy<Value = Proposal> {
    let request = option::of(any::<[u8; 16]>().prop_map(RequestId));
    (request, prop_oneof![node_command(), other_command()])
        .prop_map(|(request, command)| Proposal { request, command })
}

/// One step of a cluster's life, sensible as a rule.
#[derive(Debug, Clone)]
enum Step {
    Enrol(u8, bool),
    Join(u64, usize, u64),
    Lost(Index),
    Drain(Index, bool),
    Leave(Index),
    Suspect(Index),
    Deploy(bool, usize, usize),
    Point(bool, bool),
    DrainDeployment(bool),
    Settle,
    Ready,
    Foreign(Box<Proposal>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0u8..4, any::<bool>()).prop_map(|(token, worker)| Step::Enrol(token, worker)),
        6 => (1u64..9, 1usize..3, 0u64..3).prop_map(|(n, d, boot)| Step::Join(n, d, boot)),
        1 => any::<Index>().prop_map(Step::Lost),
        1 => (any::<Index>(), any::<bool>()).prop_map(|(at, on)| Step::Drain(at, on)),
        1 => any::<Index>().prop_map(Step::Leave),
        1 => any::<Index>().prop_map(Step::Suspect),
        2 => (any::<bool>(), 1usize..4, 1usize..3).prop_map(|(o, r, n)| Step::Deploy(o, r, n)),
        2 => (any::<bool>(), any::<bool>()).prop_map(|(a, o)| Step::Point(a, o)),
        1 => any::<bool>().prop_map(Step::DrainDeployment),
        5 => Just(Step::Settle),
        3 => Just(Step::Ready),
        2 => proposal().prop_map(|proposal| Step::Foreign(Box::new(proposal))),
    ]
}

fn proposals(state: &ClusterState, step: &Step, number: usize) -> Vec<Proposal> {
    let some = |at: &Index| {
        let nodes: Vec<_> = state.nodes().iter().collect();
        (!nodes.is_empty()).then(|| {
            let (&id, node) = nodes[at.index(nodes.len())];
            (id, node.incarnation)
        })
    };
    let command = match step {
        Step::Enrol(token, worker) => {
            let role = if *worker { Role::Worker } else { Role::Coordinator };
            Some(enrol(*token, 5, role, "n"))
        }
        Step::Join(number, devices, boot) => Some(Command::Join {
            node: NodeId(*number),
            info: NodeInfo { boot: *boot, ..node(*number, *devices) },
        }),
        Step::Lost(at) => some(at).map(|(node, incarnation)| Command::Lost { node, incarnation }),
        Step::Suspect(at) => {
            some(at).map(|(node, incarnation)| Command::Suspect { node, incarnation })
        }
        Step::Drain(at, true) => some(at).map(|(node, _)| Command::Drain { node }),
        Step::Drain(at, false) => some(at).map(|(node, _)| Command::Undrain { node }),
        Step::Leave(at) => some(at).map(|(node, _)| Command::Leave { node }),
        Step::Deploy(other, ranks, replicas) => {
            let name = if *other { "other" } else { "tiny" }.to_owned();
            Some(Command::Deploy(Deployment { name, replicas: *replicas, ..deployment(*ranks) }))
        }
        Step::Point(other_alias, other) => {
            let alias = if *other_alias { "chat" } else { "text" }.to_owned();
            let deployment = if *other { "other" } else { "tiny" }.to_owned();
            Some(Command::Point { alias, deployment })
        }
        Step::DrainDeployment(other) => {
            let name = if *other { "other" } else { "tiny" }.to_owned();
            Some(Command::DrainDeployment { name })
        }
        Step::Settle => {
            let commands = reconcile(state, &Observation::default());
            return commands.into_iter().map(Proposal::from).collect();
        }
        Step::Ready => {
            let forming = state.groups().iter().find(|(_, group)| group.live());
            let ranks = forming.into_iter().flat_map(|(&group, entry)| {
                let epoch = entry.epoch;
                (0..entry.plan.ranks.len()).map(move |rank| Command::RankReady {
                    group,
                    epoch,
                    rank,
                })
            });
            return ranks.map(Proposal::from).collect();
        }
        Step::Foreign(proposal) => return vec![proposal.as_ref().clone()],
    };
    // Every other write is a client's.
    let request = number.is_multiple_of(2).then_some(RequestId([number as u8; 16]));
    command.into_iter().map(|command| Proposal { request, command }).collect()
}

/// The state of its own bytes, which must be the same and have the same bytes.
fn written(state: &ClusterState) -> ClusterState {
    let bytes = encode_state(state);
    let back = decode_state(&bytes).unwrap();
    assert_eq!(back, *state);
    assert_eq!(encode_state(&back), bytes);
    assert_eq!(state_hash(&back), state_hash(state));
    back
}

/// A life of the cluster; `each` sees every proposal and the state after it.
fn live(steps: &[Step], mut each: impl FnMut(&ClusterState, u64, &Proposal)) -> ClusterState {
    let mut state = joined(2, 2);
    for (number, step) in steps.iter().enumerate() {
        for proposal in proposals(&state, step, number) {
            let index = state.index() + 1;
            let _ = state.apply(index, proposal.clone());
            each(&state, index, &proposal);
        }
    }
    state
}

proptest! {
    #[test]
    fn commands_come_back(proposal in proposal()) {
        let bytes = encode_command(&proposal);
        let back = decode_command(&bytes);
        prop_assert_eq!(back.as_ref(), Ok(&proposal));
        prop_assert_eq!(encode_command(&proposal), bytes);
    }

    #[test]
    fn states_come_back_and_go_on_alike(steps in vec(step(), 1..50), at in any::<Index>()) {
        let half = at.index(steps.len());
        let mut twin: Option<ClusterState> = None;
        let mut seen = 0;
        let state = live(&steps, |state, index, proposal| {
            if let Some(twin) = &mut twin {
                // The other replica reads the command from the log.
                let read = decode_command(&encode_command(proposal)).unwrap();
                let _ = twin.apply(index, read);
                assert_eq!(state_hash(twin), state_hash(state));
            }
            seen += 1;
            if seen == half {
                twin = Some(written(state));
            }
        });
        prop_assert_eq!(&written(&state), &state);
        prop_assert!(twin.is_none_or(|twin| twin == state));
    }

    #[test]
    fn damaged_states_are_refused_or_sound(
        steps in vec(step(), 1..30),
        damage in vec((any::<Index>(), any::<u8>()), 1..4),
        cut in option::of(any::<Index>()),
    ) {
        let state = live(&steps, |_, _, _| {});
        let mut bytes = encode_state(&state);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(damaged) = decode_state(&bytes) {
            prop_assert_eq!(damaged.check_integrity(), Ok(()));
            written(&damaged);
            // Whatever it says, it can be asked and changed like any other.
            let mut damaged = damaged;
            for command in reconcile(&damaged, &Observation::default()) {
                let _ = damaged.apply(damaged.index().saturating_add(1), command);
                prop_assert_eq!(damaged.check_integrity(), Ok(()));
            }
        }
    }

    #[test]
    fn damaged_commands_are_refused_or_commands(
        proposal in proposal(),
        damage in vec((any::<Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = encode_command(&proposal);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(damaged) = decode_command(&bytes) {
            prop_assert_eq!(decode_command(&encode_command(&damaged)), Ok(damaged.clone()));
            let mut state = joined(2, 3);
            let _ = apply(&mut state, damaged);
        }
    }

    #[test]
    fn any_bytes_are_no_panic(bytes in vec(any::<u8>(), 0..200)) {
        let _ = decode_command(&bytes);
        let _ = decode_state(&bytes);
    }
}

fn point(deployment: &str) -> Command {
    let (alias, deployment) = ("chat".to_owned(), deployment.to_owned());
    Command::Point { alias, deployment }
}

#[test]
fn every_change_changes_the_hash() {
    let mut state = joined(2, 3);
    let mut hashes = BTreeSet::from([state_hash(&state)]);
    let mut next = |state: &ClusterState| assert!(hashes.insert(state_hash(state)));
    settle(&mut state);
    next(&state);
    ready(&mut state);
    next(&state);
    let changes = [
        Command::Suspect { node: NodeId(3), incarnation: 1 },
        Command::Recover { node: NodeId(3), incarnation: 1 },
        Command::Drain { node: NodeId(3) },
        Command::Undrain { node: NodeId(3) },
        Command::Join { node: NodeId(3), info: restarted(3, 2) },
        Command::RotateCertificates,
        Command::Lost { node: NodeId(1), incarnation: 1 },
        Command::Deploy(Deployment { name: "next".to_owned(), ..deployment(1) }),
        point("tiny"),
        point("next"),
        Command::DrainDeployment { name: "tiny".to_owned() },
        Command::Deploy(deployment(2)),
        Command::Unpoint { alias: "chat".to_owned() },
    ];
    for command in changes {
        apply(&mut state, command).unwrap();
        next(&state);
    }
    // A refusal is remembered by all replicas or by none.
    let request = Some(RequestId([3; 16]));
    let leave = Proposal { request, command: Command::Leave { node: NodeId(99) } };
    apply(&mut state, leave).unwrap_err();
    next(&state);
    written(&state);
}

#[test]
fn what_cannot_be_is_named() {
    let mut state = joined(2, 3);
    apply(&mut state, point("tiny")).unwrap();
    let too_long = |error| matches!(error, WireError::TooLong { .. });
    assert!(too_long(decode_command(&vec![0; COMMAND_MAX + 1]).unwrap_err()));
    assert!(too_long(decode_state(&vec![0; STATE_MAX + 1]).unwrap_err()));
    assert_eq!(decode_command(&[]), Err(WireError::Missing { field: "command" }));
    assert_eq!(decode_state(&[]), Err(WireError::OutOfRange { field: "format" }));
    assert_eq!(decode_state(&[0xff]), Err(WireError::Malformed { field: "snapshot" }));

    use prost::Message;
    let message = || wire::pb::StateSnapshot::decode(&encode_state(&state)[..]).unwrap();
    let refused = |spoil: fn(&mut wire::pb::StateSnapshot)| {
        let mut spoilt = message();
        spoil(&mut spoilt);
        decode_state(&spoilt.encode_to_vec()).unwrap_err().to_string()
    };
    assert_eq!(refused(|s| s.format = 2), "format is out of range");
    assert_eq!(
        refused(|s| s.models.clear()),
        "snapshot: the model of tiny is needed and not there"
    );
    assert_eq!(refused(|s| s.nodes.reverse()), "snapshot: nodes are not in ascending order");
    assert_eq!(refused(|s| s.nodes[0].standing = 9), "standing has the unknown value 9");
    assert_eq!(refused(|s| s.nodes[0].role = 0), "role has the unknown value 0");
    assert_eq!(refused(|s| s.nodes[0].token = vec![1].into()), "token is out of range");
    assert_eq!(refused(|s| s.last_node = 1), "snapshot: a number is in use that was never given");
    assert_eq!(
        refused(|s| s.models[0].spec = "{}".to_owned()),
        "spec: spec is not the JSON of a spec"
    );
    let wrong = "snapshot: the alias chat contradicts the deployments";
    assert_eq!(refused(|s| s.aliases[0].deployment = "else".to_owned()), wrong);
    assert_eq!(refused(|s| s.aliases[0].before = "tiny".to_owned()), wrong);
    assert_eq!(refused(|s| s.draining.push("tiny".to_owned())), wrong);
    assert_eq!(
        refused(|s| s.draining.push("else".to_owned())),
        "snapshot: else is needed and not there"
    );
    assert_eq!(
        refused(|s| s.nodes[0].info.as_mut().unwrap().model_digests.push("a".to_owned())),
        "model_digests is out of range"
    );
    let twice = refused(|s| {
        let record = s.tokens[0].clone();
        s.tokens.push(record);
    });
    assert_eq!(twice, "snapshot: tokens are not in ascending order");
}
