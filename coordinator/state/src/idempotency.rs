//! `Idempotency-Key`: which request has a client's key, by API key, so that a retry is not billed twice and another body
//! under the same key is refused. Remembered for [`IDEMPOTENCY_MS`].

use crate::bounds;
use crate::keys::{self, Key, Parts};
use crate::machine::Machine;
use crate::outcome::Refused;
use crate::tables::{TablesError, TablesMut as _};
use crate::view;
use baton_proto::state::{IdempotencyRecord, UsageRecord};

/// How long an idempotency key is remembered, in milliseconds of replicated time: a day, as clients expect.
pub const IDEMPOTENCY_MS: u64 = 86_400_000;

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
