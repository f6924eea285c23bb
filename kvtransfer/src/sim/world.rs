//! The event loop of the simulation: virtual time, jobs and their ends, and the checks. The network is in `network`, the
//! leases in `lending`.

use super::BOUND;
use super::job::{BLOCK, BLOCKS, Job, Life, POISON, Reading, Wire, pattern};
use crate::lease::{LeaseEnd, LeaseOptions, LeaseTable, ReadEnd};
use crate::push::{Next, Outgoing};
use crate::push_state::PushLimits;
use crate::ranges::RangeSet;
use crate::stats::Counters;
use crate::storage::Memory;
use crate::window_state::Phase;
use crate::window_table::WindowTable;
use crate::wire::Integrity;
use crate::{AbortReason, PushError, Refusal, Region, TransferLimits, WindowError};
use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

const JOBS: usize = 5;
pub(super) const LANES: u16 = 3;
pub(super) const PAYLOAD: &[u8] = b"first token";
/// A lane that brings no answer for so long is given up by the sender; a silent one is noticed by the receiver then.
pub(super) const STALL: Duration = Duration::from_secs(2);
/// A window that no push ever names.
const LIFETIME: Duration = Duration::from_secs(15);
/// One side is over: how long until the other is, if it knew of it. Two silences, and the grace between them.
const SETTLE: Duration = Duration::from_secs(8);
pub(super) const TERM: Duration = Duration::from_millis(900);
const TICK: Duration = Duration::from_millis(50);

/// What happened, over all seeds.
#[derive(Debug, Default, Clone)]
pub(super) struct Tally {
    pub(super) jobs: u64,
    pub(super) completed: u64,
    pub(super) lanes_replaced: u64,
    /// Jobs completed although a lane of theirs broke.
    pub(super) rescued: u64,
    pub(super) late_bytes_refused: u64,
    pub(super) leases_expired: u64,
    pub(super) damaged: u64,
    pub(super) restarts: u64,
}

impl Tally {
    pub(super) fn add(&mut self, other: &Self) {
        self.jobs += other.jobs;
        self.completed += other.completed;
        self.lanes_replaced += other.lanes_replaced;
        self.rescued += other.rescued;
        self.late_bytes_refused += other.late_bytes_refused;
        self.leases_expired += other.leases_expired;
        self.damaged += other.damaged;
        self.restarts += other.restarts;
    }
}

#[derive(Debug)]
pub(super) enum Event {
    Start,
    Compute(usize),
    /// A slot gets its (next) lane.
    Open(usize, u16),
    Send(usize),
    Deliver(usize),
    Answer(usize),
    /// The sender's end sees the lane break.
    SenderBreaks(usize, PushError),
    /// The receiver's end does; an abort if there is a reason.
    ReceiverBreaks(usize, Option<AbortReason>),
    /// The sender looks whether the lane stands still since.
    Stall(usize, u64),
    /// A lane's bytes come again, on a stream of their own.
    Replay(usize),
    Cut(usize, Cut),
    Close(usize),
    Abort(usize),
    Restart,
    /// The reader asks, or asks again.
    Ask(usize, u32),
    /// The request reaches the owner.
    Asked(usize),
    Beat(usize),
    /// A heartbeat reaches the owner; its answer the reader.
    Beaten(usize),
    Answered(usize, Result<(), Refusal>),
    /// The reader's release reaches the owner.
    Release(usize),
    Revoke(usize),
    /// The lane's task at the receiver hears that the window was given up.
    Tell(usize),
    Tick,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Cut {
    /// Both ends are told, at different times.
    Loud,
    /// Only the sender is; the receiver still gets what is on the way.
    HalfOpen,
    /// Nobody is, and nothing gets through.
    Silent,
}

pub(super) struct World {
    pub(super) rng: SmallRng,
    pub(super) integrity: Integrity,
    pub(super) now: Instant,
    pub(super) events: BTreeMap<(Instant, u64), Event>,
    pub(super) scheduled: u64,
    pub(super) counters: Arc<Counters>,
    pub(super) lives: Vec<Life>,
    pub(super) jobs: Vec<Job>,
    pub(super) wires: Vec<Wire>,
    /// Which job's blocks they are.
    pub(super) owner: [Option<usize>; BLOCKS],
    pub(super) leases: LeaseTable,
    pub(super) tally: Tally,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut world = Self {
            integrity: Integrity::of(rng.random_bool(0.6)),
            rng,
            now: Instant::now(),
            events: BTreeMap::new(),
            scheduled: 0,
            counters: Arc::default(),
            lives: Vec::new(),
            jobs: Vec::new(),
            wires: Vec::new(),
            owner: [None; BLOCKS],
            leases: LeaseTable::default(),
            tally: Tally::default(),
        };
        world.begin_life();
        for _ in 0..JOBS {
            let at = world.rng.random_range(0..1500);
            world.after(at, Event::Start);
        }
        if world.rng.random_bool(0.15) {
            let at = world.rng.random_range(0..3000);
            world.after(at, Event::Restart);
        }
        world.after(0, Event::Tick);
        world
    }

