//! From a log entry to its effect: the one place that knows every kind of command.

use crate::calendar::TIME_MAX_UNIX_MS;
use crate::keys;
use crate::machine::{Handled, Machine, Stop};
use crate::outcome::{Applied, Outcome, Refused, code};
use crate::tables::{TablesError, TablesMut};
use crate::{
    api_keys, batches, budgets, corrections, deployments, expiry, files, members, periods, prices, projects, slices,
    usage, view, workers,
};
use baton_proto::state::{Command, command::Kind};
use prost::Message as _;

/// Applies one log entry's command, and chains it, its outcome and all it wrote into the hash. The outer error is the
/// medium's; a refused command is an outcome like any other. `index` is the entry's.
///
/// First time goes on to the greatest `at_unix_ms` so far, and what is over by then is cleared away, a bounded number of
/// things for each command; that happens whether the command is then refused or not.
///
/// # Errors
/// [`TablesError`], after which the transaction must be given up.
pub fn apply(tables: &mut dyn TablesMut, index: u64, command: &[u8]) -> Result<Outcome, TablesError> {
    let before = view::hash(tables)?;
    let (outcome, written) = match read(command) {
        Err(refused) => (Err(refused), [0; 32]),
        Ok((decoded, kind)) => {
            let then_ms = view::time(tables)?;
            let now_ms = then_ms.max(decoded.at_unix_ms);
            let mut machine = Machine::new(tables, index, now_ms, command, &decoded.actor);
            if now_ms > then_ms {
                machine.put(keys::TIME, &now_ms.to_le_bytes())?;
            }
            expiry::clear(&mut machine)?;
            let outcome = match dispatch(&mut machine, kind, decoded.at_unix_ms) {
                Ok(applied) => Ok(applied),
                Err(Stop::Refused(refused)) => Err(refused),
                Err(Stop::Tables(error)) => return Err(error),
            };
            (outcome, machine.written())
        }
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(&before);
    hasher.update(&(command.len() as u64).to_le_bytes());
    hasher.update(command);
    hasher.update(&code(&outcome));
    hasher.update(&written);
    tables.put(keys::HASH, hasher.finalize().as_bytes())?;
    Ok(outcome)
}

fn read(command: &[u8]) -> Result<(Command, Kind), Refused> {
    let mut decoded = Command::decode(command).map_err(|error| Refused::invalid(error.to_string()))?;
    if decoded.at_unix_ms > TIME_MAX_UNIX_MS {
        return Err(Refused::invalid(
            "its time is after the year 9999; set the proposer's clock",
        ));
    }
    crate::bounds::text("the actor", &decoded.actor)?;
    let kind = decoded.kind.take();
    let kind = kind.ok_or_else(|| Refused::invalid("its kind is unknown to this release"))?;
    Ok((decoded, kind))
}

fn dispatch(machine: &mut Machine<'_>, kind: Kind, proposed_unix_ms: u64) -> Handled {
    match kind {
        Kind::RegisterWorker(command) => workers::register(machine, command),
        Kind::RemoveWorker(command) => workers::remove(machine, &command),
        Kind::WitnessWorker(command) => workers::witness(machine, command),
        Kind::PutMember(command) => members::put(machine, command),
        Kind::RemoveMember(command) => members::remove(machine, &command),
        Kind::PutDeployment(command) => deployments::put(machine, command),
        Kind::RemoveDeployment(command) => deployments::remove(machine, &command),
        Kind::PutProject(command) => projects::put(machine, command),
        Kind::PutKey(command) => api_keys::put(machine, command),
        Kind::RevokeKey(command) => api_keys::revoke(machine, &command),
        Kind::PutPrice(command) => prices::put(machine, command),
        Kind::PutBudget(command) => budgets::put(machine, command),
        Kind::LeaseSlice(command) => slices::lease(machine, command),
        Kind::ReturnSlice(command) => slices::give_back(machine, &command),
        Kind::SettleUsage(command) => usage::settle(machine, command),
        Kind::CorrectUsage(command) => corrections::correct(machine, command),
        Kind::ClosePeriod(command) => periods::close(machine, &command),
        Kind::SealPeriod(command) => periods::seal(machine, command, proposed_unix_ms),
        Kind::PutFile(command) => files::put(machine, command),
        Kind::DeleteFile(command) => files::delete(machine, &command),
        Kind::PutBatch(command) => batches::put(machine, command),
        Kind::ClaimBatch(command) => batches::claim(machine, command),
        Kind::StartBatch(command) => batches::start(machine, command),
        Kind::FailBatch(command) => batches::fail(machine, command),
        Kind::AdvanceBatch(command) => batches::advance(machine, command),
        Kind::CancelBatch(command) => batches::cancel(machine, &command),
        Kind::FinishBatch(command) => batches::finish(machine, &command),
        Kind::Tick(_) => Ok(Applied::Ticked {
            now_unix_ms: machine.now_ms,
        }),
    }
}
