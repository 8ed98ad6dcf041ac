//! Records: a blake3 over what a record is, where it belongs and what it holds, then the content.

use wire::{message_from_bytes, message_to_bytes, pb};

use crate::replica::convert;
use crate::replica::store::{Batch, HardState, LogEntry, LogId, LogImage, Snapshot};

pub(super) const SEQUENCE: &str = "sequence";
const HARD_STATE: &str = "hard state";
const SNAPSHOT: &str = "snapshot";
const BASE: &str = "base";
const BOOT: &str = "boot";
const ENTRY: &str = "log entry";
/// Bytes of the checksum.
const SUM: usize = blake3::OUT_LEN;

fn sum(kind: &str, index: u64, content: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(kind.as_bytes()).update(&[0]).update(&index.to_le_bytes()).update(content);
    hasher.finalize()
}

fn seal(kind: &str, index: u64, content: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(SUM + content.len());
    out.extend_from_slice(sum(kind, index, content).as_bytes());
    out.extend_from_slice(content);
    out
}

/// What the store reports: the record's name and what is wrong with it.
fn corrupt(kind: &str, index: u64, what: &str) -> redb::Error {
    let which = if kind == ENTRY { format!("{kind} {index}") } else { kind.to_owned() };
    redb::Error::Corrupted(format!("{which}: {what}"))
}

fn open<'a>(kind: &str, index: u64, record: &'a [u8]) -> Result<&'a [u8], redb::Error> {
    match record.split_first_chunk::<SUM>() {
        Some((stored, content)) if sum(kind, index, content) == *stored => Ok(content),
        _ => Err(corrupt(kind, index, "its checksum does not match")),
    }
}

/// What a record whose checksum matches must hold.
fn read<T>(kind: &str, index: u64, content: Option<T>) -> Result<T, redb::Error> {
    content.ok_or_else(|| corrupt(kind, index, "it cannot be read"))
}

pub(super) fn entry(entry: &LogEntry) -> Vec<u8> {
    let content = message_to_bytes(&convert::stored_entry(entry.clone()));
    seal(ENTRY, entry.id.index, &content)
}

pub(super) fn read_entry(index: u64, record: &[u8]) -> Result<LogEntry, redb::Error> {
    let content = open(ENTRY, index, record)?;
    let entry: pb::RaftEntry = read(ENTRY, index, message_from_bytes(content))?;
    match convert::entry_from_wire(&entry) {
        Some(entry) if entry.id.index == index => Ok(entry),
        _ => Err(corrupt(ENTRY, index, "it is of a kind that this release does not know")),
    }
}

pub(super) fn number(kind: &str, record: &[u8]) -> Result<u64, redb::Error> {
    let content = open(kind, 0, record)?;
    let bytes = content.try_into().map_err(|_| corrupt(kind, 0, "it is no number"))?;
    Ok(u64::from_le_bytes(bytes))
}

fn base(id: LogId) -> Vec<u8> {
    seal(BASE, 0, &message_to_bytes(&pb::RaftBase { index: id.index, term: id.term }))
}

/// Everything of a batch but its entries.
pub(super) fn meta(batch: &Batch, sequence: u64) -> Vec<(&'static str, Vec<u8>)> {
    let mut out = vec![(SEQUENCE, seal(SEQUENCE, 0, &sequence.to_le_bytes()))];
    if let Some(HardState { term, vote, commit }) = batch.hard_state {
        let content = message_to_bytes(&pb::RaftHardState { term, vote, commit });
        out.push((HARD_STATE, seal(HARD_STATE, 0, &content)));
    }
    if let Some(snapshot) = &batch.snapshot {
        let content = pb::RaftSnapshot {
            index: snapshot.id.index,
            term: snapshot.id.term,
            members: Some(convert::members_to_wire(&snapshot.members)),
            body: snapshot.body.clone().into(),
        };
        out.push((SNAPSHOT, seal(SNAPSHOT, 0, &message_to_bytes(&content))));
        if batch.reset {
            out.push((BASE, base(snapshot.id)));
        }
    }
    if let Some(compact) = batch.compact {
        out.push((BASE, base(compact)));
    }
    if let Some(boot) = batch.boot {
        out.push((BOOT, seal(BOOT, 0, &boot.to_le_bytes())));
    }
    out
}

pub(super) fn read_meta(
    image: &mut LogImage,
    name: &str,
    record: &[u8],
) -> Result<(), redb::Error> {
    match name {
        SEQUENCE => drop(number(SEQUENCE, record)?),
        BOOT => image.boot = number(BOOT, record)?,
        HARD_STATE => {
            let content = open(HARD_STATE, 0, record)?;
            let state: pb::RaftHardState = read(HARD_STATE, 0, message_from_bytes(content))?;
            let pb::RaftHardState { term, vote, commit } = state;
            image.hard_state = HardState { term, vote, commit };
        }
        BASE => {
            let content = open(BASE, 0, record)?;
            let base: pb::RaftBase = read(BASE, 0, message_from_bytes(content))?;
            image.base = LogId { index: base.index, term: base.term };
        }
        SNAPSHOT => {
            let content = open(SNAPSHOT, 0, record)?;
            let snapshot: pb::RaftSnapshot = read(SNAPSHOT, 0, message_from_bytes(content))?;
            let members = snapshot.members.as_ref();
            let members = members.ok_or_else(|| corrupt(SNAPSHOT, 0, "it has no members"))?;
            image.snapshot = Some(Snapshot {
                id: LogId { index: snapshot.index, term: snapshot.term },
                members: convert::members_from_wire(members),
                body: snapshot.body.to_vec(),
            });
        }
        other => return Err(corrupt(other, 0, "this release does not know it")),
    }
    Ok(())
}

/// A record with any content.
#[cfg(test)]
pub(super) fn seal_for_test(kind: &str, index: u64, content: &[u8]) -> Vec<u8> {
    seal(kind, index, content)
}
