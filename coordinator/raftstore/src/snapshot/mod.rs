//! The applied state on its way to another member or into a file: a bounded stream of chunks.
//!
//! ```text
//!   one read transaction ─▶ SnapshotSource ──chunks──▶ transport ──▶ SnapshotSink ─▶ staging table
//!   (index, term, members)                                              │ finish: hash, count
//!                                                                       ▼
//!                                          Raft takes the snapshot: staging becomes the state, one fsync
//! ```
//!
//! Invariants:
//!
//! 1. A source reads one version of the file, whatever is written meanwhile; its index, term and members are of that version.
//! 2. A receiver's state is the old one until all chunks came, in order, with the right hash and count; then it is the new
//!    one. A crash at any point leaves one of the two.
//! 3. No side holds more than one chunk in memory.
//!
//! Deliberately not here: how chunks travel, and when a member needs them (raft-rs knows).

mod backup;
mod chunk;
mod outgoing;
mod sink;
mod source;
mod staging;

pub(crate) use backup::save;
pub use backup::{BackupInfo, restore};
#[cfg(test)]
pub(crate) use backup::{Saving, read_into};
pub use chunk::{CHUNK_MESSAGE_BYTES_MAX, SnapshotChunk, SnapshotPair};
pub use outgoing::OutgoingSnapshot;
pub use sink::SnapshotSink;
pub(crate) use source::SnapshotSource;
pub(crate) use staging::{Staged, Staging};

/// Why a snapshot or a backup was not taken. What was there before is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// The header is not of a snapshot for this member.
    #[error("this is not a snapshot for this member: {0}")]
    Header(&'static str),
    /// The state here is as new, or the sender does not lead any more.
    #[error("the snapshot is of log index {index}, which this member does not need")]
    Stale {
        /// Index of the snapshot.
        index: u64,
    },
    /// Another stream took this one's place.
    #[error("a newer snapshot stream took the place of this one")]
    Superseded,
    /// A complete one is being installed.
    #[error("another snapshot is being installed; try again shortly")]
    Busy,
    /// Chunks are missing, doubled, out of order, or not what the sender hashed.
    #[error("the snapshot is damaged ({0}); send it again")]
    Damaged(&'static str),
    /// Raft did not want it after all.
    #[error("the snapshot came too late and was dropped")]
    Refused,
    /// The file is not a backup, or of a newer release.
    #[error("this is not a backup that this release can read: {0}")]
    NotABackup(&'static str),
    /// The file is a backup that lacks something or was changed.
    #[error("the backup is damaged ({0}); use another one")]
    DamagedBackup(&'static str),
    /// The data directory has a store already.
    #[error("{0} holds a store already; restore into an empty data directory")]
    NotEmpty(std::path::PathBuf),
}
