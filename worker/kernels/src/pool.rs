//! A small persistent thread pool: one job at a time, in which the caller takes part.
//!
//! A forward pass is some hundred jobs of microseconds to milliseconds, so between jobs threads spin for a moment and
//! a job costs a few atomic operations and no system call (`handoff`); then they park, because processes share a
//! machine. Threads that would only spin against each other never do: see [`PoolConfig::spin`].
//!
//! Which thread runs which task varies; kernels are written so that this cannot change a bit of the result. Two ways to
//! cut a job: [`Pool::run`] hands tasks out one by one, [`Pool::run_ranges`] gives each thread one run of a long array.
//!
//! # Soundness
//!
//! A job is a pointer to the caller's closure with its lifetime erased. Workers follow it only between joining the job
//! and leaving it; `Handoff::close` returns when nobody can join and nobody is in; and `Finish` calls it before
//! [`Pool::run`] returns or unwinds. So the closure, and all it borrows, outlives every use. A panic in a worker is
//! caught there, before it leaves.
//!
//! No queue, no nesting, no async.

mod cores;
mod handoff;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use handoff::Handoff;

/// How long a worker without a job, or a caller whose workers are not done, spins before it parks: about twice what
/// parking and waking cost, and longer than what lies between the jobs of a forward pass.
const SPIN: Duration = Duration::from_micros(100);

/// No more threads than this, whatever is asked for.
pub const THREADS_MAX: usize = 256;

/// Pieces of one thread's range in [`Pool::run_ranges`]: the others can take over at most what is not begun, so the last
/// thread ends at most about a piece later than the first.
const PIECES: usize = 8;

/// What a thread does in a job; the argument is the thread's number.
type Part<'a> = dyn Fn(usize) + Sync + 'a;

/// The job with its lifetime erased; see the module for why that is sound.
#[derive(Clone, Copy)]
struct Job(*const Part<'static>);

// SAFETY: the pointee is Sync and outlives every use (see the module).
unsafe impl Send for Job {}

/// On a cache line of its own, so that claiming a task does not slow down who reads its neighbours.
#[repr(align(128))]
#[derive(Default)]
struct Counter(AtomicUsize);

/// How many threads, on which cores, and how they wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// Threads that take part in a job, the caller included; clamped to `1..=THREADS_MAX`.
    pub threads: usize,
    /// Core of each thread by number, the caller's first; empty leaves placement to the system, which is right unless the
    /// cores are this pool's alone. Threads beyond the list are not pinned.
    pub cores: Vec<usize>,
    /// Whether threads may spin between jobs. Turn it off where other busy threads share these cores. They do not spin
    /// in any case when this process has fewer cores (by its affinity and its cgroup) than the pool has threads.
    pub spin: bool,
}

impl From<usize> for PoolConfig {
    fn from(threads: usize) -> Self {
        PoolConfig {
            threads,
            cores: Vec::new(),
            spin: true,
        }
    }
}

struct Shared {
    handoff: Handoff<Job>,
    panicked: AtomicBool,
    spin: Duration,
}

