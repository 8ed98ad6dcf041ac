//! Tests of the sampler: known answers, distributions, each parameter's effect, edges.

use super::*;

/// Plain sampling at temperature 1.
fn plain() -> Sampling {
    Sampling {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        logit_bias: Vec::new(),
        seed: 42,
        choice: 0,
    }
}

fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..plain() }
}

fn history<'a>(prompt: &'a [u32], generated: &'a [u32], forbidden: &'a [u32]) -> History<'a> {
    History { prompt, generated, forbidden }
}

/// How often each id is drawn at positions `1..=draws`.
fn tally(logits: &[f32], sampling: &Sampling, draws: usize) -> Vec<u32> {
    let prompt = vec![0; draws];
    let mut counts = vec![0; logits.len()];
    for position in 1..=draws {
        let id = choose(logits, sampling, history(&prompt[..position], &[], &[]));
        counts[id as usize] += 1;
    }
    counts
}

/// Ids that are ever drawn.
fn support(logits: &[f32], sampling: &Sampling) -> Vec<usize> {
    let counts = tally(logits, sampling, 2000);
    counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(id, _)| id).collect()
}

/// Pearson's statistic of counts against probabilities; none may be drawn where the latter is 0.
fn chi_square(counts: &[u32], probabilities: &[f64]) -> f64 {
    let draws: u32 = counts.iter().sum();
    let mut sum = 0.0;
    for (&count, &probability) in counts.iter().zip(probabilities) {
        let expected = probability * f64::from(draws);
        if expected == 0.0 {
            assert_eq!(count, 0);
        } else {
            sum += (f64::from(count) - expected).powi(2) / expected;
        }
    }
    sum
}

/// Logits whose softmax at temperature 1 is `probabilities`.
fn logits_of(probabilities: &[f64]) -> Vec<f32> {
    probabilities.iter().map(|&p| p.ln() as f32).collect()
}

