//! The choice of experts.

use super::math::exp;
use super::tensor::CpuTensor;
use crate::check::{Check, filled};
use crate::{DeviceError, Routes};

/// See [`crate::Device::route`]. The softmax is over all experts, its sum taken in the order of
/// their ids; renormalising divides by the sum of the chosen ones in slot order. One NaN among a
/// row's logits makes all its weights NaN and chooses the lowest ids.
pub(crate) fn route(
    logits: &CpuTensor,
    chosen: usize,
    renormalise: bool,
) -> Result<Routes, DeviceError> {
    let check = Check("route");
    check.at_most("chosen", chosen, logits.columns())?;
    check.at_most("experts", logits.columns(), u32::MAX as usize)?;
    let mut experts = filled(&[logits.rows(), chosen], 0)?;
    let mut weights = filled(&[logits.rows(), chosen], 0.0)?;
    let mut probabilities = filled(&[logits.columns()], 0.0)?;
    if chosen > 0 {
        let slots = experts.chunks_mut(chosen).zip(weights.chunks_mut(chosen));
        for (row, (experts, weights)) in slots.enumerate() {
            softmax(logits.row(row), &mut probabilities);
            choose(&mut probabilities, experts, weights);
            if renormalise {
                let sum = weights.iter().fold(0.0, |sum, weight| sum + weight);
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
        }
    }
    Ok(Routes { chosen, experts, weights })
}

fn softmax(logits: &[f32], to: &mut [f32]) {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, &l| if l > max { l } else { max });
    to.iter_mut().zip(logits).for_each(|(to, logit)| *to = exp(logit - max));
    let sum = to.iter().fold(0.0, |sum, e| sum + e);
    to.iter_mut().for_each(|e| *e /= sum);
}

/// Takes the largest probability again and again, the lowest id among equals; NaN counts as less
/// than any number. What was taken is marked negative.
fn choose(probabilities: &mut [f32], experts: &mut [u32], weights: &mut [f32]) {
    const TAKEN: f32 = -2.0;
    for (expert, weight) in experts.iter_mut().zip(weights) {
        let key = |p: f32| if p.is_nan() { -1.0 } else { p };
        let mut best = 0;
        for (id, &p) in probabilities.iter().enumerate() {
            if key(p) > key(probabilities[best]) {
                best = id;
            }
        }
        *expert = best as u32;
        *weight = std::mem::replace(&mut probabilities[best], TAKEN);
    }
}
