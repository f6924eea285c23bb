//! `Idempotency-Key`: a request and its retries are one. What can be promised without keeping answers rests on promise P1:
//! the seed of such a request is made of the key and the body (unless the client gives one), so a retry computes the same
//! tokens again, and is settled as the row that stands.
//!
//! ```text
//!  key unknown ──▶ runs ──▶ completed or length: the record has the key; remembered for a day
//!                   │  └──▶ cancelled, failed, expired: the key is free again, a retry is a new request
//!   the same body while it runs: 409        afterwards: computed again, billed nothing, the same record
//!   another body, either way: 422
//! ```
//!
//! Status codes are those of the IETF's draft "The Idempotency-Key HTTP Header Field". A request with a key claims it in the
//! group before it runs, one commit, so that two members do not run it at once; one without a key asks nobody. Whoever
//! claimed prolongs; the claims of a member that died lapse within [`CLAIM_MS`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use baton_proto::state::{ClaimIdempotency, ReleaseIdempotency, command::Kind};
use baton_state::{Applied, Refused, view};
use tokio_util::sync::CancellationToken;

use super::keys::sha256;
use super::store::{AccountStore, StoreError, command};
use crate::api_error::ApiError;

/// The request's header.
pub const IDEMPOTENCY_KEY_HEADER: &str = "idempotency-key";
/// The answer's header, on an answer that was computed again.
pub const REPLAYED_HEADER: &str = "idempotent-replayed";
/// Bytes of a key: a UUID has 36.
const KEY_BYTES_MAX: usize = 255;
/// How long a key stays claimed without a word of its gateway, in milliseconds: longer than an election, and short enough
/// for a client that retries elsewhere after its coordinator died.
const CLAIM_MS: u64 = 15_000;
/// Tries to claim a key that another request has, and the pause between two: that one may just have ended.
const CLAIM_TRIES: u32 = 4;
const CLAIM_PAUSE: Duration = Duration::from_millis(75);

/// What a request says of itself, hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub key_sha256: [u8; 32],
    pub request_sha256: [u8; 32],
}

impl Claim {
    /// Of a request's head and body; nothing without the header.
    pub fn of(headers: &HeaderMap, body: &[u8]) -> Result<Option<Self>, ApiError> {
        let Some(value) = headers.get(IDEMPOTENCY_KEY_HEADER) else {
            return Ok(None);
        };
        let key = value.as_bytes();
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            let message = format!("The header `Idempotency-Key` must have 1 to {KEY_BYTES_MAX} bytes.");
            return Err(ApiError::field(IDEMPOTENCY_KEY_HEADER, message));
        }
        Ok(Some(Self {
            key_sha256: sha256(key),
            request_sha256: sha256(body),
        }))
    }

    /// The sampling seed of such a request.
    pub fn seed(&self, key_id: &str) -> u64 {
        let all = [&self.key_sha256[..], &self.request_sha256, key_id.as_bytes()].concat();
        let hash = sha256(&all);
        u64::from_le_bytes([hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7]])
    }
}

type Name = (String, [u8; 32]);

/// Requests with a key that run on this gateway: as many as requests in work at most.
#[derive(Default)]
pub(crate) struct InFlight(Mutex<HashMap<Name, [u8; 32]>>);

