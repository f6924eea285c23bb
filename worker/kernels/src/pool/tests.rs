//! The pool with real threads; `handoff` has the exhaustive test of the protocol.

use super::*;
use proptest::prelude::*;

/// How threads can differ in waiting: as this machine allows, never spinning, pinned (or refused) to cores.
fn pools(threads: usize) -> Vec<Pool> {
    let quiet = PoolConfig {
        spin: false,
        ..threads.into()
    };
    vec![
        Pool::new(threads),
        Pool::with_config(&quiet),
        Pool::with_cores(&(0..threads).collect::<Vec<_>>()),
    ]
}

#[test]
fn every_task_runs_exactly_once() {
    for pool in [1, 2, 5].into_iter().flat_map(pools) {
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

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ranges_cover_everything_once_on_multiples(total in 0usize..700, align in 1usize..40, threads in 1usize..6) {
        let pool = Pool::new(threads);
        let counts: Vec<_> = (0..total).map(|_| AtomicUsize::new(0)).collect();
        pool.run_ranges(total, align, &|worker, range| {
            assert!(worker < pool.threads() && !range.is_empty());
            assert!(range.start.is_multiple_of(align) && (range.end == total || range.end.is_multiple_of(align)));
            for index in range {
                counts[index].fetch_add(1, Ordering::Relaxed);
            }
        });
        prop_assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn parts_are_consecutive_and_nearly_equal(start in 0usize..10, len in 0usize..200, parts in 1usize..20) {
        let mut at = start;
        for index in 0..parts {
            let part = part_of(start..start + len, index, parts);
            prop_assert_eq!(part.start, at);
            prop_assert!(part.len() == len / parts || part.len() == len / parts + 1);
            at = part.end;
        }
        prop_assert_eq!(at, start + len);
    }
}

/// A thread that never comes must not keep the job from being done.
#[test]
fn a_share_whose_thread_is_late_is_taken_over() {
    let pool = Pool::new(2);
    for _ in 0..200 {
        let (done, alone) = (AtomicUsize::new(0), AtomicBool::new(false));
        pool.run_ranges(64, 1, &|worker, range| {
            // Whoever begins first stays until the other has done all the rest.
            if !alone.swap(true, Ordering::SeqCst) && worker == 0 {
                let start = std::time::Instant::now();
                while done.load(Ordering::SeqCst) < 60 && start.elapsed() < Duration::from_millis(20) {
                    std::thread::yield_now();
                }
            }
            done.fetch_add(range.len(), Ordering::SeqCst);
        });
        assert_eq!(done.into_inner(), 64);
    }
}

#[test]
fn many_small_jobs_with_pauses_between() {
    for pool in pools(3) {
        let sum = AtomicUsize::new(0);
        for round in 0..2000 {
            pool.run(4, &|_, task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            if round % 100 == 0 {
                std::thread::sleep(Duration::from_millis(1)); // long enough to park
            }
        }
        assert_eq!(sum.into_inner(), 2000 * 6);
    }
}

/// What a job borrows is gone right after it; a worker still in it would read something else.
#[test]
fn nobody_is_in_a_job_that_has_returned() {
    for pool in pools(4) {
        for round in 0..3000usize {
            let data = vec![round; 64];
            let wrong = AtomicUsize::new(0);
            pool.run_ranges(64, 1, &|_, range| {
                wrong.fetch_add(data[range].iter().filter(|d| **d != round).count(), Ordering::Relaxed);
            });
            assert_eq!(wrong.into_inner(), 0);
        }
    }
}

#[test]
fn several_callers_take_turns() {
    let pool = Pool::new(3);
    let busy: Vec<_> = (0..pool.threads()).map(|_| AtomicUsize::new(0)).collect();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for tasks in (1..200).map(|round| round % 4) {
                    let ran = AtomicUsize::new(0);
                    pool.run(tasks, &|worker, _| {
                        assert_eq!(busy[worker].fetch_add(1, Ordering::SeqCst), 0);
                        ran.fetch_add(1, Ordering::Relaxed);
                        busy[worker].fetch_sub(1, Ordering::SeqCst);
                    });
                    assert_eq!(ran.into_inner(), tasks);
                }
            });
        }
    });
}

#[test]
fn a_panicking_task_reaches_the_caller_and_leaves_the_pool_usable() {
    let pool = Pool::new(2);
    for only_worker in [false, true] {
        let met = AtomicUsize::new(0);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.run(2, &|worker, _| {
                // Both threads are in, so each of them runs one task.
                met.fetch_add(1, Ordering::SeqCst);
                while met.load(Ordering::SeqCst) < 2 {
                    std::thread::yield_now();
                }
                assert!(only_worker && worker == 0, "expected by this test");
            });
        }));
        assert!(outcome.is_err());
        let ran = AtomicUsize::new(0);
        pool.run(8, &|_, _| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.into_inner(), 8);
    }
}

#[test]
fn a_core_that_does_not_exist_is_done_without() {
    let pool = Pool::with_cores(&[0, 100_000]);
    std::thread::scope(|scope| scope.spawn(|| pool.pin_caller()).join()).expect("no panic");
    let ran = AtomicUsize::new(0);
    pool.run(8, &|_, _| {
        ran.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(ran.into_inner(), 8);
}
