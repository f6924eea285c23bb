//! The reference's books: what must have become of every budget's money, period by period, worked out anew from commands and
//! their outcomes. It knows slices, periods and grace, and nothing of how the machine keeps them.
//!
//! The machine clears away what is over a few things at a time, so of what has expired the books know more than the tables: the
//! two agree on open and expired together.

use super::oracle::{Checked, violation};
use baton_ledger::charge;
use baton_proto::state::{Budget, LedgerRow, Period, UsageRecord, UsageStatus, command::Kind, ledger_row::Body};
use baton_state::{Applied, MemoryTables, Outcome, SLICE_GRACE_MS, keys, view};
use std::collections::BTreeMap;
use std::ops::ControlFlow;

const DAY_MS: u64 = 86_400_000;
/// Starts of the months that runs touch: November and December 2026.
pub(super) const MONTHS: [u64; 2] = [1_793_491_200_000, 1_796_083_200_000];

/// A budget's money in one period, in nano-units.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    limit: u64,
    hard: bool,
    reserved: u128,
    posted: u128,
    voided: u128,
    expired: u128,
    open: u128,
}

#[derive(Debug, Clone, Default)]
struct Slice {
    start: u64,
    open: u64,
    granted: u64,
    ends: u64,
}

#[derive(Debug, Default)]
pub(super) struct Books {
    budgets: BTreeMap<String, Budget>,
    periods: BTreeMap<(String, u64), Sums>,
    /// By budget and slice. Those that are over are gone.
    slices: BTreeMap<(String, String), Slice>,
}

/// The start of the period of the UTC calendar.
fn period_start(period: Period, now_ms: u64) -> u64 {
    match period {
        Period::Day => now_ms / DAY_MS * DAY_MS,
        Period::Month => MONTHS[usize::from(now_ms >= MONTHS[1])],
        Period::Total | Period::Unspecified => 0,
    }
}

