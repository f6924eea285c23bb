//! The router as its owner sees it: seats for workers, their events, recent placements, and the choice.
//!
//! A *seat* is a worker's registration. It is a small number, reused when its worker has gone, and a generation, which
//! makes what was kept of an earlier holder worthless. Not here: ids, addresses, connections.

use crate::calibration::Overheads;
use crate::choose::{Choice, choose, place_at};
use crate::cost::{Ask, Candidate, Policy, Prefix};
use crate::feed::{BlockUpdate, Feed, Verdict};
use crate::index::{Index, IndexStats, Matches};
use crate::recent::Recent;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Workers whose lower tiers are counted exactly per request: the best ones. For the others a block in a lower tier
/// passes for one in the arena, which flatters a worker that is behind already.
const TIERS_COUNTED_MAX: usize = 8;
/// How long a placement is remembered beyond twice its predicted time to first token, in milliseconds: events are told
/// every few tens of milliseconds.
const RECENT_MS: u64 = 2000;
/// Longest memory of a placement, in milliseconds.
const RECENT_MS_MAX: u64 = 60_000;

/// A registration of a worker with this router.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Seat {
    number: u32,
    generation: u32,
}

#[derive(Default)]
struct Holder {
    generation: u32,
    taken: bool,
    feed: Feed,
}

/// See the module.
pub struct Router {
    policy: Policy,
    index: Index,
    seats: Vec<Holder>,
    free: Vec<u32>,
    /// Seat number by slot.
    by_slot: Vec<u32>,
    recent: Recent<Seat>,
    overheads: Overheads,
    resyncs: u64,
    /// Choices made, for modes that take turns.
    turn: AtomicU64,
}

/// Figures for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RouterStats {
    /// Of the index.
    pub index: IndexStats,
    /// Workers that have joined.
    pub workers: usize,
    /// Of these, workers whose content is not known: they count as cold.
    pub cold: usize,
    /// Resyncs asked for.
    pub resyncs: u64,
    /// Entries of recent placements.
    pub recent: usize,
}

