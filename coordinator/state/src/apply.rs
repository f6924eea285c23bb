//! From a log entry to its effect: the one place that knows every kind of command.

use crate::keys;
use crate::outcome::{Outcome, Refused, code};
use crate::tables::{TablesError, TablesMut};
use crate::{members, usage, view, workers};
use baton_proto::state::{Command, command};
use prost::Message as _;

/// Applies one log entry's command, and chains it with its outcome into the hash. The outer error is the medium's; a
/// refused command is an outcome like any other. `index` is the entry's.
pub fn apply(tables: &mut dyn TablesMut, index: u64, command: &[u8]) -> Result<Outcome, TablesError> {
    let outcome = match Command::decode(command) {
        Ok(decoded) => dispatch(tables, index, decoded)?,
        Err(error) => Err(Refused::invalid(error.to_string())),
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(&view::hash(tables)?);
    hasher.update(&(command.len() as u64).to_le_bytes());
    hasher.update(command);
    hasher.update(&code(&outcome));
    tables.put(keys::HASH, hasher.finalize().as_bytes())?;
    Ok(outcome)
}

fn dispatch(tables: &mut dyn TablesMut, _index: u64, command: Command) -> Result<Outcome, TablesError> {
    match command.kind {
        Some(command::Kind::RegisterWorker(command)) => workers::register(tables, command),
        Some(command::Kind::RemoveWorker(command)) => workers::remove(tables, &command),
        Some(command::Kind::SettleUsage(command)) => usage::settle(tables, command),
        Some(command::Kind::WitnessWorker(command)) => workers::witness(tables, command),
        Some(command::Kind::PutMember(command)) => members::put(tables, command),
        Some(command::Kind::RemoveMember(command)) => members::remove(tables, &command),
        _ => Ok(Err(Refused::invalid("its kind is unknown to this release"))),
    }
}
