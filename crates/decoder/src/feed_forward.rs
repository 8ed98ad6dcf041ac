//! One layer's feed-forward network on one rank: dense, or the experts each token chose.

use std::ops::Range;

use collective::Collective;
use compute::{Device, Routes};

use crate::forward::{Batch, Decoder, ForwardError, Scratch};
use crate::weights::{FeedForwardWeights, Gated};

impl<D: Device> Decoder<D> {
    /// `x += sum over stripes of down(silu(gate(norm(x))) * up(norm(x)))`.
    pub(crate) fn feed_forward(
        &mut self,
        layer: usize,
        batch: &Batch<'_>,
        collective: &mut dyn Collective<D>,
    ) -> Result<(), ForwardError> {
        let (device, s) = (&self.device, &mut self.scratch);
        let w = &self.layers[layer];
        let (rows, hidden, own) = (batch.rows, self.spec.hidden, self.layout.own.len());
        device.reshape(&mut s.h, rows, hidden)?;
        device.rms_norm(&s.x, &w.feed_forward_norm, self.spec.norm_eps, &mut s.h)?;
        device.reshape(&mut s.partials, own * rows, hidden)?;
        device.reshape(&mut s.sum, rows, hidden)?;
        match &w.feed_forward {
            FeedForwardWeights::Dense { network, down_bias, width } => {
                gated(device, s, Source::Normed, &[(network, 0..rows)], *width)?;
                Self::add_partials(device, s, rows, down_bias.as_deref(), collective)
            }
            FeedForwardWeights::Experts { router, experts, chosen, renormalise, width } => {
                let routes = route::<D>(device, s, router, rows, *chosen, *renormalise)?;
                let groups = Groups::new(&routes, experts.len());
                device.reshape(&mut s.expert, groups.tokens.len(), hidden)?;
                device.gather_rows(&s.h, &groups.tokens, &mut s.expert)?;
                let used: Vec<_> = experts
                    .iter()
                    .zip(&groups.runs)
                    .filter(|(_, run)| !run.is_empty())
                    .map(|(expert, run)| (expert, run.clone()))
                    .collect();
                gated(device, s, Source::Gathered, &used, *width)?;
                device.reshape(&mut s.partials, own * rows, hidden)?;
                device.combine_experts(&s.expert, &routes, &groups.rows, own, &mut s.partials)?;
                Self::add_partials(device, s, rows, None, collective)
            }
        }
    }
}

/// Where a gated network reads and writes within the scratch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// From `h` to `partials`.
    Normed,
    /// From `expert` back to `expert`.
    Gathered,
}

/// Runs several gated networks, each over its own run of rows. Outputs are stripe-major:
/// stripe `i` of own stripes writes rows `i * all rows ..`.
fn gated<D: Device>(
    device: &D,
    s: &mut Scratch<D>,
    source: Source,
    networks: &[(&Gated<D>, Range<usize>)],
    width: usize,
) -> Result<(), ForwardError> {
    let rows = networks.iter().map(|(_, run)| run.len()).sum::<usize>();
    device.reshape(&mut s.wide, rows, 2 * width)?;
    let inward: Vec<_> = networks
        .iter()
        .flat_map(|(n, run)| n.gate_up.iter().map(|p| p.outward(run.clone())))
        .collect();
    let x = if source == Source::Normed { &s.h } else { &s.expert };
    device.matmul(x, &inward, &mut s.wide)?;
    device.reshape(&mut s.inner, rows, width)?;
    device.silu_mul(&s.wide, width, &mut s.inner)?;
    let back: Vec<_> = networks
        .iter()
        .flat_map(|(n, run)| {
            n.down.iter().enumerate().map(|(i, p)| p.inward(run.clone(), i * rows + run.start))
        })
        .collect();
    let out = if source == Source::Normed {
        &mut s.partials
    } else {
        let own = networks.first().map_or(0, |(n, _)| n.down.len());
        let hidden = networks.first().map_or(0, |(n, _)| hidden_of(device, n));
        device.reshape(&mut s.expert, own * rows, hidden)?;
        &mut s.expert
    };
    device.matmul(&s.inner, &back, out)?;
    Ok(())
}

/// Width of a gated network's output.
fn hidden_of<D: Device>(device: &D, network: &Gated<D>) -> usize {
    network.down.first().map_or(0, |p| device.matrix_shape(&p.matrix).0)
}

/// Every token's experts. The router is whole on every rank, so all ranks choose alike.
fn route<D: Device>(
    device: &D,
    s: &mut Scratch<D>,
    router: &D::Matrix,
    rows: usize,
    chosen: usize,
    renormalise: bool,
) -> Result<Routes, ForwardError> {
    let (experts, _) = device.matrix_shape(router);
    device.reshape(&mut s.wide, rows, experts)?;
    let segment = compute::Segment {
        matrix: router,
        bias: None,
        from_rows: 0..rows,
        from_column: 0,
        to_row: 0,
        to_column: 0,
    };
    device.matmul(&s.h, &[segment], &mut s.wide)?;
    Ok(device.route(&s.wide, chosen, renormalise)?)
}

/// Tokens sorted by expert, so that each expert's rows are one run.
#[derive(Debug, PartialEq, Eq)]
struct Groups {
    /// By sorted row: the token it belongs to.
    tokens: Vec<u32>,
    /// By expert: its run of sorted rows.
    runs: Vec<Range<usize>>,
    /// By (token, slot): its sorted row.
    rows: Vec<u32>,
}

impl Groups {
    fn new(routes: &Routes, experts: usize) -> Self {
        let mut counts = vec![0usize; experts];
        for expert in &routes.experts {
            counts[*expert as usize] += 1;
        }
        let mut start = 0;
        let runs: Vec<Range<usize>> = counts
            .iter()
            .map(|count| {
                start += count;
                start - count..start
            })
            .collect();
        let mut next: Vec<usize> = runs.iter().map(|run| run.start).collect();
        let mut tokens = vec![0; routes.experts.len()];
        let mut rows = vec![0; routes.experts.len()];
        for (slot, expert) in routes.experts.iter().enumerate() {
            let row = &mut next[*expert as usize];
            tokens[*row] = (slot / routes.chosen) as u32;
            rows[slot] = *row as u32;
            *row += 1;
        }
        Self { tokens, runs, rows }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_put_each_experts_rows_side_by_side() {
        let routes = Routes { chosen: 2, experts: vec![2, 0, 2, 1, 0, 2], weights: vec![0.5; 6] };
        let groups = Groups::new(&routes, 4);
        assert_eq!(groups.runs, [0..2, 2..3, 3..6, 6..6]);
        assert_eq!(groups.tokens, [0, 2, 1, 0, 1, 2]);
        assert_eq!(groups.rows, [3, 0, 4, 2, 1, 5]);
    }
}
