//! The forward pass: one walk over the spec for any family.

use std::sync::Arc;

use collective::{Collective, CollectiveError};
use compute::{AttendSpan, Device, DeviceError, RopeTable, Rounding};
use engine::{Step, Want};
use model::ModelSpec;

use crate::kept::Kept;
use crate::layout::{Layout, Runs};
use crate::weights::{EdgeWeights, LayerWeights};

/// Rows of logits computed at a time: bounds memory where logits are wanted at every token.
const LOGIT_ROWS: usize = 64;

/// Why a step could not be run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ForwardError {
    /// The step does not fit the model or the cache.
    #[error("step {number}: {what}")]
    BadStep {
        /// The step's number.
        number: u64,
        /// What does not fit.
        what: String,
    },
    /// An operation failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A peer rank failed or the group was aborted.
    #[error("{place}: {source}")]
    Collective {
        /// What the ranks were doing together.
        place: Place,
        /// What failed.
        source: CollectiveError,
    },
}

/// Which collective of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The sum of the embedding's stripes.
    Embedding,
    /// The sum after a layer's attention.
    Attention {
        /// The layer.
        layer: usize,
    },
    /// The sum after a layer's feed-forward network.
    FeedForward {
        /// The layer.
        layer: usize,
    },
    /// The gathering of the logits.
    Logits,
}

impl Place {
    /// The collective that a step calls as its `call`th, counted from 0, in a model with that many
    /// layers.
    pub fn of(call: usize, layers: usize) -> Self {
        match call.checked_sub(1) {
            None => Self::Embedding,
            Some(branch) if branch / 2 >= layers => Self::Logits,
            Some(branch) if branch % 2 == 0 => Self::Attention { layer: branch / 2 },
            Some(branch) => Self::FeedForward { layer: branch / 2 },
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Embedding => f.write_str("sum of the embedding"),
            Self::Attention { layer } => write!(f, "sum of attention in layer {layer}"),
            Self::FeedForward { layer } => write!(f, "sum of the feed-forward in layer {layer}"),
            Self::Logits => f.write_str("gathering of the logits"),
        }
    }
}

impl ForwardError {
    /// For a failed collective: the rank that did not do its part, as far as this one can tell.
    pub fn blames(&self) -> Option<usize> {
        match self {
            Self::Collective { source, .. } => source.peer(),
            Self::BadStep { .. } | Self::Device(_) => None,
        }
    }
}

/// What an operation within a collective's reach gave, and where that was.
pub(crate) trait During<T> {
    /// Names the collective, should it have failed.
    fn during(self, place: Place) -> Result<T, ForwardError>;
}

impl<T> During<T> for Result<T, CollectiveError> {
    fn during(self, place: Place) -> Result<T, ForwardError> {
        self.map_err(|source| ForwardError::Collective { place, source })
    }
}

/// Logits after one token; rank 0 only.
#[derive(Debug, Clone, Copy)]
pub struct Logits<'a> {
    /// Index of the step's entry.
    pub entry: usize,
    /// Index of the token within the entry.
    pub token: usize,
    /// `[vocab]`, raw.
    pub values: &'a [f32],
}

/// A model's forward pass on one rank.
pub struct Decoder<D: Device> {
    pub(crate) device: D,
    pub(crate) spec: Arc<ModelSpec>,
    pub(crate) layout: Layout,
    pub(crate) edges: EdgeWeights<D>,
    pub(crate) layers: Vec<LayerWeights<D>>,
    pub(crate) caches: Vec<D::Cache>,
    pub(crate) ropes: Vec<RopeTable>,
    pub(crate) scratch: Scratch<D>,
    pub(crate) blocks: usize,
    pub(crate) block_tokens: usize,
    pub(crate) context: usize,
    pub(crate) rounding: Rounding,
    /// The same weights once more, by what they are.
    pub(crate) weights: Kept<D>,
}

