//! `repair()`: from a plan that has lost devices to the next one, moving as little as possible.

use model::ModelSpec;

use crate::cut::Cut;
use crate::plan::{DeviceSpec, Limits, NodeId, NodeSpec, PlanError, RankPlan, ShardPlan, Shortage};
use crate::stripes::Costs;

/// A device and the stripes that it holds, or shall.
struct Holder<'a> {
    node: NodeId,
    device: usize,
    spec: &'a DeviceSpec,
    stripes: Vec<usize>,
    /// It had no rank before.
    fresh: bool,
}

/// What weighing stripes needs.
struct Scale {
    costs: Costs,
    cache_tokens: u64,
}

impl Scale {
    fn rank(&self, rank: usize, holder: &Holder<'_>) -> RankPlan {
        let mut stripes = holder.stripes.clone();
        stripes.sort_unstable();
        RankPlan {
            rank,
            node: holder.node,
            device: holder.device,
            weight_bytes: self.costs.weight_bytes(&stripes),
            kv_bytes: self.costs.kv_bytes(&stripes, self.cache_tokens),
            stripes,
        }
    }

    fn needed(&self, holder: &Holder<'_>) -> u64 {
        let rank = self.rank(0, holder);
        rank.weight_bytes.saturating_add(rank.kv_bytes)
    }

    /// Whether the holder has room for one more.
    fn fits(&self, holder: &Holder<'_>, stripe: usize) -> bool {
        let stripes = [&holder.stripes[..], &[stripe]].concat();
        let more = Holder { stripes, ..*holder };
        self.needed(&more) <= holder.spec.memory_bytes
    }
}

/// The next plan of a group. Ranks of `before` whose device is among `nodes` keep their stripes;
/// the others' stripes go to devices that had no rank, up to `limits.ranks` ranks in all (as many
/// as `before` where that is not set), and what those should not or cannot hold goes to the ranks
/// that stay. Where devices are added that had no rank, they also take stripes off the slowest, as
/// long as that makes the slowest faster. Nobody else's stripes move.
///
/// Ranks that stay come first, in their order, then those that are added, by (node, device).
///
/// # Errors
/// [`PlanError`] naming what is impossible; [`PlanError::DoesNotFit`] where the stripes that are to
/// be moved find no room, with the devices that were tried as its shortages.
pub fn repair(
    spec: &ModelSpec,
    before: &ShardPlan,
    nodes: &[NodeSpec],
    limits: &Limits,
) -> Result<ShardPlan, PlanError> {
    crate::stripes::validate(spec, before.stripes)?;
    let ranks = limits.ranks.unwrap_or(before.ranks.len());
    let devices = crate::plan::devices(nodes, None, before.stripes)?;
    let (mut holders, mut fresh) = (Vec::new(), Vec::new());
    for place in &devices {
        let (node, device, spec) = (place.node, place.device, place.spec);
        let known = before.ranks.iter().find(|rank| (rank.node, rank.device) == (node, device));
        let stripes = known.map_or_else(Vec::new, |known| known.stripes.clone());
        let holder = Holder { node, device, spec, stripes, fresh: known.is_none() };
        match known {
            Some(known) => holders.push((known.rank, holder)),
            None => fresh.push(holder),
        }
    }
    holders.sort_by_key(|(rank, _)| *rank);
    let mut holders: Vec<Holder<'_>> = holders.into_iter().map(|(_, holder)| holder).collect();
    let added = ranks.min(before.stripes).saturating_sub(holders.len());
    holders.extend(fresh.into_iter().take(added));
    let cut = Cut { stripes: before.stripes, experts: limits.experts };
    let scale = Scale {
        costs: Costs::new(spec, cut, limits.compute),
        cache_tokens: (limits.kv_blocks as u64).saturating_mul(limits.block_tokens as u64),
    };
    let held = |stripe: &usize| holders.iter().any(|holder| holder.stripes.contains(stripe));
    let lost: Vec<usize> = (0..before.stripes).filter(|stripe| !held(stripe)).collect();
    give(&scale, &mut holders, &lost, before.stripes)?;
    level(&scale, &mut holders);
    holders.retain(|holder| !holder.stripes.is_empty());
    let ranks = holders.iter().enumerate().map(|(rank, holder)| scale.rank(rank, holder)).collect();
    Ok(ShardPlan { stripes: before.stripes, ranks })
}

/// How long the holder takes for that many stripes.
fn time(holder: &Holder<'_>, stripes: usize) -> f64 {
    stripes as f64 / holder.spec.weight
}

/// Gives each lost stripe to whoever is then least slow and has room; among equals to a device
/// that is new, then to the first.
fn give(
    scale: &Scale,
    holders: &mut [Holder<'_>],
    lost: &[usize],
    stripes: usize,
) -> Result<(), PlanError> {
    for &stripe in lost {
        let with = |holder: &Holder<'_>| time(holder, holder.stripes.len() + 1);
        let roomy = holders.iter_mut().filter(|holder| scale.fits(holder, stripe));
        let least = roomy.min_by(|one, other| {
            with(one).total_cmp(&with(other)).then(other.fresh.cmp(&one.fresh))
        });
        match least {
            Some(holder) => holder.stripes.push(stripe),
            None => return Err(no_room(scale, holders, stripe, stripes)),
        }
    }
    Ok(())
}

fn no_room(scale: &Scale, holders: &mut [Holder<'_>], stripe: usize, stripes: usize) -> PlanError {
    let shortage = |holder: &mut Holder<'_>| {
        holder.stripes.push(stripe);
        let (needed, available) = (scale.needed(holder), holder.spec.memory_bytes);
        let missing = needed.saturating_sub(available);
        Shortage { node: holder.node, device: holder.device, needed, available, missing }
    };
    let shortages = holders.iter_mut().map(shortage).collect();
    PlanError::DoesNotFit { stripes, ranks: holders.len(), shortages }
}

/// Lets devices that are new take stripes off the slowest, one at a time, while that helps.
fn level(scale: &Scale, holders: &mut [Holder<'_>]) {
    loop {
        let now = |holder: &Holder<'_>| time(holder, holder.stripes.len());
        let slowest = (0..holders.len())
            .filter(|&at| holders[at].stripes.len() > 1)
            .max_by(|&a, &b| now(&holders[a]).total_cmp(&now(&holders[b])).then(b.cmp(&a)));
        let Some(slowest) = slowest else { return };
        // From its end, so that what stays is one run where it was one.
        let Some(&stripe) = holders[slowest].stripes.iter().max() else { return };
        let limit = now(&holders[slowest]);
        let helps =
            |holder: &Holder<'_>| holder.fresh && time(holder, holder.stripes.len() + 1) < limit;
        let taker = holders.iter().position(|one| helps(one) && scale.fits(one, stripe));
        let Some(taker) = taker else { return };
        holders[slowest].stripes.retain(|&other| other != stripe);
        holders[taker].stripes.push(stripe);
    }
}
