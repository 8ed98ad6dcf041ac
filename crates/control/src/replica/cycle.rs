//! The eight steps, in their order: messages, snapshot, entries and hard state in one durable
//! batch, answers, application, advance, the light ready, application again.

use planner::NodeId;
use raft::eraftpb as rb;
use wire::pb;

use super::snapshots::Install;
use super::{
    Batch, Fatal, LogStore, Machine, Mistake, Output, ProposeError, Replica, StoreError, convert,
};

/// A ready whose batch is not durable yet.
pub(super) struct Stall {
    ready: raft::Ready,
    batch: Batch,
    install: Option<Install>,
}

impl<S: LogStore, M: Machine> Replica<S, M> {
    /// Does everything there is to do, until nothing is left or the disk is full.
    pub(super) fn settle(&mut self) -> Result<(), Fatal> {
        loop {
            while self.stall.is_none() && self.raw.has_ready() {
                self.cycle()?;
            }
            if !self.news.is_empty() && self.stall.is_none() {
                self.write_change()?;
            }
            self.note_role();
            self.note_room();
            if self.stall.is_some() || !self.duties()? {
                break;
            }
        }
        self.timeouts.apply(&mut self.raw);
        Ok(())
    }

    fn cycle(&mut self) -> Result<(), Fatal> {
        let mut ready = self.raw.ready();
        // A leader's: its followers may write while it does. It counts itself when it has written.
        self.send(ready.take_messages());
        for state in ready.take_read_states() {
            self.reads.answer(&state.request_ctx, state.index);
        }
        let commit = self.hard_state.commit;
        if let Some(state) = ready.hs() {
            self.hard_state = convert::hard_state_from_raft(state);
        }
        if commit != self.hard_state.commit {
            self.commit_lags.get_or_insert(self.ticks);
        }
        let install = self.prepare(ready.snapshot())?;
        let mut batch = Batch::default();
        if ready.must_sync() {
            batch.hard_state = Some(self.hard_state);
        }
        let entries = ready.take_entries();
        batch.entries = entries.iter().map(stored).collect::<Result<_, Fatal>>()?;
        if let Some(install) = &install {
            batch.snapshot = Some(install.snapshot.clone());
            batch.reset = true;
        }
        self.complete(Stall { ready, batch, install })
    }

    /// From the batch on. Without room the rest waits: no answer goes out for what is not durable.
    fn complete(&mut self, mut stall: Stall) -> Result<(), Fatal> {
        if self.makes(Mistake::AnsweredEarly) {
            self.send(stall.ready.take_persisted_messages());
        }
        if stall.batch != Batch::default() && !self.write(&stall.batch)? {
            self.hold(stall);
            return Ok(());
        }
        let Stall { mut ready, install, .. } = stall;
        self.send(ready.take_persisted_messages());
        if let Some(install) = install {
            self.install(install);
        }
        self.apply(ready.take_committed_entries())?;
        let mut light = self.raw.advance(ready);
        if let Some(commit) = light.commit_index() {
            self.hard_state.commit = commit;
            self.commit_lags.get_or_insert(self.ticks);
        }
        self.send(light.take_messages());
        self.apply(light.take_committed_entries())?;
        self.raw.advance_apply();
        Ok(())
    }

