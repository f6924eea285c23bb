//! A window's life as a state machine: no locks, no tasks; the time is passed in.
//!
//! ```text
//!          claim by a push's first lane          FINISH seen and all of its total covered
//!   Open ──────────────────────────► Receiving ──────────────────────────► Completed(payload)
//!    │ fail / close                   │  ▲   │ fail / close / grace over
//!    │                 last lane broke│  │claim by a new lane of the push
//!    ▼                                ▼  │   ▼
//!  Failed(error) or Closed         (orphaned)  Failed(error) or Closed
//! ```
//!
//! A push comes over one or more lanes. Each is known by its slot and generation; a lane with a larger generation takes
//! the place of the slot's earlier one, which is fenced from then on. Frames of different lanes come in any order and
//! may repeat: what has landed is a set of positions, not a sum.
//!
//! Invariants: bytes land only in Receiving, only from a current lane of the push that claimed the window, and only
//! inside the ranges; a window has one push in its life; the two states on the right and Closed are final; Completed
//! means that as many different bytes as FINISH names have landed. [`crate::window_table`] keeps each machine under
//! one lock, and that lock is the fence: once `close` or `fail` has returned, `land` can only refuse.

use crate::coverage::Coverage;
use crate::limits::{COVERAGE_FRAGMENTS_MAX, LANE_OPENINGS_MAX, LANES_MAX};
use crate::ranges::{RangeSet, aligned};
use crate::storage::Memory;
use crate::wire::LaneKey;
use crate::{Refusal, WindowError};
use bytes::Bytes;
use std::ops::Range;
use std::time::{Duration, Instant};

/// What state a window is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Waiting for its push.
    Open,
    /// Being written.
    Receiving,
    /// Every byte has landed; the finishing payload.
    Completed(Bytes),
    /// Given up for a reason other than the owner's.
    Failed(WindowError),
    /// Given up by its owner.
    Closed,
}

/// What a lane's FINISH says. All lanes of a push say the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finish {
    /// Different bytes of the whole push.
    pub(crate) total: u64,
    pub(crate) payload: Bytes,
    /// The payload is also a notification.
    pub(crate) notify: bool,
}

/// One slot of the push.
#[derive(Debug)]
struct Lane {
    key: LaneKey,
    /// Its stream has not ended.
    live: bool,
    /// Bytes of its writes begun, including those still on their way. Bounds the total before they arrive.
    promised: u64,
}

/// One window.
#[derive(Debug)]
pub(crate) struct WindowState {
    phase: Phase,
    memory: Memory,
    ranges: RangeSet,
    bytes_max: u64,
    lane_grace: Duration,
    push: Option<u64>,
    lanes: Vec<Lane>,
    openings: u32,
    covered: Coverage,
    finish: Option<Finish>,
    /// The last lane broke: until when another may come, and what it means if none does.
    orphaned: Option<(Instant, WindowError)>,
}

impl WindowState {
    pub(crate) fn new(memory: Memory, ranges: RangeSet, bytes_max: u64, lane_grace: Duration) -> Self {
        Self {
            phase: Phase::Open,
            memory,
            ranges,
            bytes_max,
            lane_grace,
            push: None,
            lanes: Vec::new(),
            openings: 0,
            covered: Coverage::default(),
            finish: None,
            orphaned: None,
        }
    }

    pub(crate) fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Different bytes landed.
    pub(crate) fn landed(&self) -> u64 {
        self.covered.bytes()
    }

    /// Whether the window may still be written.
    pub(crate) fn live(&self) -> bool {
        matches!(self.phase, Phase::Open | Phase::Receiving)
    }

    /// Bytes that this live window and another one over `ranges` of `memory` would both own.
    pub(crate) fn conflict(&self, memory: &Memory, ranges: &RangeSet) -> Option<Range<usize>> {
        (self.live() && self.memory.same(memory))
            .then(|| self.ranges.intersection(ranges))
            .flatten()
    }

