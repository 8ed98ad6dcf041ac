//! The groups this worker takes part in: starting and stopping their ranks, finding them again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use cluster::{Epoch, GroupId};
use collective::tcp::Endpoint;
use compute::CpuDevice;
use decoder::Checkpoint;
use engine::{EngineConfig, Scheduler, Step};
use identity::Tls;
use model::ModelSpec;
use planner::{NodeId, RankPlan};
use tokio::sync::mpsc as channel;
use wire::{FormGroup, Held, Report};

use crate::followers::{Fanout, Here};
use crate::leader::{Command, Leader};
use crate::prepare::Preparations;
use crate::pulse::Pulse;
use crate::rank::{Failure, Formation, Meeting, Setup, StepDone, Stop, follow};
use crate::shelf::Shelf;
use crate::watchdog::Watchdog;

/// What a rank's thread does.
type Work = Box<dyn FnOnce() + Send>;

/// Most requests that wait for a slot in a group; further ones are refused.
const WAITING_MAX: usize = 1024;

/// Between two reminders to a rank that it was told to stop.
const AGAIN: Duration = Duration::from_millis(10);

/// Steps for a rank that does not lead, each with where to say that it was run.
pub(crate) type Steps = mpsc::Sender<(Step, channel::UnboundedSender<StepDone>)>;

/// A model that a worker has.
pub(crate) struct Model {
    pub(crate) spec: Arc<ModelSpec>,
    pub(crate) checkpoint: Arc<Checkpoint>,
}

/// What a worker computes with.
pub(crate) struct Hardware {
    /// By device.
    pub(crate) devices: Vec<CpuDevice>,
    /// By device: where its peers meet it.
    pub(crate) endpoints: Vec<Arc<Endpoint>>,
    /// By digest.
    pub(crate) models: BTreeMap<String, Model>,
    /// Who this worker is.
    pub(crate) tls: Tls,
    /// Where tasks that talk to remote ranks run.
    pub(crate) runtime: tokio::runtime::Handle,
}

/// A group as this worker hosts it.
struct Hosted {
    epoch: Epoch,
    /// The node of rank 0, the only one whose steps are run.
    leads: Option<NodeId>,
    leader: Option<mpsc::Sender<Command>>,
    steps: BTreeMap<usize, Steps>,
    /// This node's ranks, as far as their reports have passed.
    ranks: BTreeMap<usize, Standing>,
    pulses: BTreeMap<usize, Pulse>,
    /// The devices of this node's ranks.
    devices: BTreeSet<usize>,
    stop: Stop,
    threads: Vec<JoinHandle<()>>,
}

/// Where a rank stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Forming,
    Ready,
    Failed,
}

/// The groups of one worker.
#[derive(Default)]
pub(crate) struct Groups {
    hosted: Mutex<BTreeMap<GroupId, Hosted>>,
    shelf: Shelf,
    preparations: Preparations,
    /// Calls of another epoch that were refused.
    stale: AtomicU64,
}

/// Why a call did not reach a group.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoGroup {
    #[error("this worker has no part in group {}", .0.0)]
    Unknown(GroupId),
    #[error("group {} is at epoch {}, not {}", group.0, current.0, asked.0)]
    OtherEpoch { group: GroupId, current: Epoch, asked: Epoch },
    #[error("rank {rank} of group {} is not on this worker", group.0)]
    OtherRank { group: GroupId, rank: usize },
    #[error("node {} does not lead group {}", caller.0, group.0)]
    OtherLeader { group: GroupId, caller: NodeId },
}

impl Groups {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<GroupId, Hosted>> {
        self.hosted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(
        &self,
        group: GroupId,
        asked: Epoch,
        read: impl FnOnce(&Hosted) -> Result<T, NoGroup>,
    ) -> Result<T, NoGroup> {
        let hosted = self.lock();
        let found = hosted.get(&group).ok_or(NoGroup::Unknown(group))?;
        let current = found.epoch;
        if current != asked {
            self.stale.fetch_add(1, Ordering::Relaxed);
            return Err(NoGroup::OtherEpoch { group, current, asked });
        }
        read(found)
    }

