//! Each input's way into consensus.

use planner::NodeId;
use raft::eraftpb::{Message, MessageType};
use raft::{SnapshotStatus, StateRole};
use wire::pb;

use super::gate::{self, Context, GateError, Passed};
use super::payload::Payload;
use super::{Batch, Fatal, Heard, Input, LogStore, Machine, Output, ProposeError, Replica};

/// After so many election timeouts a snapshot that nobody reported on counts as lost: its peer
/// would get nothing more until somebody does.
const SNAPSHOT_TIMEOUTS: u64 = 4;

impl<S: LogStore, M: Machine> Replica<S, M> {
    pub(super) fn take(&mut self, input: Input) -> Result<(), Fatal> {
        if self.gone {
            return self.take_removed(input);
        }
        if self.stall.is_some() {
            return self.take_stalled(input);
        }
        match input {
            Input::Tick => self.tick()?,
            Input::Message { from, message } => self.message(from, message)?,
            Input::Propose { request, command } => self.propose(request, command),
            Input::Read { request } => {
                self.reads.add(request);
                self.ask();
            }
            Input::Change { request, change } => self.change(request, change),
            Input::Transfer { to } => self.transfer(to),
            Input::Campaign => self.campaign()?,
            Input::Unreachable { peer } => self.raw.report_unreachable(peer.0),
            Input::SnapshotSent { peer, ok } => self.snapshot_sent(peer, ok),
            Input::Forget { request } => self.forget(request),
        }
        self.timeouts.apply(&mut self.raw);
        Ok(())
    }

    /// It asks for nothing any more, but it goes on answering: a member that has the entry of the
    /// removal and does not know yet that it is committed may need this node's vote to learn it.
    fn take_removed(&mut self, input: Input) -> Result<(), Fatal> {
        match input {
            Input::Tick if self.stall.is_some() => return self.take_stalled(input),
            // Time passes, so that it stops counting on a leader; no election comes of it.
            Input::Tick => {
                self.ticks += 1;
                self.raw.raft.election_elapsed += 1;
            }
            Input::Message { from, message } if self.stall.is_none() => {
                self.message(from, message)?;
            }
            Input::Propose { request, .. } | Input::Change { request, .. } => {
                self.refuse(request, ProposeError::Removed);
            }
            _ => {}
        }
        Ok(())
    }

    /// Between a ready and its end nothing may be asked of consensus, and this ready waits for the
    /// disk. So messages are lost, as on a bad network, until there is room.
    fn take_stalled(&mut self, input: Input) -> Result<(), Fatal> {
        match input {
            Input::Tick => {
                self.ticks += 1;
                if self.ticks.is_multiple_of(self.config.probe_ticks as u64) {
                    self.raw.mut_store().store_mut().probe()?;
                    self.retry()?;
                }
            }
            Input::Propose { request, .. } | Input::Change { request, .. } => {
                self.refuse(request, ProposeError::Full);
            }
            Input::Read { request } => self.reads.add(request),
            Input::Forget { request } => self.forget(request),
            Input::Message { .. }
            | Input::Transfer { .. }
            | Input::Campaign
            | Input::Unreachable { .. }
            | Input::SnapshotSent { .. } => {}
        }
        Ok(())
    }

    fn forget(&mut self, request: u64) {
        self.proposals.forget(request);
        self.reads.forget(request);
    }

    pub(super) fn refuse(&mut self, request: u64, why: ProposeError) {
        self.outputs.push(Output::Refused { request, why });
    }

    fn tick(&mut self) -> Result<(), Fatal> {
        self.ticks += 1;
        self.raw.tick();
        let raft = &self.raw.raft;
        let stands = matches!(raft.state, StateRole::PreCandidate | StateRole::Candidate);
        if stands && raft.election_elapsed == 0 {
            self.timeouts.campaigned();
        }
        let patience = SNAPSHOT_TIMEOUTS * self.config.election_ticks as u64;
        let late = self.snapshots_sent.iter().filter(|(_, since)| self.ticks - **since > patience);
        for peer in late.map(|(peer, _)| *peer).collect::<Vec<_>>() {
            self.snapshot_sent(peer, false);
        }
        self.write_commit()?;
        if self.full && self.ticks.is_multiple_of(self.config.probe_ticks as u64) {
            self.raw.mut_store().store_mut().probe()?;
            // Only a write shows that there is room for one.
            let hard_state = Some(self.hard_state);
            self.full |= !self.write(&Batch { hard_state, ..Batch::default() })?;
            self.hand_over();
        }
        self.ask();
        Ok(())
    }

    /// The commit alone never waits for the disk; it follows within a heartbeat, so that a node
    /// that starts again is not far behind before it hears a leader.
    fn write_commit(&mut self) -> Result<(), Fatal> {
        let heartbeat = self.config.heartbeat_ticks as u64;
        if self.full || self.commit_lags.is_none_or(|since| self.ticks - since < heartbeat) {
            return Ok(());
        }
        let hard_state = Some(self.hard_state);
        if !self.write(&Batch { hard_state, ..Batch::default() })? {
            self.full = true;
        }
        Ok(())
    }

