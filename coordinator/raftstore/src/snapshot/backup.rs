//! The state in a file, and a new group from it.
//!
//! ```text
//!   magic (8 bytes) · version (u32) · length (u32) · Header · { length (u32) · SnapshotChunk } ... · BLAKE3 of all before (32)
//! ```
//!
//! Numbers are little-endian, messages protobuf. The last chunk says so, and carries hash and count of all pairs. A restored
//! group starts at the log index and term of the backup, so that indices in records go on from there.

use super::chunk::Tally;
use super::staging::{CHUNKS_PER_SYNC, write_pairs};
use super::{CHUNK_MESSAGE_BYTES_MAX, SnapshotChunk, SnapshotError, SnapshotSource};
use crate::RaftStoreError;
use crate::database::{LOG_FILE_NAME, STATE, STATE_FILE_NAME, Store};
use crate::founding::{self, Founding};
use crate::tables::StateView;
use baton_state::{keys, view};
use std::hash::{BuildHasher, RandomState};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

const MAGIC: &[u8; 8] = b"BATONBAK";
/// Raised when an older release would misread the file.
const VERSION: u32 = 1;
/// Far above any header; bounds what a damaged length makes us read.
const HEADER_BYTES_MAX: u32 = 4096;
/// Name's end of a file while it is restored.
const PARTIAL: &str = "partial";

#[derive(Clone, PartialEq, prost::Message)]
struct Header {
    #[prost(uint64, tag = "1")]
    applied_index: u64,
    #[prost(uint64, tag = "2")]
    term: u64,
    /// The hash chained over all commands.
    #[prost(bytes = "vec", tag = "3")]
    state_hash: Vec<u8>,
}

/// What a backup holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupInfo {
    /// Log index of the last command in it.
    pub applied_index: u64,
    /// Keys in it.
    pub pairs: u64,
    /// Length of the file.
    pub bytes: u64,
    /// Hash chained over all commands, as [`Position::hash`](crate::Position::hash) at that index.
    pub state_hash: [u8; 32],
    /// BLAKE3 of the file up to its last 32 bytes, which are this.
    pub file_hash: [u8; 32],
    /// The group that it is of; of a restoration, the new group: 16 random bytes. Empty for a group that was founded.
    pub group: Vec<u8>,
}

/// Hashes and counts what goes through.
struct Hashed<T> {
    inner: T,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<T> Hashed<T> {
    fn new(inner: T) -> Self {
        Self {
            inner,
            hasher: blake3::Hasher::new(),
            bytes: 0,
        }
    }

    fn count(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    fn hash(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }
}

impl<T: Write> Hashed<T> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), RaftStoreError> {
        self.count(bytes);
        self.inner
            .write_all(bytes)
            .map_err(|error| RaftStoreError::from_io(&error))
    }

    fn write_message(&mut self, message: &impl prost::Message) -> Result<(), RaftStoreError> {
        let bytes = message.encode_to_vec();
        let length = u32::try_from(bytes.len()).map_err(|_| RaftStoreError::Stopped("a chunk is too long".into()))?;
        self.write(&length.to_le_bytes())?;
        self.write(&bytes)
    }
}

