//! What the gateway sees of the cluster: where requests go, and whether that still stands.

use std::pin::Pin;
use std::sync::Arc;

use cluster::{ClusterState, Epoch, Group, Phase, Progress, Route, Standing};
use tokio::sync::watch;

use crate::life::Vitals;

/// Where a gateway looks.
#[derive(Clone)]
pub struct Sources {
    /// The cluster's state as this coordinator has applied it.
    pub state: watch::Receiver<Arc<ClusterState>>,
    /// How far ranks have loaded, as far as they said so here.
    pub progress: watch::Receiver<Progress>,
    /// What in this process does not get on.
    pub vitals: Vitals,
}

impl std::fmt::Debug for Sources {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Sources").finish_non_exhaustive()
    }
}

/// Completes when the view has changed since it was asked for.
pub(crate) type Change = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Why no group serves a deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NoRoute {
    /// In words for an operator.
    pub(crate) why: String,
    /// What may come of it.
    pub(crate) outlook: Outlook,
}

/// What a name in a request means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) deployment: String,
    /// Of the deployment's model.
    pub(crate) digest: String,
    /// Longest prompt plus answer, in tokens.
    pub(crate) context: usize,
    /// It gets no new requests.
    pub(crate) draining: bool,
}

/// Whether waiting for a group makes sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outlook {
    /// Nobody wishes for one.
    Gone,
    /// One is wished for and has not served so far.
    Wished,
    /// One served and is being repaired.
    Returns,
}

/// Where requests go at this moment, as far as this gateway knows.
pub(crate) trait View: Send + Sync {
    /// The groups that serve a deployment, at least one, or why none does.
    fn routes(&self, deployment: &str) -> Result<Vec<Route>, NoRoute>;

    /// What an alias or the name of a deployment means.
    fn meant(&self, name: &str) -> Option<Named>;

    /// Every name that means something: aliases first.
    fn names(&self) -> Vec<String>;

    /// Whether that group serves under that epoch. Once it does not it never does again.
    fn stands(&self, route: &Route) -> bool;

    /// Whether the group has left that epoch because its ranks were to move, and not because any of
    /// them failed. Known until it serves again.
    fn moved(&self, route: &Route) -> bool;

    /// A rank of the group whose node is silent, in words, if there is one.
    fn suspect(&self, route: &Route) -> Option<String>;

    /// Of a group that is being repaired: what happened to it, in words.
    fn trouble(&self, deployment: &str) -> Option<String>;

    /// Of groups that do not serve yet: how far each rank is, in words.
    fn loading(&self, deployment: &str) -> Vec<String>;

    /// The next change after this call.
    fn change(&self) -> Change;
}

impl View for Sources {
    fn routes(&self, deployment: &str) -> Result<Vec<Route>, NoRoute> {
        let state = Arc::clone(&self.state.borrow());
        let routes = state.routes(deployment);
        if routes.is_empty() {
            let why = cluster::waiting_for(&state, deployment);
            let why = why.unwrap_or_else(|| "no group serves it".to_owned());
            return Err(NoRoute { why, outlook: outlook(&state, deployment) });
        }
        Ok(routes)
    }

    fn meant(&self, name: &str) -> Option<Named> {
        let state = self.state.borrow();
        let name = state.aliases().get(name).map_or(name, |meant| &meant.deployment);
        let wish = state.deployments().get(name)?;
        Some(Named {
            deployment: wish.name.clone(),
            digest: wish.digest.clone(),
            context: wish.context,
            draining: state.draining().contains(name),
        })
    }

    fn names(&self) -> Vec<String> {
        let state = self.state.borrow();
        state.aliases().keys().chain(state.deployments().keys()).cloned().collect()
    }

    fn stands(&self, route: &Route) -> bool {
        let state = self.state.borrow();
        state
            .groups()
            .get(&route.group)
            .is_some_and(|group| group.epoch == route.epoch && group.phase == Phase::Serving)
    }

