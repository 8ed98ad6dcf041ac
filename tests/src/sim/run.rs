//! A run from its seed: trouble, healing, progress, agreement. And many of them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use control::replica::{Machine, Mistake};

use super::checks::{Checked, Violation, ensure};
use super::cluster::ClusterWorkload;
use super::disk::Lie;
use super::linear;
use super::plan::{ELECTION, Plan};
use super::register::RegisterWorkload;
use super::stats::Stats;
use super::trace::Trace;
use super::workload::Workload;
use super::world::{Event, World};

/// A mistake put in on purpose, which the checkers must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// The disk does something else than it says.
    Disk(Lie),
    /// The replica does something else than it should.
    Replica(Mistake),
    /// Commands about a group are taken whatever epoch they name.
    EpochUnchecked,
}

/// Every mutation with its name on the command line. What is sent before it is durable comes in two
/// forms: a disk whose write returns before it is synced, which is what a sender that does not wait
/// amounts to, and a replica that answers before it writes, which shows when the write has no room.
pub const MUTATIONS: [(&str, Mutation); 6] = [
    ("fsync-skipped", Mutation::Disk(Lie::NeverSynced)),
    ("sent-early", Mutation::Disk(Lie::SyncedLate)),
    ("answered-early", Mutation::Replica(Mistake::AnsweredEarly)),
    ("empty-change-skipped", Mutation::Replica(Mistake::EmptyChangeSkipped)),
    ("epoch-unchecked", Mutation::EpochUnchecked),
    ("vote-forgotten", Mutation::Disk(Lie::VoteForgotten)),
];

impl Mutation {
    /// The mutation of that name.
    pub fn named(name: &str) -> Option<Self> {
        MUTATIONS.iter().find(|(known, _)| *known == name).map(|(_, mutation)| *mutation)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        let found = MUTATIONS.iter().find(|(_, mutation)| *mutation == self);
        found.map_or("", |(name, _)| name)
    }

    /// What the disk does, if it lies.
    pub fn lie(self) -> Option<Lie> {
        match self {
            Self::Disk(lie) => Some(lie),
            Self::Replica(_) | Self::EpochUnchecked => None,
        }
    }

    /// What the replica does, if it errs.
    pub fn mistake(self) -> Option<Mistake> {
        match self {
            Self::Replica(mistake) => Some(mistake),
            Self::Disk(_) | Self::EpochUnchecked => None,
        }
    }
}

/// A run that passed: what it did, and a digest of everything it sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    /// Counts.
    pub stats: Stats,
    /// Equal for equal runs.
    pub digest: u64,
}

/// A run that did not pass.
#[derive(Debug, Clone)]
pub struct Failed {
    /// Its seed.
    pub seed: u64,
    /// With what put in.
    pub mutation: Option<Mutation>,
    /// When, in simulated microseconds; `None` for a panic.
    pub at: Option<u64>,
    /// What must not happen and did.
    pub what: String,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = self.at.map_or("a panic".to_owned(), |at| format!("{:.3} ms", at as f64 / 1e3));
        writeln!(f, "seed {}, at {at}: {}", self.seed, self.what)?;
        write!(f, "replay: cargo run --release -p tests --bin simulate -- --seed {}", self.seed)?;
        if let Some(mutation) = self.mutation {
            write!(f, " --mutation {}", mutation.name())?;
        }
        write!(f, " --trace")
    }
}

/// Runs one seed. A panic of what is tested is a failure like any other.
///
/// # Errors
/// The first violation.
pub fn run(seed: u64, mutation: Option<Mutation>, print: bool) -> Result<Passed, Failed> {
    let plan = Plan::draw(seed);
    let ended = catch_unwind(AssertUnwindSafe(|| run_plan(plan, mutation, print)));
    let failed = |at, what| Failed { seed, mutation, at, what };
    match ended {
        Ok(Ok(passed)) => Ok(passed),
        Ok(Err((at, violation))) => Err(failed(Some(at), violation.0)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
            Err(failed(None, text.unwrap_or_default()))
        }
    }
}

/// Every fourth run is one of the whole control plane, the others are of replicas alone.
fn run_plan(
    plan: Plan,
    mutation: Option<Mutation>,
    print: bool,
) -> Result<Passed, (u64, Violation)> {
    match plan.whole {
        true => run_world::<ClusterWorkload>(plan, mutation, print),
        false => run_world::<RegisterWorkload>(plan, mutation, print),
    }
}

fn run_world<W: Workload>(
    plan: Plan,
    mutation: Option<Mutation>,
    print: bool,
) -> Result<Passed, (u64, Violation)> {
    let mut trace = Trace::new(print);
    trace.line(0, || format!("{plan:?}"));
    let mut world = World::<W>::new(plan, mutation, trace).map_err(|violation| (0, violation))?;
    match drive(&mut world) {
        Ok(()) => {
            world.stats.time = world.now;
            world.stats.commits = world.checks.last_committed();
            Ok(Passed { digest: world.trace.digest(), stats: world.stats })
        }
        Err(violation) => {
            world.trace.line(world.now, || format!("VIOLATION {violation}"));
            Err((world.now, violation))
        }
    }
}

