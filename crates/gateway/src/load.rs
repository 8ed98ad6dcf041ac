//! How much of this gateway's work each group has: a new request goes where there is least.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cluster::{GroupId, Route};

/// Open sequences by group. Cloning shares the counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Load {
    open: Arc<Mutex<BTreeMap<GroupId, usize>>>,
}

/// One open sequence; dropping it takes it off.
#[derive(Debug)]
pub(crate) struct Busy {
    load: Load,
    group: GroupId,
}

impl Load {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<GroupId, usize>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The route with the least open work; of equals the first.
    pub(crate) fn least(&self, routes: Vec<Route>) -> Option<Route> {
        let open = self.lock();
        routes.into_iter().min_by_key(|route| open.get(&route.group).copied().unwrap_or(0))
    }

    /// One more sequence on a group.
    pub(crate) fn begin(&self, group: GroupId) -> Busy {
        *self.lock().entry(group).or_insert(0) += 1;
        Busy { load: self.clone(), group }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut open = self.load.lock();
        if let Some(count) = open.get_mut(&self.group) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.group);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use cluster::{Epoch, NodeId};

    use super::*;

    fn route(group: u64) -> Route {
        let leader_address = "host:1".to_owned();
        Route { group: GroupId(group), epoch: Epoch(1), leader: NodeId(1), leader_address }
    }

    #[test]
    fn requests_go_where_there_is_least_to_do() {
        let load = Load::default();
        let least = || load.least(vec![route(1), route(2)]).map(|route| route.group.0);
        assert_eq!(least(), Some(1));
        let first = load.begin(GroupId(1));
        assert_eq!(least(), Some(2));
        let _second = load.begin(GroupId(2));
        let _third = load.begin(GroupId(2));
        assert_eq!(least(), Some(1));
        drop(first);
        assert_eq!(load.lock().get(&GroupId(1)), None);
        assert!(load.least(Vec::new()).is_none());
    }
}
