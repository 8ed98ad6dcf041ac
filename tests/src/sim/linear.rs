//! Is a history of reads and writes linearizable? Wing and Gong's search with Lowe's memory, per
//! key.
//!
//! An operation is a span of time with what its caller saw. A history is linearizable when every
//! operation can be given one instant within its span so that the instants, in order, make sense
//! of what was seen. Keys are checked apart from each other, which loses nothing (Herlihy and
//! Wing's locality) and keeps the search small.

use std::collections::{BTreeMap, BTreeSet, HashSet};

/// What a register holds; `None` before the first write.
pub type Value = Option<u64>;

/// What an operation does. `None` is written by what deletes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Writes.
    Write {
        /// What stands there afterwards.
        value: Value,
        /// What stood there before, where the caller learned it.
        before: Option<Value>,
    },
    /// Saw this value.
    Read(Value),
}

/// One operation of one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// Which register.
    pub key: u64,
    /// What was asked and seen.
    pub act: Act,
    /// When it was asked for.
    pub from: u64,
    /// When its answer came; `None` when none did: it may take effect at any later time, or never.
    pub to: Option<u64>,
}

/// The first key whose operations have no order that explains them, with those operations.
pub fn violation(history: &[Operation]) -> Option<(u64, Vec<Operation>)> {
    let mut keys: BTreeMap<u64, Vec<Operation>> = BTreeMap::new();
    for operation in history {
        keys.entry(operation.key).or_default().push(*operation);
    }
    keys.into_iter().find(|(_, operations)| !linearizable(operations))
}

/// Whether the operations of one key have an order that explains them.
pub fn linearizable(operations: &[Operation]) -> bool {
    let kept = relevant(operations);
    Search::new(&kept).run()
}

/// Drops unanswered operations that nobody can have noticed. An unanswered write whose value is
/// never seen may be left out of any explanation: it is nowhere needed, and where it stood before
/// another unanswered one nothing is lost by its going.
fn relevant(operations: &[Operation]) -> Vec<Operation> {
    let mut seen = BTreeSet::new();
    for operation in operations.iter().filter(|operation| operation.to.is_some()) {
        match operation.act {
            Act::Read(value) => seen.insert(value),
            Act::Write { before: Some(value), .. } => seen.insert(value),
            Act::Write { before: None, .. } => false,
        };
    }
    let noticed = |operation: &&Operation| match (operation.to, operation.act) {
        (Some(_), _) => true,
        (None, Act::Read(_)) => false,
        (None, Act::Write { value, .. }) => seen.contains(&value),
    };
    let mut kept: Vec<Operation> = operations.iter().filter(noticed).copied().collect();
    kept.sort_by_key(|operation| (operation.from, operation.to.unwrap_or(u64::MAX)));
    kept
}

/// The search: which operations have had their instant, and what the register holds after them.
struct Search<'a> {
    operations: &'a [Operation],
    done: Vec<u64>,
    /// Answered operations that have none yet.
    left: usize,
    tried: HashSet<(Vec<u64>, Value)>,
}

impl<'a> Search<'a> {
    fn new(operations: &'a [Operation]) -> Self {
        let done = vec![0; operations.len().div_ceil(64)];
        let left = operations.iter().filter(|operation| operation.to.is_some()).count();
        Self { operations, done, left, tried: HashSet::new() }
    }

    fn is_done(&self, at: usize) -> bool {
        self.done[at / 64] >> (at % 64) & 1 == 1
    }

    fn flip(&mut self, at: usize) {
        self.done[at / 64] ^= 1 << (at % 64);
    }

    /// One where an answered operation is counted, nought where it may as well not happen.
    fn counts(&self, at: usize) -> usize {
        usize::from(self.operations[at].to.is_some())
    }

    /// The operations that may come next: those that began before the first end of those left.
    fn next(&self, first: usize) -> Vec<usize> {
        let mut end = u64::MAX;
        let mut found = Vec::new();
        for at in first..self.operations.len() {
            if self.operations[at].from > end {
                break;
            }
            if !self.is_done(at) {
                found.push(at);
                end = end.min(self.operations[at].to.unwrap_or(u64::MAX));
            }
        }
        // What began after the smallest end was known in time to be excluded only now.
        found.retain(|&at| self.operations[at].from <= end);
        found
    }

    /// The register after operation `at` on `value`, where its caller's view allows that.
    fn step(&self, at: usize, value: Value) -> Option<Value> {
        let operation = &self.operations[at];
        match operation.act {
            Act::Read(saw) => (saw == value).then_some(value),
            Act::Write { value: new, before } => {
                let agrees = operation.to.is_none() || before.is_none_or(|saw| saw == value);
                agrees.then_some(new)
            }
        }
    }

