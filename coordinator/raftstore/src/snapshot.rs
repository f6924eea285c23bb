//! The applied state as one message, for a member too far behind for the log. Written and read whole: fit for a group
//! whose state is small; it deliberately knows nothing of chunks or streams.

use crate::RaftStoreError;
use crate::database::{META, STATE, Store, meta, number};
use prost::Message as _;
use redb::{ReadableTable, WriteTransaction};

/// Field numbers are part of the wire contract between members.
#[derive(Clone, PartialEq, prost::Message)]
struct Image {
    #[prost(message, repeated, tag = "1")]
    pairs: Vec<Pair>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Pair {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// The state and the index it is of.
pub(crate) fn export(store: &Store) -> Result<(u64, Vec<u8>), RaftStoreError> {
    let txn = store.read()?;
    let applied = txn.open_table(META)?.get(meta::APPLIED)?;
    let applied = applied.and_then(|value| number(value.value()));
    let applied = applied.ok_or_else(|| store.corrupt("`applied` is not a number"))?;
    let mut image = Image::default();
    for item in txn.open_table(STATE)?.iter()? {
        let (key, value) = item?;
        image.pairs.push(Pair {
            key: key.value().to_vec(),
            value: value.value().to_vec(),
        });
    }
    Ok((applied, image.encode_to_vec()))
}

/// Replaces the state within `txn`. The caller writes the applied index.
pub(crate) fn import(txn: &WriteTransaction, data: &[u8]) -> Result<(), RaftStoreError> {
    let image = Image::decode(data)
        .map_err(|error| RaftStoreError::Stopped(format!("a snapshot from the leader cannot be read: {error}")))?;
    let mut state = txn.open_table(STATE)?;
    state.retain(|_, _| false)?;
    for pair in &image.pairs {
        state.insert(pair.key.as_slice(), pair.value.as_slice())?;
    }
    Ok(())
}
