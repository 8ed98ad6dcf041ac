//! Mistakes on purpose: a simulation that would not notice one of these notices nothing. They are
//! compiled only for the tests across crates, under the feature `mutations`.

use super::{LogStore, Machine, Replica};

/// A mistake.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mistake {
    /// An empty entry is skipped whatever its kind.
    EmptyChangeSkipped,
    /// Answers go out before what they promise is durable.
    AnsweredEarly,
}

impl<S: LogStore, M: Machine> Replica<S, M> {
    /// Makes a mistake from now on.
    #[cfg(feature = "mutations")]
    #[doc(hidden)]
    pub fn mistake(&mut self, mistake: Mistake) {
        self.mistake = Some(mistake);
    }

    #[cfg(feature = "mutations")]
    pub(super) fn makes(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    #[cfg(not(feature = "mutations"))]
    pub(super) fn makes(&self, _mistake: Mistake) -> bool {
        false
    }
}
