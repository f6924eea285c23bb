//! Drives [`baton_limits::Purse`]: asks the group for slices, and stops requests whose slice could not be prolonged.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_limits::{Lease, LeaseAsk, Purse, PurseConfig, Reservation, ReserveError};
use baton_proto::state::{LeaseSlice, ReturnSlice, command::Kind};
use baton_state::{Applied, Refused};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::store::{AccountStore, StoreError, command};
use crate::clock::unix_ms;

/// Longest wait of a request for the group to set money aside: an election, with room.
const LEASE_WAIT_MAX: Duration = Duration::from_secs(4);
/// The purse is looked at this often even if nothing is known to be due.
const LOOK_AGAIN_MS: u64 = 500;

/// Why nothing was reserved.
#[derive(Debug)]
pub(crate) enum NotReserved {
    /// A budget has too little left.
    Exhausted(ReserveError),
    /// The group did not answer in time.
    Unanswered,
}

/// The purse of this gateway.
pub(crate) struct Wallet {
    store: Arc<dyn AccountStore>,
    inner: Mutex<Inner>,
    /// There may be something to ask.
    due: Notify,
    /// An answer came.
    answered: Notify,
}

struct Inner {
    purse: Purse,
    /// Stops a request, by its reservation.
    holders: HashMap<u64, CancellationToken>,
    /// What requests wait for, by budget: asked for together.
    wanted: BTreeMap<String, u64>,
}

/// Money held of slices. Given back on drop, unless posted.
pub(crate) struct Held {
    wallet: Arc<super::Accounts>,
    reservation: Option<Reservation>,
    /// Cancelled when the request must stop.
    pub cut: CancellationToken,
}

impl Held {
    /// Budget, slice and amount of every budget it is held of.
    pub fn slices(&self) -> impl Iterator<Item = (&str, &str, u64)> {
        self.reservation.iter().flat_map(|reservation| {
            let slices = reservation.slices.iter();
            slices.map(|(budget, slice)| (budget.as_str(), slice.as_str(), reservation.nano))
        })
    }

