//! Orders to workers, and what their ranks report.

use std::collections::BTreeSet;

use cluster::{ClusterState, Command, Epoch, Group, GroupId, Phase};
use planner::{NodeId, ShardPlan};
use wire::{FormGroup, Held, Order, RankAddress, Report};

use super::{Leader, Output, SessionId, Subject};

impl Leader {
    pub(super) fn order(&mut self, node: NodeId, order: Order) {
        let session = self.contacts.get(&node).and_then(|contact| contact.session);
        let admitted = session.filter(|id| self.sessions.get(id).is_some_and(|s| s.admitted));
        if let Some(session) = admitted {
            self.out.push(Output::Order { session, order });
        }
    }

    pub(super) fn order_all(&mut self, order: &Order) {
        let nodes: Vec<NodeId> = self.contacts.keys().copied().collect();
        nodes.into_iter().for_each(|node| self.order(node, order.clone()));
    }

    /// Tells every node of a group that was just placed to form it.
    pub(super) fn order_formation(&mut self, cluster: &ClusterState, id: GroupId) {
        let Some(group) = cluster.groups().get(&id).filter(|group| group.live()) else { return };
        self.progress.retain(|(of, _), _| *of != id);
        let Some(form) = formation(cluster, id, group) else { return };
        for node in group.nodes() {
            self.order(node, Order::Form(Box::new(form.clone())));
        }
    }

    pub(super) fn order_retirement(
        &mut self,
        group: GroupId,
        epoch: Epoch,
        nodes: &BTreeSet<NodeId>,
        reason: &str,
    ) {
        self.progress.retain(|(of, _), _| *of != group);
        for &node in nodes {
            self.order(node, Order::Retire { group, epoch, reason: reason.to_owned() });
        }
    }

    /// A worker came, perhaps from another leader: orders what it should hold and does not, and
    /// what it holds and should not; takes note of what is ready.
    pub(super) fn bring_up(
        &mut self,
        cluster: &ClusterState,
        session: SessionId,
        node: NodeId,
        held: &[Held],
    ) {
        self.prepare_again(node);
        let mut wanted = BTreeSet::new();
        for (&id, group) in cluster.groups().iter().filter(|(_, group)| group.live()) {
            let ranks = group.plan.ranks.iter().filter(|rank| rank.node == node);
            let ranks: BTreeSet<usize> = ranks.map(|rank| rank.rank).collect();
            if ranks.is_empty() {
                continue;
            }
            let mine = held.iter().filter(|one| (one.group, one.epoch) == (id, group.epoch));
            let mine: Vec<&Held> = mine.collect();
            let have: BTreeSet<usize> = mine.iter().map(|one| one.rank).collect();
            if have.is_empty() && group.ready.is_disjoint(&ranks) {
                if let Some(form) = formation(cluster, id, group) {
                    let order = Order::Form(Box::new(form));
                    self.out.push(Output::Order { session, order });
                }
                wanted.insert((id, group.epoch));
            } else if have == ranks {
                wanted.insert((id, group.epoch));
                for one in mine.into_iter().filter(|one| one.ready) {
                    self.rank_ready(id, group.epoch, one.rank, group);
                }
            } else {
                let reason = format!("node {} holds its ranks no longer", node.0);
                self.fence(id, group.epoch, reason);
            }
        }
        let stale: BTreeSet<_> = held.iter().map(|one| (one.group, one.epoch)).collect();
        for &(group, epoch) in stale.difference(&wanted) {
            let reason = "the group has moved on".to_owned();
            let order = Order::Retire { group, epoch, reason };
            self.out.push(Output::Order { session, order });
        }
    }

    /// A worker may have ranks of incarnations that are over: it is told again, should it have
    /// missed it.
    pub(super) fn outlived(
        &mut self,
        cluster: &ClusterState,
        session: SessionId,
        groups: &[(GroupId, Epoch)],
    ) {
        for &(group, epoch) in groups {
            let stands = cluster.groups().get(&group);
            // What is newer than the state here is known to whoever decided it.
            if stands.is_some_and(|one| epoch > one.epoch || (one.live() && epoch == one.epoch)) {
                continue;
            }
            self.stale_reports += 1;
            let reason = "the group has moved on".to_owned();
            let order = Order::Retire { group, epoch, reason };
            self.out.push(Output::Order { session, order });
        }
    }

