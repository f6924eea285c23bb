//! The seam to where the contents of files lie: chunks, named by their BLAKE3 hash. The coordinator keeps them on the
//! members' disks, tests in memory.

use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;

/// Name of a chunk: the BLAKE3 hash of its bytes.
pub type ChunkHash = [u8; 32];

/// What an operation on chunks comes to.
pub type Chunked<'a, T> = Pin<Box<dyn Future<Output = Result<T, ChunkError>> + Send + 'a>>;

/// Why a chunk was not kept or found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// No member that answers has it.
    #[error("no coordinator that can be reached has this part of the file")]
    Missing,
    /// It could not be kept on enough disks, or the disk here failed.
    #[error("{0}")]
    Unavailable(String),
}

/// Where chunks lie.
pub trait ChunkStore: Send + Sync + 'static {
    /// Keeps a chunk of at most 4 MiB; on `Ok` it survives what the replicated state survives. A chunk that nothing names is
    /// kept for an hour. The implementer bounds the time.
    fn put(&self, data: Bytes) -> Chunked<'_, ChunkHash>;

    /// A chunk, checked against its name. The implementer bounds the time.
    fn get(&self, hash: ChunkHash) -> Chunked<'_, Bytes>;
}
