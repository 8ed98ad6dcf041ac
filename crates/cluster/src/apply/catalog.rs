//! Commands about what shall be served.

use super::{DEPLOYMENTS_MAX, GROUPS_MAX, MODELS_MAX};
use crate::{ClusterState, Deployment, Event, GroupId, Model, Rejected};

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
        match self.deployments.get(&name) {
            // A coordinator that starts again proposes what it is told to serve again.
            Some(standing) if *standing == deployment => return Ok(Vec::new()),
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
        Ok(vec![Event::Deployed { name }])
    }

    /// The groups go in the same change: none serves what nobody wishes for.
    pub(super) fn undeploy(&mut self, name: String) -> Result<Vec<Event>, Rejected> {
        if self.deployments.remove(&name).is_none() {
            return Err(Rejected::NotDeployed { name });
        }
        let groups: Vec<GroupId> = self.groups_of(&name).map(|(id, _)| id).collect();
        let reason = format!("{name} was undeployed");
        let retired = groups.into_iter().map(|group| self.retire(group, reason.clone()));
        let retired: Vec<Event> = retired.collect();
        Ok(std::iter::once(Event::Undeployed { name }).chain(retired).collect())
    }
}
