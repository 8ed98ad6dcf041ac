//! Disks that lose, tear, flip, shorten and fill up.

mod crash;
mod flips;
mod full;

use planner::NodeId;
use wire::pb;

use super::backend::Memory;
use super::*;
use crate::replica::payload::{Body, Payload};
use crate::replica::{EntryKind, HardState, LogEntry, LogId, MemberSet, Snapshot};

/// What a small store goes through: the first snapshot, entries, a displaced tail, a compaction,
/// a snapshot from a leader.
pub(super) fn batches() -> Vec<Batch> {
    let state = |term, commit| Some(HardState { term, vote: 2, commit });
    vec![
        Batch { snapshot: Some(snapshot(1, 1)), reset: true, hard_state: state(1, 1), ..empty() },
        Batch { boot: Some(1), ..empty() },
        Batch { entries: entries(2..5, 1), hard_state: state(1, 2), ..empty() },
        Batch { entries: entries(4..8, 2), hard_state: state(2, 5), ..empty() },
        Batch { hard_state: state(3, 7), ..empty() },
        Batch {
            snapshot: Some(snapshot(6, 2)),
            compact: Some(LogId { index: 4, term: 2 }),
            hard_state: state(3, 7),
            ..empty()
        },
        Batch { entries: entries(8..9, 3), hard_state: state(3, 7), ..empty() },
        Batch { snapshot: Some(snapshot(20, 4)), reset: true, hard_state: state(4, 20), ..empty() },
        Batch { entries: entries(21..23, 4), hard_state: state(4, 20), ..empty() },
    ]
}

pub(super) fn empty() -> Batch {
    Batch::default()
}

pub(super) fn entries(range: std::ops::Range<u64>, term: u64) -> Vec<LogEntry> {
    let entry = |index: u64| LogEntry {
        id: LogId { index, term },
        kind: EntryKind::Normal,
        data: Payload::Command(format!("command {index} of term {term}").into_bytes()).encode(),
        context: Vec::new(),
    };
    range.map(entry).collect()
}

fn snapshot(index: u64, term: u64) -> Snapshot {
    let state = format!("state after {index}").into_bytes();
    let body = Body { state, hash: [3; 32], removed: vec![NodeId(9)] };
    let members = MemberSet::of_one(NodeId(1));
    Snapshot { id: LogId { index, term }, members, body: body.encode() }
}

/// The image after each number of batches.
pub(super) fn images(batches: &[Batch]) -> Vec<LogImage> {
    let mut image = LogImage::default();
    let mut out = vec![image.clone()];
    for batch in batches {
        image.apply(batch).unwrap();
        out.push(image.clone());
    }
    out
}

/// A file with all of [`batches`] in it, and its bytes.
pub(super) fn written() -> Vec<u8> {
    let memory = Memory::new(Vec::new());
    let mut store = RedbStore::with_backend(memory.clone());
    store.load().unwrap();
    for batch in &batches() {
        store.write(batch).unwrap();
    }
    let bytes = memory.bytes();
    drop(store);
    bytes
}

#[test]
fn what_was_written_is_read_again() {
    let memory = Memory::new(Vec::new());
    let batches = batches();
    let images = images(&batches);
    for (at, batch) in batches.iter().enumerate() {
        let mut store = RedbStore::with_backend(memory.clone());
        assert_eq!(store.load().unwrap(), images[at]);
        store.write(batch).unwrap();
        images[at + 1].verify().unwrap();
    }
    assert_eq!(recover(&memory.bytes()).unwrap(), images[batches.len()]);
}

#[test]
fn a_file_is_read_again_and_locked_while_it_is_open() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("raft.redb");
    let batches = batches();
    let mut store = RedbStore::open(&path);
    assert!(store.load().unwrap().is_empty());
    assert!(!store.is_low());
    for batch in &batches {
        store.write(batch).unwrap();
    }
    let second = RedbStore::open(&path).load().unwrap_err().to_string();
    assert_eq!(second, "the disk failed: another process uses this data directory");
    drop(store);
    let mut store = RedbStore::open(&path);
    assert_eq!(store.load().unwrap(), images(&batches)[batches.len()]);
}

#[test]
fn a_file_whose_making_was_interrupted_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("raft.redb");
    std::fs::write(folder.path().join("raft.redb.new"), vec![0; 4096]).unwrap();
    let mut store = RedbStore::open(&path);
    assert!(store.load().unwrap().is_empty());
    store.write(&batches()[0]).unwrap();
    drop(store);
    let mut store = RedbStore::open(&path);
    assert_eq!(store.load().unwrap(), images(&batches())[1]);
}

#[test]
fn a_record_belongs_to_its_place() {
    let one = &entries(2..3, 1)[0];
    let record = record::entry(one);
    assert_eq!(record::read_entry(2, &record).unwrap(), *one);
    let moved = record::read_entry(3, &record).unwrap_err().to_string();
    assert!(moved.contains("log entry 3: its checksum"), "{moved}");
    let mut image = LogImage::default();
    assert!(record::read_meta(&mut image, "hard state", &record).is_err());
}

#[test]
fn an_entry_of_a_kind_from_a_later_release_is_named() {
    let unknown = pb::RaftEntry { index: 7, kind: 99, ..pb::RaftEntry::default() };
    let record = record::seal_for_test("log entry", 7, &wire::message_to_bytes(&unknown));
    let error = record::read_entry(7, &record).unwrap_err().to_string();
    assert!(error.contains("log entry 7"), "{error}");
}
