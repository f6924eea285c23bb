//! All open windows of an agent: the bounded map from id to window, and the lock that makes each window's fence.
//!
//! Every change of a [`WindowState`] happens under its cell's lock and is followed by a wake-up, so that the owner's
//! wait and the push that is writing see it at once. The wake-up is tokio's `Notify`, a flag that needs no runtime;
//! nothing here waits.

use crate::inbox::Inbox;
use crate::limits::REMEMBERED_MAX;
use crate::ranges::RangeSet;
use crate::stats::Counters;
use crate::storage::Memory;
use crate::transport::TransportKind;
use crate::window_state::{Finish, Phase, WindowState};
use crate::wire::{CONTROL_WINDOW, LaneKey};
use crate::{Refusal, SetupError, TransferLimits, WindowError};
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// How often a copy yields to those who wait for its window's lock, before it takes it again: a waker needs some tens of µs,
/// and waiting on for one that does not get a core would stop the copy.
const MAKE_WAY_TURNS_MAX: usize = 1000;

/// Locks even if another thread panicked while it held the lock: the state machines are consistent between calls.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One window, shared by its owner, the table and the lanes that write it.
#[derive(Debug)]
pub(crate) struct WindowCell {
    id: u64,
    /// The fence: bytes are copied only while this is held.
    state: Mutex<WindowState>,
    /// How many wait for the lock: whoever holds it for long makes way.
    waiting: AtomicU32,
    changed: Notify,
    counters: Arc<Counters>,
}

impl WindowCell {
    fn state(&self) -> MutexGuard<'_, WindowState> {
        if let Ok(state) = self.state.try_lock() {
            return state;
        }
        self.waiting.fetch_add(1, Relaxed);
        let state = lock(&self.state);
        self.waiting.fetch_sub(1, Relaxed);
        state
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn landed(&self) -> u64 {
        self.state().landed()
    }

    pub(crate) fn phase(&self) -> Phase {
        self.state().phase().clone()
    }

    pub(crate) fn claim(&self, push: u64, lane: LaneKey) -> Result<(), Refusal> {
        self.state().claim(push, lane)?;
        // A rescued window has another deadline.
        self.changed.notify_waiters();
        Ok(())
    }

    pub(crate) fn admit(&self, lane: LaneKey, offset: u64, len: u64) -> Result<usize, Refusal> {
        self.state().admit(lane, offset, len)
    }

    pub(crate) fn land(&self, lane: LaneKey, offset: usize, bytes: &[u8]) -> Result<(), Refusal> {
        self.state().land(lane, offset, bytes)?;
        self.counters.bytes_in.add(bytes.len() as u64);
        Ok(())
    }

    /// [`WindowCell::land`] for bytes that `copy` brings to `places` (offset, length) from elsewhere, under the fence.
    /// It says how many of the places, from the first, it has brought bytes to: fewer than all if it was asked to make way
    /// for others, by its second argument. Those are covered, and counted for the transport, too. Their number, and the
    /// push's total if they complete the window.
    pub(crate) fn land_with(
        &self,
        lane: LaneKey,
        transport: TransportKind,
        places: impl Iterator<Item = (usize, usize)> + Clone,
        copy: impl FnOnce(&Memory, &dyn Fn() -> bool) -> Result<usize, Refusal>,
    ) -> Result<(usize, Option<u64>), Refusal> {
        let wanted = || self.waiting.load(Relaxed) > 0;
        let (mut copied, mut total) = (places.clone().count(), None);
        let before = {
            let mut state = self.state();
            let before = state.live();
            state.land_with(lane, places.clone(), |memory| {
                copied = copy(memory, &wanted)?;
                Ok(())
            })?;
            for (offset, len) in places.clone().take(copied) {
                total = state.cover(lane, offset..offset + len)?.or(total);
            }
            before
        };
        self.completed(before && total.is_some());
        let len = places.take(copied).map(|(_, len)| len as u64).sum();
        self.counters.bytes_in.add(len);
        match transport {
            TransportKind::SharedMemory => self.counters.shared_memory_bytes_in.add(len),
            TransportKind::Nixl => self.counters.nixl_bytes_in.add(len),
            TransportKind::Quic | TransportKind::Tcp => {}
        }
        // The lock is not fair: who takes it again at once takes it before those that have to be woken.
        for _ in 0..MAKE_WAY_TURNS_MAX {
            if !wanted() {
                break;
            }
            std::thread::yield_now();
        }
        Ok((copied, total))
    }

    /// The memory that is written.
    pub(crate) fn memory(&self) -> Memory {
        self.state().memory().clone()
    }

