//! A disk without room refuses whole batches, and takes them once there is some.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex};

use redb::StorageBackend;

use super::*;

const BLOCK: u64 = 4096;

/// A disk of so many blocks, on which a file and a reserve take what they are given.
#[derive(Debug, Clone)]
struct Small {
    memory: Memory,
    room: Arc<Mutex<Room>>,
    reserve: u64,
}

#[derive(Debug, Default)]
struct Room {
    blocks: u64,
    used: BTreeSet<u64>,
    reserved: u64,
    fail_sync: bool,
}

impl Small {
    fn new(reserve: u64) -> Self {
        Self { memory: Memory::new(Vec::new()), room: Arc::default(), reserve }
    }

    fn set(&self, blocks: u64) {
        self.room.lock().unwrap().blocks = blocks;
    }

    fn used(&self) -> u64 {
        let room = self.room.lock().unwrap();
        room.used.len() as u64 + room.reserved
    }
}

impl StorageBackend for Small {
    fn len(&self) -> io::Result<u64> {
        self.memory.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.memory.read(offset, out)
    }

    /// A longer file takes no room until it is written to.
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.memory.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.room.lock().unwrap().fail_sync {
            return Err(ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut room = self.room.lock().unwrap();
        for block in offset / BLOCK..=(offset + data.len() as u64 - 1) / BLOCK {
            let full = room.used.len() as u64 + room.reserved >= room.blocks;
            if !room.used.contains(&block) && full {
                return Err(ErrorKind::StorageFull.into());
            }
            room.used.insert(block);
        }
        self.memory.write(offset, data)
    }
}

/// The same with a reserve.
#[derive(Debug)]
struct Reserved(Small);

impl Disk for Reserved {
    fn open(&mut self) -> io::Result<Box<dyn StorageBackend>> {
        Ok(Box::new(self.0.clone()))
    }

    fn reserve(&mut self) -> io::Result<()> {
        let mut room = self.0.room.lock().unwrap();
        let used = room.used.len() as u64;
        if room.reserved == 0 && used + self.0.reserve > room.blocks {
            return Err(ErrorKind::StorageFull.into());
        }
        room.reserved = self.0.reserve;
        Ok(())
    }

    fn release(&mut self) -> io::Result<bool> {
        let mut room = self.0.room.lock().unwrap();
        Ok(std::mem::take(&mut room.reserved) > 0)
    }
}

fn big(index: u64) -> Batch {
    let mut entries = entries(index..index + 1, 1);
    entries[0].data = Payload::Command(vec![7; 8192]).encode();
    let hard_state = Some(HardState { term: 1, vote: 0, commit: 1 });
    Batch { entries, hard_state, ..Batch::default() }
}

#[test]
fn a_full_disk_refuses_whole_batches_and_takes_them_later() {
    // At each amount of room the first refusal comes at another point of a commit.
    let mut refusals = 0;
    for room in (8..80).step_by(3) {
        let disk = Small::new(0);
        disk.set(1 << 20);
        let mut store = RedbStore::with_backend(disk.clone());
        let mut expected = store.load().unwrap();
        store.write(&batches()[0]).unwrap();
        expected.apply(&batches()[0]).unwrap();
        disk.set(disk.used() + room);
        let mut index = 2;
        loop {
            match store.write(&big(index)) {
                Ok(()) => {
                    expected.apply(&big(index)).unwrap();
                    index += 1;
                }
                Err(StoreError::Full) => break,
                Err(error) => panic!("room {room}: {error}"),
            }
            assert!(index < 1000);
        }
        refusals += 1;
        // Asked again, it refuses again, and what is there is what was acknowledged.
        assert!(matches!(store.write(&big(index)), Err(StoreError::Full)), "room {room}");
        assert_eq!(recover(&disk.memory.bytes()).unwrap(), expected, "room {room}");
        disk.set(1 << 20);
        store.write(&big(index)).unwrap();
        expected.apply(&big(index)).unwrap();
        drop(store);
        assert_eq!(recover(&disk.memory.bytes()).unwrap(), expected, "room {room}");
    }
    assert!(refusals > 20);
}

#[test]
fn the_reserve_takes_the_batch_that_met_the_full_disk() {
    let disk = Small::new(64);
    disk.set(400);
    let mut store = RedbStore::with_disk(Reserved(disk.clone()));
    let mut expected = store.load().unwrap();
    store.write(&batches()[0]).unwrap();
    expected.apply(&batches()[0]).unwrap();
    let mut index = 2;
    while !store.is_low() {
        store.write(&big(index)).unwrap();
        expected.apply(&big(index)).unwrap();
        index += 1;
        assert!(index < 1000);
    }
    // What must be written still can be.
    let vote = HardState { term: 2, vote: 3, commit: 1 };
    let batch = Batch { hard_state: Some(vote), ..Batch::default() };
    store.write(&batch).unwrap();
    expected.apply(&batch).unwrap();
    store.probe().unwrap();
    assert!(store.is_low(), "it took back what is not there");
    disk.set(1 << 20);
    store.probe().unwrap();
    assert!(!store.is_low());
    drop(store);
    assert_eq!(recover(&disk.memory.bytes()).unwrap(), expected);
}

/// The bytes that a sync could not write may be gone although the next sync succeeds.
#[test]
fn a_sync_that_fails_is_never_tried_again() {
    let disk = Small::new(0);
    disk.set(1 << 20);
    let mut store = RedbStore::with_backend(disk.clone());
    store.load().unwrap();
    store.write(&batches()[0]).unwrap();
    disk.room.lock().unwrap().fail_sync = true;
    assert!(matches!(store.write(&big(2)), Err(StoreError::Io(_))));
    disk.room.lock().unwrap().fail_sync = false;
    assert!(matches!(store.write(&big(2)), Err(StoreError::Io(_))), "it tried again");
}