/// Activations, kept between steps so that a step allocates nothing once it has been as large.
pub(crate) struct Scratch<D: Device> {
    /// The residual stream, `[T, hidden]`.
    pub(crate) x: D::Tensor,
    /// The normed stream, `[T, hidden]`.
    pub(crate) h: D::Tensor,
    /// Projections inward.
    pub(crate) wide: D::Tensor,
    /// Attention output or gated activations.
    pub(crate) inner: D::Tensor,
    /// Expert outputs before they are combined, or absorbed queries.
    pub(crate) expert: D::Tensor,
    /// Partial sums, `[own stripes * T, hidden]`, stripe-major.
    pub(crate) partials: D::Tensor,
    /// Their sum over all stripes, `[T, hidden]`.
    pub(crate) sum: D::Tensor,
}

impl<D: Device> Scratch<D> {
    pub(crate) fn new(device: &D) -> Result<Self, DeviceError> {
        let empty = || device.tensor(0, 0);
        Ok(Self {
            x: empty()?,
            h: empty()?,
            wide: empty()?,
            inner: empty()?,
            expert: empty()?,
            partials: empty()?,
            sum: empty()?,
        })
    }
}

/// What happens to a branch's sum before it joins the stream.
#[derive(Clone, Copy)]
pub(crate) struct After<'a> {
    /// Which branch.
    pub(crate) place: Place,
    /// Width of the stream.
    pub(crate) hidden: usize,
    pub(crate) bias: Option<&'a [f32]>,
    /// Weight of a norm, after the bias.
    pub(crate) norm: Option<&'a [f32]>,
    /// A factor, after the bias, where there is no norm.
    pub(crate) scale: Option<f32>,
    pub(crate) eps: f32,
}

/// A step's rows: all tokens of all entries, one after the other.
pub(crate) struct Batch<'a> {
    pub(crate) rows: usize,
    tokens: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) spans: Vec<AttendSpan<'a>>,
    /// (entry, token, row) of each row whose logits are wanted.
    wanted: Vec<(usize, usize, u32)>,
}

impl<D: Device> Decoder<D> {
    /// What keeping this rank's weights in 8 or 4 bits lost, over all its quantised matrices.
    pub fn rounding(&self) -> Rounding {
        self.rounding
    }

