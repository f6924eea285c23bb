//! Which workers are members, each under an epoch that fences its earlier lives, and which coordinators have lost one.
//!
//! A worker is removed once more than half of the voters have lost it. A vote counts for one epoch only, and only while its
//! member is a voter.
//!
//! A registration that comes twice, by its nonce, is one: it has one epoch, as long as it stands.

use crate::bounds::{self, MEMBERS_MAX};
use crate::keys;
use crate::machine::{Handled, Machine};
use crate::outcome::{Applied, Refused};
use crate::tables::TablesMut as _;
use crate::view;
use baton_proto::state::{RegisterWorker, RemoveWorker, WitnessWorker, WorkerRecord};

pub(crate) fn register(machine: &mut Machine<'_>, command: RegisterWorker) -> Handled {
    let Some(worker) = command.worker else {
        return Err(Refused::invalid("a registration without a worker").into());
    };
    bounds::name("the worker's id", &worker.worker_id)?;
    if !command.nonce.is_empty() {
        bounds::exactly("the registration's nonce", &command.nonce, 16)?;
    }
    if !command.nonce.is_empty()
        && let Some(known) = view::worker(machine, &worker.worker_id)?.filter(|known| known.nonce == command.nonce)
    {
        return Ok(Applied::Registered { epoch: known.epoch });
    }
    let epoch = view::last_epoch(machine)? + 1;
    machine.put(keys::LAST_EPOCH, &epoch.to_le_bytes())?;
    let key = keys::named(keys::WORKERS, &worker.worker_id);
    let record = WorkerRecord {
        worker: Some(worker),
        epoch,
        registered_unix_ms: machine.now_ms.max(command.at_unix_ms),
        nonce: command.nonce,
        ..WorkerRecord::default()
    };
    machine.put_message(&key, &record)?;
    Ok(Applied::Registered { epoch })
}

pub(crate) fn remove(machine: &mut Machine<'_>, command: &RemoveWorker) -> Handled {
    let current = view::worker(machine, &command.worker_id)?;
    let removed = current.is_some_and(|record| record.epoch == command.epoch);
    if removed {
        machine.delete(&keys::named(keys::WORKERS, &command.worker_id))?;
    }
    Ok(Applied::Removed { removed })
}

pub(crate) fn witness(machine: &mut Machine<'_>, command: WitnessWorker) -> Handled {
    let mut voters = command.voters;
    voters.sort_unstable();
    voters.dedup();
    if voters.len() > MEMBERS_MAX || !voters.contains(&command.member_id) {
        return Err(Refused::invalid("the witness is not one of the voters it names").into());
    }
    let Some(mut record) = view::worker(machine, &command.worker_id)?.filter(|known| known.epoch == command.epoch)
    else {
        return Ok(Applied::Removed { removed: false });
    };
    let before = record.lost_by.clone();
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
        machine.delete(&key)?;
    } else if record.lost_by != before {
        machine.put_message(&key, &record)?;
    }
    Ok(Applied::Removed { removed })
}
