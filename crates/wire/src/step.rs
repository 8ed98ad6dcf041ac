//! The step plane: what the group leader orders of a rank, and the rank's answer.

use cluster::{Epoch, GroupId};
use engine::{BlockId, Counts, SeqId, Step, StepEntry, Want};

use crate::error::{bounded, narrow, size};
use crate::pb::step_entry::Want as WireWant;
use crate::{BLOCKS_MAX, ENTRIES_MAX, REASON_MAX, TOKENS_MAX, WireError, pb};

/// One step for one rank of one incarnation of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepOrder {
    /// The group.
    pub group: GroupId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// The rank that shall run it.
    pub rank: usize,
    /// The step.
    pub step: Step,
}

/// A rank's answer to a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepReport {
    /// The group.
    pub group: GroupId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// The rank that ran it.
    pub rank: usize,
    /// The step's number.
    pub number: u64,
    /// Why it failed, where it did; never an empty text.
    pub error: Option<String>,
    /// The rank that is at fault for the error, where it is another.
    pub blames: Option<usize>,
}

impl StepOrder {
    /// The message for this step.
    pub fn to_wire(&self) -> pb::StepPlan {
        pb::StepPlan {
            group: self.group.0,
            epoch: self.epoch.0,
            rank: narrow(self.rank),
            number: self.step.number,
            entries: self.step.entries.iter().map(entry_to_wire).collect(),
        }
    }

    /// The step of this message. Whether its blocks exist is the rank's to say.
    ///
    /// # Errors
    /// [`WireError`] names the field that cannot be.
    pub fn from_wire(wire: pb::StepPlan) -> Result<Self, WireError> {
        bounded("entries", wire.entries.len(), ENTRIES_MAX)?;
        let tokens = wire.entries.iter().map(|entry| entry.tokens.len()).sum();
        bounded("tokens", tokens, TOKENS_MAX)?;
        let entries = wire.entries.into_iter().map(entry_from_wire);
        let entries = entries.collect::<Result<_, _>>()?;
        let step = Step { number: wire.number, entries };
        let (group, epoch) = (GroupId(wire.group), Epoch(wire.epoch));
        Ok(Self { group, epoch, rank: size("rank", wire.rank)?, step })
    }
}

fn entry_to_wire(entry: &StepEntry) -> pb::StepEntry {
    let want = match entry.want {
        Want::Nothing => WireWant::Nothing,
        Want::Last => WireWant::Last,
        Want::All => WireWant::All,
    };
    pb::StepEntry {
        seq: entry.seq.0,
        start: entry.start as u64,
        tokens: entry.tokens.clone(),
        blocks: entry.blocks.iter().map(|block| block.0).collect(),
        want: want.into(),
    }
}

fn entry_from_wire(wire: pb::StepEntry) -> Result<StepEntry, WireError> {
    let (field, value) = ("want", wire.want);
    let want = match WireWant::try_from(value) {
        Ok(WireWant::Nothing) => Want::Nothing,
        Ok(WireWant::Last) => Want::Last,
        Ok(WireWant::All) => Want::All,
        Ok(WireWant::Unspecified) | Err(_) => return Err(WireError::UnknownEnum { field, value }),
    };
    if wire.tokens.is_empty() {
        return Err(WireError::Missing { field: "tokens" });
    }
    bounded("blocks", wire.blocks.len(), BLOCKS_MAX)?;
    let start = size("start", wire.start)?;
    // Positions are computed as `start + i` all over the forward pass.
    if start.checked_add(wire.tokens.len()).is_none() {
        return Err(WireError::OutOfRange { field: "start" });
    }
    Ok(StepEntry {
        seq: SeqId(wire.seq),
        start,
        tokens: wire.tokens,
        blocks: wire.blocks.into_iter().map(BlockId).collect(),
        want,
    })
}

impl StepReport {
    /// The message for this answer.
    pub fn to_wire(&self) -> pb::StepReport {
        pb::StepReport {
            group: self.group.0,
            epoch: self.epoch.0,
            rank: narrow(self.rank),
            number: self.number,
            error: self.error.clone().unwrap_or_default(),
            blames: self.blames.map(narrow),
        }
    }

    /// The answer of this message.
    ///
    /// # Errors
    /// [`WireError`] names the field that cannot be.
    pub fn from_wire(wire: pb::StepReport) -> Result<Self, WireError> {
        bounded("error", wire.error.len(), REASON_MAX)?;
        let (group, epoch) = (GroupId(wire.group), Epoch(wire.epoch));
        let rank = size("rank", wire.rank)?;
        let error = Some(wire.error).filter(|error| !error.is_empty());
        let blames = wire.blames.map(|rank| size("blames", rank)).transpose()?;
        Ok(Self { group, epoch, rank, number: wire.number, error, blames })
    }
}

/// The message for a scheduler's counts; `integrity` is empty when block accounting is whole,
/// `stale` counts what its worker has refused of other epochs: calls, and frames of its ranks.
pub fn counts_to_wire(
    counts: &Counts,
    integrity: String,
    [stale, stale_frames]: [u64; 2],
) -> pb::CountsReply {
    pb::CountsReply {
        stale,
        stale_frames,
        waiting: counts.waiting as u64,
        running: counts.running as u64,
        blocks_used: counts.blocks_used as u64,
        blocks_total: counts.blocks_total as u64,
        preemptions: counts.preemptions,
        steps: counts.steps,
        integrity,
    }
}
