//! Groups: one replica of one deployment each, through all their incarnations.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use planner::{NodeId, ShardPlan};

use crate::{Epoch, GroupId};

/// How far ranks have loaded, by group and rank: bytes read and bytes to read. Soft: it is no part
/// of the state.
pub type Progress = BTreeMap<(GroupId, usize), (u64, u64)>;

/// The reason of a group that forms again because that was decided, and not because it failed.
pub const MOVED: &str = "its ranks move";

/// Where a group stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Its ranks are told what to hold.
    Forming,
    /// A rank at least has begun to read its stripes.
    Loading,
    /// Every rank is ready.
    Serving,
    /// It was fenced: what belongs to an epoch before is refused, and the next incarnation is to
    /// be placed.
    Repairing,
    /// It will never serve again.
    Retired,
}

/// A set of ranks that together hold one copy of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The deployment whose replica it is.
    pub deployment: String,
    /// Its incarnation; while it is repaired, the number that the next one will have.
    pub epoch: Epoch,
    /// Who holds what; while it is repaired, who held what before.
    pub plan: ShardPlan,
    /// Where it stands.
    pub phase: Phase,
    /// Ranks of this incarnation that have reported ready.
    pub ready: BTreeSet<usize>,
    /// Why it last stopped to serve; empty while it serves.
    pub reason: String,
}

/// Where requests go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The group.
    pub group: GroupId,
    /// Its incarnation; the leader refuses requests for another.
    pub epoch: Epoch,
    /// The node of rank 0: whose certificate must be shown at the address.
    pub leader: NodeId,
    /// `host:port` of its Worker service.
    pub leader_address: String,
}

impl Phase {
    /// Placed: its ranks own their devices.
    pub fn live(self) -> bool {
        matches!(self, Self::Forming | Self::Loading | Self::Serving)
    }
}

impl Group {
    /// Forming, loading or serving: its ranks own their devices.
    pub fn live(&self) -> bool {
        self.phase.live()
    }

    /// The nodes that its plan names.
    pub fn nodes(&self) -> BTreeSet<NodeId> {
        self.plan.ranks.iter().map(|rank| rank.node).collect()
    }

    /// The epoch under which it may be placed next; `None` once it is retired.
    pub fn next_epoch(&self) -> Option<Epoch> {
        match self.phase {
            Phase::Retired => None,
            Phase::Repairing => Some(self.epoch),
            Phase::Forming | Phase::Loading | Phase::Serving => Some(self.epoch.next()),
        }
    }

    /// By stripe: the rank that holds it.
    pub fn holders(&self) -> Vec<usize> {
        let mut holders = vec![0; self.plan.stripes];
        for rank in &self.plan.ranks {
            for &stripe in &rank.stripes {
                if let Some(holder) = holders.get_mut(stripe) {
                    *holder = rank.rank;
                }
            }
        }
        holders
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Forming => "forming",
            Self::Loading => "loading",
            Self::Serving => "serving",
            Self::Repairing => "repairing",
            Self::Retired => "retired",
        })
    }
}