    pub(super) fn rank_report(&mut self, cluster: &ClusterState, node: NodeId, report: Report) {
        let (id, epoch, rank) = match report {
            Report::Progress { group, epoch, rank, .. }
            | Report::Ready { group, epoch, rank }
            | Report::Failed { group, epoch, rank, .. } => (group, epoch, rank),
            Report::Join(..) | Report::Heartbeat(_) | Report::Prepared { .. } => return,
        };
        if matches!(report, Report::Progress { .. }) && self.prepares(node, (id, epoch)) {
            return;
        }
        let group = cluster.groups().get(&id);
        let group = group.filter(|group| group.live() && group.epoch == epoch);
        let owned =
            |group: &&Group| group.plan.ranks.get(rank).is_some_and(|planned| planned.node == node);
        let Some(group) = group.filter(owned) else {
            // Usual while a group is being retired: the worker has not heard of it yet.
            self.stale_reports += 1;
            tracing::debug!(node = node.0, group = %id, %epoch, rank, "another's rank reported");
            return;
        };
        match report {
            Report::Progress { bytes_read, bytes_total, .. } => {
                self.progress.insert((id, rank), (bytes_read, bytes_total));
                if group.phase == Phase::Forming {
                    self.propose(Subject::Group(id), Command::Loading { group: id, epoch });
                }
            }
            Report::Ready { .. } => self.rank_ready(id, epoch, rank, group),
            Report::Failed { reason, blames, .. } => {
                tracing::debug!(group = %id, %epoch, rank, ?blames, reason, "a rank failed");
                // Only the first report is believed: the others fail because it has.
                if !self.is_pending(Subject::Rank(id, epoch, usize::MAX)) {
                    self.rank_failed(cluster, (id, group), rank, blames);
                }
                let reason = format!("rank {rank} on node {} failed: {reason}", node.0);
                self.fence(id, epoch, reason);
            }
            Report::Join(..) | Report::Heartbeat(_) | Report::Prepared { .. } => {}
        }
    }

    fn rank_ready(&mut self, id: GroupId, epoch: Epoch, rank: usize, group: &Group) {
        if !group.ready.contains(&rank) {
            let command = Command::RankReady { group: id, epoch, rank };
            self.propose(Subject::Rank(id, epoch, rank), command);
        }
    }

    pub(super) fn fence(&mut self, group: GroupId, epoch: Epoch, reason: String) {
        // A rank number that no group has: a fence is never held up by a report of readiness.
        let subject = Subject::Rank(group, epoch, usize::MAX);
        self.propose(subject, Command::Fence { group, epoch, reason });
    }
}

/// Who is still there, so that workers refuse those who are not; none where nobody was removed.
pub(super) fn roll(cluster: &ClusterState) -> Option<Order> {
    let (given, present) = cluster.roll();
    (present.len() as u64 != given).then_some(Order::Roll { given, present })
}

fn formation(cluster: &ClusterState, id: GroupId, group: &Group) -> Option<FormGroup> {
    let deployment = cluster.deployments().get(&group.deployment)?;
    Some(FormGroup {
        group: id,
        epoch: group.epoch,
        deployment: deployment.clone(),
        plan: group.plan.clone(),
        addresses: addresses(cluster, &group.plan),
    })
}

/// Where the ranks of a group are, by rank.
pub(super) fn addresses(cluster: &ClusterState, plan: &ShardPlan) -> Vec<RankAddress> {
    let ranks = plan.ranks.iter().filter_map(|rank| {
        let info = cluster.nodes().get(&rank.node)?.info.as_ref()?;
        Some(RankAddress {
            node: rank.node,
            worker_address: info.worker_address.clone(),
            collective_address: info.collective_addresses.get(rank.device)?.clone(),
        })
    });
    ranks.collect()
}
