//! Commands about what shall be served.

use super::{ALIASES_MAX, DEPLOYMENTS_MAX, GROUPS_MAX, MODELS_MAX};
use crate::fields::text;
use crate::{Alias, ClusterState, Deployment, Event, GroupId, Model, Rejected};

impl ClusterState {
    pub(super) fn register(&mut self, model: Model) -> Result<Vec<Event>, Rejected> {
        model.check().map_err(Rejected::BadModel)?;
        let digest = model.digest.clone();
        match self.models.get(&digest) {
            // Every coordinator registers what it finds in its directory when it starts.
            Some(known) if known.spec == model.spec => return Ok(Vec::new()),
            Some(_) => return Err(Rejected::OtherModel { digest }),
            None => {}
        }
        if self.models.len() >= MODELS_MAX {
            return Err(Rejected::Full { what: "models", limit: MODELS_MAX });
        }
        self.models.insert(digest.clone(), model);
        Ok(vec![Event::ModelRegistered { digest }])
    }

    pub(super) fn forget_model(&mut self, digest: String) -> Result<Vec<Event>, Rejected> {
        if !self.models.contains_key(&digest) {
            return Err(Rejected::UnknownModel { digest });
        }
        if let Some(user) = self.deployments.values().find(|one| one.digest == digest) {
            return Err(Rejected::ModelInUse { deployment: user.name.clone() });
        }
        self.models.remove(&digest);
        Ok(vec![Event::ModelForgotten { digest }])
    }

    pub(super) fn deploy(&mut self, deployment: Deployment) -> Result<Vec<Event>, Rejected> {
        let Some(model) = self.models.get(&deployment.digest) else {
            return Err(Rejected::UnknownModel { digest: deployment.digest });
        };
        deployment.check(&model.spec).map_err(Rejected::BadDeployment)?;
        let name = deployment.name.clone();
        if self.aliases.contains_key(&name) {
            return Err(Rejected::NameTaken { name, by: "an alias" });
        }
        match self.deployments.get(&name) {
            // A coordinator that starts again proposes what it is told to serve again.
            Some(standing) if *standing == deployment => return Ok(self.open_again(name)),
            Some(standing) if !standing.same_but_for_scale(&deployment) => {
                return Err(Rejected::AlreadyDeployed { name });
            }
            Some(_) => {}
            None if self.deployments.len() >= DEPLOYMENTS_MAX => {
                return Err(Rejected::Full { what: "deployments", limit: DEPLOYMENTS_MAX });
            }
            None => {}
        }
        let others = self.deployments.values().filter(|other| other.name != name);
        let wanted = others.map(|other| other.replicas).sum::<usize>() + deployment.replicas;
        if wanted > GROUPS_MAX {
            return Err(Rejected::Full { what: "groups wished for", limit: GROUPS_MAX });
        }
        self.deployments.insert(name.clone(), deployment);
        let again = self.open_again(name.clone());
        Ok(std::iter::once(Event::Deployed { name }).chain(again).collect())
    }

    /// Whoever wishes for a deployment wishes that it gets requests.
    fn open_again(&mut self, name: String) -> Vec<Event> {
        match self.draining.remove(&name) {
            true => vec![Event::DeploymentDraining { name, draining: false }],
            false => Vec::new(),
        }
    }

    /// A deployment that no alias means: its requests would have nowhere to go.
    fn nameless(&self, name: &str) -> Result<(), Rejected> {
        if !self.deployments.contains_key(name) {
            return Err(Rejected::NotDeployed { name: name.to_owned() });
        }
        match self.aliases.iter().find(|(_, meant)| meant.deployment == name) {
            Some((alias, _)) => {
                let (deployment, alias) = (name.to_owned(), alias.clone());
                Err(Rejected::PointedAt { deployment, alias })
            }
            None => Ok(()),
        }
    }

    pub(super) fn drain_deployment(&mut self, name: String) -> Result<Vec<Event>, Rejected> {
        self.nameless(&name)?;
        match self.draining.insert(name.clone()) {
            true => Ok(vec![Event::DeploymentDraining { name, draining: true }]),
            false => Ok(Vec::new()),
        }
    }

    pub(super) fn point(
        &mut self,
        alias: String,
        deployment: String,
    ) -> Result<Vec<Event>, Rejected> {
        text("alias", &alias).map_err(Rejected::BadName)?;
        if self.deployments.contains_key(&alias) {
            return Err(Rejected::NameTaken { name: alias, by: "a deployment" });
        }
        if !self.deployments.contains_key(&deployment) {
            return Err(Rejected::NotDeployed { name: deployment });
        }
        if self.draining.contains(&deployment) {
            return Err(Rejected::Draining { deployment });
        }
        let before = match self.aliases.get(&alias) {
            Some(meant) if meant.deployment == deployment => return Ok(Vec::new()),
            Some(meant) => Some(meant.deployment.clone()),
            None if self.aliases.len() >= ALIASES_MAX => {
                return Err(Rejected::Full { what: "aliases", limit: ALIASES_MAX });
            }
            None => None,
        };
        let meant = Alias { deployment: deployment.clone(), before };
        self.aliases.insert(alias.clone(), meant);
        Ok(vec![Event::AliasPointed { alias, deployment }])
    }

    pub(super) fn unpoint(&mut self, alias: String) -> Result<Vec<Event>, Rejected> {
        match self.aliases.remove(&alias) {
            Some(_) => Ok(vec![Event::AliasRemoved { alias }]),
            None => Err(Rejected::UnknownAlias { alias }),
        }
    }

    /// The groups go in the same change: none serves what nobody wishes for.
    pub(super) fn undeploy(&mut self, name: String) -> Result<Vec<Event>, Rejected> {
        self.nameless(&name)?;
        self.deployments.remove(&name);
        self.draining.remove(&name);
        for meant in self.aliases.values_mut() {
            meant.before.take_if(|before| *before == name);
        }
        let groups: Vec<GroupId> = self.groups_of(&name).map(|(id, _)| id).collect();
        let reason = format!("{name} was undeployed");
        let retired = groups.into_iter().map(|group| self.retire(group, reason.clone()));
        let retired: Vec<Event> = retired.collect();
        Ok(std::iter::once(Event::Undeployed { name }).chain(retired).collect())
    }
}
