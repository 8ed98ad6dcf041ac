//! `plan()`: from a model and a list of nodes to the stripes of each rank.

use std::collections::BTreeSet;

use model::{ComputeType, ModelSpec};

use crate::cut::{Cut, ExpertCut};
use crate::split;
use crate::stripes::{self, Costs};
use crate::table::human_bytes;

/// A node's number in the cluster; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

/// What a node offers.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeSpec {
    /// The node.
    pub id: NodeId,
    /// Its devices; each can be one rank.
    pub devices: Vec<DeviceSpec>,
}

/// One device of a node.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceSpec {
    /// Bytes that weights and KV blocks may take.
    pub memory_bytes: u64,
    /// Relative speed; stripes are given in proportion. Finite and positive.
    pub weight: f64,
}

/// What a plan must respect.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Stripes the model is cut into; `None` takes `stripes::default_count`.
    pub stripes: Option<usize>,
    /// Ranks wanted; `None` takes every device, up to the number of stripes.
    pub ranks: Option<usize>,
    /// How experts are divided among stripes.
    pub experts: ExpertCut,
    /// What the weights are kept in.
    pub compute: ComputeType,
    /// KV blocks that every rank keeps.
    pub kv_blocks: usize,
    /// Tokens per KV block.
    pub block_tokens: usize,
}

/// The finished plan: what Raft stores and every rank receives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlan {
    /// Number of stripes the model is cut into.
    pub stripes: usize,
    /// Ranks by number; every stripe is held by exactly one rank.
    pub ranks: Vec<RankPlan>,
}

/// One rank's part of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankPlan {
    /// The rank's number in the group; rank 0 leads.
    pub rank: usize,
    /// The node it runs on.
    pub node: NodeId,
    /// The device of that node.
    pub device: usize,
    /// Stripes it holds, ascending, never empty.
    pub stripes: Vec<usize>,
    /// Bytes of weights it keeps in memory.
    pub weight_bytes: u64,
    /// Bytes of KV cache it keeps in memory.
    pub kv_bytes: u64,
}

/// Why there is no plan, or why a plan is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The model cannot be cut into so many stripes.
    #[error("{stripes} stripes are not possible; this model can be cut into 1 to {max}")]
    Stripes {
        /// The stripes asked for.
        stripes: usize,
        /// The most that are possible.
        max: usize,
    },
    /// A plan over no rank.
    #[error("a plan needs at least one rank")]
    NoRanks,
    /// No node offers a device.
    #[error("no node offers a device")]
    NoDevices,
    /// More ranks than stripes; a rank without a stripe would do nothing.
    #[error("{ranks} ranks cannot share {stripes} stripes; each needs one")]
    TooManyRanks {
        /// The ranks asked for.
        ranks: usize,
        /// The stripes there are.
        stripes: usize,
    },
    /// More ranks than devices.
    #[error("{ranks} ranks need as many devices; there are {devices}")]
    TooFewDevices {
        /// The ranks asked for.
        ranks: usize,
        /// The devices there are.
        devices: usize,
    },
    /// One node listed twice.
    #[error("node {node} is listed twice")]
    NodeTwice {
        /// The node.
        node: NodeId,
    },
    /// A relative speed that is none.
    #[error("device {device} of node {node} has weight {weight}; it must be positive and finite")]
    Weight {
        /// The node.
        node: NodeId,
        /// Its device.
        device: usize,
        /// The weight given.
        weight: String,
    },
    /// No contiguous split keeps every rank within its memory. The shortages are those of the
    /// split by weight.
    #[error("{stripes} stripes do not fit on {ranks} ranks: {}", list(shortages))]
    DoesNotFit {
        /// Stripes the model is cut into.
        stripes: usize,
        /// Ranks that would share them.
        ranks: usize,
        /// The devices that are short of memory, in the order of the ranks; at least one.
        shortages: Vec<Shortage>,
    },
    /// A rank that does not stand at its own number.
    #[error("rank {rank} stands where rank {expected} should be")]
    RankNumber {
        /// Its number.
        rank: usize,
        /// Its place.
        expected: usize,
    },
    /// One device for two ranks.
    #[error("rank {rank} uses device {device} of node {node}, which another rank uses")]
    DeviceTwice {
        /// The later rank.
        rank: usize,
        /// The node.
        node: NodeId,
        /// The device.
        device: usize,
    },
    /// A rank without stripes.
    #[error("rank {rank} holds no stripe")]
    EmptyRank {
        /// The rank.
        rank: usize,
    },
    /// A stripe that does not exist.
    #[error("rank {rank} holds stripe {stripe} of {stripes}")]
    NoSuchStripe {
        /// The rank.
        rank: usize,
        /// The stripe.
        stripe: usize,
        /// How many there are, numbered from 0.
        stripes: usize,
    },
    /// Stripes of a rank that do not ascend.
    #[error("rank {rank} lists stripe {stripe} out of order")]
    Order {
        /// The rank.
        rank: usize,
        /// The stripe.
        stripe: usize,
    },
    /// A stripe on two ranks.
    #[error("stripe {stripe} is held by rank {rank} and by a rank before it")]
    HeldTwice {
        /// The stripe.
        stripe: usize,
        /// The later rank.
        rank: usize,
    },
    /// A stripe on no rank.
    #[error("stripe {stripe} is held by no rank")]
    Unheld {
        /// The stripe.
        stripe: usize,
    },
}

