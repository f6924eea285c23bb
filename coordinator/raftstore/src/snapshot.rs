//! The applied state as one message, for a member too far behind for the log. Written and read whole: fit for a group
//! whose ledger is small; it deliberately knows nothing of chunks or streams.

use crate::RaftStoreError;
use crate::database::{META, Store, USAGE, USAGE_IDS, WORKERS, meta, number};
use crate::log::put;
use prost::Message as _;
use redb::{ReadableTable, WriteTransaction};

/// Field numbers are part of the wire contract between members.
#[derive(Clone, PartialEq, prost::Message)]
struct Image {
    #[prost(bytes = "vec", tag = "1")]
    hash: Vec<u8>,
    #[prost(uint64, tag = "2")]
    last_epoch: u64,
    #[prost(message, repeated, tag = "3")]
    workers: Vec<Worker>,
    #[prost(message, repeated, tag = "4")]
    usage: Vec<Usage>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Worker {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(bytes = "vec", tag = "2")]
    record: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Usage {
    #[prost(uint64, tag = "1")]
    sequence: u64,
    #[prost(string, tag = "2")]
    request_id: String,
    #[prost(bytes = "vec", tag = "3")]
    record: Vec<u8>,
}

/// The state and the index it is of.
pub(crate) fn export(store: &Store) -> Result<(u64, Vec<u8>), RaftStoreError> {
    let txn = store.read()?;
    let table = txn.open_table(META)?;
    let value = |key: &str| -> Result<Vec<u8>, RaftStoreError> {
        Ok(table.get(key)?.map(|value| value.value().to_vec()).unwrap_or_default())
    };
    let applied = number(&value(meta::APPLIED)?).ok_or_else(|| store.corrupt("`applied` is not a number"))?;
    let mut image = Image {
        hash: value(meta::HASH)?,
        last_epoch: number(&value(meta::LAST_EPOCH)?).unwrap_or(0),
        ..Image::default()
    };
    for item in txn.open_table(WORKERS)?.iter()? {
        let (id, record) = item?;
        image.workers.push(Worker {
            id: id.value().to_owned(),
            record: record.value().to_vec(),
        });
    }
    let usage = txn.open_table(USAGE)?;
    for item in txn.open_table(USAGE_IDS)?.iter()? {
        let (request_id, sequence) = item?;
        let sequence = sequence.value();
        let record = usage.get(sequence)?;
        let record = record.ok_or_else(|| store.corrupt(format!("usage record {sequence} is missing")))?;
        image.usage.push(Usage {
            sequence,
            request_id: request_id.value().to_owned(),
            record: record.value().to_vec(),
        });
    }
    Ok((applied, image.encode_to_vec()))
}

/// Replaces the applied tables within `txn`. The caller writes the applied index.
pub(crate) fn import(txn: &WriteTransaction, data: &[u8]) -> Result<(), RaftStoreError> {
    let image = Image::decode(data)
        .map_err(|error| RaftStoreError::Stopped(format!("a snapshot from the leader cannot be read: {error}")))?;
    let mut workers = txn.open_table(WORKERS)?;
    workers.retain(|_, _| false)?;
    for worker in &image.workers {
        workers.insert(worker.id.as_str(), worker.record.as_slice())?;
    }
    let mut usage = txn.open_table(USAGE)?;
    let mut ids = txn.open_table(USAGE_IDS)?;
    usage.retain(|_, _| false)?;
    ids.retain(|_, _| false)?;
    for record in &image.usage {
        usage.insert(record.sequence, record.record.as_slice())?;
        ids.insert(record.request_id.as_str(), record.sequence)?;
    }
    if !image.hash.is_empty() {
        put(txn, meta::HASH, &image.hash)?;
    }
    put(txn, meta::LAST_EPOCH, &image.last_epoch.to_le_bytes())
}
