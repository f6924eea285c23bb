//! The rows of the ledger: appended, numbered from 1 without gaps, chained by hash, never changed.

use crate::keys;
use crate::machine::Machine;
use crate::tables::{Tables, TablesError, TablesMut as _};
use baton_ledger::merkle::Frontier;
use baton_ledger::{GENESIS, Hash, row};
use baton_proto::state::{Charge, LedgerRow, ledger_row::Body};

/// The end of the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    /// Number of the last row, 0 if there is none.
    pub(crate) sequence: u64,
    /// Its hash.
    pub(crate) hash: Hash,
    /// Merkle tree of the rows since the last closed period.
    pub(crate) frontier: Frontier,
}

pub(crate) fn head(tables: &(impl Tables + ?Sized)) -> Result<Head, TablesError> {
    let Some(bytes) = tables.get(keys::HEAD)? else {
        return Ok(Head {
            sequence: 0,
            hash: GENESIS,
            frontier: Frontier::default(),
        });
    };
    let damaged = || TablesError::Corrupt("the end of the ledger cannot be read".into());
    let (sequence, rest) = bytes.split_first_chunk::<8>().ok_or_else(damaged)?;
    let (hash, frontier) = rest.split_first_chunk::<32>().ok_or_else(damaged)?;
    Ok(Head {
        sequence: u64::from_le_bytes(*sequence),
        hash: *hash,
        frontier: Frontier::from_bytes(frontier).map_err(|_| damaged())?,
    })
}

pub(crate) fn put_head(machine: &mut Machine<'_>, head: &Head) -> Result<(), TablesError> {
    let frontier = head.frontier.to_bytes();
    let bytes = [&head.sequence.to_le_bytes()[..], &head.hash, &frontier].concat();
    machine.put(keys::HEAD, &bytes)
}

/// Appends a row and returns it.
pub(crate) fn append(machine: &mut Machine<'_>, body: Body, charge: Charge) -> Result<LedgerRow, TablesError> {
    let (head, id) = (head(machine)?, row::body_id(&body));
    append_after(machine, head, id, body, charge)
}

/// The same, for who has read the end of the ledger and hashed the body already.
pub(crate) fn append_after(
    machine: &mut Machine<'_>,
    mut head: Head,
    id: Hash,
    body: Body,
    charge: Charge,
) -> Result<LedgerRow, TablesError> {
    head.sequence += 1;
    let (index, now_ms) = (machine.index, machine.now_ms);
    let row = row::seal_known(&head.hash, head.sequence, index, now_ms, id, body, charge);
    let hash = row.hash.as_ref().try_into();
    head.hash = hash.map_err(|_| TablesError::Corrupt("a row's hash is not one".into()))?;
    head.frontier.push(&head.hash);
    machine.put_message(&keys::numbered(keys::ROWS, head.sequence), &row)?;
    put_head(machine, &head)?;
    Ok(row)
}