impl Router {
    /// A router that knows of nobody.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            index: Index::new(),
            seats: Vec::new(),
            free: Vec::new(),
            by_slot: Vec::new(),
            recent: Recent::new(),
            overheads: Overheads::default(),
            resyncs: 0,
            turn: AtomicU64::new(0),
        }
    }

    /// How it weighs.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// A worker has registered. It is cold until it has told what it holds.
    pub fn join(&mut self) -> Seat {
        let number = self.free.pop().unwrap_or_else(|| {
            self.seats.push(Holder::default());
            (self.seats.len() - 1) as u32
        });
        let holder = &mut self.seats[number as usize];
        holder.generation = holder.generation.wrapping_add(1);
        holder.taken = true;
        Seat {
            number,
            generation: holder.generation,
        }
    }

    /// The registration is over. What the worker holds is found no more; the memory comes back with the sweep.
    pub fn leave(&mut self, seat: Seat) {
        let Self { seats, index, free, .. } = self;
        if let Some(holder) = holder(seats, seat) {
            holder.feed.end(index);
            holder.feed = Feed::default();
            holder.taken = false;
            free.push(seat.number);
        }
    }

    /// Takes in a message of block events. Times are milliseconds on any one clock.
    pub fn apply<'n, S>(&mut self, seat: Seat, update: BlockUpdate<'_, S>, now_ms: u64) -> Verdict
    where
        S: IntoIterator<Item = &'n [u64]>,
    {
        let Self { seats, index, .. } = self;
        let Some(holder) = holder(seats, seat) else {
            return Verdict::Ignored;
        };
        let verdict = holder.feed.apply(index, update, now_ms);
        if let Some(slot) = holder.feed.slot() {
            let slot = usize::from(slot.0);
            if self.by_slot.len() <= slot {
                self.by_slot.resize(slot + 1, u32::MAX);
            }
            self.by_slot[slot] = seat.number;
        }
        self.resyncs += u64::from(verdict == Verdict::Resync);
        verdict
    }

    /// Gives a little of what departed workers held back: about 0.1 ms. True while there is more; call it again soon.
    pub fn sweep(&mut self) -> bool {
        self.index.sweep()
    }

    /// What each worker has of a prompt, given the names of its full blocks: by its events, or because it was sent there a
    /// moment ago.
    pub fn look_up(&self, names: &[u64], now_ms: u64, prefixes: &mut Prefixes) {
        let Prefixes { by_seat, matches } = prefixes;
        by_seat.clear();
        by_seat.extend(self.seats.iter().map(|holder| (holder.generation, Prefix::default())));
        self.index.match_chain(names, matches);
        // Deepest last, so that the best ones get their tiers counted.
        let exact_from = matches.hits().len().saturating_sub(TIERS_COUNTED_MAX);
        for (at, &(slot, blocks)) in matches.hits().iter().enumerate() {
            let lower = match at >= exact_from {
                true => self.index.lower_tiers(matches, slot),
                false => Default::default(),
            };
            let seat = self.by_slot.get(usize::from(slot.0));
            if let Some((_, prefix)) = seat.and_then(|seat| by_seat.get_mut(*seat as usize)) {
                *prefix = Prefix {
                    blocks,
                    lower,
                    recent_blocks: 0,
                };
            }
        }
        self.recent.look_up(names, now_ms, |seat, blocks| {
            if let Some((generation, prefix)) = by_seat.get_mut(seat.number as usize)
                && *generation == seat.generation
                && blocks > prefix.blocks
            {
                prefix.recent_blocks += blocks - prefix.blocks;
                prefix.blocks = blocks;
            }
        });
    }

    /// Chooses among candidates, whose `prefix` is from [`look_up`](Self::look_up).
    pub fn choose(&self, candidates: &[Candidate<'_>], ask: &Ask) -> Choice {
        self.choose_in_turn(candidates, ask, self.turn.fetch_add(1, Ordering::Relaxed))
    }

    fn choose_in_turn(&self, candidates: &[Candidate<'_>], ask: &Ask, turn: u64) -> Choice {
        match self.policy.mode.pick(candidates, turn) {
            Some(decode) => place_at(candidates, decode, ask, &self.policy, &self.overheads),
            None => choose(candidates, ask, &self.policy, &self.overheads),
        }
    }

    /// The time to first token that the best placement would have; `None` if there is none.
    pub fn predicted_ttft(&self, candidates: &[Candidate<'_>], ask: &Ask) -> Option<Duration> {
        match self.choose_in_turn(candidates, ask, self.turn.load(Ordering::Relaxed)) {
            Choice::Place { estimate, .. } => Duration::try_from_secs_f64(estimate.ttft_s).ok(),
            Choice::Full | Choice::Nobody => None,
        }
    }

    /// A prompt was sent to the worker, which will have it cached soon. After a hand-over, tell it of both workers.
    pub fn placed(&mut self, seat: Seat, names: &[u64], ttft_s: f64, now_ms: u64) {
        // A float beyond the range saturates.
        let keep_ms = (RECENT_MS + (2000.0 * ttft_s) as u64).min(RECENT_MS_MAX);
        self.recent.placed(seat, names, now_ms, now_ms.saturating_add(keep_ms));
    }

    /// The first token of a request came `measured_s` after the choice, whose estimate had said
    /// [`modelled_s`](crate::Estimate::modelled_s).
    pub fn first_token(&mut self, remote: bool, modelled_s: f64, measured_s: f64) {
        self.overheads.observe(remote, modelled_s, measured_s);
    }

    /// Whether the worker's content is known.
    pub fn is_synchronised(&self, seat: Seat) -> bool {
        let holder = self.seats.get(seat.number as usize);
        holder
            .is_some_and(|holder| holder.taken && holder.generation == seat.generation && holder.feed.slot().is_some())
    }

    /// Figures for metrics. O(workers + parts of the table): for scrapes, not for requests.
    pub fn stats(&self) -> RouterStats {
        let taken = self.seats.iter().filter(|holder| holder.taken);
        let cold = taken.clone().filter(|holder| holder.feed.slot().is_none()).count();
        RouterStats {
            index: self.index.stats(),
            workers: taken.count(),
            cold,
            resyncs: self.resyncs,
            recent: self.recent.len(),
        }
    }
}

fn holder(seats: &mut [Holder], seat: Seat) -> Option<&mut Holder> {
    seats
        .get_mut(seat.number as usize)
        .filter(|holder| holder.taken && holder.generation == seat.generation)
}

/// What each worker has of one prompt; made once and used again, looking up allocates nothing.
#[derive(Debug, Default)]
pub struct Prefixes {
    by_seat: Vec<(u32, Prefix)>,
    matches: Matches,
}

impl Prefixes {
    /// What the worker has.
    pub fn of(&self, seat: Seat) -> Prefix {
        match self.by_seat.get(seat.number as usize) {
            Some((generation, prefix)) if *generation == seat.generation => *prefix,
            _ => Prefix::default(),
        }
    }
}
