//! Election timeouts that a run replays. Consensus draws them from the thread's random numbers at
//! moments of its own choosing; each draw is replaced by one of ours before it can matter.

use raft::{RawNode, StateRole, Storage};

/// Draws election timeouts.
#[derive(Debug)]
pub(super) struct Timeouts {
    seed: u64,
    node: u64,
    ticks: u64,
    draws: u64,
    seen: Option<(u64, StateRole, u64)>,
}

impl Timeouts {
    pub(super) fn new(seed: u64, node: u64, ticks: usize) -> Self {
        Self { seed, node, ticks: ticks as u64, draws: 0, seen: None }
    }

    /// An election was started here: the next attempt waits for another time, so that two nodes
    /// that split the votes do not go on splitting them.
    pub(super) fn campaigned(&mut self) {
        self.draws += 1;
    }

    /// Where in the second half of its range this node's timeout lies, and how far it may vary.
    ///
    /// Each voter has a part of its own, another one each term, with a gap of a tick to the next:
    /// those who lose their leader at the same time do not start elections at the same time, so
    /// votes are hardly ever split, and an election takes one round.
    fn slot<T: Storage>(&self, raw: &RawNode<T>) -> (u64, u64) {
        let mut voters: Vec<u64> = raw.raft.prs().conf().voters().ids().iter().collect();
        voters.sort_unstable();
        let count = voters.len() as u64;
        let place = voters.iter().position(|voter| *voter == self.node);
        let width = self.ticks / count.max(1);
        match place {
            Some(place) if width > 1 => {
                let slot = (place as u64 + raw.raft.term) % count;
                (slot * width, width - 1)
            }
            _ => (0, self.ticks),
        }
    }

    /// Puts our timeout in place of whatever consensus drew.
    pub(super) fn apply<T: Storage>(&mut self, raw: &mut RawNode<T>) {
        let now = (raw.raft.term, raw.raft.state, raw.raft.leader_id);
        if self.seen != Some(now) {
            self.seen = Some(now);
            self.draws += 1;
        }
        let drawn = [self.node, raw.raft.term, self.draws]
            .iter()
            .fold(self.seed, |sum, part| mix(sum ^ mix(*part)));
        let (from, width) = self.slot(raw);
        let timeout = self.ticks + from + drawn % width;
        raw.raft.set_randomized_election_timeout(usize::try_from(timeout).unwrap_or(usize::MAX));
    }
}

/// SplitMix64's finalizer over the next state.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