impl<T: Read> Hashed<T> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<(), RaftStoreError> {
        self.inner.read_exact(buffer).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => SnapshotError::DamagedBackup("it ends early").into(),
            _ => RaftStoreError::from_io(&error),
        })?;
        self.count(buffer);
        Ok(())
    }

    fn read_number(&mut self) -> Result<u32, RaftStoreError> {
        let mut bytes = [0; 4];
        self.read(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn read_message<M: prost::Message + Default>(&mut self, bytes_max: u32) -> Result<M, RaftStoreError> {
        let length = self.read_number()?;
        if length > bytes_max {
            return Err(SnapshotError::DamagedBackup("a length in it makes no sense").into());
        }
        let mut bytes = vec![0; length as usize];
        self.read(&mut bytes)?;
        M::decode(bytes.as_slice()).map_err(|_| SnapshotError::DamagedBackup("a part of it cannot be decoded").into())
    }
}

/// A backup that is being written: one version of the state, whatever the store does meanwhile.
pub(crate) struct Saving<W> {
    source: SnapshotSource,
    out: Hashed<W>,
    state_hash: [u8; 32],
    group: Vec<u8>,
    #[cfg(test)]
    store: Store,
}

impl<W: Write> Saving<W> {
    /// Of the newest version; writes what comes before its pairs.
    pub(crate) fn begin(store: &Store, to: W) -> Result<Self, RaftStoreError> {
        let source = SnapshotSource::open(store)?;
        let (state_hash, group) = (view::hash(source.state())?, view::group(source.state())?);
        let header = Header {
            applied_index: source.index(),
            term: source.term(),
            state_hash: state_hash.to_vec(),
        };
        let mut out = Hashed::new(to);
        out.write(MAGIC)?;
        out.write(&VERSION.to_le_bytes())?;
        out.write_message(&header)?;
        Ok(Self {
            source,
            out,
            state_hash,
            group,
            #[cfg(test)]
            store: store.clone(),
        })
    }

    /// Writes a chunk; false after the last one.
    pub(crate) fn step(&mut self) -> Result<bool, RaftStoreError> {
        #[cfg(test)]
        if planted!(BackupOfTwoVersions) {
            self.source.look_again(&self.store)?;
        }
        let Some(chunk) = self.source.next_chunk()? else {
            return Ok(false);
        };
        self.out.write_message(&chunk)?;
        Ok(true)
    }

    /// Writes the end, flushes, and gives back what was written to.
    pub(crate) fn finish(mut self) -> Result<(BackupInfo, W), RaftStoreError> {
        let file_hash = self.out.hash();
        self.out.write(&file_hash)?;
        let flushed = self.out.inner.flush();
        flushed.map_err(|error| RaftStoreError::from_io(&error))?;
        let info = BackupInfo {
            applied_index: self.source.index(),
            pairs: self.source.progress().0,
            bytes: self.out.bytes,
            state_hash: self.state_hash,
            file_hash,
            group: self.group,
        };
        Ok((info, self.out.inner))
    }

    /// For tests: smaller chunks.
    #[cfg(test)]
    pub(crate) fn set_chunk_bytes(&mut self, bytes: usize) {
        self.source.chunk_bytes = bytes;
    }
}

/// Writes one version of the state to `to`, and flushes it.
pub(crate) fn save(store: &Store, to: &mut dyn Write) -> Result<BackupInfo, RaftStoreError> {
    let mut saving = Saving::begin(store, to)?;
    while saving.step()? {}
    Ok(saving.finish()?.0)
}

/// Restores a backup into `dir`, which must hold no store, as a group whose only member is `node_id`; others join it. Blocks
/// on the disk. The store appears only when everything was read, checked and made durable. The new group has a new identity, so
/// that coordinators refuse members of the old one. Those should not run any more: the two know different histories.
pub fn restore(from: &mut dyn Read, dir: &Path, node_id: u64) -> Result<BackupInfo, RaftStoreError> {
    if node_id == 0 {
        return Err(RaftStoreError::Config("node ids must not be 0".into()));
    }
    let io = |error: std::io::Error| RaftStoreError::from_io(&error);
    std::fs::create_dir_all(dir).map_err(io)?;
    let paths = [LOG_FILE_NAME, STATE_FILE_NAME].map(|name| dir.join(name));
    if let Some(path) = paths.iter().find(|path| path.exists()) {
        return Err(SnapshotError::NotEmpty(path.clone()).into());
    }
    let partial = paths.clone().map(|path| path.with_added_extension(PARTIAL));
    // Left by a restoration that was cut off.
    for path in &partial {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
    }
    let [log, state] = &partial;
    let restored = Store::open_files(log, state).and_then(|store| read_into(from, &store, node_id, &new_group()));
    let finished = restored.and_then(|info| {
        // A store that lacks one of its files is refused.
        for (partial, path) in partial.iter().zip(&paths) {
            std::fs::rename(partial, path).map_err(io)?;
        }
        std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(io)?;
        Ok(info)
    });
    if finished.is_err() {
        for path in &partial {
            let _ = std::fs::remove_file(path);
        }
    }
    finished
}

/// Restores a backup into an empty store, durably. With the name of a new group; without one (empty) it stays the group that it is of.
pub(crate) fn read_into(
    from: &mut dyn Read,
    store: &Store,
    node_id: u64,
    group: &[u8],
) -> Result<BackupInfo, RaftStoreError> {
    let mut from = Hashed::new(from);
    let mut magic = [0; 8];
    from.read(&mut magic)
        .map_err(|_| SnapshotError::NotABackup("it is too short"))?;
    if magic != *MAGIC {
        return Err(SnapshotError::NotABackup("it starts with other bytes").into());
    }
    if from.read_number()? != VERSION {
        return Err(SnapshotError::NotABackup("its version is another one").into());
    }
    let header: Header = from.read_message(HEADER_BYTES_MAX)?;
    let mut tally = Tally::new(header.applied_index);
    while !tally.ended {
        let chunk: SnapshotChunk = from.read_message(CHUNK_MESSAGE_BYTES_MAX as u32)?;
        tally
            .check(&chunk)
            .map_err(|_| SnapshotError::DamagedBackup("its contents are not what was hashed"))?;
        let txn = if chunk.number.is_multiple_of(CHUNKS_PER_SYNC) {
            store.write_state_durable()?
        } else {
            store.write_state_derived()?
        };
        write_pairs(&txn, STATE, &chunk)?;
        txn.commit()?;
    }
    let file_hash = from.hash();
    let mut trailer = [0; 32];
    from.read(&mut trailer)?;
    if trailer != file_hash {
        return Err(SnapshotError::DamagedBackup("its hash is another one").into());
    }
    if !matches!(from.inner.read(&mut [0]), Ok(0)) {
        return Err(SnapshotError::DamagedBackup("something follows its end").into());
    }
    let txn = store.write_state_durable()?;
    for table in STATE {
        txn.open_table(table)?;
    }
    let founding = Founding {
        node_id,
        voters: vec![node_id],
        at: (header.applied_index, header.term),
    };
    let store_id = RandomState::new().hash_one(std::process::id());
    founding::write_state(&txn, &founding, store_id)?;
    if !group.is_empty() {
        txn.open_table(STATE[0])?.insert(keys::GROUP, group)?;
    }
    txn.commit()?;
    founding::write_log(store, &founding, store_id)?;
    let state_hash = view::hash(&StateView::open(store)?)?;
    if header.applied_index == 0 || header.term == 0 || header.state_hash != state_hash {
        return Err(SnapshotError::DamagedBackup("its header does not fit its contents").into());
    }
    Ok(BackupInfo {
        applied_index: header.applied_index,
        pairs: tally.pairs,
        bytes: from.bytes,
        state_hash,
        file_hash,
        group: group.to_vec(),
    })
}

/// 16 bytes that no other restoration has: the standard library seeds its hashers from the system's random numbers.
fn new_group() -> [u8; 16] {
    let random = || RandomState::new().hash_one(0u8).to_le_bytes();
    let (first, second) = (random(), random());
    std::array::from_fn(|at| if at < 8 { first[at] } else { second[at - 8] })
}
