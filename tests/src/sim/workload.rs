//! What the replicas agree about in a simulation, and how clients use it.

use std::cell::RefCell;
use std::fmt::Debug;

use control::replica::{Machine, RestoreError};

use super::checks::Checked;
use super::client::{Answer, RequestId, Wish};
use super::linear::Value;
use super::rng::Rng;
use super::run::Mutation;
use super::world::{Event, World};

/// What a machine's application gives.
pub type Outcome<W> = <<W as Workload>::Machine as Machine>::Outcome;

/// A replicated machine seen as registers that clients write and read, and what else goes on around
/// it. The hooks are called by the world as things happen.
pub trait Workload: Debug + Sized + 'static {
    /// The machine.
    type Machine: Machine<Outcome: Clone + Debug + PartialEq> + Debug;
    /// What a process does beside its replica.
    type Duty: Default;
    /// What else there is in the world.
    type Extra: Default;
    /// What else happens in it.
    type Event: Debug;
    /// What the checkers remember of it.
    type Ledger: Default + Debug;

    /// Election timeouts after healing within which everything must be as it should be.
    const SETTLES: u64 = 10;

    /// Entries between comparisons of whole states.
    const HASHES: u64 = 16;

    /// A new machine.
    fn machine(mutation: Option<Mutation>) -> Self::Machine;

    /// What a client asks for under its number `unique`, a read as often as `reads` per mille.
    fn wish(rng: &mut Rng, keys: u64, reads: u64, unique: u64) -> Wish;

    /// The command of a write.
    fn command(id: RequestId, wish: Wish) -> Vec<u8>;

    /// What the client is told about what applying its command gave.
    fn answer(wish: Wish, outcome: &Outcome<Self>) -> Answer;

    /// What stands under `key`.
    fn read(machine: &Self::Machine, key: u64) -> Value;

    /// Whether a command that was just applied for the first time may have had this outcome, and
    /// the machine holds together after it.
    ///
    /// # Errors
    /// What does not.
    fn check(
        ledger: &mut Self::Ledger,
        machine: &Self::Machine,
        record: &AppliedRecord<Outcome<Self>>,
    ) -> Result<(), String>;

    /// The world begins.
    fn begin(world: &mut World<Self>) {
        world.after(50_000, Event::Operate);
    }

    /// Something else happens.
    fn happen(_world: &mut World<Self>, _event: Self::Event) -> Checked {
        Ok(())
    }

    /// Which node has to be awake for it.
    fn needs(_world: &World<Self>, _event: &Self::Event) -> Option<u64> {
        None
    }

    /// The operator looks.
    fn operate(world: &mut World<Self>) -> Checked {
        world.change_members()
    }

    /// A fault of the workload's own kind.
    fn trouble(_world: &mut World<Self>) -> Checked {
        Ok(())
    }

    /// Whether members are to change that did not yet.
    fn changing(_world: &World<Self>) -> bool {
        false
    }

    /// What else can be cut off from nodes, by number.
    fn bystanders(_world: &World<Self>) -> Vec<u64> {
        Vec::new()
    }

    /// Time passed on a node.
    fn ticked(_world: &mut World<Self>, _node: u64) -> Checked {
        Ok(())
    }

    /// A node applied a command.
    fn applied(_world: &mut World<Self>, _node: u64, _outcome: &Outcome<Self>) -> Checked {
        Ok(())
    }

    /// A request that no client waits for was decided: with this outcome, with none for a change
    /// of members, or nobody knows how.
    fn decided(
        _world: &mut World<Self>,
        _node: u64,
        _request: u64,
        _outcome: Decided<Outcome<Self>>,
    ) -> Checked {
        Ok(())
    }

    /// A node leads from now on, or no longer.
    fn role(_world: &mut World<Self>, _node: u64, _leading: bool) -> Checked {
        Ok(())
    }

    /// A process ended.
    fn stopped(_world: &mut World<Self>, _node: u64) {}

    /// What was put off until the node in hand had done everything.
    fn settle(_world: &mut World<Self>) -> Checked {
        Ok(())
    }

    /// Trouble is over.
    fn heal(_world: &mut World<Self>) {}

    /// What a line of a story does that is the workload's own; `None` for any other line.
    fn perform(_world: &mut World<Self>, _words: &[&str]) -> Option<Checked> {
        None
    }

    /// What there is to see beside the nodes, in lines.
    fn picture(_world: &World<Self>) -> String {
        String::new()
    }

    /// Why not everything is as it should be in the end, if so.
    fn unsettled(_world: &World<Self>) -> Option<String> {
        None
    }
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Decided<O> {
    /// It was applied.
    Outcome(O),
    /// The members are changed.
    Changed,
    /// Nobody knows.
    Unknown,
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
    every: u64,
}

/// A record, and the hash of the state after it where one was taken.
pub type Note<O> = (AppliedRecord<O>, Option<[u8; 32]>);

impl<M: Machine> Recorder<M> {
    /// A recorder around `inner` that takes a hash after each `every`th entry.
    pub fn new(inner: M, every: u64) -> Self {
        Self { inner, notes: RefCell::default(), every }
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
        let hash = index.is_multiple_of(self.every).then(|| self.inner.hash());
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
