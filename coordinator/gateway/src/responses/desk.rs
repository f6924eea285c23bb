//! The responses of one gateway: those that are stored, and those it runs in the background. Finds one by its id, whoever
//! ran it; settles what became of one whose process is gone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::ids;
use super::log::Log;
use super::object::{Face, Status};
use super::store::{LEASE_MS, Store, Stored, open_name};
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::clock::unix_ms;
use crate::files::Files;

use super::config::ResponsesConfig;

/// How long after it was told last a process says again that it lives: two may fail.
const PROLONG_AFTER: Duration = Duration::from_millis(LEASE_MS / 3);
/// How long a request waits for a response here to be over once it was cancelled: two rounds of the group and a disk.
const END_WAIT_MAX: Duration = Duration::from_secs(10);

/// A response in the background, on this gateway.
pub(crate) struct Background {
    pub owner: String,
    pub face: Face,
    /// Its events, if they may be streamed.
    pub log: Option<Arc<Log>>,
    /// Cancelled by whoever wants it to end.
    pub cancel: CancellationToken,
    /// Cancelled when its end is stored.
    pub ended: CancellationToken,
}

/// Where a response is.
pub(crate) enum Found {
    /// It runs here.
    Here(Arc<Background>),
    /// It runs on another coordinator.
    Elsewhere(Stored),
    /// It has ended.
    Ended(Stored),
}

/// See the module.
pub(crate) struct Responses {
    pub store: Store,
    pub config: ResponsesConfig,
    /// Names this process: its member and an id of its own.
    pub runner: String,
    /// What the names of this member's processes begin with.
    member: String,
    /// Times it said that it lives, and when it did last.
    told: tokio::sync::Mutex<(u64, Option<Instant>)>,
    runs: Mutex<HashMap<String, Arc<Background>>>,
    pub tasks: TaskTracker,
    /// Ends what runs in the background.
    pub stop: CancellationToken,
}

impl Responses {
    pub fn new(files: Arc<Files>, config: ResponsesConfig) -> Arc<Self> {
        let member = member_prefix(files.accounts.store.member_id());
        Arc::new(Self {
            store: Store::new(files, config.clone()),
            config,
            runner: format!("{member}{}", uuid::Uuid::now_v7().simple()),
            member,
            told: tokio::sync::Mutex::default(),
            runs: Mutex::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        })
    }

    /// Says that this process lives, if it is time.
    pub async fn prolong(&self) -> Result<(), ApiError> {
        let mut told = self.told.lock().await;
        if told.1.is_some_and(|at| at.elapsed() < PROLONG_AFTER) {
            return Ok(());
        }
        let now = Instant::now();
        told.0 += 1;
        self.store.prolong(&self.runner, told.0).await?;
        told.1 = Some(now);
        Ok(())
    }

    pub fn add(&self, background: Arc<Background>) {
        self.runs().insert(background.face.id.clone(), background);
    }

    pub fn remove(&self, id: &str) {
        self.runs().remove(id);
    }

    fn runs(&self) -> MutexGuard<'_, HashMap<String, Arc<Background>>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The caller's response of that id. Another project's is as if it were not there.
    ///
    /// # Errors
    /// 404.
    pub async fn find(&self, caller: &Caller, id: &str) -> Result<Found, ApiError> {
        if !ids::is_response(id) {
            return Err(missing(id));
        }
        let here = self.runs().get(id).filter(|run| run.owner == caller.owner()).cloned();
        if let Some(background) = here {
            return Ok(Found::Here(background));
        }
        if let Some(stored) = self.store.ended(caller, id).await? {
            return Ok(Found::Ended(stored));
        }
        let Some(open) = self.store.open(caller, id).await? else {
            // It may have ended between the two looks.
            let ended = self.store.ended(caller, id).await?;
            return ended.map(Found::Ended).ok_or_else(|| missing(id));
        };
        let runner = open.runner.as_deref().unwrap_or_default();
        // This member has one process, which does not run it.
        if !runner.starts_with(&self.member) && self.store.lives(runner)? {
            return Ok(Found::Elsewhere(open));
        }
        let status = Status::Failed {
            code: "server_error",
            message: "The coordinator that ran this response is gone; send it again.".into(),
        };
        self.end_unfinished(caller, id, open, &status).await.map(Found::Ended)
    }

    /// Decides how a response ended that does not run here, unless it ended otherwise meanwhile; says what stands.
    pub async fn end_unfinished(
        &self,
        caller: &Caller,
        id: &str,
        open: Stored,
        status: &Status,
    ) -> Result<Stored, ApiError> {
        let serde_json::Value::Object(echo) = open.response else {
            return Err(ApiError::internal());
        };
        let face = Face {
            id: id.to_owned(),
            created_at: echo.get("created_at").and_then(serde_json::Value::as_u64).unwrap_or(0),
            echo,
        };
        let stored = Stored {
            response: face.shown(status, Vec::new(), None, unix_ms() / 1000),
            items: open.items,
            ..Stored::default()
        };
        self.store.keep(caller, id, &stored).await?;
        self.store.forget(caller, &open_name(id)).await?;
        self.store.ended(caller, id).await?.ok_or_else(|| missing(id))
    }

    /// Ends a response that runs here.
    pub async fn cancel_here(&self, background: &Background) -> Result<(), ApiError> {
        background.cancel.cancel();
        let ended = tokio::time::timeout(END_WAIT_MAX, background.ended.cancelled()).await;
        ended.map_err(|_| ApiError::unavailable("The response is being cancelled; look again."))
    }

    /// At shutdown: waits for what runs, then ends it and waits for that, each as long as `wait`.
    pub async fn drain(&self, wait: Duration) {
        self.tasks.close();
        if tokio::time::timeout(wait, self.tasks.wait()).await.is_err() {
            self.stop.cancel();
            if tokio::time::timeout(wait, self.tasks.wait()).await.is_err() {
                tracing::warn!("responses in the background were left; whoever asks for them finds them failed");
            }
        }
    }
}

fn member_prefix(member_id: u64) -> String {
    format!("run_{member_id}_")
}

/// OpenAI's 404.
pub(crate) fn missing(id: &str) -> ApiError {
    let shown: String = id.chars().take(128).collect();
    ApiError {
        message: format!("Response with id '{shown}' not found."),
        param: Some("response_id".into()),
        ..ApiError::no_such("response", id)
    }
}
