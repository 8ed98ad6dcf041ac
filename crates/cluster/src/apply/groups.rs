//! Commands about groups: placed, loading, serving, fenced, retired.

use std::collections::BTreeSet;

use planner::{RankPlan, ShardPlan};

use super::{GROUPS_MAX, REASON_MAX};
use crate::{ClusterState, Deployment, Epoch, Event, Group, GroupId, MOVED, Phase, Rejected};

impl ClusterState {
    pub(super) fn place(
        &mut self,
        group: GroupId,
        deployment: String,
        epoch: Epoch,
        plan: ShardPlan,
    ) -> Result<Vec<Event>, Rejected> {
        let Some(wish) = self.deployments.get(&deployment) else {
            return Err(Rejected::NotDeployed { name: deployment });
        };
        let expected = match self.groups.get(&group) {
            Some(known) if known.deployment != deployment => {
                let deployment = known.deployment.clone();
                return Err(Rejected::OtherDeployment { group, deployment });
            }
            Some(known) => known.next_epoch().ok_or(Rejected::GroupGone { group })?,
            None => self.new_group(group, wish)?,
        };
        if epoch != expected {
            return Err(Rejected::WrongEpoch { group, expected, got: epoch });
        }
        self.check_plan(group, wish, &plan)?;
        self.last_group = self.last_group.max(group);
        let mut events = Vec::new();
        let (phase, ready) = (Phase::Forming, BTreeSet::new());
        if self.groups.get(&group).is_some_and(Group::live) {
            events.push(self.fence(group, MOVED.to_owned()));
        }
        // Why it has to form again is of interest until it serves.
        let reason = self.groups.remove(&group).map_or(String::new(), |known| known.reason);
        self.groups.insert(group, Group { deployment, epoch, plan, phase, ready, reason });
        events.push(Event::GroupPlaced { group, epoch });
        Ok(events)
    }

    /// Checks the number of a group that is not known; its first epoch.
    fn new_group(&self, group: GroupId, wish: &Deployment) -> Result<Epoch, Rejected> {
        let last = self.last_group;
        // A leap would use up numbers, and nobody needs one: a refused command before this one
        // leaves a gap of as many as were proposed together.
        if group <= last || group.0 - last.0 > GROUPS_MAX as u64 {
            return Err(Rejected::WrongGroup { group, last });
        }
        let all = self.groups.values().filter(|group| group.phase != Phase::Retired).count();
        if all >= GROUPS_MAX {
            return Err(Rejected::Full { what: "groups", limit: GROUPS_MAX });
        }
        let replicas = self.groups_of(&wish.name).count();
        if replicas >= wish.replicas {
            let deployment = wish.name.clone();
            return Err(Rejected::EnoughReplicas { deployment, replicas });
        }
        Ok(Epoch::FIRST)
    }

    fn check_plan(
        &self,
        group: GroupId,
        wish: &Deployment,
        plan: &ShardPlan,
    ) -> Result<(), Rejected> {
        let Some(model) = self.models.get(&wish.digest) else {
            return Err(Rejected::UnknownModel { digest: wish.digest.clone() });
        };
        plan.check(&model.spec).map_err(Rejected::BadPlan)?;
        let (stripes, ranks) = (plan.stripes, plan.ranks.len());
        if stripes != wish.stripe_count(&model.spec) || ranks > wish.ranks {
            return Err(Rejected::OtherPlan { stripes, ranks });
        }
        // Devices that the group itself holds will be free by then.
        let taken = self.taken(Some(group));
        for rank in &plan.ranks {
            self.check_rank(wish, rank)?;
            if taken.contains(&(rank.node, rank.device)) {
                return Err(Rejected::DeviceTaken { node: rank.node, device: rank.device });
            }
        }
        Ok(())
    }