    fn moved(&self, route: &Route) -> bool {
        let state = self.state.borrow();
        let group = state.groups().get(&route.group);
        group.is_some_and(|group| group.epoch > route.epoch && group.reason == cluster::MOVED)
    }

    fn suspect(&self, route: &Route) -> Option<String> {
        let state = self.state.borrow();
        let group = state.groups().get(&route.group)?;
        group.plan.ranks.iter().find_map(|rank| {
            let node = state.nodes().get(&rank.node)?;
            (node.standing == Standing::Suspect).then(|| {
                format!("rank {} on node {} ({}) is silent", rank.rank, rank.node.0, node.name)
            })
        })
    }

    fn trouble(&self, deployment: &str) -> Option<String> {
        let state = self.state.borrow();
        let mut groups = state.groups_of(deployment);
        let (id, group) = groups.find(|(_, group)| !serves(group) && !group.reason.is_empty())?;
        Some(format!("group {id} is being repaired: {}", without_addresses(&group.reason)))
    }

    fn loading(&self, deployment: &str) -> Vec<String> {
        let (state, progress) = (self.state.borrow(), self.progress.borrow());
        let forming = state.groups_of(deployment).filter(|(_, group)| group.live());
        let ranks = forming.flat_map(|(id, group)| {
            let progress = &progress;
            group.plan.ranks.iter().map(move |rank| {
                let (number, node) = (rank.rank, rank.node.0);
                let far = match (group.ready.contains(&number), progress.get(&(id, number))) {
                    (true, _) => "loaded 100 %".to_owned(),
                    (false, Some(&(read, total))) => format!("loaded {} %", percent(read, total)),
                    (false, None) => "has not said how far it is".to_owned(),
                };
                format!("rank {number} on node {node}: {far}")
            })
        });
        ranks.collect()
    }

    fn change(&self) -> Change {
        let mut view = self.state.clone();
        view.mark_unchanged();
        Box::pin(async move {
            if view.changed().await.is_err() {
                // Nobody decides any more: the process is about to end.
                std::future::pending::<()>().await;
            }
        })
    }
}

fn serves(group: &Group) -> bool {
    group.phase == Phase::Serving
}

/// Whole per cent; all of nothing is 100.
fn percent(read: u64, total: u64) -> u64 {
    (u128::from(read.min(total)) * 100)
        .checked_div(u128::from(total))
        .map_or(100, |whole| u64::try_from(whole).unwrap_or(100))
}

/// A reason as it may be shown to everybody: words that name a port say where nodes are.
fn without_addresses(reason: &str) -> String {
    let word = |word: &str| {
        let bare = word.trim_end_matches([':', ',', '.', ';', ')']);
        let port = bare.rsplit_once(':').map(|(_, port)| port);
        match port.is_some_and(|port| port.parse::<u16>().is_ok()) {
            true => "its address".to_owned() + &word[bare.len()..],
            false => word.to_owned(),
        }
    };
    reason.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

fn outlook(state: &ClusterState, deployment: &str) -> Outlook {
    if !state.deployments().contains_key(deployment) {
        return Outlook::Gone;
    }
    match state.groups_of(deployment).any(|(_, group)| group.epoch > Epoch::FIRST) {
        true => Outlook::Returns,
        false => Outlook::Wished,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_shown_without_addresses() {
        let shown = without_addresses("rank 1: 10.0.0.7:4100: refused, [::1]:80 (node-3:9)");
        assert_eq!(shown, "rank 1: its address: refused, its address its address)");
        let whole = "rank 2 on node 4 is silent for 1004 ms";
        assert_eq!(without_addresses(whole), whole);
    }

    #[test]
    fn per_cent_is_whole_and_never_more_than_all() {
        assert_eq!([percent(0, 8), percent(3, 8), percent(9, 8)], [0, 37, 100]);
        assert_eq!([percent(0, 0), percent(u64::MAX, u64::MAX)], [100, 100]);
    }
}
