//! What clients make of answers: whether one can be, and what they do next.

use super::clients::{Call, Expect, What};
use super::commands;
use super::oracle::{Checked, violation};
use super::world::World;
use crate::RaftStoreError;
use crate::tables::StateView;
use baton_limits::{Lease, LeaseAsk};
use baton_proto::state::UsageRecord;
use baton_state::{Applied, Outcome, Refused, view};

impl World {
    pub(super) fn applied(&mut self, call: &Call, answer: Result<Applied, RaftStoreError>) -> Checked {
        let outcome: Outcome = match answer {
            Ok(applied) => Ok(applied),
            Err(RaftStoreError::Refused(refused)) => Err(refused),
            Err(_) => {
                // Not taken, or nobody knows: again, soon.
                let soon = self.now_ms + self.random.range(20, 200);
                if let Some(op) = self.clients.ops.get_mut(&call.op) {
                    op.next_try_ms = soon;
                }
                return Ok(());
            }
        };
        let index = self.oracle.answered(&call.command, &outcome)?;
        self.clients.known_index = self.clients.known_index.max(index);
        self.clients.answers += 1;
        self.log(|| format!("entry {index} is answered by member {}: {outcome:?}", call.member));
        // Whoever tried twice hears twice.
        let what = match self.clients.ops.remove(&call.op) {
            Some(op) => op.what,
            None => return Ok(()),
        };
        if self.random.chance(4) {
            self.check_durable(index)?;
        }
        self.judge(what, outcome)
    }

    fn judge(&mut self, what: What, outcome: Outcome) -> Checked {
        match (what, outcome) {
            (What::Found(at), Ok(Applied::Ticked { .. })) => {
                self.clients.want(What::Found(at));
                Ok(())
            }
            (What::Found(_), Ok(_)) => {
                self.clients.founded += 1;
                Ok(())
            }
            (What::Settle(record, Expect::Settled), Ok(Applied::Settled { sequence })) => {
                self.settled(*record, sequence)
            }
            (What::Settle(record, Expect::Row(row)), Ok(Applied::Settled { sequence })) if row != sequence => {
                violation(format!(
                    "request {} was answered row {sequence}, its key has row {row}",
                    record.request_id
                ))
            }
            (What::Settle(_, Expect::Row(_)), Ok(Applied::Settled { .. })) => Ok(()),
            (
                What::Settle(_, Expect::Conflict),
                Err(Refused::UsageConflict { .. } | Refused::IdempotencyConflict { .. }),
            ) => Ok(()),
            (What::Settle(mut record, Expect::Impossible), Err(Refused::Impossible { .. })) => {
                record.sampled_tokens = record.completion_tokens;
                self.clients.want(What::Settle(record, Expect::Settled));
                Ok(())
            }
            (What::Return(..), Ok(Applied::Returned { .. })) => Ok(()),
            (What::Witness(worker, epoch, _), Ok(Applied::Removed { removed })) => {
                if removed {
                    let dead = self.clients.dead.entry(worker).or_default();
                    *dead = (*dead).max(epoch);
                }
                Ok(())
            }
            (
                What::Change(_),
                Ok(Applied::Stands { .. } | Applied::Priced { .. } | Applied::Removed { .. })
                | Err(Refused::LimitBelowSpent { .. } | Refused::KeyRevoked { .. } | Refused::Unknown { .. }),
            ) => Ok(()),
            (What::Lease { .. }, Err(refused @ (Refused::Unknown { .. } | Refused::SliceOfOther { .. }))) => {
                violation(format!("a lease was refused: {refused}"))
            }
            (What::Lease { gateway, life, ask }, outcome) => {
                self.leased(gateway, life, &ask, &outcome);
                Ok(())
            }
            (What::Register(worker), Ok(Applied::Registered { epoch })) => {
                let known = self.clients.epochs.entry(worker.clone()).or_default();
                *known = (*known).max(epoch);
                let dead = self.clients.dead.entry(worker).or_default();
                *dead = (*dead).max(epoch - 1);
                Ok(())
            }
            (What::Remove(worker, epoch), Ok(Applied::Removed { .. })) => {
                // It is over now, whether this did it or not.
                let dead = self.clients.dead.entry(worker).or_default();
                *dead = (*dead).max(epoch);
                Ok(())
            }
            (What::Correct(correction), Ok(Applied::Corrected { sequence })) => {
                self.acknowledge(format!("correction {}", correction.correction_id), sequence)
            }
            // A request that was not charged has nothing to give back.
            (What::Correct(_), Err(Refused::BelowZero { .. } | Refused::Invalid(_))) => Ok(()),
            (What::Close, Ok(_) | Err(Refused::NothingToClose | Refused::NotNext { .. })) => Ok(()),
            (What::Seal(_), Ok(_) | Err(Refused::NotNext { .. } | Refused::BadSignature(_))) => Ok(()),
            (What::Tick, Ok(_)) => Ok(()),
            (what, outcome) => violation(format!("{what:?} was answered {outcome:?}")),
        }
    }

