//! How far a member is, read at one moment.

use crate::RaftStoreError;
use crate::database::Store;
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
    let state = StateView::open(store)?;
    Ok(Position {
        applied_index: state.applied().0,
        hash: view::hash(&state)?,
        settled: view::settled(&state)?,
    })
}
