//! What serving a model takes: plans over the nodes given, or over as many ranks as wished.

use anyhow::ensure;
use model::{ComputeType, ModelSpec};
use planner::{
    DeviceSpec, ExpertCut, Limits, NodeId, NodeSpec, PlanError, ShardPlan, plan, stripes,
};

use super::nodes::Nodes;

/// Ranks that are shown where neither nodes nor ranks are given.
const RANKS: [usize; 6] = [1, 2, 4, 8, 16, 32];
/// Tokens of a KV block; sizes are rounded up to whole ones.
pub(crate) const BLOCK: usize = 16;

/// What was asked for besides nodes.
pub(crate) struct Wish {
    pub(crate) ranks: Option<usize>,
    pub(crate) stripes: Option<usize>,
    /// How experts are divided among stripes.
    pub(crate) experts: ExpertCut,
    pub(crate) kv_tokens: usize,
}

/// One compute type over one set of ranks.
pub(crate) struct Fit {
    pub(crate) compute: ComputeType,
    pub(crate) stripes: usize,
    pub(crate) plan: Result<ShardPlan, PlanError>,
    /// Where it does not fit: the fewest ranks, each with a device of the largest kind, that would
    /// do; `None` in it where no number does.
    pub(crate) enough: Option<Option<usize>>,
    /// Where it fits nodes: KV tokens there is room for on the rank with the least.
    pub(crate) room_tokens: Option<u64>,
}

/// All fits, and on what.
pub(crate) struct Fits {
    pub(crate) nodes: Option<Nodes>,
    pub(crate) fits: Vec<Fit>,
}

impl Wish {
    /// Refuses what no model or this model cannot have.
    pub(crate) fn check(&self, spec: &ModelSpec) -> anyhow::Result<()> {
        let max = stripes::max_count(spec);
        if let Some(wanted) = self.stripes {
            stripes::validate(spec, wanted)?;
            let ranks = self.ranks.unwrap_or(1);
            ensure!(ranks <= wanted, "--ranks {ranks} is more than --stripes {wanted}");
        }
        if let Some(ranks) = self.ranks {
            ensure!(ranks > 0, "--ranks must be at least 1");
            ensure!(ranks <= max, "--ranks {ranks}: this model can be cut into {max} at most");
        }
        Ok(())
    }

    /// Stripes for so many ranks: as asked, or the default, doubled until every rank has one.
    fn stripes_for(&self, spec: &ModelSpec, ranks: usize) -> usize {
        let max = stripes::max_count(spec);
        let doubled = || {
            let mut count = stripes::default_count(spec);
            while count < ranks {
                count *= 2;
            }
            count.min(max)
        };
        self.stripes.unwrap_or_else(doubled)
    }

    pub(crate) fn limits(&self, spec: &ModelSpec, ranks: usize, compute: ComputeType) -> Limits {
        Limits {
            stripes: Some(self.stripes_for(spec, ranks)),
            ranks: Some(ranks),
            experts: self.experts,
            compute,
            kv_blocks: self.kv_tokens.div_ceil(BLOCK),
            block_tokens: BLOCK,
        }
    }
}

/// A plan over equal ranks with whatever memory it takes.
fn even(
    spec: &ModelSpec,
    wish: &Wish,
    ranks: usize,
    compute: ComputeType,
) -> Result<ShardPlan, PlanError> {
    let device = DeviceSpec { memory_bytes: u64::MAX, weight: 1.0 };
    let node = |id| NodeSpec { id: NodeId(id), devices: vec![device.clone()] };
    let nodes: Vec<NodeSpec> = (1..).take(ranks).map(node).collect();
    plan(spec, &nodes, &wish.limits(spec, ranks, compute))
}

/// Bytes of the rank that needs the most.
pub(crate) fn largest(plan: &ShardPlan) -> u64 {
    plan.ranks.iter().map(|rank| rank.weight_bytes.saturating_add(rank.kv_bytes)).max().unwrap_or(0)
}

/// On given nodes.
pub(crate) fn on(spec: &ModelSpec, nodes: &Nodes, wish: &Wish) -> anyhow::Result<Fits> {
    let max = wish.stripes.unwrap_or(stripes::max_count(spec));
    let devices = nodes.devices();
    let ranks = wish.ranks.unwrap_or(devices.min(max));
    ensure!(
        ranks <= devices,
        "--ranks {ranks} is more than the {devices} devices of {}",
        nodes.text
    );
    let specs = nodes.specs();
    let usable = nodes.kinds.iter().map(|kind| kind.usable_bytes).max().unwrap_or(0);
    let fit = |compute| {
        let limits = wish.limits(spec, ranks, compute);
        let plan = plan(spec, &specs, &limits);
        let enough = plan.is_err().then(|| {
            let fits = |ranks: &usize| {
                even(spec, wish, *ranks, compute).is_ok_and(|plan| largest(&plan) <= usable)
            };
            (1..=max).find(fits)
        });
        let room_tokens = plan.as_ref().ok().and_then(|plan| room(spec, &specs, plan, compute));
        Fit { compute, stripes: wish.stripes_for(spec, ranks), plan, enough, room_tokens }
    };
    let fits = ComputeType::ALL.into_iter().map(fit).collect();
    Ok(Fits { nodes: Some(nodes.clone()), fits })
}

/// KV tokens that the tightest rank has room for beside its weights.
fn room(
    spec: &ModelSpec,
    nodes: &[NodeSpec],
    plan: &ShardPlan,
    compute: ComputeType,
) -> Option<u64> {
    let of = |rank: &planner::RankPlan| {
        let node = nodes.iter().find(|node| node.id == rank.node)?;
        let free = node.devices.get(rank.device)?.memory_bytes.saturating_sub(rank.weight_bytes);
        let token = stripes::kv_bytes(spec, plan.stripes, &rank.stripes, compute, 1, 1);
        free.checked_div(token)
    };
    plan.ranks.iter().filter_map(of).min()
}

/// Over any ranks, whatever they need.
pub(crate) fn anywhere(spec: &ModelSpec, wish: &Wish) -> anyhow::Result<Fits> {
    let max = wish.stripes.unwrap_or(stripes::max_count(spec));
    let counts = match wish.ranks {
        Some(ranks) => vec![ranks],
        None => RANKS.into_iter().filter(|ranks| *ranks <= max).collect(),
    };
    let fit = |compute| counts.iter().map(move |ranks| (compute, *ranks));
    let fits = ComputeType::ALL.into_iter().flat_map(fit).map(|(compute, ranks)| Fit {
        compute,
        stripes: wish.stripes_for(spec, ranks),
        plan: even(spec, wish, ranks, compute),
        enough: None,
        room_tokens: None,
    });
    Ok(Fits { nodes: None, fits: fits.collect() })
}