    /// Runs one step. Every rank of the group must run the same step; `on_logits` is called on
    /// rank 0, once per wanted row in order.
    pub fn forward(
        &mut self,
        step: &Step,
        collective: &mut dyn Collective<D>,
        on_logits: &mut dyn FnMut(Logits<'_>),
    ) -> Result<(), ForwardError> {
        let blocks: Vec<Vec<u32>> =
            step.entries.iter().map(|e| e.blocks.iter().map(|b| b.0).collect()).collect();
        let batch = self.batch(step, &blocks)?;
        self.embed(&batch, collective)?;
        for layer in 0..self.layers.len() {
            self.attention(layer, &batch, collective)?;
            self.feed_forward(layer, &batch, collective)?;
        }
        self.logits(&batch, collective, on_logits)
    }

    /// What a next incarnation of the rank can take over: the weights, without cache and
    /// activations.
    pub fn into_weights(self) -> Kept<D> {
        self.weights
    }

    /// The model this decoder runs.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Checks a step against model and cache and lays its rows out.
    fn batch<'a>(&self, step: &Step, blocks: &'a [Vec<u32>]) -> Result<Batch<'a>, ForwardError> {
        let bad = |what: String| ForwardError::BadStep { number: step.number, what };
        let mut batch = Batch {
            rows: 0,
            tokens: Vec::new(),
            positions: Vec::new(),
            spans: Vec::new(),
            wanted: Vec::new(),
        };
        for (index, (entry, blocks)) in step.entries.iter().zip(blocks).enumerate() {
            let count = entry.tokens.len();
            let end = entry.start.saturating_add(count);
            if count == 0 {
                return Err(bad(format!("entry {index} has no tokens")));
            }
            if end > self.context {
                return Err(bad(format!("position {end} is past the context {}", self.context)));
            }
            if blocks.len().saturating_mul(self.block_tokens) < end {
                return Err(bad(format!("entry {index} has too few blocks")));
            }
            if let Some(block) = blocks.iter().find(|b| **b as usize >= self.blocks) {
                return Err(bad(format!("block {block} of {} does not exist", self.blocks)));
            }
            if let Some(token) = entry.tokens.iter().find(|t| **t as usize >= self.spec.vocab) {
                return Err(bad(format!("token {token} is outside the vocabulary")));
            }
            let first = batch.rows;
            batch.tokens.extend_from_slice(&entry.tokens);
            batch.positions.extend((entry.start..end).map(|p| p as u32));
            batch.spans.push(AttendSpan { rows: first..first + count, start: entry.start, blocks });
            let wanted = match entry.want {
                Want::Nothing => count..count,
                Want::Last => count - 1..count,
                Want::All => 0..count,
            };
            batch.wanted.extend(wanted.map(|t| (index, t, (first + t) as u32)));
            batch.rows += count;
        }
        Ok(batch)
    }

    /// `x = embedding[tokens]`, scaled where the model says so. Each stripe gives the rows of its
    /// vocabulary run and zeros for the others, so the sum over stripes is exact.
    fn embed(
        &mut self,
        batch: &Batch<'_>,
        collective: &mut dyn Collective<D>,
    ) -> Result<(), ForwardError> {
        let runs = self.layout.vocab(&self.spec);
        let s = &mut self.scratch;
        let own = self.layout.own.len();
        self.device.reshape(&mut s.partials, own * batch.rows, self.spec.hidden)?;
        self.device.reshape(&mut s.x, batch.rows, self.spec.hidden)?;
        for (i, (piece, run)) in self.edges.embedding.iter().zip(&runs.global).enumerate() {
            let local: Vec<Option<u32>> = batch
                .tokens
                .iter()
                .map(|t| run.contains(&(*t as usize)).then(|| *t - run.start as u32))
                .collect();
            self.device.embed(&piece.matrix, &local, i * batch.rows, &mut s.partials)?;
        }
        let sum = collective.sum_stripes(&self.device, &s.partials, batch.rows, &mut s.x);
        sum.during(Place::Embedding)?;
        if let Some(factor) = self.spec.embedding_scale {
            self.device.scale(&mut s.x, factor)?;
        }
        Ok(())
    }

    /// Adds the tree sum of the stripes' partials, finished as `after` says, to the stream.
    pub(crate) fn add_partials(
        device: &D,
        s: &mut Scratch<D>,
        rows: usize,
        after: After<'_>,
        collective: &mut dyn Collective<D>,
    ) -> Result<(), ForwardError> {
        device.reshape(&mut s.sum, rows, after.hidden)?;
        let sum = collective.sum_stripes(device, &s.partials, rows, &mut s.sum);
        sum.during(after.place)?;
        if after.norm.is_none() && after.scale.is_none() {
            device.add(&mut s.x, &s.sum, after.bias)?;
            return Ok(());
        }
        if after.bias.is_some() {
            // Rare, so a tensor of its own does: the bias comes before norm and factor.
            let zeros = device.tensor(rows, after.hidden)?;
            device.add(&mut s.sum, &zeros, after.bias)?;
        }
        let Some(norm) = after.norm else {
            device.scale(&mut s.sum, after.scale.unwrap_or(1.0))?;
            device.add(&mut s.x, &s.sum, None)?;
            return Ok(());
        };
        device.reshape(&mut s.h, rows, after.hidden)?;
        device.rms_norm(&s.sum, norm, after.eps, &mut s.h)?;
        device.add(&mut s.x, &s.h, None)?;
        Ok(())
    }

    /// Final norm and head at the wanted rows, a bounded number at a time.
    fn logits(
        &mut self,
        batch: &Batch<'_>,
        collective: &mut dyn Collective<D>,
        on_logits: &mut dyn FnMut(Logits<'_>),
    ) -> Result<(), ForwardError> {
        let widths = self.layout.vocab_widths(&self.spec);
        let Runs { total, .. } = self.layout.vocab(&self.spec);
        let (device, s, hidden) = (&self.device, &mut self.scratch, self.spec.hidden);
        let head = self.edges.head.as_ref().unwrap_or(&self.edges.embedding);
        for wanted in batch.wanted.chunks(LOGIT_ROWS) {
            let rows: Vec<u32> = wanted.iter().map(|(_, _, row)| *row).collect();
            device.reshape(&mut s.inner, rows.len(), hidden)?;
            device.gather_rows(&s.x, &rows, &mut s.inner)?;
            device.reshape(&mut s.h, rows.len(), hidden)?;
            device.rms_norm(&s.inner, &self.edges.final_norm, self.spec.norm_eps, &mut s.h)?;
            device.reshape(&mut s.wide, rows.len(), total)?;
            let segments: Vec<_> = head.iter().map(|p| p.outward(0..rows.len())).collect();
            device.matmul(&s.h, &segments, &mut s.wide)?;
            if let Some(factor) = self.spec.logit_scale {
                device.scale(&mut s.wide, factor)?;
            }
            if let Some(cap) = self.spec.logit_softcap {
                device.softcap(&mut s.wide, cap)?;
            }
            let lead = collective.rank() == 0;
            device.reshape(&mut s.expert, if lead { rows.len() } else { 0 }, self.spec.vocab)?;
            let gathered = collective.gather_columns(device, &s.wide, &widths, &mut s.expert);
            gathered.during(Place::Logits)?;
            if lead {
                let all = device.host(&s.expert).chunks_exact(self.spec.vocab);
                for ((entry, token, _), values) in wanted.iter().zip(all) {
                    on_logits(Logits { entry: *entry, token: *token, values });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use collective::{Membership, TreeCollective, local};
    use compute::CpuDevice;

    use super::*;

    #[test]
    fn calls_have_their_place() {
        let layer = 1;
        let places = [0, 1, 2, 3, 4, 5, 6].map(|call| Place::of(call, 2));
        let (first, second) = (Place::Attention { layer: 0 }, Place::FeedForward { layer: 0 });
        let (third, fourth) = (Place::Attention { layer }, Place::FeedForward { layer });
        let logits = Place::Logits;
        assert_eq!(places, [Place::Embedding, first, second, third, fourth, logits, logits]);
        assert_eq!(fourth.to_string(), "sum of the feed-forward in layer 1");
    }

    /// What joins a stream of ones from a branch's sum `[3, 4]`.
    fn joined(bias: Option<&[f32]>, norm: Option<&[f32]>, scale: Option<f32>) -> Vec<f32> {
        let device = CpuDevice::new(1, None).unwrap();
        let mut s = Scratch::new(&device).unwrap();
        for (tensor, values) in [(&mut s.x, [1.0, 1.0]), (&mut s.partials, [3.0, 4.0])] {
            device.reshape(tensor, 1, 2).unwrap();
            device.host_mut(tensor).copy_from_slice(&values);
        }
        let link = local::links(1, Membership { group: 1, epoch: 1 }).remove(0);
        let mut tree = TreeCollective::new(Box::new(link), 1, vec![vec![0]]).unwrap();
        let after = After { place: Place::Logits, hidden: 2, bias, norm, scale, eps: 0.0 };
        Decoder::add_partials(&device, &mut s, 1, after, &mut tree).unwrap();
        device.host(&s.x).iter().map(|x| x - 1.0).collect()
    }

    #[test]
    fn sums_get_their_bias_before_they_are_normed() {
        let near = |got: Vec<f32>, want: [f32; 2]| {
            assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-5), "{got:?} {want:?}");
        };
        near(joined(None, None, None), [3.0, 4.0]);
        near(joined(Some(&[1.0, -4.0]), None, None), [4.0, 0.0]);
        near(joined(Some(&[1.0, -4.0]), None, Some(0.5)), [2.0, 0.0]);
        // The root of the mean square of 3 and 4 is sqrt(12.5).
        near(joined(None, Some(&[2.0, 1.0]), None), [6.0 / 12.5f32.sqrt(), 4.0 / 12.5f32.sqrt()]);
        // Of 4 and 0 it is sqrt(8).
        near(joined(Some(&[1.0, -4.0]), Some(&[2.0, 1.0]), None), [8.0 / 8f32.sqrt(), 0.0]);
    }
}