    /// The leader of a group at an epoch, if it leads here.
    pub(crate) fn leader(
        &self,
        group: GroupId,
        epoch: Epoch,
    ) -> Result<mpsc::Sender<Command>, NoGroup> {
        self.with(group, epoch, |h| h.leader.clone().ok_or(NoGroup::OtherRank { group, rank: 0 }))
    }

    /// A rank of a group at an epoch that follows here, for the node that leads the group.
    pub(crate) fn steps(
        &self,
        group: GroupId,
        epoch: Epoch,
        rank: usize,
        caller: NodeId,
    ) -> Result<Steps, NoGroup> {
        let missing = NoGroup::OtherRank { group, rank };
        self.with(group, epoch, |hosted| match hosted.leads == Some(caller) {
            true => hosted.steps.get(&rank).cloned().ok_or(missing),
            false => Err(NoGroup::OtherLeader { group, caller }),
        })
    }

    /// The stream on which the leader of a group sent steps to a rank here broke. A rank in the
    /// middle of a step learns more from its collective; one that waits for the next step ends now.
    pub(crate) fn left_alone(&self, group: GroupId, epoch: Epoch, rank: usize) {
        let mut hosted = self.lock();
        if let Some(one) = hosted.get_mut(&group).filter(|one| one.epoch == epoch) {
            one.steps.remove(&rank);
        }
    }

    /// What a rank of a group at an epoch does, if it is here.
    pub(crate) fn pulse(
        &self,
        group: GroupId,
        epoch: Epoch,
        rank: usize,
    ) -> Result<Pulse, NoGroup> {
        let missing = NoGroup::OtherRank { group, rank };
        self.with(group, epoch, |hosted| hosted.pulses.get(&rank).cloned().ok_or(missing))
    }

    /// How many calls of another epoch were refused.
    pub(crate) fn stale(&self) -> u64 {
        self.stale.load(Ordering::Relaxed)
    }

    /// Starts this node's ranks of a group; an older incarnation is ended first. An order for an
    /// incarnation that is hosted or over changes nothing.
    pub(crate) fn form(
        &self,
        node: NodeId,
        formation: &Arc<Formation>,
        hardware: &Hardware,
        reports: &channel::UnboundedSender<Report>,
    ) {
        let FormGroup { group, epoch, .. } = formation.order;
        if self.lock().get(&group).is_some_and(|hosted| hosted.epoch >= epoch) {
            return;
        }
        self.retire(group, epoch);
        let mine = formation.order.plan.ranks.iter().filter(|rank| rank.node == node);
        let devices: BTreeSet<usize> = mine.map(|rank| rank.device).collect();
        self.preparations.end_on(&devices);
        let mut hosted = Hosted {
            epoch,
            leads: formation.order.plan.ranks.first().map(|rank| rank.node),
            leader: None,
            steps: BTreeMap::new(),
            ranks: BTreeMap::new(),
            pulses: BTreeMap::new(),
            devices,
            stop: Stop::default(),
            threads: Vec::new(),
        };
        let mut works: Vec<(usize, Work)> = Vec::new();
        let mut first = None;
        // The order was checked against this model.
        let Some(model) = hardware.models.get(&formation.order.deployment.digest) else { return };
        let here = (hardware, model);
        for setup in setups(node, formation, here, &hosted.stop, reports, &self.shelf) {
            hosted.ranks.insert(setup.rank, Standing::Forming);
            hosted.pulses.insert(setup.rank, setup.pulse.clone());
            if setup.rank == 0 {
                first = Some(setup);
                continue;
            }
            let (steps, inbox) = mpsc::channel();
            hosted.steps.insert(setup.rank, steps);
            works.push((setup.rank, Box::new(move || run_follower(setup, &inbox))));
        }
        if let Some(setup) = first {
            let (commands, inbox) = mpsc::channel();
            let local = hosted.steps.values().cloned().collect();
            let runtime = hardware.runtime.clone();
            let here = Here { node, tls: &hardware.tls, runtime: &runtime };
            let fanout = Fanout::new(formation, &here, local, commands.clone());
            hosted.leader = Some(commands);
            let (pulse, stop) = (setup.pulse.clone(), hosted.stop.clone());
            let here = (node, &hardware.tls);
            let watchdog = Watchdog::new(formation, here, pulse, stop, reports.clone());
            runtime.spawn(watchdog.run());
            works.push((0, Box::new(move || lead(setup, fanout, &inbox))));
        }
        for (rank, work) in works {
            match std::thread::Builder::new().name(format!("rank-{rank}")).spawn(work) {
                Ok(thread) => hosted.threads.push(thread),
                Err(error) => {
                    let reason = format!("its thread cannot be started: {error}");
                    let FormGroup { group, epoch, .. } = formation.order;
                    // The session that listens may have ended already.
                    let _ =
                        reports.send(Report::Failed { group, epoch, rank, reason, blames: None });
                }
            }
        }
        self.lock().insert(group, hosted);
    }

