//! Where responses are kept: as files of the same store that uploads lie in, so that every coordinator finds them and a
//! restart loses none. What names them goes through the group, the bytes lie on the disks of a majority.
//!
//! ```text
//!  resp_X        the response that has ended. Written once: whoever writes it first (the run that ends, a cancel, the
//!                verdict that its coordinator is gone) decides how it ended
//!  resp_X.open   in the background and not ended: what was asked, and which process runs it
//!  run_P.N       process P lives: empty, gone a minute after it was written, written again while P runs something
//! ```
//!
//! Invariants: a response is another project's or it is found; what is over time is not found; at most one `resp_X` is ever
//! written; a project's oldest responses go when it has more than it may.
//!
//! Deliberately not here: what a response is (`object`), who runs it (`background`).

use std::sync::Arc;

use baton_proto::state::{DeleteFile, File, FileChunk, PutFile, command::Kind};
use baton_state::bounds::CHUNK_BYTES_MAX;
use baton_state::view::{self, IdOrder};
use baton_state::{Applied, Refused, Tables};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::config::ResponsesConfig;
use crate::accounts::store::StoreError;
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::clock::unix_ms;
use crate::files::Files;

/// Of the records of running processes.
const RUNNERS: &str = "processes that run responses";
/// How long a process that died counts as alive.
pub(super) const LEASE_MS: u64 = 60_000;
/// Oldest responses that go at once where a project has too many.
const EVICTED_AT_ONCE: usize = 8;
/// Rounds of that for one new response: a large one may take the place of many small ones, but not of any number.
const EVICTIONS_MAX: usize = 16;

/// A stored response.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Stored {
    /// As it is shown.
    pub response: Json,
    /// The conversation up to it: the items that went before, and its input.
    pub items: Vec<Json>,
    /// Its events as they were sent, if it may be streamed again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<Vec<String>>,
    /// Of one that has not ended: the process that runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runner: Option<String>,
}

impl Stored {
    /// The conversation that one which follows it continues.
    pub fn conversation(mut self) -> Vec<Json> {
        if let Json::Array(output) = self.response["output"].take() {
            self.items.extend(output);
        }
        self.items
    }
}

/// What became of a response that was to be kept.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    Yes,
    /// Another one of that name is kept.
    Other,
    /// It is too large, or there is no room.
    No,
}

/// See the module.
pub(crate) struct Store {
    files: Arc<Files>,
    config: ResponsesConfig,
}

/// Whose responses they are: not the owner of the project's files, so that neither is found as the other.
fn owner(caller: &Caller) -> String {
    format!("responses of {}", caller.owner())
}

pub(super) fn open_name(id: &str) -> String {
    format!("{id}.open")
}

impl Store {
    pub fn new(files: Arc<Files>, config: ResponsesConfig) -> Self {
        Self { files, config }
    }

    /// The response that has ended.
    pub async fn ended(&self, caller: &Caller, id: &str) -> Result<Option<Stored>, ApiError> {
        self.read(&owner(caller), id.to_owned()).await
    }

    /// The response that has not ended, as far as is known.
    pub async fn open(&self, caller: &Caller, id: &str) -> Result<Option<Stored>, ApiError> {
        self.read(&owner(caller), open_name(id)).await
    }

    /// Keeps a response that has ended.
    pub async fn keep(&self, caller: &Caller, id: &str, stored: &Stored) -> Result<Kept, ApiError> {
        let expires = unix_ms().saturating_add(self.config.kept_s.saturating_mul(1000));
        self.write(&owner(caller), id.to_owned(), stored, expires).await
    }

    /// Keeps what is known of a response that begins. It goes some time after the run must be over.
    pub async fn keep_open(&self, caller: &Caller, id: &str, stored: &Stored) -> Result<Kept, ApiError> {
        let life_ms = self
            .config
            .background_s_max
            .saturating_mul(1000)
            .saturating_add(2 * LEASE_MS);
        let expires = unix_ms().saturating_add(life_ms);
        self.write(&owner(caller), open_name(id), stored, expires).await
    }

    /// Forgets a response, or what is known of one that has not ended. Whether it was there.
    pub async fn forget(&self, caller: &Caller, name: &str) -> Result<bool, ApiError> {
        self.delete(owner(caller), name.to_owned()).await
    }

    /// What the run of a response has to know: that it ended otherwise, or that nobody wants it any more.
    pub fn is_over(&self, caller: &Caller, id: &str) -> Result<bool, StoreError> {
        let tables = self.files.accounts.store.tables()?;
        let owner = owner(caller);
        Ok(found(&*tables, &owner, id)?.is_some() || found(&*tables, &owner, &open_name(id))?.is_none())
    }

    /// Says that a process lives.
    pub async fn prolong(&self, runner: &str, number: u64) -> Result<(), ApiError> {
        let file = File {
            id: lease_name(runner, number),
            owner: RUNNERS.into(),
            purpose: "response".into(),
            created_unix_ms: unix_ms(),
            expires_unix_ms: unix_ms().saturating_add(LEASE_MS),
            ..File::default()
        };
        self.put(file, Vec::new(), u64::MAX, u64::MAX).await.map(|_| ())?;
        Ok(())
    }

