//! What a worker sends to a coordinator.

use std::collections::BTreeSet;

use cluster::{Epoch, GroupId, NodeInfo};
use planner::DeviceSpec;

use crate::error::{bounded, narrow, required, size};
use crate::pb::worker_report::Report as Wire;
use crate::{REASON_MAX, WireError, pb};

/// Most devices of one worker that are read.
const DEVICES_MAX: usize = 1 << 10;

/// Most models of one node that are read.
const MODELS_MAX: usize = 1 << 6;

/// Most ranks of one worker that are read.
const HELD_MAX: usize = 1 << 12;

/// A rank that a worker holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Held {
    /// The group.
    pub group: GroupId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// The rank.
    pub rank: usize,
    /// It has loaded and reached its peers.
    pub ready: bool,
}

/// A report of a worker.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// Always the first: what the worker is, and the ranks it holds from a session before.
    Join(NodeInfo, Vec<Held>),
    /// Still there, with ranks of these groups at these epochs.
    Heartbeat(Vec<(GroupId, Epoch)>),
    /// How far a rank has loaded.
    Progress {
        /// The group.
        group: GroupId,
        /// Its incarnation.
        epoch: Epoch,
        /// The rank.
        rank: usize,
        /// Bytes read so far.
        bytes_read: u64,
        /// Bytes there are to read.
        bytes_total: u64,
    },
    /// A rank has loaded and reached its peers.
    Ready {
        /// The group.
        group: GroupId,
        /// Its incarnation.
        epoch: Epoch,
        /// The rank.
        rank: usize,
    },
    /// The worker has loaded what it was told to prepare, or cannot.
    Prepared {
        /// The group.
        group: GroupId,
        /// Its incarnation to come.
        epoch: Epoch,
        /// Why not, where it is not there.
        error: Option<String>,
    },
    /// A rank cannot go on.
    Failed {
        /// The group.
        group: GroupId,
        /// Its incarnation.
        epoch: Epoch,
        /// The rank.
        rank: usize,
        /// Why.
        reason: String,
        /// The rank that is at fault, where it is another: one that does not answer.
        blames: Option<usize>,
    },
}

impl Report {
    /// The message for this report.
    pub fn to_wire(&self) -> pb::WorkerReport {
        let report = match self {
            Self::Join(info, held) => {
                let held = held.iter().map(|one| pb::HeldRank {
                    group: one.group.0,
                    epoch: one.epoch.0,
                    rank: narrow(one.rank),
                    ready: one.ready,
                });
                Wire::Join(pb::Join { held: held.collect(), ..join_to_wire(info) })
            }
            Self::Heartbeat(groups) => {
                let groups = groups
                    .iter()
                    .map(|&(group, epoch)| pb::Incarnation { group: group.0, epoch: epoch.0 });
                Wire::Heartbeat(pb::Heartbeat { groups: groups.collect() })
            }
            Self::Progress { group, epoch, rank, bytes_read, bytes_total } => {
                Wire::Progress(pb::LoadProgress {
                    group: group.0,
                    epoch: epoch.0,
                    rank: narrow(*rank),
                    bytes_read: *bytes_read,
                    bytes_total: *bytes_total,
                })
            }
            Self::Ready { group, epoch, rank } => {
                let rank = narrow(*rank);
                Wire::Ready(pb::RankReady { group: group.0, epoch: epoch.0, rank })
            }
            Self::Prepared { group, epoch, error } => Wire::Prepared(pb::Prepared {
                group: group.0,
                epoch: epoch.0,
                error: error.clone().unwrap_or_default(),
            }),
            Self::Failed { group, epoch, rank, reason, blames } => Wire::Failed(pb::RankFailed {
                group: group.0,
                epoch: epoch.0,
                rank: narrow(*rank),
                reason: reason.clone(),
                blames: blames.map(narrow),
            }),
        };
        pb::WorkerReport { report: Some(report) }
    }

