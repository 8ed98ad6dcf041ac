//! What the gateway sees of the cluster: where requests go, and whether that still stands.

use std::pin::Pin;
use std::sync::Arc;

use cluster::{ClusterState, Epoch, Phase, Route, Standing};
use tokio::sync::watch;

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

    /// The deployments of a model.
    fn deployments(&self, digest: &str) -> Vec<String>;

    /// Whether that group serves under that epoch. Once it does not it never does again.
    fn stands(&self, route: &Route) -> bool;

    /// A rank of the group whose node is silent, in words, if there is one.
    fn suspect(&self, route: &Route) -> Option<String>;

    /// The next change after this call.
    fn change(&self) -> Change;
}

impl View for watch::Receiver<Arc<ClusterState>> {
    fn routes(&self, deployment: &str) -> Result<Vec<Route>, NoRoute> {
        let state = Arc::clone(&self.borrow());
        let routes = state.routes(deployment);
        if routes.is_empty() {
            let why = cluster::waiting_for(&state, deployment);
            let why = why.unwrap_or_else(|| "no group serves it".to_owned());
            return Err(NoRoute { why, outlook: outlook(&state, deployment) });
        }
        Ok(routes)
    }

    fn deployments(&self, digest: &str) -> Vec<String> {
        let state = self.borrow();
        let mine = state.deployments().values().filter(|one| one.digest == digest);
        mine.map(|one| one.name.clone()).collect()
    }

    fn stands(&self, route: &Route) -> bool {
        let state = self.borrow();
        state
            .groups()
            .get(&route.group)
            .is_some_and(|group| group.epoch == route.epoch && group.phase == Phase::Serving)
    }

    fn suspect(&self, route: &Route) -> Option<String> {
        let state = self.borrow();
        let group = state.groups().get(&route.group)?;
        group.plan.ranks.iter().find_map(|rank| {
            let node = state.nodes().get(&rank.node)?;
            (node.standing == Standing::Suspect).then(|| {
                format!("rank {} on node {} ({}) is silent", rank.rank, rank.node.0, node.name)
            })
        })
    }

    fn change(&self) -> Change {
        let mut view = self.clone();
        view.mark_unchanged();
        Box::pin(async move {
            if view.changed().await.is_err() {
                // Nobody decides any more: the process is about to end.
                std::future::pending::<()>().await;
            }
        })
    }
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