    /// All bytes of a write are in memory. The push's total if that completes the window.
    pub(crate) fn cover(&self, lane: LaneKey, range: Range<usize>) -> Result<Option<u64>, Refusal> {
        let (before, total) = {
            let mut state = self.state();
            (state.live(), state.cover(lane, range)?)
        };
        self.completed(before && total.is_some());
        Ok(total)
    }

    pub(crate) fn finish(&self, lane: LaneKey, finish: Finish) -> Result<Option<u64>, Refusal> {
        let (before, total) = {
            let mut state = self.state();
            (state.live(), state.finish(lane, finish)?)
        };
        self.completed(before && total.is_some());
        Ok(total)
    }

    fn completed(&self, just_now: bool) {
        if just_now {
            self.counters.windows_completed.add(1);
            self.changed.notify_waiters();
        }
    }

    /// The notification that the push asked for, once completed.
    pub(crate) fn notification(&self) -> Option<Bytes> {
        self.state().notification()
    }

    /// A lane ended, but its push may go on.
    pub(crate) fn lane_broke(&self, lane: LaneKey, cause: WindowError, now: Instant) {
        self.state().lane_broke(lane, cause, now);
        self.changed.notify_waiters();
    }

    /// When the window wants [`WindowCell::expire`].
    #[cfg(test)]
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.state().deadline()
    }

    /// Fails the window if it has waited for another lane long enough.
    pub(crate) fn expire(&self, now: Instant) {
        if self.state().expire(now) {
            self.counters.windows_failed.add(1);
            self.changed.notify_waiters();
        }
    }

    /// Fences and fails the window, unless it is over already.
    pub(crate) fn fail(&self, error: WindowError) {
        if self.state().fail(error) {
            self.counters.windows_failed.add(1);
            self.changed.notify_waiters();
        }
    }

    /// Fences and closes the window, unless it is over already.
    pub(crate) fn close(&self) {
        if self.state().close() {
            self.changed.notify_waiters();
        }
    }

    /// Resolves once `done` gives a value for the current phase; a window whose last lane broke fails meanwhile when
    /// its grace is over.
    pub(crate) async fn until<T>(&self, mut done: impl FnMut(&Phase) -> Option<T>) -> T {
        let mut changed = std::pin::pin!(self.changed.notified());
        loop {
            // Listen first, look second: a change in between is not missed.
            changed.as_mut().enable();
            let deadline = {
                let state = self.state();
                if let Some(value) = done(state.phase()) {
                    return value;
                }
                state.deadline()
            };
            match deadline {
                None => changed.as_mut().await,
                Some(at) => match tokio::time::timeout_at(at.into(), changed.as_mut()).await {
                    Ok(()) => {}
                    Err(_) => self.expire(Instant::now()),
                },
            }
            changed.set(self.changed.notified());
        }
    }
}

/// What the table holds.
#[derive(Debug, Default)]
struct Windows {
    cells: HashMap<u64, Arc<WindowCell>>,
    /// Pushes completed into windows that are gone, or control messages taken, with their totals; the oldest first.
    remembered: VecDeque<((u64, u64), u64)>,
    closed: bool,
}

/// What a lane's OPEN leads to.
#[derive(Debug)]
pub(crate) enum Claimed {
    /// The window is the push's.
    Window(Arc<WindowCell>),
    /// The push was completed before, with this total; the acknowledgement must have been lost.
    Done(u64),
}

/// The open windows of one agent.
#[derive(Debug)]
pub(crate) struct WindowTable {
    windows: Mutex<Windows>,
    windows_max: usize,
    lane_grace: Duration,
    counters: Arc<Counters>,
    inbox: Arc<Inbox>,
}

impl WindowTable {
    pub(crate) fn new(limits: &TransferLimits, counters: Arc<Counters>) -> Self {
        Self {
            windows: Mutex::default(),
            windows_max: limits.windows_max,
            lane_grace: limits.lane_grace,
            counters,
            inbox: Arc::default(),
        }
    }

    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Where notifications and control messages go.
    pub(crate) fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    /// Opens a window. `random_id` gives unguessable ids; it is asked again in the unlikely case of a repeat.
    pub(crate) fn open(
        &self,
        memory: &Memory,
        ranges: RangeSet,
        bytes_max: u64,
        mut random_id: impl FnMut() -> Result<u64, SetupError>,
    ) -> Result<Arc<WindowCell>, SetupError> {
        let mut windows = lock(&self.windows);
        if windows.closed {
            return Err(SetupError::AgentClosed);
        }
        if windows.cells.len() >= self.windows_max {
            return Err(SetupError::Windows { max: self.windows_max });
        }
        // Two owners of one byte is a bug that would show up as wrong tokens; here it is cheap to catch.
        let conflict = |cell: &Arc<WindowCell>| cell.state().conflict(memory, &ranges);
        if let Some(range) = windows.cells.values().find_map(conflict) {
            return Err(SetupError::WindowOverlap { range });
        }
        let id = loop {
            let id = random_id()?;
            if id != CONTROL_WINDOW && !windows.cells.contains_key(&id) {
                break id;
            }
        };
        let cell = Arc::new(WindowCell {
            id,
            state: Mutex::new(WindowState::new(memory.clone(), ranges, bytes_max, self.lane_grace)),
            waiting: AtomicU32::new(0),
            changed: Notify::new(),
            counters: self.counters.clone(),
        });
        windows.cells.insert(id, cell.clone());
        self.counters.windows_open.add(1);
        Ok(cell)
    }

