//! `plan()`: from a model and a list of nodes to the stripes of each rank.

use std::fmt;

use model::{ComputeType, ModelSpec};

/// A node's number in the cluster; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

/// What a node offers.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeSpec {
    /// The node.
    pub id: NodeId,
    /// Its devices; each can be one rank.
    pub devices: Vec<DeviceSpec>,
}

/// One device of a node.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceSpec {
    /// Bytes that weights and KV blocks may take.
    pub memory_bytes: u64,
    /// Relative speed; stripes are given in proportion. Finite and positive.
    pub weight: f64,
}

/// What a plan must respect.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Stripes the model is cut into; `None` takes `stripes::default_count`.
    pub stripes: Option<usize>,
    /// Ranks wanted; `None` takes every device, up to the number of stripes.
    pub ranks: Option<usize>,
    /// What the weights are kept in.
    pub compute: ComputeType,
    /// KV blocks that every rank keeps.
    pub kv_blocks: usize,
    /// Tokens per KV block.
    pub block_tokens: usize,
}

/// The finished plan: what Raft stores and every rank receives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlan {
    /// Number of stripes the model is cut into.
    pub stripes: usize,
    /// Ranks by number; every stripe is held by exactly one rank.
    pub ranks: Vec<RankPlan>,
}

/// One rank's part of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankPlan {
    /// The rank's number in the group; rank 0 leads.
    pub rank: usize,
    /// The node it runs on.
    pub node: NodeId,
    /// The device of that node.
    pub device: usize,
    /// Stripes it holds, ascending, never empty.
    pub stripes: Vec<usize>,
    /// Bytes of weights it keeps in memory.
    pub weight_bytes: u64,
    /// Bytes of KV cache it keeps in memory.
    pub kv_bytes: u64,
}