impl Books {
    /// What a command does at a replicated time.
    pub(super) fn note(&mut self, now_ms: u64, kind: &Kind, outcome: &Outcome) -> Checked {
        self.expire(now_ms);
        match (kind, outcome) {
            (Kind::PutBudget(put), Ok(Applied::Stands { .. })) => {
                let budget = put.budget.clone().unwrap_or_default();
                let key = (budget.id.clone(), period_start(budget.period(), now_ms));
                if let Some(sums) = self.periods.get_mut(&key) {
                    (sums.limit, sums.hard) = (budget.limit_nano, budget.hard);
                }
                self.budgets.insert(budget.id.clone(), budget);
                Ok(())
            }
            (Kind::LeaseSlice(lease), Ok(applied)) => self.leased(now_ms, &lease.budget_id, &lease.slice_id, applied),
            (Kind::ReturnSlice(back), Ok(Applied::Returned { nano })) => {
                let slice = self.slices.remove(&(back.budget_id.clone(), back.slice_id.clone()));
                let left = slice.as_ref().map_or(0, |slice| slice.open);
                if left != *nano {
                    return violation(format!("slice {} gave back {nano}, and had {left} left", back.slice_id));
                }
                if let Some(slice) = slice {
                    let sums = self.period(&back.budget_id, slice.start);
                    sums.voided += u128::from(left);
                    sums.open -= u128::from(left);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn period(&mut self, budget_id: &str, start: u64) -> &mut Sums {
        let budget = &self.budgets[budget_id];
        let new = Sums {
            limit: budget.limit_nano,
            hard: budget.hard,
            ..Sums::default()
        };
        self.periods.entry((budget_id.to_owned(), start)).or_insert(new)
    }

    fn expire(&mut self, now_ms: u64) {
        let over = |slice: &Slice| slice.ends + SLICE_GRACE_MS <= now_ms;
        let ended: Vec<_> = self.slices.extract_if(.., |_, slice| over(slice)).collect();
        for ((budget_id, _), slice) in ended {
            let sums = self.period(&budget_id, slice.start);
            sums.open -= u128::from(slice.open);
            sums.expired += u128::from(slice.open);
        }
    }

    fn leased(&mut self, now_ms: u64, budget_id: &str, slice_id: &str, applied: &Applied) -> Checked {
        let Applied::Leased {
            open_nano,
            granted_nano,
            expires_unix_ms,
            period_start_unix_ms,
        } = applied
        else {
            return violation(format!("a lease was answered {applied:?}"));
        };
        let start = period_start(self.budgets[budget_id].period(), now_ms);
        let slice = self.slices.entry((budget_id.to_owned(), slice_id.to_owned()));
        let slice = slice.or_insert_with(|| Slice {
            start,
            ..Slice::default()
        });
        if *period_start_unix_ms != start || slice.start != start {
            return violation(format!(
                "slice {slice_id} of the period from {} was leased at {now_ms} in that from {period_start_unix_ms}",
                slice.start
            ));
        }
        let more = granted_nano.checked_sub(slice.granted);
        let Some(more) = more.filter(|more| slice.open + more == *open_nano && slice.ends <= *expires_unix_ms) else {
            return violation(format!("slice {slice_id} had {slice:?} and was answered {applied:?}"));
        };
        (slice.open, slice.granted, slice.ends) = (*open_nano, *granted_nano, *expires_unix_ms);
        let sums = self.period(budget_id, start);
        sums.reserved += u128::from(more);
        sums.open += u128::from(more);
        Ok(())
    }

    /// A new row of a request that costs `nano` unless it came too late.
    pub(super) fn settled(&mut self, now_ms: u64, record: &UsageRecord, row: &LedgerRow, nano: u64) -> Checked {
        let charged = charge::total(&row.charge.clone().unwrap_or_default());
        let mut late = false;
        for posting in &record.postings {
            let key = (posting.budget_id.clone(), posting.slice_id.clone());
            let slice = self.slices.get(&key).map(|slice| slice.start);
            late |= match slice {
                Some(start) => !self.periods.contains_key(&(key.0, start)),
                None => self.budgets[&posting.budget_id].hard && nano > 0,
            };
        }
        let expected = if late { 0 } else { u128::from(nano) };
        if late != (record.status() == UsageStatus::Expired) || charged != expected {
            return violation(format!(
                "request {} is charged {charged} as {:?}, and costs {expected}",
                record.request_id,
                record.status()
            ));
        }
        for posting in record.postings.iter().filter(|_| charged > 0) {
            let key = (posting.budget_id.clone(), posting.slice_id.clone());
            let period = self.budgets[&posting.budget_id].period();
            let (start, set_aside) = match self.slices.get_mut(&key) {
                Some(slice) => {
                    let open = u64::try_from(charged).unwrap_or(u64::MAX).min(slice.open);
                    slice.open -= open;
                    (slice.start, u128::from(open))
                }
                None => (period_start(period, now_ms), 0),
            };
            let sums = self.period(&posting.budget_id, start);
            if sums.hard && set_aside < charged {
                return violation(format!(
                    "request {} is charged {charged} to {}, of which {set_aside} was set aside",
                    record.request_id, posting.budget_id
                ));
            }
            sums.open -= set_aside;
            sums.reserved += charged - set_aside;
            sums.posted += charged;
        }
        Ok(())
    }

    /// The tables say the same of every period of every budget, and no hard one is overrun.
    pub(super) fn compare(&self, tables: &MemoryTables) -> Checked {
        for ((id, start), sums) in &self.periods {
            let window = view::window(tables, id, *start)?.unwrap_or_default();
            let became = window.posted_nano + window.voided_nano + window.expired_nano + window.open_nano;
            if window.reserved_nano != became {
                return violation(format!(
                    "budget {id}: reserved {} but {became} became of it",
                    window.reserved_nano
                ));
            }
            if window.hard && window.posted_nano + window.open_nano > u128::from(sums.limit) {
                return violation(format!("budget {id} is overrun: {window:?}"));
            }
            let known = (sums.limit, sums.hard, sums.reserved, sums.posted, sums.voided);
            let told = (
                window.limit_nano,
                window.hard,
                window.reserved_nano,
                window.posted_nano,
                window.voided_nano,
            );
            let rest = window.open_nano + window.expired_nano == sums.open + sums.expired;
            if known != told || !rest || window.open_nano < sums.open {
                return violation(format!("budget {id} from {start}: {window:?}, the books have {sums:?}"));
            }
        }
        Ok(())
    }

    /// What takes a walk over the tables: slices hold what is set aside, no period is there that nothing happened in, and the
    /// rows of the ledger are what is posted.
    pub(super) fn check(&self, tables: &MemoryTables, rows: &[LedgerRow]) -> Checked {
        self.compare(tables)?;
        let mut windows = 0;
        let (from, to) = keys::whole(keys::WINDOWS);
        baton_state::Tables::scan(tables, &from, &to, &mut |_, _| {
            windows += 1;
            Ok(ControlFlow::Continue(()))
        })?;
        if windows != self.periods.len() {
            return violation(format!(
                "{windows} periods of budgets, the books have {}",
                self.periods.len()
            ));
        }
        for id in self.budgets.keys() {
            let mut posted = 0;
            let slices = view::slices_after(tables, id, "", 1000)?;
            for (_, start) in self.periods.keys().filter(|(of, _)| of == id) {
                let window = view::window(tables, id, *start)?.unwrap_or_default();
                let of = slices.iter().filter(|slice| slice.period_start_unix_ms == *start);
                let (count, open) = of.fold((0, 0), |(count, open), slice| {
                    (count + 1, open + u128::from(slice.open_nano))
                });
                if (count, open) != (window.slices, window.open_nano) {
                    return violation(format!(
                        "budget {id}: {count} slices hold {open}, {} in {} are set aside",
                        window.open_nano, window.slices
                    ));
                }
                posted += window.posted_nano;
            }
            let of_budget = rows.iter().filter(|row| match &row.body {
                Some(Body::Usage(record)) => record.postings.iter().any(|posting| posting.budget_id == *id),
                _ => false,
            });
            let billed: u128 = of_budget.map(|row| row.charge.as_ref().map_or(0, charge::total)).sum();
            if posted != billed {
                return violation(format!("budget {id}: posted {posted}, rows {billed}"));
            }
        }
        Ok(())
    }
}
