//! Who asks the group for something: gateways with real purses and running requests, workers and their zombies, an
//! operator's corrections and seals, readers, and a follower of the ledger's feed. Everything is tried again, anywhere, until
//! it is answered.

use super::commands::{self, cost};
use super::oracle::{Checked, Delivered, violation};
use super::power::{Point, Random};
use super::world::{Flavour, World};
use crate::RaftStoreError;
use crate::runner::Input;
use crate::tables::StateView;
use baton_limits::{LeaseAsk, Purse, PurseConfig, Reservation};
use baton_proto::state::{Command, Correction, LedgerRow, UsageRecord};
use baton_state::{Applied, view};
use prost::Message as _;
use std::collections::BTreeMap;
use tokio::sync::oneshot;

/// Requests of a run.
const REQUESTS_MAX: u64 = 70;
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
        /// Of the slice, settled and known to be when it was asked: see `leased`.
        settled_nano: u64,
    },
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
}

pub(super) struct Gateway {
    pub(super) purse: Purse,
    pub(super) life: u64,
    pub(super) running: Vec<Running>,
    /// What was settled of each slice, as far as it was told.
    pub(super) settled: BTreeMap<String, u64>,
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
        settled: BTreeMap::new(),
    }
}

impl World {
    /// The clients' clock, of which the ledger knows. It runs faster than the members', so that slices expire within a run.
    pub(super) fn unix_ms(&self) -> u64 {
        commands::START + 20 * self.now_ms
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
        let now_ms = self.unix_ms();
        let closing = self.clients.closing;
        let restarts = self.random.chance(1) && !closing;
        let begins = self.random.chance(35) && !closing && self.clients.requests < REQUESTS_MAX;
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
        let mut ended = Vec::new();
        let virtual_ms = self.now_ms;
        gateway.running.retain_mut(|running| {
            let over = running.ends_ms <= virtual_ms || closing || cut.contains(&running.reservation.id);
            if over {
                ended.push((running.reservation.clone(), running.record.clone(), running.tokens));
            }
            !over
        });
        for (reservation, mut record, tokens) in ended {
            self.clients.gateways[at].purse.post(&reservation, cost(tokens));
            record.completion_tokens = tokens;
            record.sampled_tokens = tokens;
            let delivered = Delivered {
                tokens,
                nano: cost(tokens),
                budgets: reservation.slices.iter().map(|(budget, _)| budget.clone()).collect(),
            };
            self.oracle.delivered.insert(record.request_id.clone(), delivered);
            self.clients.want(What::Settle(Box::new(record), Expect::Settled));
        }
        if begins {
            self.begin_request(at);
        }
        let asks = self.clients.gateways[at].purse.asks(now_ms);
        for ask in asks {
            let gateway = &self.clients.gateways[at];
            let settled_nano = gateway.settled.get(&ask.slice_id).copied().unwrap_or(0);
            let life = gateway.life;
            self.clients.want(What::Lease {
                gateway: at,
                life,
                ask,
                settled_nano,
            });
        }
    }

    fn begin_request(&mut self, at: usize) {
        let now_ms = self.unix_ms();
        let most = self.random.range(1, 7) as u32;
        let tokens = self.random.range(0, u64::from(most) + 1) as u32;
        let budgets = match self.random.range(0, 4) {
            0 => vec!["b0".to_owned(), "b1".to_owned()],
            1 => vec!["b1".to_owned()],
            _ => vec!["b0".to_owned()],
        };
        let lasts_ms = match self.random.range(0, 6) {
            0 => self.random.range(2000, 7000),
            _ => self.random.range(20, 900),
        };
        let keyed = self.random.chance(15);
        let gateway = &mut self.clients.gateways[at];
        let Ok(reservation) = gateway.purse.reserve(&budgets, cost(most), now_ms) else {
            return;
        };
        self.clients.requests += 1;
        let number = self.clients.requests;
        let record = commands::record(number, &reservation, now_ms, keyed);
        gateway.running.push(Running {
            ends_ms: self.now_ms + lasts_ms,
            reservation,
            record,
            tokens,
        });
    }

    fn others_act(&mut self) {
        let worker = format!("w{}", self.random.range(0, 3));
        let seed = self.random.range(1, 3) as u8;
        let lease = self.random.chance(50);
        if self.flavour == Flavour::Leaders && self.random.chance(60) {
            self.clients.want(What::Read(true));
        }
        match self.random.range(0, 60) {
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
            if view::row(&self.oracle.tables, expected)?.as_ref() != Some(&row) {
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
        let unix_ms = self.unix_ms();
        let Some(op) = self.clients.ops.get_mut(&id) else {
            return;
        };
        op.tries += 1;
        op.next_try_ms = patience;
        let what = op.what.clone();
        let actor = format!("{id}.{}", op.tries);
        let state = self.members[&member]
            .life
            .as_ref()
            .map(|life| StateView::open(&life.store));
        let Some(Ok(state)) = state else { return };
        let (input, answer, command) = match &what {
            What::Read(lease) => {
                let (sender, receiver) = oneshot::channel();
                (Input::Read(*lease, sender), Answer::Read(receiver), Vec::new())
            }
            what => {
                let Some(kind) = commands::kind(what, &state, member, unix_ms) else {
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
