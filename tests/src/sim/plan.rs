//! What one seed means: sizes, speeds, faults. Every seed runs another, unlikely configuration.

use super::net::NetConfig;
use super::rng::Rng;

/// Microseconds of one tick of a coordinator whose clock runs true.
pub const TICK: u64 = 20_000;
/// Ticks of an election timeout before it is randomised: 300 ms.
pub const ELECTION_TICKS: usize = 15;
/// Ticks between heartbeats: 40 ms.
pub const HEARTBEAT_TICKS: usize = 2;
/// An election timeout in microseconds.
pub const ELECTION: u64 = TICK * ELECTION_TICKS as u64;

/// A kind of trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A process ends, at any point of its loop, and comes back.
    Crash,
    /// Every process ends at once.
    PowerLoss,
    /// A process stands still and does not know it (SIGSTOP).
    Pause,
    /// Nodes are cut off from each other.
    Partition,
    /// The ways of some nodes clog one after the other and come free in another order.
    Clog,
    /// A disk takes nothing more for a while.
    Full,
    /// A disk is slow for a while.
    Slow,
    /// A bit of something stored turns over: the node is lost for ever.
    Flip,
    /// Leadership is handed to somebody, sensible or not.
    Transfer,
    /// The leader ends and everybody stands for election at once; some end as they vote.
    Duel,
    /// Something of the workload's own.
    Own,
    /// The wanted number of coordinators changes, or a node is to be replaced.
    Members,
}

/// Every fault.
pub const FAULTS: [Fault; 12] = [
    Fault::Crash,
    Fault::PowerLoss,
    Fault::Pause,
    Fault::Partition,
    Fault::Clog,
    Fault::Full,
    Fault::Slow,
    Fault::Flip,
    Fault::Transfer,
    Fault::Duel,
    Fault::Own,
    Fault::Members,
];

/// A run, drawn from its seed. Times are microseconds.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What everything else follows from.
    pub seed: u64,
    /// Coordinators wanted at first.
    pub coordinators: usize,
    /// How long faults are injected.
    pub troubled: u64,
    /// Mean time between faults.
    pub between: u64,
    /// Chance by weight of each fault.
    pub faults: Vec<(Fault, u64)>,
    /// The network while faults are injected.
    pub net: NetConfig,
    /// Clients that read and write.
    pub clients: u64,
    /// Registers they use.
    pub keys: u64,
    /// Longest pause of a client between two operations.
    pub think: u64,
    /// Chance per mille that an operation is a read.
    pub reads: u64,
    /// How far clocks are off, per mille to either side.
    pub drift: u64,
    /// Entries between snapshots.
    pub snapshot_entries: u64,
    /// Entries before a snapshot that stay in the log.
    pub keep_entries: u64,
    /// Entries between comparisons of state hashes.
    pub check_entries: u64,
    /// Whether nodes keep their log in the real store over a simulated disk.
    pub real_store: bool,
    /// Whether the whole control plane runs, or replicas of registers only.
    pub whole: bool,
}

impl Plan {
    /// The run of `seed`.
    pub fn draw(seed: u64) -> Self {
        let mut rng = Rng::new(seed, 0);
        let rng = &mut rng;
        // Swarm: most runs know some faults only, so that rare ones are not drowned.
        let weight = |rng: &mut Rng| if rng.chance(450) { 0 } else { rng.range(1, 10) };
        let mut faults: Vec<(Fault, u64)> =
            FAULTS.into_iter().map(|fault| (fault, weight(rng))).collect();
        faults.retain(|(_, weight)| *weight > 0);
        let whole = seed.is_multiple_of(4);
        // The real store is as slow as a store is: fewer and shorter runs use it.
        let real_store = rng.chance(60);
        Self {
            seed,
            coordinators: *rng.pick(&[1, 3, 3, 3, 4, 5]).expect("six"),
            troubled: rng.range(4, if real_store { 8 } else { 20 }) * 1_000_000,
            between: rng.range(60, 600) * 1_000,
            faults,
            net: NetConfig::draw(rng),
            clients: rng.range(1, 5),
            keys: rng.range(1, 4),
            think: *rng.pick(&[1_000, 20_000, 100_000]).expect("three"),
            reads: *rng.pick(&[200, 500, 800]).expect("three"),
            drift: *rng.pick(&[0, 20, 150]).expect("three"),
            snapshot_entries: *rng.pick(&[5, 20, 100, 1_000]).expect("four"),
            keep_entries: *rng.pick(&[0, 3, 50]).expect("three"),
            check_entries: match whole {
                true => *rng.pick(&[20, 64, 200]).expect("three"),
                false => *rng.pick(&[1, 7, 64]).expect("three"),
            },
            real_store,
            whole,
        }
    }

    /// A run without faults on a calm network, for stories.
    pub fn calm(seed: u64) -> Self {
        Self {
            faults: Vec::new(),
            net: NetConfig::calm(),
            clients: 0,
            drift: 0,
            coordinators: 3,
            snapshot_entries: 1_000,
            real_store: false,
            whole: false,
            ..Self::draw(seed)
        }
    }

    /// A fault by weight; `None` where this run has none.
    pub fn fault(&self, rng: &mut Rng) -> Option<Fault> {
        let total: u64 = self.faults.iter().map(|(_, weight)| weight).sum();
        let mut at = rng.below(total.max(1));
        for &(fault, weight) in &self.faults {
            if at < weight {
                return Some(fault);
            }
            at -= weight;
        }
        None
    }
}
