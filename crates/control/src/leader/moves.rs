//! Planned moves: what joins a group that serves loads its part first, and only then is the group
//! interrupted. However much there is to read, a stream waits for a moment.

use std::collections::{BTreeMap, BTreeSet};

use cluster::{ClusterState, Command, Epoch, Group, GroupId, Phase};
use planner::{NodeId, ShardPlan};
use wire::{FormGroup, Order};

use super::Leader;
use super::orders::addresses;

/// How long a node that loads may say nothing of it, in milliseconds.
const LOADING: u64 = 120_000;

/// A move that is being prepared.
#[derive(Debug)]
struct Move {
    epoch: Epoch,
    plan: ShardPlan,
    /// Who has not loaded yet.
    waits: BTreeSet<NodeId>,
    /// When they have said nothing for too long.
    until: u64,
}

/// A group whose moves come to nothing rests for so long, in milliseconds; twice as long each time,
/// up to the longest.
const REST: u64 = 1_000;
const LONGEST_REST: u64 = 64_000;

/// By group: the move that it waits for, or until when it rests and for how long the next time.
#[derive(Debug, Default)]
pub(super) struct Moves {
    open: BTreeMap<GroupId, Move>,
    pub(super) rests: BTreeMap<GroupId, (u64, u64)>,
}

impl Leader {
    /// Of what reconciliation wants: what can be proposed now. A move of a group that serves waits
    /// until all that join it are prepared, and so does what would take the devices that it frees.
    pub(super) fn due(&mut self, cluster: &ClusterState, wanted: Vec<Command>) -> Vec<Command> {
        let (mut moving, mut kept) = (BTreeSet::new(), BTreeSet::new());
        let mut due = Vec::new();
        for command in wanted {
            let Command::Place { group, epoch, plan, .. } = &command else {
                due.push(command);
                continue;
            };
            let serving = cluster.groups().get(group).filter(|one| one.phase == Phase::Serving);
            let devices = |plan: &ShardPlan| -> Vec<(NodeId, usize)> {
                plan.ranks.iter().map(|rank| (rank.node, rank.device)).collect()
            };
            match serving {
                // Its devices are another's until that one has moved.
                _ if devices(plan).iter().any(|device| kept.contains(device)) => {
                    kept.extend(serving.iter().flat_map(|current| devices(&current.plan)));
                }
                Some(current) => {
                    moving.insert(*group);
                    if self.is_prepared(cluster, (*group, *epoch), current, plan) {
                        due.push(command);
                    } else {
                        kept.extend(devices(&current.plan));
                    }
                }
                None => due.push(command),
            }
        }
        self.moves.open.retain(|group, _| moving.contains(group));
        self.moves.rests.retain(|group, _| cluster.groups().contains_key(group));
        due
    }

    /// Whether everybody who joins the group has loaded; begins or gives up where it has to.
    fn is_prepared(
        &mut self,
        cluster: &ClusterState,
        (id, epoch): (GroupId, Epoch),
        current: &Group,
        plan: &ShardPlan,
    ) -> bool {
        let open =
            self.moves.open.get(&id).filter(|open| open.epoch == epoch && open.plan == *plan);
        if let Some(open) = open {
            if open.waits.is_empty() || open.until > self.now {
                return open.waits.is_empty();
            }
            for node in open.waits.clone() {
                self.unprepared(id, node, "it has taken too long to load");
            }
            return false;
        }
        if self.moves.rests.get(&id).is_some_and(|(until, _)| *until > self.now) {
            return false;
        }
        let there = |node, device| {
            current.plan.ranks.iter().any(|rank| (rank.node, rank.device) == (node, device))
        };
        let joins = plan.ranks.iter().filter(|rank| !there(rank.node, rank.device));
        let waits: BTreeSet<NodeId> = joins.map(|rank| rank.node).collect();
        let Some(deployment) = cluster.deployments().get(&current.deployment) else { return false };
        let form = FormGroup {
            group: id,
            epoch,
            deployment: deployment.clone(),
            plan: plan.clone(),
            addresses: addresses(cluster, plan),
        };
        for &node in &waits {
            self.order(node, Order::Prepare(Box::new(form.clone())));
        }
        let prepared = waits.is_empty();
        let open = Move { epoch, plan: plan.clone(), waits, until: self.now + LOADING };
        self.moves.open.insert(id, open);
        prepared
    }

    /// A node has loaded what it was told to prepare, or cannot.
    pub(super) fn prepared(
        &mut self,
        node: NodeId,
        (group, epoch): (GroupId, Epoch),
        error: Option<&str>,
    ) {
        let open = self.moves.open.get_mut(&group);
        let Some(open) = open.filter(|one| one.epoch == epoch && one.waits.contains(&node)) else {
            self.stale_reports += 1;
            return;
        };
        match error {
            None => {
                open.waits.remove(&node);
            }
            Some(why) => self.unprepared(group, node, why),
        }
    }

    /// A node that loads gets on.
    pub(super) fn prepares(&mut self, node: NodeId, (group, epoch): (GroupId, Epoch)) -> bool {
        let open = self.moves.open.get_mut(&group);
        let Some(open) = open.filter(|one| one.epoch == epoch && one.waits.contains(&node)) else {
            return false;
        };
        open.until = self.now + LOADING;
        true
    }

    /// The group stays as it is for a while, and then another node is looked for.
    fn unprepared(&mut self, group: GroupId, node: NodeId, why: &str) {
        tracing::warn!(%group, node = node.0, why, "a node cannot join a group");
        self.moves.open.remove(&group);
        let (until, next) = self.moves.rests.entry(group).or_insert((0, REST));
        let rest = *next;
        *until = self.now + rest;
        *next = (rest * 2).min(LONGEST_REST);
        // Another one is asked the next time, if there is one.
        self.shun(node, 2 * rest);
    }

    /// A node has come anew: what it was told before may be lost.
    pub(super) fn prepare_again(&mut self, node: NodeId) {
        self.moves.open.retain(|_, open| !open.waits.contains(&node));
    }
}
