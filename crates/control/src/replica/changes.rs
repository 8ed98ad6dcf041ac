//! Changes of members: one at a time, through joint consensus, and out of it again.

use planner::NodeId;
use raft::eraftpb as rb;

use super::members::{MEMBERS_MAX, MemberChange, MemberSet};
use super::{BadChange, Fatal, LogStore, Machine, Output, ProposeError, Replica, convert, payload};

impl<S: LogStore, M: Machine> Replica<S, M> {
    pub(super) fn change(&mut self, request: u64, change: MemberChange) {
        if let Err(why) = self.may_change(change) {
            return self.refuse(request, why);
        }
        let context = self.proposals.origin(request);
        match self.raw.propose_conf_change(context, to_raft(change)) {
            Ok(()) => self.proposals.add(self.raw.raft.raft_log.last_index(), request),
            Err(_) => self.refuse(request, ProposeError::Dropped),
        }
    }

    /// Consensus itself answers a change too many with silence: it proposes an empty entry.
    fn may_change(&self, change: MemberChange) -> Result<(), ProposeError> {
        if !self.leads() {
            return Err(ProposeError::NotLeader { leader: self.leader() });
        }
        if self.full {
            return Err(ProposeError::Full);
        }
        if self.raw.raft.lead_transferee.is_some() {
            return Err(ProposeError::Dropped);
        }
        if self.raw.raft.has_pending_conf() || self.members.is_joint() {
            return Err(ProposeError::ChangePending);
        }
        self.fits(change).map_err(ProposeError::BadChange)
    }

    fn fits(&self, change: MemberChange) -> Result<(), BadChange> {
        let id = change.node();
        if id.0 == 0 {
            return Err(BadChange::Zero);
        }
        match change {
            MemberChange::AddLearner(_) if self.members.contains(id) => Err(BadChange::Member),
            MemberChange::AddLearner(_) if self.removed.contains(&id) => Err(BadChange::Reused),
            MemberChange::AddLearner(_) if self.members.all().len() >= MEMBERS_MAX => {
                Err(BadChange::TooMany)
            }
            MemberChange::Promote(_) if !self.members.learners.contains(&id) => {
                Err(BadChange::NotLearner)
            }
            MemberChange::Promote(_) if !self.caught_up(id) => Err(BadChange::NotCaughtUp),
            MemberChange::Remove(_) if !self.members.contains(id) => Err(BadChange::NotMember),
            MemberChange::Remove(_) if self.members.voters.iter().eq([&id]) => {
                Err(BadChange::LastVoter)
            }
            _ => Ok(()),
        }
    }

    /// It has what no snapshot is needed for any more.
    fn caught_up(&self, id: NodeId) -> bool {
        let base = self.raw.store().image().base.index;
        let progress = self.raw.raft.prs().get(id.0);
        progress.is_some_and(|progress| progress.matched > 0 && progress.matched >= base)
    }

    pub(super) fn apply_change(
        &mut self,
        entry: &rb::Entry,
        request: Option<u64>,
    ) -> Result<(), Fatal> {
        let index = entry.index;
        let change = payload::decode_change(&entry.data).map_err(|_| Fatal::Payload { index })?;
        match self.raw.apply_conf_change(&change) {
            Ok(state) => self.changed(index, convert::members_from_raft(&state), request),
            // The same everywhere: it depends on the members alone.
            Err(error) => {
                tracing::warn!(index, %error, "a change of members changed nothing");
                if let Some(request) = request {
                    self.refuse(request, ProposeError::ChangePending);
                }
            }
        }
        Ok(())
    }

    fn changed(&mut self, index: u64, members: MemberSet, request: Option<u64>) {
        let gone: Vec<NodeId> = self.members.all().difference(&members.all()).copied().collect();
        self.removed.extend(gone);
        self.set_members(members);
        self.news.push(Output::Members(self.members.clone()));
        if self.members.is_joint() {
            self.proposals.joint(request);
        } else {
            let request = request.or_else(|| self.proposals.left());
            self.news.push(Output::Changed { index, request });
        }
    }

    pub(super) fn set_members(&mut self, members: MemberSet) {
        self.joint_since = match (members.is_joint(), self.joint_since) {
            (false, _) => None,
            (true, since) => since.or(Some(self.ticks)),
        };
        self.members = members;
    }

    /// Consensus leaves joint consensus by itself, but not when the leader that entered it fell
    /// before it had applied the entrance. So every leader that finds itself in it leaves it.
    pub(super) fn leave_joint(&mut self) {
        if !self.leads() || !self.members.is_joint() {
            return;
        }
        if !self.raw.raft.has_pending_conf() {
            // Dropped while leadership is handed over; tried again after every input.
            let _ = self.raw.propose_conf_change(Vec::new(), rb::ConfChangeV2::default());
        }
        // The entry that consensus appends by itself waits for the next heartbeat to travel.
        let last = self.raw.raft.raft_log.last_index();
        if self.nudged != last {
            self.nudged = last;
            self.raw.raft.bcast_append();
        }
    }

    /// A leader that was removed has told everyone so by now, and no longer counts. Consensus
    /// would keep it leading for ever; it names a successor, so that nobody waits for a timeout.
    pub(super) fn step_down(&mut self) {
        if !self.leads() || self.members.is_voter(self.id()) {
            return;
        }
        if let Some(to) = self.heir() {
            self.raw.raft.send_timeout_now(to.0);
        }
        let term = self.raw.raft.term;
        self.raw.raft.become_follower(term, raft::INVALID_ID);
    }
}

fn to_raft(change: MemberChange) -> rb::ConfChangeV2 {
    let mut single =
        rb::ConfChangeSingle { node_id: change.node().0, ..rb::ConfChangeSingle::default() };
    let mut out = rb::ConfChangeV2::default();
    let (kind, transition) = match change {
        // Nobody's vote changes, so one configuration decides throughout.
        MemberChange::AddLearner(_) => {
            (rb::ConfChangeType::AddLearnerNode, rb::ConfChangeTransition::Auto)
        }
        MemberChange::Promote(_) => {
            (rb::ConfChangeType::AddNode, rb::ConfChangeTransition::Implicit)
        }
        MemberChange::Remove(_) => {
            (rb::ConfChangeType::RemoveNode, rb::ConfChangeTransition::Implicit)
        }
    };
    single.set_change_type(kind);
    out.set_transition(transition);
    out.set_changes(vec![single].into());
    out
}
