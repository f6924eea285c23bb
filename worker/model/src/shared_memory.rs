//! A communicator between threads of one process, through memory that they share.
//!
//! # Design
//!
//! Ranks meet at a counter that only grows: a rank adds one and waits until the counter has reached `size` times its number of
//! meetings, spinning briefly and then parked. To sum, each rank copies its values to a buffer of its own, meets the
//! others, and adds up all buffers in rank order: every rank does all additions, which for two or four ranks costs less
//! than a second meeting would. There are two buffers per rank, used in turn: who fills one again has met the others
//! after they read it (they came to the meeting in between), so one meeting per sum is enough.
//!
//! The buffers' locks are never waited for by that argument; they are what makes it safe without `unsafe`.

use crate::communicator::Communicator;
use crate::error::ModelError;
use crate::ops::OpResult;
use crate::shard::Shard;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

/// How many pause instructions a rank spins before it parks: roughly 100 microseconds. Ranks with equal shares and cores
/// of their own come within a few microseconds of each other; parking and waking would cost more than that.
const SPIN_MAX: u32 = 4_000;

/// A parked rank looks up this often...
const WAIT_SLICE: Duration = Duration::from_millis(100);
/// ...and gives the others up after this many times, a minute: between two meetings lies half a layer of the largest
/// batch, seconds at worst. Counted in slices so that a process that was stopped and continued does not give up.
const WAIT_SLICES_MAX: u32 = 600;

/// On cache lines of its own, so that ranks spinning on it do not slow down who uses its neighbours.
#[derive(Default)]
#[repr(align(128))]
struct Counter(AtomicU64);

#[derive(Default)]
struct State {
    parked: usize,
    /// The rank that aborted first, and why.
    aborted: Option<(usize, String)>,
}

/// What the ranks share.
struct Group {
    size: usize,
    spin: u32,
    wait_slices: u32,
    arrivals: Counter,
    /// Mirrors `state.aborted.is_some()`, to spin on.
    aborted: AtomicBool,
    state: Mutex<State>,
    wake: Condvar,
    /// Two per rank, used in turn. They keep the capacity of the largest batch.
    sums: Vec<[RwLock<Vec<f32>>; 2]>,
    /// One per rank.
    gathered: Vec<RwLock<Vec<f32>>>,
}

impl Group {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Consistent at every unlock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn abort(&self, rank: usize, reason: &str) {
        let mut state = self.lock();
        if state.aborted.is_none() {
            state.aborted = Some((rank, reason.to_owned()));
        }
        self.aborted.store(true, Ordering::Release);
        self.wake.notify_all();
    }

    fn failure(state: &State) -> OpResult {
        match &state.aborted {
            None => Ok(()),
            Some((rank, reason)) => Err(ModelError::Rank {
                rank: *rank,
                reason: reason.clone(),
            }),
        }
    }
}

/// One rank's end; see the module.
pub struct SharedMemory {
    shard: Shard,
    group: Arc<Group>,
    meetings: u64,
    sums: usize,
}

impl SharedMemory {
    /// The ends of a group, in rank order. `spin` only where every rank has cores of its own.
    pub fn group(size: usize, spin: bool) -> Vec<Self> {
        Self::group_waiting(size, spin, WAIT_SLICES_MAX)
    }

    fn group_waiting(size: usize, spin: bool, wait_slices: u32) -> Vec<Self> {
        let group = Arc::new(Group {
            size,
            spin: if spin { SPIN_MAX } else { 0 },
            wait_slices,
            arrivals: Counter::default(),
            aborted: AtomicBool::new(false),
            state: Mutex::default(),
            wake: Condvar::new(),
            sums: (0..size).map(|_| Default::default()).collect(),
            gathered: (0..size).map(|_| RwLock::default()).collect(),
        });
        let end = |shard: Shard| SharedMemory {
            shard,
            group: Arc::clone(&group),
            meetings: 0,
            sums: 0,
        };
        Shard::all(size).map(end).collect()
    }

    /// Waits until the counter has reached `target`.
    fn wait(&self, target: u64) -> OpResult {
        let group = &*self.group;
        let arrivals = &group.arrivals.0;
        for _ in 0..group.spin {
            if arrivals.load(Ordering::Acquire) >= target || group.aborted.load(Ordering::Acquire) {
                break;
            }
            std::hint::spin_loop();
        }
        if arrivals.load(Ordering::Acquire) >= target && !group.aborted.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut state = group.lock();
        let mut slices = 0;
        // Whoever comes last looks for parked ranks under the lock after counting itself: no wake-up is lost.
        while state.aborted.is_none() && arrivals.load(Ordering::Acquire) < target {
            if slices == group.wait_slices {
                drop(state);
                group.abort(
                    self.shard.rank(),
                    "it waited for the other ranks in vain; one of them hangs",
                );
                return Group::failure(&group.lock());
            }
            slices += 1;
            state.parked += 1;
            let woken = group.wake.wait_timeout(state, WAIT_SLICE);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
            state.parked -= 1;
        }
        Group::failure(&state)
    }

    fn publish(to: &RwLock<Vec<f32>>, values: &[f32]) {
        let mut to = to.write().unwrap_or_else(PoisonError::into_inner);
        to.clear();
        to.extend_from_slice(values);
    }
}

