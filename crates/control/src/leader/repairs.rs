//! What the leader knows of groups that are repaired, beside the state: who is at fault, whether
//! anybody holds their stripes, and for how long they have served.

use std::collections::{BTreeMap, BTreeSet};

use cluster::{ClusterState, Epoch, Event, Group, GroupId, Observation, Phase, Standing};
use planner::NodeId;

use super::Leader;

/// How long a node is avoided after a rank of it failed, in milliseconds.
const BLAME: u64 = 10_000;
/// How long a narrow group serves before it takes in spare devices; twice as long after each time
/// that it could not form with them, up to eight doublings.
const SETTLE: u64 = 5_000;
const SETBACKS: u32 = 8;

/// Soft state about repairs.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    /// By fenced group: from when on it may go on with fewer ranks.
    narrow: BTreeMap<GroupId, u64>,
    /// By serving group: since when.
    serving: BTreeMap<GroupId, u64>,
    /// By group: how often in a row it could not form.
    setbacks: BTreeMap<GroupId, u32>,
    /// By node: until when it is avoided.
    avoid: BTreeMap<NodeId, u64>,
}

impl Leader {
    /// What reconciliation has to know beside the state.
    pub(super) fn observe(&mut self, cluster: &ClusterState) -> Observation {
        let (now, takeover) = (self.now, self.timing.takeover);
        let repairs = &mut self.repairs;
        repairs.avoid.retain(|_, until| *until > now);
        let phase = |group: &GroupId| cluster.groups().get(group).map(|group| group.phase);
        repairs.narrow.retain(|group, _| phase(group) == Some(Phase::Repairing));
        repairs.serving.retain(|group, _| phase(group) == Some(Phase::Serving));
        repairs.setbacks.retain(|group, _| phase(group).is_some_and(|one| one != Phase::Retired));
        for (&id, group) in cluster.groups() {
            // What happened before this leader led is as if it happened now.
            if group.phase == Phase::Repairing {
                repairs.narrow.entry(id).or_insert(now + takeover);
            } else if group.phase == Phase::Serving {
                repairs.serving.entry(id).or_insert(now);
            }
        }
        let paused = self.pauses.iter().filter(|(_, pause)| pause.until > now);
        let narrow = repairs.narrow.iter().filter(|(_, from)| **from <= now);
        let setbacks = |group| repairs.setbacks.get(group).map_or(0, |times| *times);
        let settled = repairs
            .serving
            .iter()
            .filter(|(group, since)| **since + (SETTLE << setbacks(group).min(SETBACKS)) <= now);
        Observation {
            paused: paused.map(|(&group, _)| group).collect(),
            // What is placed on a node that has not come to this leader yet would wait for it.
            reachable: Some(
                self.sessions.values().filter(|s| s.admitted).map(|s| s.node).collect(),
            ),
            narrow: narrow.map(|(&group, _)| group).collect(),
            widen: settled.map(|(&group, _)| group).collect(),
            avoid: repairs.avoid.keys().copied().collect(),
        }
    }

    /// Takes note of groups that were fenced: where some of their nodes are there, these hold
    /// their stripes and nobody has to be waited for.
    pub(super) fn note_repairs(&mut self, cluster: &ClusterState, events: &[Event]) {
        // A node that joins is a new process, which holds nothing.
        let fresh = events.iter().filter_map(|event| match event {
            Event::NodeJoined { node, .. } => Some(*node),
            _ => None,
        });
        let fresh: BTreeSet<NodeId> = fresh.collect();
        for event in events {
            match event {
                // Another process than the one that was at fault.
                Event::NodeJoined { node, .. } => {
                    self.repairs.avoid.remove(node);
                    // Somebody else to ask.
                    self.moves.rests.clear();
                }
                Event::GroupFenced { group, nodes, .. } => {
                    let mut nodes = nodes.iter();
                    let there =
                        nodes.any(|node| !fresh.contains(node) && self.there(cluster, *node));
                    let wait = match there || self.replaced(cluster, (*group, &fresh)) {
                        true => 0,
                        false => self.timing.takeover,
                    };
                    self.repairs.narrow.insert(*group, self.now + wait);
                }
                Event::GroupServing { group, .. } => {
                    self.repairs.serving.insert(*group, self.now);
                    self.moves.rests.remove(group);
                    if cluster::degraded_group(cluster, *group).is_none() {
                        self.repairs.setbacks.remove(group);
                    }
                }
                _ => {}
            }
        }
    }

