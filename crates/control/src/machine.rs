//! The replicated state as the machine that the log drives.

use cluster::{ClusterState, Command, Event, Rejected};

use crate::replica::{Machine, RestoreError};

/// What applying a command led to.
pub type Outcome = Result<Vec<Event>, Rejected>;

/// [`ClusterState`] behind its encodings.
#[derive(Debug, Default)]
pub struct ClusterMachine {
    state: ClusterState,
}

impl ClusterMachine {
    /// The state as applied so far.
    pub fn state(&self) -> &ClusterState {
        &self.state
    }
}

impl Machine for ClusterMachine {
    type Outcome = Outcome;

    fn apply(&mut self, index: u64, command: &[u8]) -> Outcome {
        let proposal = wire::decode_command(command).map_err(|_| Rejected::Unreadable)?;
        // Node 1 is the founder's, whose certificate says so before there is a log.
        if self.state.nodes().is_empty() && matches!(proposal.command, Command::Enrol { .. }) {
            return Err(Rejected::NotFounded);
        }
        let outcome = self.state.apply(index, proposal);
        debug_assert_eq!(self.state.check_integrity(), Ok(()));
        outcome
    }

    fn snapshot(&self) -> Vec<u8> {
        wire::encode_state(&self.state)
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), RestoreError> {
        self.state = wire::decode_state(bytes).map_err(|error| RestoreError(error.to_string()))?;
        Ok(())
    }

    fn hash(&self) -> [u8; 32] {
        wire::state_hash(&self.state)
    }
}
