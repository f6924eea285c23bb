//! A small persistent thread pool: one job at a time, its tasks handed out through a counter.
//!
//! Workers spin briefly between jobs (a forward pass is some hundred jobs of microseconds to milliseconds), then park,
//! because worker processes share a machine and must not burn each other's cores. Tasks are claimed dynamically, so
//! which thread runs which task varies; kernels are written so that this cannot change a bit of the result.
//!
//! No queue, no nesting, no async: the caller takes part and returns when the last task is done.

use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// How many pause instructions a worker (or a caller waiting for the last task) spins before it parks: roughly
/// 50 microseconds, about the cost of being parked and woken once.
const SPIN_MAX: u32 = 2_000;

/// No more threads than this, whatever is asked for.
pub const THREADS_MAX: usize = 256;

type Body<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// The job workers may join, with its lifetime erased; see [`Pool::run`] for why that is sound.
#[derive(Clone, Copy)]
struct Job {
    body: *const Body<'static>,
    next: *const AtomicUsize,
    tasks: usize,
}

// SAFETY: the pointees are Sync and outlive every use (see `Pool::run`).
unsafe impl Send for Job {}

impl Job {
    /// Claims tasks until none is left.
    ///
    /// # Safety
    /// The pointees must be alive.
    unsafe fn work(self, worker: usize) {
        // SAFETY: as the caller promises.
        let (body, next) = unsafe { (&*self.body, &*self.next) };
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= self.tasks {
                return;
            }
            body(worker, task);
        }
    }
}

