//! A coordinator's log after something has written over it: edits of a good file, or no file at
//! all. It is read as it was, or refused; what is read has passed every check.
#![no_main]

use std::sync::OnceLock;

use control::replica::{
    Batch, EntryKind, HardState, LogEntry, LogId, LogStore, MemberSet, RedbStore, Snapshot, recover,
};
use libfuzzer_sys::fuzz_target;
use planner::NodeId;

/// The bytes of a log that holds a snapshot and some entries.
fn good() -> &'static [u8] {
    static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
    GOOD.get_or_init(|| {
        let directory = std::env::temp_dir().join(format!("phalanx-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory");
        let path = directory.join("raft.redb");
        let mut store = RedbStore::open(&path);
        store.load().expect("a new log");
        for batch in batches() {
            store.write(&batch).expect("a batch");
        }
        drop(store);
        let bytes = std::fs::read(&path).expect("the log");
        std::fs::remove_dir_all(&directory).expect("a directory of ours");
        bytes
    })
}

fn batches() -> Vec<Batch> {
    let entry = |index| LogEntry {
        id: LogId { index, term: 2 },
        kind: EntryKind::Normal,
        data: vec![index as u8; 40],
        context: Vec::new(),
    };
    let snapshot = Snapshot {
        id: LogId { index: 1, term: 1 },
        members: MemberSet::of_one(NodeId(1)),
        body: vec![5; 300],
    };
    let hard_state = Some(HardState { term: 2, vote: 1, commit: 3 });
    vec![
        Batch { boot: Some(1), snapshot: Some(snapshot), reset: true, ..Batch::default() },
        Batch { hard_state, entries: (2..9).map(entry).collect(), ..Batch::default() },
    ]
}

fuzz_target!(
    init: {
        // The store turns a panic of its library into an error; only one that escapes counts.
        std::panic::set_hook(Box::new(|_| {}));
    },
    |data: &[u8]| {
        let Some((&first, edits)) = data.split_first() else { return };
        let mut bytes = if first & 1 == 0 { good().to_vec() } else { edits.to_vec() };
        if first & 1 == 0 {
            for edit in edits.chunks_exact(4) {
                let at = u32::from_le_bytes([edit[0], edit[1], edit[2], 0]) as usize % bytes.len();
                bytes[at] ^= edit[3];
            }
        }
        if let Ok(image) = recover(&bytes) {
            image.verify().expect("what is read has passed every check");
        }
    }
);
