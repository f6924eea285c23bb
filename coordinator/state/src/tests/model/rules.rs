//! The rules, as short as they can be said, over plain maps.

use super::steps::{BUDGETS, Step};
use crate::{Applied, CLAIM_MS_MAX, IDEMPOTENCY_MS, SLICE_GRACE_MS, SLICE_LEASE_MS_MAX, period_start};
use baton_proto::state::{Correction, UsageRecord, UsageStatus, command::Kind};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Window {
    pub(super) limit: u64,
    pub(super) hard: bool,
    pub(super) posted: u64,
    pub(super) voided: u64,
    pub(super) expired: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Slice {
    pub(super) member: u64,
    pub(super) start: u64,
    pub(super) open: u64,
    pub(super) granted: u64,
    pub(super) expires: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Settled {
    pub(super) handed_in: UsageRecord,
    pub(super) sequence: u64,
    pub(super) priced: bool,
    /// Delivered and charged for it, corrected.
    pub(super) tokens: i64,
    pub(super) output: i64,
}

#[derive(Default)]
pub(super) struct Model {
    pub(super) now: u64,
    pub(super) rows: u64,
    /// Start, order of arrival, dollars; of the model and of all models.
    pub(super) prices: [Vec<(u64, usize, u64)>; 2],
    pub(super) limits: [Option<(u64, bool)>; 2],
    pub(super) windows: BTreeMap<(usize, u64), Window>,
    pub(super) slices: BTreeMap<(usize, u8), Slice>,
    pub(super) requests: BTreeMap<String, Settled>,
    pub(super) corrections: BTreeMap<u8, (Correction, u64)>,
    pub(super) client_keys: BTreeMap<u8, (String, u8, u64, u64)>,
    /// Of the worker's registration.
    pub(super) nonce: u8,
    /// Request, body and end of a claim, by key.
    pub(super) claims: BTreeMap<u8, (u8, u8, u64)>,
    pub(super) keys: BTreeMap<u8, (u8, bool)>,
    /// Last row of the last two periods, and whether the last is signed.
    pub(super) periods: (u64, u64, bool),
    pub(super) signed: Option<Kind>,
    pub(super) epoch: u64,
    pub(super) worker: Option<BTreeSet<u64>>,
}

pub(super) type Expected = Result<Option<Applied>, &'static str>;

impl Model {
    fn start(&self, budget: usize) -> u64 {
        period_start(BUDGETS[budget].1, self.now)
    }

    pub(super) fn open(&self, budget: usize, start: u64) -> u64 {
        let slices = self
            .slices
            .iter()
            .filter(|((of, _), slice)| *of == budget && slice.start == start);
        slices.map(|(_, slice)| slice.open).sum()
    }

    /// Time alone: at most four slices end with each command.
    fn pass(&mut self) {
        let mut due: Vec<_> = self
            .slices
            .iter()
            .map(|(id, slice)| (slice.expires + SLICE_GRACE_MS, *id))
            .collect();
        due.retain(|(due, _)| *due <= self.now);
        due.sort_unstable();
        for (_, id) in due.into_iter().take(4) {
            let slice = self.slices.remove(&id).unwrap();
            self.windows.get_mut(&(id.0, slice.start)).unwrap().expired += slice.open;
        }
    }

    fn live(&self, budget: usize, slice: u8) -> Option<Slice> {
        let slice = self.slices.get(&(budget, slice)).cloned();
        slice.filter(|slice| self.now < slice.expires + SLICE_GRACE_MS)
    }

    fn window(&mut self, budget: usize, start: u64) -> &mut Window {
        let (limit, hard) = self.limits[budget].unwrap();
        let new = Window {
            limit,
            hard,
            ..Window::default()
        };
        self.windows.entry((budget, start)).or_insert(new)
    }

    /// What the command is answered with: `None` where the model does not say which of the good answers.
    pub(super) fn apply(&mut self, step: &Step, kind: &Kind) -> Expected {
        self.pass();
        match (step, kind) {
            (Step::Tick(_), _) => Ok(Some(Applied::Ticked { now_unix_ms: self.now })),
            (Step::Budget { budget, limit, hard }, _) => self.budget(*budget, *limit, *hard),
            (
                Step::Lease {
                    budget,
                    slice,
                    member,
                    want,
                    ..
                },
                Kind::LeaseSlice(asked),
            ) => self.lease(*budget, *slice, *member, *want, asked.expires_unix_ms),
            (Step::Return { budget, slice }, _) => {
                let Some(slice_was) = self.live(*budget, *slice) else {
                    return Ok(Some(Applied::Returned { nano: 0 }));
                };
                self.slices.remove(&(*budget, *slice));
                self.window(*budget, slice_was.start).voided += slice_was.open;
                Ok(Some(Applied::Returned { nano: slice_was.open }))
            }
            (Step::Settle { slices, key, .. }, Kind::SettleUsage(command)) => {
                self.settle(command.record.as_ref().unwrap(), slices, *key)
            }
            (Step::Claim { request, key, body, ms }, _) => self.claim(*request, *key, *body, *ms),
            (Step::Release { request, key }, _) => {
                let now = self.now;
                let removed = match self.claims.get(key) {
                    Some((known, _, _)) if known == request => {
                        self.claims.remove(key).is_some_and(|claim| now < claim.2)
                    }
                    _ => false,
                };
                Ok(Some(Applied::Removed { removed }))
            }
            (Step::Correct { id, .. }, Kind::CorrectUsage(command)) => {
                self.correct(*id, command.correction.as_ref().unwrap())
            }
            (Step::Price { any, dollars, .. }, Kind::PutPrice(command)) => {
                let from = command.price.as_ref().unwrap().effective_from_unix_ms;
                let prices = &mut self.prices[usize::from(*any)];
                if !prices.iter().any(|known| (known.0, known.2) == (from, *dollars)) {
                    prices.push((from, prices.len(), *dollars));
                }
                Ok(None)
            }
            (Step::Key { key, secret }, _) => match self.keys.get(key) {
                Some((_, true)) => Err("KeyRevoked"),
                Some((known, _)) if known != secret => Err("Fixed"),
                Some(_) => Ok(Some(Applied::Stands { changed: false })),
                None if self.keys.values().any(|(known, _)| known == secret) => Err("KeyHashTaken"),
                None => {
                    self.keys.insert(*key, (*secret, false));
                    Ok(Some(Applied::Stands { changed: true }))
                }
            },
            (Step::Revoke(key), _) => match self.keys.get_mut(key) {
                None => Err("Unknown"),
                Some((_, revoked)) => {
                    let changed = !std::mem::replace(revoked, true);
                    Ok(Some(Applied::Stands { changed }))
                }
            },
            (Step::Close { .. }, Kind::ClosePeriod(command)) => self.close(command.after_sequence),
            (Step::Seal { signer }, _) => {
                let (_, last, sealed) = self.periods;
                if self.signed.as_ref() == Some(kind) {
                    return Ok(Some(Applied::Sealed { last_sequence: last }));
                }
                match (sealed || last == 0, signer) {
                    (true, _) => Err("NotNext"),
                    (_, 2) => Err("BadSignature"),
                    _ => {
                        self.periods.2 = true;
                        self.signed = Some(kind.clone());
                        Ok(Some(Applied::Sealed { last_sequence: last }))
                    }
                }
            }
            (Step::Register(nonce), _) => {
                if *nonce == 0 || self.worker.is_none() || self.nonce != *nonce {
                    self.epoch += 1;
                    self.worker = Some(BTreeSet::new());
                    self.nonce = *nonce;
                }
                Ok(Some(Applied::Registered { epoch: self.epoch }))
            }
            (Step::Witness { member, lost, .. }, Kind::WitnessWorker(command)) => {
                let mut removed = false;
                if let Some(votes) = self.worker.as_mut().filter(|_| command.epoch == self.epoch) {
                    if *lost {
                        votes.insert(*member);
                    } else {
                        votes.remove(member);
                    }
                    removed = votes.len() >= 2;
                }
                if removed {
                    self.worker = None;
                }
                Ok(Some(Applied::Removed { removed }))
            }
            other => panic!("{other:?}"),
        }
    }

    fn budget(&mut self, budget: usize, limit: u64, hard: bool) -> Expected {
        let changed = self.limits[budget] != Some((limit, hard));
        let start = self.start(budget);
        let open = self.open(budget, start);
        if let Some(window) = self.windows.get_mut(&(budget, start)).filter(|_| changed) {
            if hard && window.posted + open > limit {
                return Err("LimitBelowSpent");
            }
            (window.limit, window.hard) = (limit, hard);
        }
        self.limits[budget] = Some((limit, hard));
        Ok(Some(Applied::Stands { changed }))
    }

    fn lease(&mut self, budget: usize, slice: u8, member: u64, want: u64, asked: u64) -> Expected {
        let Some((limit, hard)) = self.limits[budget] else {
            return Err("Unknown");
        };
        if asked <= self.now {
            return Err("Invalid");
        }
        let start = self.start(budget);
        let posted = self.windows.get(&(budget, start)).map_or(0, |window| window.posted);
        let free = limit.saturating_sub(posted + self.open(budget, start));
        let known = self.live(budget, slice);
        match &known {
            Some(known) if known.member != member => return Err("SliceOfOther"),
            Some(known) if known.start != start => return Err("PeriodOver"),
            None if self.slices.contains_key(&(budget, slice)) => return Err("Invalid"),
            _ => {}
        }
        let more = want.saturating_sub(known.as_ref().map_or(0, |known| known.open));
        let more = if hard { more.min(free) } else { more };
        if known.is_none() && more == 0 {
            return Err(if want == 0 { "Invalid" } else { "BudgetExhausted" });
        }
        let mut now = known.unwrap_or(Slice {
            member,
            start,
            open: 0,
            granted: 0,
            expires: 0,
        });
        now.open += more;
        now.granted += more;
        now.expires = now.expires.max(asked.min(self.now + SLICE_LEASE_MS_MAX));
        self.window(budget, start);
        self.slices.insert((budget, slice), now.clone());
        Ok(Some(Applied::Leased {
            open_nano: now.open,
            granted_nano: now.granted,
            expires_unix_ms: now.expires,
            period_start_unix_ms: start,
        }))
    }

    fn settle(&mut self, record: &UsageRecord, slices: &[Option<(u8, u64)>; 2], key: Option<(u8, u8)>) -> Expected {
        if record.cached_tokens > record.prompt_tokens || record.completion_tokens > record.sampled_tokens {
            return Err("Impossible");
        }
        if let Some(known) = self.requests.get(&record.request_id) {
            let sequence = known.sequence;
            return if known.handed_in == *record {
                Ok(Some(Applied::Settled { sequence }))
            } else {
                Err("UsageConflict")
            };
        }
        if let Some((known, body)) = key
            && let Some((_, first, at, sequence)) = self.client_keys.get(&known)
            && self.now < at + IDEMPOTENCY_MS
        {
            let sequence = *sequence;
            return if *first == body {
                Ok(Some(Applied::Settled { sequence }))
            } else {
                Err("IdempotencyConflict")
            };
        }
        let price = self.prices.iter().find_map(|prices| {
            let holding = prices.iter().filter(|price| price.0 <= record.started_unix_ms);
            holding.max().map(|price| price.2)
        });
        let dollars = price.unwrap_or(0);
        let (prompt, cached) = (u64::from(record.prompt_tokens), u64::from(record.cached_tokens));
        let free = record.status() == UsageStatus::Failed && record.completion_tokens == 0;
        let output = if free {
            0
        } else {
            dollars * 4000 * u64::from(record.completion_tokens)
        };
        let input = if free {
            0
        } else {
            dollars * (1000 * (prompt - cached) + 100 * cached)
        };
        let cost = input + output;
        let mut posts = Vec::new();
        let mut late = false;
        for (budget, (slice, reserved)) in slices
            .iter()
            .enumerate()
            .filter_map(|(at, slice)| Some((at, (*slice)?)))
        {
            let Some((_, hard_now)) = self.limits[budget] else {
                return Err("Unknown");
            };
            if cost == 0 {
                continue;
            }
            let live = self.live(budget, slice);
            let hard = live
                .as_ref()
                .map_or(hard_now, |live| self.windows[&(budget, live.start)].hard);
            match &live {
                Some(live) if hard && cost > reserved.min(live.open) => return Err("BeyondReservation"),
                None if hard => late = true,
                _ => {}
            }
            posts.push((budget, slice, live));
        }
        if !late {
            for (budget, slice, live) in posts {
                let start = live.map_or(self.start(budget), |live| live.start);
                if let Some(slice) = self
                    .slices
                    .get_mut(&(budget, slice))
                    .filter(|slice| self.now < slice.expires + SLICE_GRACE_MS)
                {
                    slice.open -= slice.open.min(cost);
                }
                self.window(budget, start).posted += cost;
            }
        }
        self.rows += 1;
        let sequence = self.rows;
        if let Some((known, body)) = key {
            self.claims.remove(&known);
            self.client_keys
                .insert(known, (record.request_id.clone(), body, self.now, sequence));
        }
        let settled = Settled {
            handed_in: record.clone(),
            sequence,
            priced: price.is_some(),
            tokens: record.completion_tokens.into(),
            output: if late { 0 } else { output as i64 },
        };
        self.requests.insert(record.request_id.clone(), settled);
        Ok(Some(Applied::Settled { sequence }))
    }

    fn claim(&mut self, request: u8, key: u8, body: u8, ms: u64) -> Expected {
        if ms == 0 {
            return Err("Invalid");
        }
        if let Some((_, first, at, sequence)) = self.client_keys.get(&key)
            && self.now < at + IDEMPOTENCY_MS
        {
            let sequence = *sequence;
            return if *first == body {
                Ok(Some(Applied::Settled { sequence }))
            } else {
                Err("IdempotencyConflict")
            };
        }
        let mut expires = self.now + ms.min(CLAIM_MS_MAX);
        if let Some((other, first, until)) = self.claims.get(&key)
            && self.now < *until
        {
            if *first != body {
                return Err("IdempotencyConflict");
            }
            if *other != request {
                return Err("IdempotencyInUse");
            }
            expires = expires.max(*until);
        }
        self.claims.insert(key, (request, body, expires));
        Ok(Some(Applied::Claimed {
            expires_unix_ms: expires,
        }))
    }

    fn correct(&mut self, id: u8, correction: &Correction) -> Expected {
        if let Some((known, sequence)) = self.corrections.get(&id) {
            let sequence = *sequence;
            return if known == correction {
                Ok(Some(Applied::Corrected { sequence }))
            } else {
                Err("CorrectionConflict")
            };
        }
        if (correction.completion_tokens, correction.output_nano) == (0, 0) {
            return Err("Invalid");
        }
        let Some(request) = self.requests.get_mut(&correction.request_id) else {
            return Err("Unknown");
        };
        if request.sequence != correction.sequence {
            return Err("Invalid");
        }
        let (tokens, output) = (
            request.tokens + correction.completion_tokens,
            request.output + correction.output_nano,
        );
        if tokens < 0 || output < 0 {
            return Err("BelowZero");
        }
        if !request.priced && output != 0 {
            return Err("Invalid");
        }
        (request.tokens, request.output) = (tokens, output);
        self.rows += 1;
        self.corrections.insert(id, (correction.clone(), self.rows));
        Ok(Some(Applied::Corrected { sequence: self.rows }))
    }

    fn close(&mut self, after: u64) -> Expected {
        let (before, last, sealed) = self.periods;
        if last > 0 && after == before {
            return Ok(Some(Applied::Closed { last_sequence: last }));
        }
        if after != last || (last > 0 && !sealed) {
            return Err("NotNext");
        }
        if self.rows == last {
            return Err("NothingToClose");
        }
        self.periods = (last, self.rows, false);
        Ok(Some(Applied::Closed {
            last_sequence: self.rows,
        }))
    }
}
