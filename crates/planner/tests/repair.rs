//! The plan after a loss: what is there stays, what is lost moves once, and nothing else.

#![allow(clippy::unwrap_used, reason = "a test may stop at once")]

use std::collections::BTreeSet;

use model::{ComputeType, ModelSpec};
use planner::{
    DeviceSpec, ExpertCut, Limits, NodeId, NodeSpec, PlanError, ShardPlan, plan, repair,
};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

fn spec() -> ModelSpec {
    ModelSpec::from_config(
        r#"{"architectures": ["MixtralForCausalLM"], "hidden_size": 256, "head_dim": 32,
            "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
            "max_position_embeddings": 1024, "vocab_size": 2048}"#,
    )
    .unwrap()
}

/// Nodes of one device, by number.
fn nodes(numbers: impl IntoIterator<Item = u64>) -> Vec<NodeSpec> {
    let device = DeviceSpec { memory_bytes: GIB, weight: 1.0 };
    let node = |id| NodeSpec { id: NodeId(id), devices: vec![device.clone()] };
    numbers.into_iter().map(node).collect()
}

fn limits(ranks: usize) -> Limits {
    let compute = ComputeType::Bf16;
    let (ranks, experts) = (Some(ranks), ExpertCut::Stripe);
    Limits { stripes: None, ranks, experts, compute, kv_blocks: 64, block_tokens: 16 }
}

/// By rank: its node and its stripes.
fn held(plan: &ShardPlan) -> Vec<(u64, Vec<usize>)> {
    plan.ranks.iter().map(|rank| (rank.node.0, rank.stripes.clone())).collect()
}

#[test]
fn a_spare_takes_exactly_what_was_lost() {
    let spec = spec();
    let before = plan(&spec, &nodes(1..=3), &limits(3)).unwrap();
    assert_eq!(held(&before), [(1, vec![0, 1, 2]), (2, vec![3, 4, 5]), (3, vec![6, 7])]);
    let after = repair(&spec, &before, &nodes([1, 3, 4, 5]), &limits(3)).unwrap();
    assert_eq!(held(&after), [(1, vec![0, 1, 2]), (3, vec![6, 7]), (4, vec![3, 4, 5])]);
    // The leader's own loss: the next one leads.
    let after = repair(&spec, &before, &nodes([2, 3, 4]), &limits(3)).unwrap();
    assert_eq!(held(&after), [(2, vec![3, 4, 5]), (3, vec![6, 7]), (4, vec![0, 1, 2])]);
}

#[test]
fn without_a_spare_those_that_stay_share_what_was_lost() {
    let spec = spec();
    let before = plan(&spec, &nodes(1..=3), &limits(3)).unwrap();
    let after = repair(&spec, &before, &nodes([1, 3]), &limits(3)).unwrap();
    assert_eq!(held(&after), [(1, vec![0, 1, 2, 4]), (3, vec![3, 5, 6, 7])]);
    let last = repair(&spec, &after, &nodes([3]), &limits(3)).unwrap();
    assert_eq!(held(&last), [(3, (0..8).collect())]);
    // Nobody new, nobody lost: nothing moves.
    assert_eq!(repair(&spec, &after, &nodes([1, 3]), &limits(3)).unwrap(), after);
    // One that comes back takes a fair share, of those that have most.
    let wider = repair(&spec, &after, &nodes([1, 2, 3]), &limits(3)).unwrap();
    assert_eq!(held(&wider), [(1, vec![0, 1, 2]), (3, vec![3, 5, 6]), (2, vec![4, 7])]);
}

#[test]
fn what_has_no_room_is_refused_with_what_lacks() {
    let spec = spec();
    let before = plan(&spec, &nodes(1..=2), &limits(2)).unwrap();
    let mut small = nodes([2]);
    let rank = &before.ranks[1];
    small[0].devices[0].memory_bytes = rank.weight_bytes + rank.kv_bytes;
    let error = repair(&spec, &before, &small, &limits(2)).unwrap_err();
    let PlanError::DoesNotFit { stripes: 8, ranks: 1, shortages } = error else {
        panic!("{error}")
    };
    assert!(shortages[0].node == NodeId(2) && shortages[0].missing > 0, "{shortages:?}");
}

proptest! {
    #[test]
    fn whatever_is_lost_the_rest_stays(
        ranks in 1usize..=8,
        gone in prop::collection::btree_set(1u64..=8, 0..8),
        spares in 0u64..4,
        wished in 1usize..=8,
    ) {
        let spec = spec();
        let before = plan(&spec, &nodes(1..=ranks as u64), &limits(ranks)).unwrap();
        let there: Vec<u64> =
            (1..=ranks as u64).filter(|id| !gone.contains(id)).chain(20..20 + spares).collect();
        prop_assume!(!there.is_empty());
        let wished = wished.max(ranks);
        let after = repair(&spec, &before, &nodes(there.iter().copied()), &limits(wished)).unwrap();
        prop_assert_eq!(after.check(&spec), Ok(()));
        prop_assert!(after.ranks.len() <= wished);
        let stayed = ranks - gone.iter().filter(|id| **id <= ranks as u64).count();
        prop_assert_eq!(after.ranks.len(), wished.min(stayed + spares as usize));
        let fresh: BTreeSet<NodeId> = (20..24).map(NodeId).collect();
        for rank in &after.ranks {
            let known = before.ranks.iter().find(|one| one.node == rank.node);
            let Some(known) = known else {
                prop_assert!(fresh.contains(&rank.node));
                continue;
            };
            // A rank that stays gives stripes to new ranks only, and only beyond what was wished.
            let kept = known.stripes.iter().filter(|stripe| rank.stripes.contains(stripe)).count();
            let taken = known.stripes.iter().filter(|stripe| {
                let by = after.ranks.iter().find(|one| one.stripes.contains(stripe)).unwrap();
                fresh.contains(&by.node)
            });
            prop_assert_eq!(kept + taken.count(), known.stripes.len());
            if wished == ranks {
                prop_assert_eq!(kept, known.stripes.len(), "a spare for a lost one moves no more");
            }
        }
        // Nobody is slower than the others by more than a stripe, but for those that were before.
        let most = after.ranks.iter().map(|rank| rank.stripes.len()).max().unwrap();
        let had = before.ranks.iter().map(|rank| rank.stripes.len()).max().unwrap();
        prop_assert!(most <= had.max(8usize.div_ceil(after.ranks.len())));
    }
}
