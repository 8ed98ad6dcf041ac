//! What to propose next, and why a deployment is not served: pure looks at the state.

use std::collections::{BTreeMap, BTreeSet};

use planner::{DeviceSpec, Limits, NodeId, NodeSpec, PlanError, ShardPlan, plan};

use crate::{ClusterState, Command, Deployment, Epoch, Group, GroupId, Model, Phase};

/// What only the leader sees and the state does not say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observation {
    /// Groups that are not placed for now: their ranks failed a moment ago and would again.
    pub paused: BTreeSet<GroupId>,
    /// Nodes that could be told now; `None` stands for all.
    pub reachable: Option<BTreeSet<NodeId>>,
}

impl Observation {
    fn reaches(&self, node: NodeId) -> bool {
        self.reachable.as_ref().is_none_or(|nodes| nodes.contains(&node))
    }
}

/// Commands that bring the cluster nearer to what is wished for; empty when there is nothing to do
/// or nothing can be done. In this order, each assuming that those before it were accepted:
///
/// 1. Groups that nobody wishes for any more are retired; those that do not serve go first.
/// 2. Fenced groups are placed again, under their number and their next epoch. Ranks stay on the
///    devices that held one before, as far as those are there.
/// 3. Groups with a rank on a node that drains, or that their deployment no longer allows, move,
///    if there is room elsewhere; if not, they stay until there is.
/// 4. Groups that are missing are placed.
///
/// Spare devices stay idle until a group needs them.
pub fn reconcile(state: &ClusterState, seen: &Observation) -> Vec<Command> {
    let (next, commands) = (state.last_group, Vec::new());
    let mut work = Work { room: Room::new(state, seen), seen, next, commands };
    work.retire_surplus();
    work.repair();
    work.relocate();
    work.grow();
    work.commands
}

/// Why a deployment is not served as wished, in words for an operator; `None` when it is.
pub fn waiting_for(state: &ClusterState, name: &str) -> Option<String> {
    let Some((wish, model)) = wish(state, name) else {
        return Some(match state.deployments().is_empty() {
            true => "no model is deployed".to_owned(),
            false => format!("{name} is not deployed"),
        });
    };
    let serving = state.routes(name).len();
    if serving >= wish.replicas {
        return None;
    }
    let why = why_not(state, wish, model);
    Some(match serving {
        0 => why,
        _ => format!("{serving} of {} groups serve; {why}", wish.replicas),
    })
}

fn why_not(state: &ClusterState, wish: &Deployment, model: &Model) -> String {
    let mut groups = state.groups_of(&wish.name);
    if let Some((id, group)) = groups.find(|(_, group)| group.live() && !serves(group)) {
        let (ready, ranks) = (group.ready.len(), group.plan.ranks.len());
        return format!("group {id} forms: {ready} of {ranks} ranks are ready");
    }
    let seen = Observation::default();
    let room = Room::new(state, &seen);
    let free = room.free(wish).values().map(Vec::len).sum::<usize>();
    if free < wish.ranks {
        return format!("{free} of {} ranks have joined", wish.ranks);
    }
    match room.plan(wish, model, None) {
        Ok(_) => "a group is about to be placed".to_owned(),
        Err(error) => error.to_string(),
    }
}

fn serves(group: &Group) -> bool {
    group.phase == Phase::Serving
}

fn wish<'a>(state: &'a ClusterState, name: &str) -> Option<(&'a Deployment, &'a Model)> {
    let wish = state.deployments().get(name)?;
    Some((wish, state.models().get(&wish.digest)?))
}

/// The commands so far, and what is free once they are accepted.
struct Work<'a> {
    room: Room<'a>,
    seen: &'a Observation,
    /// Greatest group number so far.
    next: GroupId,
    commands: Vec<Command>,
}

impl Work<'_> {
    fn retire_surplus(&mut self) {
        let state = self.room.state;
        for (name, wish) in state.deployments() {
            let mut groups: Vec<(GroupId, &Group)> = state.groups_of(name).collect();
            let surplus = groups.len().saturating_sub(wish.replicas);
            // Those that serve last, and among equals the oldest last.
            groups.sort_by_key(|(id, group)| (serves(group), group.live(), std::cmp::Reverse(*id)));
            for (id, group) in &groups[..surplus] {
                self.room.gone.insert(*id);
                self.room.release(group);
                let reason = "fewer replicas are wished for".to_owned();
                self.commands.push(Command::Retire { group: *id, epoch: group.epoch, reason });
            }
        }
    }

    fn repair(&mut self) {
        let state = self.room.state;
        for (&id, group) in state.groups() {
            if group.phase == Phase::Repairing {
                self.place_again(id, group);
            }
        }
    }

    fn relocate(&mut self) {
        let state = self.room.state;
        for (&id, group) in state.groups() {
            if group.live() && self.room.misplaced(group) {
                self.room.release(group);
                if !self.place_again(id, group) {
                    self.room.hold(&group.plan);
                }
            }
        }
    }

    /// Whether the group's next incarnation was proposed.
    fn place_again(&mut self, id: GroupId, group: &Group) -> bool {
        if self.room.gone.contains(&id) || self.seen.paused.contains(&id) {
            return false;
        }
        let Some((wish, model)) = wish(self.room.state, &group.deployment) else { return false };
        match (group.next_epoch(), self.room.plan(wish, model, Some(&group.plan))) {
            (Some(epoch), Ok(plan)) => {
                self.place(id, &wish.name, epoch, plan);
                true
            }
            _ => false,
        }
    }

    fn grow(&mut self) {
        let state = self.room.state;
        for name in state.deployments().keys() {
            let Some((wish, model)) = wish(state, name) else { continue };
            let there = state.groups_of(name).count();
            for _ in there..wish.replicas {
                let Some(id) = self.next.next() else { return };
                let Ok(plan) = self.room.plan(wish, model, None) else { break };
                self.next = id;
                self.place(id, name, Epoch::FIRST, plan);
            }
        }
    }

    fn place(&mut self, group: GroupId, name: &str, epoch: Epoch, plan: ShardPlan) {
        self.room.hold(&plan);
        let deployment = name.to_owned();
        self.commands.push(Command::Place { group, deployment, epoch, plan });
    }
}

