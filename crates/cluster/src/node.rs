//! Nodes: who was let in, what it said of itself, and where it stands.

use std::collections::BTreeSet;
use std::fmt;

use planner::DeviceSpec;

use crate::fields::{bad, check_address, hexadecimal, text};
use crate::{BadField, TokenId};

/// Most devices of one node.
const DEVICES_MAX: usize = 64;
/// Most models of one node.
const HELD_MAX: usize = 16;

/// What a node was let in for. Its certificate says the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// It computes.
    Worker,
    /// It may be a member of Raft and serve the API; it may compute besides.
    Coordinator,
}

/// Where a node stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Standing {
    /// It has its identity and has not offered its devices yet.
    Enrolled,
    /// It computes, or could.
    Ready,
    /// Its lease is late: it keeps its ranks and gets no new ones.
    Suspect,
    /// Its lease ran out, so its ranks are gone. It may join again under its number.
    Lost,
    /// It was removed. Its number is refused for ever.
    Left,
}

impl Standing {
    /// Ready or suspect: it may hold ranks.
    pub fn present(self) -> bool {
        matches!(self, Self::Ready | Self::Suspect)
    }
}

/// A machine that was let in. Its number is in its certificate.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// What it was let in for.
    pub role: Role,
    /// A name for people, given when it was let in; need not be unique.
    pub name: String,
    /// The token that let it in; none for the founder.
    pub token: Option<TokenId>,
    /// Where it stands.
    pub standing: Standing,
    /// An operator wants its ranks elsewhere; it gets no new ones. Outlives a loss.
    pub draining: bool,
    /// How many processes have offered its devices so far.
    pub incarnation: u64,
    /// What the latest of them said; none before the first.
    pub info: Option<NodeInfo>,
    /// Where it is reached as a coordinator, once it has said so.
    pub coordinator: Option<Coordinator>,
}

/// Where a coordinator is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coordinator {
    /// `host:port` for other nodes.
    pub cluster_address: String,
    /// `host:port` of its API for clients.
    pub http_address: String,
    /// blake3 of each model whose text files it has: it can turn their texts into tokens.
    pub model_digests: BTreeSet<String>,
}

/// What is known of a join token that was used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// What it lets nodes in for.
    pub role: Role,
    /// How often it was used.
    pub uses: u32,
    /// How often it may be used.
    pub uses_max: u32,
    /// Second (since 1970) after which no certificate check accepts it any more.
    pub expires: u64,
}

/// What a worker says of itself when it joins.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeInfo {
    /// A number that its process drew at its start. One that joins with another number, or with
    /// anything else changed, is another process and holds nothing of what the one before held.
    pub boot: u64,
    /// A name for people; need not be unique.
    pub name: String,
    /// `host:port` of the Worker service.
    pub worker_address: String,
    /// `host:port` of the tensor plane, one per device.
    pub collective_addresses: Vec<String>,
    /// What it offers; each device can be one rank.
    pub devices: Vec<DeviceSpec>,
    /// blake3 of each of its model directories: a rank of it can be of any of them.
    pub model_digests: BTreeSet<String>,
    /// Kernel class of its processor.
    pub kernel_class: String,
    /// Release of its binary.
    pub version: String,
}

impl Node {
    /// Ready and not draining: it may get new ranks.
    pub fn open(&self) -> bool {
        self.standing == Standing::Ready && !self.draining
    }

    /// Devices that it offers; none while it is not present.
    pub fn devices(&self) -> &[DeviceSpec] {
        let info = self.info.as_ref().filter(|_| self.standing.present());
        info.map_or(&[], |info| &info.devices)
    }

    /// Its standing in a word; `draining` where that says more.
    pub fn word(&self) -> &'static str {
        match self.standing {
            Standing::Ready if self.draining => "draining",
            Standing::Enrolled => "enrolled",
            Standing::Ready => "ready",
            Standing::Suspect => "suspect",
            Standing::Lost => "lost",
            Standing::Left => "left",
        }
    }

    pub(crate) fn check(&self) -> Result<(), BadField> {
        text("name", &self.name)?;
        if let Some(info) = &self.info {
            info.check()?;
        }
        if let Some(coordinator) = &self.coordinator {
            coordinator.check()?;
        }
        // Only who has said what it offers can be looked at as offering it.
        let joined = matches!(self.standing, Standing::Ready | Standing::Suspect | Standing::Lost);
        if joined && self.info.is_none() || self.info.is_some() != (self.incarnation > 0) {
            return Err(bad("standing", "does not fit what the node has said of itself"));
        }
        Ok(())
    }
}

impl Coordinator {
    /// Refuses what nobody could reach.
    ///
    /// # Errors
    /// [`BadField`] names the first field that is wrong.
    pub fn check(&self) -> Result<(), BadField> {
        check_address("cluster_address", &self.cluster_address)?;
        check_address("http_address", &self.http_address)?;
        // Written before they said so, there are none.
        held(&self.model_digests)
    }
}

impl NodeInfo {
    /// Refuses what no other node could reach or what no plan could use.
    ///
    /// # Errors
    /// [`BadField`] names the first field that is wrong.
    pub fn check(&self) -> Result<(), BadField> {
        text("name", &self.name)?;
        text("kernel_class", &self.kernel_class)?;
        text("version", &self.version)?;
        if self.model_digests.is_empty() {
            return Err(bad("model_digests", "must hold at least one"));
        }
        held(&self.model_digests)?;
        check_address("worker_address", &self.worker_address)?;
        if self.devices.is_empty() || self.devices.len() > DEVICES_MAX {
            return Err(bad("devices", "must hold 1 to 64 devices"));
        }
        if self.collective_addresses.len() != self.devices.len() {
            return Err(bad("collective_addresses", "must hold one address per device"));
        }
        for one in &self.collective_addresses {
            check_address("collective_addresses", one)?;
        }
        for device in &self.devices {
            if !device.weight.is_finite() || device.weight <= 0.0 {
                return Err(bad("devices", "must have finite positive weights"));
            }
        }
        Ok(())
    }

    /// Its digests in a line, for refusals.
    pub(crate) fn models_line(&self) -> String {
        self.model_digests.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
    }

    /// An address that both claim.
    pub(crate) fn shared_address<'a>(&'a self, other: &NodeInfo) -> Option<&'a String> {
        let same = Some(&self.worker_address).filter(|one| **one == other.worker_address);
        let taken = |one: &&String| other.collective_addresses.contains(one);
        same.or_else(|| self.collective_addresses.iter().find(taken))
    }
}

fn held(digests: &BTreeSet<String>) -> Result<(), BadField> {
    if digests.len() > HELD_MAX {
        return Err(bad("model_digests", "must hold at most 16"));
    }
    digests.iter().try_for_each(|digest| hexadecimal("model_digests", digest))
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Worker => "worker",
            Self::Coordinator => "coordinator",
        })
    }
}
