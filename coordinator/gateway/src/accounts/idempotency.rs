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
//! Status codes are those of the IETF's draft "The Idempotency-Key HTTP Header Field". What runs is known to each gateway
//! alone: two members that get one key at the same time both compute, and the second to end finds the first's row.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::{HeaderMap, StatusCode};
use baton_state::view;

use super::keys::sha256;
use super::store::AccountStore;
use crate::api_error::ApiError;

/// The request's header.
pub const IDEMPOTENCY_KEY_HEADER: &str = "idempotency-key";
/// The answer's header, on an answer that was computed again.
pub const REPLAYED_HEADER: &str = "idempotent-replayed";
/// Bytes of a key: a UUID has 36.
const KEY_BYTES_MAX: usize = 255;

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

/// A key in use; free again on drop.
pub(crate) struct InUse {
    running: Arc<InFlight>,
    name: Name,
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut running = self.running.0.lock().unwrap_or_else(PoisonError::into_inner);
        running.remove(&self.name);
    }
}

/// Takes the key for a request of `key_id`. Also tells the request that the key was used for, if that ended well.
pub(crate) fn take(
    running: &Arc<InFlight>,
    store: &dyn AccountStore,
    key_id: &str,
    claim: &Claim,
) -> Result<(InUse, Option<String>), ApiError> {
    let name = (key_id.to_owned(), claim.key_sha256);
    let in_use = {
        let mut map = running.0.lock().unwrap_or_else(PoisonError::into_inner);
        match map.get(&name) {
            Some(request) if *request == claim.request_sha256 => {
                let message = "A request with this Idempotency-Key is still running; retry when it has ended.";
                return Err(conflict(StatusCode::CONFLICT, "idempotency_key_in_use", message));
            }
            Some(_) => return Err(other_body("a request that is still running")),
            None => {}
        }
        map.insert(name.clone(), claim.request_sha256);
        InUse {
            running: running.clone(),
            name,
        }
    };
    // After the key was taken: one that ends meanwhile has its row already.
    let known =
        view::idempotency(&*store.tables()?, key_id, &claim.key_sha256).map_err(super::store::StoreError::from)?;
    match known {
        None => Ok((in_use, None)),
        Some(known) if known.request_sha256 == claim.request_sha256[..] => Ok((in_use, Some(known.request_id))),
        Some(known) => Err(other_body(&format!("request {}", known.request_id))),
    }
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