    /// Whether other workers are there, as many as the group had ranks: those that were not there
    /// just now are not the first of a cluster that is being restarted.
    fn replaced(&self, cluster: &ClusterState, (id, fresh): (GroupId, &BTreeSet<NodeId>)) -> bool {
        let Some(group) = cluster.groups().get(&id) else { return false };
        let wish = cluster.deployments().get(&group.deployment);
        let others = cluster.nodes().iter().filter(|(node, _)| {
            !fresh.contains(node)
                && self.there(cluster, **node)
                && wish.is_some_and(|wish| wish.allows(**node))
        });
        let devices: usize = others.map(|(_, node)| node.devices().len()).sum();
        devices >= group.plan.ranks.len()
    }

    /// Whether a node can be told something and does what it is told.
    fn there(&self, cluster: &ClusterState, node: NodeId) -> bool {
        let session = self.contacts.get(&node).and_then(|contact| contact.session);
        let admitted = session.and_then(|id| self.sessions.get(&id)).is_some_and(|s| s.admitted);
        admitted && cluster.nodes().get(&node).is_some_and(cluster::Node::open)
    }

    /// A rank failed. Where a node of the group is gone, that is why, and it is known; else the
    /// one at fault is avoided, and where the others cannot go on without it, placing the group
    /// waits: it may fail again.
    pub(super) fn rank_failed(
        &mut self,
        cluster: &ClusterState,
        (id, group): (GroupId, &Group),
        rank: usize,
        blames: Option<usize>,
    ) {
        if !group.nodes().iter().all(|node| self.there(cluster, *node)) {
            return;
        }
        if group.phase != Phase::Serving && group.epoch > Epoch::FIRST {
            let times = self.repairs.setbacks.entry(id).or_default();
            *times = times.saturating_add(1);
        }
        let at_fault = group.plan.ranks.get(blames.unwrap_or(rank));
        if let Some(planned) = at_fault {
            self.shun(planned.node, 0);
        }
        let wish = cluster.deployments().get(&group.deployment);
        let mut others = cluster.nodes().keys().filter(|node| {
            let allowed = wish.is_some_and(|wish| wish.allows(**node));
            allowed && self.there(cluster, **node) && !self.repairs.avoid.contains_key(node)
        });
        // Who reports of another has reason to: its own part stands.
        if blames.is_none_or(|other| other == rank) || others.next().is_none() {
            self.pause(id);
        }
    }

    /// A node could not do its part: others are asked first for a while, so long at least.
    pub(super) fn shun(&mut self, node: NodeId, least: u64) {
        let until = self.now + BLAME.max(least);
        let avoided = self.repairs.avoid.entry(node).or_default();
        *avoided = until.max(*avoided);
    }

    /// A node is gone, or about to be: groups that it had a rank of wait for nothing.
    pub(super) fn hasten(&mut self, cluster: &ClusterState, node: NodeId) {
        for (group, pause) in &mut self.pauses {
            let had = cluster.groups().get(group).is_some_and(|one| one.nodes().contains(&node));
            if had {
                pause.until = 0;
            }
        }
    }

    /// Fences groups with a rank on a node that is silent although its session stands: it is
    /// stopped, or cut off. It may come back; until then others can do its part. So they can where
    /// a process has died: whether another takes its name is not waited for.
    pub(super) fn stalls(&mut self, cluster: &ClusterState) {
        let silent = |leader: &Self, node: NodeId| {
            let contact = leader.contacts.get(&node);
            let heard = contact.filter(|contact| contact.session.is_some()).map(|c| c.heard);
            heard.map(|heard| leader.now.saturating_sub(heard))
        };
        let limit = 2 * self.timing.suspicion;
        let mut stalled = Vec::new();
        for (&id, group) in cluster.groups().iter().filter(|(_, group)| group.live()) {
            for rank in &group.plan.ranks {
                let suspect = cluster.nodes().get(&rank.node);
                let suspect = suspect.is_some_and(|node| node.standing == Standing::Suspect);
                let silence = silent(self, rank.node).filter(|ms| suspect && *ms >= limit);
                let died = self.contacts.get(&rank.node).is_some_and(|contact| contact.died);
                let (node, rank) = (rank.node.0, rank.rank);
                let why = match silence {
                    Some(ms) => format!("is silent for {ms} ms"),
                    None if died => "died".to_owned(),
                    None => continue,
                };
                stalled.push((id, group, format!("rank {rank} on node {node} {why}")));
                break;
            }
        }
        for (id, group, reason) in stalled {
            let wish = cluster.deployments().get(&group.deployment);
            let mut others = cluster.nodes().keys().filter(|node| self.there(cluster, **node));
            // Alone it is waited for: there is nobody who could do better.
            if others.any(|node| wish.is_some_and(|wish| wish.allows(*node))) {
                self.fence(id, group.epoch, reason);
            }
        }
    }
}
