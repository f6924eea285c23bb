//! How far a member is, read at one moment.

use crate::RaftStoreError;
use crate::database::{META, Store, meta, number};
use crate::tables::StateView;
use baton_state::view;

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

pub(crate) fn position(store: &Store) -> Result<Position, RaftStoreError> {
    let txn = store.read()?;
    let applied = txn.open_table(META)?.get(meta::APPLIED)?;
    let applied = applied.and_then(|value| number(value.value()));
    let tables = StateView::of(&txn)?;
    Ok(Position {
        applied_index: applied.ok_or_else(|| store.corrupt("`applied` is missing"))?,
        hash: view::hash(&tables)?,
        settled: view::settled(&tables)?,
    })
}
