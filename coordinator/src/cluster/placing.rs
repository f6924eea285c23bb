//! A request's way to a worker: the candidates, the router's choice, the link, and the guards that give the places back.

use super::{Cluster, LifeId, PlaceError};
use crate::link::Submission;
use crate::router::{Considered, Kind, Names, Pending, Routing, kind_of};
use baton_gateway::Placement;
use baton_proto::worker::{Finish, FinishReason, Generate, PrefillPeer};
use baton_router::{Ask, Choice, Estimate};
use std::sync::Arc;
use std::time::Instant;

/// Where a request goes.
struct Route {
    decode: LifeId,
    prefill: Option<LifeId>,
    /// The prefill worker as the decode worker is told of it.
    peer: Option<PrefillPeer>,
    /// How the two name blocks.
    kinds: (Kind, Option<Kind>),
    estimate: Estimate,
}

impl Cluster {
    /// Routes a request and sends it. `avoid` names lives of workers that have failed it; they get it only if nobody
    /// else can.
    pub(crate) fn place(
        self: &Arc<Self>,
        model: &str,
        mut generate: Generate,
        avoid: &[LifeId],
    ) -> Result<Placed, PlaceError> {
        let started = Instant::now();
        let kinds = Routing::kinds(self.registry().serving(model, self.now_ms()).map(|(worker, _)| worker));
        let names = Names::compute(kinds, &generate.cache_salt, &generate.prompt);
        let ask = Ask {
            prompt_tokens: generate.prompt.len(),
            max_tokens: generate.max_tokens as usize,
        };
        let mut tried = avoid.to_vec();
        // A link can break between the choice and the sending; then its worker is no candidate the next time.
        let mut unreachable: Vec<LifeId> = Vec::new();
        loop {
            let route = self.route(model, &ask, &names, started, &tried, &unreachable)?;
            let (decode, prefill, peer) = (route.decode, route.prefill, route.peer);
            let link = {
                let lives = self.lives();
                let life = lives.get(&decode.0).filter(|life| life.epoch == decode.1);
                life.and_then(|life| life.link.clone())
            };
            generate.prefill_peer = peer;
            match link.map(|link| link.submit(generate.clone())) {
                Some(Ok(submission)) => {
                    let pending = self.routing.placed(
                        (decode.1, &route.kinds.0),
                        prefill.as_ref().map(|(_, epoch)| *epoch).zip(route.kinds.1.as_ref()),
                        &names,
                        route.estimate,
                        self.now_ms(),
                    );
                    let placed = Placed {
                        submission,
                        decode: Assignment::new(self, decode, false),
                        prefill: prefill.map(|prefill| Assignment::new(self, prefill, true)),
                        pending: Some(pending),
                        predicted_cached_tokens: route.estimate.cached_tokens,
                        routing: self.routing.clone(),
                    };
                    self.metrics.placed(placed.prefill.is_some());
                    return Ok(placed);
                }
                _ => {
                    tried.push(decode.clone());
                    unreachable.push(decode);
                }
            }
        }
    }

    fn route(
        &self,
        model: &str,
        ask: &Ask,
        names: &Names,
        started: Instant,
        avoid: &[LifeId],
        unreachable: &[LifeId],
    ) -> Result<Route, PlaceError> {
        let now_ms = self.now_ms();
        let found = self.routing.look_up(names, now_ms);
        let listed = |list: &[LifeId], id: &str, epoch: u64| list.iter().any(|(i, e)| i == id && *e == epoch);
        let registry = self.registry();
        let workers: Vec<Considered<'_>> = registry
            .serving(model, now_ms)
            .filter(|(worker, _)| !listed(unreachable, &worker.register.worker_id, worker.epoch))
            .map(|(worker, state)| Considered {
                worker,
                state,
                avoid: listed(avoid, &worker.register.worker_id, worker.epoch),
                requests_max: self.config.requests_per_worker_max,
            })
            .collect();
        let life = |index: usize| {
            let worker = workers[index].worker;
            (worker.register.worker_id.clone(), worker.epoch)
        };
        match self.routing.choose(&workers, &found, ask, started) {
            Choice::Nobody => Err(PlaceError::Nobody),
            Choice::Full => Err(PlaceError::Full),
            Choice::Place {
                decode,
                prefill,
                estimate,
            } => {
                let peer = prefill.map(|index| {
                    let worker = workers[index].worker;
                    PrefillPeer {
                        worker_id: worker.register.worker_id.clone(),
                        epoch: worker.epoch,
                        addr: worker.register.addr.clone(),
                    }
                });
                Ok(Route {
                    decode: life(decode),
                    prefill: prefill.map(life),
                    peer,
                    kinds: (
                        kind_of(workers[decode].worker),
                        prefill.map(|index| kind_of(workers[index].worker)),
                    ),
                    estimate,
                })
            }
        }
    }
}

/// A request on a worker. Dropping it cancels it there and gives its place back.
pub(crate) struct Placed {
    pub(crate) submission: Submission,
    pub(crate) decode: Assignment,
    /// Dropped when the first token shows that the prompt is computed.
    prefill: Option<Assignment>,
    pending: Option<Pending>,
    predicted_cached_tokens: usize,
    routing: Routing,
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
    fn new(cluster: &Arc<Cluster>, worker: LifeId, prefill: bool) -> Self {
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
