//! A crash at every write and every sync of a store's life, with every way to lose what was not
//! synced.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use redb::StorageBackend;

use super::*;

#[derive(Debug, Clone)]
enum Op {
    Write(u64, Vec<u8>),
    Resize(u64),
    Sync,
    /// A batch was acknowledged.
    Acknowledged,
}

/// Keeps a file in memory and notes what was done to it.
#[derive(Debug, Clone)]
struct Recorder {
    memory: Memory,
    ops: Arc<Mutex<Vec<Op>>>,
    syncs: bool,
}

impl Recorder {
    fn new(syncs: bool) -> Self {
        Self { memory: Memory::new(Vec::new()), ops: Arc::default(), syncs }
    }

    fn note(&self, op: Op) {
        self.ops.lock().unwrap().push(op);
    }
}

impl StorageBackend for Recorder {
    fn len(&self) -> io::Result<u64> {
        self.memory.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.memory.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.note(Op::Resize(len));
        self.memory.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.syncs {
            self.note(Op::Sync);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.note(Op::Write(offset, data.to_vec()));
        self.memory.write(offset, data)
    }
}

fn perform(bytes: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(offset, data) => {
            let from = usize::try_from(*offset).unwrap();
            let to = from + data.len();
            // A file system may write a block of a file whose new length it lost.
            if bytes.len() < to {
                bytes.resize(to, 0);
            }
            bytes[from..to].copy_from_slice(data);
        }
        Op::Resize(len) => bytes.resize(usize::try_from(*len).unwrap(), 0),
        Op::Sync | Op::Acknowledged => {}
    }
}

/// Ways in which what was not synced may survive.
const WAYS: usize = 9;

fn survivors(unsynced: &[Op], way: usize) -> Vec<Op> {
    let resizes = |op: &&Op| matches!(op, Op::Resize(_));
    match way {
        0 => Vec::new(),
        1 => unsynced.to_vec(),
        2 => unsynced[..unsynced.len() / 2].to_vec(),
        // Only the last one: an order nobody asked for.
        3 => unsynced.iter().filter(resizes).chain(unsynced.last()).cloned().collect(),
        4 => unsynced
            .iter()
            .enumerate()
            .filter(|(at, op)| at % 2 == 0 || resizes(op))
            .map(|(_, op)| op.clone())
            .collect(),
        5 => unsynced
            .iter()
            .enumerate()
            .filter(|(at, op)| at % 2 == 1 || resizes(op))
            .map(|(_, op)| op.clone())
            .collect(),
        // Torn: the last write got a part of the way.
        _ => {
            let mut ops = unsynced.to_vec();
            if let Some(Op::Write(_, data)) = ops.last_mut() {
                data.truncate(data.len() * (way - 5) / 4);
            }
            ops
        }
    }
}

/// How many distinct files were opened.
fn crash_everywhere(syncs: bool) -> usize {
    let recorder = Recorder::new(syncs);
    let batches = batches();
    let images = images(&batches);
    // The making of a file is another matter: it gets its name only when it is whole.
    RedbStore::with_backend(recorder.clone()).load().unwrap();
    let made = recorder.memory.bytes();
    recorder.ops.lock().unwrap().clear();
    let mut store = RedbStore::with_backend(recorder.clone());
    store.load().unwrap();
    for batch in &batches {
        store.write(batch).unwrap();
        recorder.note(Op::Acknowledged);
    }
    let ops = recorder.ops.lock().unwrap().clone();
    drop(store);
    let mut seen = BTreeSet::new();
    for at in 0..=ops.len() {
        let acknowledged = ops[..at].iter().filter(|op| matches!(op, Op::Acknowledged)).count();
        let synced = ops[..at].iter().rposition(|op| matches!(op, Op::Sync)).unwrap_or(0);
        let mut durable = made.clone();
        ops[..synced].iter().for_each(|op| perform(&mut durable, op));
        for way in 0..WAYS {
            let mut bytes = durable.clone();
            survivors(&ops[synced..at], way).iter().for_each(|op| perform(&mut bytes, op));
            if !seen.insert((acknowledged, blake3::hash(&bytes).to_hex())) {
                continue;
            }
            survives(bytes, acknowledged, &batches, &images, &format!("operation {at}, way {way}"));
        }
    }
    seen.len()
}

/// The file opens as it was after the acknowledged batches, or after the one that was under way
/// too, and goes on from there.
fn survives(
    bytes: Vec<u8>,
    acknowledged: usize,
    batches: &[Batch],
    images: &[LogImage],
    what: &str,
) {
    let mut store = RedbStore::with_backend(Memory::new(bytes));
    let image = store.load().unwrap_or_else(|error| panic!("{what}: {error}"));
    let found = images.iter().position(|expected| *expected == image);
    let found = found.unwrap_or_else(|| panic!("{what}: a state that was never written"));
    assert!(found >= acknowledged, "{what}: {acknowledged} acknowledged, {found} found");
    assert!(found <= acknowledged + 1, "{what}: from the future");
    if let Some(batch) = batches.get(found) {
        store.write(batch).unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

#[test]
fn no_crash_loses_an_acknowledged_batch_or_shows_half_of_one() {
    let files = crash_everywhere(true);
    assert!(files > 150, "only {files} files were tried");
}

/// The test above can fail: a disk that only pretends to sync is found out.
#[test]
fn a_disk_that_does_not_sync_is_found_out() {
    let outcome = std::panic::catch_unwind(|| crash_everywhere(false));
    assert!(outcome.is_err());
}
