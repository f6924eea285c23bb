//! Chunks in memory, as a member with a disk that may be full.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use baton_gateway::{ChunkError, ChunkHash, ChunkStore, Chunked};
use bytes::Bytes;

#[derive(Default)]
pub struct MemoryChunks {
    pub kept: Mutex<HashMap<ChunkHash, Bytes>>,
    pub full: AtomicBool,
}

impl ChunkStore for MemoryChunks {
    fn put(&self, data: Bytes) -> Chunked<'_, ChunkHash> {
        Box::pin(async move {
            assert!((1..=4 << 20).contains(&data.len()), "{} bytes", data.len());
            if self.full.load(Ordering::SeqCst) {
                return Err(ChunkError::Unavailable("the disk is full".into()));
            }
            let hash = *blake3::hash(&data).as_bytes();
            self.kept.lock().unwrap().insert(hash, data);
            Ok(hash)
        })
    }

    fn get(&self, hash: ChunkHash) -> Chunked<'_, Bytes> {
        let found = self.kept.lock().unwrap().get(&hash).cloned();
        Box::pin(async move { found.ok_or(ChunkError::Missing) })
    }
}
