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
    /// Groups that may go on with fewer ranks than are wished for: some of their ranks are there
    /// and hold their stripes, and nobody waits for the others.
    pub narrow: BTreeSet<GroupId>,
    /// Groups with fewer ranks than are wished for that may take in spare devices.
    pub widen: BTreeSet<GroupId>,
    /// Nodes whose ranks failed a moment ago: they get none where it goes without them.
    pub avoid: BTreeSet<NodeId>,
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
/// 2. Fenced groups are placed again, under their number and their next epoch. Ranks whose devices
///    are there keep their stripes; what is lost goes to spare devices, or where those lack and the
///    group may be narrow, to the ranks that stay, or to fewer ranks elsewhere.
/// 3. Groups with a rank on a node that drains, or that their deployment no longer allows, move,
///    if there is room elsewhere; if not, they stay until there is.
/// 4. Narrow groups take in spare devices.
/// 5. Groups that are missing are placed.
///
/// Spare devices stay idle until a group needs them.
pub fn reconcile(state: &ClusterState, seen: &Observation) -> Vec<Command> {
    Work::done(state, seen).commands
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

/// What a deployment lacks although as many groups serve as are wished for, in words for an
/// operator; `None` when it lacks nothing.
pub fn degraded(state: &ClusterState, name: &str) -> Option<String> {
    state.groups_of(name).find_map(|(id, _)| degraded_group(state, id))
}

/// The same of one group.
pub fn degraded_group(state: &ClusterState, id: GroupId) -> Option<String> {
    let group = state.groups().get(&id)?;
    let (wish, _) = wish(state, &group.deployment)?;
    narrow(group, wish)
        .then(|| format!("group {id} serves on {} of {} ranks", group.plan.ranks.len(), wish.ranks))
}

/// What is missing for a deployment to be served as wished beside everything that is there, in
/// words for an operator; `None` where nothing is. Changes nothing.
pub fn lacking(state: &ClusterState, wish: &Deployment) -> Option<String> {
    let mut then = state.clone();
    if let Err(why) = then.apply(then.index() + 1, Command::Deploy(wish.clone())) {
        return Some(why.to_string());
    }
    let mut coordinators = then.coordinators();
    if let Some((node, _)) = coordinators.find(|(_, at)| !at.model_digests.contains(&wish.digest)) {
        return Some(format!("the coordinator of node {} does not have the model", node.0));
    }
    let model = then.models().get(&wish.digest)?;
    let seen = Observation::default();
    let work = Work::done(&then, &seen);
    let ours = |command: &&Command| {
        let new = |group| !then.groups().contains_key(group);
        matches!(command, Command::Place { group, deployment, .. }
            if *deployment == wish.name && new(group))
    };
    let there = then.groups_of(&wish.name).count() + work.commands.iter().filter(ours).count();
    if there >= wish.replicas {
        return None;
    }
    let free = work.room.free(wish).values().map(Vec::len).sum::<usize>();
    let why = match work.room.plan(wish, model, wish.ranks) {
        // Something else is to be moved first.
        Ok(_) => "its devices are not free yet".to_owned(),
        Err(_) if free < wish.ranks => {
            format!("{free} of {} devices with the model are free", wish.ranks)
        }
        Err(error) => error.to_string(),
    };
    Some(match there {
        0 => why,
        _ => format!("there is room for {there} of {} groups; {why}", wish.replicas),
    })
}

/// Whether the group serves with fewer ranks than are wished for.
fn narrow(group: &Group, wish: &Deployment) -> bool {
    serves(group) && group.plan.ranks.len() < wish.ranks
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
    match room.plan(wish, model, wish.ranks) {
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

impl<'a> Work<'a> {
    /// All that is to be done.
    fn done(state: &'a ClusterState, seen: &'a Observation) -> Self {
        let (next, commands) = (state.last_group, Vec::new());
        let mut work = Self { room: Room::new(state, seen), seen, next, commands };
        work.retire_surplus();
        work.repair();
        work.relocate();
        work.widen();
        work.grow();
        work
    }

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
                self.place_again(id, group, None);
            }
        }
    }

    fn relocate(&mut self) {
        let state = self.room.state;
        for (&id, group) in state.groups() {
            if group.live() && self.room.misplaced(group) {
                self.room.release(group);
                // One that is narrow anyway leaves as narrow as it is, but no narrower.
                let least = serves(group).then_some(group.plan.ranks.len());
                if !self.place_again(id, group, least) {
                    self.room.hold(&group.plan);
                }
            }
        }
    }

    fn widen(&mut self) {
        let state = self.room.state;
        for &id in &self.seen.widen {
            let Some(group) = state.groups().get(&id).filter(|group| serves(group)) else {
                continue;
            };
            let Some((wish, model)) = wish(state, &group.deployment) else { continue };
            if !narrow(group, wish) {
                continue;
            }
            self.room.release(group);
            self.room.avoiding = true;
            let wider = self.room.repaired(wish, model, &group.plan);
            self.room.avoiding = false;
            let wider = wider.filter(|plan| plan.ranks.len() > group.plan.ranks.len());
            match (group.next_epoch(), wider) {
                (Some(epoch), Some(plan)) if !self.room.gone.contains(&id) => {
                    self.place(id, &wish.name, epoch, plan);
                }
                _ => self.room.hold(&group.plan),
            }
        }
    }

    /// Whether the group's next incarnation was proposed. `least`: it may have as few ranks as that
    /// where it has no more now.
    fn place_again(&mut self, id: GroupId, group: &Group, least: Option<usize>) -> bool {
        if self.room.gone.contains(&id) || self.seen.paused.contains(&id) {
            return false;
        }
        let Some((wish, model)) = wish(self.room.state, &group.deployment) else { return false };
        let narrow = self.seen.narrow.contains(&id) || least.is_some_and(|n| n < wish.ranks);
        let plan = self.room.plan_again(wish, model, &group.plan, narrow);
        let plan = plan.filter(|plan| least.is_none_or(|least| plan.ranks.len() >= least));
        match (group.next_epoch(), plan) {
            (Some(epoch), Some(plan)) => {
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
                let Ok(plan) = self.room.plan(wish, model, wish.ranks) else { break };
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
    /// Nodes to be avoided have nothing free at the moment.
    avoiding: bool,
}

/// By node: its free devices, and their numbers.
type Free = BTreeMap<NodeId, Vec<(usize, DeviceSpec)>>;

impl<'a> Room<'a> {
    fn new(state: &'a ClusterState, seen: &'a Observation) -> Self {
        Self { state, seen, taken: state.taken(None), gone: BTreeSet::new(), avoiding: false }
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
            let info = node.info.as_ref();
            let holds = info.is_some_and(|info| info.model_digests.contains(&wish.digest));
            let avoided = self.avoiding && self.seen.avoid.contains(id);
            let there = node.open() && self.seen.reaches(**id) && !avoided;
            there && wish.allows(**id) && holds
        });
        let free = open.map(|(&id, node)| {
            let devices = node.devices().iter().cloned().enumerate();
            (id, devices.filter(|(device, _)| !self.taken.contains(&(id, *device))).collect())
        });
        free.collect()
    }

    /// A plan for that many ranks over free devices.
    fn plan(&self, wish: &Deployment, model: &Model, ranks: usize) -> Result<ShardPlan, PlanError> {
        let free = self.free(wish);
        let made = plan(&model.spec, &specs(&free), &limits(wish, model, ranks))?;
        Ok(named(made, &free))
    }

    /// The plan after `before`: what is there stays, if that gives as many ranks as are wished for;
    /// else all anew, if that does; else, for a group that may be narrow, what is there with fewer
    /// ranks, or as many as possible anew. All of that without nodes to be avoided, if it goes.
    fn plan_again(
        &mut self,
        wish: &Deployment,
        model: &Model,
        before: &ShardPlan,
        narrow: bool,
    ) -> Option<ShardPlan> {
        if !self.seen.avoid.is_empty() {
            self.avoiding = true;
            let plan = self.plan_with(wish, model, before, narrow);
            self.avoiding = false;
            if plan.is_some() {
                return plan;
            }
        }
        self.plan_with(wish, model, before, narrow)
    }

    fn plan_with(
        &self,
        wish: &Deployment,
        model: &Model,
        before: &ShardPlan,
        narrow: bool,
    ) -> Option<ShardPlan> {
        let repaired = self.repaired(wish, model, before);
        let whole = |plan: &ShardPlan| plan.ranks.len() == wish.ranks;
        if repaired.as_ref().is_some_and(whole) {
            return repaired;
        }
        if let Ok(plan) = self.plan(wish, model, wish.ranks) {
            return Some(plan);
        }
        if !narrow {
            return None;
        }
        let mut fewer = (1..wish.ranks).rev();
        repaired.or_else(|| fewer.find_map(|n| self.plan(wish, model, n).ok()))
    }

    /// `before` without the devices that are gone, and with spare ones in their place as far as
    /// there are any. None where nothing of it is there, or what is there has no room.
    fn repaired(&self, wish: &Deployment, model: &Model, before: &ShardPlan) -> Option<ShardPlan> {
        if before.stripes != wish.stripe_count(&model.spec) {
            return None;
        }
        let free = self.free(wish);
        let place = |node: &NodeId, device: usize| {
            free.get(node)?.iter().position(|(own, _)| *own == device)
        };
        // In the planner's numbers; a device that is not there has none.
        let mut known = before.clone();
        for rank in &mut known.ranks {
            rank.device = place(&rank.node, rank.device).unwrap_or(usize::MAX);
        }
        if known.ranks.iter().all(|rank| rank.device == usize::MAX) {
            return None;
        }
        let limits = limits(wish, model, wish.ranks);
        let made = planner::repair(&model.spec, &known, &specs(&free), &limits).ok()?;
        Some(named(made, &free))
    }
}

/// What the planner is shown: it numbers the devices that it is given.
fn specs(free: &Free) -> Vec<NodeSpec> {
    let nodes = free.iter().map(|(&id, devices)| NodeSpec {
        id,
        devices: devices.iter().map(|(_, spec)| spec.clone()).collect(),
    });
    nodes.collect()
}

/// The planner's plan, with the devices' own numbers.
fn named(mut plan: ShardPlan, free: &Free) -> ShardPlan {
    for rank in &mut plan.ranks {
        let own = free.get(&rank.node).and_then(|devices| devices.get(rank.device));
        rank.device = own.map_or(rank.device, |(device, _)| *device);
    }
    plan
}

fn limits(wish: &Deployment, model: &Model, ranks: usize) -> Limits {
    Limits {
        stripes: Some(wish.stripe_count(&model.spec)),
        ranks: Some(ranks),
        experts: wish.experts,
        compute: wish.compute,
        kv_blocks: wish.kv_blocks,
        block_tokens: wish.block_tokens,
    }
}
