//! Looks for batches that nobody runs, claims them and runs them; and while nothing else tells the time, tells it, so that old
//! files go.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use baton_proto::state::{Batch, ClaimBatch, Tick, command::Kind};
use baton_state::view;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::run::Runner;
use crate::accounts::store::StoreError;
use crate::backend::Backend;
use crate::clock::unix_ms;
use crate::files::Files;
use crate::gateway::Gateway;

/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often it looks for files whose time is over.
const TIME_EVERY: Duration = Duration::from_secs(60);
/// A batch that could not be gone on with is not claimed again by this member before then: what it lacks has to come first.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(5);
/// How long a member that dies keeps its batches from the others. Prolonged by each step, and three times meanwhile.
pub(super) const LEASE: Duration = Duration::from_secs(10);

/// The batches that this member runs.
pub(crate) struct Batches<B: Backend> {
    pub(super) gateway: Arc<Gateway<B>>,
    pub(super) files: Arc<Files>,
    /// The gateway's own routes.
    pub(super) router: Router,
    running: Mutex<HashMap<String, String>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// Begins to look for batches, until `stop`. `None` where there is no state or nowhere to put files.
pub(crate) fn start<B: Backend>(
    gateway: &Arc<Gateway<B>>,
    router: Router,
    stop: CancellationToken,
) -> Option<Arc<Batches<B>>> {
    let files = gateway.files.clone()?;
    let batches = Arc::new(Batches {
        gateway: gateway.clone(),
        files,
        router,
        running: Mutex::default(),
        tasks: TaskTracker::new(),
        stop,
    });
    batches.tasks.spawn(batches.clone().keep());
    Some(batches)
}

impl<B: Backend> Batches<B> {
    /// After `stop`: waits for lines that run, and for what they brought to be told, as long as `wait`.
    pub async fn drain(&self, wait: Duration) {
        self.tasks.close();
        if tokio::time::timeout(wait, self.tasks.wait()).await.is_err() {
            tracing::warn!("batches were left as they were told last; another member goes on with them");
        }
    }

    async fn keep(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut told = Instant::now();
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            if self.gateway.config.batches.at_once_max > self.running().len()
                && let Err(error) = self.look().await
            {
                tracing::debug!(%error, "batches could not be looked for");
            }
            if told.elapsed() >= TIME_EVERY {
                told = Instant::now();
                if let Err(error) = self.tell_time().await {
                    tracing::debug!(%error, "the time could not be told");
                }
            }
        }
    }

    async fn look(self: &Arc<Self>) -> Result<(), StoreError> {
        for batch in self.unclaimed()? {
            let at_once = self.gateway.config.batches.at_once_max;
            let of_owner = self.running().values().filter(|owner| **owner == batch.owner).count();
            if self.running().len() >= at_once || self.stop.is_cancelled() {
                return Ok(());
            }
            if of_owner >= at_once.div_ceil(2) {
                continue;
            }
            let claim_id = uuid::Uuid::new_v4().simple().to_string();
            let until = Instant::now() + LEASE;
            match self.claim(&batch.id, &claim_id, LEASE).await {
                Ok(()) => self.spawn(batch, claim_id, until),
                // Another member was quicker, or it is over.
                Err(StoreError::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Batches that are not over and that nobody runs, oldest first.
    fn unclaimed(&self) -> Result<Vec<Batch>, StoreError> {
        let store = &self.files.accounts.store;
        let tables = store.tables()?;
        let now_ms = unix_ms().max(view::time(&*tables)?);
        let mut found = Vec::new();
        for (id, _) in view::open_batches(&*tables)? {
            if self.running().contains_key(&id) {
                continue;
            }
            let Some(batch) = view::batch(&*tables, &id)? else {
                continue;
            };
            let free = batch
                .runner
                .as_ref()
                .is_none_or(|runner| runner.lease_until_unix_ms <= now_ms || runner.member_id == store.member_id());
            if free {
                found.push(batch);
            }
        }
        Ok(found)
    }

    pub(super) async fn claim(&self, batch_id: &str, claim_id: &str, lease: Duration) -> Result<(), StoreError> {
        let kind = Kind::ClaimBatch(ClaimBatch {
            batch_id: batch_id.to_owned(),
            member_id: self.files.accounts.store.member_id(),
            claim_id: claim_id.to_owned(),
            lease_ms: u64::try_from(lease.as_millis()).unwrap_or(u64::MAX),
        });
        self.files.change("", kind).await.map(|_| ())
    }

    fn spawn(self: &Arc<Self>, batch: Batch, claim_id: String, until: Instant) {
        self.running().insert(batch.id.clone(), batch.owner.clone());
        let batches = self.clone();
        self.tasks.spawn(async move {
            let id = batch.id.clone();
            let _gone = Running(&batches, &id);
            tracing::info!(batch = %id, "running a batch");
            let runner = Runner::new(&batches, batch.id.clone(), claim_id.clone(), until);
            let ended = runner.run(&batches.stop).await;
            // So that nobody has to wait for the lease. Refused if the batch is over, or another's.
            let _ = batches.claim(&id, &claim_id, Duration::ZERO).await;
            match ended {
                Ok(()) => tracing::info!(batch = %id, "a batch is over, or handed back"),
                Err(error) => {
                    tracing::warn!(batch = %id, %error, "a batch is left to whoever claims it next");
                    tokio::select! {
                        () = batches.stop.cancelled() => {}
                        () = tokio::time::sleep(PAUSE_AFTER_FAILURE) => {}
                    }
                }
            }
        });
    }

    async fn tell_time(&self) -> Result<(), StoreError> {
        let due = view::files_are_due(&*self.files.accounts.store.tables()?, unix_ms())?;
        if due {
            self.files.change("", Kind::Tick(Tick {})).await?;
        }
        Ok(())
    }

    pub(super) fn stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    fn running(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a batch off the list of those that run, however its task ends.
struct Running<'b, B: Backend>(&'b Batches<B>, &'b str);

impl<B: Backend> Drop for Running<'_, B> {
    fn drop(&mut self) {
        self.0.running().remove(self.1);
    }
}
