//! The choice of experts: against plain f64, ties, NaN, groups with negative scores.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod support;

use compute::{Device, GroupScore, Groups, Routes, Routing, Score};
use support::*;

const PLAIN: Routing<'static> = Routing {
    chosen: 2,
    score: Score::Softmax,
    renormalise: true,
    scale: 1.0,
    groups: None,
    correction: None,
};

fn route(logits: &[f32], experts: usize, routing: &Routing<'_>) -> Routes {
    let device = plain();
    let routes = device.route(&tensor(&device, experts, logits), routing).unwrap();
    for device in devices() {
        let other = device.route(&tensor(&device, experts, logits), routing).unwrap();
        assert_eq!(other.experts, routes.experts, "{device:?}");
        assert_eq!(bits(&other.weights), bits(&routes.weights), "{device:?}");
    }
    routes
}

#[test]
fn routes_take_the_largest_and_the_lower_id_on_ties() {
    let logits = [1.0, 3.0, 3.0, -1.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    let routes = route(&logits, 5, &PLAIN);
    assert_eq!(routes.experts, [1, 2, 0, 1]);
    assert_eq!(routes.weights, [0.5; 4]);
    let routes = route(&logits, 5, &Routing { chosen: 5, renormalise: false, ..PLAIN });
    assert_eq!(routes.experts, [1, 2, 4, 0, 3, 0, 1, 2, 3, 4]);
    assert_eq!(routes.weights[5..], [0.2; 5]);
    let sum: f64 = [1.0_f64, 3.0, 3.0, -1.0, 3.0].iter().map(|l| l.exp()).sum();
    for (weight, logit) in routes.weights.iter().zip([3.0_f64, 3.0, 3.0, 1.0, -1.0]) {
        assert!((f64::from(*weight) - logit.exp() / sum).abs() < 1e-7);
    }
}

#[test]
fn routes_of_nan_are_defined() {
    let logits = [1.0, f32::NAN, 2.0, 1.0, f32::NEG_INFINITY, 5.0];
    let routes = route(&logits, 3, &PLAIN);
    assert_eq!(routes.experts, [0, 1, 2, 0]);
    assert!(routes.weights[..2].iter().all(|w| w.is_nan()));
    assert!((routes.weights[2] + routes.weights[3] - 1.0).abs() < 1e-6);
    let empty = route(&logits, 3, &Routing { chosen: 0, ..PLAIN });
    assert_eq!((empty.chosen, empty.experts.len()), (0, 0));
    let minus = [f32::NEG_INFINITY; 2];
    assert_eq!(route(&minus, 2, &Routing { renormalise: false, ..PLAIN }).experts, [0, 1]);
    // Where scores are each for itself, the others stay sound.
    for score in [Score::Sigmoid, Score::SoftmaxOfChosen] {
        let routes = route(&logits, 3, &Routing { score, ..PLAIN });
        assert_eq!(routes.experts, [2, 0, 2, 0]);
        assert!(routes.weights.iter().all(|w| w.is_finite()));
        let groups = Some(Groups { count: 3, chosen: 2, by: GroupScore::Max });
        assert_eq!(route(&logits, 3, &Routing { score, groups, ..PLAIN }).experts[..2], [2, 0]);
    }
}

/// One row in f64, from the definitions; ids in order of choice.
fn exact(logits: &[f32], routing: &Routing<'_>) -> Vec<(usize, f64)> {
    let logits: Vec<f64> = logits.iter().map(|l| f64::from(*l)).collect();
    let softmax = |l: &[f64]| {
        let sum: f64 = l.iter().map(|l| l.exp()).sum();
        l.iter().map(|l| l.exp() / sum).collect::<Vec<_>>()
    };
    let scores: Vec<f64> = match routing.score {
        Score::Softmax => softmax(&logits),
        Score::SoftmaxOfChosen => logits.clone(),
        Score::Sigmoid => logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect(),
    };
    let mut choice = scores.clone();
    if let Some(correction) = routing.correction {
        choice.iter_mut().zip(correction).for_each(|(s, c)| *s += f64::from(*c));
    }
    let best = |values: &[f64], count: usize| {
        let mut ids: Vec<usize> = (0..values.len()).collect();
        ids.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
        ids.truncate(count);
        ids
    };
    if let Some(groups) = routing.groups {
        let each = choice.len() / groups.count;
        let judged: Vec<f64> = choice
            .chunks(each)
            .map(|group| {
                let top = best(group, 2);
                match groups.by {
                    GroupScore::Max => group[top[0]],
                    GroupScore::TopTwoSum => group[top[0]] + group[top[1]],
                }
            })
            .collect();
        let kept = best(&judged, groups.chosen);
        for (id, choice) in choice.iter_mut().enumerate() {
            if !kept.contains(&(id / each)) {
                *choice = match groups.by {
                    GroupScore::Max => 0.0,
                    GroupScore::TopTwoSum => f64::NEG_INFINITY,
                };
            }
        }
    }
    let ids = best(&choice, routing.chosen);
    let mut weights: Vec<f64> = ids.iter().map(|id| scores[*id]).collect();
    if routing.score == Score::SoftmaxOfChosen {
        weights = softmax(&weights);
    }
    let sum: f64 = if routing.renormalise { weights.iter().sum::<f64>() + 1e-20 } else { 1.0 };
    weights.iter_mut().for_each(|w| *w = *w / sum * f64::from(routing.scale));
    ids.into_iter().zip(weights).collect()
}

#[test]
fn every_kind_of_routing_is_near_f64() {
    let (rows, experts) = (if cfg!(miri) { 3 } else { 40 }, 32);
    let mut numbers = Numbers(77);
    let logits = numbers.take(rows * experts);
    // Often below minus the score: biased scores of both signs.
    let correction: Vec<f32> = numbers.take(experts).iter().map(|c| c - 0.8).collect();
    let groups = |by| Some(Groups { count: 8, chosen: 3, by });
    let base = Routing { chosen: 6, scale: 2.5, ..PLAIN };
    let v3 = Routing {
        score: Score::Sigmoid,
        groups: groups(GroupScore::TopTwoSum),
        correction: Some(&correction),
        ..base
    };
    let kinds = [
        base,
        Routing { renormalise: false, ..base },
        Routing { score: Score::SoftmaxOfChosen, renormalise: false, scale: 1.0, ..base },
        Routing { score: Score::Sigmoid, ..base },
        Routing { correction: Some(&correction), ..base },
        Routing { renormalise: false, groups: groups(GroupScore::Max), scale: 16.0, ..base },
        v3,
        Routing { renormalise: false, ..v3 },
    ];
    for routing in kinds {
        let routes = route(&logits, experts, &routing);
        assert_eq!(routes.experts.len(), rows * 6);
        for (row, logits) in logits.chunks(experts).enumerate() {
            let slots = row * 6..row * 6 + 6;
            let got = routes.experts[slots.clone()].iter().zip(&routes.weights[slots]);
            for ((id, weight), (exact_id, exact)) in got.zip(exact(logits, &routing)) {
                assert_eq!(*id as usize, exact_id, "row {row} of {routing:?}");
                let error = (f64::from(*weight) - exact).abs();
                assert!(error <= exact.abs() * 2e-6, "{weight} is not {exact}: {routing:?}");
            }
        }
        // A row alone is the same row.
        let alone = route(&logits[..experts], experts, &routing);
        assert_eq!(bits(&alone.weights), bits(&routes.weights[..6]));
    }
}

#[test]
fn groups_with_negative_scores_are_still_chosen_from() {
    // All biased scores are negative. Kept: group 1. Masked to 0, group 0 would win.
    let logits = [0.0, 0.0, 0.0, 0.0];
    let correction = [-3.0, -2.9, -1.0, -1.5];
    let by = |by| Routing {
        score: Score::Sigmoid,
        correction: Some(&correction),
        groups: Some(Groups { count: 2, chosen: 1, by }),
        ..PLAIN
    };
    let routes = route(&logits, 4, &by(GroupScore::TopTwoSum));
    assert_eq!((routes.experts, routes.weights), (vec![2, 3], vec![0.5, 0.5]));
    let routes = route(&logits, 4, &by(GroupScore::Max));
    assert_eq!((routes.experts, routes.weights[0]), (vec![0, 1], 0.0));
}

#[test]
fn groups_are_judged_by_two_or_by_one() {
    // Group 0 has the largest, group 1 the largest pair, group 2 equals group 1.
    let logits = [3.0, -9.0, -9.0, 2.0, 1.9, -9.0, 2.0, 1.9, -9.0];
    let by = |chosen, by| Routing {
        score: Score::Sigmoid,
        groups: Some(Groups { count: 3, chosen, by }),
        ..PLAIN
    };
    assert_eq!(route(&logits, 9, &by(1, GroupScore::TopTwoSum)).experts, [3, 4]);
    assert_eq!(route(&logits, 9, &by(2, GroupScore::TopTwoSum)).experts, [3, 6]);
    assert_eq!(route(&logits, 9, &by(1, GroupScore::Max)).experts, [0, 1]);
    assert_eq!(route(&logits, 9, &by(2, GroupScore::Max)).experts, [0, 3]);
}

#[test]
fn weights_that_vanish_do_not_divide_by_zero() {
    let routing = Routing { score: Score::Sigmoid, scale: 2.5, ..PLAIN };
    let routes = route(&[-300.0; 3], 3, &routing);
    assert_eq!((routes.experts, routes.weights), (vec![0, 1], vec![0.0, 0.0]));
}