    /// Whether a process has said so in time.
    pub fn lives(&self, runner: &str) -> Result<bool, StoreError> {
        let tables = self.files.accounts.store.tables()?;
        let mut after = format!("{runner}.");
        loop {
            let names = view::file_ids_of(&*tables, RUNNERS, &after, IdOrder::Ascending, EVICTED_AT_ONCE)?;
            for name in &names {
                if !name.starts_with(runner) {
                    return Ok(false);
                }
                if found(&*tables, RUNNERS, name)?.is_some() {
                    return Ok(true);
                }
            }
            match names.last() {
                Some(last) => after.clone_from(last),
                None => return Ok(false),
            }
        }
    }

    async fn read(&self, owner: &str, name: String) -> Result<Option<Stored>, ApiError> {
        let owner = owner.to_owned();
        let chunks = self.files.state(move |tables| {
            let Some(file) = found(&*tables, &owner, &name)? else {
                return Ok(None);
            };
            let chunks = view::chunks_after(&*tables, &file.id, 0, file.chunks as usize).map_err(StoreError::from)?;
            Ok(Some(chunks))
        });
        let Some(chunks) = chunks.await? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        for chunk in chunks {
            let hash = chunk.hash.as_ref().try_into().map_err(|_| ApiError::internal())?;
            let data = self.files.chunks.get(hash).await.map_err(|error| {
                ApiError::unavailable(format!("The stored response cannot be read at the moment: {error}."))
            })?;
            bytes.extend_from_slice(&data);
        }
        let stored = serde_json::from_slice(&bytes).map_err(|error| {
            tracing::error!(%error, "a stored response is not what was stored");
            ApiError::internal()
        })?;
        Ok(Some(stored))
    }

    async fn write(&self, owner: &str, name: String, stored: &Stored, expires: u64) -> Result<Kept, ApiError> {
        let bytes = serde_json::to_vec(stored).map_err(|_| ApiError::internal())?;
        if bytes.len() as u64 > self.config.response_bytes_max {
            return Ok(Kept::No);
        }
        let bytes = Bytes::from(bytes);
        let mut chunks = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let part = bytes.slice(at..bytes.len().min(at + CHUNK_BYTES_MAX as usize));
            at += part.len();
            let length = part.len() as u64;
            let hash = self.files.chunks.put(part).await;
            let hash =
                hash.map_err(|error| ApiError::unavailable(format!("The response cannot be stored: {error}.")))?;
            chunks.push(FileChunk {
                hash: hash.to_vec().into(),
                bytes: length,
            });
        }
        let file = File {
            id: name,
            owner: owner.to_owned(),
            filename: "response.json".into(),
            purpose: "response".into(),
            bytes: bytes.len() as u64,
            created_unix_ms: unix_ms(),
            expires_unix_ms: expires,
            chunks: chunks.len() as u32,
        };
        for _ in 0..=EVICTIONS_MAX {
            let put = self.put(
                file.clone(),
                chunks.clone(),
                self.config.project_responses_max,
                self.config.project_bytes_max,
            );
            match put.await {
                // The same length is not the same response.
                Ok(Applied::Stands { changed: false }) => return Ok(Kept::Other),
                Ok(_) => return Ok(Kept::Yes),
                Err(StoreError::Refused(Refused::Fixed { .. })) => return Ok(Kept::Other),
                Err(StoreError::Refused(Refused::TooMany { .. })) => {
                    if !self.evict(owner).await? {
                        break;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Kept::No)
    }

    async fn put(
        &self,
        file: File,
        chunks: Vec<FileChunk>,
        owner_files_max: u64,
        owner_bytes_max: u64,
    ) -> Result<Applied, StoreError> {
        let kind = Kind::PutFile(PutFile {
            file: Some(file),
            chunks,
            owner_files_max,
            owner_bytes_max,
            bytes_max: self.files.config.bytes_max,
        });
        self.files.change("", kind).await
    }

    /// The oldest go. False if there are none.
    async fn evict(&self, owner: &str) -> Result<bool, ApiError> {
        let whose = owner.to_owned();
        let oldest = self.files.state(move |tables| {
            let oldest = view::file_ids_of(&*tables, &whose, "", IdOrder::Ascending, EVICTED_AT_ONCE);
            Ok(oldest.map_err(StoreError::from)?)
        });
        let oldest = oldest.await?;
        let any = !oldest.is_empty();
        for name in oldest {
            self.delete(owner.to_owned(), name).await?;
        }
        Ok(any)
    }

    async fn delete(&self, owner: String, id: String) -> Result<bool, ApiError> {
        let applied = self
            .files
            .change("", Kind::DeleteFile(DeleteFile { id, owner }))
            .await?;
        Ok(matches!(applied, Applied::Removed { removed: true }))
    }
}

fn lease_name(runner: &str, number: u64) -> String {
    format!("{runner}.{number:016x}")
}

/// A file of that owner whose time is not over.
fn found(tables: &(impl Tables + ?Sized), owner: &str, name: &str) -> Result<Option<File>, StoreError> {
    let file = view::file(tables, name)?;
    Ok(file.filter(|file| file.owner == owner && file.expires_unix_ms > unix_ms()))
}
