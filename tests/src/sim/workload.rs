//! What the replicas agree about in a simulation, and how clients use it.

use std::cell::RefCell;
use std::fmt::Debug;

use control::replica::{Machine, RestoreError};

use super::client::{Answer, RequestId, Wish};
use super::linear::Value;

/// A replicated machine seen as registers that clients write and read.
pub trait Workload: Debug + 'static {
    /// The machine.
    type Machine: Machine<Outcome: Clone + Debug + PartialEq> + Debug;

    /// A new machine.
    fn machine() -> Self::Machine;

    /// The command of a write.
    fn command(id: RequestId, wish: Wish) -> Vec<u8>;

    /// What the client is told about what applying its command gave.
    fn answer(outcome: &<Self::Machine as Machine>::Outcome) -> Answer;

    /// What stands under `key`.
    fn read(machine: &Self::Machine, key: u64) -> Value;

    /// Whether the machine holds together.
    ///
    /// # Errors
    /// What does not.
    fn check(machine: &Self::Machine) -> Result<(), String>;
}

/// One application, as the checkers see it.
#[derive(Debug, Clone)]
pub struct AppliedRecord<O> {
    /// The entry's index.
    pub index: u64,
    /// The command.
    pub command: Vec<u8>,
    /// What the machine said.
    pub outcome: O,
}

/// A machine that notes what is applied to it, for the checkers to collect.
#[derive(Debug)]
pub struct Recorder<M: Machine> {
    /// The machine under note.
    pub inner: M,
    notes: RefCell<Vec<Note<M::Outcome>>>,
}

/// A record, and the hash of the state after it where one was taken.
pub type Note<O> = (AppliedRecord<O>, Option<[u8; 32]>);

/// Records between two hashes.
const HASH_EVERY: u64 = 16;

impl<M: Machine> Recorder<M> {
    /// A recorder around `inner`.
    pub fn new(inner: M) -> Self {
        Self { inner, notes: RefCell::default() }
    }

    /// What was applied since the last call.
    pub fn take(&self) -> Vec<Note<M::Outcome>> {
        self.notes.take()
    }
}

impl<M: Machine<Outcome: Clone>> Machine for Recorder<M> {
    type Outcome = M::Outcome;

    fn apply(&mut self, index: u64, command: &[u8]) -> M::Outcome {
        let outcome = self.inner.apply(index, command);
        let command = command.to_vec();
        let record = AppliedRecord { index, command, outcome: outcome.clone() };
        let hash = index.is_multiple_of(HASH_EVERY).then(|| self.inner.hash());
        self.notes.borrow_mut().push((record, hash));
        outcome
    }

    fn snapshot(&self) -> Vec<u8> {
        self.inner.snapshot()
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), RestoreError> {
        self.inner.restore(bytes)
    }

    fn hash(&self) -> [u8; 32] {
        self.inner.hash()
    }
}