    /// The window that a lane names, now its push's own.
    pub(crate) fn claim(&self, id: u64, push: u64, lane: LaneKey) -> Result<Claimed, Refusal> {
        let cell = {
            let windows = lock(&self.windows);
            match windows.cells.get(&id) {
                Some(cell) => cell.clone(),
                None => {
                    let remembered = windows.remembered.iter().rev().find(|(key, _)| *key == (id, push));
                    return match remembered {
                        Some(&(_, total)) => Ok(Claimed::Done(total)),
                        None => Err(Refusal::UnknownWindow),
                    };
                }
            }
        };
        cell.claim(push, lane)?;
        Ok(Claimed::Window(cell))
    }

    /// Whether this control message was taken before.
    pub(crate) fn control_taken(&self, push: u64) -> bool {
        let key = (CONTROL_WINDOW, push);
        let windows = lock(&self.windows);
        windows.remembered.iter().rev().any(|(seen, _)| *seen == key)
    }

    /// Remembers a control message, so that a repetition of it is acknowledged and does nothing.
    pub(crate) fn remember_control(&self, push: u64) {
        lock(&self.windows).remember((CONTROL_WINDOW, push), 0);
    }

    /// Fences, closes and forgets a window.
    pub(crate) fn close(&self, cell: &WindowCell) {
        cell.close();
        let mut windows = lock(&self.windows);
        if windows.cells.remove(&cell.id).is_some() {
            self.counters.windows_open.sub(1);
            if let Some((push, total)) = cell.state().completed() {
                windows.remember((cell.id, push), total);
            }
        }
    }

    /// Fails every window and opens none any more.
    pub(crate) fn shut(&self) {
        let cells: Vec<_> = {
            let mut windows = lock(&self.windows);
            windows.closed = true;
            windows.cells.values().cloned().collect()
        };
        for cell in cells {
            cell.fail(WindowError::AgentClosed);
        }
        self.inbox.shut();
    }
}

impl Windows {
    fn remember(&mut self, key: (u64, u64), total: u64) {
        if self.remembered.len() >= REMEMBERED_MAX {
            self.remembered.pop_front();
        }
        self.remembered.push_back((key, total));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Region;
    use crate::ranges::RangeSet;
    use std::sync::mpsc;

    /// A copy that goes on for as long as nobody wants the lock: the owner's `close` gets it, and nothing lands after it.
    #[test]
    fn a_long_copy_makes_way_for_close() {
        let region = Region::new(4096).unwrap();
        let table = WindowTable::new(&TransferLimits::default(), Arc::default());
        let ranges = RangeSet::new(vec![0..2048, 2048..4096], region.len(), 8).unwrap();
        let cell = table.open(&(&region).into(), ranges, 4096, || Ok(7)).unwrap();
        let lane = LaneKey { slot: 0, generation: 0 };
        cell.claim(1, lane).unwrap();
        let land = |copy: &dyn Fn(&dyn Fn() -> bool) -> usize| {
            let places = [(0, 8), (8, 8), (16, 8)].into_iter();
            cell.land_with(lane, TransportKind::Nixl, places, |_, wanted| Ok(copy(wanted)))
        };
        let (begun, closer) = mpsc::channel();
        std::thread::scope(|scope| {
            let cell = &cell;
            let close = scope.spawn(move || {
                closer.recv().unwrap();
                cell.close();
            });
            let landed = land(&|wanted| {
                begun.send(()).unwrap();
                let until = Instant::now() + Duration::from_secs(20);
                while !wanted() {
                    assert!(Instant::now() < until, "nobody is heard waiting");
                    std::thread::yield_now();
                }
                2
            });
            // What was copied before counts, and only that.
            assert_eq!(landed, Ok((2, None)));
            close.join().unwrap();
        });
        assert_eq!(cell.landed(), 16);
        let late = land(&|_| panic!("a byte landed after close"));
        assert_eq!(late, Err(Refusal::WindowClosed));
    }
}