/// A device that would need more memory than it offers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "device {device} of node {node} needs {} ({needed} bytes), offers {} ({available} bytes), \
     lacks {} ({missing} bytes)",
    human_bytes(*needed), human_bytes(*available), human_bytes(*missing)
)]
pub struct Shortage {
    /// The node.
    pub node: NodeId,
    /// Its device.
    pub device: usize,
    /// Bytes that weights and KV cache would take.
    pub needed: u64,
    /// Bytes it offers.
    pub available: u64,
    /// The difference.
    pub missing: u64,
}

fn list(shortages: &[Shortage]) -> String {
    shortages.iter().map(Shortage::to_string).collect::<Vec<_>>().join("; ")
}

/// Gives every rank its stripes. Ranks are devices in the order of (node, device), from the first
/// on; stripes go to them in contiguous runs, in proportion to their weights. Where that exceeds
/// a device's memory, stripes move to devices with room so that the slowest rank is as fast as
/// possible. Where no split over the first devices fits and there are more than are wanted, the
/// ones with the most memory are taken instead, in the same order.
///
/// # Errors
/// [`PlanError`] naming what is impossible; [`PlanError::DoesNotFit`] only if no contiguous split
/// over the first devices, nor over the roomiest, fits; its shortages are those of the first.
pub fn plan(spec: &ModelSpec, nodes: &[NodeSpec], limits: &Limits) -> Result<ShardPlan, PlanError> {
    let stripes = limits.stripes.unwrap_or_else(|| stripes::default_count(spec));
    stripes::validate(spec, stripes)?;
    let devices = devices(nodes, limits.ranks, stripes)?;
    let wanted = limits.ranks.unwrap_or(stripes).min(devices.len());
    let first = over(spec, stripes, limits, &devices[..wanted]);
    if first.is_ok() || devices.len() == wanted {
        return first;
    }
    over(spec, stripes, limits, &roomiest(&devices, wanted)).or(first)
}

/// The `wanted` devices with the most memory (ties to the earlier one), in their order.
fn roomiest<'a>(devices: &[Place<'a>], wanted: usize) -> Vec<Place<'a>> {
    let mut numbers: Vec<usize> = (0..devices.len()).collect();
    numbers.sort_by_key(|&number| std::cmp::Reverse(devices[number].spec.memory_bytes));
    numbers.truncate(wanted);
    numbers.sort_unstable();
    numbers.into_iter().map(|number| devices[number]).collect()
}

/// A plan over exactly these devices.
fn over(
    spec: &ModelSpec,
    stripes: usize,
    limits: &Limits,
    devices: &[Place<'_>],
) -> Result<ShardPlan, PlanError> {
    let weights: Vec<f64> = devices.iter().map(|device| device.spec.weight).collect();
    let cut = Cut { stripes, experts: limits.experts };
    let costs = Costs::new(spec, cut, limits.compute);
    let cache_tokens = (limits.kv_blocks as u64).saturating_mul(limits.block_tokens as u64);
    let rank_plan = |rank: usize, begin: usize, end: usize| {
        let held: Vec<usize> = (begin..end).collect();
        RankPlan {
            rank,
            node: devices[rank].node,
            device: devices[rank].device,
            weight_bytes: costs.weight_bytes(&held),
            kv_bytes: costs.kv_bytes(&held, cache_tokens),
            stripes: held,
        }
    };
    let ideal = split::proportional(stripes, &weights);
    let ranks = by_shares(&ideal, rank_plan);
    let shortages = shortages(&ranks, devices);
    if shortages.is_empty() {
        return Ok(ShardPlan { stripes, ranks });
    }
    // What a run takes does not depend on the rank, so it is worked out once for all of them.
    let sizes: Vec<Vec<u64>> = (0..stripes)
        .map(|begin| (begin + 1..=stripes).map(|end| needed(&rank_plan(0, begin, end))).collect())
        .collect();
    let fits = |rank: usize, begin: usize, end: usize| {
        sizes[begin][end - begin - 1] <= devices[rank].spec.memory_bytes
    };
    match split::fitting(stripes, &weights, &ideal, fits) {
        Some(shares) => Ok(ShardPlan { stripes, ranks: by_shares(&shares, rank_plan) }),
        None => Err(PlanError::DoesNotFit { stripes, ranks: devices.len(), shortages }),
    }
}

/// A device and where it is.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) node: NodeId,
    pub(crate) device: usize,
    pub(crate) spec: &'a DeviceSpec,
}

