//! The operator: brings the number of coordinators to what is wanted, one change at a time.

use control::replica::{Input, MemberChange, ReplicaStatus};
use planner::NodeId;

use super::checks::{Checked, Violation};
use super::node::Waiting;
use super::workload::Workload;
use super::world::{Event, World};

/// Entries that a learner may lag behind and still get a vote.
const LAG: u64 = 10;

/// What the operator wants.
#[derive(Debug)]
pub struct Operator {
    /// Members.
    pub wanted: usize,
    /// One that is to go, whatever the number.
    pub replaced: Option<u64>,
    /// A node that was made to be added, and is not a member yet.
    joining: Option<u64>,
    /// The number of the next node.
    next: u64,
}

impl Operator {
    /// An operator that wants `wanted` members.
    pub fn new(wanted: usize) -> Self {
        Self { wanted, replaced: None, joining: None, next: 2 }
    }

    /// Wants something else.
    pub fn want(&mut self, wanted: usize, replaced: Option<u64>) {
        self.wanted = wanted;
        self.replaced = replaced;
    }

    /// A number that no node had.
    pub fn number(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }
}

impl<W: Workload> World<W> {
    /// The operator looks.
    pub(super) fn operate(&mut self) -> Checked {
        let pause = self.rng.range(30_000, 150_000);
        self.after(pause, Event::Operate);
        W::operate(self)
    }

    /// The operator looks at the leader's status and asks for the next change.
    ///
    /// # Errors
    /// A violation.
    pub fn change_members(&mut self) -> Checked {
        if self.healed {
            return Ok(());
        }
        let Some(leader) = self.leader() else { return Ok(()) };
        let process = self.nodes.get(&leader).and_then(|node| node.process.as_ref());
        let Some(status) = process.map(|process| process.replica.status()) else { return Ok(()) };
        // Asking while a change is under way must be refused, not obeyed.
        if status.members.is_joint() && !self.rng.chance(100) {
            return Ok(());
        }
        match self.next_change(leader, &status)? {
            Some(change) => self.change(leader, change),
            None => Ok(()),
        }
    }

    /// Asks `node` for a change of members.
    ///
    /// # Errors
    /// A violation.
    pub fn change(&mut self, node: u64, change: MemberChange) -> Checked {
        self.trace.line(self.now, || format!("operator to {node}: {change:?}"));
        let process = self.nodes.get_mut(&node).and_then(|node| node.process.as_mut());
        let Some(process) = process else { return Ok(()) };
        let request = process.request(Waiting::Change);
        self.feed(node, Input::Change { request, change })
    }

    fn next_change(
        &mut self,
        leader: u64,
        status: &ReplicaStatus,
    ) -> Result<Option<MemberChange>, Violation> {
        let members = &status.members;
        self.operator.joining = self.operator.joining.filter(|id| !members.contains(NodeId(*id)));
        let all: Vec<u64> = members.all().into_iter().map(|id| id.0).collect();
        // The lost go first: nothing else may make their votes matter.
        let intact = |id: &u64| self.nodes.get(id).is_some_and(|node| node.intact());
        if let Some(lost) = all.iter().find(|id| !intact(id)) {
            return Ok(Some(MemberChange::Remove(NodeId(*lost))));
        }
        let caught_up = |id: &&NodeId| {
            let progress = status.peers.get(id);
            // Nothing matched: it may never have been heard of, and cannot vote yet.
            progress
                .is_some_and(|p| p.recent_active && p.matched > 0 && p.matched + LAG >= status.last)
        };
        if let Some(learner) = members.learners.iter().find(caught_up) {
            return Ok(Some(MemberChange::Promote(*learner)));
        }
        let replaced = self.operator.replaced.take();
        if let Some(replaced) = replaced.filter(|id| all.len() > 1 && all.contains(id)) {
            return Ok(Some(MemberChange::Remove(NodeId(replaced))));
        }
        if all.len() < self.operator.wanted {
            let id = self.joining()?;
            return Ok(Some(MemberChange::AddLearner(NodeId(id))));
        }
        if all.len() > self.operator.wanted {
            let learners: Vec<u64> = members.learners.iter().map(|id| id.0).collect();
            let from = if learners.is_empty() { all } else { learners };
            let victim = self.rng.pick(&from).copied().unwrap_or(leader);
            return Ok(Some(MemberChange::Remove(NodeId(victim))));
        }
        Ok(None)
    }
    /// A node that can be added: the one that waits for that, or a new one.
    fn joining(&mut self) -> Result<u64, Violation> {
        if let Some(id) = self.operator.joining {
            return Ok(id);
        }
        let id = self.operator.number();
        self.operator.joining = Some(id);
        self.add_node(id)?;
        Ok(id)
    }
}
