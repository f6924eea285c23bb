//! Settling: as fast as it goes, to fill a ledger, and by a few writers, to see how long each waits.

use super::records::{HOUR_MS, HOURS, Records, command};
use super::{Failure, file_mib, memory, size};
use baton_ledger::checkpoint::SigningKey;
use baton_proto::state::{ClosePeriod, SealPeriod, command::Kind};
use baton_raftstore::RaftStore;
use baton_state::view;
use hdrhistogram::Histogram;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// Writers while the ledger is filled: as many as make full batches, if the records of that many are not too far apart in
/// replicated time for a slice's lease.
const FILLING_WRITERS: u64 = 2048;
/// Time between seals.
const SEAL_EVERY_MS: u64 = 4 * HOUR_MS;

pub fn fill(
    runtime: &Runtime,
    store: &RaftStore,
    dir: &str,
    records: Records,
    limit: Option<Duration>,
) -> Result<(), Failure> {
    let key = SigningKey::from_seed(&[7; 32]);
    let began = Instant::now();
    let first = store.position()?.settled;
    if first == 0 {
        for command in Records::first_commands(&key.public_key()) {
            runtime.block_on(store.propose(command))?;
        }
    }
    let part = (records.0 / 100).clamp(1, 100_000);
    let (mut next, mut sealed_ms) = (first, records.at(first));
    while next < records.0 && limit.is_none_or(|limit| began.elapsed() < limit) {
        let to = (next + part).min(records.0);
        let started = Instant::now();
        settle_all(runtime, store, records, next, to)?;
        println!(
            "{to} of {} records, {:.0}/s, {:.0} MiB on disk",
            records.0,
            (to - next) as f64 / started.elapsed().as_secs_f64(),
            file_mib(dir)
        );
        next = to;
        if records.at(next) >= sealed_ms + SEAL_EVERY_MS {
            sealed_ms = records.at(next);
            runtime.block_on(seal(store, &key, sealed_ms))?;
        }
    }
    let took = began.elapsed().as_secs_f64();
    println!(
        "filled: {} records in {took:.1} s, {:.0}/s",
        next - first,
        (next - first) as f64 / took
    );
    let settled = store.position()?.settled;
    if settled != next {
        return Err(format!("{settled} rows for {next} records").into());
    }
    memory("after filling");
    let began = Instant::now();
    store.close();
    println!("clean stop: {:.2} s", began.elapsed().as_secs_f64());
    size(dir);
    Ok(())
}

fn settle_all(runtime: &Runtime, store: &RaftStore, records: Records, from: u64, to: u64) -> Result<(), Failure> {
    let next = Arc::new(AtomicU64::new(from));
    let writers = (records.0 / (6 * HOURS)).clamp(1, FILLING_WRITERS);
    let tasks: Vec<_> = (0..writers)
        .map(|_| {
            let (store, next) = (store.clone(), next.clone());
            runtime.spawn(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= to {
                        return Ok::<_, Failure>(());
                    }
                    if let Some(lease) = records.lease(number) {
                        store.propose(lease).await?;
                    }
                    store.propose(records.settle(number)).await?;
                }
            })
        })
        .collect();
    for task in tasks {
        runtime.block_on(task)??;
    }
    Ok(())
}

async fn seal(store: &RaftStore, key: &SigningKey, at: u64) -> Result<(), Failure> {
    let after_sequence = view::last_checkpoint(&store.state()?)?.map_or(0, |sealed| sealed.last_sequence);
    store
        .propose(command(at, Kind::ClosePeriod(ClosePeriod { after_sequence })))
        .await?;
    let mut period = view::closed_period(&store.state()?)?.ok_or("nothing was closed")?;
    period.at_unix_ms = at;
    key.sign(&mut period);
    let seal = SealPeriod {
        last_sequence: period.last_sequence,
        public_key: period.public_key,
        signature: period.signature,
    };
    store.propose(command(at, Kind::SealPeriod(seal))).await?;
    Ok(())
}

/// Settles records beyond the ledger's end.
pub fn measure(
    runtime: &Runtime,
    store: &RaftStore,
    records: Records,
    writers: u64,
    duration: Duration,
) -> Result<(), Failure> {
    let first = store.position()?.settled;
    for lease in records.leases(first) {
        runtime.block_on(store.propose(lease))?;
    }
    let next = Arc::new(AtomicU64::new(first));
    let began = Instant::now();
    let tasks: Vec<_> = (0..writers)
        .map(|_| {
            let (store, next) = (store.clone(), next.clone());
            runtime.spawn(async move {
                let mut micros = Vec::new();
                while began.elapsed() < duration {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if let Some(lease) = records.lease(number) {
                        store.propose(lease).await?;
                    }
                    let asked = Instant::now();
                    store.propose(records.settle(number)).await?;
                    micros.push(asked.elapsed().as_micros() as u64);
                }
                Ok::<_, Failure>(micros)
            })
        })
        .collect();
    let mut latency = Histogram::<u64>::new(3)?;
    for task in tasks {
        for micros in runtime.block_on(task)?? {
            latency.record(micros)?;
        }
    }
    println!(
        "settle, {writers} writers: {:.0}/s, p50 {:.2} ms, p99 {:.2} ms, worst {:.1} ms",
        latency.len() as f64 / began.elapsed().as_secs_f64(),
        latency.value_at_quantile(0.5) as f64 / 1e3,
        latency.value_at_quantile(0.99) as f64 / 1e3,
        latency.max() as f64 / 1e3,
    );
    Ok(())
}