    /// The groups here, each at its epoch.
    pub(crate) fn incarnations(&self) -> Vec<(GroupId, Epoch)> {
        self.lock().iter().map(|(&group, hosted)| (group, hosted.epoch)).collect()
    }

    /// Loads the weights of this node's ranks in an incarnation to come, and says when they are
    /// there. Devices that hold ranks are left alone.
    pub(crate) fn prepare(
        &self,
        node: NodeId,
        order: FormGroup,
        hardware: &Hardware,
        reports: &channel::UnboundedSender<Report>,
    ) {
        let busy = self
            .lock()
            .iter()
            .flat_map(|(&group, one)| {
                one.devices.iter().map(move |&device| (device, group)).collect::<Vec<_>>()
            })
            .collect();
        self.preparations.begin(node, order, (hardware, &busy), &self.shelf, reports);
    }

    /// Whether this incarnation of the group is here.
    pub(crate) fn hosts(&self, group: GroupId, epoch: Epoch) -> bool {
        self.lock().get(&group).is_some_and(|hosted| hosted.epoch == epoch)
    }

    /// The first group that is led here and whose steps do not get on, in words.
    pub(crate) fn stalled(&self) -> Option<String> {
        let hosted = self.lock();
        hosted.iter().find_map(|(group, one)| {
            let why = one.pulses.get(&0)?.stuck()?;
            Some(format!("group {}: {why}", group.0))
        })
    }

    /// Whether there is nothing here.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty() && self.shelf.is_empty() && self.preparations.is_empty()
    }

    /// Frees weights that no rank has asked for.
    pub(crate) fn tidy(&self) {
        self.shelf.expire();
    }

    /// Every rank here that has not failed.
    pub(crate) fn held(&self) -> Vec<Held> {
        let hosted = self.lock();
        let held = hosted.iter().flat_map(|(&group, one)| {
            let ranks = one.ranks.iter().filter(|(_, standing)| **standing != Standing::Failed);
            ranks.map(move |(&rank, &standing)| Held {
                group,
                epoch: one.epoch,
                rank,
                ready: standing == Standing::Ready,
            })
        });
        held.collect()
    }

    /// Takes note of what a rank reports, so that it can be told to another leader, too.
    pub(crate) fn note(&self, report: &Report) {
        let (group, epoch, rank, standing) = match *report {
            Report::Ready { group, epoch, rank } => (group, epoch, rank, Standing::Ready),
            Report::Failed { group, epoch, rank, .. } => (group, epoch, rank, Standing::Failed),
            _ => return,
        };
        let mut hosted = self.lock();
        let one = hosted.get_mut(&group).filter(|one| one.epoch == epoch);
        if let Some(entry) = one.and_then(|one| one.ranks.get_mut(&rank)) {
            *entry = standing;
        }
    }

    /// Takes note of everything that ranks have reported while there was no session; returns
    /// what [`Groups::held`] does not say.
    pub(crate) fn take_note(
        &self,
        reports: &mut channel::UnboundedReceiver<Report>,
    ) -> Vec<Report> {
        let mut failures = Vec::new();
        while let Ok(report) = reports.try_recv() {
            self.note(&report);
            if matches!(report, Report::Failed { .. }) {
                failures.push(report);
            }
        }
        failures
    }

    /// Ends this node's ranks of a group, up to this incarnation, and waits for their threads. A
    /// group keeps its number, so an order that came late must not end the next one.
    pub(crate) fn retire(&self, group: GroupId, epoch: Epoch) {
        let mut all = self.lock();
        let due = all.get(&group).is_some_and(|hosted| hosted.epoch <= epoch);
        let hosted = if due { all.remove(&group) } else { None };
        drop(all);
        if let Some(hosted) = hosted {
            end(hosted);
        }
    }

