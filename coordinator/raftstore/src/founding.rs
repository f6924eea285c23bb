//! The first contents of a store: of a founder, of a member that joins, and of a group that a backup starts.

use crate::database::{FORMAT, LOG, META, STATE, Store, meta, pair_bytes};
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

/// Writes the first contents of empty files; leaves any others as they are. `store_id` is new to the world.
pub(crate) fn found(store: &Store, founding: &Founding, store_id: u64) -> Result<(), RaftStoreError> {
    let txn = store.write_durable()?;
    let empty = txn.open_table(META)?.get(meta::FORMAT)?.is_none();
    let foreign = txn.list_tables()?.any(|table| table.name() != META.name());
    txn.abort()?;
    if !empty {
        return Ok(());
    }
    if foreign {
        return Err(store.corrupt("it holds another program's tables"));
    }
    let txn = store.write_state_durable()?;
    for table in STATE {
        // What a founding that was cut short wrote may be written again; nothing is ever applied to such a file.
        if txn.open_table(table)?.first()?.is_some() {
            return Err(store.corrupt("it is empty, while the state beside it is not"));
        }
    }
    write_state(&txn, founding, store_id)?;
    txn.commit()?;
    write_log(store, founding, store_id)
}

/// Writes everything of the state's file but the state.
pub(crate) fn write_state(txn: &WriteTransaction, founding: &Founding, store_id: u64) -> Result<(), RaftStoreError> {
    let mut conf_state = ConfState::default();
    conf_state.set_voters(founding.voters.clone());
    put(txn, meta::CONF_STATE, &bytes(&conf_state)?)?;
    put(txn, meta::APPLIED, &pair_bytes(founding.at))?;
    put(txn, meta::STORE_ID, &store_id.to_le_bytes())?;
    put(txn, meta::FORMAT, &FORMAT.to_le_bytes())
}

/// Writes the log's file, to be called once the state's is on the disk: from then on there is a store.
pub(crate) fn write_log(store: &Store, founding: &Founding, store_id: u64) -> Result<(), RaftStoreError> {
    let (index, term) = founding.at;
    let txn = store.write_durable()?;
    txn.open_table(LOG)?;
    let hard_state = HardState {
        commit: index,
        term,
        ..HardState::default()
    };
    put_hard_state(&txn, &hard_state)?;
    put(&txn, meta::TRUNCATED, &pair_bytes(founding.at))?;
    put(&txn, meta::NODE_ID, &founding.node_id.to_le_bytes())?;
    put(&txn, meta::STORE_ID, &store_id.to_le_bytes())?;
    put(&txn, meta::FORMAT, &FORMAT.to_le_bytes())?;
    Ok(txn.commit()?)
}
