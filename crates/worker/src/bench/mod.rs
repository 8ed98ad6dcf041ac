//! `phalanx bench`: how fast a model runs on this machine, beside what the machine can do.
//!
//! No server, no scheduler: ranks as threads of this process, steps made by hand. Every figure is
//! the median of several runs and comes with the machine's limits, measured right before it.

mod bound;
mod group;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use collective::CollectiveError;
use compute::{DeviceError, KernelClass, MachineLimits};
use decoder::{Checkpoint, CheckpointError, ForwardError, LoadError};
use model::{ComputeType, ModelSpec};

pub use bound::Bound;
use group::Group;

/// Positions of a cache block.
const BLOCK: usize = 16;

/// Tokens of one step while a context is filled.
const CHUNK: usize = 512;

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The model directory or GGUF file.
    pub directory: PathBuf,
    /// The model.
    pub spec: Arc<ModelSpec>,
    /// What its weights are kept in.
    pub compute: ComputeType,
    /// Ranks, each a thread or more of this process.
    pub ranks: usize,
    /// Threads of each rank.
    pub threads: usize,
    /// Instruction set; the best there is by default.
    pub kernels: Option<KernelClass>,
    /// What is run, in order.
    pub cases: Vec<Case>,
    /// Runs of each case, of which the median counts; at least 1.
    pub repeat: usize,
    /// Steps of a run of [`Case::Decode`]; at least 1.
    pub steps: usize,
}

/// One thing to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    /// The whole prompt of one sequence in one step.
    Prefill {
        /// Its tokens.
        tokens: usize,
    },
    /// One token for each sequence in each step.
    Decode {
        /// Sequences.
        sequences: usize,
        /// Tokens that each has before the first step.
        context: usize,
    },
}

impl Case {
    /// Positions of the cache that it takes, in blocks.
    fn blocks(self, steps: usize) -> usize {
        match self {
            Case::Prefill { tokens } => tokens.div_ceil(BLOCK),
            Case::Decode { sequences, context } => sequences * (context + steps).div_ceil(BLOCK),
        }
    }

    /// The last position of a sequence.
    fn longest(self, steps: usize) -> usize {
        match self {
            Case::Prefill { tokens } => tokens,
            Case::Decode { context, .. } => context + steps,
        }
    }
}

/// What came of a case.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// What was run.
    pub case: Case,
    /// Tokens per second of each run, ascending.
    pub rates: Vec<f64>,
    /// Share of the time that rank 0 spent in collectives.
    pub collectives: f64,
    /// What the machine could do, measured right before the case.
    pub limits: MachineLimits,
    /// What these limits allow for the case.
    pub bound: Bound,
}

impl Figure {
    /// The median of the runs, in tokens per second.
    pub fn rate(&self) -> f64 {
        self.rates.get(self.rates.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// The median as a share of what the limits allow.
    pub fn share(&self) -> f64 {
        self.rate() / self.bound.rate()
    }
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The model cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A rank could not load it.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A step failed.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The machine's limits could not be measured, or a device not be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The ranks' stripes are no partition.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A case does not fit the model.
    #[error("{tokens} positions are more than the {context} the model was made for")]
    Context {
        /// Positions of the longest sequence.
        tokens: usize,
        /// The model's.
        context: usize,
    },
    /// There are more ranks than stripes, or none.
    #[error("{ranks} ranks are not possible: the model is cut into {stripes} stripes")]
    Ranks {
        /// Wanted.
        ranks: usize,
        /// Stripes.
        stripes: usize,
    },
    /// A rank's thread ended without saying why.
    #[error("rank {rank} panicked")]
    Panicked {
        /// Which.
        rank: usize,
    },
}

/// How long loading took, and the figures.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// From opening the files to ranks that are ready.
    pub loading: Duration,
    /// In the order of the plan's cases.
    pub figures: Vec<Figure>,
}

/// Runs all cases of a plan, calling `done` after each.
///
/// # Errors
/// Whatever keeps the model from loading or a step from running; nothing is skipped.
pub fn bench(plan: &Plan, done: &mut dyn FnMut(&Figure)) -> Result<Outcome, BenchError> {
    let limits = || MachineLimits::measure(plan.ranks * plan.threads, plan.kernels);
    within(plan, &limits, done)
}

/// As [`bench`], with limits measured as `limits` does it.
fn within(
    plan: &Plan,
    limits: &dyn Fn() -> Result<MachineLimits, DeviceError>,
    done: &mut dyn FnMut(&Figure),
) -> Result<Outcome, BenchError> {
    let longest = plan.cases.iter().map(|case| case.longest(plan.steps)).max().unwrap_or(0);
    if longest > plan.spec.context {
        return Err(BenchError::Context { tokens: longest, context: plan.spec.context });
    }
    let stripes = planner::stripes::default_count(&plan.spec);
    if plan.ranks == 0 || plan.ranks > stripes {
        return Err(BenchError::Ranks { ranks: plan.ranks, stripes });
    }
    let began = Instant::now();
    let checkpoint = Checkpoint::open(&plan.directory, &plan.spec)?;
    let blocks = plan.cases.iter().map(|case| case.blocks(plan.steps)).max().unwrap_or(1);
    group::with(plan, &checkpoint, (stripes, blocks), |group| {
        let loading = began.elapsed();
        let mut figures = Vec::new();
        for &case in &plan.cases {
            let figure = measure(plan, group, case, limits()?)?;
            done(&figure);
            figures.push(figure);
        }
        Ok(Outcome { loading, figures })
    })
}

fn measure(
    plan: &Plan,
    group: &mut Group<'_>,
    case: Case,
    limits: MachineLimits,
) -> Result<Figure, BenchError> {
    let bound = Bound::new(&plan.spec, plan.compute, case, &limits);
    let (mut rates, mut collectives, mut whole) = (Vec::new(), 0.0, 0.0);
    let tokens = match case {
        Case::Prefill { tokens } => {
            group.prefill(&prompt(plan, tokens))?;
            tokens
        }
        Case::Decode { sequences, context } => {
            group.fill(sequences, &prompt(plan, context), CHUNK)?;
            group.decode(sequences, context, 1)?;
            sequences * plan.steps
        }
    };
    for _ in 0..plan.repeat {
        let before = group.in_collectives();
        let took = match case {
            Case::Prefill { tokens } => group.prefill(&prompt(plan, tokens))?,
            Case::Decode { sequences, context } => group.decode(sequences, context, plan.steps)?,
        };
        let took = took.as_secs_f64();
        rates.push(tokens as f64 / took);
        collectives += (group.in_collectives() - before).as_secs_f64();
        whole += took;
    }
    rates.sort_by(f64::total_cmp);
    Ok(Figure { case, rates, collectives: collectives / whole, limits, bound })
}

/// Token ids that jump about the vocabulary.
fn prompt(plan: &Plan, tokens: usize) -> Vec<u32> {
    let vocab = plan.spec.vocab.max(1) as u64;
    (1..=tokens as u64).map(|i| (i * 2_654_435_761 % vocab) as u32).collect()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