    /// Ends everything, and keeps nothing.
    pub(crate) fn retire_all(&self) {
        let all = std::mem::take(&mut *self.lock());
        all.into_values().for_each(end);
        self.preparations.end_all();
        self.shelf.clear();
    }
}

fn end(hosted: Hosted) {
    hosted.stop.stop();
    if let Some(leader) = &hosted.leader {
        // A leader that ended by itself has dropped its end.
        let _ = leader.send(Command::Stop);
    }
    drop(hosted.steps);
    // A rank may have been just about to wait when it was told: tell it until it has ended.
    while hosted.threads.iter().any(|thread| !thread.is_finished()) {
        std::thread::sleep(AGAIN);
        hosted.stop.stop();
    }
    for thread in hosted.threads {
        if thread.join().is_err() {
            tracing::error!("a rank's thread panicked");
        }
    }
}

/// What each of this node's ranks starts with. Ranks that are all in this process meet here;
/// otherwise all of them meet over TCP.
fn setups(
    node: NodeId,
    formation: &Arc<Formation>,
    (hardware, model): (&Hardware, &Model),
    stop: &Stop,
    reports: &channel::UnboundedSender<Report>,
    shelf: &Shelf,
) -> Vec<Setup> {
    let ranks = &formation.order.plan.ranks;
    let mine: Vec<_> = ranks.iter().filter(|rank| rank.node == node).collect();
    let meetings: Vec<Meeting> = if mine.len() == ranks.len() {
        let links = collective::local::links(ranks.len(), formation.membership());
        links.into_iter().map(|link| Meeting::Local(Box::new(link))).collect()
    } else {
        let endpoint = |rank: &&RankPlan| Arc::clone(&hardware.endpoints[rank.device]);
        let tls = || hardware.tls.clone();
        mine.iter().map(|rank| Meeting::Tcp(endpoint(rank), tls())).collect()
    };
    let setup = |(plan, meeting): (&RankPlan, Meeting)| Setup {
        rank: plan.rank,
        formation: Arc::clone(formation),
        spec: Arc::clone(&model.spec),
        checkpoint: Arc::clone(&model.checkpoint),
        device: hardware.devices[plan.device].clone(),
        meeting: Some(meeting),
        stop: stop.clone(),
        reports: reports.clone(),
        shelf: shelf.clone(),
        pulse: Pulse::default(),
    };
    mine.into_iter().zip(meetings).map(setup).collect()
}

/// The thread of rank 0.
fn lead(mut setup: Setup, fanout: Fanout, commands: &mpsc::Receiver<Command>) {
    // The scheduler comes first: a group whose limits cannot be must not say that it is ready.
    let scheduler = scheduler(&setup).map_err(Failure::own);
    match scheduler.and_then(|scheduler| Ok((scheduler, setup.form()?))) {
        Ok((scheduler, rank)) => {
            let (gone, rank) = Leader::new(scheduler, rank, Box::new(fanout)).run(commands);
            setup.end(rank, gone.into());
        }
        Err(failure) => setup.ended(failure),
    }
}

fn scheduler(setup: &Setup) -> Result<Scheduler, String> {
    let deployment = &setup.formation.order.deployment;
    Scheduler::new(EngineConfig {
        block_tokens: deployment.block_tokens,
        blocks: deployment.kv_blocks,
        context: deployment.context,
        vocab: setup.spec.vocab,
        max_sequences: deployment.max_sequences,
        step_tokens: deployment.step_tokens,
        chunk_tokens: deployment.step_tokens,
        waiting_max: WAITING_MAX,
    })
    .map_err(|e| e.to_string())
}

/// The thread of a rank that follows.
fn run_follower(
    mut setup: Setup,
    steps: &mpsc::Receiver<(Step, channel::UnboundedSender<StepDone>)>,
) {
    match setup.form() {
        Ok(mut rank) => {
            let failure = follow(&mut rank, steps);
            setup.end(rank, failure);
        }
        Err(failure) => setup.ended(failure),
    }
}

#[cfg(test)]
#[path = "group_tests.rs"]
mod tests;
