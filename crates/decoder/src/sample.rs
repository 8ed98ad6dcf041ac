//! From logits to the next token, with the same bits on any machine.
//!
//! The order of things is vLLM's: logit bias, forbidden ids, penalties (repetition, frequency,
//! presence); the best of that is the greedy choice. Otherwise temperature, then `min_p`, `top_k`,
//! `top_p` on what the one before left, then a draw.
//!
//! All arithmetic is f64 in ascending id order, with exponentials and logarithms of the `libm`
//! crate: a platform's own differ in last bits. The draw comes from a counter-based generator
//! keyed by (seed, choice, position), so a sequence that is resumed elsewhere, or whose tokens
//! moved from answer to prompt, draws the same numbers.

use std::cmp::Ordering;

use engine::{Sampling, TokenLogprobs};

/// What the next token depends on besides the logits.
#[derive(Debug, Clone, Copy)]
pub struct History<'a> {
    /// Prompt token ids.
    pub prompt: &'a [u32],
    /// Tokens generated so far.
    pub generated: &'a [u32],
    /// Ids that may not be chosen now (`engine::Scheduler::forbidden`), in any order.
    pub forbidden: &'a [u32],
}

/// A token that may be drawn and its unnormalised probability, in (0, 1].
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    weight: f64,
}

/// Chooses the next token from one row of `vocab` logits.
///
/// Never panics: NaN counts as minus infinity and plus infinity as the largest f32, ids outside
/// the row are ignored. Where nothing is possible at all (every logit minus infinity or forbidden)
/// it is the lowest id that is not forbidden, and 0 where there is none such.
pub fn choose(logits: &[f32], sampling: &Sampling, history: History<'_>) -> u32 {
    let greedy = sampling.temperature == 0.0;
    if greedy && is_plain(sampling, history) {
        // Most requests of a benchmark: no copy of the row.
        return best(logits.iter().map(|&logit| clean(logit))).unwrap_or(0);
    }
    let scores = adjust(logits, sampling, history);
    let Some(best) = best(scores.iter().copied()) else {
        return first_allowed(logits.len(), history.forbidden);
    };
    if greedy {
        return best;
    }
    let highest = scores[best as usize];
    let mut candidates = candidates(scores, highest, sampling);
    keep_top_k(&mut candidates, sampling.top_k as usize);
    keep_top_p(&mut candidates, f64::from(sampling.top_p));
    let position = history.prompt.len() + history.generated.len();
    draw(&candidates, uniform(sampling.seed, sampling.choice, position as u64))
}

/// Log-probabilities (natural logarithm, softmax over the whole row of raw logits) of `token` and
/// of the `top` most likely tokens, best first, ties to the lower id.
///
/// A token outside the row, or one whose logit is minus infinity or NaN, has minus infinity.
pub fn logprobs(logits: &[f32], token: u32, top: u8) -> TokenLogprobs {
    let top = usize::from(top);
    let mut likeliest: Vec<(u32, f64)> = Vec::with_capacity(top + 1);
    let mut max = f64::NEG_INFINITY;
    for (id, &logit) in (0u32..).zip(logits) {
        let logit = clean(logit);
        max = max.max(logit);
        // Strictly greater: ids come in ascending order, so of equals the lower one stays.
        if likeliest.len() < top || likeliest.last().is_some_and(|&(_, last)| logit > last) {
            let at = likeliest.partition_point(|&(_, better)| better >= logit);
            likeliest.insert(at, (id, logit));
            likeliest.truncate(top);
        }
    }
    let sum: f64 = logits.iter().map(|&logit| exp(clean(logit) - max)).sum();
    let log_sum = libm::log(sum);
    let logprob = |logit: f64| match logit {
        f64::NEG_INFINITY => f32::NEG_INFINITY,
        // The difference first: it is exact where it matters, near the maximum.
        logit => ((logit - max) - log_sum) as f32,
    };
    let own = logits.get(token as usize).map_or(f64::NEG_INFINITY, |&logit| clean(logit));
    TokenLogprobs {
        token,
        logprob: logprob(own),
        top: likeliest.into_iter().map(|(id, logit)| (id, logprob(logit))).collect(),
    }
}

/// A logit that arithmetic can be trusted with: no NaN, no plus infinity.
fn clean(logit: f32) -> f64 {
    if logit.is_nan() { f64::NEG_INFINITY } else { f64::from(logit.min(f32::MAX)) }
}

