//! The decode side of a hand-over: open a window over the sequence's blocks, ask a prefill worker to fill it, wait.
//!
//! Ends in one of three ways, and in each the window is closed before the scheduler hears of it, so that no late write
//! can land in a block that has gone to someone else:
//!
//! - done: every block and the first token are here;
//! - failed: the peer is gone, hangs, refused, or is too slow; the scheduler prefills locally;
//! - cancelled: nobody wants the tokens any more.
//!
//! A hang is found by the watchdog from the peer's pulses and from bytes that land. Then the prompt is computed here rather
//! than on another prefill worker: it starts at once, needs nobody's word, and only the router knows who else has room;
//! it stops choosing the hung worker by itself.

use crate::compression::{KvCompression, Rows};
use crate::engine_thread::{Command, EngineHandle, Ticket};
use crate::peers::{Peers, PendingEvent, is_prefilled};
use baton_engine::spans::{self, Table};
use baton_kvtransfer::{Agent, Region};
use baton_model::KvGeometry;
use baton_proto::worker::{self, Prefill, PrefillDone, PrefillPeer, Sampling};
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
    pub(crate) compression: KvCompression,
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
    pub(crate) emitted_tokens: u32,
    pub(crate) stop_token_ids: Vec<u32>,
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

/// Runs one fill to its end. Meanwhile the engine hears what the peer found in its prefix cache, as soon as it says so.
pub(crate) async fn fill(
    context: &FillContext,
    job: FillJob,
    cancelled: &CancellationToken,
    engine: &EngineHandle,
    ticket: Ticket,
) -> FillEnd {
    let worker_id = job.peer.worker_id.clone();
    let attempt = tokio::time::timeout(context.timeout, attempt(context, job, engine, ticket));
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

async fn attempt(
    context: &FillContext,
    job: FillJob,
    engine: &EngineHandle,
    ticket: Ticket,
) -> Result<PrefillDone, String> {
    let link = context
        .peers
        .link(&job.peer.addr, job.peer.epoch)
        .await
        .map_err(|error| error.to_string())?;
    let blocks = job.blocks.clone();
    let table = Table {
        start: job.cached_tokens,
        block_size: context.geometry.block_size,
        blocks: &blocks,
    };
    let staging = match context.compression {
        KvCompression::None => None,
        KvCompression::Int8 => {
            let rows = Rows::new(context.geometry, job.cached_tokens..job.prompt.len());
            let bytes = rows.bytes().ok_or("the prompt is too long to be compressed")?;
            Some((rows, Region::new(bytes).map_err(|error| error.to_string())?))
        }
    };
    let ranges = spans::window(&context.geometry, job.cached_tokens..job.prompt.len(), table)
        .ok_or("the block table does not cover the prompt; this is a bug in the scheduler")?;
    // Whatever ends this function drops the window, and with that closes it.
    #[allow(clippy::single_range_in_vec_init)] // a window over one range is what is meant
    let window = match &staging {
        None => context.agent.open_window(&context.region, ranges),
        Some((_, staging)) => context.agent.open_window(staging, vec![0..staging.len()]),
    };
    let window = window.map_err(|error| error.to_string())?;
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
            block_size: u32::try_from(context.geometry.block_size).map_err(|_| "absurd block size".to_owned())?,
            kv_compression: match context.compression {
                KvCompression::None => worker::KvCompression::None,
                KvCompression::Int8 => worker::KvCompression::Int8,
            }
            .into(),
            priority: job.priority,
            emitted_tokens: job.emitted_tokens,
            stop_token_ids: job.stop_token_ids,
        })
        .map_err(|error| error.to_string())?;
    let payload = loop {
        let event = tokio::select! {
            payload = window.wait() => break payload.map_err(|error| error.to_string())?,
            event = pending.next(|| window.landed()) => event,
        };
        match event {
            PendingEvent::Cached(cached_tokens) => engine.send(Command::FillCached { ticket, cached_tokens }).await,
            PendingEvent::Finished(finish) => {
                let finish = finish.map_err(|error| error.to_string())?;
                if !is_prefilled(&finish) {
                    return Err(if finish.error.is_empty() {
                        "the prefill worker gave up".into()
                    } else {
                        finish.error
                    });
                }
                // Its word may overtake the last notification, which is on its way on another connection.
                break window.wait().await.map_err(|error| error.to_string())?;
            }
            // Dropping the request cancels it on the peer, should that wake up.
            PendingEvent::Hangs(hang) => return Err(hang.to_string()),
        }
    };
    pending.served();
    if let Some((rows, staging)) = staging {
        for layer in 0..context.geometry.layers {
            rows.decode(&staging, layer, &context.region, table)
                .ok_or("the block table does not cover the prompt; this is a bug in the scheduler")?;
            // A cancelled fill stops here, before its blocks go to somebody else.
            tokio::task::yield_now().await;
        }
    }
    PrefillDone::decode(payload).map_err(|error| format!("unreadable hand-over: {error}"))
}
