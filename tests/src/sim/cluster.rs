//! The replicated state itself: deployments that clients write and read, and what must hold of
//! placements whatever the commands were.

use std::collections::{BTreeMap, BTreeSet};

use cluster::{
    ClusterState, Code, Command, Deployment, Epoch, GroupId, Proposal, Rejected,
    RequestId as Request,
};
use control::ClusterMachine;
use control::replica::{Machine, RestoreError};
use model::ComputeType;
use planner::{NodeId, ShardPlan};

use super::checks::Checked;
use super::client::{Answer, RequestId, Wish};
use super::duties::Duty;
use super::fleet::{Fleet, Work};
use super::linear::Value;
use super::rng::Rng;
use super::run::Mutation;
use super::workload::{AppliedRecord, Decided, Outcome, Workload};
use super::world::World;

/// Digest of the model that is served.
pub const DIGEST: &str = "abc123";
/// Allowed nodes from here on are none that exist: the allow-list of a deployment carries the value
/// that a client wrote, beside every node there can be.
const VALUES: u64 = 1_000_000;
/// Nodes that there can be in a run.
const NODES: u64 = 80;

/// The production machine, with a mistake on request.
#[derive(Debug)]
pub struct Coordinated {
    inner: ClusterMachine,
    /// Whether commands are taken for the epoch that is, whatever epoch they name.
    blind: bool,
}

impl Coordinated {
    /// The state.
    pub fn state(&self) -> &ClusterState {
        self.inner.state()
    }

    /// The command as it would be understood without the check of its epoch.
    fn misread(&self, command: &[u8]) -> Option<Vec<u8>> {
        let mut proposal = wire::decode_command(command).ok()?;
        let (id, epoch) = match &mut proposal.command {
            Command::RankReady { group, epoch, .. }
            | Command::Loading { group, epoch }
            | Command::Fence { group, epoch, .. }
            | Command::Retire { group, epoch, .. } => (*group, epoch),
            _ => return None,
        };
        *epoch = self.state().groups().get(&id)?.epoch;
        Some(wire::encode_command(&proposal))
    }
}

impl Machine for Coordinated {
    type Outcome = control::Outcome;

    fn apply(&mut self, index: u64, command: &[u8]) -> control::Outcome {
        let misread = self.blind.then(|| self.misread(command)).flatten();
        self.inner.apply(index, misread.as_deref().unwrap_or(command))
    }

    fn snapshot(&self) -> Vec<u8> {
        self.inner.snapshot()
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), RestoreError> {
        self.inner.restore(bytes)
    }

    fn hash(&self) -> [u8; 32] {
        self.inner.hash()
    }
}

/// What the checkers remember of placements.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Ranks that a worker really had ready, by incarnation.
    pub ready: BTreeSet<(GroupId, Epoch, usize)>,
    /// The plan of each incarnation, as first decided.
    plans: BTreeMap<(GroupId, Epoch), ShardPlan>,
    /// The greatest epoch of each group.
    epochs: BTreeMap<GroupId, Epoch>,
}

/// The workload of the whole control plane.
#[derive(Debug)]
pub struct ClusterWorkload;

/// A deployment that carries a value.
pub fn deployment(key: u64, value: u64) -> Deployment {
    let mut nodes: BTreeSet<NodeId> = (1..=NODES).map(NodeId).collect();
    nodes.insert(NodeId(VALUES + value));
    Deployment {
        name: format!("d{key}"),
        digest: DIGEST.to_owned(),
        compute: ComputeType::F32,
        experts: planner::ExpertCut::Stripe,
        stripes: Some(8),
        ranks: 1 + key as usize % 3,
        replicas: 1 + value as usize % 2,
        nodes,
        kv_blocks: 16,
        block_tokens: 16,
        max_sequences: 4,
        step_tokens: 64,
        context: 128,
    }
}

impl Workload for ClusterWorkload {
    type Machine = Coordinated;
    type Duty = Duty;
    type Extra = Fleet;
    type Event = Work;
    type Ledger = Ledger;

    // A lease, a takeover, some pauses after failures, and loading, one after the other.
    const SETTLES: u64 = 70;
    const HASHES: u64 = 64;

    fn machine(mutation: Option<Mutation>) -> Coordinated {
        let blind = mutation == Some(Mutation::EpochUnchecked);
        Coordinated { inner: ClusterMachine::default(), blind }
    }

    fn wish(rng: &mut Rng, keys: u64, reads: u64, unique: u64) -> Wish {
        let key = rng.below(keys);
        match rng.chance(reads) {
            true => Wish::Read { key },
            false => Wish::Write { key, value: (!rng.chance(150)).then_some(unique) },
        }
    }

