//! `/v1/files`: what clients upload for batches, and what batches write. Shapes are OpenAI's.
//!
//! A file is a list of chunks. The chunks go to a [`ChunkStore`](chunks::ChunkStore), which answers when they are durable; what names them
//! goes through the group. An upload that breaks off leaves chunks that nobody names, which the store sweeps.
//!
//! Deliberately not here: where chunks lie (the coordinator), how batches run ([`batches`](crate::batches)).

pub(crate) mod chunks;
mod config;
mod listing;
mod read;
mod upload;

pub use config::FilesConfig;
use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Path};
use axum::handler::Handler as _;
use axum::{Extension, Json};
use baton_proto::state::{DeleteFile, File, command::Kind};
use baton_state::{Applied, view};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::accounts::Accounts;
use crate::accounts::store::{StoreError, TablesBox, command};
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::clock::unix_ms;
use crate::openapi::{About, Api, Purpose};

pub use chunks::{ChunkError, ChunkHash, ChunkStore, Chunked};
pub(crate) use read::{Line, Lines};
pub(crate) use upload::EXPIRES_AFTER_S;

/// What the routes of files and batches share.
pub(crate) struct Files {
    pub accounts: Arc<Accounts>,
    pub chunks: Arc<dyn ChunkStore>,
    pub config: FilesConfig,
    /// One permit per upload.
    uploads: Semaphore,
}

impl Files {
    pub fn new(accounts: Arc<Accounts>, chunks: Arc<dyn ChunkStore>, config: FilesConfig) -> Arc<Self> {
        Arc::new(Self {
            uploads: Semaphore::new(config.uploads_max),
            accounts,
            chunks,
            config,
        })
    }

    /// Reads the state on a thread that may block.
    pub async fn state<T: Send + 'static>(
        &self,
        read: impl FnOnce(TablesBox) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let store = self.accounts.store.clone();
        let reading = tokio::task::spawn_blocking(move || read(store.tables()?));
        reading.await.map_err(|_| ApiError::internal())?
    }

    /// Changes the state.
    pub async fn change(&self, actor: &str, kind: Kind) -> Result<Applied, StoreError> {
        self.accounts.store.propose(command(actor, kind)).await
    }

    /// The caller's file of that id. Another's is as if it were not there, and so is one that is over.
    pub async fn file(&self, caller: &Caller, id: &str) -> Result<File, ApiError> {
        let (owner, name) = (caller.owner(), id.to_owned());
        let found = self.state(move |tables| Ok(view::file(&*tables, &name).map_err(StoreError::from)?));
        let found = found.await?.filter(|file| file.owner == owner && !is_over(file));
        found.ok_or_else(|| ApiError {
            param: Some("id".into()),
            ..ApiError::no_such("File object", id)
        })
    }
}

/// Whether a file's time is over.
fn is_over(file: &File) -> bool {
    file.expires_unix_ms != 0 && file.expires_unix_ms <= unix_ms()
}

pub(crate) type Shared = Extension<Arc<Files>>;
type Calls = Extension<Caller>;

/// Adds the routes. They need [`Files`] as an extension.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>(api: Api<S>) -> Api<S> {
    let reads = |summary| About::new(Purpose::Read, summary);
    let changes = |summary| About::new(Purpose::Change, summary);
    api.get(
        "/v1/files",
        listing::list,
        reads("The files").query(&["after", "limit", "order", "purpose"]),
    )
    .post(
        "/v1/files",
        // Uploads are counted as they come.
        upload::upload.layer(DefaultBodyLimit::disable()),
        changes("Uploads a file, as multipart/form-data"),
    )
    .get("/v1/files/{id}", retrieve, reads("A file"))
    .delete("/v1/files/{id}", delete, changes("Deletes a file"))
    .get(
        "/v1/files/{id}/content",
        read::content,
        reads("What is in a file").media(&["application/octet-stream"]),
    )
}

async fn retrieve(
    Extension(files): Shared,
    Extension(caller): Calls,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(shown(&files.file(&caller, &id).await?)))
}

async fn delete(
    Extension(files): Shared,
    Extension(caller): Calls,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let file = files.file(&caller, &id).await?;
    let kind = Kind::DeleteFile(DeleteFile {
        id: file.id,
        owner: file.owner,
    });
    files.change(caller.actor(), kind).await?;
    Ok(Json(json!({"id": id, "object": "file", "deleted": true})))
}

/// A file as the API shows it.
fn shown(file: &File) -> Value {
    let mut shown = json!({
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_unix_ms / 1000,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    });
    if file.expires_unix_ms != 0 {
        shown["expires_at"] = (file.expires_unix_ms / 1000).into();
    }
    shown
}

/// A new time-ordered id, `file-` and a UUID: lists go by time.
pub(crate) fn new_id() -> String {
    format!("file-{}", uuid::Uuid::now_v7().simple())
}