impl Communicator for SharedMemory {
    fn shard(&self) -> Shard {
        self.shard
    }

    fn all_reduce(&mut self, values: &mut [f32]) -> OpResult {
        let turn = self.sums % 2;
        self.sums += 1;
        Self::publish(&self.group.sums[self.shard.rank()][turn], values);
        self.barrier()?;
        for (rank, buffers) in self.group.sums.iter().enumerate() {
            let part = buffers[turn].read().unwrap_or_else(PoisonError::into_inner);
            if part.len() != values.len() {
                let reason = format!("it summed {} values and rank {rank} {}", values.len(), part.len());
                self.abort(&reason);
                return Group::failure(&self.group.lock());
            }
            match rank {
                0 => values.copy_from_slice(&part),
                _ => values.iter_mut().zip(part.iter()).for_each(|(v, p)| *v += p),
            }
        }
        Ok(())
    }

    fn gather(&mut self, values: &[f32], visit: &mut dyn FnMut(usize, &[f32])) -> OpResult {
        let rank = self.shard.rank();
        if rank > 0 {
            Self::publish(&self.group.gathered[rank], values);
        }
        self.barrier()?;
        if rank == 0 {
            visit(0, values);
            for (rank, part) in self.group.gathered.iter().enumerate().skip(1) {
                visit(rank, &part.read().unwrap_or_else(PoisonError::into_inner));
            }
        }
        // The others wait here, so that nobody fills a buffer again while it is read.
        self.barrier()
    }

    fn barrier(&mut self) -> OpResult {
        let group = &*self.group;
        self.meetings += 1;
        let target = self.meetings * group.size as u64;
        if group.arrivals.0.fetch_add(1, Ordering::AcqRel) + 1 < target {
            return self.wait(target);
        }
        let state = group.lock();
        if state.parked > 0 {
            group.wake.notify_all();
        }
        Group::failure(&state)
    }

    fn abort(&self, reason: &str) {
        self.group.abort(self.shard.rank(), reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs one thread per rank.
    fn run<T: Send>(ends: Vec<SharedMemory>, body: impl Fn(SharedMemory) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = ends.into_iter().map(|end| scope.spawn(|| body(end))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    #[test]
    fn sums_are_in_rank_order_on_every_rank_every_time() {
        for (size, spin) in [(2, true), (3, false), (5, true)] {
            let value = |rank: usize, round: usize, i: usize| {
                // Magnitudes far apart, so that another order gives other bits.
                (1 + (rank * 7 + i * 3 + round) % 11) as f32 * 10f32.powi((rank * 5 + i) as i32 % 9 - 4)
            };
            let all = run(SharedMemory::group(size, spin), |mut end| {
                let rank = end.shard().rank();
                let mut bits = Vec::new();
                for round in 0..200 {
                    let mut values: Vec<f32> = (0..1 + round % 40).map(|i| value(rank, round, i)).collect();
                    end.all_reduce(&mut values).unwrap();
                    bits.push(values.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
                    if round % 7 == 0 {
                        end.barrier().unwrap();
                    }
                    if round % 11 == 0 {
                        let mut seen = Vec::new();
                        end.gather(&vec![rank as f32; rank + 1], &mut |from, part| {
                            seen.push((from, part.to_vec()));
                        })
                        .unwrap();
                        let want = (0..size).map(|r| (r, vec![r as f32; r + 1])).collect::<Vec<_>>();
                        assert_eq!(seen, if rank == 0 { want } else { Vec::new() });
                    }
                }
                bits
            });
            for (round, sums) in all[0].iter().enumerate() {
                for (i, bits) in sums.iter().enumerate() {
                    let want = (1..size).fold(value(0, round, i), |sum, rank| sum + value(rank, round, i));
                    assert_eq!(*bits, want.to_bits());
                }
            }
            assert!(all.iter().all(|bits| bits == &all[0]));
        }
    }

    #[test]
    fn an_abort_ends_every_wait_now_and_later() {
        for spin in [true, false] {
            let errors = run(SharedMemory::group(3, spin), |mut end| {
                if end.shard().rank() == 1 {
                    end.abort("out of luck");
                    end.abort("again");
                }
                let first = end.all_reduce(&mut [1.0]).unwrap_err().to_string();
                assert!(end.barrier().is_err());
                first
            });
            for error in errors {
                assert!(error.contains("rank 1") && error.contains("out of luck"), "{error}");
            }
        }
    }

    #[test]
    fn a_rank_that_never_comes_is_given_up() {
        let mut ends = SharedMemory::group_waiting(2, false, 2);
        let error = ends[0].barrier().unwrap_err();
        assert!(matches!(error, ModelError::Rank { rank: 0, .. }), "{error}");
        assert!(ends[1].barrier().is_err(), "who comes too late is told");
    }

    #[test]
    fn ranks_that_disagree_on_the_size_are_told() {
        let errors = run(SharedMemory::group(2, false), |mut end| {
            let mut values = vec![0.0; 1 + end.shard().rank()];
            let first = end.all_reduce(&mut values);
            first.and_then(|()| end.barrier())
        });
        assert!(errors.iter().all(Result::is_err));
    }
}
