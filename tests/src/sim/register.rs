//! Registers, the smallest machine worth replicating: swaps that are applied once.

use std::collections::{BTreeMap, VecDeque};

use control::replica::{Machine, RestoreError};

use super::client::{Answer, RequestId, Wish};
use super::linear::Value;
use super::rng::Rng;
use super::run::Mutation;
use super::workload::{AppliedRecord, Workload};

/// Answers that are kept to recognise a repeated request.
const REMEMBERED: usize = 4_096;

/// What applying a swap gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Swapped {
    /// What stood there before, as the first application of this request found it.
    Before(Value),
    /// The command is none of ours.
    Malformed,
}

/// Registers by key, with the answers of the last requests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Registers {
    values: BTreeMap<u64, u64>,
    answers: BTreeMap<RequestId, Value>,
    order: VecDeque<(RequestId, Value)>,
    /// Over every swap so far, each with what it found.
    history: [u8; 32],
}

impl Registers {
    /// What stands under `key`.
    pub fn get(&self, key: u64) -> Value {
        self.values.get(&key).copied()
    }

    fn swap(&mut self, id: RequestId, key: u64, value: Value) -> Value {
        if let Some(&before) = self.answers.get(&id) {
            return before;
        }
        let before = match value {
            Some(value) => self.values.insert(key, value),
            None => self.values.remove(&key),
        };
        self.answers.insert(id, before);
        self.order.push_back((id, before));
        if self.order.len() > REMEMBERED {
            let oldest = self.order.pop_front();
            oldest.and_then(|(oldest, _)| self.answers.remove(&oldest));
        }
        let mut swap = self.history.to_vec();
        swap.extend(id);
        swap.extend(key.to_be_bytes());
        put(&mut swap, value);
        put(&mut swap, before);
        self.history = *blake3::hash(&swap).as_bytes();
        before
    }
}

/// The words of `bytes`, eight bytes each.
fn words(bytes: &[u8]) -> Option<Vec<u64>> {
    let chunks = bytes.chunks_exact(8);
    let whole = chunks.remainder().is_empty();
    let word = |chunk: &[u8]| chunk.try_into().ok().map(u64::from_be_bytes);
    whole.then(|| chunks.filter_map(word).collect())
}

/// A value in two words.
fn put(out: &mut Vec<u8>, value: Value) {
    out.extend(u64::from(value.is_some()).to_be_bytes());
    out.extend(value.unwrap_or(0).to_be_bytes());
}

fn value(tag: u64, value: u64) -> Value {
    (tag == 1).then_some(value)
}

impl Machine for Registers {
    type Outcome = Swapped;

    fn apply(&mut self, _index: u64, command: &[u8]) -> Swapped {
        match words(command).as_deref() {
            Some(&[a, b, key, tag, new]) => {
                let id = super::client::request_id(a, b);
                Swapped::Before(self.swap(id, key, value(tag, new)))
            }
            _ => Swapped::Malformed,
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut out = self.history.to_vec();
        out.extend((self.values.len() as u64).to_be_bytes());
        for (key, value) in &self.values {
            out.extend(key.to_be_bytes());
            out.extend(value.to_be_bytes());
        }
        for (id, before) in &self.order {
            out.extend(id);
            put(&mut out, *before);
        }
        out
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), RestoreError> {
        let malformed = || RestoreError("registers".to_owned());
        let (history, bytes) = bytes.split_first_chunk().ok_or_else(malformed)?;
        let words = words(bytes).ok_or_else(malformed)?;
        let (&count, rest) = words.split_first().ok_or_else(malformed)?;
        let (pairs, answers) = rest.split_at_checked(2 * count as usize).ok_or_else(malformed)?;
        *self = Self { history: *history, ..Self::default() };
        for pair in pairs.chunks_exact(2) {
            self.values.insert(pair[0], pair[1]);
        }
        for answer in answers.chunks_exact(4) {
            let id = super::client::request_id(answer[0], answer[1]);
            let before = value(answer[2], answer[3]);
            self.answers.insert(id, before);
            self.order.push_back((id, before));
        }
        Ok(())
    }

    fn hash(&self) -> [u8; 32] {
        let mut out = self.history.to_vec();
        for (key, value) in &self.values {
            out.extend(key.to_be_bytes());
            out.extend(value.to_be_bytes());
        }
        *blake3::hash(&out).as_bytes()
    }
}

/// The workload of clients that swap registers.
#[derive(Debug)]
pub struct RegisterWorkload;

impl Workload for RegisterWorkload {
    type Machine = Registers;
    type Duty = ();
    type Extra = ();
    type Event = ();
    type Ledger = ();

    fn machine(_mutation: Option<Mutation>) -> Registers {
        Registers::default()
    }

    fn wish(rng: &mut Rng, keys: u64, reads: u64, unique: u64) -> Wish {
        let key = rng.below(keys);
        match rng.chance(reads) {
            true => Wish::Read { key },
            false => Wish::Write { key, value: Some(unique) },
        }
    }

    fn command(id: RequestId, wish: Wish) -> Vec<u8> {
        let mut out = id.to_vec();
        if let Wish::Write { key, value } = wish {
            out.extend(key.to_be_bytes());
            put(&mut out, value);
        }
        out
    }

    fn answer(_wish: Wish, outcome: &Swapped) -> Answer {
        match outcome {
            Swapped::Before(before) => Answer::Wrote(Some(*before)),
            Swapped::Malformed => Answer::Nothing,
        }
    }

    fn read(machine: &Registers, key: u64) -> Value {
        machine.get(key)
    }

    fn check(
        _ledger: &mut (),
        _machine: &Registers,
        record: &AppliedRecord<Swapped>,
    ) -> Result<(), String> {
        match record.outcome {
            Swapped::Before(_) => Ok(()),
            Swapped::Malformed => Err("a malformed command".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn swap(machine: &mut Registers, serial: u64, value: Value) -> Swapped {
        let id = super::super::client::request_id(1, serial);
        machine.apply(1, &RegisterWorkload::command(id, Wish::Write { key: 3, value }))
    }

    #[test]
    fn a_request_is_applied_once_and_a_snapshot_knows_it() {
        let mut machine = Registers::default();
        assert_eq!(swap(&mut machine, 1, Some(7)), Swapped::Before(None));
        assert_eq!(swap(&mut machine, 2, Some(8)), Swapped::Before(Some(7)));
        let mut copy = Registers::default();
        copy.restore(&machine.snapshot()).unwrap();
        assert_eq!(copy, machine);
        assert_eq!(swap(&mut copy, 1, Some(7)), Swapped::Before(None));
        assert_eq!((copy.get(3), copy.hash()), (Some(8), machine.hash()));
        assert_eq!(copy.apply(1, b"what"), Swapped::Malformed);
        assert!(copy.restore(b"what").is_err());
    }
}
