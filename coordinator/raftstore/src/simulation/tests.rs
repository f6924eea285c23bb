//! Seeds, bugs, and what the seeds reach.

use super::power::Point;
use super::{Report, run};
use crate::planted::Bug;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Seeds of the normal test run.
const SEEDS: u64 = 200;
/// Seeds that a planted bug may take.
const SEEDS_PER_BUG: u64 = 400;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

/// Runs seeds on both cores; panics with the first that fails.
fn run_all(from: u64, count: u64) -> Vec<Report> {
    let next = AtomicU64::new(from);
    let reports = Mutex::new(Vec::new());
    let began = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get().min(8));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + count {
                        return;
                    }
                    let report = run(seed, None, false);
                    if let Some(violation) = &report.violation {
                        next.store(u64::MAX / 2, Ordering::Relaxed);
                        eprintln!("seed {seed}: {violation}\nreplay: GROUP_SIM_SEED={seed} cargo test -p baton-raftstore --lib simulation::tests::replay -- --nocapture");
                    }
                    let done = {
                        let mut reports = reports.lock().unwrap_or_else(PoisonError::into_inner);
                        reports.push(report);
                        reports.len() as u64
                    };
                    if done.is_multiple_of(1000) {
                        let rate = done as f64 / began.elapsed().as_secs_f64();
                        eprintln!("{done} of {count} seeds, {rate:.0} seeds/s");
                    }
                }
            });
        }
    });
    let reports = reports.into_inner().unwrap_or_else(PoisonError::into_inner);
    eprintln!("{} seeds in {:.1} s", reports.len(), began.elapsed().as_secs_f64());
    reports
}

/// Every seed holds. `GROUP_SIM_SEEDS=100000`, and `GROUP_SIM_FROM`, for more.
#[test]
fn every_seed_holds() {
    let count = variable("GROUP_SIM_SEEDS").unwrap_or(SEEDS);
    let reports = run_all(variable("GROUP_SIM_FROM").unwrap_or(0), count);
    let failed: Vec<_> = reports.iter().filter_map(|report| report.violation.clone()).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    // The seeds reach what they are for.
    let sum = |of: fn(&Report) -> u64| reports.iter().map(of).sum::<u64>();
    let points: BTreeSet<Point> = reports.iter().flat_map(|report| report.points.clone()).collect();
    let sums = [
        sum(|report| report.entries),
        sum(|report| report.answers),
        sum(|report| report.reads),
        sum(|report| report.rows),
        sum(|report| report.changes),
        sum(|report| report.snapshots),
        sum(|report| report.restored),
    ];
    eprintln!("entries, answers, reads, rows, changes, snapshots, restored: {sums:?}; power lost at {points:?}");
    if count >= SEEDS {
        assert_eq!(points, BTreeSet::from(Point::ALL));
        for (sum, least) in sums.into_iter().zip([150, 100, 50, 16, 0, 1, 1]) {
            assert!(sum * 2 > least * count, "{sums:?}");
        }
    }
}

/// One seed, with its trace: `GROUP_SIM_SEED=7`, and `GROUP_SIM_BUG=VoteNotSaved` to plant one.
#[test]
fn replay() {
    let seed = variable("GROUP_SIM_SEED").unwrap_or(1);
    let bug = std::env::var("GROUP_SIM_BUG").ok();
    let bug = Bug::ALL.iter().find(|(known, _)| Some(format!("{known:?}")) == bug);
    let report = run(seed, bug.map(|(bug, _)| *bug), true);
    for line in &report.trace {
        println!("{line}");
    }
    assert!(report.trace.len() > 20);
    assert_eq!(report.violation, None, "seed {seed}");
}

#[test]
fn a_seed_is_the_same_twice() {
    for seed in 0..8 {
        let first = run(seed, None, true);
        let second = run(seed, None, true);
        for (first, second) in first.trace.iter().zip(&second.trace) {
            assert_eq!(first, second, "seed {seed}");
        }
        assert_eq!(first.trace.len(), second.trace.len(), "seed {seed}");
    }
}

/// The number of seeds that each planted bug takes.
#[test]
fn planted_bugs_are_found() {
    let next = AtomicU64::new(0);
    let found = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed) as usize;
                    let Some((bug, about)) = Bug::ALL.get(at) else { return };
                    let began = Instant::now();
                    let first =
                        (0..SEEDS_PER_BUG).find_map(|seed| Some((seed, run(seed, Some(*bug), false).violation?)));
                    let line = match first {
                        Some((seed, violation)) => Ok(format!("| `{bug:?}` |{about} | {} | {violation} |", seed + 1)),
                        None => Err(format!("{bug:?}")),
                    };
                    eprintln!("{line:?} in {:.1} s", began.elapsed().as_secs_f64());
                    found.lock().unwrap_or_else(PoisonError::into_inner).push((at, line));
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_by_key(|(at, _)| *at);
    let missed: Vec<_> = found.iter().filter_map(|(_, line)| line.clone().err()).collect();
    for line in found.iter().filter_map(|(_, line)| line.as_ref().ok()) {
        println!("{line}");
    }
    assert!(missed.is_empty(), "not found within {SEEDS_PER_BUG} seeds: {missed:?}");
}
