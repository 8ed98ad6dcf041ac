//! One layer's feed-forward network on one rank: dense, or the experts each token chose.

use std::ops::Range;

use collective::Collective;
use compute::{Device, ELSEWHERE, Routes, Routing};

use crate::forward::{After, Batch, Decoder, ForwardError, Place, Scratch};
use crate::weights::{ExpertsWeights, FeedForwardWeights, Gated, across};

impl<D: Device> Decoder<D> {
    /// `x += sum over stripes of the network of norm(x)`.
    pub(crate) fn feed_forward(
        &mut self,
        layer: usize,
        batch: &Batch<'_>,
        collective: &mut dyn Collective<D>,
    ) -> Result<(), ForwardError> {
        let (device, s) = (&self.device, &mut self.scratch);
        let w = &self.layers[layer];
        let (rows, hidden, eps) = (batch.rows, self.spec.hidden, self.spec.norm_eps);
        device.reshape(&mut s.h, rows, hidden)?;
        device.rms_norm(&s.x, &w.feed_forward_norm, eps, &mut s.h)?;
        let norm = w.feed_forward_post_norm.as_deref();
        let scale = self.spec.branch_scale;
        let mut after =
            After { place: Place::FeedForward { layer }, hidden, bias: None, norm, scale, eps };
        match &w.feed_forward {
            FeedForwardWeights::Dense { network, down_bias } => {
                gated(device, s, Source::Dense, &[(network, 0..rows)], hidden)?;
                after.bias = down_bias.as_deref();
            }
            FeedForwardWeights::Experts(w) => {
                let routes = route(device, s, w, rows)?;
                experts(device, s, w, &routes, hidden)?;
                shared(device, s, w, rows, hidden)?;
            }
        }
        Self::add_partials(device, s, rows, after, collective)
    }
}

/// Where a gated network reads and writes within the scratch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// From `h` to `partials`.
    Dense,
    /// From `h` to `expert`.
    Shared,
    /// From `expert` back to `expert`.
    Gathered,
}

/// Runs several gated networks of one shape, each over its own run of rows. Outputs are
/// stripe-major: stripe `i` of own stripes writes rows `i * all rows ..`.
fn gated<D: Device>(
    device: &D,
    s: &mut Scratch<D>,
    source: Source,
    networks: &[(&Gated<D>, Range<usize>)],
    hidden: usize,
) -> Result<(), ForwardError> {
    let Some((first, _)) = networks.first() else {
        return Ok(());
    };
    let (width, own) = (first.width, first.down.len());
    let rows = networks.iter().map(|(_, run)| run.len()).sum::<usize>();
    device.reshape(&mut s.wide, rows, 2 * width)?;
    let inward: Vec<_> = networks
        .iter()
        .flat_map(|(n, run)| n.gate_up.iter().map(|p| p.outward(run.clone())))
        .collect();
    let x = if source == Source::Gathered { &s.expert } else { &s.h };
    device.matmul(x, &inward, &mut s.wide)?;
    device.reshape(&mut s.inner, rows, width)?;
    device.gate(&s.wide, width, first.activation, &mut s.inner)?;
    let back: Vec<_> = networks
        .iter()
        .flat_map(|(n, run)| {
            n.down.iter().enumerate().map(|(i, p)| p.inward(run.clone(), i * rows + run.start))
        })
        .collect();
    let out = if source == Source::Dense { &mut s.partials } else { &mut s.expert };
    device.reshape(out, own * rows, hidden)?;
    device.matmul(&s.inner, &back, out)?;
    Ok(())
}

/// Every token's experts. The router is whole on every rank, so all ranks choose alike.
fn route<D: Device>(
    device: &D,
    s: &mut Scratch<D>,
    w: &ExpertsWeights<D>,
    rows: usize,
) -> Result<Routes, ForwardError> {
    device.reshape(&mut s.wide, rows, w.experts.len())?;
    let mut segment = across(w.router.as_ref(), rows, 0, 0);
    segment.bias = w.router_bias.as_deref();
    device.matmul(&s.h, &[segment], &mut s.wide)?;
    let routing = Routing { correction: w.correction.as_deref(), ..w.routing };
    Ok(device.route(&s.wide, &routing)?)
}

/// `partials` = the weighted sum of each token's experts, by stripe.
fn experts<D: Device>(
    device: &D,
    s: &mut Scratch<D>,
    w: &ExpertsWeights<D>,
    routes: &Routes,
    hidden: usize,
) -> Result<(), ForwardError> {
    let here: Vec<bool> = w.experts.iter().map(Option::is_some).collect();
    let sorted = Sorted::new(routes, &here);
    device.reshape(&mut s.expert, sorted.tokens.len(), hidden)?;
    device.gather_rows(&s.h, &sorted.tokens, &mut s.expert)?;
    let used: Vec<_> = w
        .experts
        .iter()
        .zip(&sorted.runs)
        .filter(|(_, run)| !run.is_empty())
        .filter_map(|(expert, run)| Some((expert.as_ref()?, run.clone())))
        .collect();
    gated(device, s, Source::Gathered, &used, hidden)?;
    let rows = routes.experts.len() / routes.chosen.max(1);
    device.reshape(&mut s.partials, w.own * rows, hidden)?;
    let picks = sorted.picks(routes, w.own, w.owners.as_deref());
    device.combine_experts(&s.expert, routes, &picks, &mut s.partials)?;
    Ok(())
}

