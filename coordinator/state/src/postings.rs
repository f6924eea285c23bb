//! What a settled record takes from budgets. The reservation goes back into its slice, which is where it came from, so the
//! slice loses what the record costs and nothing else.
//!
//! **A hard budget is never overrun**: a record that costs more than was reserved for it is refused, because its gateway
//! is wrong; and one whose slice is over, so that its money may be someone else's by now, is charged nothing. A budget that
//! is not hard only counts: it takes what exceeds the slice, or what comes after it, as reserved and posted at once.

use crate::bounds::{self, POSTINGS_MAX};
use crate::budgets;
use crate::machine::{Machine, Stop};
use crate::outcome::Refused;
use crate::slices;
use crate::tables::TablesError;
use crate::view;
use baton_proto::state::{Budget, Charge, Posting, Slice, UsageRecord};

/// Where a record's charge goes.
pub(crate) enum Plan {
    /// To these budgets, from their slices where those are open.
    Post(Vec<(Budget, Option<Slice>)>),
    /// Nowhere: a hard budget's reservation has expired.
    Late,
}

pub(crate) fn check(postings: &[Posting]) -> Result<(), Refused> {
    if postings.len() > POSTINGS_MAX {
        return Err(Refused::invalid(format!(
            "a record posts to at most {POSTINGS_MAX} budgets"
        )));
    }
    for (at, posting) in postings.iter().enumerate() {
        bounds::name("the budget's id", &posting.budget_id)?;
        bounds::name("the slice's id", &posting.slice_id)?;
        if postings[..at].iter().any(|other| other.budget_id == posting.budget_id) {
            return Err(Refused::invalid("a record posts once to a budget"));
        }
    }
    Ok(())
}

/// Decides, and writes nothing.
pub(crate) fn plan(machine: &Machine<'_>, record: &UsageRecord, charge: &Charge) -> Result<Plan, Stop> {
    let amount = amount(charge);
    let mut posts = Vec::with_capacity(record.postings.len());
    let mut late = false;
    for posting in &record.postings {
        let Some(budget) = view::budget(machine, &posting.budget_id)? else {
            return Err(Refused::unknown("budget", &posting.budget_id).into());
        };
        let for_key = budget.key_id.is_empty() || budget.key_id == record.key_id;
        if budget.project_id != record.project_id || !for_key {
            return Err(Refused::invalid("the budget is not one of the record's project or key").into());
        }
        if amount == 0 {
            continue;
        }
        if budget.currency != charge.currency {
            return Err(Refused::invalid("the budget has another currency than the price").into());
        }
        let slice = slices::live(machine, &posting.budget_id, &posting.slice_id)?;
        let hard = match &slice {
            Some(slice) => slices::window_of(machine, slice)?.hard,
            None => budget.hard,
        };
        late |= hard && slice.is_none();
        if let Some(slice) = slice.as_ref().filter(|_| hard) {
            let reserved_nano = posting.reserved_nano.min(slice.open_nano);
            if amount > reserved_nano {
                return Err(Refused::BeyondReservation {
                    request_id: record.request_id.clone(),
                    budget_id: posting.budget_id.clone(),
                    charge_nano: amount,
                    reserved_nano,
                }
                .into());
            }
        }
        posts.push((budget, slice));
    }
    Ok(if late { Plan::Late } else { Plan::Post(posts) })
}

/// Carries a plan out.
pub(crate) fn post(
    machine: &mut Machine<'_>,
    posts: Vec<(Budget, Option<Slice>)>,
    charge: &Charge,
) -> Result<(), TablesError> {
    let amount = amount(charge);
    for (budget, slice) in posts {
        let (start, mut window) = match &slice {
            Some(slice) => (slice.period_start_unix_ms, slices::window_of(machine, slice)?),
            None => budgets::present(machine, &budget)?,
        };
        let open = slice.as_ref().map_or(0, |slice| slice.open_nano).min(amount);
        if let Some(mut slice) = slice {
            slice.open_nano -= open;
            slices::put(machine, &slice)?;
        }
        window.open_nano -= u128::from(open);
        window.reserved_nano += u128::from(amount - open);
        window.posted_nano += u128::from(amount);
        budgets::put_window(machine, &budget.id, start, &window)?;
    }
    Ok(())
}

/// Bounded by the bound of prices: see [`PRICE_NANO_MAX`](bounds::PRICE_NANO_MAX).
fn amount(charge: &Charge) -> u64 {
    u64::try_from(baton_ledger::charge::total(charge)).unwrap_or(u64::MAX)
}