    /// A lane of `push` names this window. The lane takes the place of earlier ones of its slot.
    pub(crate) fn claim(&mut self, push: u64, key: LaneKey) -> Result<(), Refusal> {
        match (&self.phase, self.push) {
            (Phase::Closed, _) => return Err(Refusal::WindowClosed),
            (Phase::Failed(_), Some(owner)) if owner == push => return Err(Refusal::WindowClosed),
            (Phase::Failed(_), _) => return Err(Refusal::WindowTaken),
            (_, Some(owner)) if owner != push => return Err(Refusal::WindowTaken),
            (Phase::Open | Phase::Receiving | Phase::Completed(_), _) => {}
        }
        if key.slot >= LANES_MAX || self.openings >= LANE_OPENINGS_MAX {
            return Err(Refusal::TooManyLanes { max: LANES_MAX.into() });
        }
        let lane = Lane {
            key,
            live: true,
            promised: 0,
        };
        match self.lanes.iter_mut().find(|lane| lane.key.slot == key.slot) {
            Some(earlier) if earlier.key.generation >= key.generation => return Err(Refusal::Superseded),
            Some(earlier) => *earlier = lane,
            None => self.lanes.push(lane),
        }
        self.openings += 1;
        self.push = Some(push);
        self.orphaned = None;
        if self.phase == Phase::Open {
            self.phase = Phase::Receiving;
        }
        Ok(())
    }

    /// A lane announces a write. Its start in the memory, if all of it is allowed.
    pub(crate) fn admit(&mut self, key: LaneKey, offset: u64, len: u64) -> Result<usize, Refusal> {
        self.current(key)?;
        if len == 0 {
            return Err(Refusal::EmptyWrite { offset });
        }
        let out_of_range = Refusal::OutOfRange { offset, len };
        let start = usize::try_from(offset).map_err(|_| out_of_range)?;
        let length = usize::try_from(len).map_err(|_| out_of_range)?;
        let end = start.checked_add(length).ok_or(out_of_range)?;
        if !aligned(start) || !aligned(end) {
            return Err(Refusal::Misaligned { offset, len });
        }
        if !self.ranges.covers(&(start..end)) {
            return Err(out_of_range);
        }
        let max = self.bytes_max;
        let lane = self.current(key)?;
        lane.promised = lane.promised.saturating_add(len);
        if lane.promised > max {
            return Err(Refusal::TooManyBytes { max });
        }
        Ok(start)
    }

    /// Bytes of an admitted write arrive. Checked again: the fence stands or falls here. In a completed window they
    /// are repetitions, and nothing is written.
    pub(crate) fn land(&mut self, key: LaneKey, offset: usize, bytes: &[u8]) -> Result<(), Refusal> {
        let copy = |memory: &Memory| memory.copy_in(offset, bytes).then_some(()).ok_or(Refusal::MemoryFailed);
        self.land_with(key, std::iter::once((offset, bytes.len())), copy)
    }

    /// As [`WindowState::land`], for a transport that has the bytes elsewhere: `copy` puts them at the places, given by
    /// offset and length, of the memory.
    pub(crate) fn land_with(
        &mut self,
        key: LaneKey,
        places: impl Iterator<Item = (usize, usize)>,
        copy: impl FnOnce(&Memory) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        self.current(key)?;
        for (offset, len) in places {
            let inside = offset
                .checked_add(len)
                .is_some_and(|end| self.ranges.covers(&(offset..end)));
            if !inside {
                return Err(Refusal::OutOfRange {
                    offset: offset as u64,
                    len: len as u64,
                });
            }
        }
        if self.phase == Phase::Receiving {
            copy(&self.memory)?;
        }
        Ok(())
    }

