//! What this machine can do at most: read bandwidth from memory and from caches, and arithmetic peaks, measured with
//! loops that do nothing else. A benchmark states its figures as fractions of these.
//!
//! Measures, decides nothing: no kernel is chosen by what is found here. Needs a machine that does nothing else.

mod peak;
mod read;

use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use peak::Arithmetic;

/// Each figure is the best of this many rounds: a limit is what the machine can do undisturbed.
const ROUNDS: usize = 9;
/// Bytes the memory figures read per round. Far beyond the last-level cache of one socket.
const MEMORY_BYTES: usize = 1 << 30;
/// Bytes of the resident set, over all threads: a layer or two of a small model.
const RESIDENT_BYTES: usize = 64 << 20;
/// Bytes that each thread reads from its own second-level cache: a quarter of the smallest in use today on servers.
const L2_BYTES: usize = 256 << 10;
/// How far ahead of the reads the software prefetch runs, in bytes; the best is reported.
const PREFETCH_DISTANCES: [usize; 4] = [512, 1024, 2048, 4096];
/// Arithmetic loops run at least this long per round, so that clocks settle and starting the threads costs nothing.
const PEAK_ROUND: Duration = Duration::from_millis(60);

/// Bandwidth of one way to read memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ReadFigure {
    /// Whether the memory was asked to be in huge pages.
    pub huge_pages: bool,
    /// Bytes ahead of the reads that were prefetched; `None`: only what the hardware does by itself.
    pub prefetch_bytes: Option<usize>,
    /// 10^9 bytes per second, all threads together.
    pub gb_per_s: f64,
}

/// A peak of one kind of arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PeakFigure {
    /// Which instruction.
    pub arithmetic: Arithmetic,
    /// 10^9 operations per second, all threads together; a multiplication and an addition are two.
    pub gop_per_s: f64,
}

/// Limits of this machine on a number of threads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Threads that took part.
    pub threads: usize,
    /// Reads of a gibibyte, in every way tried.
    pub memory_reads: Vec<ReadFigure>,
    /// Reads of 64 MiB over all threads again and again, 10^9 bytes per second.
    pub resident_gb_per_s: f64,
    /// Reads from each thread's own second-level cache, 10^9 bytes per second, all threads together.
    pub l2_gb_per_s: f64,
    /// Peaks of the arithmetic this CPU has, from registers.
    pub peaks: Vec<PeakFigure>,
}

impl Limits {
    /// Measures on `threads` threads (the caller's included, at least one), in some seconds and a gibibyte and a half
    /// of memory. `progress(done, total)` is called before each figure and at the end.
    ///
    /// # Errors
    /// If the system refuses the memory or a thread.
    pub fn measure(threads: usize, progress: &mut dyn FnMut(usize, usize)) -> std::io::Result<Self> {
        let threads = threads.clamp(1, crate::pool::THREADS_MAX);
        let distances = || std::iter::once(None).chain(PREFETCH_DISTANCES.map(Some));
        let arithmetics = Arithmetic::ALL.iter().filter(|a| a.available());
        let total = 2 * distances().count() + 2 + arithmetics.clone().count();
        let mut done = 0;
        let mut tick = || {
            progress(done, total);
            done += 1;
        };
        let mut memory_reads = Vec::new();
        for huge_pages in [false, true] {
            let buffer = read::Buffer::new(MEMORY_BYTES, threads, huge_pages)?;
            for prefetch_bytes in distances() {
                tick();
                memory_reads.push(ReadFigure {
                    huge_pages,
                    prefetch_bytes,
                    gb_per_s: read_rate(threads, &buffer, 1, prefetch_bytes)?,
                });
            }
        }
        tick();
        let buffer = read::Buffer::new(RESIDENT_BYTES, threads, true)?;
        let resident_gb_per_s = read_rate(threads, &buffer, 8, None)?;
        tick();
        let buffer = read::Buffer::new(L2_BYTES * threads, threads, true)?;
        let l2_gb_per_s = read_rate(threads, &buffer, 4096, None)?;
        let mut peaks = Vec::new();
        for arithmetic in arithmetics {
            tick();
            peaks.push(PeakFigure {
                arithmetic: *arithmetic,
                gop_per_s: peak_rate(threads, *arithmetic)?,
            });
        }
        tick();
        Ok(Limits {
            threads,
            memory_reads,
            resident_gb_per_s,
            l2_gb_per_s,
            peaks,
        })
    }

    /// The best way to read memory, 10^9 bytes per second.
    pub fn memory_gb_per_s(&self) -> f64 {
        self.memory_reads.iter().map(|read| read.gb_per_s).fold(0.0, f64::max)
    }

