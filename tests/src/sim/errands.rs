//! The operator of a whole cluster: one errand after the other, each written until it is decided.

use std::collections::BTreeSet;

use cluster::{
    ClusterState, Command, Coordinator, Epoch, GroupId, Model, Observation, Phase, Proposal,
    RequestId, Role, TokenId, degraded, reconcile, waiting_for,
};
use control::replica::Input;
use model::ModelSpec;
use planner::NodeId;

use super::checks::{Checked, Violation};
use super::client::request_id;
use super::cluster::{ClusterWorkload, DIGEST, deployment};
use super::node::{FIRST, Waiting};
use super::world::World;

/// The operator's number among clients.
const OPERATOR: u64 = 900;

/// Something to do.
#[derive(Debug)]
pub struct Errand {
    request: RequestId,
    command: Command,
    /// What is to follow once it is done.
    then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Nothing,
    /// The worker has its node number and may start.
    Worker(u64),
    /// A coordinator has its number: its process starts, and says where it is reached.
    Coordinator,
}

/// A model small enough for tests and large enough for eight stripes.
fn spec() -> Result<ModelSpec, Violation> {
    let config = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": 128, "vocab_size": 256,
        "rms_norm_eps": 1e-5, "bos_token_id": null, "eos_token_id": 0}"#;
    ModelSpec::from_config(config).map_err(|error| Violation(error.to_string()))
}

fn set_coordinator(node: u64) -> Command {
    let at = Coordinator {
        cluster_address: format!("host-{node}:8100"),
        http_address: format!("host-{node}:8000"),
        model_digests: BTreeSet::new(),
    };
    Command::SetCoordinator { node: NodeId(node), at }
}

impl World<ClusterWorkload> {
    /// The cluster is founded, the model known, workers let in.
    pub(super) fn first_errands(&mut self, workers: u64) {
        self.errand(Command::Found { name: "c1".to_owned() }, Then::Nothing);
        self.errand(set_coordinator(FIRST), Then::Nothing);
        if let Ok(spec) = spec() {
            let model =
                Model { name: "tiny".to_owned(), digest: DIGEST.to_owned(), spec: spec.into() };
            self.errand(Command::RegisterModel(model), Then::Nothing);
        }
        for number in 1..=workers {
            self.enrol(number, Role::Worker, Then::Worker(number));
        }
    }

    fn errand(&mut self, command: Command, then: Then) {
        self.extra.requests += 1;
        let request = RequestId(request_id(OPERATOR, self.extra.requests));
        self.extra.errands.push_back(Errand { request, command, then });
    }

