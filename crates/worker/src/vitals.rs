//! Whether the steps of this worker's ranks get on, for whoever shares the process with it.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::group::Groups;

/// A worker's ranks, once it runs. Clones are the same worker's.
#[derive(Clone, Default)]
pub struct Vitals {
    groups: Arc<Mutex<Weak<Groups>>>,
}

impl std::fmt::Debug for Vitals {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Vitals").finish_non_exhaustive()
    }
}

impl Vitals {
    pub(crate) fn set(&self, groups: &Arc<Groups>) {
        *self.groups.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(groups);
    }

    /// Which group's steps do not get on, in words for an operator; `None` where all do, and
    /// where no worker runs. A step that is merely slow gets on.
    pub fn stalled(&self) -> Option<String> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner).upgrade()?;
        groups.stalled()
    }
}
