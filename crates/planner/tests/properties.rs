//! The cut and the plans over random models, devices and memories, against slower definitions.

#![allow(clippy::unwrap_used, reason = "a test may stop at once")]

use std::collections::BTreeSet;
use std::ops::Range;

use model::{
    Activation, Attention, ComputeType, Dense, Experts, Family, FeedForward, Format, Grouped,
    Latent, LatentUp, LayerSpec, ModelSpec, Pairs, Part, Rope, RopeScaling, Router, Score,
    Sharding, Shared,
};
use planner::stripes::{self, Slice};
use planner::{
    DeviceSpec, ExpertCut, Limits, NodeId, NodeSpec, PlanError, RankPlan, ShardPlan, plan,
};
use proptest::prelude::*;

fn rope(dims: usize) -> Rope {
    Rope { theta: 1e4, dims, pairs: Pairs::Halves, scaling: RopeScaling::None }
}

fn grouped() -> impl Strategy<Value = Attention> {
    let heads = (1usize..5, 1usize..5, 1usize..5);
    (heads, any::<[bool; 3]>()).prop_map(|((kv_heads, group, half), [bias, qk_norm, sinks])| {
        Attention::Grouped(Grouped {
            heads: kv_heads * group,
            kv_heads,
            head_dim: 2 * half,
            qkv_bias: bias,
            out_bias: bias,
            qk_norm,
            sinks,
            softcap: None,
            scale: 1.0,
            window: None,
            rope: rope(2 * half),
        })
    })
}

fn latent() -> impl Strategy<Value = Attention> {
    let ranks = (prop::option::of(1usize..50), 1usize..70);
    (1usize..17, ranks, 1usize..40, 1usize..5, 1usize..40).prop_map(
        |(heads, (query_rank, kv_rank), nope_dim, half, value_dim)| {
            let (rope_dim, scale) = (2 * half, 1.0);
            let rope = rope(rope_dim);
            Attention::Latent(Latent {
                heads,
                query_rank,
                kv_rank,
                nope_dim,
                rope_dim,
                value_dim,
                scale,
                rope,
                up: LatentUp::Joined,
            })
        },
    )
}

fn layer() -> impl Strategy<Value = LayerSpec> {
    let attention = prop_oneof![grouped(), latent()];
    let shared = prop::option::of((1usize..200, any::<bool>()));
    (attention, 1usize..200, 0usize..4, shared, any::<[bool; 2]>()).prop_map(
        |(attention, width, experts, shared, [bias, post_norms])| {
            let activation = Activation::Silu;
            let router = Router { bias, correction: post_norms, ..Router::plain(Score::Softmax) };
            let shared = shared.map(|(width, gated)| Shared { width, gated });
            let chosen = 1;
            let feed_forward = match experts {
                0 => FeedForward::Dense(Dense { width, bias, activation }),
                count => FeedForward::Experts(Experts {
                    count,
                    chosen,
                    width,
                    bias,
                    activation,
                    router,
                    shared,
                }),
            };
            LayerSpec { attention, feed_forward, post_norms }
        },
    )
}

/// Models whose layers differ, in sizes that divide by nothing.
fn spec() -> impl Strategy<Value = ModelSpec> {
    let layers = prop::collection::vec((layer(), 1usize..3), 1..4);
    (layers, 1usize..100, 1usize..300, any::<bool>()).prop_map(|(layers, hidden, vocab, tied)| {
        let layers = layers.into_iter().flat_map(|(layer, count)| vec![layer; count]).collect();
        ModelSpec {
            family: Family::Mixtral,
            hidden,
            vocab,
            context: 64,
            norm_eps: 1e-5,
            format: Format::Plain,
            norm_plus_one: false,
            embedding_scale: None,
            branch_scale: None,
            logit_scale: None,
            logit_softcap: None,
            tied,
            layers,
            bos: None,
            eos: vec![],
            ignored_prefixes: vec![],
        }
    })
}

fn compute() -> impl Strategy<Value = ComputeType> {
    prop::sample::select(&ComputeType::ALL[..])
}

/// A spec and a number of stripes that it can be cut into.
fn cut_spec() -> impl Strategy<Value = (ModelSpec, usize)> {
    (spec(), any::<prop::sample::Index>()).prop_map(|(spec, at)| {
        let stripes = 1 + at.index(stripes::max_count(&spec));
        (spec, stripes)
    })
}

