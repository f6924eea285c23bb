//! Who asks the group for something: gateways with real purses and running requests, workers and their zombies, an
//! operator's corrections and seals, readers, and a follower of the ledger's feed. Everything is tried again, anywhere, until
//! it is answered.

use super::books::MONTHS;
use super::commands::{self, cost};
use super::oracle::{Checked, Delivered, violation};
use super::power::{Point, Random};
use super::world::{Flavour, World};
use crate::RaftStoreError;
use crate::runner::Input;
use crate::tables::StateView;
use baton_limits::{LeaseAsk, Purse, PurseConfig, Reservation};
use baton_proto::state::{Command, Correction, LedgerRow, Price, UsageRecord, UsageStatus, command::Kind};
use baton_state::{Applied, view};
use prost::Message as _;
use std::collections::BTreeMap;
use tokio::sync::oneshot;

/// Requests of a run.
const REQUESTS_MAX: u64 = 70;
/// Clocks of gateways and members differ by so much of the ledger's time, which purses' margins cover.
const SKEW_MS_MAX: u64 = 3_000;
/// A caller waits so long for an answer.
const PATIENCE_MS: u64 = 1500;

/// What somebody wants.
#[derive(Debug, Clone)]
pub(super) enum What {
    Found(usize),
    Settle(Box<UsageRecord>, Expect),
    Lease {
        gateway: usize,
        life: u64,
        ask: LeaseAsk,
    },
    /// Budget and slice.
    Return(String, String),
    /// An operator's change.
    Change(Box<Kind>),
    /// A coordinator's vote: it has lost the worker's epoch, or heard from it again.
    Witness(String, u64, bool),
    Register(String),
    Remove(String, u64),
    Correct(Box<Correction>),
    Close,
    Seal(u8),
    Read(bool),
    Tick,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expect {
    /// It is settled, under whatever number.
    Settled,
    /// It is what this row is about.
    Row(u64),
    /// It is refused.
    Conflict,
    /// It is refused, because more was delivered than sampled; then it is told as it was.
    Impossible,
}

pub(super) struct Op {
    pub(super) what: What,
    pub(super) tries: u64,
    pub(super) next_try_ms: u64,
}

pub(super) enum Answer {
    Applied(oneshot::Receiver<Result<Applied, RaftStoreError>>),
    Read(oneshot::Receiver<Result<u64, RaftStoreError>>),
}

pub(super) struct Call {
    pub(super) op: u64,
    pub(super) member: u64,
    pub(super) command: Vec<u8>,
    pub(super) asked_ms: u64,
    pub(super) answer: Answer,
    /// What was answered to anybody before this was asked.
    pub(super) known_index: u64,
    pub(super) known_dead: BTreeMap<String, u64>,
}

pub(super) struct Running {
    ends_ms: u64,
    reservation: Reservation,
    record: UsageRecord,
    tokens: u32,
    price: Price,
}

pub(super) struct Gateway {
    pub(super) purse: Purse,
    pub(super) life: u64,
    pub(super) running: Vec<Running>,
    /// How far its clock is ahead of the ledger's slowest.
    skew_ms: u64,
}

pub(super) struct Clients {
    pub(super) ops: BTreeMap<u64, Op>,
    pub(super) next_op: u64,
    pub(super) calls: Vec<Call>,
    pub(super) gateways: Vec<Gateway>,
    pub(super) founded: usize,
    pub(super) requests: u64,
    /// Answered rows by request or correction.
    pub(super) acked: BTreeMap<String, u64>,
    /// Greatest index of a command that was answered.
    pub(super) known_index: u64,
    /// Greatest epoch of each worker that is known to be over.
    pub(super) dead: BTreeMap<String, u64>,
    pub(super) epochs: BTreeMap<String, u64>,
    pub(super) feed: Vec<LedgerRow>,
    pub(super) corrections: u64,
    /// Prices that requests have pinned, by id.
    pub(super) prices: BTreeMap<String, Price>,
    /// When the run starts, by the ledger's time: soon a day ends, and now and then a month.
    start_unix_ms: u64,
    pub(super) answers: u64,
    pub(super) reads: u64,
    /// Nothing new is begun.
    pub(super) closing: bool,
}

impl Clients {
    pub(super) fn new(random: &mut Random) -> Self {
        let gateways = (0..random.range(2, 4) as usize).map(gateway).collect();
        let mut clients = Self {
            ops: BTreeMap::new(),
            next_op: 0,
            calls: Vec::new(),
            gateways,
            founded: 0,
            requests: 0,
            acked: BTreeMap::new(),
            known_index: 0,
            dead: BTreeMap::new(),
            epochs: BTreeMap::new(),
            feed: Vec::new(),
            corrections: 0,
            prices: BTreeMap::new(),
            start_unix_ms: MONTHS[1] - 86_400_000 * random.range(0, 2) - random.range(20_000, 240_000),
            answers: 0,
            reads: 0,
            closing: false,
        };
        for at in 0..commands::FOUNDING {
            clients.want(What::Found(at));
        }
        clients
    }