    fn acknowledge(&mut self, id: String, sequence: u64) -> Checked {
        let known = *self.clients.acked.entry(id.clone()).or_insert(sequence);
        if known == sequence {
            return Ok(());
        }
        violation(format!("{id} was answered row {known} and row {sequence}"))
    }

    fn settled(&mut self, record: UsageRecord, sequence: u64) -> Checked {
        self.acknowledge(format!("request {}", record.request_id), sequence)?;
        if self.clients.closing {
            return Ok(());
        }
        if self.random.chance(12) {
            // A gateway that never heard the answer.
            self.clients
                .want(What::Settle(Box::new(record.clone()), Expect::Row(sequence)));
        }
        if self.random.chance(6) {
            let mut other = record.clone();
            other.completion_tokens += 1;
            other.sampled_tokens += 1;
            self.clients.want(What::Settle(Box::new(other), Expect::Conflict));
        }
        if !record.idempotency_key_sha256.is_empty() {
            let same = self.random.chance(60);
            self.clients.requests += 1;
            let mut again = record.clone();
            again.request_id = format!("r{}", self.clients.requests);
            again.postings.clear();
            let expect = if same {
                Expect::Row(sequence)
            } else {
                again.request_sha256 = vec![9; 32].into();
                Expect::Conflict
            };
            let delivered = self.oracle.delivered.get(&record.request_id).cloned();
            self.oracle
                .delivered
                .extend(delivered.map(|delivered| (again.request_id.clone(), delivered)));
            self.clients.want(What::Settle(Box::new(again), expect));
        }
        if record.completion_tokens > 0 && self.random.chance(12) {
            self.clients.corrections += 1;
            let price = &self.clients.prices[&record.price_id];
            let correction = commands::correction(self.clients.corrections, &record, sequence, price);
            let twice = self.random.chance(50);
            self.clients.want(What::Correct(Box::new(correction.clone())));
            if twice {
                self.clients.want(What::Correct(Box::new(correction)));
            }
        }
        Ok(())
    }

    /// As a gateway's wallet does.
    fn leased(&mut self, gateway: usize, life: u64, ask: &LeaseAsk, outcome: &Outcome) {
        let gateway = &mut self.clients.gateways[gateway];
        if gateway.life != life {
            return;
        }
        let mut lease = Lease {
            budget_id: ask.budget_id.clone(),
            slice_id: ask.slice_id.clone(),
            granted_nano: 0,
            expires_unix_ms: 0,
            exhausted: true,
        };
        match outcome {
            Ok(Applied::Leased {
                open_nano,
                granted_nano,
                expires_unix_ms,
                ..
            }) => {
                lease.granted_nano = *granted_nano;
                lease.expires_unix_ms = *expires_unix_ms;
                lease.exhausted = *open_nano < ask.want_nano;
                gateway.purse.leased(&lease);
            }
            Err(Refused::BudgetExhausted { .. }) => gateway.purse.leased(&lease),
            _ => gateway.purse.ended(&ask.budget_id, &ask.slice_id),
        }
    }

    /// A read may be made at `index`: it must see all that was answered before it was asked.
    pub(super) fn read(&mut self, call: &Call, index: u64) -> Checked {
        if self.clients.ops.remove(&call.op).is_none() {
            return Ok(());
        }
        self.clients.reads += 1;
        let member = call.member;
        if index < call.known_index {
            return violation(format!(
                "member {member} read at {index}, and {} was answered before it was asked",
                call.known_index
            ));
        }
        let Some(life) = &self.members[&member].life else {
            return Ok(());
        };
        let Ok(state) = StateView::open(&life.store) else {
            return Ok(());
        };
        for (worker, dead) in &call.known_dead {
            if let Some(found) = view::worker(&state, worker)?
                && found.epoch <= *dead
            {
                return violation(format!(
                    "member {member} believes epoch {} of {worker}, which is over",
                    found.epoch
                ));
            }
        }
        Ok(())
    }
}
