//! What a batch does to an image, and what cannot be an image.

use super::*;

fn entry(index: u64, term: u64) -> LogEntry {
    LogEntry { id: LogId { index, term }, kind: EntryKind::Normal, data: vec![], context: vec![] }
}

fn image() -> LogImage {
    let id = LogId { index: 1, term: 1 };
    let mut image = LogImage::default();
    image
        .apply(&Batch {
            hard_state: Some(HardState { term: 2, vote: 0, commit: 1 }),
            snapshot: Some(Snapshot { id, members: MemberSet::of_one(NodeId(1)), body: vec![] }),
            reset: true,
            entries: vec![entry(2, 1), entry(3, 1), entry(4, 2)],
            ..Batch::default()
        })
        .unwrap();
    image
}

#[test]
fn entries_displace_what_follows_them() {
    let mut image = image();
    image.apply(&Batch { entries: vec![entry(3, 2)], ..Batch::default() }).unwrap();
    assert_eq!(image.last(), LogId { index: 3, term: 2 });
    image.verify().unwrap();
}

#[test]
fn a_gap_is_refused_whole() {
    let before = image();
    for entries in [vec![entry(6, 2)], vec![entry(1, 1)], vec![entry(5, 2), entry(7, 2)]] {
        let mut image = before.clone();
        let state = Some(HardState { term: 9, vote: 9, commit: 4 });
        let batch = Batch { entries, hard_state: state, ..Batch::default() };
        assert!(matches!(image.apply(&batch), Err(StoreError::Batch { .. })));
        assert_eq!(image, before);
    }
}

#[test]
fn compaction_keeps_the_term_before_the_first_entry() {
    let mut image = image();
    let compact = Some(LogId { index: 3, term: 1 });
    let snapshot = Snapshot {
        id: LogId { index: 4, term: 2 },
        members: MemberSet::of_one(NodeId(1)),
        body: vec![],
    };
    let hard_state = Some(HardState { term: 2, vote: 0, commit: 4 });
    let batch = Batch { compact, hard_state, snapshot: Some(snapshot), ..Batch::default() };
    image.apply(&batch).unwrap();
    image.verify().unwrap();
    assert_eq!((image.term(3), image.term(4), image.term(2)), (Some(1), Some(2), None));
}

#[test]
fn what_does_not_fit_together_is_named() {
    let named = |change: fn(&mut LogImage)| {
        let mut image = image();
        change(&mut image);
        image.verify().unwrap_err().to_string()
    };
    assert!(named(|image| drop(image.entries.remove(1))).contains("log entry 3"));
    assert!(named(|image| image.entries[2].id.term = 0).contains("log entry 4"));
    assert!(named(|image| image.snapshot = None).contains("snapshot"));
    assert!(named(|image| image.hard_state.commit = 9).contains("hard state"));
    assert!(named(|image| image.hard_state.term = 1).contains("hard state"));
}