    pub(super) fn want(&mut self, what: What) {
        self.next_op += 1;
        let op = Op {
            what,
            tries: 0,
            next_try_ms: 0,
        };
        self.ops.insert(self.next_op, op);
    }

    /// Nobody waits for anything any more.
    pub(super) fn idle(&self) -> bool {
        self.ops.is_empty() && self.gateways.iter().all(|gateway| gateway.running.is_empty())
    }

    /// Every record that was handed in is known to be settled.
    fn all_settled(&self) -> bool {
        !self.ops.values().any(|op| matches!(op.what, What::Settle(..)))
    }

    pub(super) fn open(&self) -> Vec<String> {
        self.ops
            .values()
            .map(|op| format!("{:?} tried {}", op.what, op.tries))
            .collect()
    }

    pub(super) fn forget_calls(&mut self, member: u64) {
        self.calls.retain(|call| call.member != member);
    }
}

fn gateway(at: usize) -> Gateway {
    Gateway {
        purse: Purse::new(format!("g{at}.0"), purse_config()),
        life: 0,
        running: Vec::new(),
        skew_ms: SKEW_MS_MAX * (at as u64 % 3) / 2,
    }
}

impl World {
    /// The clients' clock, of which the ledger knows. It runs faster than the members', so that slices expire within a run.
    pub(super) fn unix_ms(&self) -> u64 {
        self.clients.start_unix_ms + 20 * self.now_ms
    }

    /// The same by the clock of a member.
    fn unix_ms_of(&self, member: u64) -> u64 {
        self.unix_ms() + SKEW_MS_MAX * (member % 4) / 3
    }

    pub(super) fn clients_act(&mut self) -> Checked {
        if self.clients.founded == commands::FOUNDING {
            for at in 0..self.clients.gateways.len() {
                self.gateway_acts(at);
            }
            if !self.clients.closing {
                self.others_act();
            }
        }
        self.feed()?;
        let due: Vec<u64> = self
            .clients
            .ops
            .iter()
            .filter(|(_, op)| op.next_try_ms <= self.now_ms)
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            self.try_op(id);
        }
        Ok(())
    }

    fn gateway_acts(&mut self, at: usize) {
        let now_ms = self.unix_ms() + self.clients.gateways[at].skew_ms;
        let closing = self.clients.closing;
        let restarts = self.random.chance(1) && !closing;
        let begins = self.random.chance(42) && !closing && self.clients.requests < REQUESTS_MAX;
        let gives_back = self.random.chance(6);
        let gateway = &mut self.clients.gateways[at];
        if restarts {
            let life = gateway.life + 1;
            // What ran was never finished by anybody, and nobody was told of it.
            for running in std::mem::take(&mut gateway.running) {
                self.oracle.delivered.remove(&running.record.request_id);
            }
            *gateway = self::gateway(at);
            gateway.life = life;
            gateway.purse = Purse::new(format!("g{at}.{life}"), purse_config());
            self.log(|| format!("gateway {at} restarts"));
            return;
        }
        let cut = gateway.purse.cut(now_ms);
        let virtual_ms = self.now_ms;
        let over =
            |running: &mut Running| running.ends_ms <= virtual_ms || closing || cut.contains(&running.reservation.id);
        let ended: Vec<Running> = gateway.running.extract_if(.., over).collect();
        let stopped = cut;
        for running in ended {
            let was_cut = stopped.contains(&running.reservation.id);
            self.end_request(at, running, was_cut);
        }
        if gives_back && self.clients.gateways[at].running.is_empty() && self.clients.all_settled() {
            for (budget_id, slice_id) in self.clients.gateways[at].purse.give_back() {
                self.clients.want(What::Return(budget_id, slice_id));
            }
        }
        if begins {
            self.begin_request(at, now_ms);
        }
        let asks = self.clients.gateways[at].purse.asks(now_ms);
        for ask in asks {
            let life = self.clients.gateways[at].life;
            self.clients.want(What::Lease { gateway: at, life, ask });
        }
    }

