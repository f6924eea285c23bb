//! Reads of the state. Each takes one consistent version of it.

use crate::keys;
use crate::tables::{Tables, TablesError};
use baton_proto::state::{Member, UsageRecord, WorkerRecord};
use std::ops::ControlFlow;

/// A settled usage record.
#[derive(Debug, Clone, PartialEq)]
pub struct Settled {
    /// Its number, from 1 without gaps.
    pub sequence: u64,
    /// The record.
    pub record: UsageRecord,
}

/// Most records in one answer of [`usage_after`].
pub const PAGE_RECORDS_MAX: usize = 1000;

/// The hash chained over every applied command and its outcome: members at one index have the same. Zero at the start.
pub fn hash(tables: &(impl Tables + ?Sized)) -> Result<[u8; 32], TablesError> {
    match tables.get(keys::HASH)? {
        None => Ok([0; 32]),
        Some(hash) => hash
            .try_into()
            .map_err(|_| TablesError::Corrupt("the hash is not 32 bytes".into())),
    }
}

/// The last epoch given, 0 at the start.
pub fn last_epoch(tables: &(impl Tables + ?Sized)) -> Result<u64, TablesError> {
    let value = tables.get(keys::LAST_EPOCH)?;
    value.map_or(Ok(0), |value| number(&value, "the last epoch"))
}

/// A registered worker.
pub fn worker(tables: &(impl Tables + ?Sized), id: &str) -> Result<Option<WorkerRecord>, TablesError> {
    let value = tables.get(&keys::named(keys::WORKERS, id))?;
    value.map(|value| decode(&value, "a worker record")).transpose()
}

/// The registered workers, by id.
pub fn workers(tables: &(impl Tables + ?Sized)) -> Result<Vec<WorkerRecord>, TablesError> {
    let mut workers = Vec::new();
    let (from, to) = keys::whole(keys::WORKERS);
    tables.scan(&from, &to, &mut |_, value| {
        workers.push(decode(value, "a worker record")?);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(workers)
}

/// The coordinators, by id.
pub fn members(tables: &(impl Tables + ?Sized)) -> Result<Vec<Member>, TablesError> {
    let mut members = Vec::new();
    let (from, to) = keys::whole(keys::MEMBERS);
    tables.scan(&from, &to, &mut |_, value| {
        members.push(decode(value, "a member")?);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(members)
}

/// How many usage records are settled; also the number of the last one.
pub fn settled(tables: &(impl Tables + ?Sized)) -> Result<u64, TablesError> {
    let (from, to) = keys::whole(keys::USAGE);
    match tables.last(&from, &to)? {
        None => Ok(0),
        Some((key, _)) => sequence_of(&key),
    }
}

/// The record settled for a request.
pub fn usage(tables: &(impl Tables + ?Sized), request_id: &str) -> Result<Option<Settled>, TablesError> {
    let Some(sequence) = tables.get(&keys::named(keys::USAGE_IDS, request_id))? else {
        return Ok(None);
    };
    let sequence = number(&sequence, "a record's number")?;
    let record = tables.get(&keys::numbered(keys::USAGE, sequence))?;
    let record = record.ok_or_else(|| TablesError::Corrupt(format!("usage record {sequence} is missing")))?;
    let record = decode(&record, "a usage record")?;
    Ok(Some(Settled { sequence, record }))
}

/// Settled records after `sequence`, oldest first, at most `limit` and at most [`PAGE_RECORDS_MAX`].
pub fn usage_after(tables: &(impl Tables + ?Sized), sequence: u64, limit: usize) -> Result<Vec<Settled>, TablesError> {
    let limit = limit.min(PAGE_RECORDS_MAX);
    let mut page = Vec::new();
    let (_, to) = keys::whole(keys::USAGE);
    let from = keys::numbered(keys::USAGE, sequence.saturating_add(1));
    tables.scan(&from, &to, &mut |key, value| {
        if page.len() == limit {
            return Ok(ControlFlow::Break(()));
        }
        let sequence = sequence_of(key)?;
        let record = decode(value, "a usage record")?;
        page.push(Settled { sequence, record });
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(page)
}

fn sequence_of(key: &[u8]) -> Result<u64, TablesError> {
    keys::number_of(key).ok_or_else(|| TablesError::Corrupt("a key of the usage table is not a number".into()))
}

/// Reads a little-endian number.
pub(crate) fn number(bytes: &[u8], what: &str) -> Result<u64, TablesError> {
    let bytes = bytes
        .try_into()
        .map_err(|_| TablesError::Corrupt(format!("{what} is not a number")))?;
    Ok(u64::from_le_bytes(bytes))
}

/// Decodes a stored message.
pub(crate) fn decode<M: prost::Message + Default>(bytes: &[u8], what: &str) -> Result<M, TablesError> {
    M::decode(bytes).map_err(|error| TablesError::Corrupt(format!("{what}: {error}")))
}