    /// Depth first with a stack of its own: histories are longer than a thread's stack is deep.
    fn run(&mut self) -> bool {
        let mut first = 0;
        let mut path: Vec<(usize, Value, usize, Vec<usize>)> = Vec::new();
        let mut value = None;
        let mut options = self.next(first);
        loop {
            if self.left == 0 {
                return true;
            }
            match options.pop() {
                Some(at) => {
                    let Some(after) = self.step(at, value) else { continue };
                    self.flip(at);
                    if !self.tried.insert((self.done.clone(), after)) {
                        self.flip(at);
                        continue;
                    }
                    self.left -= self.counts(at);
                    path.push((at, value, first, options));
                    value = after;
                    while first < self.operations.len() && self.is_done(first) {
                        first += 1;
                    }
                    options = self.next(first);
                }
                None => {
                    let Some((at, before, began, rest)) = path.pop() else { return false };
                    self.flip(at);
                    self.left += self.counts(at);
                    (value, first, options) = (before, began, rest);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::rng::Rng;

    fn write(value: u64, from: u64, to: Option<u64>) -> Operation {
        let act = Act::Write { value: Some(value), before: None };
        Operation { key: 0, act, from, to }
    }

    fn read(value: Value, from: u64, to: u64) -> Operation {
        Operation { key: 0, act: Act::Read(value), from, to: Some(to) }
    }

    #[test]
    fn a_stale_read_is_found() {
        let mut history = vec![write(1, 0, Some(1)), write(2, 2, Some(3)), read(Some(1), 4, 5)];
        assert!(!linearizable(&history));
        history[2].from = 3;
        assert!(linearizable(&history), "a read beside the write may see either");
        history[1].to = None;
        history[2] = read(Some(1), 100, 101);
        assert!(linearizable(&history), "an unanswered write may never happen");
        history.push(read(Some(2), 102, 103));
        assert!(linearizable(&history), "or late");
        history.push(read(Some(1), 104, 105));
        assert!(!linearizable(&history), "but not be undone");
    }

    #[test]
    fn a_lost_write_is_found_by_what_the_next_one_replaced() {
        let act = Act::Write { value: Some(2), before: Some(None) };
        let history = [write(1, 0, Some(1)), Operation { key: 0, act, from: 2, to: Some(3) }];
        assert!(!linearizable(&history));
    }

    #[test]
    fn keys_are_checked_apart() {
        let mut other = read(None, 2, 3);
        other.key = 1;
        assert_eq!(violation(&[write(1, 0, Some(1)), other]), None);
        other.key = 0;
        assert_eq!(violation(&[write(1, 0, Some(1)), other]).map(|(key, _)| key), Some(0));
    }

    /// Every order of every choice of unanswered operations, without a thought.
    fn brute_force(operations: &[Operation]) -> bool {
        fn go(left: &[Operation], value: Value) -> bool {
            if left.iter().all(|operation| operation.to.is_none()) {
                return true;
            }
            (0..left.len()).any(|at| {
                let operation = left[at];
                let first = left.iter().all(|other| other.to.is_none_or(|to| to >= operation.from));
                let after = match operation.act {
                    Act::Read(saw) if operation.to.is_some() && saw != value => return false,
                    Act::Read(_) => value,
                    Act::Write { before: Some(saw), .. }
                        if operation.to.is_some() && saw != value =>
                    {
                        return false;
                    }
                    Act::Write { value: new, .. } => new,
                };
                let mut rest = left.to_vec();
                rest.remove(at);
                first && go(&rest, after)
            })
        }
        go(operations, None)
    }

    fn random_history(rng: &mut Rng) -> Vec<Operation> {
        let count = rng.range(1, 6);
        let operation = |n: u64, rng: &mut Rng| {
            let from = rng.below(12);
            let to = (!rng.chance(250)).then(|| from + rng.range(1, 5));
            let saw = |rng: &mut Rng| (!rng.chance(250)).then(|| rng.range(1, count));
            let act = match rng.below(3) {
                0 => Act::Read(saw(rng)),
                1 => Act::Write { value: Some(n), before: None },
                _ => Act::Write { value: Some(n), before: Some(saw(rng)) },
            };
            Operation { key: 0, act, from, to }
        };
        (1..=count).map(|n| operation(n, rng)).collect()
    }

    #[test]
    fn the_search_agrees_with_brute_force() {
        let mut rng = Rng::new(3, 0);
        let (mut yes, mut no) = (0, 0);
        for _ in 0..20_000 {
            let history = random_history(&mut rng);
            let expected = brute_force(&history);
            assert_eq!(linearizable(&history), expected, "{history:?}");
            if expected { yes += 1 } else { no += 1 }
        }
        assert!(yes > 2000 && no > 2000, "{yes} linearizable, {no} not: both are tested");
    }

    #[test]
    fn a_long_history_is_quick() {
        let mut history = Vec::new();
        for n in 1..3000 {
            history.push(write(n, 10 * n, Some(10 * n + 15)));
            history.push(read(Some(n), 10 * n + 8, 10 * n + 16));
            if n % 10 == 0 {
                history.push(write(100_000 + n, 10 * n, None));
            }
        }
        assert!(linearizable(&history));
    }
}