    fn enrol(&mut self, token: u64, role: Role, then: Then) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&token.to_be_bytes());
        let token = TokenId(bytes);
        let name = format!("n{}", self.extra.requests);
        let (uses_max, expires, now) = (1, 1_000_000, 1);
        self.errand(Command::Enrol { token, uses_max, expires, now, role, name }, then);
    }

    /// The state as the leader has it.
    fn led_state(&self) -> Option<(u64, &ClusterState)> {
        let leader = self.leader()?;
        let process = self.nodes.get(&leader)?.process.as_ref()?;
        Some((leader, process.replica.machine().inner.state()))
    }

    /// Does the next errand, or finds one.
    ///
    /// # Errors
    /// A violation.
    pub(super) fn run_errands(&mut self) -> Checked {
        let Some((leader, state)) = self.led_state() else { return Ok(()) };
        let Some(errand) = self.extra.errands.front() else {
            return self.find_errand();
        };
        if let Some(outcome) = state.outcome(&errand.request) {
            let node = outcome.as_ref().ok().and_then(|done| done.node);
            let then = errand.then;
            self.trace.line(self.now, || format!("operator: done {:?}", errand.command));
            self.extra.errands.pop_front();
            return self.follow_up(then, node);
        }
        let proposal = Proposal { request: Some(errand.request), command: errand.command.clone() };
        let command = wire::encode_command(&proposal);
        let process = self.nodes.get_mut(&leader).and_then(|node| node.process.as_mut());
        let Some(process) = process else { return Ok(()) };
        let request = process.request(Waiting::Change);
        self.feed(leader, Input::Propose { request, command })
    }

    fn follow_up(&mut self, then: Then, node: Option<NodeId>) -> Checked {
        match (then, node) {
            (Then::Worker(number), Some(node)) => {
                if let Some(worker) = self.extra.workers.get_mut(&number) {
                    worker.node = Some(node);
                }
                self.start_worker(number);
                Ok(())
            }
            (Then::Coordinator, Some(node)) => {
                self.errand(set_coordinator(node.0), Then::Nothing);
                self.add_node(node.0)
            }
            _ => Ok(()),
        }
    }

    /// Compares the coordinators there are with those that are wanted.
    fn find_errand(&mut self) -> Checked {
        let Some((_, state)) = self.led_state() else { return Ok(()) };
        let there: Vec<u64> = state.coordinators().map(|(node, _)| node.0).collect();
        let intact = |id: &u64| self.nodes.get(id).is_some_and(|node| node.intact());
        let lost = there.iter().find(|id| !intact(id)).copied();
        let leave = |node: u64| Command::Leave { node: NodeId(node) };
        if let Some(lost) = lost {
            // The last coordinator may not leave, not even one that is lost: another comes first.
            if there.len() == 1 {
                let token = 1_000 + self.extra.requests;
                self.enrol(token, Role::Coordinator, Then::Coordinator);
            } else {
                self.errand(leave(lost), Then::Nothing);
            }
            return Ok(());
        }
        if self.healed {
            return Ok(());
        }
        let replaced = self.operator.replaced.take().filter(|id| there.contains(id));
        if let Some(replaced) = replaced.filter(|_| there.len() > 1) {
            self.errand(leave(replaced), Then::Nothing);
        } else if there.len() < self.operator.wanted {
            let token = 1_000 + self.extra.requests;
            self.enrol(token, Role::Coordinator, Then::Coordinator);
        } else if there.len() > self.operator.wanted
            && let Some(&one) = self.rng.pick(&there)
        {
            self.errand(leave(one), Then::Nothing);
        }
        Ok(())
    }

    /// A worker is to hold nothing, or may hold something again.
    pub(super) fn drain_or_not(&mut self, worker: u64) {
        let Some(node) = self.extra.workers.get(&worker).and_then(|worker| worker.node) else {
            return;
        };
        let drained = self
            .led_state()
            .and_then(|(_, state)| state.nodes().get(&node).map(|node| node.draining));
        match drained {
            Some(true) => self.errand(Command::Undrain { node }, Then::Nothing),
            Some(false) => self.errand(Command::Drain { node }, Then::Nothing),
            None => {}
        }
    }

    /// A name means another deployment, or none; or a deployment gets no new requests.
    pub(super) fn rename_or_drain(&mut self) {
        let names = self.led_state().map(|(_, state)| state.deployments().keys().cloned());
        let names: Vec<String> = names.into_iter().flatten().collect();
        let Some(name) = self.rng.pick(&names).cloned() else { return };
        let alias = format!("a{}", self.rng.below(3));
        let command = match self.rng.below(4) {
            0 => Command::DrainDeployment { name },
            1 => Command::Unpoint { alias },
            _ => Command::Point { alias, deployment: name },
        };
        self.errand(command, Then::Nothing);
    }

    /// What is not as the state says it is, or as it is wished.
    pub(super) fn amiss(&self) -> Option<String> {
        let Some((leader, state)) = self.led_state() else { return Some("no leader".to_owned()) };
        if !self.extra.errands.is_empty() {
            return Some(format!("errands: {:?}", self.extra.errands));
        }
        // A group on fewer ranks than are wished for is not as wished where there is more room.
        let widen = state.groups().keys().copied().collect();
        let commands = reconcile(state, &Observation { widen, ..Observation::default() });
        if !commands.is_empty() {
            return Some(format!("to be done: {commands:?}"));
        }
        let voters = self.nodes.get(&leader).map(|node| node.members.voters.clone());
        let wished: BTreeSet<NodeId> = state.coordinators().map(|(node, _)| node).collect();
        if voters.as_ref() != Some(&wished) {
            return Some(format!("voters {voters:?}, wished {wished:?}"));
        }
        self.misplaced(state)
    }

    /// Whether a group lives in a later incarnation than this.
    pub(super) fn is_over(&self, group: GroupId, epoch: Epoch) -> bool {
        let group = self.led_state().and_then(|(_, state)| state.groups().get(&group));
        group.is_some_and(|group| group.live() && group.epoch > epoch)
    }

    /// Whether a coordinator is about to come or to go.
    pub(super) fn members_to_change(&self) -> bool {
        let Some((leader, state)) = self.led_state() else { return true };
        let leaving = |errand: &Errand| matches!(errand.command, Command::Leave { .. });
        let wished: BTreeSet<NodeId> = state.coordinators().map(|(node, _)| node).collect();
        let members = self.nodes.get(&leader).map(|node| &node.members.voters);
        self.extra.errands.iter().any(leaving) || members != Some(&wished)
    }

    /// A group that the state and the workers see differently.
    fn misplaced(&self, state: &ClusterState) -> Option<String> {
        let mut held = BTreeSet::new();
        for worker in self.extra.workers.values().filter(|worker| worker.lives(self.now)) {
            for (&group, holding) in &worker.held {
                let ready = holding.ranks.iter().filter(|(_, (_, ready))| *ready);
                held.extend(ready.map(|(&rank, _)| (worker.node, group, holding.epoch, rank)));
            }
        }
        let mut wanted = BTreeSet::new();
        for (&id, group) in state.groups() {
            if matches!(group.phase, Phase::Forming | Phase::Loading) {
                return Some(format!("group {id} is {}", group.phase));
            }
            let ranks = group.plan.ranks.iter().filter(|_| group.phase == Phase::Serving);
            wanted.extend(ranks.map(|rank| (Some(rank.node), id, group.epoch, rank.rank)));
        }
        let differ = held.symmetric_difference(&wanted).next();
        differ.map(|one| format!("workers hold {held:?}, the state has {wanted:?}: {one:?}"))
    }

    /// A line of a story about workers and deployments.
    pub(super) fn perform_told(&mut self, words: &[&str]) -> Option<Checked> {
        let number = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok());
        match (words, number(1), number(2)) {
            (["workers", _], Some(count), _) => self.make_workers(count),
            (["coordinators", _], Some(count), _) => self.operator.want(count as usize, None),
            (["deploy", ..], Some(key), Some(value)) => {
                self.errand(Command::Deploy(deployment(key, value)), Then::Nothing);
            }
            (["undeploy", _], Some(key), _) => {
                self.errand(Command::Undeploy { name: format!("d{key}") }, Then::Nothing);
            }
            (["worker", _, "ends"], Some(worker), _) => self.end_worker(worker, 0),
            (["worker", _, "starts"], Some(worker), _) => self.start_worker(worker),
            (["worker", _, "stands", time], Some(worker), _) => {
                let until = self.now + time.parse::<u64>().unwrap_or(0) * 1_000;
                self.stop_worker(worker, until);
            }
            (["worker", _, "drains"], Some(worker), _) => self.drain_or_not(worker),
            _ => return None,
        }
        Some(Ok(()))
    }

    /// Workers, groups and wishes, as the leader's state has them.
    pub(super) fn picture_of_placements(&self) -> String {
        let Some((_, state)) = self.led_state() else { return "\nnobody leads".to_owned() };
        let mut text = String::new();
        for (&number, worker) in &self.extra.workers {
            let node = worker.node.and_then(|node| Some((node, state.nodes().get(&node)?)));
            let (id, word) = node.map_or((0, "unknown"), |(id, node)| (id.0, node.word()));
            text += &format!("\nworker {number} is node {id}, {word}");
        }
        for (id, group) in state.groups().iter().filter(|(_, group)| group.phase != Phase::Retired)
        {
            let ranks = group.plan.ranks.iter();
            let ranks: Vec<String> =
                ranks.map(|rank| format!("{}@{}", rank.stripes.len(), rank.node.0)).collect();
            let (name, epoch, phase) = (&group.deployment, group.epoch, group.phase);
            text += &format!("\ngroup {id} of {name} epoch {epoch} {phase} [{}]", ranks.join(" "));
        }
        for name in state.deployments().keys() {
            let waits = waiting_for(state, name).or_else(|| degraded(state, name));
            let waits = waits.unwrap_or_else(|| "as wished".to_owned());
            text += &format!("\n{name}: {waits}");
        }
        text
    }
}