/// Which devices are free.
struct Room<'a> {
    state: &'a ClusterState,
    seen: &'a Observation,
    taken: BTreeSet<(NodeId, usize)>,
    /// Groups that are about to be retired.
    gone: BTreeSet<GroupId>,
}

/// By node: its free devices, and their numbers.
type Free = BTreeMap<NodeId, Vec<(usize, DeviceSpec)>>;

impl<'a> Room<'a> {
    fn new(state: &'a ClusterState, seen: &'a Observation) -> Self {
        Self { state, seen, taken: state.taken(None), gone: BTreeSet::new() }
    }

    fn hold(&mut self, plan: &ShardPlan) {
        self.taken.extend(plan.ranks.iter().map(|rank| (rank.node, rank.device)));
    }

    /// A group that does not live holds nothing.
    fn release(&mut self, group: &Group) {
        for rank in group.plan.ranks.iter().filter(|_| group.live()) {
            self.taken.remove(&(rank.node, rank.device));
        }
    }

    /// Whether a rank stands where it should not.
    fn misplaced(&self, group: &Group) -> bool {
        let wish = self.state.deployments().get(&group.deployment);
        group.nodes().iter().any(|&node| {
            let draining = self.state.nodes().get(&node).is_some_and(|node| node.draining);
            draining || wish.is_some_and(|wish| !wish.allows(node))
        })
    }

    fn free(&self, wish: &Deployment) -> Free {
        let open = self.state.nodes().iter().filter(|(id, node)| {
            let holds = |digest: &str| node.info.as_ref().is_some_and(|i| i.model_digest == digest);
            node.open() && wish.allows(**id) && self.seen.reaches(**id) && holds(&wish.digest)
        });
        let free = open.map(|(&id, node)| {
            let devices = node.devices().iter().cloned().enumerate();
            (id, devices.filter(|(device, _)| !self.taken.contains(&(id, *device))).collect())
        });
        free.collect()
    }

    /// A plan over free devices; over those that `before` names, as far as they are free and as
    /// many others as it takes, if that fits.
    fn plan(
        &self,
        wish: &Deployment,
        model: &Model,
        before: Option<&ShardPlan>,
    ) -> Result<ShardPlan, PlanError> {
        let free = self.free(wish);
        let near = before.map(|before| nearest(&free, before, wish.ranks));
        match near.map(|near| plan_over(&near, wish, model)) {
            Some(Ok(plan)) => Ok(plan),
            _ => plan_over(&free, wish, model),
        }
    }
}

/// Of the free devices: those that the plan names, and the first of the others, `ranks` in all.
fn nearest(free: &Free, before: &ShardPlan, ranks: usize) -> Free {
    let held: BTreeSet<(NodeId, usize)> =
        before.ranks.iter().map(|rank| (rank.node, rank.device)).collect();
    let all = free.iter().flat_map(|(&node, devices)| devices.iter().map(move |one| (node, one)));
    let (kept, others): (Vec<_>, Vec<_>) =
        all.partition(|(node, (device, _))| held.contains(&(*node, *device)));
    let mut near = Free::new();
    for (node, one) in kept.into_iter().chain(others).take(ranks) {
        near.entry(node).or_default().push(one.clone());
    }
    near.values_mut().for_each(|devices| devices.sort_by_key(|(device, _)| *device));
    near
}

/// The planner numbers the devices that it is given; the plan names them by their own numbers.
fn plan_over(free: &Free, wish: &Deployment, model: &Model) -> Result<ShardPlan, PlanError> {
    let nodes = free.iter().map(|(&id, devices)| NodeSpec {
        id,
        devices: devices.iter().map(|(_, spec)| spec.clone()).collect(),
    });
    let nodes: Vec<NodeSpec> = nodes.collect();
    let limits = Limits {
        stripes: Some(wish.stripe_count(&model.spec)),
        ranks: Some(wish.ranks),
        experts: wish.experts,
        compute: wish.compute,
        kv_blocks: wish.kv_blocks,
        block_tokens: wish.block_tokens,
    };
    let mut plan = plan(&model.spec, &nodes, &limits)?;
    for rank in &mut plan.ranks {
        let own = free.get(&rank.node).and_then(|devices| devices.get(rank.device));
        rank.device = own.map_or(rank.device, |(device, _)| *device);
    }
    Ok(plan)
}
