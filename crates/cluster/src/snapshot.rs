//! The whole state as plain lists, for whoever writes it down; and the way back, which trusts
//! nothing.

use std::collections::BTreeMap;

use planner::{NodeId, PlanError};

use crate::apply::REASON_MAX;
use crate::fields::{bad, text};
use crate::outcome::Outcomes;
use crate::{
    Alias, BadField, ClusterState, Deployment, Group, GroupId, IntegrityError, Model, Node,
    Outcome, Phase, RequestId, Token, TokenId,
};

/// Numbers beyond this are none that counting could have reached; below it, counting on is safe.
const NUMBER_MAX: u64 = 1 << 62;

/// Everything there is to a [`ClusterState`]; the lists are in ascending order, outcomes in the
/// order in which they came.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Snapshot {
    /// Log index of the last command that was accepted.
    pub index: u64,
    /// Commands accepted.
    pub revision: u64,
    /// How often certificates were rotated.
    pub generation: u64,
    /// Greatest node number given.
    pub last_node: u64,
    /// Greatest group number given.
    pub last_group: GroupId,
    /// Registered models.
    pub models: Vec<Model>,
    /// What shall be served.
    pub deployments: Vec<Deployment>,
    /// Names of those that get no new requests.
    pub draining: Vec<String>,
    /// Further names, and what they mean.
    pub aliases: Vec<(String, Alias)>,
    /// Nodes by number.
    pub nodes: Vec<(NodeId, Node)>,
    /// Used tokens.
    pub tokens: Vec<(TokenId, Token)>,
    /// Groups by number.
    pub groups: Vec<(GroupId, Group)>,
    /// Remembered outcomes.
    pub outcomes: Vec<(RequestId, Outcome)>,
}

/// A snapshot that no state can have written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Something is listed twice, or not in order.
    #[error("{what} are not in ascending order")]
    NotAscending {
        /// Of what.
        what: &'static str,
    },
    /// A field that holds what it may not.
    #[error(transparent)]
    Field(#[from] BadField),
    /// A group's plan is none for its deployment.
    #[error("plan: {0}")]
    Plan(#[from] PlanError),
    /// The parts contradict each other.
    #[error(transparent)]
    Integrity(#[from] IntegrityError),
}

impl ClusterState {
    /// The state as plain lists.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            index: self.index,
            revision: self.revision,
            generation: self.generation,
            last_node: self.last_node,
            last_group: self.last_group,
            models: self.models.values().cloned().collect(),
            deployments: self.deployments.values().cloned().collect(),
            draining: self.draining.iter().cloned().collect(),
            aliases: self.aliases.iter().map(|(n, meant)| (n.clone(), meant.clone())).collect(),
            nodes: self.nodes.iter().map(|(&id, node)| (id, node.clone())).collect(),
            tokens: self.tokens.iter().map(|(&id, token)| (id, token.clone())).collect(),
            groups: self.groups.iter().map(|(&id, group)| (id, group.clone())).collect(),
            outcomes: self.outcomes.iter().map(|(id, outcome)| (id, outcome.clone())).collect(),
        }
    }

    /// The state that wrote this snapshot. Everything is checked as if each part had come by a
    /// command, so that a forged or damaged one makes no state at all.
    ///
    /// # Errors
    /// [`RestoreError`] names the first thing that is wrong.
    pub fn restore(snapshot: Snapshot) -> Result<Self, RestoreError> {
        let mut state = Self {
            index: snapshot.index,
            revision: snapshot.revision,
            generation: snapshot.generation,
            last_node: snapshot.last_node,
            last_group: snapshot.last_group,
            ..Self::default()
        };
        let numbers =
            [state.index, state.revision, state.generation, state.last_node, state.last_group.0];
        if numbers.iter().any(|&number| number > NUMBER_MAX) {
            return Err(bad("a number", "is out of range").into());
        }
        let models = snapshot.models.into_iter().map(|model| (model.digest.clone(), model));
        state.models = ascending("models", models)?;
        let wishes = snapshot.deployments.into_iter().map(|one| (one.name.clone(), one));
        state.deployments = ascending("deployments", wishes)?;
        let draining = snapshot.draining.into_iter().map(|name| (name, ()));
        state.draining = ascending("draining deployments", draining)?.into_keys().collect();
        state.aliases = ascending("aliases", snapshot.aliases.into_iter())?;
        state.nodes = ascending("nodes", snapshot.nodes.into_iter())?;
        state.tokens = ascending("tokens", snapshot.tokens.into_iter())?;
        state.groups = ascending("groups", snapshot.groups.into_iter())?;
        let mut outcomes = Outcomes::default();
        for (request, outcome) in snapshot.outcomes {
            if outcomes.get(&request).is_some() {
                return Err(RestoreError::NotAscending { what: "outcomes" });
            }
            outcomes.remember(request, outcome);
        }
        if !outcomes.bounded() {
            return Err(IntegrityError::Outcomes.into());
        }
        state.outcomes = outcomes;
        state.check_integrity()?;
        state.check_records()?;
        Ok(state)
    }

    /// Checks every part by itself, and plans by their models.
    fn check_records(&self) -> Result<(), RestoreError> {
        self.models.values().try_for_each(Model::check)?;
        for wish in self.deployments.values() {
            if let Some(model) = self.models.get(&wish.digest) {
                wish.check(&model.spec)?;
            }
        }
        self.aliases.keys().try_for_each(|alias| text("alias", alias))?;
        for node in self.nodes.values() {
            node.check()?;
            if node.incarnation > NUMBER_MAX {
                return Err(bad("incarnation", "is out of range").into());
            }
        }
        for token in self.tokens.values() {
            if token.uses == 0 || token.uses > token.uses_max {
                return Err(bad("uses", "is out of range").into());
            }
        }
        self.groups.values().try_for_each(|group| self.check_record(group))
    }

    fn check_record(&self, group: &Group) -> Result<(), RestoreError> {
        text("deployment", &group.deployment)?;
        if group.reason.len() > REASON_MAX {
            return Err(bad("reason", "is too long").into());
        }
        if group.epoch.0 > NUMBER_MAX {
            return Err(bad("epoch", "is out of range").into());
        }
        // What a retired group was a replica of may be gone or another by now.
        if group.phase == Phase::Retired {
            return Ok(());
        }
        let wish = self.deployments.get(&group.deployment);
        let Some((wish, model)) = wish.and_then(|one| Some((one, self.models.get(&one.digest)?)))
        else {
            return Ok(());
        };
        group.plan.check(&model.spec)?;
        let (stripes, ranks) = (group.plan.stripes, group.plan.ranks.len());
        if stripes != wish.stripe_count(&model.spec) || ranks > wish.ranks {
            return Err(bad("plan", "has another shape than the deployment").into());
        }
        Ok(())
    }
}

fn ascending<K: Ord + Clone, V>(
    what: &'static str,
    entries: impl Iterator<Item = (K, V)>,
) -> Result<BTreeMap<K, V>, RestoreError> {
    let mut map = BTreeMap::new();
    for (key, value) in entries {
        if map.last_key_value().is_some_and(|(last, _)| *last >= key) {
            return Err(RestoreError::NotAscending { what });
        }
        map.insert(key, value);
    }
    Ok(map)
}
