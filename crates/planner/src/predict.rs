//! What a step of a plan should take: a prediction, never a measurement.
//!
//! A roofline for every product and every attention of the model (bytes read at the memory's rate,
//! arithmetic at the rate of its type, the slower of the two counts), latency and bandwidth for
//! every exchange between ranks, and a fixed pause for every operation started. Their sum is the
//! **floor**. No engine reaches it; one number, the *efficiency*, says how far above it steps are,
//! and it is fitted to measurements ([`fit`]). What is left out: activations read and written, the
//! host's work, sampling, what a skewed router does.

mod ops;
mod print;
mod rates;
mod wires;

use std::collections::BTreeMap;

use model::{ComputeType, ModelSpec};

use crate::cut::{Cut, ExpertCut};
use crate::plan::{NodeId, PlanError, RankPlan, ShardPlan};

pub use print::table;
pub use rates::{Rates, Wire};

/// What a step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// One token for each of `sequences`, of which each has `context` tokens in the cache.
    Decode {
        /// Sequences in the batch.
        sequences: usize,
        /// Tokens before the one that is computed.
        context: usize,
    },
    /// The first `tokens` tokens of one sequence at once.
    Prefill {
        /// Tokens of the prompt.
        tokens: usize,
    },
}

impl Work {
    /// Rows that pass through every layer.
    pub fn rows(self) -> usize {
        match self {
            Work::Decode { sequences, .. } => sequences,
            Work::Prefill { tokens } => tokens,
        }
    }

    /// Rows that pass through the head.
    fn head_rows(self) -> usize {
        match self {
            Work::Decode { sequences, .. } => sequences,
            Work::Prefill { .. } => 1,
        }
    }
}

/// What weights are kept in on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// Converted when they are loaded.
    As(ComputeType),
    /// In the checkpoint's own blocks (FP8, MXFP4, 4-bit integers), the rest in 16 bits; the cache
    /// in bf16.
    Stored,
}

impl Kept {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Kept::As(compute) => compute.name(),
            Kept::Stored => "stored",
        }
    }
}

/// What is predicted about.
#[derive(Debug, Clone, Copy)]
pub struct Case<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// Who holds what of it.
    pub plan: &'a ShardPlan,
    /// How its experts are divided.
    pub experts: ExpertCut,
    /// What its weights are kept in.
    pub kept: Kept,
    /// By rank: its device's rates.
    pub rates: &'a [Rates],
}

/// Where the time of a step goes, in seconds. The parts follow each other; nothing overlaps.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Breakdown {
    /// Reading weights.
    pub weights: f64,
    /// Reading keys and values.
    pub kv: f64,
    /// Arithmetic beyond what is hidden behind those reads.
    pub matrix: f64,
    /// Sums and gathers between ranks.
    pub collectives: f64,
    /// Pauses between operations.
    pub gaps: f64,
}

impl Breakdown {
    /// All parts, in seconds.
    pub fn total(&self) -> f64 {
        self.weights + self.kv + self.matrix + self.collectives + self.gaps
    }
}

/// A predicted step. Nothing in it was measured on the devices that it speaks of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// What it is about.
    pub work: Work,
    /// What weights are kept in.
    pub kept: Kept,
    /// The slowest rank's time if everything went as fast as its rates say.
    pub floor: Breakdown,
    /// That rank.
    pub slowest: usize,
    /// Nodes that the ranks are on.
    pub nodes: usize,
    /// The fitted share of the floor's speed, as in [`Rates::efficiency`].
    pub efficiency: f64,
    /// Least and most seconds that a step may take and not surprise.
    pub band: (f64, f64),
}

impl Prediction {
    /// Predicted seconds of a step: the floor over the efficiency.
    pub fn step_seconds(&self) -> f64 {
        self.floor.total() / self.efficiency
    }

    /// Predicted tokens per second, of all sequences together.
    pub fn tokens_per_second(&self) -> f64 {
        self.work.rows() as f64 / self.step_seconds()
    }
}

