//! What replicated time does: slices whose grace is over, idempotency keys, minutes of usage, files and batches that are old. Each command
//! clears a bounded number, more than it can add, so that nothing piles up; reads do not depend on how far that is.

use crate::aggregates;
use crate::batches;
use crate::files;
use crate::idempotency;
use crate::keys::{self, Parts};
use crate::machine::Machine;
use crate::slices;
use crate::tables::{Tables as _, TablesError};
use std::ops::ControlFlow;

/// Most things of a kind that one command clears. A command adds at most one of each.
const CLEARED_MAX: usize = 4;

pub(crate) fn clear(machine: &mut Machine<'_>) -> Result<(), TablesError> {
    for key in due(machine, keys::SLICES_DUE)? {
        let mut parts = Parts::of(&key);
        parts.number()?;
        let budget_id = parts.text()?;
        let slice_id = String::from_utf8_lossy(parts.rest());
        slices::expire(machine, budget_id, &slice_id)?;
    }
    for key in due(machine, keys::IDEMPOTENCY_DUE)? {
        idempotency::forget(machine, &key)?;
    }
    // One, because a file may have thousands of chunks. A command adds two at most, when a batch ends, and others none.
    if let Some(key) = due(machine, keys::FILES_DUE)?.first() {
        let mut parts = Parts::of(key);
        parts.number()?;
        let id = String::from_utf8_lossy(parts.rest());
        if id.starts_with(batches::ID_PREFIX) {
            batches::forget(machine, &id)?;
        } else {
            files::expire(machine, &id)?;
        }
    }
    aggregates::clear_minutes(machine, CLEARED_MAX)
}

/// Keys that begin with a time that has come.
fn due(machine: &Machine<'_>, table: u8) -> Result<Vec<Vec<u8>>, TablesError> {
    let mut keys = Vec::new();
    let to = keys::numbered(table, machine.now_ms.saturating_add(1));
    machine.scan(&[table], &to, &mut |key, _| {
        keys.push(key.to_vec());
        Ok(if keys.len() < CLEARED_MAX {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        })
    })?;
    Ok(keys)
}