    /// The best of the given kinds of arithmetic that this CPU has, 10^9 operations per second.
    pub fn best_gop_per_s(&self, kinds: &[Arithmetic]) -> Option<f64> {
        let of_kind = self.peaks.iter().filter(|peak| kinds.contains(&peak.arithmetic));
        of_kind.map(|peak| peak.gop_per_s).reduce(f64::max)
    }
}

fn read_rate(
    threads: usize,
    buffer: &read::Buffer,
    passes: usize,
    prefetch_bytes: Option<usize>,
) -> std::io::Result<f64> {
    let seconds = best_round(threads, &|thread| {
        for _ in 0..passes {
            read::read(buffer.part(thread), prefetch_bytes);
        }
    })?;
    Ok((passes * buffer.len()) as f64 / seconds / 1e9)
}

fn peak_rate(threads: usize, arithmetic: Arithmetic) -> std::io::Result<f64> {
    let trial = 1 << 20;
    let start = Instant::now();
    arithmetic.run(trial);
    let per_iteration = start.elapsed().as_secs_f64() / trial as f64;
    // Not less than the trial, and not endless should the clock stand still.
    let iterations = (PEAK_ROUND.as_secs_f64() / per_iteration.max(1e-12)).clamp(trial as f64, 1e10) as u64;
    let seconds = best_round(threads, &|_| arithmetic.run(iterations))?;
    Ok((threads as u64 * iterations * arithmetic.operations_per_iteration()) as f64 / seconds / 1e9)
}

/// Runs `work(thread)` on all threads at once, several times; the seconds of the fastest round, from the start of the
/// first thread to the end of the last.
fn best_round(threads: usize, work: &(dyn Fn(usize) + Sync)) -> std::io::Result<f64> {
    let (start, end) = (Barrier::new(threads), Barrier::new(threads));
    // Set if the system refuses a thread, before anyone waits for the missing ones.
    let refused = Mutex::new(false);
    let rounds = |thread: usize| {
        if *refused.lock().unwrap_or_else(PoisonError::into_inner) {
            return 0.0;
        }
        let mut best = f64::INFINITY;
        for _ in 0..ROUNDS {
            start.wait();
            let began = Instant::now();
            work(thread);
            end.wait();
            best = best.min(began.elapsed().as_secs_f64());
        }
        best
    };
    std::thread::scope(|scope| {
        let mut held = refused.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in 1..threads {
            let rounds = &rounds;
            let spawned = std::thread::Builder::new().spawn_scoped(scope, move || rounds(thread));
            if let Err(error) = spawned {
                *held = true;
                return Err(error);
            }
        }
        drop(held);
        Ok(rounds(0))
    })
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} threads, best of {ROUNDS} rounds\n", self.threads)?;
        let mut line = |name: String, value: f64, unit: &str| writeln!(f, "{name:<44}{value:>10.1} {unit}");
        for read in &self.memory_reads {
            let pages = if read.huge_pages { "huge pages" } else { "small pages" };
            let how = read
                .prefetch_bytes
                .map_or("plain".to_owned(), |bytes| format!("prefetch {bytes} B ahead"));
            line(format!("memory, {pages}, {how}"), read.gb_per_s, "GB/s")?;
        }
        line("64 MiB read again and again".into(), self.resident_gb_per_s, "GB/s")?;
        line("second-level cache".into(), self.l2_gb_per_s, "GB/s")?;
        for peak in &self.peaks {
            line(peak.arithmetic.to_string(), peak.gop_per_s, "GOP/s")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_thread_works_in_every_round() {
        let counts: Vec<_> = (0..3).map(|_| AtomicUsize::new(0)).collect();
        let pause = Duration::from_millis(2);
        let seconds = best_round(3, &|thread| {
            counts[thread].fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(pause);
        });
        assert!(seconds.expect("threads start") >= pause.as_secs_f64());
        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == ROUNDS));
    }

    #[test]
    fn a_buffer_holds_equal_parts_in_whole_pages() {
        let buffer = read::Buffer::new(100_000, 3, false).expect("memory");
        let parts: Vec<_> = (0..3).map(|part| buffer.part(part)).collect();
        assert_eq!(parts.iter().map(|part| part.len()).sum::<usize>(), buffer.len());
        assert!(buffer.len() >= 100_000 - 3);
        for part in parts {
            assert_eq!(part.len() % 4096, 0);
            read::read(part, Some(1024));
            read::read(part, None);
        }
    }

    #[test]
    fn arithmetic_runs_where_the_cpu_has_it() {
        for arithmetic in Arithmetic::ALL.into_iter().filter(|a| a.available()) {
            arithmetic.run(1000);
            assert!(arithmetic.operations_per_iteration() > 0);
        }
    }
}
