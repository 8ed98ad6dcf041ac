//! Who waits for which entry. An outcome goes to its proposer once, and to nobody else.

use std::collections::BTreeMap;

use planner::NodeId;

use super::payload::Origin;

/// Proposals of this life that are in the log and not yet applied.
#[derive(Debug)]
pub(super) struct Proposals {
    node: NodeId,
    boot: u64,
    /// By index of their entry.
    waiting: BTreeMap<u64, u64>,
    /// A change of members that is applied but not complete: joint consensus is not left yet.
    change: Option<u64>,
}

/// What an applied entry means for those who wait.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Settled {
    /// Who proposed this entry.
    pub(super) winner: Option<u64>,
    /// Whose entry it displaced: that one is in nobody's log any more.
    pub(super) loser: Option<u64>,
}

impl Proposals {
    pub(super) fn new(node: NodeId, boot: u64) -> Self {
        Self { node, boot, waiting: BTreeMap::new(), change: None }
    }

    pub(super) fn origin(&self, request: u64) -> Vec<u8> {
        Origin { node: self.node, boot: self.boot, request }.encode()
    }

    pub(super) fn add(&mut self, index: u64, request: u64) {
        self.waiting.insert(index, request);
    }

    pub(super) fn forget(&mut self, request: u64) {
        self.waiting.retain(|_, waiting| *waiting != request);
        self.change = self.change.filter(|waiting| *waiting != request);
    }

    /// The entry at `index` was applied; `origin` is what it says about its proposer.
    pub(super) fn settle(&mut self, index: u64, origin: Option<Origin>) -> Settled {
        let Some(request) = self.waiting.remove(&index) else { return Settled::default() };
        let ours = Origin { node: self.node, boot: self.boot, request };
        if origin == Some(ours) {
            Settled { winner: Some(request), loser: None }
        } else {
            Settled { winner: None, loser: Some(request) }
        }
    }

    /// The change is applied; whoever asked is told once joint consensus is left.
    pub(super) fn joint(&mut self, request: Option<u64>) {
        self.change = request;
    }

    /// Joint consensus is left.
    pub(super) fn left(&mut self) -> Option<u64> {
        self.change.take()
    }

    /// Everyone who waits, when the outcome can no longer be known here.
    pub(super) fn lose(&mut self) -> Vec<u64> {
        let lost = std::mem::take(&mut self.waiting).into_values();
        lost.chain(self.change.take()).collect()
    }
}
