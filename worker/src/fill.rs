//! The decode side of a hand-over: open a window over the sequence's blocks, ask a prefill worker to fill it, wait.
//!
//! Ends in one of three ways, and in each the window is closed before the scheduler hears of it, so that no late write
//! can land in a block that has gone to someone else:
//!
//! - done: every block and the first token are here;
//! - failed: the peer is gone, refused, or too slow; the scheduler prefills locally;
//! - cancelled: nobody wants the tokens any more.

use crate::peers::{Peers, is_prefilled};
use baton_engine::spans::{self, Table};
use baton_kvtransfer::{Agent, Region};
use baton_model::KvGeometry;
use baton_proto::worker::{Prefill, PrefillDone, PrefillPeer, Sampling};
use prost::Message;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// What every fill of a worker shares.
pub(crate) struct FillContext {
    pub(crate) agent: Agent,
    /// The agent's address as peers reach it.
    pub(crate) transfer_addr: SocketAddr,
    pub(crate) region: Arc<Region>,
    pub(crate) geometry: KvGeometry,
    pub(crate) peers: Peers,
    pub(crate) timeout: Duration,
}

/// One prompt to be computed elsewhere.
pub(crate) struct FillJob {
    pub(crate) peer: PrefillPeer,
    pub(crate) request_id: String,
    pub(crate) traceparent: String,
    pub(crate) prompt: Vec<u32>,
    pub(crate) sampling: Option<Sampling>,
    pub(crate) cache_salt: Vec<u8>,
    pub(crate) priority: i32,
    /// Leading tokens whose blocks are here already; a multiple of the block size.
    pub(crate) cached_tokens: usize,
    /// This worker's blocks for the positions after them.
    pub(crate) blocks: Vec<u32>,
}

/// How a fill ended.
#[derive(Debug)]
pub(crate) enum FillEnd {
    /// Who computed the prompt, and its last word.
    Done((String, PrefillDone)),
    Failed(String),
    Cancelled,
}

/// Runs one fill to its end.
pub(crate) async fn fill(context: &FillContext, job: FillJob, cancelled: &CancellationToken) -> FillEnd {
    let worker_id = job.peer.worker_id.clone();
    let attempt = tokio::time::timeout(context.timeout, attempt(context, job));
    tokio::select! {
        biased;
        () = cancelled.cancelled() => FillEnd::Cancelled,
        result = attempt => match result {
            Ok(Ok(done)) => FillEnd::Done((worker_id, done)),
            Ok(Err(reason)) => FillEnd::Failed(reason),
            Err(_) => FillEnd::Failed(format!("the prefill worker took longer than {:?}", context.timeout)),
        },
    }
}

async fn attempt(context: &FillContext, job: FillJob) -> Result<PrefillDone, String> {
    let link = context
        .peers
        .link(&job.peer.addr, job.peer.epoch)
        .await
        .map_err(|error| error.to_string())?;
    let table = Table {
        start: job.cached_tokens,
        blocks: &job.blocks,
    };
    let ranges = spans::window(&context.geometry, job.cached_tokens..job.prompt.len(), table)
        .ok_or("the block table does not cover the prompt; this is a bug in the scheduler")?;
    // Whatever ends this function drops the window, and with that closes it.
    let window = context
        .agent
        .open_window(&context.region, ranges)
        .map_err(|error| error.to_string())?;
    let mut pending = link
        .prefill(Prefill {
            id: 0,
            request_id: job.request_id,
            traceparent: job.traceparent,
            prompt: job.prompt,
            sampling: job.sampling,
            cache_salt: job.cache_salt.into(),
            cached_tokens: u32::try_from(job.cached_tokens).map_err(|_| "prompt too long".to_owned())?,
            transfer_addr: context.transfer_addr.to_string(),
            window: window.id(),
            blocks: job.blocks,
            priority: job.priority,
        })
        .map_err(|error| error.to_string())?;
    let payload = tokio::select! {
        payload = window.wait() => payload.map_err(|error| error.to_string())?,
        finish = pending.finished() => {
            let finish = finish.map_err(|error| error.to_string())?;
            if !is_prefilled(&finish) {
                return Err(if finish.error.is_empty() { "the prefill worker gave up".into() } else { finish.error });
            }
            // Its word may overtake the last notification, which is on its way on another connection.
            window.wait().await.map_err(|error| error.to_string())?
        }
    };
    PrefillDone::decode(payload).map_err(|error| format!("unreadable hand-over: {error}"))
}
