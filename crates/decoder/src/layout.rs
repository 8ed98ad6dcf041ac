//! What one rank holds of each layer: which heads, columns and rows, and where they stand locally.

use std::ops::Range;

use model::ModelSpec;
use planner::{ExpertCut, stripes};

/// A rank's stripes out of all stripes of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    /// All stripes the model is cut into.
    pub(crate) stripes: usize,
    /// The rank's own, ascending.
    pub(crate) own: Vec<usize>,
    /// Columns of a stored block, which cuts keep whole where they can.
    pub(crate) block: usize,
    /// How experts are divided among stripes.
    pub(crate) experts: ExpertCut,
}

/// Consecutive local columns, one run per own stripe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Runs {
    /// By own stripe: the global range.
    pub(crate) global: Vec<Range<usize>>,
    /// By own stripe: where it starts locally.
    pub(crate) local: Vec<usize>,
    /// Local total.
    pub(crate) total: usize,
}

impl Runs {
    fn new(global: Vec<Range<usize>>) -> Self {
        let mut total = 0;
        let mut local = Vec::with_capacity(global.len());
        for run in &global {
            local.push(total);
            total += run.len();
        }
        Self { global, local, total }
    }
}

impl Layout {
    /// Query heads of each own stripe.
    pub(crate) fn query_heads(&self, heads: usize) -> Runs {
        let run = |s: &usize| stripes::query_heads(heads, self.stripes, *s);
        Runs::new(self.own.iter().map(run).collect())
    }

    /// The KV heads that the rank's query heads read, ascending, each once.
    pub(crate) fn kv_heads(&self, heads: usize, kv_heads: usize) -> Vec<usize> {
        let run = |s: &usize| stripes::kv_heads(heads, kv_heads, self.stripes, *s);
        let mut read: Vec<usize> = self.own.iter().flat_map(run).collect();
        read.sort_unstable();
        read.dedup();
        read
    }

    /// Feed-forward columns of each own stripe.
    pub(crate) fn columns(&self, width: usize) -> Runs {
        let run = |s: &usize| stripes::columns(width, self.block, self.stripes, *s);
        Runs::new(self.own.iter().map(run).collect())
    }

    /// All columns, as those of one stripe.
    pub(crate) fn all_columns(width: usize) -> Runs {
        Runs::new(std::iter::once(0..width).collect())
    }

    /// The own stripe, by its place among them, that an expert belongs to where whole ones are
    /// divided; `None` where another rank has it.
    pub(crate) fn owner(&self, expert: usize, count: usize) -> Option<usize> {
        self.own.iter().position(|s| stripes::experts(count, self.stripes, *s).contains(&expert))
    }

    /// Vocabulary rows of each own stripe.
    pub(crate) fn vocab(&self, spec: &ModelSpec) -> Runs {
        Runs::new(self.own.iter().map(|s| stripes::vocab(spec.vocab, self.stripes, *s)).collect())
    }

    /// By stripe, own or not: how many vocabulary rows it has.
    pub(crate) fn vocab_widths(&self, spec: &ModelSpec) -> Vec<usize> {
        (0..self.stripes).map(|s| stripes::vocab(spec.vocab, self.stripes, s).len()).collect()
    }
}
