//! A request as the engine thread sees it: whose it is, which half of it runs here, how far it is.
//!
//! State only; the sequence itself is the scheduler's, and what changes a job is in the files beside this one.

use crate::caller::CallerId;
use crate::engine_thread::Ticket;
use crate::push::LayerPush;
use baton_proto::worker::{PrefillDone, PrefillPeer, Sampling};
use std::time::Instant;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::Span;

/// One request as this worker sees it.
pub(super) struct Job {
    pub(super) ticket: Ticket,
    pub(super) caller: CallerId,
    /// The caller's id of the request.
    pub(super) id: u64,
    pub(super) request_id: String,
    pub(super) kind: Kind,
    /// Open as long as the job is, under the request's own trace.
    pub(super) span: Span,
    pub(super) submitted: Instant,
    pub(super) scheduled: Option<Instant>,
    pub(super) first_token: Option<Instant>,
    /// The caller was told the end; only a transfer still holds the blocks.
    pub(super) answered: bool,
}

impl Job {
    pub(super) fn new(ticket: Ticket, caller: CallerId, id: u64, request_id: String, span: Span, kind: Kind) -> Self {
        Self {
            ticket,
            caller,
            id,
            request_id,
            kind,
            span,
            submitted: Instant::now(),
            scheduled: None,
            first_token: None,
            answered: false,
        }
    }
}

/// Which half of a request runs here, and the state of its transfer.
pub(super) enum Kind {
    Generate {
        /// What a fill needs, until it is started.
        fill: Option<FillSpec>,
        fill_cancelled: CancellationToken,
        /// Who computed the prompt; set by a fill that succeeded.
        filled: Option<String>,
        /// Prompt tokens that the prefill worker found in its prefix cache. Counts even if it dies before it is done: the
        /// caller is told what it would have been told without that.
        fill_cached: u32,
    },
    Prefill {
        layers: LayerPush,
        prefilled: Option<oneshot::Sender<PrefillDone>>,
        cancelled: CancellationToken,
    },
}

/// What a fill takes from its request, kept until the scheduler has blocks for it.
pub(super) struct FillSpec {
    pub(super) peer: PrefillPeer,
    pub(super) traceparent: String,
    pub(super) sampling: Option<Sampling>,
    pub(super) cache_salt: Vec<u8>,
    pub(super) priority: i32,
    pub(super) emitted_tokens: u32,
    pub(super) stop_token_ids: Vec<u32>,
}
