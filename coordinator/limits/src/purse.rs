//! What this coordinator may spend: slices of budgets that the group has set aside for it, and what running requests hold
//! of them. A request is reserved with what it costs at most, and posted with what it did cost.
//!
//! ```text
//!   reserve ──▶ Held ──▶ post: what was delivered is spent, the rest is free again
//!      │          └────▶ cut: the slice's time is over before it could be prolonged: stop, post what was delivered
//!      ╰─ short ─▶ ask the group for more (`asks`), `leased`, and reserve again; or the budget is used up
//! ```
//!
//! Per slice: `granted = spent + held + free`, where `granted` is all that the group ever gave to it. The group's answers
//! name that sum, not what is left, so that it does not matter in which order answers and settlements arrive.
//!
//! **A slice is a lease on time.** The group takes back what an expired slice has left, some time after its end. A
//! coordinator that cannot reach the group therefore stops spending `margin` before that: [`Purse::cut`] names the
//! requests whose slice could not be prolonged. So what is delivered never exceeds what was set aside, as long as this
//! coordinator's clock runs no more than `margin` plus the group's grace behind the group's time.
//!
//! Deliberately not here: budgets' limits and periods (the group knows them), prices, and what is done with a request.

use std::collections::{BTreeMap, BTreeSet};

/// Budgets that slices are kept of. One that holds nothing is given back first.
const SLICES_MAX: usize = 16_384;

/// How a purse asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PurseConfig {
    /// How long a slice is asked for, in milliseconds.
    pub lease_ms: u64,
    /// A slice with less time than this is asked to be prolonged. Below `lease_ms`.
    pub prolong_ms: u64,
    /// A slice with less time than this is not spent from any more. Below `prolong_ms`.
    pub margin_ms: u64,
    /// An ask without an answer is repeated after this.
    pub ask_again_ms: u64,
    /// A slice is asked to hold so many times what the last lease spent, so that few requests have to wait for the group.
    pub ahead: u64,
}

impl Default for PurseConfig {
    fn default() -> Self {
        Self {
            lease_ms: 30_000,
            prolong_ms: 15_000,
            margin_ms: 2_000,
            ask_again_ms: 1_000,
            ahead: 2,
        }
    }
}

/// A request's hold on slices.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "what is held is free again only after `post`"]
pub struct Reservation {
    /// Names it in [`Purse::cut`]. Never reused.
    pub id: u64,
    /// What it costs at most, in nano-units.
    pub nano: u64,
    /// Budget and slice, one for each budget that the request is under.
    pub slices: Vec<(String, String)>,
}

/// Why a reservation was not made. Nothing is held.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// Not enough is set aside here; the group has to be asked first. The need is noted, and stands in [`Purse::asks`].
    #[error("budget `{budget_id}` has too little set aside here; the group is asked for more")]
    Short {
        /// The budget.
        budget_id: String,
    },
    /// The group has answered that there is no more.
    #[error("budget `{budget_id}` has {left_nano} nano-units left and the request may cost {nano}")]
    Exhausted {
        /// The budget.
        budget_id: String,
        /// What could be reserved.
        left_nano: u64,
        /// What the request costs at most.
        nano: u64,
    },
}

/// What the group is to be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseAsk {
    /// The budget.
    pub budget_id: String,
    /// The slice: a new one, or one to be enlarged and prolonged.
    pub slice_id: String,
    /// What should be free or held in it, in nano-units.
    pub want_nano: u64,
    /// Until when, in milliseconds of Unix time.
    pub expires_unix_ms: u64,
}

/// The group's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The budget.
    pub budget_id: String,
    /// The slice.
    pub slice_id: String,
    /// All that was ever given to this slice, in nano-units.
    pub granted_nano: u64,
    /// When it ends, in milliseconds of Unix time.
    pub expires_unix_ms: u64,
    /// The budget had less than was asked for.
    pub exhausted: bool,
}