// The vectors published with the Random123 library for philox4x32-10.
#[test]
fn generator_gives_the_published_answers() {
    let zeros = philox4x32([0; 4], [0; 2]);
    assert_eq!(zeros, [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
    let ones = philox4x32([u32::MAX; 4], [u32::MAX; 2]);
    assert_eq!(ones, [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
    let pi = philox4x32([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]);
    assert_eq!(pi, [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
}

#[test]
fn uniform_depends_on_every_part_of_its_key() {
    let base = uniform(1, 2, 3);
    assert_eq!(base, uniform(1, 2, 3));
    let others = [(2, 2, 3), (1 | 1 << 32, 2, 3), (1, 3, 3), (1, 2, 4), (1, 2, 3 | 1 << 32)];
    for (seed, choice, position) in others {
        assert_ne!(base, uniform(seed, choice, position));
    }
    assert!((0..10_000).all(|position| (0.0..1.0).contains(&uniform(9, 0, position))));
}

#[test]
fn draws_follow_the_softmax() {
    let probabilities = [0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01];
    let logits = logits_of(&probabilities);
    // 6 degrees of freedom: above 22.46 once in a thousand.
    let right = chi_square(&tally(&logits, &plain(), 20_000), &probabilities);
    assert!(right < 22.46, "{right}");
    let uneven = chi_square(&tally(&logits, &plain(), 20_000), &[1.0 / 7.0; 7]);
    assert!(uneven > 1000.0, "{uneven}");
}

#[test]
fn choices_of_one_request_are_independent() {
    let logits = vec![0.0; 4];
    let second = Sampling { choice: 1, ..plain() };
    let prompt = vec![0; 8000];
    let mut pairs = vec![0; 16];
    for position in 1..=prompt.len() {
        let at = history(&prompt[..position], &[], &[]);
        pairs[(choose(&logits, &plain(), at) * 4 + choose(&logits, &second, at)) as usize] += 1;
    }
    // 15 degrees of freedom: above 37.7 once in a thousand.
    assert!(chi_square(&pairs, &[1.0 / 16.0; 16]) < 37.7);
}

#[test]
fn temperature_sharpens_and_flattens() {
    let probabilities = [0.6, 0.3, 0.1];
    let logits = logits_of(&probabilities);
    let half = Sampling { temperature: 0.5, ..plain() };
    let squares = [0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46];
    assert!(chi_square(&tally(&logits, &half, 10_000), &squares) < 13.8);
    let huge = Sampling { temperature: f32::MAX, ..plain() };
    assert!(chi_square(&tally(&logits, &huge, 10_000), &[1.0 / 3.0; 3]) < 13.8);
    for tiny in [1e-6, f32::MIN_POSITIVE, f32::from_bits(1)] {
        assert_eq!(support(&logits, &Sampling { temperature: tiny, ..plain() }), [0]);
    }
}

#[test]
fn greedy_takes_the_best_and_the_lower_of_equals() {
    let at = history(&[0], &[], &[]);
    assert_eq!(choose(&[0.5, 2.0, -1.0, 2.0], &greedy(), at), 1);
    assert_eq!(choose(&[3.0; 5], &greedy(), at), 0);
    // The same through the path that adjusts scores.
    let biased = Sampling { logit_bias: vec![(0, 1.5)], ..greedy() };
    assert_eq!(choose(&[0.5, 2.0, -1.0, 2.0], &biased, at), 0);
}

#[test]
fn top_k_keeps_k_and_the_lower_of_equals() {
    let logits = [1.0, 3.0, 2.0, 2.0, 0.0];
    let with = |top_k| Sampling { top_k, ..plain() };
    assert_eq!(support(&logits, &with(1)), [1]);
    assert_eq!(support(&logits, &with(2)), [1, 2]);
    assert_eq!(support(&logits, &with(3)), [1, 2, 3]);
    assert_eq!(support(&logits, &with(0)), [0, 1, 2, 3, 4]);
    for beyond in [5, 6, u32::MAX] {
        assert_eq!(tally(&logits, &with(beyond), 500), tally(&logits, &plain(), 500));
    }
}

#[test]
fn top_p_keeps_the_fewest_that_reach_it() {
    let logits = logits_of(&[0.1, 0.5, 0.1, 0.3]);
    let with = |top_p| Sampling { top_p, ..plain() };
    assert_eq!(support(&logits, &with(f32::MIN_POSITIVE)), [1]);
    assert_eq!(support(&logits, &with(0.49)), [1]);
    assert_eq!(support(&logits, &with(0.51)), [1, 3]);
    assert_eq!(support(&logits, &with(0.79)), [1, 3]);
    assert_eq!(support(&logits, &with(0.81)), [0, 1, 3]);
    assert_eq!(support(&logits, &with(0.95)), [0, 1, 2, 3]);
    assert_eq!(support(&logits, &with(1.0)), [0, 1, 2, 3]);
}

#[test]
fn top_p_over_many_equals_the_plain_definition() {
    let logits: Vec<f32> = (0u32..5000).map(|id| ((id * 7919) % 1013) as f32 / 400.0).collect();
    let scores = adjust(&logits, &plain(), history(&[0], &[], &[]));
    let full = candidates(scores, 2.6, &plain());
    for top_p in [0.001, 0.01, 0.1, 0.5, 0.9, 0.999] {
        let mut sorted = full.clone();
        sorted.sort_by(by_likelihood);
        let target = top_p * full.iter().map(|candidate| candidate.weight).sum::<f64>();
        let mut sum = 0.0;
        let mut expected = Vec::new();
        for candidate in sorted {
            expected.push(candidate.id);
            sum += candidate.weight;
            if sum >= target {
                break;
            }
        }
        expected.sort_unstable();
        let mut kept = full.clone();
        keep_top_p(&mut kept, top_p);
        assert_eq!(kept.iter().map(|candidate| candidate.id).collect::<Vec<_>>(), expected);
    }
}

/// Weights as candidates, ids in order.
fn weighing(weights: impl Iterator<Item = f64>) -> Vec<Candidate> {
    (0u32..).zip(weights).map(|(id, weight)| Candidate { id, weight }).collect()
}

#[test]
fn buckets_and_sorting_keep_the_same() {
    let noise = |i: u64| uniform(7, 3, i);
    // Peaked, flat, all equal, few values many times, of every magnitude down to the denormal.
    let kinds: [&dyn Fn(u64) -> f64; 6] = [
        &|i| libm::exp(-20.0 * noise(i)),
        &|i| 1.0 - 0.01 * noise(i),
        &|_| 0.25,
        &|i| [1.0, 0.5, 0.5 - f64::EPSILON, 0.001][i as usize % 4],
        &|i| libm::exp(-740.0 * noise(i)),
        &|i| 1.0 / (1 + i * 7919 % 30_011) as f64,
    ];
    let (mut by_buckets, mut cases) = (0, 0);
    for (kind, weight) in kinds.into_iter().enumerate() {
        for count in [1, 2, 3, 64, 65, 1000, 30_000] {
            let full = weighing((0..count).map(weight));
            let total: f64 = full.iter().map(|candidate| candidate.weight).sum();
            for top_p in [1e-9, 0.1, 0.5, 0.8, 0.95, 0.999, 1.0 - 1e-12] {
                let (mut kept, mut expected) = (full.clone(), full.clone());
                keep_top_p(&mut kept, top_p);
                keep_by_sorting(&mut expected, top_p * total);
                let ids = |list: &[Candidate]| list.iter().map(|one| one.id).collect::<Vec<_>>();
                assert_eq!(ids(&kept), ids(&expected), "kind {kind}, {count}, {top_p}");
                by_buckets += usize::from(last_by_buckets(&full, top_p * total, total).is_some());
                cases += 1;
            }
        }
    }
    // The fast way is taken, or all this proves nothing.
    assert!(by_buckets * 10 > cases * 8, "{by_buckets} of {cases} by buckets");
}

#[test]
fn what_rounding_could_change_is_left_to_sorting() {
    // Half of eight equal weights is reached by the fourth exactly, or by the fifth.
    let equal = weighing((0..8).map(|_| 0.1));
    let total: f64 = equal.iter().map(|candidate| candidate.weight).sum();
    assert!(last_by_buckets(&equal, 0.5 * total, total).is_none());
    assert_eq!(last_by_buckets(&equal, 0.55 * total, total).map(|last| last.id), Some(4));
}

#[test]
fn top_p_applies_to_what_top_k_left() {
    // Of all, 0.5 needs two tokens; of the top two, which share 0.6, the first alone holds 2/3.
    let logits = logits_of(&[0.4, 0.2, 0.2, 0.2]);
    let both = Sampling { top_k: 2, top_p: 0.5, ..plain() };
    assert_eq!(support(&logits, &both), [0]);
    assert_eq!(support(&logits, &Sampling { top_p: 0.5, ..plain() }), [0, 1]);
}

#[test]
fn min_p_is_a_share_of_the_best() {
    let logits = logits_of(&[0.5, 0.3, 0.15, 0.05]);
    let with = |min_p| Sampling { min_p, ..plain() };
    assert_eq!(support(&logits, &with(0.0)), [0, 1, 2, 3]);
    assert_eq!(support(&logits, &with(0.2)), [0, 1, 2]);
    assert_eq!(support(&logits, &with(0.5)), [0, 1]);
    assert_eq!(support(&logits, &with(1.0)), [0]);
    assert_eq!(support(&[1.0, 2.0, 2.0], &with(1.0)), [1, 2]);
    // After temperature, as documented: at 4 all four come within 0.5 of the best.
    let hot = Sampling { temperature: 4.0, ..with(0.5) };
    assert_eq!(support(&logits, &hot), [0, 1, 2, 3]);
}

#[test]
fn penalties_act_on_their_tokens_only() {
    let logits = [1.0, 0.9, -0.1, -0.2];
    let repetition = Sampling { repetition_penalty: 2.0, ..greedy() };
    assert_eq!(choose(&logits, &repetition, history(&[0], &[], &[])), 1);
    assert_eq!(choose(&logits, &repetition, history(&[3], &[0, 1, 0], &[])), 0);
    // Negative logits are multiplied: -0.1 becomes -0.2 or lower, and loses to -0.15.
    assert_eq!(choose(&[-0.1, -0.15], &repetition, history(&[0], &[], &[])), 1);

    let presence = Sampling { presence_penalty: 0.5, ..greedy() };
    assert_eq!(choose(&logits, &presence, history(&[0, 0], &[], &[])), 0, "prompt is no answer");
    assert_eq!(choose(&logits, &presence, history(&[3], &[0], &[])), 1);
    assert_eq!(choose(&logits, &presence, history(&[3], &[0, 0, 0, 1], &[])), 0, "counts once");

    let frequency = Sampling { frequency_penalty: 0.06, ..greedy() };
    assert_eq!(choose(&logits, &frequency, history(&[0, 0], &[0], &[])), 0);
    assert_eq!(choose(&logits, &frequency, history(&[3], &[0, 0], &[])), 1, "counts each");
}

#[test]
fn bias_comes_before_penalties() {
    // 1 + 3 = 4, halved 2: below 2.5. Penalised before the bias it would be 0.5 + 3.
    let sampling = Sampling { logit_bias: vec![(0, 3.0)], repetition_penalty: 2.0, ..greedy() };
    assert_eq!(choose(&[1.0, 2.5], &sampling, history(&[0], &[], &[])), 1);
}

#[test]
fn forbidden_ids_are_never_chosen() {
    let logits = [5.0, 4.0, 3.0];
    assert_eq!(choose(&logits, &greedy(), history(&[0], &[], &[0])), 1);
    let prompt = vec![0; 300];
    for position in 1..=prompt.len() {
        let at = history(&prompt[..position], &[], &[7, 1, 0]);
        assert_eq!(choose(&logits, &plain(), at), 2);
    }
    // A bias does not bring a forbidden id back.
    let biased = Sampling { logit_bias: vec![(0, 100.0)], ..greedy() };
    assert_eq!(choose(&logits, &biased, history(&[0], &[], &[0])), 1);
}

#[test]
fn a_resumed_sequence_draws_the_same() {
    let logits: Vec<f32> = (0..50).map(|id| (id % 7) as f32 / 3.0).collect();
    let tokens: Vec<u32> = (0..40).collect();
    for split in 1..tokens.len() {
        let whole = choose(&logits, &plain(), history(&tokens, &[], &[]));
        let resumed = history(&tokens[..split], &tokens[split..], &[]);
        assert_eq!(choose(&logits, &plain(), resumed), whole);
    }
}

// Pins the whole chain: any change of order or key shows here. The ids were also computed by an
// independent implementation.
#[test]
fn draws_are_pinned() {
    let logits: Vec<f32> = (0..1000).map(|id| ((id * 37) % 101) as f32 / 10.0).collect();
    let sampling = Sampling { top_k: 400, top_p: 0.95, min_p: 0.001, ..plain() };
    let prompt = [1; 20];
    let drawn: Vec<u32> =
        (1..=8).map(|n| choose(&logits, &sampling, history(&prompt[..n], &[], &[]))).collect();
    assert_eq!(drawn, [993, 835, 737, 330, 322, 229, 360, 551]);
}

#[test]
fn nothing_panics_on_broken_logits() {
    let nan = f32::NAN;
    let none = f32::NEG_INFINITY;
    let at = history(&[0], &[1], &[]);
    let strange = Sampling {
        repetition_penalty: f32::MIN_POSITIVE,
        frequency_penalty: 2.0,
        presence_penalty: -2.0,
        top_k: 3,
        top_p: 0.5,
        min_p: 0.1,
        ..plain()
    };
    for sampling in [plain(), greedy(), strange] {
        assert_eq!(choose(&[], &sampling, at), 0);
        assert_eq!(choose(&[nan; 3], &sampling, at), 0);
        assert_eq!(choose(&[none; 3], &sampling, history(&[0], &[], &[0, 1])), 2);
        assert_eq!(choose(&[none; 3], &sampling, history(&[0], &[], &[0, 1, 2])), 0);
        assert_eq!(choose(&[nan, none, -3.0], &sampling, at), 2);
        assert_eq!(choose(&[1.0, nan, f32::INFINITY], &sampling, history(&[9], &[], &[])), 2);
        assert!(choose(&[f32::MAX, f32::MIN, f32::MAX], &sampling, at) < 3);
    }
}

#[test]
fn logprobs_are_the_softmax() {
    let probabilities = [0.1, 0.5, 0.15, 0.25];
    let given = logprobs(&logits_of(&probabilities), 2, 3);
    assert_eq!(given.token, 2);
    assert!((given.logprob - 0.15f32.ln()).abs() < 1e-6);
    assert_eq!(given.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 2]);
    for (id, logprob) in given.top {
        assert!((f64::from(logprob) - probabilities[id as usize].ln()).abs() < 1e-6);
    }
}

#[test]
fn logprobs_sum_to_one_whatever_the_offset() {
    for offset in [0.0, 1e4, -1e4, 3e38] {
        let logits: Vec<f32> = (0..200).map(|id| offset + (id % 13) as f32).collect();
        let sum: f64 = logprobs(&logits, 0, 200)
            .top
            .iter()
            .map(|&(_, logprob)| f64::from(logprob).exp())
            .sum();
        assert!((sum - 1.0).abs() < 1e-4, "{offset}: {sum}");
    }
}

#[test]
fn logprobs_top_is_ordered_with_ties_to_the_lower_id() {
    let ids = |logits: &[f32], top| -> Vec<u32> {
        logprobs(logits, 0, top).top.iter().map(|(id, _)| *id).collect()
    };
    let logits = [1.0, 2.0, 2.0, 0.0, 2.0, 1.0];
    assert_eq!(ids(&logits, 0), [0; 0]);
    assert_eq!(ids(&logits, 2), [1, 2]);
    assert_eq!(ids(&logits, 4), [1, 2, 4, 0]);
    assert_eq!(ids(&logits, 20), [1, 2, 4, 0, 5, 3]);
    let many: Vec<f32> = (0u32..3000).map(|id| ((id * 7919) % 997) as f32).collect();
    let mut sorted: Vec<u32> = (0..3000).collect();
    sorted.sort_by(|&a, &b| many[b as usize].total_cmp(&many[a as usize]).then(a.cmp(&b)));
    assert_eq!(ids(&many, 20), sorted[..20]);
}

#[test]
fn logprobs_of_broken_rows_are_minus_infinity() {
    let none = f32::NEG_INFINITY;
    assert_eq!(logprobs(&[1.0, 2.0], 2, 0).logprob, none);
    assert_eq!(logprobs(&[], 0, 5), TokenLogprobs { token: 0, logprob: none, top: vec![] });
    let broken = logprobs(&[f32::NAN, 0.0, none], 0, 3);
    assert_eq!(broken.logprob, none);
    assert_eq!(broken.top, [(1, 0.0), (0, none), (2, none)]);
    assert_eq!(logprobs(&[f32::NAN; 2], 1, 1).top, [(0, none)]);
    assert_eq!(logprobs(&[0.0, f32::INFINITY], 1, 0).logprob, 0.0);
}