#[derive(Default)]
struct State {
    epoch: u64,
    job: Option<Job>,
    active: usize,
    sleepers: usize,
    panicked: bool,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    idle: Condvar,
    /// Mirrors of `state.epoch` and `state.active`, to spin on without the lock.
    epoch: AtomicU64,
    active: AtomicUsize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent at every unlock, so a panicking holder leaves nothing half-done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pool. Dropping it joins its threads.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    spin: u32,
    /// Serialises callers.
    gate: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` threads, the caller included, clamped to `1..=THREADS_MAX`.
    ///
    /// A thread the system refuses to start is done without (results do not depend on their number).
    pub fn new(threads: usize) -> Self {
        let threads = threads.clamp(1, THREADS_MAX);
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        // With more threads than cores a spinning thread only keeps a working one off its core.
        let spin = if threads > cores { 0 } else { SPIN_MAX };
        let shared = Arc::new(Shared::default());
        let threads = (1..threads)
            .filter_map(|worker| {
                let shared = Arc::clone(&shared);
                let name = format!("kernel-{worker}");
                std::thread::Builder::new()
                    .name(name)
                    .spawn(move || serve(&shared, worker, spin))
                    .ok()
            })
            .collect();
        Pool {
            shared,
            threads,
            spin,
            gate: Mutex::new(()),
        }
    }

    /// Threads that take part in a job, the caller included.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `body(worker, task)` once for each task in `0..tasks` and returns when all are done. `worker` is below
    /// [`Pool::threads`] and no two tasks run at once with the same one.
    ///
    /// # Panics
    /// If `body` panics, in whichever thread.
    pub fn run(&self, tasks: usize, body: &Body<'_>) {
        if self.threads.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|task| body(0, task));
            return;
        }
        let _gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        let next = AtomicUsize::new(0);
        // SAFETY: only the lifetime changes. A worker uses the pointer only between joining the job under the lock
        // (`active += 1` while `state.job` is set) and leaving it (`active -= 1`); `Finish` below takes the job away
        // and waits for `active == 0` before this function returns or unwinds, so `body` and `next` outlive every use.
        let body = unsafe { std::mem::transmute::<&Body<'_>, &Body<'static>>(body) };
        let job = Job {
            body,
            next: &next,
            tasks,
        };
        {
            let mut state = self.shared.lock();
            state.job = Some(job);
            state.epoch += 1;
            self.shared.epoch.store(state.epoch, Ordering::Release);
            if state.sleepers > 0 {
                self.shared.wake.notify_all();
            }
        }
        let finish = Finish { pool: self };
        // SAFETY: both pointees are alive in this scope.
        unsafe { job.work(0) };
        drop(finish);
        if std::mem::take(&mut self.shared.lock().panicked) {
            panic!("a kernel thread panicked; its message was printed above");
        }
    }
}

/// Takes the job away and waits until no worker is in it, also when the caller's own task panics.
struct Finish<'a> {
    pool: &'a Pool,
}

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let shared = &self.pool.shared;
        shared.lock().job = None;
        for _ in 0..self.pool.spin {
            if shared.active.load(Ordering::Acquire) == 0 {
                break;
            }
            std::hint::spin_loop();
        }
        let mut state = shared.lock();
        while state.active > 0 {
            state = shared.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn serve(shared: &Shared, worker: usize, spin: u32) {
    let mut seen = 0;
    loop {
        for _ in 0..spin {
            if shared.epoch.load(Ordering::Acquire) != seen {
                break;
            }
            std::hint::spin_loop();
        }
        let job = {
            let mut state = shared.lock();
            while state.epoch == seen && !state.stop {
                state.sleepers += 1;
                state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.sleepers -= 1;
            }
            if state.stop {
                return;
            }
            seen = state.epoch;
            // None: the others finished it before this thread woke.
            let Some(job) = state.job else { continue };
            state.active += 1;
            shared.active.store(state.active, Ordering::Release);
            job
        };
        // SAFETY: this thread is counted in `active`, so the caller of `run` is still waiting.
        let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { job.work(worker) }));
        let mut state = shared.lock();
        state.panicked |= outcome.is_err();
        state.active -= 1;
        shared.active.store(state.active, Ordering::Release);
        if state.active == 0 {
            shared.idle.notify_one();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            let mut state = self.shared.lock();
            state.stop = true;
            // A spinning worker leaves its spin on a new epoch and then sees `stop`.
            self.shared.epoch.store(u64::MAX, Ordering::Release);
            self.shared.wake.notify_all();
        }
        for thread in self.threads.drain(..) {
            // A worker catches panics of its tasks, so there is nothing to learn from the result.
            let _ = thread.join();
        }
    }
}

/// A pointer to the start of an output that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct SharedOut(*mut f32);

// SAFETY: whoever derives a pointer from it through `at` promises that tasks write disjoint elements.
unsafe impl Send for SharedOut {}
// SAFETY: as above.
unsafe impl Sync for SharedOut {}

impl SharedOut {
    pub(crate) fn new(out: &mut [f32]) -> Self {
        SharedOut(out.as_mut_ptr())
    }

    /// Pointer to element `index`.
    ///
    /// # Safety
    /// `index` lies in the slice this was made of; no two tasks access the same element.
    #[inline(always)]
    pub(crate) unsafe fn at(self, index: usize) -> *mut f32 {
        // SAFETY: the caller keeps `index` in bounds.
        unsafe { self.0.add(index) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                let busy: Vec<_> = (0..pool.threads()).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|worker, task| {
                    assert_eq!(busy[worker].fetch_add(1, Ordering::SeqCst), 0);
                    counts[task].fetch_add(1, Ordering::SeqCst);
                    busy[worker].fetch_sub(1, Ordering::SeqCst);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::SeqCst) == 1));
            }
        }
    }

    #[test]
    fn many_small_jobs_with_pauses_between() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        for round in 0..200 {
            pool.run(4, &|_, task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            if round % 50 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(2)); // long enough to park
            }
        }
        assert_eq!(sum.into_inner(), 200 * 6);
    }

    #[test]
    fn a_panicking_task_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(2);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.run(64, &|_, task| assert_ne!(task, 40, "expected by this test"));
        }));
        assert!(outcome.is_err());
        let ran = AtomicUsize::new(0);
        pool.run(8, &|_, _| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.into_inner(), 8);
    }
}