/// `e^x` for `x <= 0`; the shortcut gives what the function gives, 0.
fn exp(x: f64) -> f64 {
    if x < -746.0 { 0.0 } else { libm::exp(x) }
}

/// The id of the highest score, ties to the lower id; none where all are minus infinity.
fn best(scores: impl Iterator<Item = f64>) -> Option<u32> {
    let mut best = None;
    let mut highest = f64::NEG_INFINITY;
    for (id, score) in (0u32..).zip(scores) {
        if score > highest {
            highest = score;
            best = Some(id);
        }
    }
    best
}

fn first_allowed(vocab: usize, forbidden: &[u32]) -> u32 {
    (0u32..).take(vocab).find(|id| !forbidden.contains(id)).unwrap_or(0)
}

/// Whether scores are the logits as they are.
fn is_plain(sampling: &Sampling, history: History<'_>) -> bool {
    sampling.logit_bias.is_empty()
        && history.forbidden.is_empty()
        && sampling.repetition_penalty == 1.0
        && !counts_answer(sampling)
}

fn counts_answer(sampling: &Sampling) -> bool {
    sampling.frequency_penalty != 0.0 || sampling.presence_penalty != 0.0
}

/// Logits after bias, forbidden ids and penalties.
fn adjust(logits: &[f32], sampling: &Sampling, history: History<'_>) -> Vec<f64> {
    let mut scores: Vec<f64> = logits.iter().map(|&logit| clean(logit)).collect();
    for &(id, bias) in &sampling.logit_bias {
        if let Some(score) = scores.get_mut(id as usize) {
            *score += f64::from(bias);
        }
    }
    for &id in history.forbidden {
        if let Some(score) = scores.get_mut(id as usize) {
            *score = f64::NEG_INFINITY;
        }
    }
    if sampling.repetition_penalty != 1.0 {
        penalise_repetition(&mut scores, f64::from(sampling.repetition_penalty), history);
    }
    if counts_answer(sampling) {
        penalise_answer(&mut scores, sampling, history.generated);
    }
    scores
}

/// Once per token seen in prompt or answer, however often it was seen.
fn penalise_repetition(scores: &mut [f64], penalty: f64, history: History<'_>) {
    let mut seen = vec![false; scores.len()];
    for &id in history.prompt.iter().chain(history.generated) {
        let Some(seen) = seen.get_mut(id as usize) else { continue };
        if !std::mem::replace(seen, true) {
            let score = &mut scores[id as usize];
            *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
        }
    }
}

fn penalise_answer(scores: &mut [f64], sampling: &Sampling, generated: &[u32]) {
    let mut counts = vec![0u32; scores.len()];
    for &id in generated {
        if let Some(count) = counts.get_mut(id as usize) {
            *count += 1;
        }
    }
    let (frequency, presence) =
        (f64::from(sampling.frequency_penalty), f64::from(sampling.presence_penalty));
    // Multiplied, not subtracted one by one: the same bits in whatever order tokens came.
    for (score, &count) in scores.iter_mut().zip(&counts).filter(|(_, count)| **count > 0) {
        *score -= frequency * f64::from(count);
        *score -= presence;
    }
}

/// Tokens with a probability above nothing that pass `min_p`, in ascending id order. Weights are
/// shares of the most likely token's probability, so `min_p` compares with them as they are.
fn candidates(mut scores: Vec<f64>, highest: f64, sampling: &Sampling) -> Vec<Candidate> {
    let min_p = f64::from(sampling.min_p);
    compute::cpu::exp_weights(&mut scores, highest, f64::from(sampling.temperature));
    (0u32..)
        .zip(scores)
        .map(|(id, weight)| Candidate { id, weight })
        .filter(|candidate| candidate.weight > 0.0 && candidate.weight >= min_p)
        .collect()
}

/// More likely first, ties to the lower id: a total order, so any selection by it is the same.
fn by_likelihood(a: &Candidate, b: &Candidate) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

/// Keeps exactly the `k` most likely (all for 0), in ascending id order.
fn keep_top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k == 0 || k >= candidates.len() {
        return;
    }
    candidates.select_nth_unstable_by(k - 1, by_likelihood);
    candidates.truncate(k);
    candidates.sort_unstable_by_key(|candidate| candidate.id);
}