    /// The report of this message. Whether a join is accepted is the cluster's to say.
    ///
    /// # Errors
    /// [`WireError`] names the field that cannot be.
    pub fn from_wire(wire: pb::WorkerReport) -> Result<Self, WireError> {
        Ok(match required("report", wire.report)? {
            Wire::Join(mut join) => {
                bounded("held", join.held.len(), HELD_MAX)?;
                let held = std::mem::take(&mut join.held).into_iter().map(held_from_wire);
                let held = held.collect::<Result<_, _>>()?;
                Self::Join(join_from_wire(join)?, held)
            }
            Wire::Heartbeat(pb::Heartbeat { groups }) => {
                bounded("groups", groups.len(), HELD_MAX)?;
                let groups = groups.iter().map(|one| (GroupId(one.group), Epoch(one.epoch)));
                Self::Heartbeat(groups.collect())
            }
            Wire::Progress(progress) => {
                if progress.bytes_read > progress.bytes_total {
                    return Err(WireError::OutOfRange { field: "bytes_read" });
                }
                Self::Progress {
                    group: GroupId(progress.group),
                    epoch: Epoch(progress.epoch),
                    rank: size("rank", progress.rank)?,
                    bytes_read: progress.bytes_read,
                    bytes_total: progress.bytes_total,
                }
            }
            Wire::Ready(ready) => Self::Ready {
                group: GroupId(ready.group),
                epoch: Epoch(ready.epoch),
                rank: size("rank", ready.rank)?,
            },
            Wire::Prepared(pb::Prepared { group, epoch, error }) => {
                bounded("error", error.len(), REASON_MAX)?;
                let error = (!error.is_empty()).then_some(error);
                Self::Prepared { group: GroupId(group), epoch: Epoch(epoch), error }
            }
            Wire::Failed(failed) => {
                bounded("reason", failed.reason.len(), REASON_MAX)?;
                Self::Failed {
                    group: GroupId(failed.group),
                    epoch: Epoch(failed.epoch),
                    rank: size("rank", failed.rank)?,
                    reason: failed.reason,
                    blames: failed.blames.map(|rank| size("blames", rank)).transpose()?,
                }
            }
        })
    }
}

fn held_from_wire(wire: pb::HeldRank) -> Result<Held, WireError> {
    Ok(Held {
        group: GroupId(wire.group),
        epoch: Epoch(wire.epoch),
        rank: size("rank", wire.rank)?,
        ready: wire.ready,
    })
}

/// The message for what a worker says of itself.
pub fn join_to_wire(info: &NodeInfo) -> pb::Join {
    pb::Join {
        name: info.name.clone(),
        worker_address: info.worker_address.clone(),
        collective_addresses: info.collective_addresses.clone(),
        devices: info.devices.iter().map(device_to_wire).collect(),
        model_digests: info.model_digests.iter().cloned().collect(),
        kernel_class: info.kernel_class.clone(),
        version: info.version.clone(),
        held: Vec::new(),
        boot: info.boot,
    }
}

/// What the worker of this message says of itself, every field checked.
///
/// # Errors
/// [`WireError`] names the field that cannot be.
pub fn join_from_wire(wire: pb::Join) -> Result<NodeInfo, WireError> {
    let info = info_from_wire(wire)?;
    info.check()?;
    Ok(info)
}

/// The same without the cluster's own checks, for a log whose entries the cluster checks itself.
pub(crate) fn info_from_wire(wire: pb::Join) -> Result<NodeInfo, WireError> {
    bounded("devices", wire.devices.len(), DEVICES_MAX)?;
    let devices = wire.devices.into_iter().map(device_from_wire);
    bounded("collective_addresses", wire.collective_addresses.len(), DEVICES_MAX)?;
    Ok(NodeInfo {
        boot: wire.boot,
        name: wire.name,
        worker_address: wire.worker_address,
        collective_addresses: wire.collective_addresses,
        devices: devices.collect::<Result<_, _>>()?,
        model_digests: digests_from_wire(wire.model_digests)?,
        kernel_class: wire.kernel_class,
        version: wire.version,
    })
}

/// Digests of models, which must ascend: the same set has the same bytes.
pub(crate) fn digests_from_wire(wire: Vec<String>) -> Result<BTreeSet<String>, WireError> {
    bounded("model_digests", wire.len(), MODELS_MAX)?;
    if !wire.is_sorted_by(|a, b| a < b) {
        return Err(WireError::OutOfRange { field: "model_digests" });
    }
    Ok(wire.into_iter().collect())
}

/// The message for a device.
pub fn device_to_wire(device: &DeviceSpec) -> pb::Device {
    pb::Device { memory_bytes: device.memory_bytes, weight: device.weight }
}

/// The device of this message.
///
/// # Errors
/// [`WireError::NotFinite`] for its weight.
pub fn device_from_wire(wire: pb::Device) -> Result<DeviceSpec, WireError> {
    if !wire.weight.is_finite() {
        return Err(WireError::NotFinite { field: "weight" });
    }
    Ok(DeviceSpec { memory_bytes: wire.memory_bytes, weight: wire.weight })
}