/// Why nothing can be predicted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PredictError {
    /// The plan is none.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Not one set of rates for every rank.
    #[error("rates of {got} devices for {ranks} ranks")]
    Devices {
        /// Sets of rates.
        got: usize,
        /// Ranks of the plan.
        ranks: usize,
    },
    /// A rate that none can be.
    #[error("{what} is {value}: {must}")]
    Rate {
        /// Which.
        what: &'static str,
        /// Its value.
        value: f64,
        /// What it must be.
        must: &'static str,
    },
    /// A step without tokens.
    #[error("a step needs at least one token")]
    NoTokens,
    /// The spec does not say how its weights are stored: each tensor of a GGUF file has its own
    /// type.
    #[error("how weights are stored stands in the file's tensors, not in the model's spec")]
    StoredUnknown,
}

/// Predicts a step.
///
/// # Errors
/// [`PredictError`], naming what is missing or cannot be.
pub fn predict(case: &Case<'_>, work: Work) -> Result<Prediction, PredictError> {
    case.plan.check(case.spec)?;
    let ranks = case.plan.ranks.len();
    if case.rates.len() != ranks {
        return Err(PredictError::Devices { got: case.rates.len(), ranks });
    }
    case.rates.iter().try_for_each(Rates::check)?;
    if work.rows() == 0 {
        return Err(PredictError::NoTokens);
    }
    let mut on_node: BTreeMap<NodeId, usize> = BTreeMap::new();
    for rank in &case.plan.ranks {
        *on_node.entry(rank.node).or_default() += 1;
    }
    let group = wires::Group {
        ranks,
        nodes: on_node.len(),
        fullest: on_node.values().copied().max().unwrap_or(1),
    };
    let mut slowest: Option<(Breakdown, usize)> = None;
    for (rank, rates) in case.plan.ranks.iter().zip(case.rates) {
        let floor = floor(case, rank, rates, &group, work)?;
        // The first of equal ranks stays, so that the answer does not depend on rounding.
        if slowest.is_none_or(|(before, _)| floor.total() > before.total()) {
            slowest = Some((floor, rank.rank));
        }
    }
    let (floor, slowest) = slowest.ok_or(PlanError::NoRanks)?;
    let rates = &case.rates[slowest];
    let (efficiency, nodes) = (rates.efficiency, group.nodes);
    let band = rates.band(floor.total(), nodes);
    Ok(Prediction { work, kept: case.kept, floor, slowest, nodes, efficiency, band })
}

/// One rank's floor.
fn floor(
    case: &Case<'_>,
    rank: &RankPlan,
    rates: &Rates,
    group: &wires::Group,
    work: Work,
) -> Result<Breakdown, PredictError> {
    let cut = Cut { stripes: case.plan.stripes, experts: case.experts };
    let held = ops::Held { spec: case.spec, cut, stripes: &rank.stripes, kept: case.kept };
    let mut floor = held.step(rates, work)?;
    let values = work.rows() as f64 * case.spec.hidden as f64;
    let sums = 1 + 2 * case.spec.layers.len();
    // The embedding, and behind every attention and every feed-forward network.
    let sum = group.sum(rates, values * rates.wire_bytes);
    // Logits are f32 and meet on one rank.
    let logits = work.head_rows() as f64 * case.spec.vocab as f64 * 4.0;
    floor.collectives = sums as f64 * sum + group.gather(rates, logits);
    floor.gaps = case.spec.layers.len() as f64 * rates.layer_ops * rates.op_gap;
    Ok(floor)
}

/// Bytes of weights that this rank keeps.
///
/// # Errors
/// [`PredictError::StoredUnknown`].
pub fn weight_bytes(case: &Case<'_>, rank: &RankPlan) -> Result<f64, PredictError> {
    let cut = Cut { stripes: case.plan.stripes, experts: case.experts };
    ops::Held { spec: case.spec, cut, stripes: &rank.stripes, kept: case.kept }.weights()
}

/// The one efficiency that fits measured steps best: the geometric mean of floor over measured
/// time. Each point is (predicted floor, measured), in seconds. `None` where there is no point or
/// one that is not positive and finite.
pub fn fit(points: &[(f64, f64)]) -> Option<f64> {
    let usable = |value: f64| value.is_finite() && value > 0.0;
    if points.is_empty() || !points.iter().all(|(floor, time)| usable(*floor) && usable(*time)) {
        return None;
    }
    let sum: f64 = points.iter().map(|(floor, time)| (floor / time).ln()).sum();
    Some((sum / points.len() as f64).exp())
}
