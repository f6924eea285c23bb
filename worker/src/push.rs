//! The prefill side of a hand-over: which bytes of which layer go where, and what happens when the prompt is done.
//!
//! The engine thread holds a [`LayerPush`] per sequence and calls it between layers; it only queues descriptors and
//! never blocks. The async side ([`hand_over`]) owns the push itself, sends the first token with its last
//! notification, and reports the end, after which nothing reads the sequence's blocks any more.

use crate::compression::Rows;
use crate::engine_thread::{Command, EngineHandle, Ticket};
use baton_engine::spans::{self, Table};
use baton_kvtransfer::{Push, PushError, PushWriter, Region};
use baton_model::KvGeometry;
use baton_proto::worker::{Finish, FinishReason, PrefillDone};
use prost::Message;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Where a prompt's KV goes: blocks of the caller's arena.
pub(crate) struct CallersBlocks {
    /// For positions from `skip_tokens` on, in order.
    pub(crate) blocks: Vec<u32>,
    /// Tokens per block over there; need not be this worker's.
    pub(crate) block_size: usize,
    /// Leading tokens the caller already holds; a multiple of its block size.
    pub(crate) skip_tokens: usize,
}

/// Where a prompt's KV is compressed before it is sent.
pub(crate) struct Compressed {
    pub(crate) arena: Arc<Region>,
    pub(crate) staging: Arc<Region>,
    pub(crate) rows: Rows,
}

/// Queues the KV of one prompt, layer by layer, into the caller's window.
pub(crate) struct LayerPush {
    writer: PushWriter,
    geometry: KvGeometry,
    /// The caller's blocks for positions from `skip_tokens` on.
    remote: CallersBlocks,
    compressed: Option<Compressed>,
    failed: Option<PushFailed>,
}

impl LayerPush {
    pub(crate) fn new(
        writer: PushWriter,
        geometry: KvGeometry,
        remote: CallersBlocks,
        compressed: Option<Compressed>,
    ) -> Self {
        Self {
            writer,
            geometry,
            remote,
            compressed,
            failed: None,
        }
    }

    /// All layers of `positions` are final; `blocks` holds them, from the block of `positions.start` on.
    pub(crate) fn all_layers(&mut self, blocks: &[u32], positions: Range<usize>) {
        let first_block = positions.start / self.geometry.block_size;
        for layer in 0..self.geometry.layers {
            self.queue(blocks, first_block, layer, positions.clone());
        }
    }

    /// `layer` of `positions` is final; `blocks` is the sequence's whole block table.
    pub(crate) fn layer_done(&mut self, blocks: &[u32], layer: usize, positions: Range<usize>) {
        self.queue(blocks, 0, layer, positions);
    }

    fn queue(&mut self, blocks: &[u32], first_block: usize, layer: usize, positions: Range<usize>) {
        let positions = positions.start.max(self.remote.skip_tokens)..positions.end;
        if self.failed.is_some() || positions.is_empty() {
            return;
        }
        let local = Table {
            start: first_block * self.geometry.block_size,
            block_size: self.geometry.block_size,
            blocks,
        };
        if let Some(Compressed { arena, staging, rows }) = &self.compressed {
            let written = rows.encode(arena, local, layer, positions, staging);
            self.failed = match written.map(|range| self.writer.write(range.clone(), range.start)) {
                Some(Ok(())) => None,
                Some(Err(error)) => Some(PushFailed::Transfer(error)),
                None => Some(PushFailed::Tables),
            };
            return;
        }
        let remote = Table {
            start: self.remote.skip_tokens,
            block_size: self.remote.block_size,
            blocks: &self.remote.blocks,
        };
        let Some(pieces) = spans::pieces(&self.geometry, layer, positions, local, remote) else {
            self.failed = Some(PushFailed::Tables);
            return;
        };
        for piece in pieces {
            if let Err(error) = self.writer.write(piece.local, piece.remote_offset) {
                self.failed = Some(PushFailed::Transfer(error));
                return;
            }
        }
    }

    /// Why nothing more will arrive at the caller, if so.
    pub(crate) fn failed(&self) -> Option<&PushFailed> {
        self.failed.as_ref()
    }
}

/// Why the blocks of a prompt no longer reach the caller.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PushFailed {
    #[error(transparent)]
    Transfer(PushError),
    #[error("the block tables do not cover the prompt; this is a bug in the scheduler")]
    Tables,
}

/// Waits for the first token, finishes the push with it, and tells the engine that the blocks are free to go.
///
/// `prefilled` is dropped without a value when there will be no first token; `cancelled` ends a push under way.
pub(crate) async fn hand_over(
    push: Push,
    prefilled: oneshot::Receiver<PrefillDone>,
    cancelled: CancellationToken,
    ticket: Ticket,
    engine: EngineHandle,
) {
    let attempt = async {
        let done = tokio::select! {
            biased;
            done = prefilled => done.ok()?,
            error = push.failed() => {
                // The caller closed its window or is gone: stop computing for it.
                tracing::debug!(%error, "the push broke; the prompt is dropped");
                engine.send(Command::Cancel { ticket }).await;
                return None;
            }
        };
        let cached_tokens = done.cached_tokens;
        Some(match push.finish(done.encode_to_vec().into()).await {
            Ok(report) => {
                tracing::debug!(bytes = report.bytes, transport = %report.transport, "kv blocks handed over");
                engine.pushed(&report);
                Finish {
                    reason: FinishReason::Prefilled as i32,
                    cached_tokens,
                    ..Finish::default()
                }
            }
            Err(error) => Finish {
                reason: FinishReason::Error as i32,
                error: format!("handing the KV blocks over failed: {error}"),
                retryable: true,
                ..Finish::default()
            },
        })
    };
    // Whatever ends this also drops the push, and with it every read of the sequence's blocks.
    let finish = tokio::select! {
        biased;
        () = cancelled.cancelled() => None,
        finish = attempt => finish,
    };
    let finish = finish.unwrap_or(Finish {
        reason: FinishReason::Cancelled as i32,
        ..Finish::default()
    });
    engine.send(Command::PushEnded { ticket, finish }).await;
}
