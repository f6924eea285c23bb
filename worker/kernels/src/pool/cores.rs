//! Which cores threads may run on: how many this process has, and pinning one thread to one of them.
//!
//! Linux only; elsewhere nothing is pinned and the count is what the standard library says.

use std::num::NonZeroUsize;

/// Cores this process may use at once: its affinity and its cgroup's quota counted. 1 where nobody knows.
pub(super) fn available() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Pins the calling thread to `core`. False where that is refused or unknown; the thread then runs wherever it did.
#[cfg(target_os = "linux")]
pub(super) fn pin_this_thread(core: usize) -> bool {
    use rustix::thread::{CpuSet, sched_setaffinity};
    if core >= CpuSet::MAX_CPU {
        return false;
    }
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).is_ok()
}

/// Nothing is pinned here.
#[cfg(not(target_os = "linux"))]
pub(super) fn pin_this_thread(_core: usize) -> bool {
    false
}
