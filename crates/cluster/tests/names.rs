//! Several models on a node, aliases, deployments that are taken away, and whether there is room
//! for one more; `support::apply` also checks that no refusal leaves a trace.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;

use cluster::{
    ClusterState, Command, Coordinator, Deployment, Event, GroupId, Model, NodeInfo, Rejected,
    RestoreError, Role, lacking,
};
use planner::NodeId;
use support::{DIGEST, apply, deployment, enrol, joined, model, node, ready, settle};

const OTHER: &str = "def456";

fn other_model() -> Model {
    Model { name: "other".to_owned(), digest: OTHER.to_owned(), ..model() }
}

/// A deployment of the other model.
fn other(name: &str, ranks: usize) -> Deployment {
    Deployment { name: name.to_owned(), digest: OTHER.to_owned(), ..deployment(ranks) }
}

fn both(number: u64) -> NodeInfo {
    let model_digests = BTreeSet::from([DIGEST.to_owned(), OTHER.to_owned()]);
    NodeInfo { model_digests, ..node(number, 1) }
}

fn point(alias: &str, deployment: &str) -> Command {
    Command::Point { alias: alias.to_owned(), deployment: deployment.to_owned() }
}

fn drain(name: &str) -> Command {
    Command::DrainDeployment { name: name.to_owned() }
}

fn undeploy(name: &str) -> Command {
    Command::Undeploy { name: name.to_owned() }
}

fn refuse(state: &mut ClusterState, command: Command) -> Rejected {
    apply(state, command).unwrap_err()
}

/// Both models known, `tiny` on two ranks, and so many nodes that have both models.
fn two_models(nodes: u64) -> ClusterState {
    let mut state = joined(2, 0);
    apply(&mut state, Command::RegisterModel(other_model())).unwrap();
    for number in 1..=nodes {
        apply(&mut state, enrol(7, 99, Role::Worker, &format!("w{number}"))).unwrap();
        let info = both(number);
        apply(&mut state, Command::Join { node: NodeId(number), info }).unwrap();
    }
    settle(&mut state);
    ready(&mut state);
    state
}

#[test]
fn a_node_holds_ranks_of_each_of_its_models() {
    let mut state = two_models(3);
    apply(&mut state, Command::Deploy(other("next", 1))).unwrap();
    settle(&mut state);
    let placed = |id| (state.groups()[&GroupId(id)].deployment.as_str(), state.groups().len());
    assert_eq!([placed(1), placed(2)], [("tiny", 2), ("next", 2)]);

    // One known model is enough to join; a rank is only of those that are there.
    let mut state = two_models(1);
    apply(&mut state, enrol(7, 99, Role::Worker, "w2")).unwrap();
    let model_digests = BTreeSet::from([OTHER.to_owned(), "123456".to_owned()]);
    let info = NodeInfo { model_digests, ..node(2, 1) };
    apply(&mut state, Command::Join { node: NodeId(2), info: info.clone() }).unwrap();
    settle(&mut state);
    assert!(state.groups().is_empty(), "tiny has a rank on a node without the model");
    let model_digests = BTreeSet::from(["123456".to_owned()]);
    let unknown = NodeInfo { boot: 2, model_digests, ..info };
    let rejected = refuse(&mut state, Command::Join { node: NodeId(2), info: unknown });
    let (expected, got) = (format!("{DIGEST}, {OTHER}"), "123456".to_owned());
    assert_eq!(rejected, Rejected::WrongDigest { expected, got });
}

