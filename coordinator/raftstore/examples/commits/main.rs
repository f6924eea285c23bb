//! Durable commits per second and their latency: of a group of one or three in this process, each with its own file on
//! the same disk, or of an etcd cluster over gRPC, with records of the same size. `scripts/bench/group_commits.py` runs both
//! side by side.
//!
//! ```console
//! $ cargo run --release -p baton-raftstore --example commits -- --members 3 --writers 64 --seconds 5 --dir DIR
//! $ cargo run --release -p baton-raftstore --example commits -- --etcd http://127.0.0.1:2379,... --writers 64 --seconds 5
//! ```
//!
//! Prints one line of JSON. Every writer waits for its commit before it begins the next, and writes through the leader of
//! the group; etcd's writers share 8 connections per endpoint, or one per writer if there are fewer.

mod channel;
mod etcd;

use baton_proto::state::{UsageRecord, UsageStatus};
use baton_raftstore::{RaftStore, RaftStoreConfig};
use channel::Channels;
use hdrhistogram::Histogram;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a value of etcd's: an encoded [`record`] without its id.
const VALUE_BYTES: usize = 216;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Takes commits: the two systems under test.
#[derive(Clone)]
enum Target {
    Group(RaftStore),
    Etcd(etcd::Client),
}

impl Target {
    async fn commit(&self, id: u64) -> Result<(), Failure> {
        match self {
            Self::Group(store) => {
                store.settle(record(id)).await?;
            }
            Self::Etcd(client) => {
                let name = record(id).request_id;
                client.put(name.into_bytes(), vec![b'm'; VALUE_BYTES], id).await?
            }
        }
        Ok(())
    }
}

/// What a gateway settles: 250 bytes encoded, 34 of them its id. One of 100 keys and 1,000 users, and one of 8 models.
fn record(id: u64) -> UsageRecord {
    let spread = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let user = spread % 1000;
    let now_ms = 1_790_812_800_000 + id;
    UsageRecord {
        request_id: format!("request-{id:026x}"),
        model: format!("open-model-{}-instruct", spread / 1000 % 8),
        status: UsageStatus::Completed.into(),
        prompt_tokens: 1000,
        cached_tokens: 500,
        completion_tokens: 100,
        sampled_tokens: 100,
        attempts: 1,
        prefill_worker_id: "prefill-0123456789ab".into(),
        decode_worker_id: "decode-0123456789ab".into(),
        started_unix_ms: now_ms,
        settled_unix_ms: now_ms + 1000,
        organization_id: "org-01234567".into(),
        project_id: format!("project-{:08}", user % 20),
        key_id: format!("key-{:08}", user % 100),
        user: format!("user-{user:08}"),
        revision: "4f1c2d9".into(),
        endpoint: "/v1/chat/completions".into(),
        service_tier: "default".into(),
        ..UsageRecord::default()
    }
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut options: HashMap<&str, &str> = HashMap::new();
    for pair in arguments.chunks(2) {
        let [name, value] = pair else {
            return Err(format!("{} wants a value", pair[0]).into());
        };
        options.insert(name.trim_start_matches("--"), value);
    }
    let number = |name: &str, default: u64| -> Result<u64, Failure> {
        options.get(name).map_or(Ok(default), |value| Ok(value.parse()?))
    };
    let (writers, members) = (number("writers", 64)?, number("members", 1)?);
    let seconds = Duration::from_secs(number("seconds", 5)?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    if let Some(endpoints) = options.get("etcd") {
        let endpoints: Vec<String> = endpoints.split(',').map(str::to_owned).collect();
        let client = runtime.block_on(etcd::Client::connect(&endpoints, writers))?;
        return measure(
            &runtime,
            "etcd",
            Target::Etcd(client),
            endpoints.len() as u64,
            writers,
            seconds,
        );
    }
    let dir = options.get("dir").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = dir.join(format!("commits-{}", std::process::id()));
    let channels = Channels::default();
    let ids: Vec<u64> = (1..=members).collect();
    let mut stores = Vec::new();
    for &id in &ids {
        let config = RaftStoreConfig::member(id, ids.clone());
        let store = RaftStore::open_with_peers(&dir.join(id.to_string()), &config, channels.peers(id))?;
        channels.connect(id, &store);
        stores.push(store);
    }
    let leader = loop {
        if let Some(leader) = stores.iter().find(|store| store.status().leads) {
            break leader.clone();
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let result = measure(
        &runtime,
        "baton",
        Target::Group(leader.clone()),
        members,
        writers,
        seconds,
    );
    let status = leader.status();
    eprintln!(
        "{:.1} commands per batch, first index {}, applied {}",
        status.proposals_total as f64 / status.batches_total.max(1) as f64,
        status.first_index,
        status.applied_index
    );
    drop(leader);
    channels.close();
    for id in ids {
        let length = |name| std::fs::metadata(dir.join(id.to_string()).join(name)).map(|file| file.len() >> 20);
        eprintln!(
            "member {id}: log {} MiB, state {} MiB",
            length("raft.redb")?,
            length("state.redb")?
        );
    }
    std::fs::remove_dir_all(&dir)?;
    result
}

/// A second of warm-up, then `seconds` that count.
fn measure(
    runtime: &tokio::runtime::Runtime,
    system: &str,
    target: Target,
    members: u64,
    writers: u64,
    seconds: Duration,
) -> Result<(), Failure> {
    let next = Arc::new(AtomicU64::new(0));
    let from = Instant::now() + Duration::from_secs(1);
    let to = from + seconds;
    let tasks: Vec<_> = (0..writers)
        .map(|_| {
            let (target, next) = (target.clone(), next.clone());
            runtime.spawn(async move {
                let mut micros = Vec::new();
                loop {
                    let began = Instant::now();
                    if began >= to {
                        return Ok::<_, Failure>(micros);
                    }
                    target.commit(next.fetch_add(1, Ordering::Relaxed)).await?;
                    let ended = Instant::now();
                    if began >= from && ended <= to {
                        micros.push((ended - began).as_micros() as u64);
                    }
                }
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
        "{{\"system\":\"{system}\",\"members\":{members},\"writers\":{writers},\"commits_per_s\":{:.0},\"p50_ms\":{:.2},\"p99_ms\":{:.2}}}",
        latency.len() as f64 / seconds.as_secs_f64(),
        latency.value_at_quantile(0.5) as f64 / 1e3,
        latency.value_at_quantile(0.99) as f64 / 1e3,
    );
    Ok(())
}