    fn command(id: RequestId, wish: Wish) -> Vec<u8> {
        let command = match wish {
            Wish::Write { key, value: Some(value) } => Command::Deploy(deployment(key, value)),
            Wish::Write { key, value: None } | Wish::Read { key } => {
                Command::Undeploy { name: format!("d{key}") }
            }
        };
        wire::encode_command(&Proposal { request: Some(Request(id)), command })
    }

    fn answer(wish: Wish, outcome: &control::Outcome) -> Answer {
        match (wish, outcome) {
            (_, Ok(_)) => Answer::Wrote(None),
            // What is not deployed cannot be undeployed, and is not deployed afterwards either;
            // otherwise an alias means it, and it stays.
            (Wish::Write { value: None, .. }, Err(why)) if why.code() == Code::Unknown => {
                Answer::Wrote(None)
            }
            (_, Err(_)) => Answer::Nothing,
        }
    }

    fn read(machine: &Coordinated, key: u64) -> Value {
        let deployment = machine.state().deployments().get(&format!("d{key}"))?;
        deployment.nodes.last().and_then(|node| node.0.checked_sub(VALUES))
    }

    fn check(
        ledger: &mut Ledger,
        machine: &Coordinated,
        record: &AppliedRecord<control::Outcome>,
    ) -> Result<(), String> {
        let state = machine.state();
        state.check_integrity().map_err(|broken| broken.to_string())?;
        let epochs = ledger.epochs.clone();
        for (&id, group) in state.groups() {
            let before = ledger.epochs.insert(id, group.epoch);
            if before.is_some_and(|before| before > group.epoch) {
                return Err(format!("group {id} went back to epoch {}", group.epoch));
            }
            // While it is repaired it shows the plan of the epoch before.
            if group.live() {
                let plan = ledger.plans.entry((id, group.epoch)).or_insert(group.plan.clone());
                if *plan != group.plan {
                    return Err(format!("epoch {} of group {id} has two plans", group.epoch));
                }
            }
        }
        let accepted = record.outcome.is_ok();
        let proposal = wire::decode_command(&record.command);
        let Some(command) = proposal.ok().map(|proposal| proposal.command).filter(|_| accepted)
        else {
            return Ok(());
        };
        let (group, epoch, really) = match command {
            Command::RankReady { group, epoch, rank } => {
                (group, epoch, ledger.ready.contains(&(group, epoch, rank)))
            }
            Command::Fence { group, epoch, .. } => (group, epoch, true),
            _ => return Ok(()),
        };
        let then = epochs.get(&group);
        if then != Some(&epoch) || !really {
            return Err(format!("{then:?} was the epoch of group {group} at {:?}", record.index));
        }
        Ok(())
    }

    fn begin(world: &mut World<Self>) {
        world.begin_fleet();
    }

    fn happen(world: &mut World<Self>, event: Work) -> Checked {
        world.work(event)
    }

    fn needs(world: &World<Self>, event: &Work) -> Option<u64> {
        world.coordinator_of(event)
    }

    fn operate(world: &mut World<Self>) -> Checked {
        world.run_errands()
    }

    fn trouble(world: &mut World<Self>) -> Checked {
        world.trouble_workers()
    }

    fn changing(world: &World<Self>) -> bool {
        world.members_to_change()
    }

    fn bystanders(world: &World<Self>) -> Vec<u64> {
        world.extra.addresses()
    }

    fn ticked(world: &mut World<Self>, node: u64) -> Checked {
        world.lead(node, control::leader::Input::Tick)
    }

    fn applied(world: &mut World<Self>, node: u64, outcome: &Outcome<Self>) -> Checked {
        match outcome {
            Ok(events) => {
                world.lead(node, control::leader::Input::Changed { events: events.clone() })
            }
            Err(_) => Ok(()),
        }
    }

    fn decided(
        world: &mut World<Self>,
        node: u64,
        number: u64,
        how: Decided<Result<Vec<cluster::Event>, Rejected>>,
    ) -> Checked {
        let outcome = match how {
            Decided::Outcome(outcome) => Some(outcome),
            Decided::Changed => Some(Ok(Vec::new())),
            Decided::Unknown => None,
        };
        world.lead(node, control::leader::Input::Decided { number, outcome })
    }

    fn role(world: &mut World<Self>, node: u64, leading: bool) -> Checked {
        let input = match leading {
            true => control::leader::Input::Lead,
            false => control::leader::Input::Follow,
        };
        world.lead(node, input)
    }

    fn stopped(world: &mut World<Self>, node: u64) {
        world.break_lines_of(node);
    }

    fn settle(world: &mut World<Self>) -> Checked {
        world.feed_duties()
    }

    fn heal(world: &mut World<Self>) {
        world.heal_workers();
    }

    fn perform(world: &mut World<Self>, words: &[&str]) -> Option<Checked> {
        world.perform_told(words)
    }

    fn picture(world: &World<Self>) -> String {
        world.picture_of_placements()
    }

    fn unsettled(world: &World<Self>) -> Option<String> {
        world.amiss()
    }
}
