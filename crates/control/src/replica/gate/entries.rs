//! Entries of an append: consecutive, in order of their terms, and readable to the last byte.

use raft::eraftpb as rb;
use wire::pb;

use super::{ENTRIES_BYTES_MAX, ENTRIES_MAX, ENTRY_MAX, GateError};
use crate::replica::convert;
use crate::replica::payload::{self, Origin, Payload};
use crate::replica::store::{EntryKind, LogEntry};

/// The entries as consensus has them.
pub(super) fn check(message: &pb::RaftMessage) -> Result<Vec<rb::Entry>, GateError> {
    if message.entries.len() > ENTRIES_MAX {
        return Err(GateError::TooLarge { what: "number of entries" });
    }
    let sizes = message.entries.iter().map(|entry| entry.data.len() + entry.context.len());
    if sizes.sum::<usize>() > ENTRIES_BYTES_MAX {
        return Err(GateError::TooLarge { what: "entries" });
    }
    let (mut index, mut term) = (message.index, message.log_term);
    let mut out = Vec::with_capacity(message.entries.len());
    for entry in &message.entries {
        index += 1;
        if entry.index != index || entry.term < term.max(1) || entry.term > message.term {
            return Err(GateError::Sequence { index: entry.index });
        }
        term = entry.term;
        out.push(convert::entry_to_raft(&readable(entry)?));
    }
    Ok(out)
}

/// An entry that will still be readable when it is applied: once it is in the log of a majority,
/// nothing can take it out again.
fn readable(entry: &pb::RaftEntry) -> Result<LogEntry, GateError> {
    let index = entry.index;
    if entry.data.len() + entry.context.len() > ENTRY_MAX {
        return Err(GateError::TooLarge { what: "entry" });
    }
    let unknown = GateError::UnknownEntryKind { index, kind: entry.kind };
    let entry = convert::entry_from_wire(entry).ok_or(unknown)?;
    Origin::decode(&entry.context).map_err(|_| GateError::BadPayload { index })?;
    match entry.kind {
        EntryKind::Normal => {
            Payload::decode(&entry.data).map_err(|_| GateError::BadPayload { index })?;
        }
        EntryKind::Change => {
            payload::decode_change(&entry.data).map_err(|_| GateError::BadChange { index })?;
        }
    }
    Ok(entry)
}