/// The phases of a run.
fn drive<W: Workload>(world: &mut World<W>) -> Checked {
    let clients = world.plan.clients;
    for client in 1..=clients {
        world.schedule(10_000 * client, Event::Wake(client));
    }
    W::begin(world);
    world.schedule(300_000, Event::Trouble);
    world.run_until(world.plan.troubled)?;
    world.heal()?;
    progress(world)?;
    settle(world)?;
    agreement(world)?;
    let wrong = linear::violation(&world.history);
    ensure(wrong.is_none(), || format!("no order explains this history: {wrong:?}"))
}

/// Within ten election timeouts after healing, a write is acknowledged.
fn progress<W: Workload>(world: &mut World<W>) -> Checked {
    let healed = world.now;
    world.schedule(healed, Event::Wake(0));
    let answered =
        |world: &World<W>| world.clients[0].serial > 0 && world.clients[0].asked.is_none();
    while world.now < healed + 10 * ELECTION && !answered(world) {
        world.run_until(world.now + ELECTION / 10)?;
    }
    ensure(answered(world), || {
        format!("no write in ten election timeouts after healing: {}", picture(world))
    })
}

/// Soon after, clients have their answers, nobody is joint, and everybody has caught up.
fn settle<W: Workload>(world: &mut World<W>) -> Checked {
    let begun = world.now;
    let mut why = None;
    while world.now < begun + W::SETTLES * ELECTION {
        world.run_until(world.now + ELECTION / 5)?;
        why = if settled(world) { W::unsettled(world) } else { Some("replicas".to_owned()) };
        if why.is_none() {
            return Ok(());
        }
    }
    let (limit, picture) = (W::SETTLES, picture(world));
    Err(Violation(format!("not settled in {limit} election timeouts: {why:?}{picture}")))
}

/// Whether nothing is left to do.
fn settled<W: Workload>(world: &World<W>) -> bool {
    let Some(leader) = world.leader() else { return false };
    let Some(process) = world.nodes.get(&leader).and_then(|node| node.process.as_ref()) else {
        return false;
    };
    let status = process.replica.status();
    let level = |id: &planner::NodeId| {
        let node = world.nodes.get(&id.0).filter(|node| node.intact());
        node.is_none_or(|node| {
            let process = node.process.as_ref();
            process.is_some_and(|process| process.replica.status().applied == status.last)
        })
    };
    let answered = world.clients.iter().all(|client| client.asked.is_none());
    answered && !status.members.is_joint() && status.members.all().iter().all(level)
}

/// Every member has the state that the commands lead to.
fn agreement<W: Workload>(world: &World<W>) -> Checked {
    let expected = world.checks.reference().hash();
    let leader = world.leader().and_then(|id| world.nodes.get(&id));
    let members = leader.map(|leader| leader.members.all()).unwrap_or_default();
    for id in members {
        let process = world.nodes.get(&id.0).and_then(|node| node.process.as_ref());
        if let Some(process) = process {
            let hash = process.replica.machine().hash();
            ensure(hash == expected, || format!("the state of {} is not what it must be", id.0))?;
        }
    }
    Ok(())
}

/// Every node in a line: part, term, log, members.
pub fn picture<W: Workload>(world: &World<W>) -> String {
    let mut text = String::new();
    for node in world.nodes.values() {
        text += &format!("\n{}", node.picture());
    }
    text
}

/// Runs seeds `first..first + count` on `threads` threads. `every` is called now and then with the
/// number of runs done.
///
/// # Errors
/// The failure of the lowest seed of those that failed before all stopped.
pub fn run_many(
    first: u64,
    count: u64,
    mutation: Option<Mutation>,
    threads: usize,
    every: impl Fn(u64) + Sync,
) -> Result<Stats, Box<Failed>> {
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let sum = Mutex::new((Stats::default(), None::<Failed>));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let done = next.fetch_add(1, Ordering::Relaxed);
                    if done >= count {
                        break;
                    }
                    every(done);
                    let ended = run(first + done, mutation, false);
                    let mut sum = sum.lock().expect("no thread panics while it holds this");
                    match ended {
                        Ok(passed) => sum.0.add(&passed.stats),
                        Err(failed) => {
                            stop.store(true, Ordering::Relaxed);
                            let lower = sum.1.as_ref().is_none_or(|other| failed.seed < other.seed);
                            if lower {
                                sum.1 = Some(failed);
                            }
                        }
                    }
                }
            });
        }
    });
    match sum.into_inner().expect("no thread panics while it holds this") {
        (stats, None) => Ok(stats),
        (_, Some(failed)) => Err(Box::new(failed)),
    }
}