impl InFlight {
    fn map(&self) -> MutexGuard<'_, HashMap<Name, [u8; 32]>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A key in use; free again on drop, in the group a moment later.
pub(crate) struct InUse {
    running: Arc<InFlight>,
    name: Name,
    /// Cancelled on drop: the claim in the group ends.
    over: CancellationToken,
    settled: Arc<AtomicBool>,
}

impl InUse {
    /// A record with the key is on its way, which ends the claim by itself.
    pub fn settled(&self) {
        self.settled.store(true, Ordering::SeqCst);
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.running.map().remove(&self.name);
        self.over.cancel();
    }
}

/// Takes the key for a request of `key_id`, here and in the group. Also tells the request that the key was used for, if
/// that ended well: such a key is claimed by nobody.
pub(crate) async fn take(
    running: &Arc<InFlight>,
    store: &Arc<dyn AccountStore>,
    key_id: &str,
    request_id: &str,
    claim: &Claim,
) -> Result<(InUse, Option<String>), ApiError> {
    let name = (key_id.to_owned(), claim.key_sha256);
    let in_use = {
        let mut map = running.map();
        match map.get(&name) {
            Some(request) if *request == claim.request_sha256 => return Err(in_use_already()),
            Some(_) => return Err(other_body("a request that is still running")),
            None => {}
        }
        map.insert(name.clone(), claim.request_sha256);
        InUse {
            running: running.clone(),
            name,
            over: CancellationToken::new(),
            settled: Arc::default(),
        }
    };
    // After the key was taken: one that ends meanwhile has its row already.
    if let Some(known) = used_by(&**store, key_id, claim)? {
        return Ok((in_use, Some(known)));
    }
    let command = ClaimIdempotency {
        key_id: key_id.to_owned(),
        idempotency_key_sha256: claim.key_sha256.to_vec().into(),
        request_sha256: claim.request_sha256.to_vec().into(),
        request_id: request_id.to_owned(),
        lease_ms: CLAIM_MS,
    };
    let mut tries = CLAIM_TRIES;
    loop {
        tries -= 1;
        match propose_claim(&**store, &command).await {
            // Another member's, which was not applied here before.
            Ok(Applied::Settled { .. }) => return Ok((in_use, used_by(&**store, key_id, claim)?)),
            Ok(_) => break,
            // The request before may be about to give the key back.
            Err(StoreError::Refused(Refused::IdempotencyInUse { .. } | Refused::IdempotencyConflict { .. }))
                if tries > 0 =>
            {
                tokio::time::sleep(CLAIM_PAUSE).await;
            }
            Err(StoreError::Refused(Refused::IdempotencyInUse { .. })) => return Err(in_use_already()),
            Err(StoreError::Refused(Refused::IdempotencyConflict { request_id })) => {
                return Err(other_body(&format!("request {request_id}")));
            }
            Err(error) => return Err(error.into()),
        }
    }
    let keeping = keep(store.clone(), command, in_use.over.clone(), in_use.settled.clone());
    tokio::spawn(keeping);
    Ok((in_use, None))
}

/// The request whose row has the key, as far as was applied here.
fn used_by(store: &dyn AccountStore, key_id: &str, claim: &Claim) -> Result<Option<String>, ApiError> {
    let known = view::idempotency(&*store.tables()?, key_id, &claim.key_sha256).map_err(StoreError::from)?;
    match known {
        Some(known) if known.request_sha256 != claim.request_sha256[..] => {
            Err(other_body(&format!("request {}", known.request_id)))
        }
        known => Ok(known.map(|known| known.request_id)),
    }
}

async fn propose_claim(store: &dyn AccountStore, claim: &ClaimIdempotency) -> Result<Applied, StoreError> {
    store.propose(command("", Kind::ClaimIdempotency(claim.clone()))).await
}

/// Prolongs a claim until its request is over, and then gives it back, if no record has the key. A claim that could not be
/// prolonged lapses: its request goes on, and at the end finds whose row has the key.
async fn keep(
    store: Arc<dyn AccountStore>,
    claim: ClaimIdempotency,
    over: CancellationToken,
    settled: Arc<AtomicBool>,
) {
    let every = Duration::from_millis(CLAIM_MS / 3);
    while over.run_until_cancelled(tokio::time::sleep(every)).await.is_some() {
        if let Some(Err(error)) = over.run_until_cancelled(propose_claim(&*store, &claim)).await {
            tracing::debug!(request_id = %claim.request_id, %error, "the claim of an idempotency key was not prolonged");
        }
    }
    if settled.load(Ordering::SeqCst) {
        return;
    }
    let release = ReleaseIdempotency {
        key_id: claim.key_id,
        idempotency_key_sha256: claim.idempotency_key_sha256,
        request_id: claim.request_id,
    };
    if let Err(error) = store.propose(command("", Kind::ReleaseIdempotency(release))).await {
        tracing::debug!(%error, "an idempotency key is free again only when its claim lapses");
    }
}

fn in_use_already() -> ApiError {
    let message = "A request with this Idempotency-Key is still running; retry when it has ended.";
    conflict(StatusCode::CONFLICT, "idempotency_key_in_use", message)
}

fn other_body(by: &str) -> ApiError {
    let message =
        format!("This Idempotency-Key was used with another body, by {by}. Send a new key with a new request.");
    conflict(StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key_reused", message)
}

fn conflict(status: StatusCode, code: &'static str, message: impl Into<String>) -> ApiError {
    let param = Some(IDEMPOTENCY_KEY_HEADER.to_owned());
    ApiError {
        param,
        ..ApiError::with(status, "invalid_request_error", Some(code), message)
    }
}
