//! Sums and gathers between ranks, by latency and bandwidth.

use super::rates::{Rates, Wire};

/// How ranks are spread over nodes.
pub(super) struct Group {
    pub(super) ranks: usize,
    pub(super) nodes: usize,
    /// Ranks of the node that has the most.
    pub(super) fullest: usize,
}

impl Group {
    /// Seconds of a sum of `bytes` that every rank has afterwards.
    pub(super) fn sum(&self, rates: &Rates, bytes: f64) -> f64 {
        if self.nodes == 1 {
            return sum(&rates.within, self.ranks, bytes);
        }
        if rates.flat || self.fullest == 1 {
            return sum(&rates.between, self.ranks, bytes);
        }
        // Shares are summed within each node, then between the ranks that have the same share.
        let (ranks, within) = (self.fullest as f64, &rates.within);
        let local = within.latency + bytes * (ranks - 1.0) / ranks / within.bandwidth;
        2.0 * local + sum(&rates.between, self.nodes, bytes / ranks)
    }

    /// Seconds until one rank has the `bytes` that all have together.
    pub(super) fn gather(&self, rates: &Rates, bytes: f64) -> f64 {
        if self.ranks == 1 {
            return 0.0;
        }
        let wire = if self.nodes == 1 { &rates.within } else { &rates.between };
        wire.latency + bytes * (self.ranks - 1) as f64 / self.ranks as f64 / wire.bandwidth
    }
}

/// Everybody sends all to everybody, or shares are summed and sent round: what is faster.
fn sum(wire: &Wire, ranks: usize, bytes: f64) -> f64 {
    let others = ranks.saturating_sub(1) as f64;
    if others == 0.0 {
        return 0.0;
    }
    let direct = wire.latency + others * bytes / wire.bandwidth;
    let split = 2.0 * (wire.latency + bytes * others / ranks as f64 / wire.bandwidth);
    direct.min(split)
}
