//! Which workers are members, each under an epoch that fences its earlier lives, and which coordinators have lost one. A
//! worker is removed once more than half of the voters have lost it; a vote counts for one epoch only.

use crate::keys;
use crate::members::MEMBERS_MAX;
use crate::outcome::{Applied, Outcome, Refused};
use crate::tables::{TablesError, TablesMut};
use crate::view;
use baton_proto::state::{RegisterWorker, RemoveWorker, WitnessWorker, WorkerRecord};
use prost::Message as _;

pub(crate) fn register(tables: &mut dyn TablesMut, command: RegisterWorker) -> Result<Outcome, TablesError> {
    let Some(worker) = command.worker else {
        return Ok(Err(Refused::invalid("a registration without a worker")));
    };
    if worker.worker_id.is_empty() {
        return Ok(Err(Refused::invalid("a registration without a worker id")));
    }
    let epoch = view::last_epoch(tables)? + 1;
    tables.put(keys::LAST_EPOCH, &epoch.to_le_bytes())?;
    let key = keys::named(keys::WORKERS, &worker.worker_id);
    let record = WorkerRecord {
        worker: Some(worker),
        epoch,
        registered_unix_ms: command.at_unix_ms,
        ..WorkerRecord::default()
    };
    tables.put(&key, &record.encode_to_vec())?;
    Ok(Ok(Applied::Registered { epoch }))
}

pub(crate) fn remove(tables: &mut dyn TablesMut, command: &RemoveWorker) -> Result<Outcome, TablesError> {
    let current = view::worker(tables, &command.worker_id)?;
    let removed = current.is_some_and(|record| record.epoch == command.epoch);
    if removed {
        tables.delete(&keys::named(keys::WORKERS, &command.worker_id))?;
    }
    Ok(Ok(Applied::Removed { removed }))
}

pub(crate) fn witness(tables: &mut dyn TablesMut, command: WitnessWorker) -> Result<Outcome, TablesError> {
    let mut voters = command.voters;
    voters.sort_unstable();
    voters.dedup();
    if voters.len() > MEMBERS_MAX || !voters.contains(&command.member_id) {
        return Ok(Err(Refused::invalid("the witness is not one of the voters it names")));
    }
    let current = view::worker(tables, &command.worker_id)?;
    let Some(mut record) = current.filter(|known| known.epoch == command.epoch) else {
        return Ok(Ok(Applied::Removed { removed: false }));
    };
    record
        .lost_by
        .retain(|member| voters.contains(member) && *member != command.member_id);
    if command.lost {
        record.lost_by.push(command.member_id);
        record.lost_by.sort_unstable();
    }
    let key = keys::named(keys::WORKERS, &command.worker_id);
    let removed = record.lost_by.len() * 2 > voters.len();
    if removed {
        tables.delete(&key)?;
    } else {
        tables.put(&key, &record.encode_to_vec())?;
    }
    Ok(Ok(Applied::Removed { removed }))
}
