//! Reads of the applied state: each sees one consistent version, and none waits for a writer.

use crate::RaftStoreError;
use crate::database::{META, Store, USAGE, USAGE_IDS, WORKERS, meta, number};
use baton_proto::state::{UsageRecord, WorkerRecord};
use prost::Message as _;
use redb::{ReadableTable, ReadableTableMetadata};

/// How far a member is, and what it has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Log index of the last applied entry.
    pub applied_index: u64,
    /// Hash chained over every applied command and its outcome: members at one index have the same.
    pub hash: [u8; 32],
    /// Usage records settled.
    pub settled: u64,
}

/// A settled usage record.
#[derive(Debug, Clone, PartialEq)]
pub struct Settled {
    /// Its number, from 1 without gaps.
    pub sequence: u64,
    /// The record.
    pub record: UsageRecord,
}

/// Records in one answer of [`usage_after`].
pub(crate) const PAGE_RECORDS_MAX: usize = 1000;

pub(crate) fn position(store: &Store) -> Result<Position, RaftStoreError> {
    let txn = store.read()?;
    let table = txn.open_table(META)?;
    let applied = table.get(meta::APPLIED)?.and_then(|value| number(value.value()));
    let hash = match table.get(meta::HASH)? {
        None => [0; 32],
        Some(hash) => hash
            .value()
            .try_into()
            .map_err(|_| store.corrupt("the hash is not 32 bytes"))?,
    };
    Ok(Position {
        applied_index: applied.ok_or_else(|| store.corrupt("`applied` is missing"))?,
        hash,
        settled: txn.open_table(USAGE)?.len()?,
    })
}

pub(crate) fn workers(store: &Store) -> Result<Vec<WorkerRecord>, RaftStoreError> {
    let txn = store.read()?;
    let mut workers = Vec::new();
    for item in txn.open_table(WORKERS)?.iter()? {
        let record = WorkerRecord::decode(item?.1.value());
        workers.push(record.map_err(|error| store.corrupt(format!("a worker record: {error}")))?);
    }
    Ok(workers)
}

pub(crate) fn usage(store: &Store, request_id: &str) -> Result<Option<Settled>, RaftStoreError> {
    let txn = store.read()?;
    let Some(sequence) = txn.open_table(USAGE_IDS)?.get(request_id)?.map(|value| value.value()) else {
        return Ok(None);
    };
    let record = txn.open_table(USAGE)?.get(sequence)?;
    let record = record.ok_or_else(|| store.corrupt(format!("usage record {sequence} is missing")))?;
    Ok(Some(settled(store, sequence, record.value())?))
}

pub(crate) fn usage_after(store: &Store, sequence: u64, limit: usize) -> Result<Vec<Settled>, RaftStoreError> {
    let txn = store.read()?;
    let table = txn.open_table(USAGE)?;
    let mut page = Vec::new();
    for item in table
        .range(sequence.saturating_add(1)..)?
        .take(limit.min(PAGE_RECORDS_MAX))
    {
        let (sequence, record) = item?;
        page.push(settled(store, sequence.value(), record.value())?);
    }
    Ok(page)
}

fn settled(store: &Store, sequence: u64, bytes: &[u8]) -> Result<Settled, RaftStoreError> {
    let record = UsageRecord::decode(bytes);
    Ok(Settled {
        sequence,
        record: record.map_err(|error| store.corrupt(format!("usage record {sequence}: {error}")))?,
    })
}