/// Bytes of a slice `[rows, columns]` or of a vector, written down once more.
fn bytes(part: Part, shape: &[usize], compute: ComputeType) -> u64 {
    let bytes = match (shape, compute, part) {
        ([length], _, _) => 4 * length,
        ([rows, columns], ComputeType::F32, _) => rows * columns * 4,
        ([rows, columns], ComputeType::Bf16, _) => rows * columns * 2,
        ([rows, columns], _, Part::Embedding | Part::Head) => rows * columns * 2,
        ([rows, columns], _, Part::Router | Part::SharedRouter) => rows * columns * 2,
        ([rows, columns], ComputeType::Int4, _) => rows * (0..*columns).step_by(32).count() * 20,
        ([rows, columns], ComputeType::Int8, _) => {
            let blocks = (0..*columns).step_by(32).count();
            rows * (columns + 4 * blocks)
        }
        _ => unreachable!("tensors have one or two dimensions"),
    };
    bytes as u64
}

/// What a rank keeps, tensor by tensor and row by row.
fn slow_weight_bytes(spec: &ModelSpec, count: usize, held: &[usize], compute: ComputeType) -> u64 {
    let mut total = 0;
    for tensor in spec.tensors() {
        let mut rows = BTreeSet::new();
        for &stripe in held {
            match stripes::slice(&tensor, spec, count, stripe) {
                Slice::Whole => rows.extend(0..tensor.shape[0]),
                Slice::Rows(range) => rows.extend(range),
                Slice::Columns(range) => {
                    total += bytes(tensor.part, &[tensor.shape[0], range.len()], compute);
                }
            }
        }
        let attention = tensor.layer.map(|layer| &spec.layers[layer].attention);
        if let (Some(Attention::Latent(latent)), Part::LatentUp) = (attention, tensor.part) {
            // Of every head, what multiplies queries is kept transposed.
            let (nope, value) = (latent.nope_dim, latent.value_dim);
            let keys = |row: &&usize| **row % (nope + value) < nope;
            assert_eq!(rows.iter().filter(keys).count() * (nope + value), rows.len() * nope);
            let head = bytes(tensor.part, &[latent.kv_rank, nope], compute)
                + bytes(tensor.part, &[value, latent.kv_rank], compute);
            total += head * (rows.len() / (nope + value)) as u64;
            continue;
        }
        let mut shape = tensor.shape.clone();
        shape[0] = rows.len();
        total += bytes(tensor.part, &shape, compute);
    }
    total
}

/// All ways to give `stripes` to `ranks` in runs, each at least one.
fn compositions(stripes: usize, ranks: usize) -> Vec<Vec<usize>> {
    if ranks == 1 {
        return vec![vec![stripes]];
    }
    let with = |first: usize| {
        compositions(stripes - first, ranks - 1).into_iter().map(move |mut rest| {
            rest.insert(0, first);
            rest
        })
    };
    (1..=stripes - (ranks - 1)).flat_map(with).collect()
}

fn runs(shares: &[usize]) -> Vec<Vec<usize>> {
    let mut begin = 0;
    let run = |share: &usize| {
        begin += share;
        (begin - share..begin).collect()
    };
    shares.iter().map(run).collect()
}

/// Disjoint, ascending, without a gap, from 0 to `end`, none empty.
fn tiles(ranges: &[Range<usize>], end: usize) -> bool {
    ranges.first().is_some_and(|first| first.start == 0)
        && ranges.last().is_some_and(|last| last.end == end)
        && ranges.windows(2).all(|pair| pair[0].end == pair[1].start)
        && ranges.iter().all(|range| !range.is_empty())
}

fn one_device_nodes(devices: &[(u64, f64)]) -> Vec<NodeSpec> {
    let node = |(at, &(memory_bytes, weight)): (usize, &(u64, f64))| NodeSpec {
        id: NodeId(at as u64),
        devices: vec![DeviceSpec { memory_bytes, weight }],
    };
    devices.iter().enumerate().map(node).collect()
}

/// A model that 16 stripes divide.
fn wide() -> ModelSpec {
    ModelSpec::from_config(
        r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 512,
            "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 4,
            "max_position_embeddings": 64, "vocab_size": 100}"#,
    )
    .unwrap()
}

