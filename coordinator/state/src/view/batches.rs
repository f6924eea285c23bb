//! Batches.

use super::files::{IdOrder, ids_of};
use super::message;
use crate::keys;
use crate::tables::{Tables, TablesError};
use baton_proto::state::Batch;
use std::ops::ControlFlow;

/// A batch.
pub fn batch(tables: &(impl Tables + ?Sized), id: &str) -> Result<Option<Batch>, TablesError> {
    message(tables, &keys::named(keys::BATCHES, id), "a batch")
}

/// An owner's batches after the id `after` (empty: from the newest on), newest first, at most `limit`.
pub fn batches_of(
    tables: &(impl Tables + ?Sized),
    owner: &str,
    after: &str,
    limit: usize,
) -> Result<Vec<Batch>, TablesError> {
    let ids = ids_of(tables, keys::BATCHES_BY_OWNER, owner, after, IdOrder::Descending, limit)?;
    let missing = |id: &str| TablesError::Corrupt(format!("batch {id} is missing"));
    ids.iter()
        .map(|id| batch(tables, id)?.ok_or_else(|| missing(id)))
        .collect()
}

/// All batches that are not over, with the ids of their input files; oldest first.
pub fn open_batches(tables: &(impl Tables + ?Sized)) -> Result<Vec<(String, String)>, TablesError> {
    let (from, to) = keys::whole(keys::BATCHES_OPEN);
    let mut found = Vec::new();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    tables.scan(&from, &to, &mut |key, value| {
        found.push((text(&key[1..]), text(value)));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(found)
}

/// Which lines of a batch are done: a bit for each, the first in the lowest bit of the first byte. Bytes that are not there
/// are 0.
pub fn batch_done(tables: &(impl Tables + ?Sized), id: &str) -> Result<Vec<u8>, TablesError> {
    Ok(tables.get(&keys::named(keys::BATCH_DONE, id))?.unwrap_or_default())
}