#[test]
fn a_node_says_which_models_it_has_and_not_too_many() {
    let mut state = two_models(1);
    let of =
        |digests: Vec<String>| NodeInfo { model_digests: digests.into_iter().collect(), ..both(1) };
    let many = (0..17).map(|number| format!("{number:x}")).collect();
    for wrong in [of(Vec::new()), of(vec!["XYZ".to_owned()]), of(many)] {
        match refuse(&mut state, Command::Join { node: NodeId(1), info: wrong }) {
            Rejected::BadNode(bad) => assert_eq!(bad.field, "model_digests"),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn an_alias_means_a_deployment_and_remembers_the_one_before() {
    let mut state = two_models(3);
    apply(&mut state, Command::Deploy(other("next", 1))).unwrap();
    let (alias, deployment) = ("chat".to_owned(), "tiny".to_owned());
    let pointed = Event::AliasPointed { alias, deployment };
    assert_eq!(apply(&mut state, point("chat", "tiny")), Ok(vec![pointed]));
    assert_eq!(apply(&mut state, point("chat", "tiny")), Ok(Vec::new()), "said again");
    assert_eq!(state.aliases()["chat"].before, None);
    apply(&mut state, point("chat", "next")).unwrap();
    let meant = &state.aliases()["chat"];
    assert_eq!((meant.deployment.as_str(), meant.before.as_deref()), ("next", Some("tiny")));
    // What is gone is not remembered.
    apply(&mut state, undeploy("tiny")).unwrap();
    assert_eq!(state.aliases()["chat"].before, None);
    let removed = Event::AliasRemoved { alias: "chat".to_owned() };
    let unpoint = || Command::Unpoint { alias: "chat".to_owned() };
    assert_eq!(apply(&mut state, unpoint()), Ok(vec![removed]));
    let alias = "chat".to_owned();
    assert_eq!(refuse(&mut state, unpoint()), Rejected::UnknownAlias { alias });
}

#[test]
fn a_name_means_one_thing_that_is_served() {
    let mut state = two_models(3);
    apply(&mut state, point("chat", "tiny")).unwrap();
    let taken = |name: &str, by| Rejected::NameTaken { name: name.to_owned(), by };
    assert_eq!(refuse(&mut state, point("tiny", "tiny")), taken("tiny", "a deployment"));
    let rejected = refuse(&mut state, Command::Deploy(other("chat", 1)));
    assert_eq!(rejected, taken("chat", "an alias"));
    let name = "else".to_owned();
    assert_eq!(refuse(&mut state, point("chat", "else")), Rejected::NotDeployed { name });
    for wrong in ["", "a\nb", &"x".repeat(129)] {
        let rejected = refuse(&mut state, point(wrong, "tiny"));
        assert!(matches!(rejected, Rejected::BadName(_)), "{rejected}");
    }
    // Requests under the alias would have nowhere to go.
    let (deployment, alias) = ("tiny".to_owned(), "chat".to_owned());
    let rejected = Rejected::PointedAt { deployment, alias };
    assert_eq!(refuse(&mut state, undeploy("tiny")), rejected);
    assert_eq!(refuse(&mut state, drain("tiny")), rejected);
    for number in 1..64 {
        apply(&mut state, point(&format!("a{number}"), "tiny")).unwrap();
    }
    let rejected = refuse(&mut state, point("more", "tiny"));
    assert_eq!(rejected, Rejected::Full { what: "aliases", limit: 64 });
}

#[test]
fn a_deployment_that_drains_keeps_its_groups_and_may_be_taken_back() {
    let mut state = two_models(3);
    let draining = |draining| Event::DeploymentDraining { name: "tiny".to_owned(), draining };
    assert_eq!(apply(&mut state, drain("tiny")), Ok(vec![draining(true)]));
    assert_eq!(apply(&mut state, drain("tiny")), Ok(Vec::new()), "said again");
    assert_eq!(
        refuse(&mut state, drain("else")),
        Rejected::NotDeployed { name: "else".to_owned() }
    );
    let rejected = refuse(&mut state, point("chat", "tiny"));
    assert_eq!(rejected, Rejected::Draining { deployment: "tiny".to_owned() });
    assert_eq!(state.routes("tiny").len(), 1, "what runs there goes on");
    // Also when it loses a rank meanwhile.
    let lost = state.groups()[&GroupId(1)].plan.ranks[1].node;
    apply(&mut state, Command::Lost { node: lost, incarnation: 1 }).unwrap();
    settle(&mut state);
    ready(&mut state);
    assert_eq!(state.routes("tiny").len(), 1, "and is repaired");

    assert_eq!(apply(&mut state, Command::Deploy(deployment(2))), Ok(vec![draining(false)]));
    apply(&mut state, point("chat", "tiny")).unwrap();
    apply(&mut state, Command::Unpoint { alias: "chat".to_owned() }).unwrap();
    apply(&mut state, drain("tiny")).unwrap();
    let scaled = Deployment { replicas: 2, ..deployment(2) };
    let deployed = Event::Deployed { name: "tiny".to_owned() };
    let changed = apply(&mut state, Command::Deploy(scaled));
    assert_eq!(changed, Ok(vec![deployed, draining(false)]));
    apply(&mut state, drain("tiny")).unwrap();
    apply(&mut state, undeploy("tiny")).unwrap();
    assert!(state.draining().is_empty());
}

#[test]
fn a_snapshot_that_contradicts_itself_is_none() {
    let mut state = two_models(3);
    apply(&mut state, Command::Deploy(other("next", 1))).unwrap();
    apply(&mut state, point("chat", "tiny")).unwrap();
    apply(&mut state, point("chat", "next")).unwrap();
    apply(&mut state, drain("tiny")).unwrap();
    let whole = state.snapshot();
    assert_eq!(ClusterState::restore(whole.clone()), Ok(state));
    let refused = |spoil: fn(&mut cluster::Snapshot)| {
        let mut spoilt = whole.clone();
        spoil(&mut spoilt);
        ClusterState::restore(spoilt).unwrap_err()
    };
    let integrity = |error| matches!(error, RestoreError::Integrity(_));
    assert!(integrity(refused(|s| s.aliases[0].0 = "tiny".to_owned())));
    assert!(integrity(refused(|s| s.aliases[0].1.deployment = "tiny".to_owned())));
    assert!(integrity(refused(|s| s.aliases[0].1.before = Some("else".to_owned()))));
    assert!(integrity(refused(|s| s.draining[0] = "else".to_owned())));
    assert!(matches!(refused(|s| s.aliases[0].0 = "a\tb".to_owned()), RestoreError::Field(_)));
    let twice = refused(|s| s.draining.push("tiny".to_owned()));
    assert_eq!(twice, RestoreError::NotAscending { what: "draining deployments" });
}

#[test]
fn what_is_missing_is_named_before_anything_is_changed() {
    let mut state = two_models(3);
    let before = state.clone();
    assert_eq!(lacking(&state, &other("next", 1)), None);
    let missing = lacking(&state, &other("next", 2)).unwrap();
    assert_eq!(missing, "1 of 2 devices with the model are free");
    let two = Deployment { replicas: 2, ..other("next", 1) };
    let missing = lacking(&state, &two).unwrap();
    assert!(missing.starts_with("there is room for 1 of 2 groups; 0 of 1 devices"), "{missing}");
    let large = Deployment { kv_blocks: 1 << 20, ..other("next", 1) };
    let missing = lacking(&state, &large).unwrap();
    assert!(missing.contains("bytes"), "{missing}");
    let nothing = Deployment { digest: "ffff".to_owned(), ..other("next", 1) };
    assert_eq!(lacking(&state, &nothing).unwrap(), "no model with digest ffff is registered");
    assert_eq!(lacking(&state, &deployment(2)), None, "what serves lacks nothing");
    assert_eq!(state, before);

    // Texts become tokens at every coordinator, so each needs the model.
    apply(&mut state, enrol(3, 99, Role::Coordinator, "c4")).unwrap();
    let says = |digests: &[&str]| {
        let model_digests = digests.iter().map(|&digest| digest.to_owned()).collect();
        let (cluster_address, http_address) = ("c4:8100".to_owned(), "c4:8000".to_owned());
        let at = Coordinator { cluster_address, http_address, model_digests };
        Command::SetCoordinator { node: NodeId(4), at }
    };
    apply(&mut state, says(&[DIGEST])).unwrap();
    let missing = lacking(&state, &other("next", 1)).unwrap();
    assert_eq!(missing, "the coordinator of node 4 does not have the model");
    apply(&mut state, says(&[DIGEST, OTHER])).unwrap();
    assert_eq!(lacking(&state, &other("next", 1)), None);
}