    /// Writes durably; `false` when there is no room and nothing was written.
    pub(super) fn write(&mut self, batch: &Batch) -> Result<bool, Fatal> {
        match self.raw.mut_store().write(batch) {
            Ok(()) => {
                if batch.hard_state.is_some() {
                    self.commit_lags = None;
                }
                self.full = self.raw.store().store().is_low();
                Ok(true)
            }
            Err(StoreError::Full) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn hold(&mut self, stall: Stall) {
        // Consensus may not be asked for anything now, so the invitation is written by hand. It is
        // the leader's to send whenever it likes.
        if self.leads()
            && let Some(to) = self.heir()
        {
            let message = pb::RaftMessage {
                cluster: self.config.cluster.0.to_vec().into(),
                from: self.config.id.0,
                to: to.0,
                kind: pb::RaftKind::TimeoutNow as i32,
                term: self.raw.raft.term,
                ..pb::RaftMessage::default()
            };
            self.outputs.push(Output::Send { to, message });
        }
        self.stall = Some(Box::new(stall));
        self.full = true;
    }

    /// Tries the held batch again.
    pub(super) fn retry(&mut self) -> Result<(), Fatal> {
        let Some(stall) = self.stall.take() else { return Ok(()) };
        let Stall { ready, batch, install } = *stall;
        if self.write(&batch)? {
            return self.complete(Stall { ready, batch: Batch::default(), install });
        }
        self.stall = Some(Box::new(Stall { ready, batch, install }));
        Ok(())
    }

    fn send(&mut self, messages: Vec<rb::Message>) {
        for message in &messages {
            let to = NodeId(message.to);
            // What is not ours would be refused, and what may not travel is nobody's.
            let ours = message.from == self.config.id.0;
            let Some(message) = convert::message_to_wire(self.config.cluster, self.full, message)
            else {
                continue;
            };
            if !ours {
                continue;
            }
            if message.snapshot.is_some() {
                self.snapshots_sent.insert(to, self.ticks);
            }
            self.outputs.push(Output::Send { to, message });
        }
    }

    /// What is to be done besides consensus' own work; true when that made more of it.
    fn duties(&mut self) -> Result<bool, Fatal> {
        self.step_down();
        self.leave_joint();
        self.tell_check();
        self.ask();
        if self.snapshot_due() {
            self.take_snapshot()?;
        }
        if self.raw.has_ready() {
            return Ok(true);
        }
        if !self.members.all().is_empty() && !self.members.contains(self.id()) {
            self.leave();
        }
        Ok(false)
    }

    /// This node is no longer a member.
    pub(super) fn leave(&mut self) {
        if !self.gone {
            self.gone = true;
            // One that was told, and knows itself a member still, might be standing for election.
            if self.raw.raft.state != raft::StateRole::Follower {
                let term = self.raw.raft.term;
                self.raw.raft.become_follower(term, raft::INVALID_ID);
            }
            self.lose();
            self.outputs.push(Output::Removed);
        }
    }

    /// Nobody here will learn what became of what was proposed here.
    fn lose(&mut self) {
        for request in self.proposals.lose() {
            self.refuse(request, ProposeError::Unknown);
        }
    }

    /// A leader that cannot write leads nothing.
    fn note_role(&mut self) {
        let raft = &self.raw.raft;
        let silent = self.stall.is_some() && self.leads();
        let current = raft.raft_log.term(self.applied).is_ok_and(|term| term == raft.term);
        let leading = self.leads() && current && !silent;
        let leader = if silent { None } else { self.leader() };
        let term = raft.term;
        if !self.leads() || silent {
            self.lose();
        }
        if self.role != (term, leader, leading) {
            self.role = (term, leader, leading);
            self.outputs.push(Output::Role { term, leader, leading });
            self.reads.leader_changed();
        }
    }

    fn note_room(&mut self) {
        if self.full != self.told_full {
            self.told_full = self.full;
            self.outputs.push(Output::Room { room: !self.full });
            self.hand_over();
        }
    }

    /// A leader without room leads on only where nobody else has any.
    pub(super) fn hand_over(&mut self) {
        let can = self.full && self.stall.is_none() && self.leads();
        if can
            && self.raw.raft.lead_transferee.is_none()
            && let Some(to) = self.heir()
        {
            self.raw.transfer_leader(to.0);
        }
    }
}

fn stored(entry: &rb::Entry) -> Result<super::LogEntry, Fatal> {
    convert::entry_from_raft(entry).ok_or(Fatal::Payload { index: entry.index })
}
