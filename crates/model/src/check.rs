//! A spec that came from elsewhere: as JSON, and what of it is refused.
//!
//! A spec made from a config holds what its family allows. One that a peer sends may hold anything,
//! so every number that planner, loader or decoder divide by, index with or allocate for is checked
//! by the limits that configs are read by.

use std::ops::RangeInclusive;

use crate::config::check_size;
use crate::families::limits;
use crate::spec::{
    Activation, Attention, Dense, Experts, FeedForward, GroupScore, Grouped, Latent, LayerSpec,
    ModelSpec, Rope, RopeScaling,
};

/// Most tokens that end a sequence, and most prefixes of tensors that are left out.
const LISTED: usize = 4096;
/// Most bytes of such a prefix.
const PREFIX: usize = 256;

/// A spec that describes no model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct SpecError {
    /// The field.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: SpecProblem,
}

/// What can be wrong with a field of a spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum SpecProblem {
    /// The text is no JSON of a spec, or longer than any.
    #[error("is not the JSON of a spec")]
    NotASpec,
    /// A count, width or id that no model has.
    #[error("is out of range")]
    OutOfRange,
    /// NaN, infinite, or of a sign that has no meaning.
    #[error("is not a number that can be meant")]
    NotANumber,
    /// A count that is no multiple of what has to divide it.
    #[error("does not divide evenly")]
    Uneven,
    /// Fields that say different things.
    #[error("contradicts another field")]
    Contradiction,
    /// Each field is plausible, together they are more than any machine holds.
    #[error("is too much")]
    TooBig,
}

type Checked = Result<(), SpecError>;

impl ModelSpec {
    /// Longest JSON of a spec that is read. Published models take a few kilobytes.
    pub const JSON_MAX: usize = 128 << 10;

    /// The spec as JSON; the same spec gives the same text.
    pub fn to_json(&self) -> String {
        // Only maps with other keys than text and failing writers can fail, and there are none.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The spec of this JSON, checked.
    ///
    /// # Errors
    /// [`SpecError`] names the first field that is wrong.
    pub fn from_json(json: &str) -> Result<Self, SpecError> {
        let wrong = || wrong("spec", SpecProblem::NotASpec);
        if json.len() > Self::JSON_MAX {
            return Err(wrong());
        }
        let spec: Self = serde_json::from_str(json).map_err(|_| wrong())?;
        spec.check()?;
        Ok(spec)
    }

    /// Refuses what no config could have said and what planner or decoder could not work with.
    ///
    /// # Errors
    /// [`SpecError`] names the first field that is wrong.
    pub fn check(&self) -> Result<(), SpecError> {
        within("hidden", self.hidden, 1..=limits::WIDTH)?;
        within("vocab", self.vocab, 1..=limits::VOCAB)?;
        within("context", self.context, 1..=limits::CONTEXT)?;
        within("layers", self.layers.len(), 1..=limits::LAYERS)?;
        positive("norm_eps", self.norm_eps.into())?;
        let scales = [
            ("embedding_scale", self.embedding_scale),
            ("branch_scale", self.branch_scale),
            ("logit_scale", self.logit_scale),
        ];
        for (field, scale) in scales {
            scale.map_or(Ok(()), |scale| positive(field, scale.into()))?;
        }
        self.logit_softcap.map_or(Ok(()), |cap| positive("logit_softcap", cap.into()))?;
        within("eos", self.eos.len(), 0..=LISTED)?;
        for &token in self.bos.iter().chain(&self.eos) {
            within("bos or eos", token as usize, 0..=self.vocab - 1)?;
        }
        within("ignored_prefixes", self.ignored_prefixes.len(), 0..=LISTED)?;
        for prefix in &self.ignored_prefixes {
            within("ignored_prefixes", prefix.len(), 0..=PREFIX)?;
        }
        within("format", self.format.block(), 1..=limits::WIDTH)?;
        for layers in self.layers.chunk_by(|a, b| a == b) {
            layer(&layers[0])?;
        }
        check_size(self).map_err(|_| wrong("spec", SpecProblem::TooBig))
    }
}

fn wrong(field: &'static str, problem: SpecProblem) -> SpecError {
    SpecError { field, problem }
}

fn within(field: &'static str, value: usize, allowed: RangeInclusive<usize>) -> Checked {
    if allowed.contains(&value) { Ok(()) } else { Err(wrong(field, SpecProblem::OutOfRange)) }
}

fn positive(field: &'static str, value: f64) -> Checked {
    let fine = value.is_finite() && value > 0.0;
    if fine { Ok(()) } else { Err(wrong(field, SpecProblem::NotANumber)) }
}

fn layer(layer: &LayerSpec) -> Checked {
    match &layer.attention {
        Attention::Grouped(attention) => grouped(attention)?,
        Attention::Latent(attention) => latent(attention)?,
    }
    match &layer.feed_forward {
        FeedForward::Dense(Dense { width, activation: joined, .. }) => {
            within("width", *width, 1..=limits::WIDTH)?;
            activation(*joined)
        }
        FeedForward::Experts(mixture) => experts(mixture),
    }
}

fn grouped(attention: &Grouped) -> Checked {
    let Grouped { heads, kv_heads, head_dim, .. } = *attention;
    within("heads", heads, 1..=limits::HEADS)?;
    within("kv_heads", kv_heads, 1..=limits::HEADS)?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(wrong("heads", SpecProblem::Uneven));
    }
    within("head_dim", head_dim, 1..=limits::HEAD_DIM)?;
    within("heads", heads * head_dim, 1..=limits::WIDTH)?;
    attention.softcap.map_or(Ok(()), |cap| positive("softcap", cap.into()))?;
    positive("scale", attention.scale.into())?;
    attention.window.map_or(Ok(()), |window| within("window", window, 1..=usize::MAX))?;
    rope(&attention.rope, head_dim)
}

