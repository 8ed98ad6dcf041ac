//! Registers, the smallest machine worth replicating: swaps that are applied once.

use std::collections::{BTreeMap, VecDeque};

use control::replica::{Machine, RestoreError};

use super::client::{Answer, RequestId, Wish};
use super::linear::Value;
use super::workload::Workload;

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
    order: VecDeque<RequestId>,
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
        self.order.push_back(id);
        if self.order.len() > REMEMBERED {
            let oldest = self.order.pop_front();
            oldest.and_then(|oldest| self.answers.remove(&oldest));
        }
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
        let mut out = Vec::new();
        out.extend((self.values.len() as u64).to_be_bytes());
        for (key, value) in &self.values {
            out.extend(key.to_be_bytes());
            out.extend(value.to_be_bytes());
        }
        for id in &self.order {
            out.extend(id);
            put(&mut out, self.answers.get(id).copied().flatten());
        }
        out
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), RestoreError> {
        let malformed = || RestoreError("registers".to_owned());
        let words = words(bytes).ok_or_else(malformed)?;
        let (&count, rest) = words.split_first().ok_or_else(malformed)?;
        let (pairs, answers) = rest.split_at_checked(2 * count as usize).ok_or_else(malformed)?;
        *self = Self::default();
        for pair in pairs.chunks_exact(2) {
            self.values.insert(pair[0], pair[1]);
        }
        for answer in answers.chunks_exact(4) {
            let id = super::client::request_id(answer[0], answer[1]);
            self.answers.insert(id, value(answer[2], answer[3]));
            self.order.push_back(id);
        }
        Ok(())
    }

    fn hash(&self) -> [u8; 32] {
        *blake3::hash(&self.snapshot()).as_bytes()
    }
}

/// The workload of clients that swap registers.
#[derive(Debug)]
pub struct RegisterWorkload;

impl Workload for RegisterWorkload {
    type Machine = Registers;

    fn machine() -> Registers {
        Registers::default()
    }

    fn command(id: RequestId, wish: Wish) -> Vec<u8> {
        let mut out = id.to_vec();
        if let Wish::Write { key, value } = wish {
            out.extend(key.to_be_bytes());
            put(&mut out, value);
        }
        out
    }

    fn answer(outcome: &Swapped) -> Answer {
        match outcome {
            Swapped::Before(before) => Answer::Wrote(Some(*before)),
            Swapped::Malformed => Answer::Retry(None),
        }
    }

    fn read(machine: &Registers, key: u64) -> Value {
        machine.get(key)
    }

    fn check(_machine: &Registers) -> Result<(), String> {
        Ok(())
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
