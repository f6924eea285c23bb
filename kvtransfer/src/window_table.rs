//! All open windows of an agent: the bounded map from id to window, and the lock that makes each window's fence.
//!
//! Every change of a [`WindowState`] happens under its cell's lock and is followed by a wake-up, so that the owner's
//! wait and the push that is writing see it at once. The wake-up is tokio's `Notify`, a flag that needs no runtime;
//! nothing here waits.

use crate::ranges::RangeSet;
use crate::stats::Counters;
use crate::window_state::{Phase, WindowState};
use crate::{Refusal, Region, SetupError, WindowError};
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Locks even if another thread panicked while it held the lock: the state machines are consistent between calls.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One window, shared by its owner, the table and the push that writes it.
#[derive(Debug)]
pub(crate) struct WindowCell {
    id: u64,
    /// The fence: bytes are copied only while this is held.
    state: Mutex<WindowState>,
    changed: Notify,
    counters: Arc<Counters>,
}

impl WindowCell {
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn landed(&self) -> u64 {
        lock(&self.state).landed()
    }

    pub(crate) fn phase(&self) -> Phase {
        lock(&self.state).phase().clone()
    }

    pub(crate) fn claim(&self) -> Result<(), Refusal> {
        lock(&self.state).claim()
    }

    pub(crate) fn admit(&self, offset: u64, len: u64) -> Result<usize, Refusal> {
        lock(&self.state).admit(offset, len)
    }

    pub(crate) fn land(&self, offset: usize, bytes: &[u8]) -> Result<(), Refusal> {
        lock(&self.state).land(offset, bytes)?;
        self.counters.bytes_in.add(bytes.len() as u64);
        Ok(())
    }

    /// [`WindowCell::land`] over shared memory: `copy` brings the bytes from elsewhere, under the fence.
    pub(crate) fn land_with(
        &self,
        offset: usize,
        len: usize,
        copy: impl FnOnce(&Region) -> bool,
    ) -> Result<(), Refusal> {
        lock(&self.state).land_with(offset, len, copy)?;
        self.counters.bytes_in.add(len as u64);
        self.counters.shared_memory_bytes_in.add(len as u64);
        Ok(())
    }

    pub(crate) fn finish(&self, total: u64, payload: Bytes) -> Result<u64, Refusal> {
        let landed = lock(&self.state).finish(total, payload)?;
        self.counters.windows_completed.add(1);
        self.changed.notify_waiters();
        Ok(landed)
    }

    /// Fences and fails the window, unless it is over already.
    pub(crate) fn fail(&self, error: WindowError) {
        if lock(&self.state).fail(error) {
            self.counters.windows_failed.add(1);
            self.changed.notify_waiters();
        }
    }

    /// Fences and closes the window, unless it is over already.
    pub(crate) fn close(&self) {
        if lock(&self.state).close() {
            self.changed.notify_waiters();
        }
    }

    /// Resolves once `done` gives a value for the current phase.
    pub(crate) async fn until<T>(&self, mut done: impl FnMut(&Phase) -> Option<T>) -> T {
        let mut changed = std::pin::pin!(self.changed.notified());
        loop {
            // Listen first, look second: a change in between is not missed.
            changed.as_mut().enable();
            if let Some(value) = done(lock(&self.state).phase()) {
                return value;
            }
            changed.as_mut().await;
            changed.set(self.changed.notified());
        }
    }
}

/// What the table holds.
#[derive(Debug, Default)]
struct Windows {
    cells: HashMap<u64, Arc<WindowCell>>,
    closed: bool,
}

/// The open windows of one agent.
#[derive(Debug)]
pub(crate) struct WindowTable {
    windows: Mutex<Windows>,
    windows_max: usize,
    counters: Arc<Counters>,
}

impl WindowTable {
    pub(crate) fn new(windows_max: usize, counters: Arc<Counters>) -> Self {
        Self {
            windows: Mutex::default(),
            windows_max,
            counters,
        }
    }

    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Opens a window. `random_id` gives unguessable ids; it is asked again in the unlikely case of a repeat.
    pub(crate) fn open(
        &self,
        region: &Arc<Region>,
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
        let conflict = |cell: &Arc<WindowCell>| lock(&cell.state).conflict(region, &ranges);
        if let Some(range) = windows.cells.values().find_map(conflict) {
            return Err(SetupError::WindowOverlap { range });
        }
        let id = loop {
            let id = random_id()?;
            if !windows.cells.contains_key(&id) {
                break id;
            }
        };
        let cell = Arc::new(WindowCell {
            id,
            state: Mutex::new(WindowState::new(region.clone(), ranges, bytes_max)),
            changed: Notify::new(),
            counters: self.counters.clone(),
        });
        windows.cells.insert(id, cell.clone());
        self.counters.windows_open.add(1);
        Ok(cell)
    }

    /// The window that a push names, now its own.
    pub(crate) fn claim(&self, id: u64) -> Result<Arc<WindowCell>, Refusal> {
        let cell = lock(&self.windows)
            .cells
            .get(&id)
            .cloned()
            .ok_or(Refusal::UnknownWindow)?;
        cell.claim()?;
        Ok(cell)
    }

    /// Fences, closes and forgets a window.
    pub(crate) fn close(&self, cell: &WindowCell) {
        cell.close();
        if lock(&self.windows).cells.remove(&cell.id).is_some() {
            self.counters.windows_open.sub(1);
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
    }
}
