//! Between a client and the replicated state: who it is ([`keys`]), what it may still use ([`rates`], [`wallet`]), whether it
//! asks for the second time ([`idempotency`]), and what of all that a running request holds until its record is settled
//! ([`hold`]).
//!
//! ```text
//!  key ─▶ keys ─▶ Caller ─▶ admit: idempotency ▸ rates ▸ wallet ─▶ Hold ─▶ record ─▶ settle: rates and wallet get the rest back
//!           │                                              ▲
//!       AccountStore (tables of this member, commands)     ╰── LeaseSlice, only when the slice at hand is too small
//! ```
//!
//! Invariants: what is held is given back exactly once, whether by a record or by dropping the [`hold::Hold`]; a request
//! under a hard budget runs only while what it costs at most is set aside in a slice of this member; a revoked key is
//! refused by a member as soon as that has applied the revocation.
//!
//! Deliberately not here: what a token costs (`baton-ledger`), what a command does (`baton-state`), HTTP routes
//! ([`organization`](crate::organization)).

pub(crate) mod hold;
pub(crate) mod idempotency;
pub(crate) mod keys;
pub(crate) mod rates;
pub(crate) mod store;
pub(crate) mod wallet;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use self::idempotency::InFlight;
use self::keys::KeyCache;
use self::rates::RateDesk;
use self::store::AccountStore;
use self::wallet::Wallet;

/// How often rows that other members settled are counted against rates.
const OTHERS_EVERY: Duration = Duration::from_millis(250);

/// Requests remembered until their row is seen, a quarter of a second in general.
const OWN_MAX: usize = 262_144;

/// Everything of one gateway about its callers.
pub(crate) struct Accounts {
    pub store: Arc<dyn AccountStore>,
    pub keys: KeyCache,
    pub rates: RateDesk,
    pub wallet: Wallet,
    pub in_flight: Arc<InFlight>,
    /// Requests of this gateway whose rows were not seen in the ledger yet: they are counted already.
    own: Mutex<HashSet<String>>,
}

impl Accounts {
    /// Starts the task that keeps slices and rates going; it ends with `over`.
    pub fn start(store: Arc<dyn AccountStore>, budget_lease_ms: u64, over: CancellationToken) -> Arc<Self> {
        let accounts = Arc::new(Self {
            keys: KeyCache::default(),
            rates: RateDesk::default(),
            wallet: Wallet::new(store.clone(), budget_lease_ms),
            in_flight: Arc::default(),
            own: Mutex::default(),
            store,
        });
        let task = accounts.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = over.cancelled() => {}
                () = task.wallet.run() => {}
                () = task.count_others() => {}
            }
        });
        accounts
    }

    /// This request is counted here, so its row is not to be.
    fn remember_own(&self, request_id: &str) {
        let mut own = self.own();
        if own.len() >= OWN_MAX {
            // Records that never made it; their requests were counted.
            own.clear();
        }
        own.insert(request_id.to_owned());
    }

    fn own(&self) -> MutexGuard<'_, HashSet<String>> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts what other members serve against the rates here, as their records are applied.
    async fn count_others(self: &Arc<Self>) {
        let mut ticks = tokio::time::interval(OTHERS_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut seen, mut applied) = (None, 0);
        loop {
            ticks.tick().await;
            let now_applied = self.store.applied_index();
            if now_applied == applied && seen.is_some() {
                continue;
            }
            let accounts = self.clone();
            let counted = tokio::task::spawn_blocking(move || accounts.count_rows_after(seen)).await;
            match counted {
                Ok(Ok(last)) => {
                    seen = Some(last);
                    applied = now_applied;
                }
                Ok(Err(error)) => tracing::debug!(%error, "rows of other members could not be read"),
                // It panicked, which was logged; the wallet must go on.
                Err(_) => {}
            }
        }
    }

    /// Counts rows after `seen` (nothing at the start: rates begin full), and returns the last.
    fn count_rows_after(&self, seen: Option<u64>) -> Result<u64, store::StoreError> {
        let tables = self.store.tables()?;
        let Some(mut seen) = seen else {
            return Ok(baton_state::view::settled(&*tables)?);
        };
        loop {
            let page = baton_state::view::rows_after(&*tables, seen, baton_state::view::PAGE_RECORDS_MAX)?;
            let Some(last) = page.last() else { return Ok(seen) };
            seen = last.sequence;
            for row in page {
                let Some(baton_proto::state::ledger_row::Body::Usage(record)) = row.body else {
                    continue;
                };
                if !self.own().remove(&record.request_id) {
                    self.rates.elsewhere(&*tables, &record)?;
                }
            }
        }
    }
}
