//! What the consensus library logs, as `tracing` events: target `raft`, the node and the fields.

use std::fmt::{self, Write as _};

use slog::{Drain, KV, Level, OwnedKVList, Record};

/// Sends each record to `tracing`. The ready-made adapter loses the target and the fields.
pub(super) struct ToTracing {
    node: u64,
}

/// Collects `key=value` pairs.
#[derive(Default)]
struct Fields(String);

impl slog::Serializer for Fields {
    fn emit_arguments(&mut self, key: slog::Key, value: &fmt::Arguments<'_>) -> slog::Result {
        let space = if self.0.is_empty() { "" } else { " " };
        write!(self.0, "{space}{key}={value}").map_err(|_| slog::Error::Other)
    }
}

macro_rules! event {
    ($level:ident, $node:expr, $record:expr, $values:expr) => {
        if tracing::enabled!(target: "raft", tracing::Level::$level) {
            let mut fields = Fields::default();
            let _ = $record.kv().serialize($record, &mut fields);
            let _ = $values.serialize($record, &mut fields);
            let (message, fields) = ($record.msg(), fields.0);
            tracing::event!(target: "raft", tracing::Level::$level,
                node = $node, module = $record.module(), fields, "{message}");
        }
    };
}

impl Drain for ToTracing {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), slog::Never> {
        match record.level() {
            Level::Critical | Level::Error => event!(ERROR, self.node, record, values),
            Level::Warning => event!(WARN, self.node, record, values),
            Level::Info => event!(INFO, self.node, record, values),
            Level::Debug => event!(DEBUG, self.node, record, values),
            Level::Trace => event!(TRACE, self.node, record, values),
        }
        Ok(())
    }
}

/// A logger for the consensus library of this node.
pub(super) fn logger(node: u64) -> slog::Logger {
    slog::Logger::root(ToTracing { node }, slog::o!())
}
