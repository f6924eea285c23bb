//! A request's way to a worker: the candidates, the router's choice, and the link it is sent on.

use super::{Cluster, LifeId, PlaceError};
use crate::link::Link;
use crate::placement::{Assignment, Placed};
use crate::router::{Considered, Kind, Names, Routing, kind_of};
use baton_proto::worker::{Generate, PrefillPeer};
use baton_router::{Ask, Choice, Estimate};
use std::sync::Arc;
use std::time::Instant;

/// Where a request goes.
pub(crate) struct Route {
    pub(crate) decode: LifeId,
    prefill: Option<LifeId>,
    /// The prefill worker as the decode worker is told of it.
    peer: Option<PrefillPeer>,
    /// How the two name blocks.
    pub(crate) kinds: (Kind, Option<Kind>),
    pub(crate) estimate: Estimate,
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
        let names = self.names(model, &generate.cache_salt, &generate.prompt);
        let ask = Ask {
            prompt_tokens: generate.prompt.len(),
            max_tokens: generate.max_tokens as usize,
        };
        let mut tried = avoid.to_vec();
        // A link can break between the choice and the sending; then its worker is no candidate the next time.
        let mut unreachable: Vec<LifeId> = Vec::new();
        loop {
            let route = self.route(model, &ask, &names, started, &tried, &unreachable)?;
            if route.estimate.waits {
                self.hint(&route, &generate.cache_salt, &generate.prompt);
            }
            let (decode, prefill, peer) = (route.decode, route.prefill, route.peer);
            let link = self.link(&decode);
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

    /// How each kind of worker that serves the model names the prompt's blocks.
    pub(crate) fn names(&self, model: &str, salt: &[u8], prompt: &[u32]) -> Names {
        let kinds = Routing::kinds(self.registry().serving(model, self.now_ms()).map(|(worker, _)| worker));
        self.routing.names(kinds, salt, prompt)
    }

    /// The link to one life of a worker, if it stands.
    pub(crate) fn link(&self, decode: &LifeId) -> Option<Link> {
        let lives = self.lives();
        let life = lives.get(&decode.0).filter(|life| life.epoch == decode.1);
        life.and_then(|life| life.link.clone())
    }

    pub(crate) fn route(
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
