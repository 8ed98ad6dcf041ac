//! Every flipped byte is found, and what it is part of is named.

use super::*;

/// Where these bytes stand in the file; exactly once.
fn find(file: &[u8], part: &[u8]) -> usize {
    let mut found = file.windows(part.len()).enumerate().filter(|(_, window)| *window == part);
    let (at, _) = found.next().expect("it is not in the file");
    at
}

/// A byte of a record: flipped, the record is named.
fn each_byte_is_named(file: &[u8], record: &[u8], name: &str) {
    let at = find(file, record);
    for offset in at..at + record.len() {
        let mut file = file.to_vec();
        file[offset] ^= 1 << (offset % 8);
        match recover(&file) {
            Err(StoreError::Corrupt { what }) => {
                assert!(what.contains(name), "byte {offset} of {name}: {what}");
            }
            other => panic!("byte {offset} of {name}: {other:?}"),
        }
    }
}

#[test]
fn every_byte_of_every_entry_is_checked() {
    let file = written();
    let image = recover(&file).unwrap();
    assert_eq!(image.entries.len(), 2);
    for entry in &image.entries {
        let name = format!("log entry {}", entry.id.index);
        each_byte_is_named(&file, &record::entry(entry), &name);
    }
}

#[test]
fn every_byte_of_the_snapshot_the_hard_state_and_the_rest_is_checked() {
    let file = written();
    let image = recover(&file).unwrap();
    let batch = Batch {
        hard_state: Some(image.hard_state),
        snapshot: image.snapshot.clone(),
        boot: Some(image.boot),
        reset: true,
        ..Batch::default()
    };
    let records = record::meta(&batch, batches().len() as u64);
    assert_eq!(records.len(), 5);
    for (name, record) in records {
        each_byte_is_named(&file, &record, name);
    }
}

/// Anything else in the file: found, or without any effect; never another state, never a panic.
#[test]
fn a_flip_anywhere_else_is_found_or_harmless() {
    let file = written();
    let image = recover(&file).unwrap();
    let (mut found, mut harmless) = (0, 0);
    let zero = |at: usize| file[at] == 0;
    for offset in 0..file.len() {
        // The header whole; of the rest what is not empty, and a sample of what is.
        if offset > 4096 && zero(offset) && !offset.is_multiple_of(509) {
            continue;
        }
        if offset > 320 && !offset.is_multiple_of(31) {
            continue;
        }
        let mut file = file.clone();
        file[offset] ^= 1 << (offset % 8);
        match recover(&file) {
            Err(StoreError::Corrupt { .. }) => found += 1,
            Ok(same) => {
                assert!(same == image, "byte {offset}: another state");
                harmless += 1;
            }
            Err(error) => panic!("byte {offset}: {error}"),
        }
    }
    assert!(found > 50 && harmless > 0, "{found} found, {harmless} harmless");
}

/// The one bit of the header that no checksum of redb's covers: which of two commits counts.
#[test]
fn the_choice_between_two_commits_cannot_be_flipped() {
    let file = written();
    let image = recover(&file).unwrap();
    for bit in 0..8 {
        let mut file = file.clone();
        file[header::FLAGS] ^= 1 << bit;
        match recover(&file) {
            Ok(same) => assert_eq!(same, image, "bit {bit}"),
            Err(StoreError::Corrupt { .. }) => {}
            Err(error) => panic!("bit {bit}: {error}"),
        }
    }
}

#[test]
fn a_shortened_file_is_refused() {
    let file = written();
    let image = recover(&file).unwrap();
    let lengths = (1..400).chain((400..file.len()).step_by(1021)).chain([file.len() - 1]);
    for len in lengths {
        match recover(&file[..len]) {
            Err(StoreError::Corrupt { .. }) => {}
            // Free pages at the end may go.
            Ok(same) => assert_eq!(same, image, "length {len}"),
            Err(error) => panic!("length {len}: {error}"),
        }
    }
}

#[test]
fn what_is_no_store_is_refused() {
    for bytes in [vec![0; 64], b"not a store at all".to_vec(), vec![0xff; 8192]] {
        assert!(matches!(recover(&bytes), Err(StoreError::Corrupt { .. })));
    }
}
