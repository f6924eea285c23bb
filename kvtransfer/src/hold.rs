//! The reader's side of a lease between its reads: a task that sends heartbeats while the handle lives.

use crate::agent::Inner;
use crate::control::Control;
use crate::{ExportGrant, PushError};
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// Keeps an export's lease alive. Dropping it releases the lease at once.
#[derive(Debug)]
pub struct Hold {
    inner: Weak<Inner>,
    peer: SocketAddr,
    grant: ExportGrant,
    task: AbortHandle,
    lost: watch::Receiver<Option<PushError>>,
}

impl Hold {
    pub(crate) fn new(inner: &Arc<Inner>, peer: SocketAddr, grant: ExportGrant) -> Self {
        let (lost, watching) = watch::channel(None);
        let weak = Arc::downgrade(inner);
        let task = inner
            .runtime()
            .spawn(beat(weak.clone(), peer, grant, lost))
            .abort_handle();
        Self {
            inner: weak,
            peer,
            grant,
            task,
            lost: watching,
        }
    }

    /// Resolves once the lease is lost: the owner ended it, or was not heard of for a whole term.
    pub async fn lost(&self) -> PushError {
        let mut lost = self.lost.clone();
        match lost.wait_for(Option::is_some).await {
            Ok(error) => error.clone().unwrap_or(PushError::AgentClosed),
            // The agent, or its runtime, is gone.
            Err(_) => PushError::AgentClosed,
        }
    }
}

async fn beat(inner: Weak<Inner>, peer: SocketAddr, grant: ExportGrant, lost: watch::Sender<Option<PushError>>) {
    let beat = Control::Beat {
        export: grant.id,
        window: None,
    };
    let mut heard = Instant::now();
    loop {
        let Some(agent) = inner.upgrade() else { return };
        let result = agent.call(peer, &beat, Some(grant.term())).await;
        drop(agent);
        match result {
            Ok(()) => heard = Instant::now(),
            Err(error) if matches!(error, PushError::Refused(_)) || heard.elapsed() >= grant.term() => {
                lost.send_replace(Some(error));
                return;
            }
            Err(_) => {}
        }
        tokio::time::sleep(grant.heartbeat()).await;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.task.abort();
        let Some(inner) = self.inner.upgrade() else { return };
        let (peer, grant) = (self.peer, self.grant);
        let runtime = inner.runtime().clone();
        runtime.spawn(async move {
            let release = Control::Release { export: grant.id };
            // If it cannot be told, the term ends the lease.
            let _ = inner.call(peer, &release, Some(grant.term())).await;
        });
    }
}