#[derive(Debug, Default)]
struct Slice {
    id: String,
    granted: u64,
    spent: u64,
    held: u64,
    expires_ms: u64,
    /// What the largest request that found too little needs, in all.
    need: u64,
    /// When the group was last asked.
    asked_ms: Option<u64>,
    /// The group's last answer gave less than was asked for.
    exhausted: bool,
    /// `spent` when the slice was last prolonged: the difference tells how fast it goes.
    spent_at_lease: u64,
    holders: BTreeSet<u64>,
}

impl Slice {
    fn free(&self) -> u64 {
        self.granted.saturating_sub(self.spent).saturating_sub(self.held)
    }
}

/// The slices of one coordinator. Times are milliseconds of Unix time.
#[derive(Debug)]
pub struct Purse {
    config: PurseConfig,
    /// Makes slice ids unique: the member and this life of it.
    name: String,
    slices: BTreeMap<String, Slice>,
    /// Slices whose time is over, with what requests still hold of them, by slice id.
    over: BTreeMap<String, Slice>,
    next: u64,
}

impl Purse {
    /// An empty purse. `name` must differ between members, and between lives of one.
    pub fn new(name: impl Into<String>, config: PurseConfig) -> Self {
        Self {
            config,
            name: name.into(),
            slices: BTreeMap::new(),
            over: BTreeMap::new(),
            next: 0,
        }
    }

    /// Holds `nano` of every budget, or nothing.
    ///
    /// # Errors
    ///
    /// [`ReserveError::Short`]: look at [`asks`](Self::asks), and try again after [`leased`](Self::leased).
    /// [`ReserveError::Exhausted`]: the client is to be refused.
    pub fn reserve(&mut self, budgets: &[String], nano: u64, now_ms: u64) -> Result<Reservation, ReserveError> {
        let mut wrong = None;
        for budget_id in budgets {
            self.retire(budget_id, now_ms);
            if self.slices.len() >= SLICES_MAX && !self.slices.contains_key(budget_id) {
                // One that nobody uses lapses: the group takes it back at its end.
                let idle = self.slices.iter().find(|(_, slice)| slice.held == 0);
                if let Some(id) = idle.map(|(id, _)| id.clone()) {
                    self.slices.remove(&id);
                }
            }
            let slice_id = format!("{}-{}", self.name, self.next);
            let slice = self.slices.entry(budget_id.clone()).or_insert_with(|| {
                self.next += 1;
                Slice {
                    id: slice_id,
                    ..Slice::default()
                }
            });
            let fits = slice.free() >= nano && slice.expires_ms > now_ms.saturating_add(self.config.margin_ms);
            if fits {
                continue;
            }
            if slice.exhausted && slice.free() < nano {
                // The budget may have got more since: the next one asks anew.
                slice.exhausted = false;
                let (budget_id, left_nano) = (budget_id.clone(), slice.free());
                wrong = Some(ReserveError::Exhausted {
                    budget_id,
                    left_nano,
                    nano,
                });
                break;
            }
            slice.need = slice.need.max(slice.held.saturating_add(nano));
            let budget_id = budget_id.clone();
            wrong.get_or_insert(ReserveError::Short { budget_id });
        }
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        let id = self.next;
        self.next += 1;
        let mut slices = Vec::with_capacity(budgets.len());
        for budget_id in budgets {
            if let Some(slice) = self.slices.get_mut(budget_id) {
                slice.held += nano;
                slice.holders.insert(id);
                slices.push((budget_id.clone(), slice.id.clone()));
            }
        }
        Ok(Reservation { id, nano, slices })
    }

    /// The request has ended and cost so much, at most what it held: the record that says so is on its way to the group.
    pub fn post(&mut self, reservation: &Reservation, nano: u64) {
        for (budget_id, slice_id) in &reservation.slices {
            let current = self.slices.get_mut(budget_id).filter(|slice| slice.id == *slice_id);
            let slice = match current {
                Some(slice) => slice,
                None => match self.over.get_mut(slice_id) {
                    Some(slice) => slice,
                    None => continue,
                },
            };
            if slice.holders.remove(&reservation.id) {
                slice.held -= reservation.nano;
                slice.spent += nano.min(reservation.nano);
            }
            if slice.holders.is_empty() {
                self.over.remove(slice_id);
            }
        }
    }