proptest! {
    #[test]
    fn stripes_tile_every_dimension((spec, count) in cut_spec()) {
        for tensor in spec.tensors() {
            let (mut rows, mut columns) = (vec![], vec![]);
            for stripe in 0..count {
                match stripes::slice(&tensor, &spec, count, stripe) {
                    Slice::Whole => prop_assert_eq!(tensor.sharding, Sharding::Replicated),
                    Slice::Rows(range) => rows.push(range),
                    Slice::Columns(range) => columns.push(range),
                }
            }
            match tensor.sharding {
                Sharding::Replicated => {}
                Sharding::KvHeads => {
                    // Ascending and complete; neighbours may share a head.
                    prop_assert_eq!((rows[0].start, rows[count - 1].end), (0, tensor.shape[0]));
                    for pair in rows.windows(2) {
                        prop_assert!(pair[0].start <= pair[1].start && pair[0].end <= pair[1].end);
                        prop_assert!(pair[1].start <= pair[0].end);
                    }
                    prop_assert!(rows.iter().all(|range| !range.is_empty()));
                }
                Sharding::QueryHeadColumns | Sharding::WidthColumns => {
                    prop_assert!(tiles(&columns, tensor.shape[1]), "{columns:?}");
                }
                _ => prop_assert!(tiles(&rows, tensor.shape[0]), "{rows:?}"),
            }
        }
    }

    #[test]
    fn kv_heads_are_those_the_query_heads_read(
        kv in 1usize..9,
        group in 1usize..9,
        stripes in 1usize..65,
    ) {
        let heads = kv * group;
        let stripes = stripes.min(heads);
        for stripe in 0..stripes {
            let read: BTreeSet<usize> =
                stripes::query_heads(heads, stripes, stripe).map(|head| head / group).collect();
            let held: BTreeSet<usize> = stripes::kv_heads(heads, kv, stripes, stripe).collect();
            prop_assert_eq!(read, held);
        }
    }

    #[test]
    fn columns_are_cut_at_blocks(
        width in 1usize..5000,
        stripes in 1usize..65,
        stored in prop::sample::select(&[1usize, 32, 64, 128, 256][..]),
    ) {
        prop_assume!(width >= stripes);
        let block = stripes::block_width(width, stored, stripes);
        prop_assert!(block == stored.max(32) || width.div_ceil(2 * block) < stripes);
        let runs: Vec<Range<usize>> =
            (0..stripes).map(|s| stripes::columns(width, stored, stripes, s)).collect();
        prop_assert!(tiles(&runs, width));
        prop_assert!(runs.iter().all(|run| run.start % block == 0));
        let blocks = runs.iter().map(|run| run.len().div_ceil(block));
        prop_assert!(blocks.clone().max().unwrap() - blocks.min().unwrap() <= 1);
    }

    #[test]
    fn sizes_agree_with_the_definition(
        (spec, count) in cut_spec(),
        chosen in prop::collection::vec(any::<bool>(), 16),
        compute in compute(),
        (blocks, block_tokens) in (0usize..9, 0usize..9),
    ) {
        let held: Vec<usize> = (0..count).filter(|&stripe| chosen[stripe]).collect();
        let mut cache = 0;
        for layer in &spec.layers {
            let columns = match &layer.attention {
                Attention::Grouped(grouped) => {
                    let heads: BTreeSet<usize> = held
                        .iter()
                        .flat_map(|&s| stripes::kv_heads(grouped.heads, grouped.kv_heads, count, s))
                        .collect();
                    2 * heads.len() * grouped.head_dim
                }
                // One latent and one rotated key on every rank, however many stripes it has.
                Attention::Latent(_) if held.is_empty() => 0,
                Attention::Latent(latent) => latent.kv_rank + latent.rope_dim,
            };
            let element = if compute == ComputeType::F32 { 4 } else { 2 };
            cache += (columns * element * blocks * block_tokens) as u64;
        }
        let kv_bytes = stripes::kv_bytes(&spec, count, &held, compute, blocks, block_tokens);
        prop_assert_eq!(kv_bytes, cache);
        if !held.is_empty() {
            let weights = stripes::weight_bytes(&spec, count, &held, compute);
            prop_assert_eq!(weights, slow_weight_bytes(&spec, count, &held, compute));
        }
    }

    /// Every accepted plan is whole, exact and within memory; a refusal means that none would be.
    #[test]
    fn plans_are_right_and_refusals_are_true(
        (spec, count) in cut_spec(),
        devices in prop::collection::vec((0u64..=100, 0.01f64..10.0), 1..9),
        ranks in any::<prop::sample::Index>(),
        compute in compute(),
    ) {
        let ranks = 1 + ranks.index(devices.len().min(count));
        let (kv_blocks, block_tokens) = (3, 2);
        let (stripes, wanted) = (Some(count), Some(ranks));
        let limits = Limits {
            stripes,
            ranks: wanted,
            experts: ExpertCut::Stripe,
            compute,
            kv_blocks,
            block_tokens,
        };
        let sizes = |held: &[usize]| {
            let weights = stripes::weight_bytes(&spec, count, held, compute);
            (weights, stripes::kv_bytes(&spec, count, held, compute, kv_blocks, block_tokens))
        };
        let needed = |held: &[usize]| sizes(held).0 + sizes(held).1;
        // Memory around a fair share, so that all outcomes are frequent.
        let whole = needed(&(0..count).collect::<Vec<_>>());
        let devices: Vec<(u64, f64)> = devices
            .into_iter()
            .map(|(percent, weight)| (whole * percent / 25 / ranks as u64, weight))
            .collect();
        let possible = |taken: &[(u64, f64)]| {
            let fits = |shares: &Vec<usize>| {
                runs(shares).iter().zip(taken).all(|(held, (room, _))| needed(held) <= *room)
            };
            let mut possible = compositions(count, ranks);
            possible.retain(fits);
            possible
        };
        // The time of the slowest rank.
        let slowest = |shares: &[usize], taken: &[(u64, f64)]| {
            let times = shares.iter().zip(taken).map(|(&share, (_, weight))| share as f64 / weight);
            times.fold(0.0, f64::max)
        };
        let nodes = one_device_nodes(&devices);
        let first = possible(&devices[..ranks]);
        match plan(&spec, &nodes, &limits) {
            Ok(plan) => {
                let number = |rank: &RankPlan| {
                    nodes.iter().position(|node| node.id == rank.node).expect("one of the nodes")
                };
                let numbers: Vec<usize> = plan.ranks.iter().map(number).collect();
                prop_assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]));
                let taken: Vec<(u64, f64)> = numbers.iter().map(|&n| devices[n]).collect();
                // Others than the first are taken only where the first do not fit.
                let firsts = numbers.iter().copied().eq(0..ranks);
                prop_assert!(firsts || first.is_empty());
                let possible = possible(&taken);
                prop_assert_eq!(plan.check(&spec), Ok(()));
                prop_assert_eq!((plan.stripes, plan.ranks.len()), (count, ranks));
                for rank in &plan.ranks {
                    prop_assert_eq!((rank.weight_bytes, rank.kv_bytes), sizes(&rank.stripes));
                }
                let held: Vec<Vec<usize>> =
                    plan.ranks.iter().map(|rank| rank.stripes.clone()).collect();
                let shares: Vec<usize> = held.iter().map(Vec::len).collect();
                prop_assert!(possible.contains(&shares));
                prop_assert_eq!(held, runs(&shares));
                // Without memory limits, the same devices would get the split by weight; if this
                // is another one, none that fits is faster.
                let room: Vec<(u64, f64)> =
                    taken.iter().map(|&(_, weight)| (u64::MAX, weight)).collect();
                let free = planner::plan(&spec, &one_device_nodes(&room), &limits).unwrap();
                let stripes_of = |plan: &ShardPlan| -> Vec<Vec<usize>> {
                    plan.ranks.iter().map(|rank| rank.stripes.clone()).collect()
                };
                if stripes_of(&free) != stripes_of(&plan) {
                    let best = possible.iter().map(|shares| slowest(shares, &taken));
                    prop_assert_eq!(slowest(&shares, &taken), best.fold(f64::INFINITY, f64::min));
                }
            }
            Err(PlanError::DoesNotFit { shortages, .. }) => {
                prop_assert!(first.is_empty(), "possible: {first:?}");
                let mut roomiest: Vec<usize> = (0..devices.len()).collect();
                roomiest.sort_by_key(|&n| std::cmp::Reverse(devices[n].0));
                roomiest.truncate(ranks);
                roomiest.sort_unstable();
                let roomiest: Vec<(u64, f64)> = roomiest.iter().map(|&n| devices[n]).collect();
                prop_assert!(possible(&roomiest).is_empty());
                prop_assert!(!shortages.is_empty());
                for shortage in shortages {
                    prop_assert_eq!(shortage.available + shortage.missing, shortage.needed);
                    prop_assert!(shortage.missing > 0);
                }
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
    }

    /// With room everywhere, more weight never means fewer stripes, and no share exceeds its quota
    /// by a stripe unless it is the least possible.
    #[test]
    fn shares_follow_weights(weights in prop::collection::vec(0.01f64..10.0, 1..9)) {
        let devices: Vec<(u64, f64)> = weights.iter().map(|&weight| (u64::MAX, weight)).collect();
        let compute = ComputeType::Bf16;
        let (stripes, ranks) = (Some(16), None);
        let limits = Limits {
            stripes,
            ranks,
            experts: ExpertCut::Stripe,
            compute,
            kv_blocks: 1,
            block_tokens: 1,
        };
        let plan: ShardPlan = plan(&wide(), &one_device_nodes(&devices), &limits).unwrap();
        let shares: Vec<usize> = plan.ranks.iter().map(|rank| rank.stripes.len()).collect();
        let total: f64 = weights.iter().sum();
        for (a, weight) in shares.iter().zip(&weights) {
            let quota = 16.0 * weight / total;
            prop_assert!(*a == 1 || (*a as f64) < quota + 1.0, "{a} for {quota}");
            for (b, other) in shares.iter().zip(&weights) {
                prop_assert!(weight <= other || a >= b);
            }
        }
    }

    /// A plan from anywhere passes the check only if every stripe is on exactly one rank.
    #[test]
    fn checks_accept_partitions_only(
        owners in prop::collection::vec(0usize..3, 16),
        extra in 0usize..40,
    ) {
        let spec = wide();
        let mut plan = ShardPlan { stripes: 16, ranks: vec![] };
        for rank in 0..3 {
            let mut stripes: Vec<usize> = (0..16).collect();
            stripes.retain(|&stripe| owners[stripe] == rank);
            if rank == 2 && extra < 18 && !stripes.contains(&extra) {
                stripes.push(extra);
                stripes.sort_unstable();
            }
            let node = NodeId(rank as u64);
            plan.ranks.push(RankPlan {
                rank,
                node,
                device: 0,
                stripes,
                weight_bytes: 0,
                kv_bytes: 0,
            });
        }
        let held: Vec<usize> = plan.ranks.iter().flat_map(|rank| rank.stripes.clone()).collect();
        let partition = held.len() == 16
            && held.iter().all(|&stripe| stripe < 16)
            && plan.ranks.iter().all(|rank| !rank.stripes.is_empty());
        prop_assert_eq!(plan.check(&spec).is_ok(), partition);
    }
}

#[test]
fn small_models_have_fewer_stripes() {
    let mut spec = wide();
    let Attention::Grouped(grouped) = &mut spec.layers[0].attention else {
        panic!("no grouped attention");
    };
    grouped.heads = 6;
    grouped.kv_heads = 2;
    assert_eq!((stripes::max_count(&spec), stripes::default_count(&spec)), (6, 4));
    spec.vocab = 3;
    assert_eq!((stripes::max_count(&spec), stripes::default_count(&spec)), (3, 2));
    assert_eq!(stripes::default_count(&wide()), 8);
}

#[test]
fn stripes_that_do_not_exist_have_nothing() {
    assert!(stripes::query_heads(8, 0, 0).is_empty());
    assert!(stripes::query_heads(8, 4, 4).is_empty());
    assert!(stripes::kv_heads(8, 0, 4, 0).is_empty());
    assert!(stripes::columns(100, 1, 4, 9).is_empty());
    assert!(stripes::vocab(100, 4, usize::MAX).is_empty());
    // Nothing but the replicated norms.
    assert_eq!(stripes::weight_bytes(&wide(), 4, &[9], ComputeType::F32), 3 * 64 * 4);
}
