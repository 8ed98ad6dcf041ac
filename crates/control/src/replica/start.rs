//! How a replica comes into being: as the first of a cluster, as one to be added, or again.

use std::collections::BTreeMap;

use raft::{Config, RawNode};

use super::gate::ENTRY_MAX;
use super::payload::Body;
use super::{
    Batch, Checks, Fatal, HardState, LogId, LogImage, LogStore, Machine, MemberSet, Output,
    Proposals, Reads, Replica, ReplicaConfig, Shelf, Snapshot, StoreError, Timeouts, drain,
};

/// Most bytes of the entries of one append; one entry may be longer.
const APPEND_BYTES: u64 = 1 << 20;
/// Most bytes of entries that are proposed and not yet committed; beyond, proposals are dropped.
const UNCOMMITTED_BYTES: u64 = 16 << 20;
/// Most bytes of entries that are applied at once.
const APPLY_BYTES: u64 = 4 << 20;
/// Appends on their way to one peer.
const INFLIGHT: usize = 128;

impl<S: LogStore, M: Machine> Replica<S, M> {
    /// The first member of a new cluster; its store must be empty. The state machine's state is the
    /// cluster's first.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn bootstrap(config: ReplicaConfig, mut store: S, machine: M) -> Result<Self, Fatal> {
        if !store.load()?.is_empty() {
            return Err(Fatal::Start { what: "the store is not empty" });
        }
        let id = LogId { index: 1, term: 1 };
        let body = Body { state: machine.snapshot(), hash: machine.hash(), removed: Vec::new() };
        let members = MemberSet::of_one(config.id);
        store.write(&Batch {
            hard_state: Some(HardState { term: 1, vote: 0, commit: 1 }),
            snapshot: Some(Snapshot { id, members, body: body.encode() }),
            reset: true,
            ..Batch::default()
        })?;
        Self::open(config, store, machine)
    }

    /// A node that is to become a member: it waits for a leader to send it the log. Its store must
    /// be empty, for a node with a log is a member already.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn join(config: ReplicaConfig, mut store: S, machine: M) -> Result<Self, Fatal> {
        let image = store.load()?;
        if !image.is_empty() {
            return Err(Fatal::Start { what: "the store is not empty" });
        }
        Self::start(config, store, image, machine)
    }

    /// A node that starts again with what it had.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn open(config: ReplicaConfig, mut store: S, machine: M) -> Result<Self, Fatal> {
        let image = store.load()?;
        if image.is_empty() {
            return Err(Fatal::Start { what: "the store is empty" });
        }
        Self::start(config, store, image, machine)
    }

    /// The store alone, for a simulation in which the process dies.
    pub fn into_store(self) -> S {
        self.raw.raft.r.raft_log.store.into_store()
    }

    fn start(
        config: ReplicaConfig,
        mut store: S,
        mut image: LogImage,
        mut machine: M,
    ) -> Result<Self, Fatal> {
        check(&config)?;
        image.verify()?;
        // Before anything else: no two lives of a node may share a number.
        let boot = Batch { boot: Some(image.boot + 1), ..Batch::default() };
        store.write(&boot)?;
        image.apply(&boot)?;
        let body = match &image.snapshot {
            Some(snapshot) => Some(restore(snapshot, &mut machine)?),
            None => None,
        };
        let id = image.snapshot.as_ref().map_or(LogId::default(), |snapshot| snapshot.id);
        let members = image.snapshot.as_ref().map(|snapshot| snapshot.members.clone());
        let (hard_state, boot) = (image.hard_state, image.boot);
        let raw = RawNode::new(
            &raft_config(&config, id.index),
            Shelf::new(store, image),
            &drain::logger(config.id.0),
        )
        .map_err(|error| Fatal::Raft(error.to_string()))?;
        let mut replica = Self {
            raw,
            machine,
            boot,
            outputs: Vec::new(),
            hard_state,
            commit_lags: None,
            news: Vec::new(),
            news_tried: 0,
            members: members.unwrap_or_default(),
            removed: body.map(|body| body.removed.into_iter().collect()).unwrap_or_default(),
            applied: id.index,
            proposals: Proposals::new(config.id, boot),
            reads: Reads::new(config.id, boot),
            checks: Checks::new(config.check_entries),
            timeouts: Timeouts::new(config.seed, config.id.0, config.election_ticks),
            ticks: 0,
            heard: BTreeMap::new(),
            joint_since: None,
            nudged: 0,
            stall: None,
            full: false,
            told_full: false,
            role: (0, None, false),
            snapshots_sent: BTreeMap::new(),
            gone: false,
            failed: false,
            refused: BTreeMap::new(),
            last_refusal: None,
            #[cfg(feature = "mutations")]
            mistake: None,
            config,
        };
        replica.outputs.push(Output::Members(replica.members.clone()));
        replica.joint_since = replica.members.is_joint().then_some(0);
        replica.record_check(id.index);
        replica.settle()?;
        Ok(replica)
    }
}

/// What consensus would end the process over, and what would defeat its purpose.
fn check(config: &ReplicaConfig) -> Result<(), Fatal> {
    let refusals = [
        (config.id.0 == 0, "node 0 is none"),
        (config.heartbeat_ticks == 0, "heartbeats need a tick"),
        (config.election_ticks <= config.heartbeat_ticks, "elections come before heartbeats"),
        (config.snapshot_entries == 0, "a snapshot after each entry"),
        (config.probe_ticks == 0, "a full disk is asked each tick"),
        (config.proposal_max > ENTRY_MAX - 1024, "proposals longer than peers accept"),
    ];
    match refusals.iter().find(|(wrong, _)| *wrong) {
        Some((_, what)) => Err(Fatal::Start { what }),
        None => Ok(()),
    }
}

fn raft_config(config: &ReplicaConfig, applied: u64) -> Config {
    Config {
        id: config.id.0,
        election_tick: config.election_ticks,
        heartbeat_tick: config.heartbeat_ticks,
        applied,
        max_size_per_msg: APPEND_BYTES,
        max_inflight_msgs: INFLIGHT,
        // A leader that hears no majority steps down, and one that comes back deposes nobody.
        check_quorum: true,
        pre_vote: true,
        max_uncommitted_size: UNCOMMITTED_BYTES,
        max_committed_size_per_ready: APPLY_BYTES,
        ..Config::default()
    }
}

/// Puts a stored snapshot into the state machine.
fn restore<M: Machine>(snapshot: &Snapshot, machine: &mut M) -> Result<Body, Fatal> {
    let corrupt = |what: &str| StoreError::Corrupt { what: format!("snapshot: {what}") };
    let body = Body::decode(&snapshot.body).map_err(|_| corrupt("its checksum does not match"))?;
    let index = snapshot.id.index;
    machine.restore(&body.state).map_err(|source| Fatal::Restore { index, source })?;
    if machine.hash() != body.hash {
        return Err(Fatal::StateDiverged { index });
    }
    Ok(body)
}