    /// A change of members that anybody here was told of stays known over a restart: a node that
    /// came back without the knowledge would need the vote of one that was switched off since.
    /// Without room nobody is told, and it is tried once a tick.
    pub(super) fn write_change(&mut self) -> Result<(), Fatal> {
        let again = !self.full || self.news_tried != self.ticks;
        if self.commit_lags.is_some() && again {
            self.news_tried = self.ticks;
            let hard_state = Some(self.hard_state);
            if !self.write(&Batch { hard_state, ..Batch::default() })? {
                self.full = true;
            }
        }
        if self.commit_lags.is_none() {
            self.outputs.append(&mut self.news);
        }
        Ok(())
    }

    /// Asks for the state of affairs on behalf of waiting reads, if it is time to.
    pub(super) fn ask(&mut self) {
        let patience = 2 * self.config.heartbeat_ticks as u64;
        if let Some(context) = self.reads.question(self.ticks, patience) {
            self.raw.read_index(context);
        }
    }

    fn propose(&mut self, request: u64, command: Vec<u8>) {
        let (got, limit) = (command.len(), self.config.proposal_max);
        if got > limit {
            return self.refuse(request, ProposeError::TooLarge { got, limit });
        }
        if !self.leads() {
            let leader = self.leader();
            return self.refuse(request, ProposeError::NotLeader { leader });
        }
        if self.full {
            return self.refuse(request, ProposeError::Full);
        }
        let context = self.proposals.origin(request);
        match self.raw.propose(context, Payload::Command(command).encode()) {
            Ok(()) => self.proposals.add(self.raw.raft.raft_log.last_index(), request),
            Err(_) => self.refuse(request, ProposeError::Dropped),
        }
    }

    /// Who leads, if known.
    pub(super) fn leader(&self) -> Option<NodeId> {
        let leader = self.raw.raft.leader_id;
        (leader != 0).then_some(NodeId(leader))
    }

    fn transfer(&mut self, to: NodeId) {
        if self.leads() && to != self.id() && self.members.voters.contains(&to) {
            self.raw.transfer_leader(to.0);
        }
    }

    fn campaign(&mut self) -> Result<(), Fatal> {
        // Consensus itself would let one without a vote stand, and win where there are no voters.
        if self.leader().is_some() || !self.raw.raft.promotable() {
            return Ok(());
        }
        self.timeouts.campaigned();
        self.raw.campaign().map_err(|error| Fatal::Raft(error.to_string()))
    }

    fn snapshot_sent(&mut self, peer: NodeId, ok: bool) {
        self.snapshots_sent.remove(&peer);
        let status = if ok { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
        self.raw.report_snapshot(peer.0, status);
    }

    fn message(&mut self, from: NodeId, message: pb::RaftMessage) -> Result<(), Fatal> {
        let raft = &self.raw.raft;
        let leader = self.leader();
        let heard = raft.election_elapsed < raft.election_timeout();
        let full = message.full;
        let context = Context {
            id: self.id(),
            cluster: self.config.cluster,
            members: &self.members,
            removed: &self.removed,
            term: raft.term,
            leader,
            lease: self.leads() || (leader.is_some() && heard),
            last: raft.raft_log.last_index(),
        };
        match gate::check(message, from, &context).map(|checked| checked.0) {
            Ok(Passed::Removed) => self.leave(),
            Ok(Passed::Raft(mut message)) => {
                self.heard.insert(from, Heard { ticks: self.ticks, full });
                self.heed(&mut message);
                match self.raw.step(*message) {
                    Ok(()) => {}
                    Err(raft::Error::StepPeerNotFound | raft::Error::ProposalDropped) => {
                        self.note_refusal(GateError::NotMember { from });
                    }
                    Err(error) => return Err(Fatal::Raft(error.to_string())),
                }
            }
            Err(error) => {
                self.note_refusal(error);
                if matches!(error, GateError::Removed { .. }) {
                    self.tell_removed(from);
                }
            }
        }
        Ok(())
    }

    /// Who refuses a vote says up to where it knows the log to be committed; that is so in every
    /// term. Consensus does not look where the term is behind its own, and the term of a member
    /// that was removed stays behind: it is the one that knows of its removal, and has a log that
    /// is too long for its vote.
    fn heed(&self, message: &mut Message) {
        let raft = &self.raw.raft;
        let (asked, answer) = match raft.state {
            StateRole::PreCandidate => (true, MessageType::MsgRequestPreVoteResponse),
            StateRole::Candidate => (true, MessageType::MsgRequestVoteResponse),
            StateRole::Follower | StateRole::Leader => (false, message.get_msg_type()),
        };
        let votes = [MessageType::MsgRequestPreVoteResponse, MessageType::MsgRequestVoteResponse];
        let refusal = message.reject && votes.contains(&message.get_msg_type());
        let news = message.commit > raft.raft_log.committed;
        if asked && refusal && news && message.term < raft.term {
            message.term = raft.term;
            message.set_msg_type(answer);
        }
    }

    fn note_refusal(&mut self, error: GateError) {
        tracing::debug!(node = self.config.id.0, %error, "a message was refused");
        *self.refused.entry(error.kind()).or_default() += 1;
        self.last_refusal = Some(error);
    }

    /// It would ask for votes for ever: the entry that removed it may never have reached it.
    fn tell_removed(&mut self, to: NodeId) {
        let message = pb::RaftMessage {
            cluster: self.config.cluster.0.to_vec().into(),
            from: self.config.id.0,
            to: to.0,
            kind: pb::RaftKind::Removed as i32,
            term: self.raw.raft.term.max(1),
            index: self.applied,
            ..pb::RaftMessage::default()
        };
        self.outputs.push(Output::Send { to, message });
    }
}