    /// What the group is to be asked now. Each is told once, and again when no answer has come for a while.
    pub fn asks(&mut self, now_ms: u64) -> Vec<LeaseAsk> {
        let config = self.config;
        let mut asks = Vec::new();
        for (budget_id, slice) in &mut self.slices {
            let ends_soon = slice.expires_ms < now_ms.saturating_add(config.prolong_ms);
            let used = slice.held > 0 || slice.spent > slice.spent_at_lease;
            // An idle slice is left to lapse, so that a budget is not tied up where nobody spends it.
            let due = slice.need > 0 || (ends_soon && used);
            let waiting = slice
                .asked_ms
                .is_some_and(|at| now_ms < at.saturating_add(config.ask_again_ms));
            if !due || waiting {
                continue;
            }
            slice.asked_ms = Some(now_ms);
            let recent = slice.spent - slice.spent_at_lease;
            let want = slice
                .need
                .max(slice.held)
                .saturating_add(recent.saturating_mul(config.ahead));
            asks.push(LeaseAsk {
                budget_id: budget_id.clone(),
                slice_id: slice.id.clone(),
                want_nano: want,
                expires_unix_ms: now_ms.saturating_add(config.lease_ms),
            });
        }
        asks
    }

    /// The group has answered. An answer for a slice that is over is without effect: its money went back or will.
    pub fn leased(&mut self, lease: &Lease) {
        let Some(slice) = self.slices.get_mut(&lease.budget_id) else {
            return;
        };
        if slice.id != lease.slice_id {
            return;
        }
        slice.granted = slice.granted.max(lease.granted_nano);
        slice.expires_ms = slice.expires_ms.max(lease.expires_unix_ms);
        slice.exhausted = lease.exhausted;
        slice.asked_ms = None;
        slice.need = 0;
        slice.spent_at_lease = slice.spent;
    }

    /// Requests that must stop now, because a slice they hold is about to end and was not prolonged. Told once. They are
    /// posted as always, with what was delivered.
    pub fn cut(&mut self, now_ms: u64) -> Vec<u64> {
        let budgets: Vec<String> = self.slices.keys().cloned().collect();
        let mut cut = BTreeSet::new();
        for budget_id in budgets {
            cut.extend(self.retire(&budget_id, now_ms));
        }
        cut.into_iter().collect()
    }

    /// When [`asks`](Self::asks) or [`cut`](Self::cut) may next have something to say, if nothing else happens.
    pub fn next_due_ms(&self) -> Option<u64> {
        let dues = self.slices.values().map(|slice| {
            let ask = slice.expires_ms.saturating_sub(self.config.prolong_ms);
            let again = slice.asked_ms.map(|at| at.saturating_add(self.config.ask_again_ms));
            let cut = slice.expires_ms.saturating_sub(self.config.margin_ms);
            again.unwrap_or(ask).min(cut)
        });
        dues.min()
    }

