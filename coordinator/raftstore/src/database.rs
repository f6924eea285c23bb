//! The two redb files of a member: their tables, how they are opened, and the kinds of transactions on them. Knows nothing of
//! what the tables mean.
//!
//! | file | holds | written |
//! |---|---|---|
//! | `raft.redb` | log, term, vote, commit index: what Raft must not forget | with one fsync per batch |
//! | `state.redb` | the applied tables, up to an index, and the membership at it | by a flush, every some thousand entries |
//!
//! The log is the truth. The state's file is always what the log up to its applied index makes of it, because each of its
//! transactions holds index, membership and tables together, and because the log is deleted only up to that index. What was
//! applied since is in memory ([`overlay`](crate::overlay)), and a start computes it again from the log. Both files have the same
//! id, so that one of another member, or of another life, is not taken.
//!
//! After a crash redb walks a file, unless its last commit has saved which pages are free ("quick repair", a second fsync). Commits of the
//! state do, which may be large and is written seldom; those of the log do not, which is small and is what callers wait for.

use crate::RaftStoreError;
use crate::overlay::Overlay;
use redb::{Database, Durability, ReadTransaction, ReadableDatabase, TableDefinition, WriteTransaction};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Name of the log's file inside the data directory.
pub(crate) const LOG_FILE_NAME: &str = "raft.redb";
/// Name of the state's file.
pub(crate) const STATE_FILE_NAME: &str = "state.redb";

/// Log index to Raft entry (protobuf), in the log's file.
pub(crate) const LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("log");
/// Single values, under the names of [`meta`], in both files.
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
    /// Both files.
    pub(crate) const FORMAT: &str = "format";
    /// Both files: drawn when the store was founded.
    pub(crate) const STORE_ID: &str = "store_id";
    pub(crate) const NODE_ID: &str = "node_id";
    pub(crate) const HARD_STATE: &str = "hard_state";
    /// Index and term of the last entry deleted from the log.
    pub(crate) const TRUNCATED: &str = "truncated";
    /// The state's file: index and term of the last entry in it.
    pub(crate) const APPLIED: &str = "applied";
    /// The state's file: the membership at that index.
    pub(crate) const CONF_STATE: &str = "conf_state";
    /// The state's file: index of the snapshot it is, as long as nothing was flushed into it. Its log may still be older.
    pub(crate) const INSTALLED: &str = "installed";
}

/// Format of the files; raised when older code would misread them.
pub(crate) const FORMAT: u64 = 5;
/// Page cache of the state's file in bytes: the working set of a flush is the ends of two trees and the upper pages of a third.
/// What is not in it is mostly in the kernel's.
const STATE_CACHE_BYTES: usize = 8 << 20;
/// Page cache of the log's file: its end, and the upper pages. What is applied and sent is kept decoded besides.
const LOG_CACHE_BYTES: usize = 2 << 20;

/// The open files. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Store {
    log: Arc<Database>,
    state: Arc<Database>,
    overlay: Arc<Overlay>,
    /// Why the disk refused what another than the node wrote: nothing if it is full, else the words of the error.
    failed: Arc<OnceLock<Option<String>>>,
    path: PathBuf,
}

/// Two files in a place of their own: a test's disk.
#[cfg(test)]
pub(crate) trait Medium {
    type File: redb::StorageBackend;

    /// The log's is 0, the state's 1.
    fn file(&self, which: usize) -> Self::File;
}

impl Store {
    /// Opens or creates the files in `dir`.
    pub(crate) fn open(dir: &Path) -> Result<Self, RaftStoreError> {
        Self::open_files(&dir.join(LOG_FILE_NAME), &dir.join(STATE_FILE_NAME))
    }

    /// Opens or creates the files. Each is created under another name and renamed, so that a loss of power meanwhile leaves no
    /// file that is neither empty nor a store; the log's is there first, and empty as long as there is no state's.
    pub(crate) fn open_files(log_path: &Path, state_path: &Path) -> Result<Self, RaftStoreError> {
        let there = |path: &Path| path.try_exists().map_err(|error| RaftStoreError::from_io(&error));
        let (log_there, state_there) = (there(log_path)?, there(state_path)?);
        if state_there && !log_there {
            let reason = format!("{} belongs to it and is there", state_path.display());
            return Err(missing(log_path, &reason));
        }
        if !log_there {
            create(log_path)?;
        }
        let log = open(log_path, LOG_CACHE_BYTES)?;
        if !state_there {
            let format = founded_with(&log)?;
            match format {
                None => create(state_path)?,
                Some(FORMAT) => {
                    let reason = format!("{} belongs to it and is there", log_path.display());
                    return Err(missing(state_path, &reason));
                }
                // Everything was in one file.
                Some(found) => {
                    return Err(RaftStoreError::Format {
                        path: log_path.into(),
                        found,
                        expected: FORMAT,
                    });
                }
            }
        }
        let state = open(state_path, STATE_CACHE_BYTES)?;
        Ok(Self::of(log, state, log_path))
    }

