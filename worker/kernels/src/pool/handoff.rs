//! Hands one job at a time from a caller to workers: atomics while everybody is awake, a lock only around sleep.
//!
//! Everything hangs on one word: an epoch that counts jobs, whether the job is open to join, and how many workers are in
//! it.
//!
//! ```text
//! publish:  epoch + 1, OPEN, 0 active    only while closed with 0 active: nobody reads the job then
//! join:     active + 1                   compare-and-swap, only while OPEN
//! leave:    active - 1
//! close:    not OPEN, then wait for 0 active
//! ```
//!
//! So after `close` nobody is in the job and nobody can get in: what the job points to may go. A worker that is late
//! (asleep, or off its core) is not waited for; it finds the job closed.
//!
//! Sleep is the usual pairing of "announce, fence, look" on both sides: a worker counts itself as a sleeper and then
//! looks at the word, the caller changes the word and then looks for sleepers, with a sequentially consistent fence
//! between, so at least one of them sees the other. The lock is taken only then.
//!
//! Runs no job and owns no thread: `pool` does. `cargo test` checks it with real threads; with `--cfg loom` the
//! interleavings of small cases are tried (see the tests below).

use std::time::Duration;

use sync::{AtomicU64, AtomicUsize, Condvar, Mutex, MutexGuard, Ordering, PoisonError, UnsafeCell, fence};

/// The primitives, or loom's models of them.
mod sync {
    #[cfg(loom)]
    pub(super) use loom::{
        cell::UnsafeCell,
        sync::atomic::{AtomicU64, AtomicUsize, fence},
        sync::{Condvar, Mutex, MutexGuard},
    };
    #[cfg(not(loom))]
    pub(super) use std::sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, AtomicUsize, fence},
    };
    pub(super) use std::sync::{PoisonError, atomic::Ordering};

    /// loom's interface over the real cell.
    #[cfg(not(loom))]
    pub(super) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    #[cfg(not(loom))]
    impl<T> UnsafeCell<T> {
        pub(super) fn new(value: T) -> Self {
            UnsafeCell(std::cell::UnsafeCell::new(value))
        }
        pub(super) fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
            read(self.0.get())
        }
        pub(super) fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
            write(self.0.get())
        }
    }
}

/// Workers in the job.
const ACTIVE: u64 = 0xffff;
/// The job may be joined.
const OPEN: u64 = 1 << 16;
/// The caller sleeps until the last worker leaves.
const CALLER_SLEEPS: u64 = 1 << 17;
/// No more jobs will come.
const STOP: u64 = 1 << 18;
/// One job. The epoch has 45 bits and may wrap: it is only compared for equality with the last one seen.
const EPOCH: u64 = 1 << 19;

/// Pause instructions between two looks at the clock while spinning: some microseconds.
#[cfg(not(loom))]
const PAUSES_PER_LOOK: u32 = 64;

/// Keeps what spinning threads look at away from what others write (adjacent lines are fetched in pairs).
#[repr(align(128))]
struct Line<T>(T);

/// See the module.
pub(super) struct Handoff<J> {
    word: Line<AtomicU64>,
    job: UnsafeCell<Option<J>>,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    /// Workers sleep here.
    published: Condvar,
    /// The caller sleeps here.
    emptied: Condvar,
}

// SAFETY: `job` is written only by `publish`, while the word says closed and empty, and read only by a worker that
// joined; joining is impossible while closed, and the release/acquire pairs on the word order the accesses.
unsafe impl<J: Copy + Send> Sync for Handoff<J> {}

impl<J: Copy + Send> Handoff<J> {
    pub(super) fn new() -> Self {
        Handoff {
            word: Line(AtomicU64::new(0)),
            job: UnsafeCell::new(None),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            published: Condvar::new(),
            emptied: Condvar::new(),
        }
    }

    /// Opens `job` to workers and wakes up to `helpers` sleeping ones. One caller at a time; the job before was closed.
    pub(super) fn publish(&self, job: J, helpers: usize) {
        let word = self.word.0.load(Ordering::Relaxed);
        assert_eq!(word & (OPEN | ACTIVE | STOP), 0, "one job at a time");
        // SAFETY: closed and empty (just checked; `close` acquired the last worker's leaving), and only this caller
        // publishes, so nobody else touches the cell.
        self.job.with_mut(|cell| unsafe { *cell = Some(job) });
        self.word.0.store(word.wrapping_add(EPOCH) | OPEN, Ordering::Release);
        self.wake(helpers);
    }

    /// Ends every worker's [`next`](Self::next) with `None`. The last job was closed.
    pub(super) fn stop(&self) {
        self.word.0.fetch_or(STOP, Ordering::Release);
        self.wake(usize::MAX);
    }

    fn wake(&self, most: usize) {
        fence(Ordering::SeqCst);
        let sleepers = self.sleepers.load(Ordering::Relaxed);
        if sleepers == 0 {
            return;
        }
        // A sleeper that counted itself holds the lock until it waits: after this it hears.
        drop(self.lock());
        if most >= sleepers {
            self.published.notify_all();
        } else {
            (0..most).for_each(|_| self.published.notify_one());
        }
    }