    /// Takes a slice out of use if its time is over; those that hold it must stop.
    fn retire(&mut self, budget_id: &str, now_ms: u64) -> BTreeSet<u64> {
        let margin_ms = self.config.margin_ms;
        let over = self
            .slices
            .get(budget_id)
            .is_some_and(|slice| slice.granted > 0 && slice.expires_ms <= now_ms.saturating_add(margin_ms));
        if !over {
            return BTreeSet::new();
        }
        let Some(slice) = self.slices.remove(budget_id) else {
            return BTreeSet::new();
        };
        let holders = slice.holders.clone();
        if !holders.is_empty() {
            self.over.insert(slice.id.clone(), slice);
        }
        holders
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budgets(ids: &[&str]) -> Vec<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    fn grant(purse: &mut Purse, now_ms: u64, nano: u64, exhausted: bool) -> Vec<LeaseAsk> {
        let asks = purse.asks(now_ms);
        for ask in &asks {
            purse.leased(&Lease {
                budget_id: ask.budget_id.clone(),
                slice_id: ask.slice_id.clone(),
                granted_nano: nano,
                expires_unix_ms: ask.expires_unix_ms,
                exhausted,
            });
        }
        asks
    }

    #[test]
    fn a_first_request_asks_and_later_ones_need_not() {
        let mut purse = Purse::new("m1", PurseConfig::default());
        let budget = budgets(&["b"]);
        assert!(matches!(purse.reserve(&budget, 10, 0), Err(ReserveError::Short { .. })));
        let asks = grant(&mut purse, 0, 100, false);
        assert_eq!((asks[0].want_nano, asks[0].expires_unix_ms), (10, 30_000));
        let first = purse.reserve(&budget, 60, 1).unwrap();
        let second = purse.reserve(&budget, 40, 1).unwrap();
        assert!(matches!(purse.reserve(&budget, 1, 1), Err(ReserveError::Short { .. })));
        // What a request did not cost is free again.
        purse.post(&first, 5);
        let third = purse.reserve(&budget, 55, 1).unwrap();
        purse.post(&second, 40);
        purse.post(&third, 55);
        purse.post(&third, 55);
        assert!(matches!(purse.reserve(&budget, 1, 1), Err(ReserveError::Short { .. })));
        grant(&mut purse, 2, 100, true);
        assert_eq!(
            purse.reserve(&budget, 1, 2),
            Err(ReserveError::Exhausted {
                budget_id: "b".into(),
                left_nano: 0,
                nano: 1
            })
        );
        // The next one asks whether it still is.
        assert!(matches!(purse.reserve(&budget, 1, 3), Err(ReserveError::Short { .. })));
        assert_eq!(purse.asks(3).len(), 1);
    }

    #[test]
    fn all_budgets_or_none() {
        let mut purse = Purse::new("m1", PurseConfig::default());
        let both = budgets(&["a", "b"]);
        assert!(purse.reserve(&both, 10, 0).is_err());
        let asks = purse.asks(0);
        assert_eq!(asks.len(), 2);
        assert!(purse.asks(999).is_empty() && purse.asks(1000).len() == 2);
        let a = Lease {
            budget_id: "a".into(),
            slice_id: asks[0].slice_id.clone(),
            granted_nano: 10,
            expires_unix_ms: 30_000,
            exhausted: false,
        };
        purse.leased(&a);
        assert!(purse.reserve(&both, 10, 1).is_err());
        let held = purse.reserve(&both[..1], 10, 1).unwrap();
        assert_eq!(held.slices.len(), 1);
    }

    #[test]
    fn a_slice_that_is_not_prolonged_stops_its_requests_in_time() {
        let config = PurseConfig::default();
        let mut purse = Purse::new("m1", config);
        let budget = budgets(&["b"]);
        assert!(purse.reserve(&budget, 10, 0).is_err());
        grant(&mut purse, 0, 100, false);
        let held = purse.reserve(&budget, 10, 0).unwrap();
        assert!(purse.cut(27_999).is_empty());
        assert_eq!(purse.asks(15_001).len(), 1);
        assert_eq!(purse.next_due_ms(), Some(16_001));
        assert_eq!(purse.cut(28_000), [held.id]);
        assert!(purse.cut(28_001).is_empty());
        purse.post(&held, 7);
        assert!(purse.over.is_empty());
        // A late answer does not revive it; a new slice has a new name.
        assert!(purse.reserve(&budget, 10, 28_002).is_err());
        let asks = purse.asks(28_002);
        assert_ne!(asks[0].slice_id, held.slices[0].1);
    }

    #[test]
    fn an_idle_slice_lapses() {
        let mut purse = Purse::new("m1", PurseConfig::default());
        let budget = budgets(&["b"]);
        assert!(purse.reserve(&budget, 10, 0).is_err());
        grant(&mut purse, 0, 100, false);
        assert!(purse.asks(20_000).is_empty());
        assert!(purse.cut(28_000).is_empty());
        assert!(purse.slices.is_empty());
    }
}
