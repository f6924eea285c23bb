//! Measures what handing a job to the pool costs: an empty job, back to back and after a pause long enough to park.
//!
//! `cargo run --release -p baton-kernels --example pool [threads] [park]`; with `park` threads do not spin. Run two at once to
//! see what sharing cores costs.

use baton_kernels::{Pool, PoolConfig};
use std::time::{Duration, Instant};

const ROUNDS: usize = 20_000;

fn main() {
    let threads = std::env::args().nth(1).and_then(|a| a.parse().ok()).unwrap_or(2);
    let spin = std::env::args().nth(2).as_deref() != Some("park");
    let pool = Pool::with_config(&PoolConfig {
        spin,
        ..PoolConfig::from(threads)
    });
    println!(
        "{} threads; microseconds per job, median and 99th percentile",
        pool.threads()
    );
    for tasks in [pool.threads(), 64, 400] {
        report(&format!("{tasks} empty tasks"), ROUNDS, Duration::ZERO, || {
            pool.run(tasks, &|_, _| {});
        });
    }
    report("1000 empty rows by ranges", ROUNDS, Duration::ZERO, || {
        pool.run_ranges(1000, 8, &|_, _| {});
    });
    for task_us in [10, 50] {
        let name = format!("{} tasks of {task_us} us", 2 * pool.threads());
        report(&name, ROUNDS / 10, Duration::ZERO, || {
            pool.run(2 * pool.threads(), &|_, _| busy(Duration::from_micros(task_us)));
        });
    }
    for pause_us in [30, 1000] {
        let name = format!("{} tasks of 50 us after {pause_us} us of nothing", pool.threads());
        report(&name, ROUNDS / 20, Duration::from_micros(pause_us), || {
            pool.run(pool.threads(), &|_, _| busy(Duration::from_micros(50)));
        });
    }
}

fn busy(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

fn report(name: &str, rounds: usize, pause: Duration, job: impl Fn()) {
    let mut times: Vec<f64> = (0..rounds)
        .map(|_| {
            busy(pause);
            let start = Instant::now();
            job();
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_unstable_by(f64::total_cmp);
    println!("{name:42} {:8.2} {:8.2}", times[rounds / 2], times[rounds * 99 / 100]);
}