    /// The request cost so much; its record is on its way.
    pub fn post(&mut self, nano: u64) {
        if let Some(reservation) = self.reservation.take() {
            let mut inner = self.wallet.wallet.lock();
            inner.holders.remove(&reservation.id);
            inner.purse.post(&reservation, nano);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.post(0);
    }
}

impl Wallet {
    pub fn new(store: Arc<dyn AccountStore>, lease_ms: u64) -> Self {
        let config = PurseConfig {
            lease_ms,
            prolong_ms: lease_ms / 2,
            margin_ms: lease_ms / 15,
            ..PurseConfig::default()
        };
        // Unique among members, and among the lives of one.
        let name = format!("{}-{}", store.member_id(), Uuid::now_v7().simple());
        Self {
            store,
            inner: Mutex::new(Inner {
                purse: Purse::new(name, config),
                holders: HashMap::new(),
                wanted: BTreeMap::new(),
            }),
            due: Notify::new(),
            answered: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks and cuts, for ever. An ask that waits for an election delays no cut.
    pub async fn run(&self) {
        let mut asking = FuturesUnordered::new();
        loop {
            let now_ms = unix_ms();
            let next_ms = {
                let mut inner = self.lock();
                for id in inner.purse.cut(now_ms) {
                    if let Some(cut) = inner.holders.get(&id) {
                        tracing::warn!("a budget's slice could not be prolonged; a request is stopped");
                        cut.cancel();
                    }
                }
                asking.extend(inner.asks(now_ms).into_iter().map(|ask| self.ask(ask)));
                inner.purse.next_due_ms()
            };
            let wait_ms = next_ms.map_or(LOOK_AGAIN_MS, |next| {
                next.saturating_sub(now_ms).clamp(10, LOOK_AGAIN_MS)
            });
            tokio::select! {
                Some(()) = asking.next() => {}
                () = self.due.notified() => {}
                () = tokio::time::sleep(Duration::from_millis(wait_ms)) => {}
            }
        }
    }

    /// Returns what nothing holds, so that others need not wait for the leases' end. Bounded by [`LEASE_WAIT_MAX`]; what is
    /// not returned ends by itself.
    pub async fn give_back(&self) {
        let slices = self.lock().purse.give_back();
        let returns = slices.into_iter().map(|(budget_id, slice_id)| {
            let kind = Kind::ReturnSlice(ReturnSlice { budget_id, slice_id });
            self.store.propose(command("", kind))
        });
        let all = futures_util::future::join_all(returns);
        if tokio::time::timeout(LEASE_WAIT_MAX, all).await.is_err() {
            tracing::warn!("slices of budgets could not be returned in time; they end by themselves");
        }
    }

    async fn ask(&self, ask: LeaseAsk) {
        let LeaseAsk {
            budget_id,
            slice_id,
            want_nano,
            expires_unix_ms,
        } = ask;
        let kind = Kind::LeaseSlice(LeaseSlice {
            budget_id: budget_id.clone(),
            slice_id: slice_id.clone(),
            member_id: self.store.member_id(),
            want_nano,
            expires_unix_ms,
        });
        // A late answer is still an answer; an unanswered one is asked again.
        let answer = tokio::time::timeout(LEASE_WAIT_MAX, self.store.propose(command("", kind))).await;
        let mut inner = self.lock();
        let mut lease = Lease {
            budget_id,
            slice_id,
            granted_nano: 0,
            expires_unix_ms: 0,
            exhausted: true,
        };
        match answer {
            Ok(Ok(Applied::Leased {
                open_nano,
                granted_nano,
                expires_unix_ms,
                ..
            })) => {
                lease.granted_nano = granted_nano;
                lease.expires_unix_ms = expires_unix_ms;
                lease.exhausted = open_nano < want_nano;
                inner.purse.leased(&lease);
            }
            Ok(Err(StoreError::Refused(Refused::BudgetExhausted { .. }))) => inner.purse.leased(&lease),
            Ok(Err(StoreError::Refused(error))) => {
                if !matches!(error, Refused::PeriodOver { .. }) {
                    tracing::warn!(budget_id = lease.budget_id, %error, "a slice of a budget was refused");
                }
                inner.purse.ended(&lease.budget_id, &lease.slice_id);
                if !matches!(error, Refused::PeriodOver { .. }) {
                    return;
                }
            }
            Ok(Ok(_)) | Ok(Err(_)) | Err(_) => return,
        }
        drop(inner);
        self.answered.notify_waiters();
    }

    /// Holds `nano` of every budget. Without a round trip, if slices at hand have as much.
    pub async fn reserve(
        &self,
        accounts: &Arc<super::Accounts>,
        budgets: &[String],
        nano: u64,
    ) -> Result<Held, NotReserved> {
        let deadline = tokio::time::Instant::now() + LEASE_WAIT_MAX;
        let mut wanted: Option<Wanted<'_>> = None;
        loop {
            let answered = self.answered.notified();
            tokio::pin!(answered);
            answered.as_mut().enable();
            {
                let mut inner = self.lock();
                match inner.purse.reserve(budgets, nano, unix_ms()) {
                    Ok(reservation) => {
                        let cut = CancellationToken::new();
                        inner.holders.insert(reservation.id, cut.clone());
                        return Ok(Held {
                            wallet: accounts.clone(),
                            reservation: Some(reservation),
                            cut,
                        });
                    }
                    Err(error @ ReserveError::Exhausted { .. }) => return Err(NotReserved::Exhausted(error)),
                    Err(ReserveError::Short { .. }) => {}
                }
            }
            wanted.get_or_insert_with(|| Wanted::new(self, budgets, nano));
            self.due.notify_one();
            if tokio::time::timeout_at(deadline, answered).await.is_err() {
                return Err(NotReserved::Unanswered);
            }
        }
    }
}

impl Inner {
    /// What is to be asked, with what others wait for at the same time.
    fn asks(&mut self, now_ms: u64) -> Vec<LeaseAsk> {
        let mut asks = self.purse.asks(now_ms);
        for ask in &mut asks {
            let waiting = self.wanted.get(&ask.budget_id).copied().unwrap_or(0);
            ask.want_nano = ask.want_nano.max(waiting);
        }
        asks
    }
}

/// Stands in [`Inner::wanted`] while a request waits.
struct Wanted<'a> {
    wallet: &'a Wallet,
    budgets: &'a [String],
    nano: u64,
}

impl<'a> Wanted<'a> {
    fn new(wallet: &'a Wallet, budgets: &'a [String], nano: u64) -> Self {
        let mut inner = wallet.lock();
        for budget in budgets {
            let sum = inner.wanted.entry(budget.clone()).or_default();
            *sum = sum.saturating_add(nano);
        }
        drop(inner);
        Self { wallet, budgets, nano }
    }
}

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        let mut inner = self.wallet.lock();
        for budget in self.budgets {
            if let Some(sum) = inner.wanted.get_mut(budget) {
                *sum = sum.saturating_sub(self.nano);
                if *sum == 0 {
                    inner.wanted.remove(budget);
                }
            }
        }
    }
}
