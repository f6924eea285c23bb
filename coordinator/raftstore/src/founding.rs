//! The first contents of a store: of a founder, of a member that joins, and of a group that a backup starts.

use crate::database::{FORMAT, LOG, META, STATE, Store, meta};
use crate::log::{bytes, put, put_hard_state};
use crate::{RaftStoreConfig, RaftStoreError};
use raft::eraftpb::{ConfState, HardState};
use redb::{ReadableTable, TableHandle, WriteTransaction};

/// Index and term from which a new group's log starts. Not 0: a member that joins later has an empty log and must be
/// told of the founders, which only a snapshot does.
const FIRST: (u64, u64) = (1, 1);

/// Where a store's log starts, and who belongs to the group.
pub(crate) struct Founding {
    pub(crate) node_id: u64,
    pub(crate) voters: Vec<u64>,
    /// Index and term of what is applied and not in the log.
    pub(crate) at: (u64, u64),
}

impl Founding {
    pub(crate) fn of(config: &RaftStoreConfig) -> Self {
        Self {
            node_id: config.node_id,
            voters: config.voters.clone(),
            // A member that joins knows nothing.
            at: if config.voters.is_empty() { (0, 0) } else { FIRST },
        }
    }
}

/// Writes the first contents of an empty file; leaves any other as it is.
pub(crate) fn found(store: &Store, founding: &Founding) -> Result<(), RaftStoreError> {
    let txn = store.write_durable()?;
    let empty = txn.open_table(META)?.get(meta::FORMAT)?.is_none();
    if !empty {
        return Ok(txn.abort()?);
    }
    if txn.list_tables()?.any(|table| table.name() != META.name()) {
        return Err(store.corrupt("it holds another program's tables"));
    }
    for table in STATE {
        txn.open_table(table)?;
    }
    write(&txn, founding)?;
    Ok(txn.commit()?)
}

/// Writes everything but the state.
pub(crate) fn write(txn: &WriteTransaction, founding: &Founding) -> Result<(), RaftStoreError> {
    let (index, term) = founding.at;
    txn.open_table(LOG)?;
    let hard_state = HardState {
        commit: index,
        term,
        ..HardState::default()
    };
    put_hard_state(txn, &hard_state)?;
    let mut conf_state = ConfState::default();
    conf_state.set_voters(founding.voters.clone());
    put(txn, meta::CONF_STATE, &bytes(&conf_state)?)?;
    put(
        txn,
        meta::TRUNCATED,
        &[index.to_le_bytes(), term.to_le_bytes()].concat(),
    )?;
    put(txn, meta::APPLIED, &index.to_le_bytes())?;
    put(txn, meta::NODE_ID, &founding.node_id.to_le_bytes())?;
    put(txn, meta::FORMAT, &FORMAT.to_le_bytes())
}