    /// Runs to the end and checks that nothing is left.
    pub(super) fn run(&mut self) {
        while let Some(((at, _), event)) = self.events.pop_first() {
            self.now = at;
            self.step(event);
            self.check();
        }
        for (index, job) in self.jobs.iter().enumerate() {
            assert!(job.settled(), "job {index} never settled");
        }
        assert_eq!(self.leases.len(), 0, "a lease is left");
        let stats = self.counters.snapshot();
        assert_eq!((stats.windows_open, stats.pushes_open), (0, 0), "something is held");
        assert!(self.owner.iter().all(Option::is_none), "a block is held");
    }

    pub(super) fn after(&mut self, ms: u64, event: Event) {
        self.scheduled += 1;
        let at = self.now + Duration::from_millis(ms);
        self.events.insert((at, self.scheduled), event);
    }

    pub(super) fn soon(&mut self, ms_max: u64, event: Event) {
        let ms = self.rng.random_range(0..=ms_max);
        self.after(ms, event);
    }

    fn begin_life(&mut self) {
        let region = Region::new(BLOCK * BLOCKS).unwrap();
        let table = Arc::new(WindowTable::new(&TransferLimits::default(), self.counters.clone()));
        self.lives.push(Life { table, region });
    }

    fn limits() -> PushLimits {
        let limits = TransferLimits::default();
        PushLimits {
            descriptors_max: 1024,
            payload_max: 1024,
            retries_max: limits.lane_retries_max,
            backoff: limits.lane_backoff,
            grace: limits.lane_grace,
        }
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Start => self.start(),
            Event::Compute(job) => self.compute(job),
            Event::Open(job, slot) => self.open(job, slot),
            Event::Send(wire) => self.send(wire),
            Event::Deliver(wire) => self.deliver(wire),
            Event::Answer(wire) => self.answer(wire),
            Event::SenderBreaks(wire, error) => self.sender_breaks(wire, error),
            Event::ReceiverBreaks(wire, reason) => self.receiver_breaks(wire, reason),
            Event::Stall(wire, progress) => self.stall(wire, progress),
            Event::Replay(wire) => self.replay(wire),
            Event::Cut(wire, how) => self.cut(wire, how),
            Event::Close(job) => self.close(job),
            Event::Abort(job) => self.fail(job, PushError::Aborted(AbortReason::Cancelled)),
            Event::Restart => self.restart(),
            Event::Ask(job, attempt) => self.ask(job, attempt),
            Event::Asked(job) => self.asked(job),
            Event::Beat(job) => self.beat(job),
            Event::Beaten(job) => self.beaten(job),
            Event::Answered(job, answer) => self.answered(job, answer),
            Event::Release(job) => {
                let ended = self.leases.end(job as u64, LeaseEnd::Released);
                self.ended(ended);
            }
            Event::Revoke(job) => {
                let ended = self.leases.end(job as u64, LeaseEnd::Revoked);
                self.ended(ended);
            }
            Event::Tell(wire) => self.tell(wire),
            Event::Tick => self.tick(),
        }
    }

    /// Takes free blocks and opens a window over them; a push begins, or a read is asked for.
    fn start(&mut self) {
        let mut free: Vec<usize> = (0..BLOCKS).filter(|&block| self.owner[block].is_none()).collect();
        if free.len() < 4 {
            return self.soon(300, Event::Start);
        }
        free.shuffle(&mut self.rng);
        let count = self.rng.random_range(2..=free.len().min(12));
        let mut blocks = free[..count].to_vec();
        let index = self.jobs.len();
        let life = self.lives.len() - 1;
        let Life { table, region } = &self.lives[life];
        let range = |block: &usize| block * BLOCK..(block + 1) * BLOCK;
        let ranges = RangeSet::new(blocks.iter().map(range).collect(), region.len(), BLOCKS).unwrap();
        let id = index as u64 + 1;
        let cell = table
            .open(&Memory::from(region), ranges.clone(), u64::MAX, || Ok(id))
            .unwrap();
        for &block in &blocks {
            self.owner[block] = Some(index);
        }
        // The sender's blocks lie elsewhere: reversed.
        let source = Region::new(BLOCK * BLOCKS).unwrap();
        for &block in &blocks {
            let bytes: Vec<u8> = range(&block).map(|at| pattern(index, at)).collect();
            assert!(source.copy_in(local(block), &bytes));
        }
        blocks.shuffle(&mut self.rng);
        let read = self.rng.random_bool(0.4);
        let mut job = Job {
            started: self.now,
            life,
            cell,
            push: None,
            source,
            to_write: blocks.clone(),
            blocks,
            reading: None,
            over: false,
            completed: false,
            poisoned: false,
            half_since: None,
        };
        self.tally.jobs += 1;
        if read {
            job.reading = Some(Reading {
                wanted: true,
                begun: false,
                ended: false,
                progress: 0,
                heard: self.now,
            });
            let all = RangeSet::new(vec![0..BLOCK * BLOCKS; 1], BLOCK * BLOCKS, 1).unwrap();
            let options = LeaseOptions {
                term: TERM,
                reads_at_once_max: 1,
                reads_max: Some(1),
            };
            assert!(self.leases.grant(index as u64, all, options, self.now));
            self.jobs.push(job);
            self.soon(300, Event::Ask(index, 0));
            if self.rng.random_bool(0.15) {
                self.soon(1500, Event::Revoke(index));
            }
        } else {
            self.jobs.push(job);
            self.begin_push(index);
            self.soon(20, Event::Compute(index));
        }
        if self.rng.random_bool(0.2) {
            self.soon(2000, Event::Close(index));
        }
        if !read && self.rng.random_bool(0.15) {
            self.soon(2000, Event::Abort(index));
        }
    }

    pub(super) fn begin_push(&mut self, index: usize) {
        let job = &mut self.jobs[index];
        let id = index as u64 + 1;
        let memory = Memory::from(&job.source);
        // The window's id twice: a push's own id is another space.
        let push = Outgoing::new(id, id + 1000, memory, Self::limits(), self.counters.clone());
        job.push = Some(Arc::new(push));
        for slot in 0..self.rng.random_range(1..=LANES) {
            self.soon(40, Event::Open(index, slot));
        }
    }

    /// Compute writes a few blocks, and in the end finishes.
    fn compute(&mut self, index: usize) {
        let count = self.rng.random_range(1..4);
        let job = &mut self.jobs[index];
        let Some(push) = job.push.clone() else { return };
        let from = job.to_write.len().saturating_sub(count);
        for block in job.to_write.split_off(from) {
            if push
                .write(local(block)..local(block) + BLOCK, block * BLOCK, self.now)
                .is_err()
            {
                return;
            }
        }
        if job.to_write.is_empty() {
            if push.finish(Bytes::from_static(PAYLOAD), false, self.now).is_err() {
                return;
            }
        } else {
            self.soon(120, Event::Compute(index));
        }
        self.wake(index);
    }

    /// The owner of the window gives it up; a reader also gives the lease back.
    pub(super) fn close(&mut self, index: usize) {
        let life = self.jobs[index].life;
        self.lives[life].table.close(&self.jobs[index].cell);
        self.window_over(index);
        if let Some(reading) = &mut self.jobs[index].reading {
            reading.wanted = false;
            // The word may get lost; then the term ends the lease.
            if self.rng.random_bool(0.7) {
                self.soon(60, Event::Release(index));
            }
        }
    }

    /// The receiving process dies, and another takes its place with other memory.
    fn restart(&mut self) {
        self.tally.restarts += 1;
        let life = self.lives.len() - 1;
        for index in 0..self.wires.len() {
            // A dead process does nothing any more.
            drop(self.wires[index].incoming.take());
            let silent = self.rng.random_bool(0.5);
            self.wires[index].silent = true;
            if !silent {
                let lost = PushError::PeerLost {
                    peer: ([127, 0, 0, 1], 1).into(),
                    detail: "reset by the peer's new life".into(),
                };
                self.soon(200, Event::SenderBreaks(index, lost));
            }
        }
        for index in 0..self.jobs.len() {
            if self.jobs[index].life == life {
                self.lives[life].table.close(&self.jobs[index].cell);
                self.window_over(index);
                if let Some(reading) = &mut self.jobs[index].reading {
                    reading.wanted = false;
                }
            }
        }
        self.begin_life();
    }

    /// The sender gives the push up, and says so on every lane.
    pub(super) fn fail(&mut self, index: usize, error: PushError) {
        let Some(push) = self.jobs[index].push.clone() else {
            return;
        };
        if push.result().is_some() {
            return;
        }
        let reason = error.abort_reason();
        push.fail(error);
        for wire in 0..self.wires.len() {
            if self.wires[wire].job != index {
                continue;
            }
            if let Some(mut lane) = self.wires[wire].lane.take() {
                assert!(
                    matches!(lane.next(&mut Vec::new()), Next::Over),
                    "a lane reads after the end"
                );
                // A silent lane carries no word; it times out.
                let (reason, ms) = if self.wires[wire].silent {
                    (None, STALL.as_millis() as u64)
                } else {
                    (Some(reason), self.rng.random_range(0..60))
                };
                self.after(ms, Event::ReceiverBreaks(wire, reason));
            }
        }
        self.push_settled(index);
    }

    pub(super) fn poison(&mut self, index: usize) {
        let job = &mut self.jobs[index];
        job.poisoned = true;
        assert!(job.source.copy_in(0, &[POISON; BLOCK * BLOCKS]));
    }

    /// What the sender's shell does once a push is settled: the blocks are its own again.
    pub(super) fn push_settled(&mut self, index: usize) {
        let job = &self.jobs[index];
        let Some(result) = job.push.as_ref().and_then(|push| push.result()) else {
            return;
        };
        if job.reading.as_ref().is_some_and(|reading| !reading.ended) {
            let how = match &result {
                Ok(_) => ReadEnd::Done,
                Err(PushError::PeerLost { .. } | PushError::Stalled { .. }) => ReadEnd::ReaderLost,
                Err(_) => ReadEnd::Failed,
            };
            let ended = self.leases.end_read(index as u64, index as u64 + 1, how);
            self.ended(ended);
        }
        if self.jobs[index].reading.is_none() && !self.jobs[index].poisoned {
            self.poison(index);
        }
        for wire in 0..self.wires.len() {
            if self.wires[wire].job == index && self.wires[wire].lane.take().is_some() {
                let reason = result.as_ref().err().map(PushError::abort_reason);
                self.soon(60, Event::ReceiverBreaks(wire, reason));
            }
        }
    }

    fn tick(&mut self) {
        for index in 0..self.jobs.len() {
            let (now, job) = (self.now, &mut self.jobs[index]);
            job.cell.expire(now);
            if now >= job.started + LIFETIME {
                job.cell.fail(WindowError::Expired { lifetime: LIFETIME });
            }
            // Acknowledged bytes are a sign of life of a reader.
            if let (Some(reading), Some(push)) = (&mut job.reading, &job.push)
                && std::mem::replace(&mut reading.progress, push.progress()) < push.progress()
            {
                let _ = self.leases.beat(index as u64, None, now);
            }
            self.push_settled(index);
        }
        for ended in self.leases.expire(self.now) {
            self.ended(Some(ended));
        }
        if self.jobs.len() < JOBS || self.jobs.iter().any(|job| !job.settled()) {
            self.after(TICK.as_millis() as u64, Event::Tick);
        }
    }

    pub(super) fn memory(&self) -> Vec<u8> {
        let mut all = vec![0; BLOCK * BLOCKS];
        assert!(self.lives[self.lives.len() - 1].region.copy_out(0, &mut all));
        all
    }

    /// After every event.
    fn check(&mut self) {
        for index in 0..self.jobs.len() {
            let job = &self.jobs[index];
            if !job.over && !job.cell_live() {
                self.window_over(index);
            }
            let job = &self.jobs[index];
            let result = job.push.as_ref().and_then(|push| push.result());
            match result {
                Some(Ok(_)) => assert!(job.completed, "job {index} believes in a push that was not completed"),
                // A lane's end by damage is no denial: the acknowledgement got lost as often as it may be repeated.
                Some(Err(PushError::Refused(refusal)))
                    if job.completed && job.life + 1 == self.lives.len() && !refusal.lane_only() =>
                {
                    panic!("job {index} was completed and then denied: {refusal}");
                }
                _ => {}
            }
            let half = match (&result, job.over) {
                // A push that never named its window leaves it to its lifetime.
                (Some(Err(_)), false) => job.cell.phase() != Phase::Open,
                (None, true) => job.push.is_some(),
                _ => false,
            };
            let since = half.then(|| job.half_since.unwrap_or(self.now));
            assert!(
                since.is_none_or(|since| self.now < since + SETTLE),
                "only one side of job {index} is over: push {result:?}, window {:?}",
                job.cell.phase()
            );
            self.jobs[index].half_since = since;
            let job = &self.jobs[index];
            assert!(
                job.settled() || self.now < job.started + BOUND,
                "job {index} is not settled: push {:?}, window {:?}",
                result,
                job.cell.phase()
            );
        }
    }

    /// The window is over: what it holds is checked if it is complete, its lanes are told, and its blocks are free.
    fn window_over(&mut self, index: usize) {
        if std::mem::replace(&mut self.jobs[index].over, true) {
            return;
        }
        let job = &mut self.jobs[index];
        if let Phase::Completed(payload) = job.cell.phase() {
            assert_eq!(payload, PAYLOAD);
            let mut all = vec![0; BLOCK * BLOCKS];
            assert!(self.lives[job.life].region.copy_out(0, &mut all));
            for block in &job.blocks {
                let start = block * BLOCK;
                for (at, byte) in (start..).zip(&all[start..start + BLOCK]) {
                    assert_eq!(*byte, pattern(index, at), "byte {at} of job {index} is wrong");
                }
            }
            job.completed = true;
            self.tally.completed += 1;
            let broke = self.wires.iter().any(|wire| wire.job == index && wire.lane.is_none());
            self.tally.rescued += u64::from(broke);
        }
        self.lives[job.life].table.close(&job.cell);
        for owner in &mut self.owner {
            if *owner == Some(index) {
                *owner = None;
            }
        }
        for wire in 0..self.wires.len() {
            if self.wires[wire].job == index && self.wires[wire].incoming.is_some() {
                // The lane's task may be slow to hear of it, and more bytes come first.
                self.soon(100, Event::Tell(wire));
            }
        }
    }
}

impl Job {
    fn cell_live(&self) -> bool {
        matches!(self.cell.phase(), Phase::Open | Phase::Receiving)
    }
}

/// Where the sender keeps what goes to the receiver's `block`.
pub(super) fn local(block: usize) -> usize {
    (BLOCKS - 1 - block) * BLOCK
}
