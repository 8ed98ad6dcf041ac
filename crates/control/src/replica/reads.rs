//! Linearizable reads: each waits for an answer to a question that was asked after it came.
//!
//! Consensus drops a read without a word when nobody leads, when the leader has committed nothing
//! in its term yet, or when a message is lost, so the question is asked again every two heartbeats,
//! each time with a number of its own: an answer to an old question proves nothing about a new
//! read, but an answer to any question asked after a read came will do for it.

use std::collections::BTreeMap;

use planner::NodeId;

use super::gate::READ_CONTEXT;

/// Reads that wait.
#[derive(Debug)]
pub(super) struct Reads {
    node: NodeId,
    boot: u64,
    /// Number of the next question.
    next: u64,
    /// When the newest question was asked; `None` when it has been answered, or none was asked.
    asked: Option<u64>,
    /// Each waiting read and the first question that was asked after it came.
    waiting: BTreeMap<u64, u64>,
    /// Each answered read and the entry that must be applied first.
    answered: BTreeMap<u64, u64>,
}

impl Reads {
    pub(super) fn new(node: NodeId, boot: u64) -> Self {
        Self {
            node,
            boot,
            next: 1,
            asked: None,
            waiting: BTreeMap::new(),
            answered: BTreeMap::new(),
        }
    }

    pub(super) fn add(&mut self, request: u64) {
        self.waiting.insert(request, self.next);
    }

    pub(super) fn forget(&mut self, request: u64) {
        self.waiting.remove(&request);
        self.answered.remove(&request);
    }

    /// The context of a question to ask now, if one is due: nothing is being asked, or the last
    /// question is `patience` ticks old.
    pub(super) fn question(&mut self, now: u64, patience: u64) -> Option<Vec<u8>> {
        let pending = self.asked.is_some_and(|at| now < at + patience);
        if self.waiting.is_empty() || pending {
            return None;
        }
        self.asked = Some(now);
        let number = self.next;
        self.next += 1;
        let parts = [self.node.0, self.boot, number];
        Some(parts.iter().flat_map(|part| part.to_be_bytes()).collect())
    }

    /// Asks again at once: whoever was asked may have stopped leading.
    pub(super) fn leader_changed(&mut self) {
        self.asked = None;
    }

    /// Consensus answered a question. Answers may come in any order, and for another life.
    pub(super) fn answer(&mut self, context: &[u8], index: u64) {
        let Some(number) = self.number(context) else { return };
        if number + 1 == self.next {
            self.asked = None;
        }
        let later = |first: &u64| *first <= number;
        let done: Vec<u64> =
            self.waiting.iter().filter(|(_, first)| later(first)).map(|(key, _)| *key).collect();
        for request in done {
            self.waiting.remove(&request);
            self.answered.insert(request, index);
        }
    }

    fn number(&self, context: &[u8]) -> Option<u64> {
        let context: &[u8; READ_CONTEXT] = context.try_into().ok()?;
        let (parts, _) = context.as_chunks::<8>();
        let [node, boot, number] = parts else { return None };
        let ours =
            u64::from_be_bytes(*node) == self.node.0 && u64::from_be_bytes(*boot) == self.boot;
        ours.then(|| u64::from_be_bytes(*number))
    }

    /// Reads whose entry is applied.
    pub(super) fn release(&mut self, applied: u64) -> Vec<u64> {
        let ready: Vec<u64> = self
            .answered
            .iter()
            .filter(|(_, index)| **index <= applied)
            .map(|(key, _)| *key)
            .collect();
        for request in &ready {
            self.answered.remove(request);
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads() -> Reads {
        Reads::new(NodeId(1), 4)
    }

    #[test]
    fn a_question_answers_no_read_that_came_after_it() {
        let mut reads = reads();
        reads.add(10);
        let first = reads.question(0, 4).unwrap();
        reads.add(11);
        reads.answer(&first, 7);
        assert!(reads.release(6).is_empty());
        assert_eq!(reads.release(7), [10]);
        let second = reads.question(0, 4).unwrap();
        assert_ne!(first, second);
        // The answer to the first, late or repeated, still says nothing about this read.
        reads.answer(&first, 7);
        assert!(reads.release(100).is_empty());
        reads.answer(&second, 8);
        assert_eq!(reads.release(100), [11]);
        assert_eq!(reads.question(50, 4), None, "nobody asks");
    }

    #[test]
    fn an_unanswered_question_is_asked_again_under_a_new_number() {
        let mut reads = reads();
        reads.add(10);
        let first = reads.question(0, 4).unwrap();
        assert_eq!(reads.question(3, 4), None);
        let second = reads.question(4, 4).unwrap();
        assert_ne!(first, second);
        // Slow networks: the first one's answer is good for who asked before it.
        reads.answer(&first, 7);
        assert_eq!(reads.release(7), [10]);
    }

    #[test]
    fn answers_for_another_life_or_node_are_nobodys() {
        let mut reads = reads();
        reads.add(10);
        reads.question(0, 4).unwrap();
        for (node, boot) in [(NodeId(1), 3), (NodeId(2), 4)] {
            let mut other = Reads::new(node, boot);
            other.add(1);
            reads.answer(&other.question(0, 4).unwrap(), 7);
        }
        reads.answer(b"short", 7);
        assert!(reads.release(100).is_empty());
    }
}
