//! What a batch writes: lines gather here until a step tells the group of them. Chunks of a file grow before there are more
//! of them, so that a slow batch does not leave thousands; the last one is kept in memory for that.

use baton_proto::state::{BatchAppend, BatchOutput, FileChunk};
use baton_state::bounds::CHUNK_BYTES_MAX;
use bytes::{Bytes, BytesMut};
use serde_json::{Value, json};

use crate::files::{ChunkError, ChunkStore};

/// A chunk grows up to this; the state machine's rule.
const GROWS_TO: u64 = CHUNK_BYTES_MAX / 4;

/// The end of one file that is being written.
pub(super) struct Tail {
    /// The last chunk, if it may still grow.
    last: Bytes,
    /// Lines that no step has told of.
    fresh: BytesMut,
}

/// A chunk that is kept, and what the tail is once a step has told of it.
pub(super) struct Appended {
    pub append: BatchAppend,
    last: Bytes,
}

impl Tail {
    /// As whoever ran the batch before has left it.
    pub async fn of(
        output: Option<&BatchOutput>,
        hash: Option<FileChunk>,
        chunks: &dyn ChunkStore,
    ) -> Result<Self, ChunkError> {
        let mut last = Bytes::new();
        if let (Some(output), Some(chunk)) = (output, hash)
            && output.chunks > 0
            && output.last_bytes < GROWS_TO
        {
            let hash = chunk.hash.as_ref().try_into().map_err(|_| ChunkError::Missing)?;
            last = chunks.get(hash).await?;
        }
        Ok(Self {
            last,
            fresh: BytesMut::new(),
        })
    }

    pub fn push(&mut self, line: &Value) {
        self.fresh.extend_from_slice(line.to_string().as_bytes());
        self.fresh.extend_from_slice(b"\n");
    }

    pub fn fresh_bytes(&self) -> usize {
        self.fresh.len()
    }

    /// Keeps what is new. It counts once a step has told of it; until then this may be called again, with the same result.
    pub async fn keep(&self, chunks: &dyn ChunkStore) -> Result<Option<Appended>, ChunkError> {
        if self.fresh.is_empty() {
            return Ok(None);
        }
        let merged = (self.last.len() + self.fresh.len()) as u64;
        let replaces_last = !self.last.is_empty() && merged <= GROWS_TO;
        let data: Bytes = if replaces_last {
            [&self.last[..], &self.fresh].concat().into()
        } else {
            self.fresh.clone().freeze()
        };
        let bytes = data.len() as u64;
        let hash = chunks.put(data.clone()).await?;
        let chunk = FileChunk {
            hash: hash.to_vec().into(),
            bytes,
        };
        Ok(Some(Appended {
            append: BatchAppend {
                chunk: Some(chunk),
                replaces_last,
            },
            last: if bytes < GROWS_TO { data } else { Bytes::new() },
        }))
    }

    /// A step has told of it.
    pub fn told(&mut self, appended: Option<Appended>) {
        if let Some(appended) = appended {
            self.last = appended.last;
            self.fresh.clear();
        }
    }
}

/// A line of the output or error file, as OpenAI's.
pub(super) fn answered(id: &str, custom_id: &str, status: u16, request_id: &str, body: &Value) -> Value {
    json!({
        "id": id,
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": null,
    })
}

/// A line that was not answered.
pub(super) fn unanswered(id: &str, custom_id: &str, code: &str, message: &str) -> Value {
    json!({"id": id, "custom_id": custom_id, "response": null, "error": {"code": code, "message": message}})
}
