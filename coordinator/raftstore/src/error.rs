//! What can go wrong with the store, each with the way out.

use crate::membership::MembershipRefused;
use crate::snapshot::SnapshotError;
use baton_state::{Refused, TablesError};
use redb::{CommitError, DatabaseError, SetDurabilityError, StorageError, TableError, TransactionError};
use std::path::PathBuf;

/// Why the store could not be opened, or a command was not taken.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RaftStoreError {
    /// Another process has the file open.
    #[error(
        "{path} is in use by another process; stop that coordinator first, or give this one its own data directory"
    )]
    Locked {
        /// The store's file.
        path: PathBuf,
    },
    /// The file cannot be read as a store.
    #[error("{path} is damaged ({reason}); restore it from a backup, or start with an empty data directory")]
    Corrupt {
        /// The store's file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The file was written by another version of this program.
    #[error("{path} has format {found}, this release reads {expected}; use the release that wrote it")]
    Format {
        /// The store's file.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// The format this code reads.
        expected: u64,
    },
    /// The file belongs to another member of the group.
    #[error(
        "{path} belongs to member {found} of the group, this is member {expected}; check node id and data directory"
    )]
    OtherMember {
        /// The store's file.
        path: PathBuf,
        /// The member that wrote it.
        found: u64,
        /// The member that opens it.
        expected: u64,
    },
    /// No space left.
    #[error("the disk of the data directory is full; free some space and restart the coordinator")]
    DiskFull,
    /// The disk failed in another way.
    #[error("the store's disk failed: {0}; check the disk and restart the coordinator")]
    Disk(String),
    /// A setting makes no sense.
    #[error("the Raft settings are unusable: {0}")]
    Config(String),
    /// This member does not lead, and knows no leader that would take the proposal.
    #[error("no leader takes the proposal at the moment; try again shortly")]
    NoLeader,
    /// Only the leader can do that.
    #[error("this member does not lead; ask member {leader_id} (0: unknown at the moment)")]
    NotLeader {
        /// The leader's id, 0 if unknown.
        leader_id: u64,
    },
    /// The membership cannot be changed like that.
    #[error(transparent)]
    Membership(#[from] MembershipRefused),
    /// This member was removed from the group.
    #[error("this member was removed from the group; to come back it needs a new id and an empty data directory")]
    Removed,
    /// A snapshot or backup was not taken.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Too many proposals wait. Nothing was logged.
    #[error("the store has {limit} proposals waiting; try again shortly")]
    Overloaded {
        /// Most proposals that may wait.
        limit: usize,
    },
    /// The answer did not come in time. The command may still be applied; repeating it is safe.
    #[error("the proposal was not committed within {timeout_ms} ms; it may still be, and repeating it is safe")]
    Timeout {
        /// How long it was waited for, in milliseconds.
        timeout_ms: u64,
    },
    /// Leadership changed while the command was under way. It may still be applied; repeating it is safe.
    #[error("the leader changed before the proposal was committed; it may still be, and repeating it is safe")]
    LeaderChanged,
    /// The state machine refused the command. Nothing changed.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The store stopped after an earlier failure, or a bug.
    #[error("the store has stopped: {0}")]
    Stopped(String),
}

impl RaftStoreError {
    pub(crate) fn from_io(error: &std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::StorageFull {
            Self::DiskFull
        } else {
            Self::Disk(error.to_string())
        }
    }

    /// What raft-rs passes on: its own errors, and those of the store below it, which keep their kind.
    pub(crate) fn from_raft(error: raft::Error) -> Self {
        match error {
            raft::Error::Store(raft::StorageError::Other(other)) => match other.downcast::<Self>() {
                Ok(own) => *own,
                Err(other) => Self::Stopped(other.to_string()),
            },
            other => Self::Stopped(other.to_string()),
        }
    }

    /// An error of [`redb::Database`]'s opening, which alone can tell of the file as a whole.
    pub(crate) fn from_open(error: DatabaseError, path: &std::path::Path) -> Self {
        let corrupt = |reason: String| Self::Corrupt {
            path: path.into(),
            reason,
        };
        match error {
            DatabaseError::DatabaseAlreadyOpen => Self::Locked { path: path.into() },
            DatabaseError::Storage(StorageError::Io(error)) => match error.kind() {
                // redb's word for "this is not one of my files", and for one that ends too early.
                std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof => corrupt(error.to_string()),
                _ => Self::from_io(&error),
            },
            DatabaseError::Storage(StorageError::Corrupted(reason)) => corrupt(reason),
            other => corrupt(other.to_string()),
        }
    }
}

impl From<StorageError> for RaftStoreError {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::Io(error) => Self::from_io(&error),
            other => Self::Disk(other.to_string()),
        }
    }
}

impl From<TableError> for RaftStoreError {
    fn from(error: TableError) -> Self {
        match error {
            TableError::Storage(error) => error.into(),
            other => Self::Disk(other.to_string()),
        }
    }
}

impl From<TransactionError> for RaftStoreError {
    fn from(error: TransactionError) -> Self {
        match error {
            TransactionError::Storage(error) => error.into(),
            other => Self::Disk(other.to_string()),
        }
    }
}

impl From<CommitError> for RaftStoreError {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Storage(error) => error.into(),
            other => Self::Disk(other.to_string()),
        }
    }
}

impl From<SetDurabilityError> for RaftStoreError {
    fn from(error: SetDurabilityError) -> Self {
        Self::Disk(error.to_string())
    }
}

impl From<TablesError> for RaftStoreError {
    fn from(error: TablesError) -> Self {
        match error {
            TablesError::Full => Self::DiskFull,
            TablesError::Medium(reason) => Self::Disk(reason),
            TablesError::Corrupt(reason) => Self::Stopped(reason),
        }
    }
}

/// raft-rs wants its own error from a `Storage`; `from_raft` takes ours out again.
impl From<RaftStoreError> for raft::Error {
    fn from(error: RaftStoreError) -> Self {
        Self::Store(raft::StorageError::Other(Box::new(error)))
    }
}
