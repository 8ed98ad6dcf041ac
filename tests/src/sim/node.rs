//! A coordinator as the simulation sees it: a disk that stays, and a process that comes and goes.

use std::collections::{BTreeMap, BTreeSet};

use control::replica::{ClusterId, Fatal, MemberSet, Replica, ReplicaConfig, RoleKind};
use planner::NodeId;

use super::client::Wish;
use super::disk::{Disk, Platter};
use super::plan::{ELECTION_TICKS, HEARTBEAT_TICKS, Plan};
use super::run::Mutation;
use super::workload::{Recorder, Workload};

/// Requests of clients have greater numbers than this, those of a process's own duties smaller.
pub const CLIENTS: u64 = 1 << 62;

/// The node that makes the cluster.
pub const FIRST: u64 = 1;

/// The cluster of a run.
pub fn cluster(seed: u64) -> ClusterId {
    let mut id = *b"simulated       ";
    id[8..].copy_from_slice(&seed.to_be_bytes());
    ClusterId(id)
}

/// The process of a node.
pub struct Process<W: Workload> {
    /// The production machine.
    pub replica: Replica<Disk, Recorder<W::Machine>>,
    /// Who waits for what, by the node's own request number.
    pub pending: BTreeMap<u64, Waiting>,
    /// The last request number given.
    pub requests: u64,
    /// The term it was last seen to lead.
    pub leads: Option<u64>,
    /// What it does beside.
    pub duty: W::Duty,
}

/// Who waits for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// A client's write.
    Write {
        /// Whose.
        client: u64,
        /// Its number.
        serial: u64,
        /// What it was.
        wish: Wish,
    },
    /// A client's read.
    Read {
        /// Whose.
        client: u64,
        /// Its number.
        serial: u64,
        /// Which register.
        key: u64,
    },
    /// A change of members.
    Change,
}

/// Why a node never comes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gone {
    /// What it stored was found to be damaged; the finding.
    Damaged(String),
    /// It is no longer a member and was switched off.
    Retired,
}

/// When a process is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// After the next input, with this share per mille of what it wanted to send still sent.
    Sending(u64),
    /// After it has voted for another.
    Voting,
    /// At a write to its disk; the disk knows which.
    Writing,
}

/// A node.
pub struct Node<W: Workload> {
    /// Its number.
    pub id: u64,
    /// What it stored.
    pub platter: Platter,
    /// Its process, while it runs.
    pub process: Option<Process<W>>,
    /// How often it has started.
    pub life: u64,
    /// Microseconds between its ticks.
    pub tick: u64,
    /// It does nothing before this time.
    pub busy: u64,
    /// Microseconds that a write to its disk takes.
    pub write_time: u64,
    /// How its process is to end, if it is.
    pub crash: Option<Crash>,
    /// Why it never comes back, if it does not.
    pub gone: Option<Gone>,
    /// Whether a restart is under way.
    pub returning: bool,
    /// It has been told, or knows, that it was removed.
    pub removed: bool,
    /// The members as it last said.
    pub members: MemberSet,
}

/// Whether the nodes for which `alive` holds can decide under `members`.
pub fn quorum(members: &MemberSet, alive: impl Fn(u64) -> bool) -> bool {
    let enough = |set: &BTreeSet<NodeId>| {
        set.is_empty() || set.iter().filter(|id| alive(id.0)).count() > set.len() / 2
    };
    enough(&members.voters) && enough(&members.outgoing)
}

/// Members in words: voters, those being left, learners.
pub fn picture(members: &MemberSet) -> String {
    let list = |ids: &BTreeSet<NodeId>| {
        ids.iter().map(|id| id.0.to_string()).collect::<Vec<_>>().join(" ")
    };
    let mut text = list(&members.voters);
    if members.is_joint() {
        text += &format!(" leaving {}", list(&members.outgoing));
    }
    if !members.learners.is_empty() {
        text += &format!(" learning {}", list(&members.learners));
    }
    text
}

impl<W: Workload> Node<W> {
    /// A node that was never started, with an empty disk.
    pub fn new(id: u64, tick: u64, platter: Platter) -> Self {
        Self {
            id,
            platter,
            process: None,
            life: 0,
            tick,
            busy: 0,
            write_time: 0,
            crash: None,
            gone: None,
            returning: false,
            removed: false,
            members: MemberSet::default(),
        }
    }

    /// The configuration of the replica on this node.
    fn config(&self, plan: &Plan) -> ReplicaConfig {
        let id = NodeId(self.id);
        let mut config = ReplicaConfig::new(id, cluster(plan.seed), plan.seed);
        config.election_ticks = ELECTION_TICKS;
        config.heartbeat_ticks = HEARTBEAT_TICKS;
        config.snapshot_entries = plan.snapshot_entries;
        config.keep_entries = plan.keep_entries;
        config.check_entries = plan.check_entries;
        config.probe_ticks = 10;
        config
    }

    /// Starts its process; the first node of a cluster makes it.
    ///
    /// # Errors
    /// What the replica finds on the disk.
    pub fn start(&mut self, plan: &Plan, mutation: Option<Mutation>) -> Result<(), Fatal> {
        self.life += 1;
        self.crash = None;
        let config = self.config(plan);
        let machine = Recorder::new(W::machine(mutation), W::HASHES);
        let disk = self.platter.open();
        let mut replica = match (self.platter.is_empty(), self.id) {
            (true, FIRST) => Replica::bootstrap(config, disk, machine)?,
            (true, _) => Replica::join(config, disk, machine)?,
            (false, _) => Replica::open(config, disk, machine)?,
        };
        if let Some(mistake) = mutation.and_then(Mutation::mistake) {
            replica.mistake(mistake);
        }
        let (pending, requests, leads) = (BTreeMap::new(), CLIENTS, None);
        let duty = W::Duty::default();
        self.process = Some(Process { replica, pending, requests, leads, duty });
        Ok(())
    }

    /// Itself in a line.
    pub fn picture(&self) -> String {
        match (&self.process, &self.gone) {
            (_, Some(gone)) => format!("{} {gone:?}", self.id),
            (None, None) => format!("{} down", self.id),
            (Some(process), None) => {
                let status = process.replica.status();
                let role = match status.role {
                    _ if status.removed => "removed",
                    RoleKind::Follower => "follower",
                    RoleKind::PreCandidate => "precandidate",
                    RoleKind::Candidate => "candidate",
                    RoleKind::Leader => "leader",
                };
                let (id, members) = (self.id, picture(&status.members));
                let (term, commit, last) = (status.term, status.commit, status.last);
                let full = if status.storage_full { " without room" } else { "" };
                format!("{id} {role} term {term} commit {commit} of {last} members {members}{full}")
            }
        }
    }

    /// Whether its process runs.
    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// Whether it comes back when its process ends.
    pub fn stays(&self) -> bool {
        self.gone.is_none()
    }

    /// Whether it can go on with what it stored: damage is known here before it is found there.
    pub fn intact(&self) -> bool {
        self.stays() && self.platter.damage().is_none()
    }
}

impl<W: Workload> Process<W> {
    /// A number for a request of `waiting`.
    pub fn request(&mut self, waiting: Waiting) -> u64 {
        self.requests += 1;
        self.pending.insert(self.requests, waiting);
        self.requests
    }
}