/// The pool. Dropping it joins its threads.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    cores: Vec<usize>,
    /// Pieces claimed of each thread's range; meaningful within `run_ranges`.
    claimed: Vec<Counter>,
    /// Serialises callers.
    gate: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` threads, the caller included, clamped to `1..=THREADS_MAX`.
    ///
    /// A thread the system refuses to start is done without (results do not depend on their number).
    pub fn new(threads: usize) -> Self {
        Self::with_config(&threads.into())
    }

    /// One thread per core of the list, pinned to it; the caller's is the first, see [`Pool::pin_caller`]. A core that
    /// this process may not use is logged and its thread left unpinned.
    pub fn with_cores(cores: &[usize]) -> Self {
        Self::with_config(&PoolConfig {
            cores: cores.to_vec(),
            ..cores.len().into()
        })
    }

    /// A pool as described.
    pub fn with_config(config: &PoolConfig) -> Self {
        let threads = config.threads.clamp(1, THREADS_MAX);
        // With more threads than cores a spinning thread only keeps a working one off its core.
        let spins = config.spin && threads <= cores::available() && distinct(&config.cores);
        let shared = Arc::new(Shared {
            handoff: Handoff::new(),
            panicked: AtomicBool::new(false),
            spin: if spins { SPIN } else { Duration::ZERO },
        });
        let threads: Vec<_> = (1..threads)
            .map_while(|worker| {
                let (shared, core) = (Arc::clone(&shared), config.cores.get(worker).copied());
                let serve = move || {
                    core.into_iter().for_each(pin);
                    shared.serve(worker);
                };
                let name = format!("kernel-{worker}");
                let started = std::thread::Builder::new().name(name).spawn(serve);
                started
                    .inspect_err(|error| tracing::warn!(%error, worker, "no more compute threads could be started"))
                    .ok()
            })
            .collect();
        Pool {
            shared,
            claimed: (0..=threads.len()).map(|_| Counter::default()).collect(),
            threads,
            cores: config.cores.clone(),
            gate: Mutex::new(()),
        }
    }

    /// Threads that take part in a job, the caller included.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Pins the calling thread to the first core of the pool, for a thread that is to make all calls. Without a list of
    /// cores this does nothing.
    pub fn pin_caller(&self) {
        self.cores.iter().take(1).copied().for_each(pin);
    }

    /// Runs `body(worker, task)` once for each task in `0..tasks` and returns when all are done. `worker` is below
    /// [`Pool::threads`] and no two tasks run at once with the same one. Tasks are begun in order.
    ///
    /// # Panics
    /// If `body` panics, in whichever thread.
    pub fn run(&self, tasks: usize, body: &(dyn Fn(usize, usize) + Sync)) {
        let gate = self.enter();
        if self.threads.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|task| body(0, task));
            return;
        }
        let next = Counter::default();
        self.join_in(&gate, tasks - 1, &|worker| {
            loop {
                let task = next.0.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    return;
                }
                body(worker, task);
            }
        });
    }

    /// Runs `body(worker, range)` over ranges that together cover `0..total` once. They begin at multiples of `align`.
    ///
    /// Each thread has one contiguous share of about `total / threads`, which it takes in a few pieces from front to
    /// back, so that what it reads comes as one stream; a thread that is done takes pieces of the others. `worker` is as in
    /// [`Pool::run`].
    ///
    /// # Panics
    /// If `body` panics, in whichever thread, or if `align` is 0.
    pub fn run_ranges(&self, total: usize, align: usize, body: &(dyn Fn(usize, Range<usize>) + Sync)) {
        let gate = self.enter();
        let (units, threads) = (total.div_ceil(align), self.threads());
        if threads == 1 || units <= 1 {
            if total > 0 {
                body(0, 0..total);
            }
            return;
        }
        let cut = |unit: usize| (unit * align).min(total);
        self.claimed.iter().for_each(|c| c.0.store(0, Ordering::Relaxed));
        self.join_in(&gate, units - 1, &|worker| {
            for owner in (worker..threads).chain(0..worker) {
                let share = part_of(0..units, owner, threads);
                let pieces = PIECES.min(share.len());
                loop {
                    let piece = self.claimed[owner].0.fetch_add(1, Ordering::Relaxed);
                    if piece >= pieces {
                        break;
                    }
                    let piece = part_of(share.clone(), piece, pieces);
                    body(worker, cut(piece.start)..cut(piece.end));
                }
            }
        });
    }

    fn enter(&self) -> MutexGuard<'_, ()> {
        // A caller that panicked took its job away first (`Finish`), so nothing is half-done.
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `part(worker)` on this thread and on those that join in time; up to `helpers` sleeping ones are woken.
    /// `part` must see to it that the whole job is done whoever comes.
    fn join_in(&self, _gate: &MutexGuard<'_, ()>, helpers: usize, part: &Part<'_>) {
        self.shared.panicked.store(false, Ordering::Relaxed);
        // SAFETY: only the lifetime changes; `finish` below closes the job before this function returns or unwinds.
        let erased = unsafe { std::mem::transmute::<&Part<'_>, &Part<'static>>(part) };
        let finish = Finish(&self.shared);
        self.shared.handoff.publish(Job(erased), helpers);
        part(0);
        drop(finish);
        if self.shared.panicked.load(Ordering::Relaxed) {
            panic!("a kernel thread panicked; its message was printed above");
        }
    }
}

/// Takes the job away and waits until no worker is in it, also when the caller's own part panics.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.handoff.close(self.0.spin);
    }
}

impl Shared {
    fn serve(&self, worker: usize) {
        let mut seen = 0;
        while let Some(Job(part)) = self.handoff.next(&mut seen, self.spin) {
            // SAFETY: this thread has joined the job and has not left it, so the caller of `run` is still waiting.
            if catch_unwind(AssertUnwindSafe(|| unsafe { (*part)(worker) })).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.handoff.leave();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.handoff.stop();
        for thread in self.threads.drain(..) {
            // A worker catches panics of its tasks, so there is nothing to learn from the result.
            let _ = thread.join();
        }
    }
}

/// Part `index` of `parts` nearly equal, consecutive parts of a range.
fn part_of(range: Range<usize>, index: usize, parts: usize) -> Range<usize> {
    // Not `len * index / parts`: that could overflow.
    let (each, more) = (range.len() / parts, range.len() % parts);
    let start = range.start + each * index + more.min(index);
    start..start + each + usize::from(index < more)
}

fn distinct(cores: &[usize]) -> bool {
    (1..cores.len()).all(|i| !cores[..i].contains(&cores[i]))
}

fn pin(core: usize) {
    if !cores::pin_this_thread(core) {
        tracing::warn!(
            core,
            "this thread could not be pinned; it runs wherever the system puts it"
        );
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

#[cfg(all(test, not(loom)))]
mod tests;
