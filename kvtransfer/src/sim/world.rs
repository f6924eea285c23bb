//! The event loop of the simulation: virtual time, the network, and what the shells around the cores would do.

use super::BOUND;
use super::job::{BLOCK, BLOCKS, Job, Life, POISON, Reading, Wire, pattern};
use crate::incoming::Incoming;
use crate::lease::{Ended, LeaseEnd, LeaseOptions, LeaseTable, ReadEnd};
use crate::push::{Next, Outgoing};
use crate::push_state::PushLimits;
use crate::ranges::{Descriptor, RangeSet};
use crate::stats::Counters;
use crate::storage::Memory;
use crate::window_state::Phase;
use crate::window_table::WindowTable;
use crate::wire::{Integrity, Reply, ReplyDecoder};
use crate::{AbortReason, PushError, Refusal, Region, TransferLimits, WindowError};
use bytes::{Bytes, BytesMut};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

const JOBS: usize = 5;
const LANES: u16 = 3;
const PAYLOAD: &[u8] = b"first token";
/// A lane that brings no answer for so long is given up by the sender; a silent one is noticed by the receiver then.
const STALL: Duration = Duration::from_secs(2);
/// A window that no push ever names.
const LIFETIME: Duration = Duration::from_secs(15);
/// One side is over: how long until the other is, if it knew of it. Two silences, and the grace between them.
const SETTLE: Duration = Duration::from_secs(8);
const TERM: Duration = Duration::from_millis(900);
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
enum Event {
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
enum Cut {
    /// Both ends are told, at different times.
    Loud,
    /// Only the sender is; the receiver still gets what is on the way.
    HalfOpen,
    /// Nobody is, and nothing gets through.
    Silent,
}

pub(super) struct World {
    rng: SmallRng,
    integrity: Integrity,
    now: Instant,
    events: BTreeMap<(Instant, u64), Event>,
    scheduled: u64,
    counters: Arc<Counters>,
    lives: Vec<Life>,
    jobs: Vec<Job>,
    wires: Vec<Wire>,
    /// Which job's blocks they are.
    owner: [Option<usize>; BLOCKS],
    leases: LeaseTable,
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

    fn after(&mut self, ms: u64, event: Event) {
        self.scheduled += 1;
        let at = self.now + Duration::from_millis(ms);
        self.events.insert((at, self.scheduled), event);
    }

