//! `apply`: the one way in which anything changes.

mod catalog;
mod groups;
mod nodes;

use planner::NodeId;

use crate::outcome::outcome;
use crate::{ClusterState, Command, Event, GroupId, Phase, Proposal, Rejected, Standing};

/// Retired groups that are kept for whoever asks what happened.
pub(crate) const RETIRED_KEPT: usize = 32;
/// Nodes that left, kept likewise.
pub(crate) const LEFT_KEPT: usize = 32;
/// Most nodes that have not left.
pub(crate) const NODES_MAX: usize = 1024;
/// Most tokens that are remembered.
pub(crate) const TOKENS_MAX: usize = 1024;
/// Most models that are registered.
pub(crate) const MODELS_MAX: usize = 64;
/// Most deployments.
pub(crate) const DEPLOYMENTS_MAX: usize = 64;
/// Most names beside those of deployments.
pub(crate) const ALIASES_MAX: usize = 64;
/// Most groups of all deployments together that shall serve.
pub(crate) const GROUPS_MAX: usize = 256;
/// Most bytes of a reason; longer ones are cut.
pub(crate) const REASON_MAX: usize = 512;

impl ClusterState {
    /// Applies the command at log position `index` and says what changed.
    ///
    /// Every check stands before the first change, so a refused command leaves no trace: neither
    /// `index` nor `revision` moves. Of a command with a request id the outcome is remembered,
    /// refused or not; one whose id is remembered changes nothing and is answered as the first.
    ///
    /// # Errors
    /// [`Rejected`] says why the command was refused.
    pub fn apply(
        &mut self,
        index: u64,
        proposal: impl Into<Proposal>,
    ) -> Result<Vec<Event>, Rejected> {
        let Proposal { request, command } = proposal.into();
        if index <= self.index {
            return Err(Rejected::StaleIndex { index, applied: self.index });
        }
        match request.and_then(|id| self.outcomes.get(&id)) {
            Some(Ok(done)) => return Ok(vec![Event::Repeated(*done)]),
            Some(Err(refusal)) => return Err(Rejected::Repeated(refusal.clone())),
            None => {}
        }
        let result = self.change(command);
        if result.is_ok() {
            self.prune();
            self.index = index;
            self.revision += 1;
        }
        if let Some(request) = request {
            self.outcomes.remember(request, outcome(index, &result));
        }
        result
    }

    fn change(&mut self, command: Command) -> Result<Vec<Event>, Rejected> {
        match command {
            Command::Found { name } => self.found(name),
            Command::Enrol { token, uses_max, expires, now, role, name } => {
                let ticket = nodes::Ticket { token, uses_max, expires, role };
                self.enrol(&ticket, now, name)
            }
            Command::Join { node, info } => self.join(node, info),
            Command::Suspect { node, incarnation } => self.suspect(node, incarnation),
            Command::Recover { node, incarnation } => self.recover(node, incarnation),
            Command::Lost { node, incarnation } => self.lose(node, incarnation),
            Command::Drain { node } => self.drain(node, true),
            Command::Undrain { node } => self.drain(node, false),
            Command::Leave { node } => self.leave(node),
            Command::SetCoordinator { node, at } => self.set_coordinator(node, at),
            Command::RegisterModel(model) => self.register(model),
            Command::ForgetModel { digest } => self.forget_model(digest),
            Command::Deploy(deployment) => self.deploy(deployment),
            Command::Undeploy { name } => self.undeploy(name),
            Command::DrainDeployment { name } => self.drain_deployment(name),
            Command::Point { alias, deployment } => self.point(alias, deployment),
            Command::Unpoint { alias } => self.unpoint(alias),
            Command::Place { group, deployment, epoch, plan } => {
                self.place(group, deployment, epoch, plan)
            }
            Command::Loading { group, epoch } => self.loading(group, epoch),
            Command::RankReady { group, epoch, rank } => self.rank_ready(group, epoch, rank),
            Command::Fence { group, epoch, reason } => {
                self.placed(group, epoch)?;
                Ok(vec![self.fence(group, reason)])
            }
            Command::Retire { group, epoch, reason } => {
                self.unretired(group, epoch)?;
                Ok(vec![self.retire(group, reason)])
            }
            Command::RotateCertificates => {
                self.generation += 1;
                Ok(vec![Event::CertificatesRotated { generation: self.generation }])
            }
        }
    }

    /// Forgets the oldest of what is only kept for information, so that the state stays bounded
    /// however long nodes and groups come and go.
    fn prune(&mut self) {
        let retired = self.groups.iter().filter(|(_, group)| group.phase == Phase::Retired);
        let retired: Vec<GroupId> = retired.map(|(&id, _)| id).collect();
        for id in &retired[..retired.len().saturating_sub(RETIRED_KEPT)] {
            self.groups.remove(id);
        }
        let left = self.nodes.iter().filter(|(_, node)| node.standing == Standing::Left);
        let left: Vec<NodeId> = left.map(|(&id, _)| id).collect();
        for id in &left[..left.len().saturating_sub(LEFT_KEPT)] {
            self.nodes.remove(id);
        }
    }
}
