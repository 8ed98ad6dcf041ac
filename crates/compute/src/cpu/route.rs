//! The choice of experts.

use super::math::{exp, sigmoid};
use super::tensor::CpuTensor;
use crate::check::{Check, filled};
use crate::{DeviceError, GroupScore, Groups, Routes, Routing, Score};

/// See [`crate::Device::route`]. A softmax over all experts takes its sum in the order of their
/// ids; one over the chosen, and the sum that renormalises, in slot order. NaN counts as less than
/// any number in a choice. One NaN among a row's logits makes all weights of a softmax over all
/// experts NaN and chooses the lowest ids.
pub(crate) fn route(logits: &CpuTensor, routing: &Routing<'_>) -> Result<Routes, DeviceError> {
    let chosen = routing.chosen;
    let mut row = Row::new(logits.columns(), routing)?;
    let mut experts = filled(&[logits.rows(), chosen], 0)?;
    let mut weights = filled(&[logits.rows(), chosen], 0.0)?;
    if chosen > 0 {
        let slots = experts.chunks_mut(chosen).zip(weights.chunks_mut(chosen));
        for (index, (experts, weights)) in slots.enumerate() {
            row.score(logits.row(index));
            row.limit();
            choose(&row.choice, &mut row.taken, experts);
            row.weigh(experts, weights);
        }
    }
    Ok(Routes { chosen, experts, weights })
}

/// What is worked out for one row.
struct Row<'a> {
    routing: &'a Routing<'a>,
    /// By expert: what becomes its weight.
    scores: Vec<f32>,
    /// By expert: what it is chosen by.
    choice: Vec<f32>,
    taken: Vec<bool>,
    /// By group: its score, whether it is kept.
    groups: Vec<f32>,
    kept: Vec<bool>,
    /// Kept groups, best first.
    best: Vec<u32>,
}

impl<'a> Row<'a> {
    fn new(experts: usize, routing: &'a Routing<'a>) -> Result<Self, DeviceError> {
        let check = Check("route");
        check.at_most("chosen", routing.chosen, experts)?;
        check.at_most("experts", experts, u32::MAX as usize)?;
        if let Some(correction) = routing.correction {
            check.equal("correction", correction.len(), experts)?;
        }
        let (mut groups, mut best) = (0, 0);
        if let Some(Groups { count, chosen, by }) = routing.groups {
            check.at_least("groups", count, 1)?;
            check.equal("experts beyond whole groups", experts % count, 0)?;
            check.at_most("groups chosen", chosen, count)?;
            let each = experts / count;
            check.at_most("chosen", routing.chosen, chosen * each)?;
            if by == GroupScore::TopTwoSum {
                check.at_least("experts of a group", each, 2)?;
            }
            (groups, best) = (count, chosen);
        }
        Ok(Row {
            routing,
            scores: filled(&[experts], 0.0)?,
            choice: filled(&[experts], 0.0)?,
            taken: filled(&[experts], false)?,
            groups: filled(&[groups], 0.0)?,
            kept: filled(&[groups], false)?,
            best: filled(&[best], 0)?,
        })
    }

    fn score(&mut self, logits: &[f32]) {
        self.scores.copy_from_slice(logits);
        match self.routing.score {
            Score::Softmax => softmax(&mut self.scores),
            Score::SoftmaxOfChosen => {}
            Score::Sigmoid => self.scores.iter_mut().for_each(|s| *s = sigmoid(*s)),
        }
        self.choice.copy_from_slice(&self.scores);
        if let Some(correction) = self.routing.correction {
            self.choice.iter_mut().zip(correction).for_each(|(choice, c)| *choice += c);
        }
    }

    /// Puts the experts of all but the best groups out of the choice.
    fn limit(&mut self) {
        let Some(Groups { count, by, .. }) = self.routing.groups else { return };
        let each = self.choice.len() / count;
        for (score, group) in self.groups.iter_mut().zip(self.choice.chunks(each)) {
            let (first, second) = two_largest(group);
            *score = match by {
                GroupScore::Max => first,
                GroupScore::TopTwoSum => first + second,
            };
        }
        choose(&self.groups, &mut self.kept, &mut self.best);
        let groups = self.choice.chunks_mut(each).zip(self.scores.chunks_mut(each));
        for ((choice, scores), _) in groups.zip(&self.kept).filter(|(_, kept)| !**kept) {
            match by {
                GroupScore::Max => {
                    choice.fill(0.0);
                    scores.fill(0.0);
                }
                GroupScore::TopTwoSum => choice.fill(f32::NEG_INFINITY),
            }
        }
    }

    fn weigh(&self, experts: &[u32], weights: &mut [f32]) {
        for (weight, &expert) in weights.iter_mut().zip(experts) {
            *weight = self.scores[expert as usize];
        }
        if self.routing.score == Score::SoftmaxOfChosen {
            softmax(weights);
        }
        if self.routing.renormalise {
            // The addend is below half a unit in the last place of any softmax' sum.
            let sum = weights.iter().fold(0.0, |sum, weight| sum + weight) + 1e-20;
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        weights.iter_mut().for_each(|weight| *weight *= self.routing.scale);
    }
}

fn softmax(values: &mut [f32]) {
    let max = values.iter().fold(f32::NEG_INFINITY, |max, &v| if v > max { v } else { max });
    values.iter_mut().for_each(|v| *v = exp(*v - max));
    let sum = values.iter().fold(0.0, |sum, e| sum + e);
    values.iter_mut().for_each(|e| *e /= sum);
}

/// The largest and the next; NaN is passed over.
fn two_largest(values: &[f32]) -> (f32, f32) {
    values.iter().fold((f32::NEG_INFINITY, f32::NEG_INFINITY), |(first, second), &v| {
        if v > first {
            (v, first)
        } else if v > second {
            (first, v)
        } else {
            (first, second)
        }
    })
}

/// Takes the largest value again and again, the lowest id among equals; NaN is less than any
/// number. Marks what was taken. `ids` must not be longer than `values`.
fn choose(values: &[f32], taken: &mut [bool], ids: &mut [u32]) {
    taken.fill(false);
    for id in ids {
        let mut best: Option<(usize, f32)> = None;
        for (i, (&value, _)) in values.iter().zip(&*taken).enumerate().filter(|(_, v)| !v.1) {
            let better = |(_, b): (usize, f32)| value > b || b.is_nan() && !value.is_nan();
            if best.is_none_or(better) {
                best = Some((i, value));
            }
        }
        if let Some((i, _)) = best {
            taken[i] = true;
            *id = i as u32;
        }
    }
}
