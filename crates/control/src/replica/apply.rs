//! Committed entries, in their order, to the state machine and to whoever waits for them.

use raft::eraftpb as rb;

use super::payload::{Origin, Payload};
use super::{Fatal, LogStore, Machine, Mistake, Output, ProposeError, Replica};

impl<S: LogStore, M: Machine> Replica<S, M> {
    pub(super) fn apply(&mut self, entries: Vec<rb::Entry>) -> Result<(), Fatal> {
        for entry in &entries {
            let unreadable = Fatal::Payload { index: entry.index };
            let Ok(origin) = Origin::decode(&entry.context) else { return Err(unreadable) };
            let settled = self.proposals.settle(entry.index, origin);
            if let Some(request) = settled.loser {
                self.refuse(request, ProposeError::Dropped);
            }
            self.applied = entry.index;
            // The kind first: the entry that leaves joint consensus is empty too, and skipping it
            // would leave the cluster in two configurations for ever.
            match entry.get_entry_type() {
                rb::EntryType::EntryConfChangeV2
                    if entry.data.is_empty() && self.makes(Mistake::EmptyChangeSkipped) => {}
                rb::EntryType::EntryConfChangeV2 => self.apply_change(entry, settled.winner)?,
                rb::EntryType::EntryConfChange => return Err(unreadable),
                rb::EntryType::EntryNormal => self.apply_normal(entry, settled.winner)?,
            }
            self.record_check(entry.index);
        }
        for request in self.reads.release(self.applied) {
            self.outputs.push(Output::ReadReady { request, index: self.applied });
        }
        Ok(())
    }

    fn apply_normal(&mut self, entry: &rb::Entry, request: Option<u64>) -> Result<(), Fatal> {
        let index = entry.index;
        match Payload::decode(&entry.data) {
            Err(_) => return Err(Fatal::Payload { index }),
            Ok(Payload::Empty) => {
                // Consensus took a change of ours for one too many and put nothing in its place.
                if let Some(request) = request {
                    self.refuse(request, ProposeError::ChangePending);
                }
            }
            Ok(Payload::Command(command)) => {
                let outcome = self.machine.apply(index, &command);
                self.outputs.push(Output::Applied { index, request, outcome });
            }
            Ok(Payload::Checkpoint { index, hash }) => {
                if !self.checks.agrees(index, &hash) {
                    return Err(Fatal::StateDiverged { index });
                }
            }
        }
        Ok(())
    }

    pub(super) fn record_check(&mut self, index: u64) {
        if self.checks.due(index) {
            self.checks.record(index, self.machine.hash());
        }
    }

    /// The leader puts its newest hash into the log.
    pub(super) fn tell_check(&mut self) {
        let (_, _, leading) = self.role;
        if !leading || self.full {
            return;
        }
        if let Some((index, hash)) = self.checks.untold() {
            let payload = Payload::Checkpoint { index, hash }.encode();
            // Dropped while leadership is handed over; whoever leads next tells its own.
            if self.raw.propose(Vec::new(), payload).is_ok() {
                self.checks.told(index);
            }
        }
    }
}
