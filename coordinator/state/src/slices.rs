//! Slices: money of a budget that one coordinator has set aside, so that it reserves requests without a round trip.
//!
//! A slice belongs to the period in which it was leased. It is over when it is returned, or when [`SLICE_GRACE_MS`] have
//! passed since it expired; what it has left then goes back to its period. In the grace nothing new may be reserved from it
//! (that is for its coordinator to keep), but what was can still settle. What settles later is for [`postings`](crate::postings).

use crate::bounds::{self, SLICES_PER_PERIOD_MAX};
use crate::budgets;
use crate::keys::{self, Key};
use crate::machine::{Handled, Machine};
use crate::outcome::{Applied, Refused};
use crate::tables::{TablesError, TablesMut as _};
use crate::view;
use crate::window::Window;
use baton_proto::state::{LeaseSlice, ReturnSlice, Slice};

/// How long usage may still be posted to a slice that has expired, in milliseconds of replicated time: an election, the
/// tries of a gateway whose client hung up, and what a busy disk adds to them.
pub const SLICE_GRACE_MS: u64 = 120_000;
/// The longest lease, in milliseconds of replicated time. A dead coordinator keeps money from the others for no longer.
pub const SLICE_LEASE_MS_MAX: u64 = 3_600_000;

pub(crate) fn lease(machine: &mut Machine<'_>, command: LeaseSlice) -> Handled {
    bounds::name("the slice's id", &command.slice_id)?;
    let Some(budget) = view::budget(machine, &command.budget_id)? else {
        return Err(Refused::unknown("budget", &command.budget_id).into());
    };
    if command.expires_unix_ms <= machine.now_ms {
        let now = machine.now_ms;
        return Err(Refused::invalid(format!("the lease would end before it starts: it is {now} here")).into());
    }
    let asked = command
        .expires_unix_ms
        .min(machine.now_ms.saturating_add(SLICE_LEASE_MS_MAX));
    let (start, mut window) = budgets::present(machine, &budget)?;
    let known = live(machine, &command.budget_id, &command.slice_id)?;
    let mut slice = match known.clone() {
        Some(known) if known.member_id != command.member_id => {
            let (slice_id, member_id) = (known.slice_id, known.member_id);
            return Err(Refused::SliceOfOther { slice_id, member_id }.into());
        }
        Some(known) if known.period_start_unix_ms != start => {
            let slice_id = known.slice_id;
            return Err(Refused::PeriodOver { slice_id }.into());
        }
        Some(known) => known,
        None if view::slice(machine, &command.budget_id, &command.slice_id)?.is_some() => {
            return Err(Refused::invalid("a slice of this id has just expired; choose another id").into());
        }
        None if window.slices >= SLICES_PER_PERIOD_MAX => {
            let max = u64::try_from(SLICES_PER_PERIOD_MAX).unwrap_or(u64::MAX);
            return Err(Refused::TooMany {
                what: "open slices of this budget",
                max,
            }
            .into());
        }
        None => Slice {
            budget_id: command.budget_id,
            slice_id: command.slice_id,
            member_id: command.member_id,
            period_start_unix_ms: start,
            ..Slice::default()
        },
    };
    let more = command.want_nano.saturating_sub(slice.open_nano);
    let more = if window.hard {
        more.min(u64::try_from(window.free_nano()).unwrap_or(u64::MAX))
    } else {
        more
    };
    if known.is_none() && more == 0 {
        let budget_id = slice.budget_id;
        return Err(if command.want_nano == 0 {
            Refused::invalid("a slice of nothing").into()
        } else {
            Refused::BudgetExhausted { budget_id }.into()
        });
    }
    slice.open_nano += more;
    slice.expires_unix_ms = slice.expires_unix_ms.max(asked);
    if known.as_ref() != Some(&slice) {
        window.open_nano += u128::from(more);
        window.reserved_nano += u128::from(more);
        window.slices += u128::from(known.is_none());
        if let Some(known) = &known {
            machine.delete(&due_key(known))?;
        }
        machine.put(&due_key(&slice), &[])?;
        put(machine, &slice)?;
        budgets::put_window(machine, &slice.budget_id, start, &window)?;
    }
    Ok(Applied::Leased {
        open_nano: slice.open_nano,
        expires_unix_ms: slice.expires_unix_ms,
        period_start_unix_ms: start,
    })
}

pub(crate) fn give_back(machine: &mut Machine<'_>, command: &ReturnSlice) -> Handled {
    let Some(slice) = live(machine, &command.budget_id, &command.slice_id)? else {
        return Ok(Applied::Returned { nano: 0 });
    };
    let nano = slice.open_nano;
    end(machine, &slice, |window| window.voided_nano += u128::from(nano))?;
    Ok(Applied::Returned { nano })
}

/// The slice, unless it is over, cleared away or not.
pub(crate) fn live(machine: &Machine<'_>, budget_id: &str, slice_id: &str) -> Result<Option<Slice>, TablesError> {
    let slice = view::slice(machine, budget_id, slice_id)?;
    Ok(slice.filter(|slice| machine.now_ms < due(slice)))
}

/// Gives back what an expired slice has left.
pub(crate) fn expire(machine: &mut Machine<'_>, budget_id: &str, slice_id: &str) -> Result<(), TablesError> {
    let slice = view::slice(machine, budget_id, slice_id)?;
    let slice = slice.ok_or_else(|| TablesError::Corrupt(format!("slice {slice_id} is due and missing")))?;
    let nano = u128::from(slice.open_nano);
    end(machine, &slice, |window| window.expired_nano += nano)
}

fn end(machine: &mut Machine<'_>, slice: &Slice, book: impl FnOnce(&mut Window)) -> Result<(), TablesError> {
    let mut window = window_of(machine, slice)?;
    book(&mut window);
    window.open_nano -= u128::from(slice.open_nano);
    window.slices -= 1;
    machine.delete(&due_key(slice))?;
    machine.delete(&view::slice_key(&slice.budget_id, &slice.slice_id))?;
    budgets::put_window(machine, &slice.budget_id, slice.period_start_unix_ms, &window)
}

/// The window that a slice was taken from.
pub(crate) fn window_of(machine: &Machine<'_>, slice: &Slice) -> Result<Window, TablesError> {
    let window = view::window(machine, &slice.budget_id, slice.period_start_unix_ms)?;
    let window = window.filter(|window| window.slices > 0 && window.open_nano >= u128::from(slice.open_nano));
    window.ok_or_else(|| TablesError::Corrupt(format!("slice {} is of a period without it", slice.slice_id)))
}

pub(crate) fn put(machine: &mut Machine<'_>, slice: &Slice) -> Result<(), TablesError> {
    machine.put_message(&view::slice_key(&slice.budget_id, &slice.slice_id), slice)
}

fn due(slice: &Slice) -> u64 {
    slice.expires_unix_ms.saturating_add(SLICE_GRACE_MS)
}

fn due_key(slice: &Slice) -> Vec<u8> {
    Key::of(keys::SLICES_DUE)
        .number(due(slice))
        .text(&slice.budget_id)
        .rest(slice.slice_id.as_bytes())
        .done()
}