/// Keeps the fewest most likely whose share of the sum reaches `top_p`, at least one, in ascending
/// id order. The running sum goes from the most likely on, one by one.
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f64) {
    if top_p >= 1.0 {
        return;
    }
    let total = candidates.iter().map(|candidate| candidate.weight).sum::<f64>();
    match last_by_buckets(candidates, top_p * total, total) {
        Some(last) => candidates.retain(|one| by_likelihood(one, &last) != Ordering::Greater),
        None => keep_by_sorting(candidates, top_p * total),
    }
}

/// Runs of weights that are sorted only where the sum reaches its target among them: sixteen to
/// each power of two down to `2^-64`, and one for all below.
const BUCKETS: usize = 64 * 16 + 1;

/// A higher number for higher weights; weights of one bucket differ by a sixteenth at most.
fn bucket(weight: f64) -> usize {
    const LEAST: u64 = (1023 - 64) << 4;
    (weight.to_bits() >> 48).saturating_sub(LEAST).min(BUCKETS as u64 - 1) as usize
}

/// The least likely candidate that [`keep_by_sorting`] keeps, without sorting them all: sums of
/// whole buckets say in which one the target is reached.
///
/// They are added in another order than there, so both sums may be off by as much as rounding can
/// make of so many additions. Where that could change which one is the last, `None`.
fn last_by_buckets(candidates: &[Candidate], target: f64, total: f64) -> Option<Candidate> {
    let mut sums = vec![0.0; BUCKETS];
    for candidate in candidates {
        sums[bucket(candidate.weight)] += candidate.weight;
    }
    // Twice what either sum can be off by.
    let off = 4.0 * candidates.len() as f64 * f64::EPSILON * total;
    let mut before = 0.0;
    let (crossing, _) = sums.iter().enumerate().rev().find(|(_, sum)| {
        let reached = before + **sum + off >= target;
        before += if reached { 0.0 } else { **sum };
        reached
    })?;
    let of_bucket = candidates.iter().filter(|candidate| bucket(candidate.weight) == crossing);
    let mut members: Vec<Candidate> = of_bucket.copied().collect();
    members.sort_unstable_by(by_likelihood);
    let mut sum = before;
    let last = members.into_iter().find(|member| {
        sum += member.weight;
        sum + off >= target
    })?;
    (sum - off >= target).then_some(last)
}

/// What [`keep_top_p`] promises, by the book. Sorts a growing head instead of the whole
/// vocabulary; the result does not depend on how the head grows.
fn keep_by_sorting(candidates: &mut Vec<Candidate>, target: f64) {
    let mut head = 64;
    loop {
        head = head.min(candidates.len());
        if head < candidates.len() {
            candidates.select_nth_unstable_by(head, by_likelihood);
        }
        candidates[..head].sort_unstable_by(by_likelihood);
        let mut sum = 0.0;
        let reached = candidates[..head].iter().position(|candidate| {
            sum += candidate.weight;
            sum >= target
        });
        if let Some(last) = reached {
            candidates.truncate(last + 1);
            break;
        }
        // Rounding may keep the sum of all just below the target.
        if head == candidates.len() {
            break;
        }
        head *= 8;
    }
    candidates.sort_unstable_by_key(|candidate| candidate.id);
}

/// The candidate at which the running sum, in ascending id order, passes `uniform` of the whole.
fn draw(candidates: &[Candidate], uniform: f64) -> u32 {
    let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
    let target = uniform * total;
    let mut sum = 0.0;
    let chosen = candidates.iter().find(|candidate| {
        sum += candidate.weight;
        sum > target
    });
    chosen.or(candidates.last()).map_or(0, |candidate| candidate.id)
}

/// A number in [0, 1), of 53 random bits, for the token at `position` of a sequence.
fn uniform(seed: u64, choice: u32, position: u64) -> f64 {
    let counter = [position as u32, (position >> 32) as u32, choice, 0];
    let [first, second, ..] = philox4x32(counter, [seed as u32, (seed >> 32) as u32]);
    let bits = u64::from(first) << 21 | u64::from(second) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011).
fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let mut block = counter;
    let mut key = key;
    for _ in 0..10 {
        let even = MULTIPLIERS[0] * u64::from(block[0]);
        let odd = MULTIPLIERS[1] * u64::from(block[2]);
        block = [
            (odd >> 32) as u32 ^ block[1] ^ key[0],
            odd as u32,
            (even >> 32) as u32 ^ block[3] ^ key[1],
            even as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    block
}

#[cfg(test)]
#[path = "sample_tests.rs"]
mod tests;
