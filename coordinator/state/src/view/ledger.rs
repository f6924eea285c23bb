//! The ledger: rows, what was settled for a request, corrections, idempotency keys, checkpoints.

use super::{PAGE_RECORDS_MAX, message, number, page};
use crate::idempotency::IDEMPOTENCY_MS;
use crate::keys::{self, Key};
use crate::rows;
use crate::tables::{Tables, TablesError};
use baton_ledger::Hash;
use baton_proto::state::{Checkpoint, Corrected, IdempotencyRecord, LedgerRow, UsageRecord, ledger_row::Body};

/// A settled usage record.
#[derive(Debug, Clone, PartialEq)]
pub struct Settled {
    /// Number of its row.
    pub sequence: u64,
    /// The record as it stands: its price filled in, its status "expired" if it came too late.
    pub record: UsageRecord,
}

/// How many rows the ledger has; also the number of the last one.
pub fn settled(tables: &(impl Tables + ?Sized)) -> Result<u64, TablesError> {
    Ok(rows::head(tables)?.sequence)
}

/// A row.
pub fn row(tables: &(impl Tables + ?Sized), sequence: u64) -> Result<Option<LedgerRow>, TablesError> {
    message(tables, &keys::numbered(keys::ROWS, sequence), "a row")
}

/// A page of rows after the row `sequence`, oldest first: the gap-free feed.
pub fn rows_after(tables: &(impl Tables + ?Sized), sequence: u64, limit: usize) -> Result<Vec<LedgerRow>, TablesError> {
    let from = keys::numbered(keys::ROWS, sequence.saturating_add(1));
    page(tables, &from, &keys::whole(keys::ROWS).1, limit, "a row")
}

/// The row settled for a request.
pub fn usage_row(tables: &(impl Tables + ?Sized), request_id: &str) -> Result<Option<LedgerRow>, TablesError> {
    let Some(request) = request(tables, request_id)? else {
        return Ok(None);
    };
    let missing = || TablesError::Corrupt(format!("row {} is missing", request.sequence));
    Ok(Some(row(tables, request.sequence)?.ok_or_else(missing)?))
}

/// The record settled for a request.
pub fn usage(tables: &(impl Tables + ?Sized), request_id: &str) -> Result<Option<Settled>, TablesError> {
    let settled = usage_row(tables, request_id)?.and_then(of_usage);
    Ok(settled)
}

/// Usage records in the page of rows after `sequence`. Corrections among them are left out, so the last number is no
/// cursor: for a feed use [`rows_after`].
pub fn usage_after(tables: &(impl Tables + ?Sized), sequence: u64, limit: usize) -> Result<Vec<Settled>, TablesError> {
    let rows = rows_after(tables, sequence, limit.min(PAGE_RECORDS_MAX))?;
    Ok(rows.into_iter().filter_map(of_usage).collect())
}

fn of_usage(row: LedgerRow) -> Option<Settled> {
    let sequence = row.sequence;
    match row.body {
        Some(Body::Usage(record)) => Some(Settled { sequence, record }),
        _ => None,
    }
}

/// Where a request's row is, and what exactly was handed in for it.
pub(crate) struct Request {
    pub(crate) sequence: u64,
    pub(crate) handed_in: Hash,
}

pub(crate) fn request(tables: &(impl Tables + ?Sized), id: &str) -> Result<Option<Request>, TablesError> {
    let entry = numbered_hash(tables, &keys::named(keys::REQUESTS, id))?;
    Ok(entry.map(|(sequence, handed_in)| Request { sequence, handed_in }))
}

/// Number and id of the row of a correction.
pub fn correction(tables: &(impl Tables + ?Sized), id: &str) -> Result<Option<(u64, Hash)>, TablesError> {
    numbered_hash(tables, &keys::named(keys::CORRECTIONS, id))
}

fn numbered_hash(tables: &(impl Tables + ?Sized), key: &[u8]) -> Result<Option<(u64, Hash)>, TablesError> {
    let Some(bytes) = tables.get(key)? else {
        return Ok(None);
    };
    let damaged = || TablesError::Corrupt("an entry of a row's number cannot be read".into());
    let (sequence, hash) = bytes.split_at_checked(8).ok_or_else(damaged)?;
    let hash = hash.try_into().map_err(|_| damaged())?;
    Ok(Some((number(sequence, "a row's number")?, hash)))
}

/// All corrections of a request together; zero where there are none.
pub fn corrected(tables: &(impl Tables + ?Sized), request_id: &str) -> Result<Corrected, TablesError> {
    let found = message(tables, &keys::named(keys::CORRECTED, request_id), "corrections")?;
    Ok(found.unwrap_or_default())
}

/// What an idempotency key of an API key was used for, as long as that is remembered.
pub fn idempotency(
    tables: &(impl Tables + ?Sized),
    key_id: &str,
    sha256: &[u8],
) -> Result<Option<IdempotencyRecord>, TablesError> {
    let key = idempotency_key(key_id, sha256);
    let found: Option<IdempotencyRecord> = message(tables, &key, "an idempotency record")?;
    let now_ms = super::time(tables)?;
    Ok(found.filter(|found| now_ms < found.at_unix_ms.saturating_add(IDEMPOTENCY_MS)))
}

pub(crate) fn claim_key(key_id: &str, sha256: &[u8]) -> Vec<u8> {
    Key::of(keys::CLAIMS).text(key_id).rest(sha256).done()
}

pub(crate) fn idempotency_key(key_id: &str, sha256: &[u8]) -> Vec<u8> {
    Key::of(keys::IDEMPOTENCY).text(key_id).rest(sha256).done()
}

/// The period that is closed and not signed yet. Set its `at_unix_ms` to that of the command that will bring the
/// signature, then sign it.
pub fn closed_period(tables: &(impl Tables + ?Sized)) -> Result<Option<Checkpoint>, TablesError> {
    message(tables, keys::CLOSED, "a closed period")
}

/// The checkpoint whose last row is `last_sequence`.
pub fn checkpoint(tables: &(impl Tables + ?Sized), last_sequence: u64) -> Result<Option<Checkpoint>, TablesError> {
    message(
        tables,
        &keys::numbered(keys::CHECKPOINTS, last_sequence),
        "a checkpoint",
    )
}

/// The checkpoint whose period holds a row; nothing if that is not signed yet.
pub fn checkpoint_over(tables: &(impl Tables + ?Sized), sequence: u64) -> Result<Option<Checkpoint>, TablesError> {
    let before = sequence.max(1) - 1;
    Ok(checkpoints_after(tables, before, 1)?.pop())
}

/// The last checkpoint.
pub fn last_checkpoint(tables: &(impl Tables + ?Sized)) -> Result<Option<Checkpoint>, TablesError> {
    let (from, to) = keys::whole(keys::CHECKPOINTS);
    let last = tables.last(&from, &to)?;
    last.map(|(_, value)| super::decode(&value, "a checkpoint")).transpose()
}

/// A page of checkpoints that end after the row `sequence`, oldest first.
pub fn checkpoints_after(
    tables: &(impl Tables + ?Sized),
    sequence: u64,
    limit: usize,
) -> Result<Vec<Checkpoint>, TablesError> {
    let from = keys::numbered(keys::CHECKPOINTS, sequence.saturating_add(1));
    page(tables, &from, &keys::whole(keys::CHECKPOINTS).1, limit, "a checkpoint")
}
