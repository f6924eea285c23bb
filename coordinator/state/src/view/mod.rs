//! Reads of the state. Each takes one consistent version of it, and what it returns is bounded: lists come in pages of at
//! most [`PAGE_RECORDS_MAX`], each asked for after the last name or number of the one before.

mod access;
mod batches;
mod cluster;
mod files;
mod ledger;
mod money;
mod usage_report;

pub use access::{Access, access, audit_after, audited, key, key_by_hash, keys_after, project, projects_after};
pub use batches::{batch, batch_done, batches_of, open_batches};
pub use cluster::{
    deployment, deployments_after, hash, last_epoch, member, members, time, worker, workers, workers_after,
};
pub use files::{IdOrder, chunk_names, chunks_after, file, file_ids_of, file_totals, files_are_due, owner_totals};
pub use ledger::{
    Settled, checkpoint, checkpoint_over, checkpoints_after, closed_period, corrected, correction, idempotency,
    last_checkpoint, row, rows_after, settled, usage, usage_after, usage_row,
};
pub use money::{
    budget, budgets_after, budgets_of, has_slices, price, price_at, prices_after, slice, slices_after, window,
};
pub use usage_report::{Bucket, Dimension, ReportError, UsageQuery, UsageReport, Width, usage_report};

pub(crate) use access::key_hash_key;
pub(crate) use files::chunk_key;
pub(crate) use ledger::{idempotency_key, request};
pub(crate) use money::{slice_key, window_key};

use crate::keys::{self, Key};
use crate::tables::{Tables, TablesError};
use std::ops::ControlFlow;

/// Most entries in one page.
pub const PAGE_RECORDS_MAX: usize = 1000;

/// The message at a key.
pub(crate) fn message<M: prost::Message + Default>(
    tables: &(impl Tables + ?Sized),
    key: &[u8],
    what: &str,
) -> Result<Option<M>, TablesError> {
    tables.get(key)?.map(|value| decode(&value, what)).transpose()
}

/// Messages with `from <= key < to`, at most `limit` and at most a page.
fn page<M: prost::Message + Default>(
    tables: &(impl Tables + ?Sized),
    from: &[u8],
    to: &[u8],
    limit: usize,
    what: &str,
) -> Result<Vec<M>, TablesError> {
    let limit = limit.min(PAGE_RECORDS_MAX);
    let mut found = Vec::new();
    tables.scan(from, to, &mut |_, value| {
        if found.len() == limit {
            return Ok(ControlFlow::Break(()));
        }
        found.push(decode(value, what)?);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(found)
}

/// A page of a table whose keys are names, after the name `after`.
fn page_after<M: prost::Message + Default>(
    tables: &(impl Tables + ?Sized),
    table: u8,
    after: &str,
    limit: usize,
    what: &str,
) -> Result<Vec<M>, TablesError> {
    let from = Key::of(table).rest(after.as_bytes());
    // The next name after one is that with a zero byte more.
    let from = if after.is_empty() { from } else { from.rest(&[0]) };
    page(tables, &from.done(), &keys::whole(table).1, limit, what)
}

/// Reads a little-endian number.
fn number(bytes: &[u8], what: &str) -> Result<u64, TablesError> {
    let bytes = bytes
        .try_into()
        .map_err(|_| TablesError::Corrupt(format!("{what} is not a number")))?;
    Ok(u64::from_le_bytes(bytes))
}

/// Decodes a stored message.
fn decode<M: prost::Message + Default>(bytes: &[u8], what: &str) -> Result<M, TablesError> {
    M::decode(bytes).map_err(|error| TablesError::Corrupt(format!("{what}: {error}")))
}

/// The bounds of the keys that begin with `prefix`.
fn under(prefix: Key) -> (Vec<u8>, Vec<u8>) {
    (prefix.clone().done(), prefix.beyond())
}
