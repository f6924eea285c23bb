//! The one redb file: its tables, how it is opened, and the two kinds of transactions on it. Knows nothing of what the
//! tables mean.
//!
//! Durability: what Raft must not forget (log entries, term, vote) is committed with an fsync. What can be computed
//! again from the log (the applied tables) is committed without one and reaches the disk with the next; after a crash
//! the tables are found as of an earlier applied index, and the log brings them forward.

use crate::RaftStoreError;
use redb::{Database, Durability, ReadTransaction, ReadableDatabase, TableDefinition, WriteTransaction};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Log index to Raft entry (protobuf).
pub(crate) const LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("log");
/// Single values, under the names of [`meta`].
pub(crate) const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
/// A table of keys and values as the state machine has them.
pub(crate) type StateTable = TableDefinition<'static, &'static [u8], &'static [u8]>;
/// The state machine's tables (see `baton_state::keys`), by [`segment`](crate::tables::segment): rows, request ids, all
/// others. Rows and request ids come in the order of their keys. What is appended to the end of a redb table fills its pages;
/// what is inserted between others splits them, and leaves each half empty.
pub(crate) const STATE: [StateTable; 3] = [
    TableDefinition::new("state"),
    TableDefinition::new("rows"),
    TableDefinition::new("requests"),
];

/// A snapshot that is being received, before it takes the place of [`STATE`].
pub(crate) const STAGING: [StateTable; 3] = [
    TableDefinition::new("staging"),
    TableDefinition::new("staging_rows"),
    TableDefinition::new("staging_requests"),
];

/// Keys of [`META`].
pub(crate) mod meta {
    pub(crate) const FORMAT: &str = "format";
    pub(crate) const NODE_ID: &str = "node_id";
    pub(crate) const HARD_STATE: &str = "hard_state";
    pub(crate) const CONF_STATE: &str = "conf_state";
    /// Index and term of the last entry deleted from the log.
    pub(crate) const TRUNCATED: &str = "truncated";
    pub(crate) const APPLIED: &str = "applied";
}

/// Format of the file; raised when older code would misread it.
pub(crate) const FORMAT: u64 = 4;
/// Page cache of the store in bytes: the working set is the log's tail, the ends of two trees and the upper pages of a
/// third. What is not in it is mostly in the kernel's.
const CACHE_BYTES: usize = 8 << 20;

/// The open file. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Store {
    database: Arc<Database>,
    path: PathBuf,
}

impl Store {
    /// Opens or creates `path`. It is created under another name and renamed, so that a loss of power meanwhile leaves no
    /// file that is neither empty nor a store.
    pub(crate) fn open(path: &Path) -> Result<Self, RaftStoreError> {
        if !path.try_exists().map_err(|error| RaftStoreError::from_io(&error))? {
            create(path)?;
        }
        let database = contain_panic(path, || {
            let mut builder = Database::builder();
            builder.set_cache_size(CACHE_BYTES);
            builder
                .create(path)
                .map_err(|error| RaftStoreError::from_open(error, path))
        })?;
        Ok(Self {
            database: Arc::new(database),
            path: path.into(),
        })
    }

    /// A store on another medium, for tests.
    #[cfg(test)]
    pub(crate) fn on(backend: impl redb::StorageBackend) -> Result<Self, RaftStoreError> {
        let path = Path::new("(memory)");
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create_with_backend(backend)
            .map_err(|error| RaftStoreError::from_open(error, path))?;
        Ok(Self {
            database: Arc::new(database),
            path: path.into(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn read(&self) -> Result<ReadTransaction, RaftStoreError> {
        Ok(self.database.begin_read()?)
    }

    /// A transaction that is on disk once committed.
    pub(crate) fn write_durable(&self) -> Result<WriteTransaction, RaftStoreError> {
        Ok(self.database.begin_write()?)
    }

    /// A transaction that is visible once committed, and on disk with the next durable one.
    pub(crate) fn write_derived(&self) -> Result<WriteTransaction, RaftStoreError> {
        let mut txn = self.database.begin_write()?;
        txn.set_durability(Durability::None)?;
        Ok(txn)
    }

    pub(crate) fn corrupt(&self, reason: impl Into<String>) -> RaftStoreError {
        RaftStoreError::Corrupt {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }
}

/// Name's end of a file that is being created.
const NEW_SUFFIX: &str = "new";

fn create(path: &Path) -> Result<(), RaftStoreError> {
    let io = |error: std::io::Error| RaftStoreError::from_io(&error);
    let new = path.with_extension(NEW_SUFFIX);
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
        // An earlier start was cut short.
        _ => {}
    }
    drop(Database::create(&new).map_err(|error| RaftStoreError::from_open(error, &new))?);
    std::fs::File::open(&new).and_then(|file| file.sync_all()).map_err(io)?;
    std::fs::rename(&new, path).map_err(io)?;
    // The new name, too, must survive.
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => {
            std::fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(io)
        }
        _ => Ok(()),
    }
}

/// Runs `open` and turns a panic into an error: a damaged page can trip an assertion inside the library.
pub(crate) fn contain_panic<T>(
    path: &Path,
    open: impl FnOnce() -> Result<T, RaftStoreError>,
) -> Result<T, RaftStoreError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(open)).unwrap_or_else(|panic| {
        Err(RaftStoreError::Corrupt {
            path: path.into(),
            reason: panic_text(&*panic),
        })
    })
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "unknown".to_owned())
}

/// Reads a little-endian number.
pub(crate) fn number(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}