    /// The memory that is written.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// All bytes of a write are in memory. The push's total, if that completes the window.
    pub(crate) fn cover(&mut self, key: LaneKey, range: Range<usize>) -> Result<Option<u64>, Refusal> {
        self.current(key)?;
        if self.phase != Phase::Receiving {
            return Ok(None);
        }
        if !self.ranges.covers(&range) {
            return Err(Refusal::OutOfRange {
                offset: range.start as u64,
                len: range.len() as u64,
            });
        }
        self.covered.insert(range).map_err(|_| Refusal::TooScattered {
            max: COVERAGE_FRAGMENTS_MAX as u64,
        })?;
        self.complete()
    }

    /// A lane says that it has sent everything, and what the whole push amounts to. The total, if the window is
    /// complete.
    pub(crate) fn finish(&mut self, key: LaneKey, finish: Finish) -> Result<Option<u64>, Refusal> {
        self.current(key)?;
        if let Some(earlier) = &self.finish
            && *earlier != finish
        {
            return Err(Refusal::WrongTotal {
                claimed: finish.total,
                landed: self.landed(),
            });
        }
        let total = finish.total;
        self.finish = Some(finish);
        if matches!(self.phase, Phase::Completed(_)) {
            return Ok(Some(total));
        }
        self.complete()
    }

    fn complete(&mut self) -> Result<Option<u64>, Refusal> {
        let Some(finish) = &self.finish else { return Ok(None) };
        let landed = self.covered.bytes();
        if landed > finish.total {
            return Err(Refusal::WrongTotal {
                claimed: finish.total,
                landed,
            });
        }
        if landed < finish.total {
            return Ok(None);
        }
        let total = finish.total;
        self.phase = Phase::Completed(finish.payload.clone());
        Ok(Some(total))
    }

    /// The push and its total, once completed: what is remembered when the window is gone.
    pub(crate) fn completed(&self) -> Option<(u64, u64)> {
        matches!(self.phase, Phase::Completed(_)).then_some((self.push?, self.covered.bytes()))
    }

    /// The payload of a completed window whose push asked for a notification.
    pub(crate) fn notification(&self) -> Option<Bytes> {
        match (&self.phase, &self.finish) {
            (Phase::Completed(payload), Some(finish)) if finish.notify => Some(payload.clone()),
            _ => None,
        }
    }

    /// A lane's stream ended, but the push may go on. If it was the last lane, another has `lane_grace` to come.
    pub(crate) fn lane_broke(&mut self, key: LaneKey, cause: WindowError, now: Instant) {
        let Ok(lane) = self.current(key) else { return };
        lane.live = false;
        if self.phase == Phase::Receiving && self.lanes.iter().all(|lane| !lane.live) {
            self.orphaned.get_or_insert((now + self.lane_grace, cause));
        }
    }

    /// When [`WindowState::expire`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.orphaned.as_ref().filter(|_| self.live()).map(|(until, _)| *until)
    }

    /// Fails the window if it waited for another lane long enough.
    pub(crate) fn expire(&mut self, now: Instant) -> bool {
        match &self.orphaned {
            Some((until, cause)) if *until <= now => {
                let cause = cause.clone();
                self.fail(cause)
            }
            _ => false,
        }
    }

    /// Gives the window up for `error`. False if it was over already.
    pub(crate) fn fail(&mut self, error: WindowError) -> bool {
        let live = self.live();
        if live {
            self.phase = Phase::Failed(error);
        }
        live
    }

    /// The owner gives the window up. False if it was over already.
    pub(crate) fn close(&mut self) -> bool {
        let live = self.live();
        if live {
            self.phase = Phase::Closed;
        }
        live
    }

    /// The lane, if it may act: its push holds the window, and no newer one has taken its place.
    fn current(&mut self, key: LaneKey) -> Result<&mut Lane, Refusal> {
        if !matches!(self.phase, Phase::Receiving | Phase::Completed(_)) {
            return Err(match self.phase {
                Phase::Failed(WindowError::AgentClosed) => Refusal::AgentClosed,
                _ => Refusal::WindowClosed,
            });
        }
        self.lanes
            .iter_mut()
            .find(|lane| lane.key == key)
            .ok_or(Refusal::Superseded)
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // windows over one range are what is meant
mod tests;
