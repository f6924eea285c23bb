//! `Idempotency-Key`: which request has a client's key, by API key, so that a retry is not billed twice and another body
//! under the same key is refused. Remembered for [`IDEMPOTENCY_MS`].
//!
//! ```text
//!            claim                        settle with the key
//!   free ─────────────▶ claimed ────────────────────────────────▶ recorded ──a day──▶ free
//!    ▲                   │    ▲ claim again, same request: prolonged
//!    ╰── release, lapse ─╯    ╰── another request: refused, in use (same body) or conflict
//! ```
//!
//! A claim keeps two members from running one key at once; it decides nothing about money: a settlement asks only for the
//! record that has the key, so a claim that lapsed while its request still ran costs compute and no correctness.

use crate::bounds;
use crate::keys::{self, Key, Parts};
use crate::machine::{Handled, Machine};
use crate::outcome::{Applied, Refused};
use crate::tables::{TablesError, TablesMut as _};
use crate::view;
use baton_proto::state::{ClaimIdempotency, IdempotencyClaim, IdempotencyRecord, ReleaseIdempotency, UsageRecord};

/// How long an idempotency key is remembered, in milliseconds of replicated time: a day, as clients expect.
pub const IDEMPOTENCY_MS: u64 = 86_400_000;

/// Longest claim, in milliseconds of replicated time: how long a key is refused after its member died.
pub const CLAIM_MS_MAX: u64 = 60_000;

pub(crate) fn claim(machine: &mut Machine<'_>, command: ClaimIdempotency) -> Handled {
    bounds::text("the key's id", &command.key_id)?;
    bounds::name("the request id", &command.request_id)?;
    bounds::exactly("the idempotency key's SHA-256", &command.idempotency_key_sha256, 32)?;
    bounds::exactly("the request's SHA-256", &command.request_sha256, 32)?;
    if command.lease_ms == 0 {
        return Err(Refused::invalid("a claim without a lease").into());
    }
    if let Some(known) = view::idempotency(machine, &command.key_id, &command.idempotency_key_sha256)? {
        return if known.request_sha256 == command.request_sha256 {
            let sequence = known.sequence;
            Ok(Applied::Settled { sequence })
        } else {
            let request_id = known.request_id;
            Err(Refused::IdempotencyConflict { request_id }.into())
        };
    }
    let key = view::claim_key(&command.key_id, &command.idempotency_key_sha256);
    let mut expires_unix_ms = machine.now_ms.saturating_add(command.lease_ms.min(CLAIM_MS_MAX));
    if let Some(known) = view::message::<IdempotencyClaim>(machine, &key, "an idempotency claim")? {
        if machine.now_ms < known.expires_unix_ms {
            let request_id = known.request_id;
            if known.request_sha256 != command.request_sha256 {
                return Err(Refused::IdempotencyConflict { request_id }.into());
            }
            if request_id != command.request_id {
                return Err(Refused::IdempotencyInUse { request_id }.into());
            }
            expires_unix_ms = expires_unix_ms.max(known.expires_unix_ms);
        }
        machine.delete(&claim_due_key(known.expires_unix_ms, &key))?;
    }
    let claim = IdempotencyClaim {
        request_id: command.request_id,
        request_sha256: command.request_sha256,
        expires_unix_ms,
    };
    machine.put_message(&key, &claim)?;
    machine.put(&claim_due_key(expires_unix_ms, &key), &[])?;
    Ok(Applied::Claimed { expires_unix_ms })
}

pub(crate) fn release(machine: &mut Machine<'_>, command: &ReleaseIdempotency) -> Handled {
    let key = view::claim_key(&command.key_id, &command.idempotency_key_sha256);
    let known = view::message::<IdempotencyClaim>(machine, &key, "an idempotency claim")?;
    let known = known.filter(|known| known.request_id == command.request_id);
    if let Some(known) = &known {
        unclaim(machine, &key, known)?;
    }
    Ok(Applied::Removed {
        removed: known.is_some_and(|known| machine.now_ms < known.expires_unix_ms),
    })
}

fn unclaim(machine: &mut Machine<'_>, key: &[u8], known: &IdempotencyClaim) -> Result<(), TablesError> {
    machine.delete(&claim_due_key(known.expires_unix_ms, key))?;
    machine.delete(key)
}

/// A claim's time is over.
pub(crate) fn lapse(machine: &mut Machine<'_>, due_key: &[u8]) -> Result<(), TablesError> {
    let mut parts = Parts::of(due_key);
    parts.number()?;
    let key = Key::of(keys::CLAIMS).rest(parts.rest()).done();
    machine.delete(&key)?;
    machine.delete(due_key)
}

fn claim_due_key(expires_unix_ms: u64, key: &[u8]) -> Vec<u8> {
    Key::of(keys::CLAIMS_DUE).number(expires_unix_ms).rest(&key[1..]).done()
}

pub(crate) fn check(record: &UsageRecord) -> Result<(), Refused> {
    if record.idempotency_key_sha256.is_empty() {
        return Ok(());
    }
    bounds::exactly("the idempotency key's SHA-256", &record.idempotency_key_sha256, 32)?;
    bounds::exactly("the request's SHA-256", &record.request_sha256, 32)
}

/// The request that has the record's key already.
pub(crate) fn known(machine: &Machine<'_>, record: &UsageRecord) -> Result<Option<IdempotencyRecord>, TablesError> {
    if record.idempotency_key_sha256.is_empty() {
        return Ok(None);
    }
    view::idempotency(machine, &record.key_id, &record.idempotency_key_sha256)
}

/// Called when no live record has the key.
pub(crate) fn remember(machine: &mut Machine<'_>, record: &UsageRecord, sequence: u64) -> Result<(), TablesError> {
    if record.idempotency_key_sha256.is_empty() {
        return Ok(());
    }
    let claim = view::claim_key(&record.key_id, &record.idempotency_key_sha256);
    if let Some(known) = view::message(machine, &claim, "an idempotency claim")? {
        unclaim(machine, &claim, &known)?;
    }
    let key = view::idempotency_key(&record.key_id, &record.idempotency_key_sha256);
    // One that is over and not cleared away yet: its due key would clear this one too early.
    if let Some(old) = view::message::<IdempotencyRecord>(machine, &key, "an idempotency record")? {
        machine.delete(&due_key(old.at_unix_ms, &key))?;
    }
    let known = IdempotencyRecord {
        request_id: record.request_id.clone(),
        request_sha256: record.request_sha256.clone(),
        sequence,
        at_unix_ms: machine.now_ms,
    };
    machine.put_message(&key, &known)?;
    machine.put(&due_key(machine.now_ms, &key), &[])
}

pub(crate) fn forget(machine: &mut Machine<'_>, due_key: &[u8]) -> Result<(), TablesError> {
    let mut parts = Parts::of(due_key);
    parts.number()?;
    let key = Key::of(keys::IDEMPOTENCY).rest(parts.rest()).done();
    machine.delete(&key)?;
    machine.delete(due_key)
}

fn due_key(at_unix_ms: u64, key: &[u8]) -> Vec<u8> {
    Key::of(keys::IDEMPOTENCY_DUE)
        .number(at_unix_ms.saturating_add(IDEMPOTENCY_MS))
        .rest(&key[1..])
        .done()
}
