//! A layer's feed-forward network from the checkpoint: a rank's columns of it, or of each expert.

use compute::{Activation, Device, Routing};
use model::{Experts, FeedForward, Part};

use planner::ExpertCut;

use super::{LoadError, Loader};
use crate::layout::{Layout, Runs};
use crate::weights::{ExpertsWeights, FeedForwardWeights, Gated, Piece};

/// A weight with its bias where it has one.
type Parts = (Part, Option<Part>);

/// Which tensors make up a gated network. The bias of `down` is added by stripe 0 alone.
struct GatedParts {
    gate: Parts,
    up: Parts,
    down: Parts,
    width: usize,
    activation: Activation,
}

impl<D: Device> Loader<'_, D> {
    pub(super) fn feed_forward(
        &mut self,
        index: usize,
    ) -> Result<FeedForwardWeights<D>, LoadError> {
        let (layer, spec) = (Some(index), self.spec);
        match &spec.layers[index].feed_forward {
            FeedForward::Dense(dense) => {
                let bias = |part| dense.bias.then_some(part);
                let parts = GatedParts {
                    gate: (Part::Gate, bias(Part::GateBias)),
                    up: (Part::Up, bias(Part::UpBias)),
                    // Added once, after the sum over stripes.
                    down: (Part::Down, None),
                    width: dense.width,
                    activation: activation(&dense.activation),
                };
                Ok(FeedForwardWeights::Dense {
                    network: self.cut(layer, &parts)?,
                    down_bias: self.hidden_if(dense.bias, layer, Part::DownBias)?,
                })
            }
            FeedForward::Experts(experts) => {
                Ok(FeedForwardWeights::Experts(self.experts(layer, experts)?))
            }
        }
    }

    fn experts(
        &mut self,
        layer: Option<usize>,
        spec: &Experts,
    ) -> Result<ExpertsWeights<D>, LoadError> {
        let (precision, hidden) = (self.edge_precision, self.spec.hidden);
        let bias = |part| spec.bias.then_some(part);
        let activation = activation(&spec.activation);
        let whole = self.layout.experts == ExpertCut::Whole;
        let (mut experts, mut owners) = (Vec::with_capacity(spec.count), Vec::new());
        for e in 0..spec.count {
            let parts = GatedParts {
                gate: (Part::ExpertGate(e), bias(Part::ExpertGateBias(e))),
                up: (Part::ExpertUp(e), bias(Part::ExpertUpBias(e))),
                down: (Part::ExpertDown(e), bias(Part::ExpertDownBias(e))),
                width: spec.width,
                activation,
            };
            if !whole {
                experts.push(Some(self.cut(layer, &parts)?));
                continue;
            }
            let owner = self.layout.owner(e, spec.count);
            experts.push(match owner {
                Some(_) => {
                    Some(self.gated(layer, &parts, &Layout::all_columns(spec.width), true)?)
                }
                None => None,
            });
            owners.push(owner);
        }
        let mut shared = None;
        if let Some(shape) = &spec.shared {
            let parts = GatedParts {
                gate: (Part::SharedGate, None),
                up: (Part::SharedUp, None),
                down: (Part::SharedDown, None),
                width: shape.width,
                activation,
            };
            let mut router = None;
            if shape.gated {
                router = Some(self.pack(layer, Part::SharedRouter, 0..1, 0..hidden, precision)?);
            }
            shared = Some((self.cut(layer, &parts)?, router));
        }
        let count = 0..spec.count;
        let mut router_bias = None;
        if spec.router.bias {
            router_bias = Some(self.vector(layer, Part::RouterBias, count.clone())?);
        }
        let mut correction = None;
        if spec.router.correction {
            correction = Some(self.vector(layer, Part::RouterCorrection, count.clone())?);
        }
        Ok(ExpertsWeights {
            router: self.pack(layer, Part::Router, count, 0..hidden, precision)?,
            router_bias,
            routing: routing(spec),
            correction,
            experts,
            owners: whole.then_some(owners),
            own: self.layout.own.len(),
            shared,
        })
    }

    /// The rank's columns of a network. A bias is stripe 0's to add.
    fn cut(&mut self, layer: Option<usize>, parts: &GatedParts) -> Result<Gated<D>, LoadError> {
        let first = self.layout.own.first() == Some(&0);
        self.gated(layer, parts, &self.layout.columns(parts.width), first)
    }

    fn gated(
        &mut self,
        layer: Option<usize>,
        parts: &GatedParts,
        runs: &Runs,
        biased: bool,
    ) -> Result<Gated<D>, LoadError> {
        let hidden = self.spec.hidden;
        let mut gate_up = Vec::new();
        for (part, start) in [(parts.gate, 0), (parts.up, runs.total)] {
            for (run, local) in runs.global.iter().zip(&runs.local) {
                gate_up.push(self.projection(layer, part, run.clone(), hidden, start + local)?);
            }
        }
        let mut down = Vec::new();
        for (i, (run, local)) in runs.global.iter().zip(&runs.local).enumerate() {
            let (part, bias_part) = parts.down;
            let matrix = self.pack(layer, part, 0..hidden, run.clone(), self.precision)?;
            let bias = match bias_part.filter(|_| i == 0 && biased) {
                Some(part) => Some(self.vector(layer, part, 0..hidden)?),
                None => None,
            };
            down.push(Piece { matrix, bias, column: *local });
        }
        Ok(Gated { gate_up, down, width: runs.total, activation: parts.activation })
    }
}

/// The spec's activation as the device takes it.
fn activation(activation: &model::Activation) -> Activation {
    match *activation {
        model::Activation::Silu => Activation::Silu,
        model::Activation::GeluTanh => Activation::GeluTanh,
        model::Activation::ClampedSwiglu { alpha, limit } => {
            Activation::ClampedSwiglu { alpha, limit }
        }
    }
}

/// The spec's router as the device takes it; the correction is the checkpoint's.
fn routing(spec: &Experts) -> Routing<'static> {
    let router = &spec.router;
    Routing {
        chosen: spec.chosen,
        score: match router.score {
            model::Score::Softmax => compute::Score::Softmax,
            model::Score::SoftmaxOfChosen => compute::Score::SoftmaxOfChosen,
            model::Score::Sigmoid => compute::Score::Sigmoid,
        },
        renormalise: router.renormalise,
        scale: router.scale,
        groups: router.groups.as_ref().map(|groups| compute::Groups {
            count: groups.count,
            chosen: groups.chosen,
            by: match groups.by {
                model::GroupScore::Max => compute::GroupScore::Max,
                model::GroupScore::TopTwoSum => compute::GroupScore::TopTwoSum,
            },
        }),
        correction: None,
    }
}