    fn end_request(&mut self, at: usize, running: Running, was_cut: bool) {
        let Running {
            reservation,
            mut record,
            tokens,
            price,
            ..
        } = running;
        // Whoever hung up or was stopped before the first token pays nothing.
        let status = match self.random.range(0, 10) {
            _ if was_cut => UsageStatus::Cancelled,
            0 => UsageStatus::Cancelled,
            1 => UsageStatus::Failed,
            _ => UsageStatus::Completed,
        };
        let free = tokens == 0 && status != UsageStatus::Completed;
        let nano = if free {
            0
        } else {
            cost(&price, record.cached_tokens, tokens)
        };
        self.clients.gateways[at].purse.post(&reservation, nano);
        record.status = status.into();
        record.completion_tokens = tokens;
        // What was sampled and not delivered is nobody's.
        record.sampled_tokens = tokens + self.random.range(0, 3) as u32;
        let delivered = Delivered { tokens, nano };
        self.oracle.delivered.insert(record.request_id.clone(), delivered);
        let miscounted = tokens > 0 && self.random.chance(5);
        if miscounted {
            record.sampled_tokens = tokens - 1;
        }
        let expect = if miscounted {
            Expect::Impossible
        } else {
            Expect::Settled
        };
        self.clients.want(What::Settle(Box::new(record), expect));
    }

    fn begin_request(&mut self, at: usize, now_ms: u64) {
        let most = self.random.range(1, 7) as u32;
        let tokens = self.random.range(0, u64::from(most) + 1) as u32;
        let budgets: &[&str] = match self.random.range(0, 8) {
            0 | 1 => &["b0", "b1"],
            2 => &["b1"],
            3 | 4 => &["b2"],
            5 => &["b2", "b3"],
            _ => &["b0"],
        };
        let budgets: Vec<String> = budgets.iter().map(|id| (*id).to_owned()).collect();
        let lasts_ms = match self.random.range(0, 6) {
            0 => self.random.range(2000, 7000),
            _ => self.random.range(20, 900),
        };
        let keyed = self.random.chance(15);
        // The price as of now, as its member knows it.
        let up = self.up_members();
        let member = self.random.pick(&up).and_then(|id| self.members[&id].life.as_ref());
        let state = member.and_then(|life| StateView::open(&life.store).ok());
        let Some(Ok(Some(price))) = state.map(|state| view::price_at(&state, "m", "default", now_ms)) else {
            return;
        };
        let gateway = &mut self.clients.gateways[at];
        let Ok(reservation) = gateway.purse.reserve(&budgets, cost(&price, 0, most), now_ms) else {
            return;
        };
        self.clients.requests += 1;
        let number = self.clients.requests;
        let record = commands::record(number, &reservation, &price, now_ms, keyed);
        self.clients.prices.insert(price.id.clone(), price.clone());
        gateway.running.push(Running {
            ends_ms: self.now_ms + lasts_ms,
            reservation,
            record,
            tokens,
            price,
        });
    }

    fn others_act(&mut self) {
        let worker = format!("w{}", self.random.range(0, 3));
        let seed = self.random.range(1, 3) as u8;
        let lease = self.random.chance(50);
        if self.flavour == Flavour::Leaders && self.random.chance(60) {
            self.clients.want(What::Read(true));
        }
        match self.random.range(0, 66) {
            0 | 1 => self.clients.want(What::Register(worker)),
            2 | 3 => {
                // Some of these are about a life that is over.
                if let Some(epoch) = self.clients.epochs.get(&worker).copied() {
                    let zombie = self.random.chance(40);
                    let epoch = if zombie {
                        epoch.saturating_sub(self.random.range(1, 4))
                    } else {
                        epoch
                    };
                    self.clients.want(What::Remove(worker, epoch));
                }
            }
            4 => self.clients.want(What::Close),
            5 | 6 => self.clients.want(What::Seal(seed)),
            7..=22 => self.clients.want(What::Read(lease)),
            24..=27 => {
                if let Some(epoch) = self.clients.epochs.get(&worker).copied() {
                    let lost = self.random.chance(75);
                    let epoch = epoch.saturating_sub(u64::from(self.random.chance(30)));
                    self.clients.want(What::Witness(worker, epoch, lost));
                }
            }
            28..=31 => {
                let now_ms = self.unix_ms();
                let kind = commands::change(&mut self.random, now_ms);
                self.clients.want(What::Change(Box::new(kind)));
            }
            23 => self.clients.want(What::Tick),
            _ => {}
        }
    }

