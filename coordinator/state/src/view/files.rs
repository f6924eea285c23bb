//! Files and their chunks. A file that is over may still be here: whoever shows one looks at its time.

use super::{message, page, under};
use crate::bounds::OUTPUT_CHUNKS_MAX;
use crate::keys::{self, Key};
use crate::tables::{Tables, TablesError};
use baton_proto::state::{File, FileChunk, FileTotals};
use std::ops::ControlFlow;

/// Which way a list goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdOrder {
    /// Oldest first.
    Ascending,
    /// Newest first.
    Descending,
}

/// A file.
pub fn file(tables: &(impl Tables + ?Sized), id: &str) -> Result<Option<File>, TablesError> {
    message(tables, &keys::named(keys::FILES, id), "a file")
}

/// What an owner has.
pub fn owner_totals(tables: &(impl Tables + ?Sized), owner: &str) -> Result<FileTotals, TablesError> {
    let key = keys::named(keys::OWNER_TOTALS, owner);
    Ok(message(tables, &key, "the totals of an owner")?.unwrap_or_default())
}

/// What all owners have.
pub fn file_totals(tables: &(impl Tables + ?Sized)) -> Result<FileTotals, TablesError> {
    Ok(message(tables, keys::FILE_TOTALS, "the totals of files")?.unwrap_or_default())
}

/// Ids of an owner's files after the id `after` (empty: from the start), in order, at most `limit`.
pub fn file_ids_of(
    tables: &(impl Tables + ?Sized),
    owner: &str,
    after: &str,
    order: IdOrder,
    limit: usize,
) -> Result<Vec<String>, TablesError> {
    ids_of(tables, keys::FILES_BY_OWNER, owner, after, order, limit)
}

/// Ids under an owner in a table of owners and ids.
pub(super) fn ids_of(
    tables: &(impl Tables + ?Sized),
    table: u8,
    owner: &str,
    after: &str,
    order: IdOrder,
    limit: usize,
) -> Result<Vec<String>, TablesError> {
    let prefix = Key::of(table).text(owner);
    let skip = prefix.clone().done().len();
    let (mut from, mut to) = under(prefix.clone());
    let edge = prefix.rest(after.as_bytes());
    let mut ids = Vec::new();
    let name = |key: &[u8]| String::from_utf8_lossy(key.get(skip..).unwrap_or_default()).into_owned();
    match order {
        IdOrder::Ascending => {
            if !after.is_empty() {
                from = edge.rest(&[0]).done();
            }
            tables.scan(&from, &to, &mut |key, _| {
                if ids.len() == limit {
                    return Ok(ControlFlow::Break(()));
                }
                ids.push(name(key));
                Ok(ControlFlow::Continue(()))
            })?;
        }
        IdOrder::Descending => {
            if !after.is_empty() {
                to = edge.done();
            }
            while ids.len() < limit
                && let Some((key, _)) = tables.last(&from, &to)?
            {
                ids.push(name(&key));
                to = key;
            }
        }
    }
    Ok(ids)
}

/// Chunks of a file from the number `from` on, in order, at most a page.
pub fn chunks_after(
    tables: &(impl Tables + ?Sized),
    file_id: &str,
    from: u64,
    limit: usize,
) -> Result<Vec<FileChunk>, TablesError> {
    let to = chunk_key(file_id, u64::from(OUTPUT_CHUNKS_MAX));
    page(tables, &chunk_key(file_id, from), &to, limit, "a chunk of a file")
}

/// Hashes of all chunks that are needed, duplicates included. Visits each until `visit` breaks.
pub fn chunk_names(
    tables: &(impl Tables + ?Sized),
    visit: &mut dyn FnMut(FileChunk) -> ControlFlow<()>,
) -> Result<(), TablesError> {
    let (from, to) = keys::whole(keys::FILE_CHUNKS);
    tables.scan(&from, &to, &mut |_, value| {
        Ok(visit(super::decode(value, "a chunk of a file")?))
    })
}

/// Whether a file or batch should have been forgotten by then.
pub fn files_are_due(tables: &(impl Tables + ?Sized), unix_ms: u64) -> Result<bool, TablesError> {
    let to = keys::numbered(keys::FILES_DUE, unix_ms);
    Ok(tables.last(&[keys::FILES_DUE], &to)?.is_some())
}

pub(crate) fn chunk_key(file_id: &str, number: u64) -> Vec<u8> {
    Key::of(keys::FILE_CHUNKS).text(file_id).number(number).done()
}
