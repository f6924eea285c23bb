//! What a request holds while it is on its workers: the way back of its tokens, its place in their load, and what the router
//! predicted of it. All of it is given back on drop.
//!
//! Not here: which workers ([`crate::router`]), and sending it there ([`crate::cluster`]).

use crate::cluster::{Cluster, LifeId};
use crate::link::Submission;
use crate::router::{Pending, Routing};
use baton_gateway::Placement;
use baton_proto::worker::{Finish, FinishReason};
use std::sync::Arc;

/// A request on a worker. Dropping it cancels it there and gives its place back.
pub(crate) struct Placed {
    pub(crate) submission: Submission,
    pub(crate) decode: Assignment,
    /// Dropped when the first token shows that the prompt is computed.
    pub(crate) prefill: Option<Assignment>,
    pub(crate) pending: Option<Pending>,
    pub(crate) predicted_cached_tokens: usize,
    pub(crate) routing: Routing,
}

impl Placed {
    /// Tokens came: the prompt is computed.
    pub(crate) fn first_token(&mut self) {
        self.prefill = None;
        if let Some(pending) = self.pending.take() {
            pending.first_token();
        }
    }

    /// The worker said how it ended.
    pub(crate) fn finished(&self, finish: &Finish) {
        if matches!(finish.reason(), FinishReason::Stop | FinishReason::Length) {
            self.routing
                .finished(self.predicted_cached_tokens, finish.cached_tokens);
        }
    }

    pub(crate) fn placement(&self, attempts: u32) -> Placement {
        Placement {
            decode_worker_id: self.decode.worker.0.clone(),
            prefill_worker_id: self.prefill.as_ref().map(|a| a.worker.0.clone()).unwrap_or_default(),
            attempts,
        }
    }
}

/// A place in a worker's load, given back on drop.
pub(crate) struct Assignment {
    cluster: Arc<Cluster>,
    pub(crate) worker: LifeId,
    prefill: bool,
}

impl Assignment {
    pub(crate) fn new(cluster: &Arc<Cluster>, worker: LifeId, prefill: bool) -> Self {
        cluster.registry().assigned(&worker.0, worker.1, prefill);
        Self {
            cluster: cluster.clone(),
            worker,
            prefill,
        }
    }
}

impl Drop for Assignment {
    fn drop(&mut self) {
        self.cluster
            .registry()
            .released(&self.worker.0, self.worker.1, self.prefill);
        self.cluster.changed();
    }
}
