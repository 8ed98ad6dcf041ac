//! What runs did, in numbers: a simulation that does nothing finds nothing.

use std::collections::BTreeMap;
use std::fmt;

use super::plan::Fault;

/// Counts over one run or many.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Runs.
    pub runs: u64,
    /// Simulated microseconds.
    pub time: u64,
    /// Times that somebody became leader.
    pub elections: u64,
    /// Ends of processes that were not asked for.
    pub crashes: u64,
    /// Changes of membership that came into force, a joint step counted with its end.
    pub changes: u64,
    /// Coordinators that were ever made.
    pub nodes: u64,
    /// Entries committed.
    pub commits: u64,
    /// Commands applied, over all replicas.
    pub applied: u64,
    /// Snapshots that replaced a machine.
    pub restored: u64,
    /// Writes answered.
    pub writes: u64,
    /// Reads answered.
    pub reads: u64,
    /// Operations nobody knows the end of.
    pub unknown: u64,
    /// Messages that arrived.
    pub messages: u64,
    /// Of those, forged ones.
    pub forged: u64,
    /// Faults injected, by kind.
    pub faults: BTreeMap<Fault, u64>,
}

impl Stats {
    /// Adds the counts of `other`.
    pub fn add(&mut self, other: &Self) {
        let mine: [&mut u64; 14] = [
            &mut self.runs,
            &mut self.time,
            &mut self.elections,
            &mut self.crashes,
            &mut self.changes,
            &mut self.nodes,
            &mut self.commits,
            &mut self.applied,
            &mut self.restored,
            &mut self.writes,
            &mut self.reads,
            &mut self.unknown,
            &mut self.messages,
            &mut self.forged,
        ];
        for (mine, theirs) in mine.into_iter().zip(other.counts()) {
            *mine += theirs;
        }
        for (fault, count) in &other.faults {
            *self.faults.entry(*fault).or_insert(0) += count;
        }
    }

    fn counts(&self) -> [u64; 14] {
        [
            self.runs,
            self.time,
            self.elections,
            self.crashes,
            self.changes,
            self.nodes,
            self.commits,
            self.applied,
            self.restored,
            self.writes,
            self.reads,
            self.unknown,
            self.messages,
            self.forged,
        ]
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} seeds, {:.1} simulated hours, {} elections, {} crashes, {} membership changes, \
             {} coordinators, {} commits, {} commands applied, {} snapshots installed, \
             {} writes, {} reads, {} of unknown end, {} messages ({} forged)",
            self.runs,
            self.time as f64 / 3.6e9,
            self.elections,
            self.crashes,
            self.changes,
            self.nodes,
            self.commits,
            self.applied,
            self.restored,
            self.writes,
            self.reads,
            self.unknown,
            self.messages,
            self.forged,
        )?;
        let faults: Vec<String> =
            self.faults.iter().map(|(fault, count)| format!("{fault:?} {count}")).collect();
        write!(f, "; faults: {}", faults.join(", "))
    }
}
