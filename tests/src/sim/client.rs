//! Clients: one operation at a time, retried at other nodes until its deadline, and remembered.

use super::linear::{Act, Operation, Value};
use super::rng::Rng;

/// How long a client waits for one node's answer.
pub const PATIENCE: u64 = 250_000;
/// How long a client tries in all. What is not answered by then may still take effect.
pub const DEADLINE: u64 = 2_500_000;

/// The id under which a write is applied once, however often it is sent.
pub type RequestId = [u8; 16];

/// What a client asks of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Write `value`; `None` deletes.
    Write {
        /// Which register.
        key: u64,
        /// What is to stand there.
        value: Value,
    },
    /// Read, as of some time between question and answer.
    Read {
        /// Which register.
        key: u64,
    },
}

/// What a node answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Written; what stood there before, where the machine says so.
    Wrote(Option<Value>),
    /// Read.
    Saw(Value),
    /// It can have no effect.
    Nothing,
    /// Not here, not now; perhaps at that node.
    Retry(Option<u64>),
}

/// A question under way.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// The wish.
    pub wish: Wish,
    /// When the client first sent it.
    pub from: u64,
    /// How often it has been sent.
    pub attempt: u64,
}

/// A client.
#[derive(Debug)]
pub struct Client {
    /// Its number.
    pub id: u64,
    /// The number of its operation.
    pub serial: u64,
    /// What it waits for.
    pub asked: Option<Asked>,
    /// The node it believes to lead.
    pub guess: Option<u64>,
    /// How many it has asked in turn.
    turn: usize,
    /// Its own chance.
    pub rng: Rng,
}

impl Client {
    /// Client `id` of a run.
    pub fn new(seed: u64, id: u64) -> Self {
        let rng = Rng::new(seed, 1_000 + id);
        Self { id, serial: 0, asked: None, guess: None, turn: 0, rng }
    }

    /// The number that its next operation has and no other operation of any client.
    pub fn unique(&self) -> u64 {
        self.id * 1_000_000 + self.serial + 1
    }

    /// Begins another operation.
    pub fn begin(&mut self, now: u64, wish: Wish) {
        self.serial += 1;
        self.asked = Some(Asked { wish, from: now, attempt: 0 });
    }

    /// The id of the operation under way.
    pub fn request(&self) -> RequestId {
        request_id(self.id, self.serial)
    }

    /// Where to send it next: the believed leader, or anybody. `in_turn`, where an answer must come
    /// in time: everybody is asked then, and not those twice by chance who never answer.
    pub fn target(&mut self, nodes: &[u64], in_turn: bool) -> Option<u64> {
        let believed = self.guess.take().filter(|guess| nodes.contains(guess));
        if in_turn {
            return believed.or_else(|| {
                self.turn += 1;
                self.turn.checked_rem(nodes.len()).map(|at| nodes[at])
            });
        }
        // Now and then somebody else is asked: followers must redirect and read correctly too.
        match believed {
            Some(node) if !self.rng.chance(100) => Some(node),
            _ => self.rng.pick(nodes).copied(),
        }
    }

    /// Takes an answer to operation `serial`; whether this ended it, and as what, if it counts.
    pub fn answered(&mut self, now: u64, serial: u64, answer: Answer) -> Option<Option<Operation>> {
        let asked = self.asked.filter(|_| serial == self.serial)?;
        let act = match (asked.wish, answer) {
            (Wish::Write { value, .. }, Answer::Wrote(before)) => Act::Write { value, before },
            (Wish::Read { .. }, Answer::Saw(value)) => Act::Read(value),
            (_, Answer::Nothing) => {
                self.asked = None;
                return Some(None);
            }
            _ => return None,
        };
        self.asked = None;
        Some(Some(Operation { key: asked.key(), act, from: asked.from, to: Some(now) }))
    }

    /// Gives up: the operation as nobody knows whether it happened. Reads leave no trace.
    pub fn give_up(&mut self) -> Option<Operation> {
        let asked = self.asked.take()?;
        self.guess = None;
        match asked.wish {
            Wish::Write { key, value } => {
                let act = Act::Write { value, before: None };
                Some(Operation { key, act, from: asked.from, to: None })
            }
            Wish::Read { .. } => None,
        }
    }
}

impl Asked {
    /// The register in question.
    pub fn key(&self) -> u64 {
        match self.wish {
            Wish::Write { key, .. } | Wish::Read { key } => key,
        }
    }
}

/// Number `serial` of client `client`.
pub fn request_id(client: u64, serial: u64) -> RequestId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&client.to_be_bytes());
    id[8..].copy_from_slice(&serial.to_be_bytes());
    id
}