    fn soon(&mut self, ms_max: u64, event: Event) {
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

    fn begin_push(&mut self, index: usize) {
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

    fn wake(&mut self, job: usize) {
        for wire in 0..self.wires.len() {
            if self.wires[wire].job == job && self.wires[wire].lane.is_some() && !self.wires[wire].scheduled {
                self.wires[wire].scheduled = true;
                self.soon(5, Event::Send(wire));
            }
        }
    }

    fn open(&mut self, job: usize, slot: u16) {
        let Some(push) = self.jobs[job].push.clone() else {
            return;
        };
        let Some(mut lane) = push.lane(slot, self.integrity) else {
            return;
        };
        if lane.again() {
            self.tally.lanes_replaced += 1;
        }
        let opening = lane.opening();
        let Life { table, .. } = &self.lives[self.lives.len() - 1];
        let incoming = Incoming::with_integrity(table.clone(), "sim".into(), self.integrity);
        let index = self.wires.len();
        self.wires.push(Wire {
            job,
            slot,
            replies: lane.replies(),
            lane: Some(lane),
            decoder: ReplyDecoder::new(self.integrity),
            incoming: Some(incoming),
            forward: opening.iter().copied().collect(),
            backward: VecDeque::new(),
            sent: opening.to_vec(),
            silent: false,
            latency_ms: self.rng.random_range(1..60),
            scheduled: true,
        });
        self.travel(index);
        self.soon(5, Event::Send(index));
        self.after(STALL.as_millis() as u64, Event::Stall(index, push.progress()));
        if self.rng.random_bool(0.3) {
            let how = match self.rng.random_range(0..3) {
                0 => Cut::Loud,
                1 => Cut::HalfOpen,
                _ => Cut::Silent,
            };
            self.soon(700, Event::Cut(index, how));
        }
        if self.rng.random_bool(0.15) {
            self.soon(4000, Event::Replay(index));
        }
    }

    /// Schedules the arrival of what was sent.
    fn travel(&mut self, wire: usize) {
        let ms = self.wires[wire].latency_ms;
        let jitter = self.rng.random_range(0..=ms);
        self.after(ms + jitter, Event::Deliver(wire));
    }

    fn send(&mut self, index: usize) {
        let wire = &mut self.wires[index];
        wire.scheduled = false;
        let Some(lane) = &mut wire.lane else { return };
        match lane.next(&mut Vec::new()) {
            Next::Send(bytes) => {
                wire.forward.extend(&bytes);
                wire.sent.extend(&bytes);
                wire.scheduled = true;
                self.travel(index);
                self.soon(10, Event::Send(index));
            }
            Next::Last(bytes) => {
                wire.forward.extend(&bytes);
                wire.sent.extend(&bytes);
                self.travel(index);
            }
            Next::Wait | Next::Over => {}
        }
    }

    fn deliver(&mut self, index: usize) {
        let wire = &mut self.wires[index];
        if wire.silent || wire.forward.is_empty() {
            return;
        }
        let count = if self.rng.random_bool(0.5) {
            wire.forward.len()
        } else {
            self.rng.random_range(1..=wire.forward.len())
        };
        let mut part: Vec<u8> = wire.forward.drain(..count).collect();
        let rest = !wire.forward.is_empty();
        if self.integrity == Integrity::Checksum && self.rng.random_bool(0.02) {
            let at = self.rng.random_range(0..part.len());
            part[at] ^= 1 << self.rng.random_range(0..8);
            self.tally.damaged += 1;
        }
        let job = wire.job;
        let Some(mut incoming) = wire.incoming.take() else {
            return;
        };
        let over = self.jobs[job].over;
        let before = over.then(|| self.memory());
        let result = incoming.feed_at(&part, self.now);
        if let Some(before) = before {
            assert!(
                self.memory() == before,
                "a byte of job {job} landed after its window was over"
            );
            self.tally.late_bytes_refused += u64::from(result.is_err());
        }
        let mut reply = BytesMut::new();
        match result {
            Ok(answer) => {
                answer
                    .into_iter()
                    .for_each(|answer| answer.put_with(&mut reply, self.integrity));
                self.wires[index].incoming = Some(incoming);
            }
            Err(refusal) => {
                incoming.broken("refused".into(), self.now);
                Reply::Refused(refusal).put_with(&mut reply, self.integrity);
            }
        }
        self.reply(index, &reply);
        if rest {
            self.travel(index);
        }
    }

    fn reply(&mut self, index: usize, reply: &[u8]) {
        if reply.is_empty() {
            return;
        }
        let wire = &mut self.wires[index];
        wire.backward.extend(reply);
        let ms = wire.latency_ms + self.rng.random_range(0..=wire.latency_ms);
        self.after(ms, Event::Answer(index));
    }

    fn answer(&mut self, index: usize) {
        let wire = &mut self.wires[index];
        if wire.silent || wire.lane.is_none() {
            return;
        }
        let mut part: Vec<u8> = wire.backward.drain(..).collect();
        if !part.is_empty() && self.integrity == Integrity::Checksum && self.rng.random_bool(0.02) {
            let at = self.rng.random_range(0..part.len());
            part[at] ^= 1 << self.rng.random_range(0..8);
            self.tally.damaged += 1;
        }
        let mut input = &part[..];
        loop {
            let wire = &mut self.wires[index];
            let result = match wire.decoder.next(&mut input) {
                Ok(Some(reply)) => wire.replies.reply_at(reply, self.now),
                Ok(None) => break,
                Err(bad) => Err(bad.into()),
            };
            if let Err(error) = result {
                return self.sender_breaks(index, error);
            }
        }
        let job = self.wires[index].job;
        self.wake(job);
        self.push_settled(job);
    }

    fn sender_breaks(&mut self, index: usize, error: PushError) {
        let wire = &mut self.wires[index];
        if wire.lane.take().is_none() {
            return;
        }
        let (job, slot) = (wire.job, wire.slot);
        let wait = wire.replies.broke_at(error, self.now);
        if let Some(wait) = wait {
            self.after(wait.as_millis() as u64, Event::Open(job, slot));
        }
        // A reset, which overtakes what is queued; but the connection may be gone, or some of it be there already.
        if self.rng.random_bool(0.7) {
            self.soon(60, Event::ReceiverBreaks(index, None));
        } else {
            self.after(STALL.as_millis() as u64, Event::ReceiverBreaks(index, None));
        }
        self.wake(job);
        self.push_settled(job);
    }

    fn receiver_breaks(&mut self, index: usize, reason: Option<AbortReason>) {
        let Some(mut incoming) = self.wires[index].incoming.take() else {
            return;
        };
        match reason {
            Some(reason) => incoming.lost(WindowError::Aborted(reason)),
            None => incoming.broken("cut".into(), self.now),
        }
    }

    fn stall(&mut self, index: usize, before: u64) {
        let wire = &self.wires[index];
        let Some(push) = self.jobs[wire.job].push.clone() else {
            return;
        };
        if wire.lane.is_none() || push.result().is_some() {
            return;
        }
        let progress = push.progress();
        // Only a silent lane stalls here; compute that takes its time does not.
        if progress == before && wire.silent {
            self.sender_breaks(index, PushError::Stalled { limit: STALL });
        } else {
            // As a transport would do whose lane is damaged in a way that leaves the peer waiting.
            let damaged =
                progress == before && self.integrity == Integrity::Checksum && self.jobs[wire.job].to_write.is_empty();
            if damaged {
                self.sender_breaks(index, PushError::Stalled { limit: STALL });
            } else {
                self.after(STALL.as_millis() as u64, Event::Stall(index, progress));
            }
        }
    }

    /// Everything a lane ever sent arrives once more, at whatever the receiver is by then.
    fn replay(&mut self, index: usize) {
        let wire = &self.wires[index];
        let (job, sent) = (wire.job, wire.sent.clone());
        let Life { table, .. } = &self.lives[self.lives.len() - 1];
        let mut incoming = Incoming::with_integrity(table.clone(), "replay".into(), self.integrity);
        let over = self.jobs[job].over;
        let before = self.memory();
        let cut = self.rng.random_range(0..=sent.len());
        let result = incoming.feed_at(&sent[..cut], self.now);
        if over {
            assert!(
                self.memory() == before,
                "a replayed byte of job {job} landed after its window was over"
            );
            self.tally.late_bytes_refused += u64::from(result.is_err());
        }
        incoming.broken("replayed".into(), self.now);
    }

    fn cut(&mut self, index: usize, how: Cut) {
        if self.wires[index].lane.is_none() {
            return;
        }
        let lost = PushError::PeerLost {
            peer: ([127, 0, 0, 1], 1).into(),
            detail: "cut".into(),
        };
        match how {
            Cut::Loud => {
                self.wires[index].silent = true;
                self.soon(100, Event::SenderBreaks(index, lost));
                self.soon(100, Event::ReceiverBreaks(index, None));
            }
            Cut::HalfOpen => self.sender_breaks(index, lost),
            Cut::Silent => {
                self.wires[index].silent = true;
                self.after(STALL.as_millis() as u64, Event::ReceiverBreaks(index, None));
            }
        }
    }

    /// The owner of the window gives it up; a reader also gives the lease back.
    fn close(&mut self, index: usize) {
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

    fn ask(&mut self, index: usize, attempt: u32) {
        let Some(reading) = &self.jobs[index].reading else {
            return;
        };
        if !reading.wanted || reading.begun {
            return;
        }
        if attempt >= 5 {
            return self.close(index);
        }
        if self.rng.random_bool(0.8) {
            self.soon(80, Event::Asked(index));
        }
        self.after(300, Event::Ask(index, attempt + 1));
        if attempt == 0 {
            self.after(TERM.as_millis() as u64 / 3, Event::Beat(index));
        }
    }

    fn asked(&mut self, index: usize) {
        let job = &self.jobs[index];
        let pieces: Vec<Descriptor> = job
            .blocks
            .iter()
            .map(|&block| Descriptor {
                local: local(block),
                remote: block * BLOCK,
                len: BLOCK,
            })
            .collect();
        match self.leases.begin(index as u64, index as u64 + 1, &pieces, self.now) {
            Ok(()) => {
                if let Some(reading) = &mut self.jobs[index].reading {
                    reading.begun = true;
                }
                self.begin_push(index);
                let (job, now) = (&mut self.jobs[index], self.now);
                let Some(push) = job.push.clone() else { return };
                job.to_write.clear();
                for piece in pieces {
                    push.write(piece.local..piece.local + piece.len, piece.remote, now)
                        .unwrap();
                }
                push.finish(Bytes::from_static(PAYLOAD), false, now).unwrap();
                self.soon(80, Event::Answered(index, Ok(())));
            }
            // A repetition of a request that was taken.
            Err(Refusal::WindowTaken | Refusal::Busy { .. }) => {}
            Err(refusal) => self.soon(80, Event::Answered(index, Err(refusal))),
        }
    }

    fn beat(&mut self, index: usize) {
        let job = &self.jobs[index];
        let Some(reading) = &job.reading else { return };
        if !reading.wanted || job.over {
            return;
        }
        if self.now.saturating_duration_since(reading.heard) >= TERM * 2 {
            return self.close(index);
        }
        if self.rng.random_bool(0.9) {
            self.soon(80, Event::Beaten(index));
        }
        self.after(TERM.as_millis() as u64 / 3, Event::Beat(index));
    }

    fn beaten(&mut self, index: usize) {
        let begun = self.jobs[index].reading.as_ref().is_some_and(|reading| reading.begun);
        let window = begun.then_some(index as u64 + 1);
        let answer = self.leases.beat(index as u64, window, self.now);
        if self.rng.random_bool(0.9) {
            self.soon(80, Event::Answered(index, answer));
        }
    }

    fn answered(&mut self, index: usize, answer: Result<(), Refusal>) {
        let now = self.now;
        let Some(reading) = &mut self.jobs[index].reading else {
            return;
        };
        reading.heard = now;
        // What ended the lease may be that the read was done.
        if answer.is_err() && !matches!(self.jobs[index].cell.phase(), Phase::Completed(_)) {
            self.close(index);
        }
    }

    /// A lease is over: its push is fenced, and from that moment the bytes are somebody else's.
    fn ended(&mut self, ended: Option<Ended>) {
        let Some(ended) = ended else { return };
        let index = ended.export as usize;
        self.tally.leases_expired += u64::from(ended.why == LeaseEnd::Expired);
        if let Some(reading) = &mut self.jobs[index].reading {
            assert!(!std::mem::replace(&mut reading.ended, true), "a lease ends once");
        }
        self.fail(index, PushError::Aborted(AbortReason::LeaseEnded));
        self.poison(index);
    }

    /// The sender gives the push up, and says so on every lane.
    fn fail(&mut self, index: usize, error: PushError) {
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

    fn poison(&mut self, index: usize) {
        let job = &mut self.jobs[index];
        job.poisoned = true;
        assert!(job.source.copy_in(0, &[POISON; BLOCK * BLOCKS]));
    }

    /// What the sender's shell does once a push is settled: the blocks are its own again.
    fn push_settled(&mut self, index: usize) {
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

    fn memory(&self) -> Vec<u8> {
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
                Some(Err(PushError::Refused(refusal))) if job.completed && job.life + 1 == self.lives.len() => {
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
                for at in block * BLOCK..(block + 1) * BLOCK {
                    assert_eq!(all[at], pattern(index, at), "byte {at} of job {index} is wrong");
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

    fn tell(&mut self, index: usize) {
        let wire = &mut self.wires[index];
        let Some(refusal) = wire.incoming.as_ref().and_then(Incoming::given_up) else {
            return;
        };
        wire.incoming = None;
        let mut reply = BytesMut::new();
        Reply::Refused(refusal).put_with(&mut reply, self.integrity);
        self.reply(index, &reply);
    }
}

impl Job {
    fn cell_live(&self) -> bool {
        matches!(self.cell.phase(), Phase::Open | Phase::Receiving)
    }
}

/// Where the sender keeps what goes to the receiver's `block`.
fn local(block: usize) -> usize {
    (BLOCKS - 1 - block) * BLOCK
}