fn latent(attention: &Latent) -> Checked {
    let Latent { heads, query_rank, kv_rank, nope_dim, rope_dim, value_dim, .. } = *attention;
    within("heads", heads, 1..=limits::HEADS)?;
    query_rank.map_or(Ok(()), |rank| within("query_rank", rank, 1..=limits::WIDTH))?;
    within("kv_rank", kv_rank, 1..=limits::WIDTH)?;
    for (field, dim) in [("nope_dim", nope_dim), ("rope_dim", rope_dim), ("value_dim", value_dim)] {
        within(field, dim, 1..=limits::HEAD_DIM)?;
    }
    within("heads", heads * (nope_dim + rope_dim.max(value_dim)), 1..=limits::WIDTH)?;
    positive("scale", attention.scale.into())?;
    if attention.rope.dims != rope_dim {
        return Err(wrong("rope_dim", SpecProblem::Contradiction));
    }
    rope(&attention.rope, rope_dim)
}

fn rope(rope: &Rope, columns: usize) -> Checked {
    within("rope.dims", rope.dims, 2..=columns)?;
    if !rope.dims.is_multiple_of(2) {
        return Err(wrong("rope.dims", SpecProblem::Uneven));
    }
    let positive = |values: &[f64]| values.iter().try_for_each(|&v| positive("rope.scaling", v));
    if !(rope.theta.is_finite() && rope.theta >= 1.0) {
        return Err(wrong("rope.theta", SpecProblem::NotANumber));
    }
    match rope.scaling {
        RopeScaling::None => Ok(()),
        RopeScaling::Linear { factor } => positive(&[factor]),
        RopeScaling::Divided { ref by } => {
            within("rope.scaling", by.len(), rope.dims / 2..=rope.dims / 2)?;
            by.iter().try_for_each(|&by| positive(&[by.into()]))
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            positive(&[factor, low_freq_factor, high_freq_factor, original_context])?;
            // The ramp divides by the difference of the two.
            positive(&[high_freq_factor - low_freq_factor])
        }
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, magnitude, .. } => {
            positive(&[factor, original_context, beta_fast, beta_slow, magnitude.into()])?;
            positive(&[beta_fast - beta_slow])
        }
    }
}

fn activation(activation: Activation) -> Checked {
    match activation {
        Activation::Silu | Activation::GeluTanh => Ok(()),
        Activation::ClampedSwiglu { alpha, limit } => {
            positive("activation", alpha.into())?;
            positive("activation", limit.into())
        }
    }
}

fn experts(experts: &Experts) -> Checked {
    within("experts.count", experts.count, 1..=limits::EXPERTS)?;
    within("experts.chosen", experts.chosen, 1..=experts.count)?;
    within("experts.width", experts.width, 1..=limits::WIDTH)?;
    positive("router.scale", experts.router.scale.into())?;
    if let Some(groups) = experts.router.groups {
        within("router.groups", groups.count, 1..=experts.count)?;
        if !experts.count.is_multiple_of(groups.count) {
            return Err(wrong("router.groups", SpecProblem::Uneven));
        }
        // Where every group stays there is nothing to choose, and no groups are said to be.
        within("router.groups", groups.chosen, 1..=groups.count - 1)?;
        let each = experts.count / groups.count;
        let least = if groups.by == GroupScore::TopTwoSum { 2 } else { 1 };
        within("router.groups", each, least..=experts.count)?;
        within("experts.chosen", experts.chosen, 1..=groups.chosen * each)?;
    }
    if let Some(shared) = experts.shared {
        within("shared.width", shared.width, 1..=limits::WIDTH)?;
    }
    activation(experts.activation)
}