    fn check_rank(&self, wish: &Deployment, rank: &RankPlan) -> Result<(), Rejected> {
        let (node, device) = (rank.node, rank.device);
        if self.removed(node) {
            return Err(Rejected::NodeGone { node });
        }
        let entry = self.nodes.get(&node).ok_or(Rejected::UnknownNode { node })?;
        let Some(info) = entry.info.as_ref().filter(|_| entry.open()) else {
            return Err(Rejected::WrongStanding { node, standing: entry.word() });
        };
        if !wish.allows(node) {
            return Err(Rejected::NodeNotAllowed { node });
        }
        if !info.model_digests.contains(&wish.digest) {
            let (expected, got) = (wish.digest.clone(), info.models_line());
            return Err(Rejected::WrongDigest { expected, got });
        }
        let spec = info.devices.get(device).ok_or(Rejected::UnknownDevice { node, device })?;
        let needed = rank.weight_bytes.saturating_add(rank.kv_bytes);
        let available = spec.memory_bytes;
        if needed > available {
            return Err(Rejected::TooSmall { node, device, needed, available });
        }
        Ok(())
    }

    pub(super) fn loading(&mut self, group: GroupId, epoch: Epoch) -> Result<Vec<Event>, Rejected> {
        let entry = self.placed(group, epoch)?;
        if entry.phase != Phase::Forming {
            return Ok(Vec::new());
        }
        entry.phase = Phase::Loading;
        Ok(vec![Event::GroupLoading { group, epoch }])
    }

    pub(super) fn rank_ready(
        &mut self,
        group: GroupId,
        epoch: Epoch,
        rank: usize,
    ) -> Result<Vec<Event>, Rejected> {
        let entry = self.placed(group, epoch)?;
        let ranks = entry.plan.ranks.len();
        if rank >= ranks {
            return Err(Rejected::UnknownRank { group, rank });
        }
        let first = entry.ready.insert(rank);
        if first && entry.ready.len() == ranks {
            entry.phase = Phase::Serving;
            entry.reason.clear();
            return Ok(vec![Event::GroupServing { group, epoch }]);
        }
        if entry.phase == Phase::Forming {
            entry.phase = Phase::Loading;
            return Ok(vec![Event::GroupLoading { group, epoch }]);
        }
        Ok(Vec::new())
    }

    /// The group, if this is its epoch and it was not retired.
    pub(super) fn unretired(
        &mut self,
        group: GroupId,
        epoch: Epoch,
    ) -> Result<&mut Group, Rejected> {
        let entry = self.groups.get_mut(&group).ok_or(Rejected::UnknownGroup { group })?;
        if entry.epoch != epoch {
            return Err(Rejected::WrongEpoch { group, expected: entry.epoch, got: epoch });
        }
        if entry.phase == Phase::Retired {
            return Err(Rejected::GroupGone { group });
        }
        Ok(entry)
    }

    /// The group, if this is its epoch and its ranks own their devices.
    pub(super) fn placed(&mut self, group: GroupId, epoch: Epoch) -> Result<&mut Group, Rejected> {
        let entry = self.unretired(group, epoch)?;
        if entry.live() { Ok(entry) } else { Err(Rejected::NotPlaced { group }) }
    }

    /// Ends a live group's incarnation. Its epoch moves at once, so that nothing of the one before
    /// is accepted any more, whenever the next is placed.
    pub(super) fn fence(&mut self, group: GroupId, reason: String) -> Event {
        let reason = cut(reason);
        let entry = self.groups.get_mut(&group).expect("the caller found the group live");
        let (epoch, next, nodes) = (entry.epoch, entry.epoch.next(), entry.nodes());
        entry.epoch = next;
        entry.phase = Phase::Repairing;
        entry.ready.clear();
        entry.reason = reason.clone();
        Event::GroupFenced { group, epoch, next, nodes, reason }
    }

    /// The caller has found the group not retired.
    pub(super) fn retire(&mut self, group: GroupId, reason: String) -> Event {
        let reason = cut(reason);
        let entry = self.groups.get_mut(&group).expect("the caller found the group");
        let nodes = if entry.live() { entry.nodes() } else { BTreeSet::new() };
        entry.phase = Phase::Retired;
        entry.reason = reason.clone();
        Event::GroupRetired { group, epoch: entry.epoch, nodes, reason }
    }
}

fn cut(mut reason: String) -> String {
    reason.truncate(reason.floor_char_boundary(REASON_MAX));
    reason
}
