//! Keeps this member's disk as the state wants it: chunks that are named and not here are fetched from the others, and those
//! that nobody names go after [`KEPT`]. So a member that was away, or is new, comes to have everything.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use baton_gateway::ChunkHash;
use baton_raftstore::Consistency;
use baton_state::view;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::MemberChunks;

/// How often it looks for what is missing.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How often it sweeps.
const SWEEP_EVERY: Duration = Duration::from_secs(600);
/// How long a chunk is kept that nothing names: longer than an upload may take.
const KEPT: Duration = Duration::from_secs(3600);

impl MemberChunks {
    /// Until `over`.
    pub(crate) async fn tend(self: Arc<Self>, over: CancellationToken) {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut applied, mut swept) = (None, Instant::now());
        loop {
            tokio::select! {
                () = over.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let now_applied = self.store.status().applied_index;
            if applied != Some(now_applied) {
                match self.complete().await {
                    // Looked for again until all is here.
                    Ok(true) => applied = Some(now_applied),
                    Ok(false) => {}
                    Err(reason) => tracing::warn!(%reason, "this coordinator's files are not complete"),
                }
            }
            if swept.elapsed() >= SWEEP_EVERY {
                swept = Instant::now();
                if let Err(reason) = self.sweep().await {
                    tracing::warn!(%reason, "old parts of files could not be swept");
                }
            }
        }
    }

    /// Fetches what is missing; says whether all is here.
    async fn complete(&self) -> Result<bool, String> {
        let wanted = self.wanted().await?;
        let missing = self.disk.missing(&wanted);
        if missing.is_empty() || self.group.is_alone() {
            return Ok(true);
        }
        tracing::info!(
            chunks = missing.len(),
            "fetching parts of files from the other coordinators"
        );
        let mut complete = true;
        for hash in missing {
            complete &= self.fetch(hash).await.is_ok();
        }
        Ok(complete)
    }

    async fn sweep(&self) -> Result<(), String> {
        // A member that lags could take for old what it has not heard of yet.
        let read = self.store.read(Consistency::ReadIndex).await;
        let index = read.map_err(|error| error.to_string())?;
        self.store
            .wait_applied(index)
            .await
            .map_err(|error| error.to_string())?;
        let wanted = self.wanted().await?;
        let swept = self.on_disk(move |disk| disk.sweep(&wanted, KEPT)).await;
        let swept = swept.map_err(|error| error.to_string())?;
        if swept > 0 {
            tracing::info!(chunks = swept, "parts of files that nobody names are gone");
        }
        Ok(())
    }

    async fn wanted(&self) -> Result<HashSet<ChunkHash>, String> {
        let store = self.store.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let tables = store.state().map_err(|error| error.to_string())?;
            let mut wanted = HashSet::new();
            let visited = view::chunk_names(&tables, &mut |chunk| {
                wanted.extend(ChunkHash::try_from(chunk.hash.as_ref()).ok());
                ControlFlow::Continue(())
            });
            visited.map_err(|error| error.to_string())?;
            Ok(wanted)
        });
        reading.await.map_err(|error| error.to_string())?
    }
}