/// All devices in the order in which they become ranks; at least as many as are wanted.
pub(crate) fn devices(
    nodes: &[NodeSpec],
    wanted: Option<usize>,
    stripes: usize,
) -> Result<Vec<Place<'_>>, PlanError> {
    let mut order: Vec<&NodeSpec> = nodes.iter().collect();
    order.sort_by_key(|node| node.id);
    if let Some(pair) = order.windows(2).find(|pair| pair[0].id == pair[1].id) {
        return Err(PlanError::NodeTwice { node: pair[0].id });
    }
    let mut places: Vec<Place<'_>> = Vec::new();
    for node in order {
        for (device, spec) in node.devices.iter().enumerate() {
            if !(spec.weight.is_finite() && spec.weight > 0.0) {
                let weight = spec.weight.to_string();
                return Err(PlanError::Weight { node: node.id, device, weight });
            }
            places.push(Place { node: node.id, device, spec });
        }
    }
    let devices = places.len();
    match wanted {
        Some(0) => Err(PlanError::NoRanks),
        _ if devices == 0 => Err(PlanError::NoDevices),
        Some(ranks) if ranks > stripes => Err(PlanError::TooManyRanks { ranks, stripes }),
        Some(ranks) if ranks > devices => Err(PlanError::TooFewDevices { ranks, devices }),
        _ => Ok(places),
    }
}

/// Ranks with runs of these lengths.
fn by_shares(
    shares: &[usize],
    rank_plan: impl Fn(usize, usize, usize) -> RankPlan,
) -> Vec<RankPlan> {
    let mut begin = 0;
    let mut ranks = Vec::with_capacity(shares.len());
    for (rank, share) in shares.iter().enumerate() {
        ranks.push(rank_plan(rank, begin, begin + share));
        begin += share;
    }
    ranks
}

/// Bytes a rank takes.
fn needed(rank: &RankPlan) -> u64 {
    rank.weight_bytes.saturating_add(rank.kv_bytes)
}

fn shortages(ranks: &[RankPlan], devices: &[Place<'_>]) -> Vec<Shortage> {
    let mut shortages = Vec::new();
    for (rank, place) in ranks.iter().zip(devices) {
        let (needed, available) = (needed(rank), place.spec.memory_bytes);
        let missing = needed.saturating_sub(available);
        if missing > 0 {
            let (node, device) = (place.node, place.device);
            shortages.push(Shortage { node, device, needed, available, missing });
        }
    }
    shortages
}

impl ShardPlan {
    /// Checks a plan that came from elsewhere: ranks numbered from 0, a device each, and every
    /// stripe of a possible cut on exactly one rank. Whether a device exists and has the memory
    /// only its node knows.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self, spec: &ModelSpec) -> Result<(), PlanError> {
        stripes::validate(spec, self.stripes)?;
        if self.ranks.is_empty() {
            return Err(PlanError::NoRanks);
        }
        let mut devices = BTreeSet::new();
        let mut held = BTreeSet::new();
        for (expected, plan) in self.ranks.iter().enumerate() {
            let rank = plan.rank;
            if rank != expected {
                return Err(PlanError::RankNumber { rank, expected });
            }
            if !devices.insert((plan.node, plan.device)) {
                let (node, device) = (plan.node, plan.device);
                return Err(PlanError::DeviceTwice { rank, node, device });
            }
            self.check_rank(plan, &mut held)?;
        }
        match (0..self.stripes).find(|stripe| !held.contains(stripe)) {
            Some(stripe) => Err(PlanError::Unheld { stripe }),
            None => Ok(()),
        }
    }

    /// Checks one rank's stripes and adds them to those held.
    fn check_rank(&self, plan: &RankPlan, held: &mut BTreeSet<usize>) -> Result<(), PlanError> {
        let (rank, stripes) = (plan.rank, self.stripes);
        if plan.stripes.is_empty() {
            return Err(PlanError::EmptyRank { rank });
        }
        let mut before = None;
        for &stripe in &plan.stripes {
            if stripe >= stripes {
                return Err(PlanError::NoSuchStripe { rank, stripe, stripes });
            }
            if before.is_some_and(|before| before >= stripe) {
                return Err(PlanError::Order { rank, stripe });
            }
            if !held.insert(stripe) {
                return Err(PlanError::HeldTwice { stripe, rank });
            }
            before = Some(stripe);
        }
        Ok(())
    }
}
