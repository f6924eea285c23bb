//! A run of the state's pairs, numbered and hashed, and the two ends' bookkeeping over a stream of them.

use super::SnapshotError;

/// Bytes of keys and values in a chunk, from which on it is full: small beside a gRPC message's limit, large beside its cost.
pub(super) const CHUNK_BYTES: usize = 1 << 20;
/// Largest encoded chunk that is taken: a full chunk, the largest pair on top, and the encoding's own bytes.
pub const CHUNK_MESSAGE_BYTES_MAX: usize = 4 << 20;

/// A key and its value. Field numbers are part of the wire contract between members, and of the format of backups.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SnapshotPair {
    /// The key.
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// Its value.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// A run of pairs in the order of their keys. A protobuf message: `encode_to_vec` and `decode` of [`prost::Message`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SnapshotChunk {
    /// 1, 2, 3, ...
    #[prost(uint64, tag = "1")]
    pub number: u64,
    /// The pairs; none only in the last chunk of an empty state.
    #[prost(message, repeated, tag = "2")]
    pub pairs: Vec<SnapshotPair>,
    /// BLAKE3 over all pairs up to and with this chunk.
    #[prost(bytes = "vec", tag = "3")]
    pub hash: Vec<u8>,
    /// Pairs up to and with this chunk.
    #[prost(uint64, tag = "4")]
    pub pairs_total: u64,
    /// No chunk follows.
    #[prost(bool, tag = "5")]
    pub last: bool,
}

/// Hash and counts over a stream of chunks, the same on both ends.
#[derive(Debug, Clone)]
pub(super) struct Tally {
    hasher: blake3::Hasher,
    pub(super) chunks: u64,
    pub(super) pairs: u64,
    last_key: Option<Vec<u8>>,
    pub(super) ended: bool,
}

impl Tally {
    /// Of a stream of the state at `index`.
    pub(super) fn new(index: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&index.to_le_bytes());
        Self {
            hasher,
            chunks: 0,
            pairs: 0,
            last_key: None,
            ended: false,
        }
    }

    fn count(&mut self, pairs: &[SnapshotPair]) {
        for pair in pairs {
            for part in [&pair.key, &pair.value] {
                self.hasher.update(&(part.len() as u64).to_le_bytes());
                self.hasher.update(part);
            }
        }
        self.chunks += 1;
        self.pairs += pairs.len() as u64;
        if let Some(last) = pairs.last() {
            self.last_key = Some(last.key.clone());
        }
    }

    pub(super) fn hash(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }

    pub(super) fn last_key(&self) -> Option<&[u8]> {
        self.last_key.as_deref()
    }

    /// Makes the next chunk.
    pub(super) fn seal(&mut self, pairs: Vec<SnapshotPair>, last: bool) -> SnapshotChunk {
        self.count(&pairs);
        self.ended = last;
        SnapshotChunk {
            number: self.chunks,
            pairs,
            hash: self.hash().to_vec(),
            pairs_total: self.pairs,
            last,
        }
    }

    /// Checks a chunk that came.
    pub(super) fn check(&mut self, chunk: &SnapshotChunk) -> Result<(), SnapshotError> {
        if planted!(ChunksUnchecked) {
            self.ended |= chunk.last;
            return Ok(());
        }
        if self.ended || chunk.number != self.chunks + 1 {
            return Err(SnapshotError::Damaged("a chunk is missing or came twice"));
        }
        let mut before = self.last_key.as_deref();
        for pair in &chunk.pairs {
            if before.is_some_and(|before| before >= pair.key.as_slice()) {
                return Err(SnapshotError::Damaged("its keys are out of order"));
            }
            before = Some(&pair.key);
        }
        self.count(&chunk.pairs);
        self.ended = chunk.last;
        if chunk.pairs_total != self.pairs || chunk.hash != self.hash() {
            return Err(SnapshotError::Damaged("its contents are not what was hashed"));
        }
        Ok(())
    }
}
