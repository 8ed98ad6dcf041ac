//! How a model is cut into stripes: a choice of the deployment, and part of its results' bits.

use std::fmt;
use std::str::FromStr;

/// How the experts of a layer are divided among stripes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ExpertCut {
    /// Every stripe has its columns of every expert.
    #[default]
    Stripe,
    /// Every stripe has a run of whole experts.
    Whole,
}

impl ExpertCut {
    /// Both ways.
    pub const ALL: [ExpertCut; 2] = [ExpertCut::Stripe, ExpertCut::Whole];

    /// Its name on command lines and in messages.
    pub fn name(self) -> &'static str {
        match self {
            ExpertCut::Stripe => "stripe",
            ExpertCut::Whole => "whole",
        }
    }
}

impl fmt::Display for ExpertCut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Text that names no way of dividing experts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not one of stripe, whole")]
pub struct UnknownExpertCut(String);

impl FromStr for ExpertCut {
    type Err = UnknownExpertCut;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|cut| cut.name() == text);
        found.ok_or_else(|| UnknownExpertCut(text.chars().take(32).collect()))
    }
}

/// A cut into stripes. A number alone stands for one with every expert cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cut {
    /// Stripes.
    pub stripes: usize,
    /// How experts are divided among them.
    pub experts: ExpertCut,
}

impl From<usize> for Cut {
    fn from(stripes: usize) -> Self {
        Cut { stripes, experts: ExpertCut::Stripe }
    }
}