    fn of(log: Database, state: Database, path: &Path) -> Self {
        Self {
            log: Arc::new(log),
            state: Arc::new(state),
            overlay: Arc::default(),
            failed: Arc::default(),
            path: path.into(),
        }
    }

    /// A store on another medium, for tests.
    #[cfg(test)]
    pub(crate) fn on(medium: impl Medium) -> Result<Self, RaftStoreError> {
        let path = Path::new("(memory)");
        let open = |which, cache| {
            Database::builder()
                .set_cache_size(cache)
                .create_with_backend(medium.file(which))
                .map_err(|error| RaftStoreError::from_open(error, path))
        };
        Ok(Self::of(open(0, LOG_CACHE_BYTES)?, open(1, STATE_CACHE_BYTES)?, path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What was applied and is not in the state's file yet.
    pub(crate) fn overlay(&self) -> &Overlay {
        &self.overlay
    }

    /// Notes a failure of the disk in `result`. The files take nothing more after one, and whoever met it may only drop what it
    /// did: the node is told by [`check`](Self::check), so that the member stops and does not live on without ever writing.
    pub(crate) fn noted<T>(&self, result: Result<T, RaftStoreError>) -> Result<T, RaftStoreError> {
        let why = match &result {
            Err(RaftStoreError::DiskFull) => None,
            Err(RaftStoreError::Disk(why)) => Some(why.clone()),
            _ => return result,
        };
        let _ = self.failed.set(why);
        result
    }

    /// Fails if [`noted`](Self::noted) saw a failure.
    pub(crate) fn check(&self) -> Result<(), RaftStoreError> {
        match self.failed.get() {
            None => Ok(()),
            Some(None) => Err(RaftStoreError::DiskFull),
            Some(Some(why)) => Err(RaftStoreError::Disk(why.clone())),
        }
    }

    /// A version of the log's file.
    pub(crate) fn read(&self) -> Result<ReadTransaction, RaftStoreError> {
        Ok(self.log.begin_read()?)
    }

    /// A transaction on the log's file that is on disk once committed.
    pub(crate) fn write_durable(&self) -> Result<WriteTransaction, RaftStoreError> {
        Ok(self.log.begin_write()?)
    }

    /// A transaction on the log's file that is visible once committed, and on disk with the next durable one.
    pub(crate) fn write_derived(&self) -> Result<WriteTransaction, RaftStoreError> {
        let mut txn = self.log.begin_write()?;
        txn.set_durability(Durability::None)?;
        Ok(txn)
    }

    /// A version of the state's file, which lacks what is in the overlay.
    pub(crate) fn read_state(&self) -> Result<ReadTransaction, RaftStoreError> {
        Ok(self.state.begin_read()?)
    }

    /// A transaction on the state's file that is on disk once committed, with what spares a start the walk over the file.
    pub(crate) fn write_state_durable(&self) -> Result<WriteTransaction, RaftStoreError> {
        let mut txn = self.state.begin_write()?;
        txn.set_quick_repair(true);
        Ok(txn)
    }

    /// A transaction on the state's file that is on disk with the next durable one.
    pub(crate) fn write_state_derived(&self) -> Result<WriteTransaction, RaftStoreError> {
        let mut txn = self.state.begin_write()?;
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

fn missing(path: &Path, reason: &str) -> RaftStoreError {
    RaftStoreError::Corrupt {
        path: path.into(),
        reason: format!("the file is missing, while {reason}"),
    }
}

/// The format of a file that holds a store.
fn founded_with(database: &Database) -> Result<Option<u64>, RaftStoreError> {
    let txn = database.begin_read()?;
    match txn.open_table(META) {
        Ok(table) => Ok(table.get(meta::FORMAT)?.and_then(|value| number(value.value()))),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn open(path: &Path, cache_bytes: usize) -> Result<Database, RaftStoreError> {
    contain_panic(path, || {
        let mut builder = Database::builder();
        builder.set_cache_size(cache_bytes);
        builder
            .create(path)
            .map_err(|error| RaftStoreError::from_open(error, path))
    })
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

/// Reads two of them: an index and its term.
pub(crate) fn pair(bytes: &[u8]) -> Option<(u64, u64)> {
    let (a, b) = bytes.split_at_checked(8)?;
    Some((number(a)?, number(b)?))
}

/// The bytes of an index and its term.
pub(crate) fn pair_bytes((index, term): (u64, u64)) -> Vec<u8> {
    [index.to_le_bytes(), term.to_le_bytes()].concat()
}