    /// The next job, joined: the worker must `leave` it. `None` after `stop`. `seen` is the worker's own memory of the
    /// last epoch it joined or missed. Spins for `spin` before it sleeps.
    pub(super) fn next(&self, seen: &mut u64, spin: Duration) -> Option<J> {
        loop {
            let news = |word: u64| word & STOP != 0 || (word & OPEN != 0 && epoch(word) != *seen);
            let mut word = match spin_until(spin, || Some(self.word.0.load(Ordering::Acquire)).filter(|w| news(*w))) {
                Some(word) => word,
                None => self.sleep_until(news),
            };
            while word & STOP == 0 && word & OPEN != 0 && epoch(word) != *seen {
                match self
                    .word
                    .0
                    .compare_exchange_weak(word, word + 1, Ordering::Acquire, Ordering::Relaxed)
                {
                    Ok(_) => {
                        *seen = epoch(word);
                        // SAFETY: joined, so `publish` wrote the cell before and writes it again only after this
                        // worker has left.
                        return self.job.with(|cell| unsafe { *cell });
                    }
                    Err(now) => word = now,
                }
            }
            if word & STOP != 0 {
                return None;
            }
        }
    }

    fn sleep_until(&self, news: impl Fn(u64) -> bool) -> u64 {
        let mut guard = self.lock();
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let word = loop {
            let word = self.word.0.load(Ordering::Acquire);
            if news(word) {
                break word;
            }
            guard = self.published.wait(guard).unwrap_or_else(PoisonError::into_inner);
        };
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
        word
    }

    /// The worker touches nothing of the job any more.
    pub(super) fn leave(&self) {
        let before = self.word.0.fetch_sub(1, Ordering::AcqRel);
        if before & ACTIVE == 1 && before & CALLER_SLEEPS != 0 {
            drop(self.lock());
            self.emptied.notify_one();
        }
    }

    /// Nobody joins any more; returns when nobody is in the job. Spins for `spin` before it sleeps.
    pub(super) fn close(&self, spin: Duration) {
        let empty = |word: u64| word & ACTIVE == 0;
        if empty(self.word.0.fetch_and(!OPEN, Ordering::AcqRel)) {
            return;
        }
        if spin_until(spin, || empty(self.word.0.load(Ordering::Acquire)).then_some(())).is_some() {
            return;
        }
        let mut guard = self.lock();
        // The last to leave either sees this bit or has left before it was set.
        let mut word = self.word.0.fetch_or(CALLER_SLEEPS, Ordering::AcqRel);
        while !empty(word) {
            guard = self.emptied.wait(guard).unwrap_or_else(PoisonError::into_inner);
            word = self.word.0.load(Ordering::Acquire);
        }
        self.word.0.fetch_and(!CALLER_SLEEPS, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        // It guards nothing but sleep, so a poisoned one is as good.
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn epoch(word: u64) -> u64 {
    word / EPOCH
}

/// Asks `look` until it answers or `time` is over.
#[cfg(not(loom))]
fn spin_until<T>(time: Duration, look: impl Fn() -> Option<T>) -> Option<T> {
    if let Some(found) = look() {
        return Some(found);
    }
    if time.is_zero() {
        return None;
    }
    let start = std::time::Instant::now();
    loop {
        for _ in 0..PAUSES_PER_LOOK {
            std::hint::spin_loop();
            if let Some(found) = look() {
                return Some(found);
            }
        }
        if start.elapsed() >= time {
            return None;
        }
    }
}

/// Under loom spinning is one look: what comes after is what matters.
#[cfg(loom)]
fn spin_until<T>(_: Duration, look: impl Fn() -> Option<T>) -> Option<T> {
    look()
}

#[cfg(all(test, loom))]
mod exhaustive {
    //! `RUSTFLAGS="--cfg loom" cargo test --release -p baton-kernels --lib exhaustive` (seconds).

    use super::*;
    use loom::sync::Arc;

    /// What a job borrows. loom fails the test if one thread writes it while another may read it.
    struct Alive(UnsafeCell<bool>);

    // SAFETY: not at all by itself: that no two threads meet here is what the test shows.
    unsafe impl Sync for Alive {}

    impl Alive {
        fn get(&self) -> bool {
            // SAFETY: loom checks the access.
            self.0.with(|alive| unsafe { *alive })
        }

        fn set(&self, value: bool) {
            // SAFETY: as above.
            self.0.with_mut(|alive| unsafe { *alive = value });
        }
    }

    /// Two jobs to some workers: what a job points to is alive whenever a worker is in it, every worker hears of
    /// the end, and nobody sleeps for ever. loom also checks every access to the job's cell.
    fn check(workers: usize, preemptions: usize) {
        let mut model = loom::model::Builder::new();
        // The usual bound: what goes wrong goes wrong with few preemptions, and without a bound it takes hours.
        model.preemption_bound = Some(preemptions);
        model.check(move || {
            let handoff = Arc::new(Handoff::<u64>::new());
            let alive = Arc::new([Alive(UnsafeCell::new(false)), Alive(UnsafeCell::new(false))]);
            let threads: Vec<_> = (0..workers)
                .map(|_| {
                    let (handoff, alive) = (handoff.clone(), alive.clone());
                    loom::thread::spawn(move || {
                        let mut seen = 0;
                        while let Some(job) = handoff.next(&mut seen, Duration::ZERO) {
                            assert!(alive[job as usize].get());
                            handoff.leave();
                        }
                    })
                })
                .collect();
            for job in 0..2u64 {
                alive[job as usize].set(true);
                handoff.publish(job, workers);
                handoff.close(Duration::ZERO);
                alive[job as usize].set(false);
            }
            handoff.stop();
            threads.into_iter().for_each(|t| t.join().unwrap());
        });
    }

    #[test]
    fn exhaustive_with_one_worker() {
        check(1, 4);
    }

    #[test]
    fn exhaustive_with_two_workers() {
        check(2, 2);
    }
}
