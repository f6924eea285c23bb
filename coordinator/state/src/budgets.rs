//! Budgets: what a project, or one key, may spend in a period of the UTC calendar. Money is set aside in slices
//! ([`slices`](crate::slices)) and charged when usage settles. A limit may change, but a hard one never below what is spent
//! and set aside: so it holds at every moment.

use crate::audit;
use crate::bounds::{self, BUDGETS_PER_KEY_MAX};
use crate::calendar::period_start;
use crate::keys::{self, Key};
use crate::machine::{Handled, Machine};
use crate::outcome::{Applied, Refused};
use crate::tables::{TablesError, TablesMut as _};
use crate::view;
use crate::window::Window;
use baton_proto::state::{Budget, Period, PutBudget};

pub(crate) fn put(machine: &mut Machine<'_>, command: PutBudget) -> Handled {
    let Some(budget) = command.budget else {
        return Err(Refused::invalid("a budget is missing").into());
    };
    check(machine, &budget)?;
    let known = view::budget(machine, &budget.id)?;
    if let Some(known) = &known {
        let fixed = [
            ("the project", known.project_id != budget.project_id),
            ("the key", known.key_id != budget.key_id),
            ("the currency", known.currency != budget.currency),
            ("the period", known.period != budget.period),
        ];
        if let Some((field, _)) = fixed.into_iter().find(|(_, changed)| *changed) {
            return Err(Refused::fixed("budget", &budget.id, field).into());
        }
    } else if view::budgets_of(machine, &budget.project_id, &budget.key_id)?.len() >= BUDGETS_PER_KEY_MAX {
        let max = BUDGETS_PER_KEY_MAX as u64;
        let what = "budgets of this project or key";
        return Err(Refused::TooMany { what, max }.into());
    }
    let changed = known.as_ref() != Some(&budget);
    if changed {
        let start = period_start(budget.period(), machine.now_ms);
        if let Some(mut window) = view::window(machine, &budget.id, start)? {
            let least_nano = window.posted_nano + window.open_nano;
            if budget.hard && least_nano > u128::from(budget.limit_nano) {
                let budget_id = budget.id;
                return Err(Refused::LimitBelowSpent { budget_id, least_nano }.into());
            }
            window.limit_nano = budget.limit_nano;
            window.hard = budget.hard;
            put_window(machine, &budget.id, start, &window)?;
        }
        machine.put_message(&keys::named(keys::BUDGETS, &budget.id), &budget)?;
        if known.is_none() {
            let by_key = Key::of(keys::BUDGETS_BY_KEY)
                .text(&budget.project_id)
                .text(&budget.key_id)
                .rest(budget.id.as_bytes());
            machine.put(&by_key.done(), &[])?;
        }
        let action = if known.is_some() { "put_budget" } else { "create_budget" };
        audit::write(machine, action, &budget.id)?;
    }
    Ok(Applied::Stands { changed })
}

fn check(machine: &Machine<'_>, budget: &Budget) -> Result<(), crate::machine::Stop> {
    bounds::name("the budget's id", &budget.id)?;
    bounds::currency(&budget.currency)?;
    if !Period::try_from(budget.period).is_ok_and(|period| period != Period::Unspecified) {
        return Err(Refused::invalid("a budget has a period: total, day or month").into());
    }
    if view::project(machine, &budget.project_id)?.is_none() {
        return Err(Refused::unknown("project", &budget.project_id).into());
    }
    if !budget.key_id.is_empty() {
        let key = view::key(machine, &budget.key_id)?;
        if key.is_none_or(|key| key.project_id != budget.project_id) {
            return Err(Refused::unknown("key of that project", &budget.key_id).into());
        }
    }
    Ok(())
}

/// The window of the present period; a new one if nothing happened in it yet.
pub(crate) fn present(machine: &Machine<'_>, budget: &Budget) -> Result<(u64, Window), TablesError> {
    let start = period_start(budget.period(), machine.now_ms);
    let new = Window {
        limit_nano: budget.limit_nano,
        hard: budget.hard,
        ..Window::default()
    };
    Ok((start, view::window(machine, &budget.id, start)?.unwrap_or(new)))
}

pub(crate) fn put_window(
    machine: &mut Machine<'_>,
    budget_id: &str,
    start: u64,
    window: &Window,
) -> Result<(), TablesError> {
    machine.put(&view::window_key(budget_id, start), &window.encode())
}
