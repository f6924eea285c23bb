//! From a request that was read to one that runs: parsed and prepared, its budget set aside, its choices placed.
//!
//! A client that hangs up drops whatever future serves it, in every phase. Before the first choice is placed nothing is
//! recorded; from then on the [`Run`] has it, which cancels and settles.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::draft::Opened;
use super::intake::{Origin, Received};
use super::prepare::{Prepared, prepare};
use super::request::GenerationRequest;
use super::run::{Run, budget_lost};
use super::sequence::Sequence;
use crate::accounts::hold::{Ask, Hold};
use crate::api_error::ApiError;
use crate::backend::{Backend, Generation, Job};
use crate::config::GatewayConfig;
use crate::gateway::Gateway;

/// Bodies up to this many bytes are parsed and tokenised on the connection's own task (well under a millisecond); larger
/// ones on a thread that may block, so that one long prompt delays nobody's tokens.
const INLINE_BYTES_MAX: usize = 4 << 10;

/// A request that runs.
pub(crate) struct Started<B: Backend, E> {
    pub run: Run<B>,
    pub heading: Heading,
    /// What the parse function kept for the endpoint itself.
    pub own: E,
    /// It repeats a request that was settled before; the answer's header is to say so.
    pub replayed: bool,
}

/// What all parts of one answer share.
#[derive(Clone, Debug)]
pub(crate) struct Heading {
    /// The request's id in the ledger.
    pub id: String,
    /// Seconds of Unix time.
    pub created: u64,
    pub model: String,
}

/// Parses with `parse` and gets the request going. Waits for its turn, as long as the cluster makes it wait.
pub(crate) async fn start<B, E, P>(
    gateway: &Arc<Gateway<B>>,
    received: Received,
    parse: P,
) -> Result<Started<B, E>, ApiError>
where
    B: Backend,
    E: Send + 'static,
    P: FnOnce(&[u8], &GatewayConfig) -> Result<(GenerationRequest, E), ApiError> + Send + 'static,
{
    let (origin, claim, endpoint) = (received.origin.clone(), received.claim.clone(), received.endpoint);
    let (arrived, arrived_unix_ms) = (received.arrived, received.arrived_unix_ms);
    let work = |gateway: &Gateway<B>, origin: &Origin, body: &[u8]| {
        let (request, own) = parse(body, &gateway.config)?;
        Ok((prepare(gateway, request, origin)?, own))
    };
    let ((mut prepared, own), mut permit) = on_body(gateway, received, work).await?;
    if prepared.choices() > 1 {
        let more = gateway.in_flight.clone().try_acquire_many_owned(prepared.choices() - 1);
        permit.merge(more.map_err(|_| gateway.too_many_in_work())?);
    }
    if let Some(claim) = claim.as_ref().filter(|_| !prepared.seeded) {
        let seed = claim.seed(&origin.caller.key_id);
        prepared.jobs.iter_mut().for_each(|job| job.sampling.seed = seed);
    }
    let opened = Opened {
        request_id: origin.names.request_id.clone(),
        model: prepared.model_name().to_owned(),
        prompt_tokens: prepared.prompt_tokens(),
        n: prepared.n,
        grammar_param: prepared.grammar_param,
        arrived,
        arrived_unix_ms,
    };
    let ask = Ask {
        request_id: &opened.request_id,
        model: &opened.model,
        endpoint,
        prompt_tokens: opened.prompt_tokens_total(),
        max_tokens: prepared.max_tokens_total(),
        max_tokens_asked: prepared.max_tokens_asked,
        user: std::mem::take(&mut prepared.user),
        started_unix_ms: arrived_unix_ms,
        claim,
        revision: gateway.revision(&opened.model),
    };
    let hold = Hold::open(gateway.accounts.as_ref(), &origin.caller, ask).await?;
    let replayed = hold.replayed().map(str::to_owned);
    let heading = Heading {
        // A retry is answered as the request that it repeats.
        id: replayed.clone().unwrap_or_else(|| opened.request_id.clone()),
        created: arrived_unix_ms / 1000,
        model: opened.model.clone(),
    };
    let run = placed(gateway, &prepared, opened, hold, permit).await?;
    Ok(Started {
        run,
        heading,
        own,
        replayed: replayed.is_some(),
    })
}

/// Works on a body: at once on a small one, on a thread that may block on a large one. Also gives the place among the requests
/// in work, which goes along: a client that hangs up does not make room while its prompt is still being worked on.
pub(crate) async fn on_body<B, T, W>(
    gateway: &Arc<Gateway<B>>,
    received: Received,
    work: W,
) -> Result<(T, OwnedSemaphorePermit), ApiError>
where
    B: Backend,
    T: Send + 'static,
    W: FnOnce(&Gateway<B>, &Origin, &[u8]) -> Result<T, ApiError> + Send + 'static,
{
    let Received {
        origin,
        body,
        permit,
        memory,
        ..
    } = received;
    if body.len() <= INLINE_BYTES_MAX {
        return work(gateway, &origin, &body).map(|done| (done, permit));
    }
    let turn = gateway.preparing.clone().acquire_owned().await;
    let turn = turn.map_err(|_| ApiError::internal())?;
    let gateway = gateway.clone();
    let task = tokio::task::spawn_blocking(move || {
        let done = work(&gateway, &origin, &body);
        drop((turn, memory));
        done.map(|done| (done, permit))
    });
    task.await.map_err(|_| ApiError::internal())?
}

/// Places all choices at once. If one is refused, those that were placed are cancelled and the request is settled as failed.
async fn placed<B: Backend>(
    gateway: &Arc<Gateway<B>>,
    prepared: &Prepared,
    opened: Opened,
    hold: Hold,
    permit: OwnedSemaphorePermit,
) -> Result<Run<B>, ApiError> {
    let cut = hold.cut();
    let mut readers = Vec::new();
    let mut waits = Vec::new();
    for index in 0..prepared.choices() {
        let Some((job, reader)) = prepared.choice(index) else {
            continue;
        };
        readers.push(reader);
        waits.push(place(gateway, job, cut.clone()));
    }
    // A client that hangs up while it waits here drops this future, and with it its places in the queue.
    let mut sequences = Vec::with_capacity(waits.len());
    let mut refused = None;
    let placed = futures_util::future::join_all(waits).await;
    for (index, (placed, reader)) in placed.into_iter().zip(readers).enumerate() {
        match placed {
            Ok(generation) => sequences.push(Sequence::new(index as u32, reader, generation)),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    let Some(error) = refused else {
        return Ok(Run::new(gateway.ledger.clone(), opened, hold, sequences, permit));
    };
    if !sequences.is_empty() {
        Run::new(gateway.ledger.clone(), opened, hold, sequences, permit).fail("not all choices were placed");
    }
    Err(error)
}

/// Waits for a place, as long as the request may run at all.
async fn place<B: Backend>(
    gateway: &Gateway<B>,
    job: Job,
    cut: Option<CancellationToken>,
) -> Result<Generation, ApiError> {
    let generation = gateway.ledger.backend.generate(job);
    let Some(cut) = cut else {
        return Ok(generation.await?);
    };
    tokio::select! {
        biased;
        () = cut.cancelled() => Err(budget_lost()),
        generation = generation => Ok(generation?),
    }
}
