//! Where the contents of uploaded files lie: as chunks, named by their hash, in each coordinator's data directory. An operator
//! needs nothing beside the coordinators, and a group of three loses no more of its files with a member than of its ledger.
//!
//! ```text
//!  gateway ── put ─▶ this member's disk, and Files.Put at the others ─▶ Ok once a majority has it on disk
//!  gateway ── get ─▶ this member's disk, else Files.Get at the others
//!  keeper:  what the state names and is not here is fetched; what is here, named by nobody for an hour, goes
//! ```
//!
//! Invariants: a chunk is read only if its bytes have its name; nothing is acknowledged before it is durable on a majority; a
//! chunk that an upload under way will name is not swept, because an upload may take less time than a chunk is kept.
//!
//! Deliberately not here: what a file is and whose (`baton-state`, the gateway). A backup of the state has no contents.

mod disk;
mod keeper;
mod peers;
mod service;

pub(crate) use disk::Disk;
pub(crate) use service::{FilesService, MESSAGE_BYTES_MAX as CHUNK_MESSAGE_BYTES_MAX};

use std::sync::Arc;
use std::time::Duration;

use baton_gateway::{ChunkError, ChunkHash, ChunkStore, Chunked};
use baton_raftstore::RaftStore;
use bytes::Bytes;
use tokio::task::JoinSet;

use crate::group::Group;
use peers::Peers;

/// Largest chunk, in bytes; the state's bound.
const CHUNK_BYTES_MAX: usize = baton_state::bounds::CHUNK_BYTES_MAX as usize;
/// Longest time for one chunk at one other member: 4 MiB over a slow network, and its fsync.
const PEER_MAX: Duration = Duration::from_secs(20);

/// This member's chunks, and its way to those of the others.
pub(crate) struct MemberChunks {
    disk: Arc<Disk>,
    peers: Arc<Peers>,
    group: Arc<Group>,
    store: RaftStore,
}

impl MemberChunks {
    pub(crate) fn new(disk: Arc<Disk>, group: Arc<Group>, store: RaftStore) -> Arc<Self> {
        Arc::new(Self {
            disk,
            peers: Arc::new(Peers::new(group.clone())),
            group,
            store,
        })
    }

    /// Work on the disk.
    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Disk) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, ChunkError> {
        let disk = self.disk.clone();
        let done = tokio::task::spawn_blocking(move || work(&disk)).await;
        let failed = |error: String| ChunkError::Unavailable(format!("the disk of this coordinator: {error}"));
        done.map_err(|error| failed(error.to_string()))?
            .map_err(|error| failed(error.to_string()))
    }

    async fn keep(&self, data: Bytes) -> Result<ChunkHash, ChunkError> {
        let voters = self.group.voters();
        // Of the others; a majority together with this one.
        let needed = voters.len() / 2;
        let mut sending = JoinSet::new();
        for id in voters.into_iter().filter(|id| *id != self.group.id()) {
            let (peers, data) = (self.peers.clone(), data.clone());
            sending.spawn(async move {
                let sent = tokio::time::timeout(PEER_MAX, peers.put(id, data)).await;
                sent.unwrap_or_else(|_| Err(format!("member {id} takes too long")))
            });
        }
        let hash = self.on_disk(move |disk| disk.put(&data)).await?;
        let (mut kept, mut reason) = (0, "too few members".to_owned());
        while kept < needed {
            match sending.join_next().await {
                Some(Ok(Ok(()))) => kept += 1,
                Some(Ok(Err(why))) => reason = why,
                Some(Err(error)) => reason = error.to_string(),
                None => return Err(ChunkError::Unavailable(format!("no majority has it: {reason}"))),
            }
        }
        // The slower ones get it all the same.
        sending.detach_all();
        Ok(hash)
    }

    async fn find(&self, hash: ChunkHash) -> Result<Bytes, ChunkError> {
        if let Some(data) = self.on_disk(move |disk| disk.get(&hash)).await? {
            return Ok(data);
        }
        self.fetch(hash).await
    }

    /// From another member, onto this one's disk.
    async fn fetch(&self, hash: ChunkHash) -> Result<Bytes, ChunkError> {
        let (voters, learners) = (self.group.voters(), self.group.learners());
        for id in voters.into_iter().chain(learners).filter(|id| *id != self.group.id()) {
            match tokio::time::timeout(PEER_MAX, self.peers.get(id, hash)).await {
                Ok(Ok(data)) => {
                    let kept = data.clone();
                    self.on_disk(move |disk| disk.put(&kept)).await?;
                    return Ok(data);
                }
                Ok(Err(reason)) => tracing::debug!(member = id, %reason, "a chunk was not had"),
                Err(_) => tracing::debug!(member = id, "a chunk was not had in time"),
            }
        }
        Err(ChunkError::Missing)
    }
}

impl ChunkStore for MemberChunks {
    fn put(&self, data: Bytes) -> Chunked<'_, ChunkHash> {
        Box::pin(self.keep(data))
    }

    fn get(&self, hash: ChunkHash) -> Chunked<'_, Bytes> {
        Box::pin(self.find(hash))
    }
}
