//! Periods of the ledger: closed, so that a root stands still, then signed by a member. Two commands, because rows go on
//! arriving between the moment a member reads what it signs and the moment its signature is applied; and because any member
//! can sign what another has closed.
//!
//! A closed period is a checkpoint without key and signature. Its time is set by who signs: the time of that command.

use crate::keys;
use crate::machine::{Handled, Machine};
use crate::outcome::{Applied, Refused};
use crate::rows;
use crate::tables::TablesMut as _;
use crate::view;
use baton_ledger::checkpoint::{self, CheckpointError};
use baton_ledger::merkle::Frontier;
use baton_proto::state::{Checkpoint, ClosePeriod, SealPeriod};

pub(crate) fn close(machine: &mut Machine<'_>, command: &ClosePeriod) -> Handled {
    let sealed = view::last_checkpoint(machine)?;
    let closed = view::closed_period(machine)?;
    let last = closed.as_ref().or(sealed.as_ref());
    let last_sequence = last.map_or(0, |period| period.last_sequence);
    if let Some(last) = last
        && last.first_sequence.checked_sub(1) == Some(command.after_sequence)
    {
        return Ok(Applied::Closed { last_sequence });
    }
    if closed.is_some() || command.after_sequence != last_sequence {
        let act = "closed";
        return Err(Refused::NotNext { act, last_sequence }.into());
    }
    let mut head = rows::head(machine)?;
    if head.frontier.is_empty() {
        return Err(Refused::NothingToClose.into());
    }
    let period = Checkpoint {
        first_sequence: last_sequence + 1,
        last_sequence: head.sequence,
        merkle_root: head.frontier.root().to_vec().into(),
        last_hash: head.hash.to_vec().into(),
        previous_hash: sealed
            .as_ref()
            .map_or(baton_ledger::GENESIS, checkpoint::hash)
            .to_vec()
            .into(),
        ..Checkpoint::default()
    };
    head.frontier = Frontier::default();
    machine.put_message(keys::CLOSED, &period)?;
    rows::put_head(machine, &head)?;
    Ok(Applied::Closed {
        last_sequence: period.last_sequence,
    })
}

pub(crate) fn seal(machine: &mut Machine<'_>, command: SealPeriod, proposed_unix_ms: u64) -> Handled {
    let last_sequence = command.last_sequence;
    let sealed = view::last_checkpoint(machine)?;
    if let Some(known) = view::checkpoint(machine, last_sequence)?
        && (&known.public_key, &known.signature) == (&command.public_key, &command.signature)
    {
        return Ok(Applied::Sealed { last_sequence });
    }
    let closed = view::closed_period(machine)?.filter(|closed| closed.last_sequence == last_sequence);
    let Some(mut period) = closed else {
        return Err(Refused::NotNext {
            act: "sealed",
            last_sequence: sealed.map_or(0, |sealed| sealed.last_sequence),
        }
        .into());
    };
    let members = view::members(machine)?;
    // An empty key is that of a member without one.
    if command.public_key.is_empty()
        || !members
            .iter()
            .any(|known| known.ledger_public_key == command.public_key)
    {
        return Err(Refused::BadSignature("its key is not that of a member; register it first".into()).into());
    }
    period.at_unix_ms = proposed_unix_ms;
    period.public_key = command.public_key;
    period.signature = command.signature;
    let refused = |error: CheckpointError| Refused::BadSignature(error.to_string());
    checkpoint::verify_after(&period, sealed.as_ref()).map_err(refused)?;
    machine.put_message(&keys::numbered(keys::CHECKPOINTS, last_sequence), &period)?;
    machine.delete(keys::CLOSED)?;
    Ok(Applied::Sealed { last_sequence })
}
