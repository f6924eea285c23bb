//! Sends raft-rs' log lines (slog) to tracing.

use slog::{Drain, Level, Logger, OwnedKVList, Record};

struct ToTracing;

impl Drain for ToTracing {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, _values: &OwnedKVList) -> Result<(), slog::Never> {
        match record.level() {
            Level::Critical | Level::Error => tracing::error!(target: "baton_raftstore::raft", "{}", record.msg()),
            Level::Warning => tracing::warn!(target: "baton_raftstore::raft", "{}", record.msg()),
            // raft-rs speaks of every election at info; to an operator that is detail.
            Level::Info => tracing::debug!(target: "baton_raftstore::raft", "{}", record.msg()),
            Level::Debug | Level::Trace => tracing::trace!(target: "baton_raftstore::raft", "{}", record.msg()),
        }
        Ok(())
    }
}

pub(crate) fn logger() -> Logger {
    Logger::root(ToTracing, slog::o!())
}
