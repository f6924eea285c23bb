//! A member's store with a large ledger: how fast it fills, what it takes on disk and in memory, and how fast it answers, is
//! saved, restored and started then. A group of one, the real files, the real path of every command.
//!
//! ```console
//! $ cargo build --release -p baton-raftstore --example ledger_scale
//! $ ledger_scale fill    DIR 10000000 [SECONDS]    until that many records are settled; goes on where it stopped
//! $ ledger_scale measure DIR 10000000              settling by 64 writers, reports, pages of the feed, a clean stop
//! $ ledger_scale open    DIR                       how long a start takes
//! $ ledger_scale die     DIR 10000000              settles for two seconds, then kills itself with SIGKILL
//! $ ledger_scale save    DIR FILE                  a backup
//! $ ledger_scale restore FILE DIR                  a store from it
//! ```
//!
//! Each step is a process of its own, so that its peak memory is its own. The number of records fixes all of them:
//! they lie evenly over 30 days of replicated time (see `records`). `docs/benchmarks/ledger` holds runs of it.

mod queries;
mod records;
mod settling;

use baton_raftstore::{RaftStore, RaftStoreConfig};
use records::Records;
use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::Path;
use std::time::{Duration, Instant};

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    match arguments[..] {
        ["fill", dir, records] => settling::fill(&runtime, &open(dir)?, dir, Records::of(records)?, None)?,
        ["fill", dir, records, seconds] => {
            let limit = Duration::from_secs(seconds.parse()?);
            settling::fill(&runtime, &open(dir)?, dir, Records::of(records)?, Some(limit))?;
        }
        ["measure", dir, records] => {
            let (records, store) = (Records::of(records)?, open(dir)?);
            memory("after the start");
            queries::run(&store, records)?;
            memory("after the reports");
            settling::measure(&runtime, &store, records, 64, Duration::from_secs(10))?;
            size(dir);
            let began = Instant::now();
            store.close();
            drop(store);
            println!("clean stop: {:.2} s", began.elapsed().as_secs_f64());
        }
        ["open", dir] => drop(open(dir)?),
        ["die", dir, records] => {
            let (records, store) = (Records::of(records)?, open(dir)?);
            settling::measure(&runtime, &store, records, 64, Duration::from_secs(2))?;
            let id = std::process::id().to_string();
            std::process::Command::new("kill").args(["-9", &id]).status()?;
        }
        ["save", dir, file] => {
            let store = open(dir)?;
            let began = Instant::now();
            let mut to = BufWriter::with_capacity(1 << 20, File::create(file)?);
            let info = store.save(&mut to)?;
            to.into_inner()?.sync_all()?;
            report_copy("save", info.pairs, info.bytes, began);
        }
        ["restore", file, dir] => {
            let began = Instant::now();
            let mut from = BufReader::with_capacity(1 << 20, File::open(file)?);
            let info = baton_raftstore::restore(&mut from, Path::new(dir), 1)?;
            report_copy("restore", info.pairs, info.bytes, began);
            size(dir);
        }
        _ => return Err("see the top of examples/ledger_scale/main.rs for what it takes".into()),
    }
    memory("at the end");
    Ok(())
}

fn open(dir: &str) -> Result<RaftStore, Failure> {
    let began = Instant::now();
    let config = RaftStoreConfig {
        propose_timeout_ms: 60_000,
        ..RaftStoreConfig::single()
    };
    let store = RaftStore::open(Path::new(dir), &config)?;
    let took = began.elapsed().as_secs_f64();
    println!("start: {took:.2} s, {} rows", store.position()?.settled);
    Ok(store)
}

fn report_copy(what: &str, pairs: u64, bytes: u64, began: Instant) {
    let took = began.elapsed().as_secs_f64();
    let mib = bytes as f64 / f64::from(1 << 20);
    println!(
        "{what}: {took:.1} s, {pairs} pairs, {mib:.0} MiB, {:.0} MiB/s",
        mib / took
    );
}

fn size(dir: &str) {
    println!("on disk: {:.0} MiB", file_mib(dir));
}

fn file_mib(dir: &str) -> f64 {
    let length = |name| std::fs::metadata(Path::new(dir).join(name)).map_or(0, |file| file.len());
    (length("raft.redb") + length("state.redb")) as f64 / f64::from(1 << 20)
}

/// What Linux says of this process; silent elsewhere.
fn memory(when: &str) {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else {
        return;
    };
    let mib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) >> 10
    };
    println!(
        "memory {when}: {} MiB, at most {} MiB so far",
        mib("VmRSS:"),
        mib("VmHWM:")
    );
}