    /// The follower of the feed reads on, from any member.
    fn feed(&mut self) -> Checked {
        if !self.random.chance(20) {
            return Ok(());
        }
        let up = self.up_members();
        let Some(id) = self.random.pick(&up) else { return Ok(()) };
        let cursor = self.clients.feed.len() as u64;
        for row in self.rows_after(id, cursor).unwrap_or_default() {
            let expected = self.clients.feed.len() as u64 + 1;
            if row.sequence != expected {
                return violation(format!(
                    "the feed of member {id} goes on with {} after {}",
                    row.sequence,
                    expected - 1
                ));
            }
            if view::row(self.oracle.tables(), expected)?.as_ref() != Some(&row) {
                return violation(format!("the feed of member {id} has another row {expected}"));
            }
            self.clients.feed.push(row);
        }
        Ok(())
    }

    /// Asks some member.
    fn try_op(&mut self, id: u64) {
        let patience = self.now_ms + PATIENCE_MS;
        let up = self.up_members();
        let Some(member) = self.random.pick(&up) else { return };
        let leader = self.leader();
        // Most know who leads.
        let member = if self.random.chance(50) {
            leader.unwrap_or(member)
        } else {
            member
        };
        let reads = matches!(
            self.clients.ops.get(&id),
            Some(Op {
                what: What::Read(_),
                ..
            })
        );
        let leading = self.leading();
        // Readers stay with whoever still thinks that it leads.
        let member = match self.random.pick(&leading) {
            Some(leading) if reads && self.random.chance(60) => leading,
            _ => member,
        };
        let unix_ms = self.unix_ms_of(member);
        let Some(op) = self.clients.ops.get_mut(&id) else {
            return;
        };
        op.tries += 1;
        op.next_try_ms = patience;
        let what = op.what.clone();
        let actor = format!("{id}.{}", op.tries);
        let Some(life) = &self.members[&member].life else {
            return;
        };
        let Ok(state) = StateView::open(&life.store) else {
            return;
        };
        let voters = &life.runner.node.members().voters;
        let (input, answer, command) = match &what {
            What::Read(lease) => {
                let (sender, receiver) = oneshot::channel();
                (Input::Read(*lease, sender), Answer::Read(receiver), Vec::new())
            }
            what => {
                let Some(kind) = commands::kind(what, &state, member, voters, unix_ms) else {
                    self.clients.ops.remove(&id);
                    return;
                };
                let command = Command {
                    at_unix_ms: unix_ms,
                    actor,
                    kind: Some(kind),
                };
                let command = command.encode_to_vec();
                let (sender, receiver) = oneshot::channel();
                (
                    Input::Propose(command.clone(), sender),
                    Answer::Applied(receiver),
                    command,
                )
            }
        };
        self.clients.calls.push(Call {
            op: id,
            member,
            command,
            asked_ms: self.now_ms,
            answer,
            known_index: self.clients.known_index,
            known_dead: self.clients.dead.clone(),
        });
        if let Some(member) = self.members.get_mut(&member) {
            member.inbox.push(input);
        }
        self.wake(member);
    }

    /// Answers that a member's turn gave, each a point at which its power may go.
    pub(super) fn poll_answers(&mut self, member: u64) -> Checked {
        let now_ms = self.now_ms;
        for mut call in std::mem::take(&mut self.clients.calls) {
            if call.member != member {
                self.clients.calls.push(call);
                continue;
            }
            let alive = || self.members[&member].power.point(Point::Reply);
            match &mut call.answer {
                Answer::Applied(answer) => match answer.try_recv() {
                    Ok(answer) if alive() => self.applied(&call, answer)?,
                    Err(oneshot::error::TryRecvError::Empty) if now_ms < call.asked_ms + 4 * PATIENCE_MS => {
                        self.clients.calls.push(call);
                    }
                    _ => {}
                },
                Answer::Read(answer) => match answer.try_recv() {
                    Ok(Ok(index)) if alive() => self.read(&call, index)?,
                    Err(oneshot::error::TryRecvError::Empty) if now_ms < call.asked_ms + 4 * PATIENCE_MS => {
                        self.clients.calls.push(call);
                    }
                    _ => {}
                },
            }
        }
        Ok(())
    }
}

fn purse_config() -> PurseConfig {
    PurseConfig {
        lease_ms: 60_000,
        prolong_ms: 30_000,
        margin_ms: 4_000,
        ask_again_ms: 10_000,
        ahead: 2,
    }
}