/// `partials +=` what the network that every token uses makes of it.
fn shared<D: Device>(
    device: &D,
    s: &mut Scratch<D>,
    w: &ExpertsWeights<D>,
    rows: usize,
    hidden: usize,
) -> Result<(), ForwardError> {
    let Some((network, router)) = &w.shared else {
        return Ok(());
    };
    gated(device, s, Source::Shared, &[(network, 0..rows)], hidden)?;
    let Some(router) = router else {
        device.add(&mut s.partials, &s.expert, None)?;
        return Ok(());
    };
    device.reshape(&mut s.wide, rows, 1)?;
    device.matmul(&s.h, &[across(router.as_ref(), rows, 0, 0)], &mut s.wide)?;
    device.add_gated(&mut s.partials, &s.expert, &s.wide, network.down.len())?;
    Ok(())
}

/// Tokens sorted by expert, so that each expert's rows are one run.
#[derive(Debug, PartialEq, Eq)]
struct Sorted {
    /// By sorted row: the token it belongs to.
    tokens: Vec<u32>,
    /// By expert: its run of sorted rows.
    runs: Vec<Range<usize>>,
    /// By (token, slot): its sorted row, or `ELSEWHERE`.
    rows: Vec<u32>,
}

impl Sorted {
    /// `here` says by expert whether this rank has it.
    fn new(routes: &Routes, here: &[bool]) -> Self {
        let mut counts = vec![0usize; here.len()];
        for expert in routes.experts.iter().filter(|expert| here[**expert as usize]) {
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
        let mut tokens = vec![0; start];
        let mut rows = vec![ELSEWHERE; routes.experts.len()];
        let slots = routes.experts.iter().enumerate();
        for (slot, expert) in slots.filter(|(_, expert)| here[**expert as usize]) {
            let row = &mut next[*expert as usize];
            tokens[*row] = (slot / routes.chosen) as u32;
            rows[slot] = *row as u32;
            *row += 1;
        }
        Self { tokens, runs, rows }
    }

    /// By (own stripe, token, slot): the row of the experts' outputs that the stripe adds. Where
    /// every expert is cut, outputs are stripe-major; where whole ones are divided, each row
    /// belongs to one stripe.
    fn picks(&self, routes: &Routes, own: usize, owners: Option<&[Option<usize>]>) -> Vec<u32> {
        let slots = self.rows.len();
        let mut picks = Vec::with_capacity(own * slots);
        for stripe in 0..own {
            match owners {
                None => picks.extend(self.rows.iter().map(|row| (stripe * slots) as u32 + row)),
                Some(owners) => {
                    let pairs = self.rows.iter().zip(&routes.experts);
                    picks.extend(pairs.map(|(row, expert)| {
                        let mine = owners[*expert as usize] == Some(stripe);
                        if mine { *row } else { ELSEWHERE }
                    }));
                }
            }
        }
        picks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorting_puts_each_experts_rows_side_by_side() {
        let routes = Routes { chosen: 2, experts: vec![2, 0, 2, 1, 0, 2], weights: vec![0.5; 6] };
        let sorted = Sorted::new(&routes, &[true; 4]);
        assert_eq!(sorted.runs, [0..2, 2..3, 3..6, 6..6]);
        assert_eq!(sorted.tokens, [0, 2, 1, 0, 1, 2]);
        assert_eq!(sorted.rows, [3, 0, 4, 2, 1, 5]);
        let twice = [3, 0, 4, 2, 1, 5, 9, 6, 10, 8, 7, 11];
        assert_eq!(sorted.picks(&routes, 2, None), twice);
    }

    #[test]
    fn experts_of_other_ranks_are_left_out() {
        let routes = Routes { chosen: 2, experts: vec![2, 0, 2, 1, 0, 2], weights: vec![0.5; 6] };
        let sorted = Sorted::new(&routes, &[true, true, false, false]);
        assert_eq!(sorted.runs, [0..2, 2..3, 3..3, 3..3]);
        assert_eq!(sorted.tokens, [0, 2, 1]);
        const NO: u32 = ELSEWHERE;
        assert_eq!(sorted.rows, [NO, 0, NO, 2, 1, NO]);
        // The first own stripe has expert 1, the second expert 0.
        let picks = sorted.picks(&routes, 2, Some(&[Some(1), Some(0), None, None]));
        assert_eq!(picks, [NO, NO, NO, 2, NO, NO, NO, 0, NO, NO, 1, NO]);
    }
}
