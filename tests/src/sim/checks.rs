//! What must hold whatever happens. Every fact that a run shows passes through here.

use std::collections::BTreeMap;
use std::fmt;

use control::replica::Machine;

use super::run::Mutation;
use super::workload::{AppliedRecord, Workload};

/// Something that must never happen, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The verdict of a check.
pub type Checked = Result<(), Violation>;

/// Fails with `text` unless `holds`.
///
/// # Errors
/// The violation.
pub fn ensure(holds: bool, text: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(Violation(text())) }
}

/// A committed command and what it gave.
type Committed<W> = AppliedRecord<<<W as Workload>::Machine as Machine>::Outcome>;

/// Everything that was ever seen to be so, by what may only be so once.
#[derive(Debug)]
pub struct Checks<W: Workload> {
    /// Who led, by term.
    leaders: BTreeMap<u64, u64>,
    /// Who got a node's vote, by (node, term).
    votes: BTreeMap<(u64, u64), u64>,
    /// Digests of entries by (index, term).
    entries: BTreeMap<(u64, u64), u64>,
    /// Highest index known to be committed, by the term of its entry.
    commits: BTreeMap<u64, u64>,
    /// Terms of committed entries, by index.
    terms: BTreeMap<u64, u64>,
    /// Commands by index, as first applied anywhere.
    commands: BTreeMap<u64, Committed<W>>,
    /// State hashes by index.
    hashes: BTreeMap<u64, [u8; 32]>,
    /// The last change of members that anybody applied.
    changed: u64,
    /// The replica that nothing happens to.
    reference: W::Machine,
    /// What the workload's own checks remember.
    pub ledger: W::Ledger,
}

impl<W: Workload> Checks<W> {
    /// Nothing seen yet. A mistake of the machine is the reference's too: it must be found by what
    /// must hold, not by comparison.
    pub fn new(mutation: Option<Mutation>) -> Self {
        Self {
            leaders: BTreeMap::new(),
            votes: BTreeMap::new(),
            entries: BTreeMap::new(),
            commits: BTreeMap::new(),
            terms: BTreeMap::new(),
            commands: BTreeMap::new(),
            hashes: BTreeMap::new(),
            changed: 0,
            reference: W::machine(mutation),
            ledger: W::Ledger::default(),
        }
    }

    /// `node` says that it leads `term`; `log` gives the terms of its entries. True when new.
    ///
    /// # Errors
    /// Another led that term, or an entry that was committed before is not in its log.
    pub fn leads(
        &mut self,
        node: u64,
        term: u64,
        log: impl Fn(u64) -> Option<u64>,
    ) -> Result<bool, Violation> {
        let known = self.leaders.insert(term, node);
        let other = known.filter(|other| *other != node);
        ensure(other.is_none(), || format!("{node} and {other:?} both lead term {term}"))?;
        if known.is_none()
            && let Some((&of, &index)) = self.commits.range(..term).next_back()
        {
            // `None` is what a snapshot covers, and a snapshot covers what is committed only.
            let has = log(index);
            ensure(has.is_none_or(|has| has == of), || {
                format!("{node} leads term {term} without entry {index} of term {of}: {has:?}")
            })?;
        }
        Ok(known.is_none())
    }

    /// `node` votes for `candidate` in `term`.
    ///
    /// # Errors
    /// It voted for another before.
    pub fn votes(&mut self, node: u64, term: u64, candidate: u64) -> Checked {
        let first = *self.votes.entry((node, term)).or_insert(candidate);
        ensure(first == candidate, || {
            format!("{node} voted for {first} and {candidate} in term {term}")
        })
    }

    /// A log holds an entry.
    ///
    /// # Errors
    /// Another log held another entry of that index and term.
    pub fn entry(&mut self, node: u64, index: u64, term: u64, digest: u64) -> Checked {
        let first = *self.entries.entry((index, term)).or_insert(digest);
        ensure(first == digest, || {
            format!("entry {index} of term {term} on {node} differs from the first seen")
        })
    }

    /// A node says that everything up to `index`, whose entry is of `term`, is committed.
    ///
    /// # Errors
    /// An entry of another term was committed there.
    pub fn committed(&mut self, node: u64, index: u64, term: u64) -> Checked {
        let first = *self.terms.entry(index).or_insert(term);
        let highest = self.commits.entry(term).or_insert(index);
        *highest = (*highest).max(index);
        ensure(first == term, || {
            format!("{node} has entry {index} of term {term} committed, others that of {first}")
        })
    }

    /// A node applied a command.
    ///
    /// # Errors
    /// Others applied another there, or got another outcome, or the machine fell apart.
    pub fn applied(&mut self, node: u64, record: &Committed<W>) -> Checked {
        let index = record.index;
        if let Some(first) = self.commands.get(&index) {
            ensure(first.command == record.command, || {
                format!("{node} applied another command at {index} than the first to do so")
            })?;
            return ensure(first.outcome == record.outcome, || {
                let (first, outcome) = (&first.outcome, &record.outcome);
                format!("{node} got {outcome:?} at {index}, the first got {first:?}")
            });
        }
        let last = self.commands.keys().next_back().copied().unwrap_or(0);
        ensure(index > last, || {
            format!("{node} applied a command at {index}, where others went by to {last}")
        })?;
        let outcome = self.reference.apply(index, &record.command);
        ensure(outcome == record.outcome, || {
            format!("{node} got {:?} at {index}, expected {outcome:?}", record.outcome)
        })?;
        W::check(&mut self.ledger, &self.reference, record)
            .map_err(|what| Violation(format!("at {index}: {what}")))?;
        self.commands.insert(index, record.clone());
        Ok(())
    }

    /// A node's state after `index` has this hash.
    ///
    /// # Errors
    /// Another node's had another.
    pub fn hash(&mut self, node: u64, index: u64, hash: [u8; 32]) -> Checked {
        let first = *self.hashes.entry(index).or_insert(hash);
        ensure(first == hash, || format!("the state of {node} differs at {index}"))
    }

    /// A change of members was applied; whether for the first time.
    pub fn change(&mut self, index: u64) -> bool {
        let new = index > self.changed;
        self.changed = self.changed.max(index);
        new
    }

    /// The index of the last command that anybody applied.
    pub fn last_command(&self) -> u64 {
        self.commands.keys().next_back().copied().unwrap_or(0)
    }

    /// The machine as it must be after the last command.
    pub fn reference(&self) -> &W::Machine {
        &self.reference
    }

    /// The highest index known to be committed.
    pub fn last_committed(&self) -> u64 {
        self.terms.keys().next_back().copied().unwrap_or(0)
    }
}
