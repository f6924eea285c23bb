//! One prefix index under one workload: ingest rate, bytes per worker-block pair, and the time of a match, for baton's
//! index and those of the `dynamo-kv-router` crate, on the same blocks in the same order.
//!
//! `router-bench INDEX WORKERS BLOCKS [EVENT_BLOCKS]`, where INDEX is `baton`, `radix`, `compressed` or `positional`. Each
//! run is a process of its own, so that memory is that of one index. Output: one line of `key=value`.
//!
//! The workload: 20 system prompts of 128 blocks that every worker has, and conversations of 384 blocks more, each on one
//! worker. Queries are 8k-token prompts (512 blocks of 16): a conversation that is cached whole, one that leaves it half
//! way, one that shares the system prompt only, and one that nobody has seen (40:30:20:10).

mod alloc;
mod baton;
mod dynamo;

use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: alloc::Counting = alloc::Counting;

const SYSTEM_PROMPTS: u64 = 20;
const SYSTEM_BLOCKS: u64 = 128;
const PROMPT_BLOCKS: u64 = 512;
const QUERIES: usize = 20_000;

/// splitmix64's mixer: a name from a path.
pub fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Names of blocks `from..to` of a conversation; those of its system prompt are shared.
pub fn names(conversation: u64, from: u64, to: u64) -> impl Iterator<Item = u64> {
    let system = conversation % SYSTEM_PROMPTS;
    (from..to).map(move |block| {
        let owner = if block < SYSTEM_BLOCKS {
            system
        } else {
            1000 + conversation
        };
        mix(owner << 20 | block)
    })
}

/// What a worker stores, in order: runs of at most `event_blocks` blocks with the block before each.
pub fn runs(worker: u64, workers: u64, blocks: u64, event_blocks: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let suffix = PROMPT_BLOCKS - SYSTEM_BLOCKS;
    let conversations = blocks.saturating_sub(SYSTEM_PROMPTS * SYSTEM_BLOCKS) / suffix;
    let systems = (0..SYSTEM_PROMPTS).map(|system| (system, 0, SYSTEM_BLOCKS));
    let own = (0..conversations).map(move |i| {
        // Spread so that every system prompt is as common.
        let conversation = (i * workers + worker) * SYSTEM_PROMPTS + i % SYSTEM_PROMPTS;
        (conversation, SYSTEM_BLOCKS, PROMPT_BLOCKS)
    });
    systems.chain(own).flat_map(move |(conversation, from, to)| {
        (from..to)
            .step_by(event_blocks as usize)
            .map(move |at| (conversation, at, (at + event_blocks).min(to)))
    })
}

/// The blocks of a random query.
pub fn query(n: u64, workers: u64, blocks: u64) -> Vec<u64> {
    let conversations = blocks.saturating_sub(SYSTEM_PROMPTS * SYSTEM_BLOCKS) / (PROMPT_BLOCKS - SYSTEM_BLOCKS);
    let random = mix(n ^ 0x5151_0000_0000);
    let i = random % conversations.max(1);
    let conversation = (i * workers + mix(random) % workers) * SYSTEM_PROMPTS + i % SYSTEM_PROMPTS;
    let known = match mix(random ^ 7) % 10 {
        0..4 => PROMPT_BLOCKS,
        4..7 => SYSTEM_BLOCKS + mix(random ^ 9) % (PROMPT_BLOCKS - SYSTEM_BLOCKS),
        7..9 => SYSTEM_BLOCKS,
        _ => 0,
    };
    let unknown = (known..PROMPT_BLOCKS).map(|block| mix(n << 24 | block | 1 << 60));
    names(conversation, 0, known).chain(unknown).collect()
}

pub struct Report {
    /// Time to take the workload in, without making it.
    pub ingest: Duration,
    pub pairs: u64,
    pub events: u64,
    /// What queries returned, summed: the same for every index.
    pub checksum: u64,
    /// One time per query of each kind.
    pub times: Vec<(&'static str, Vec<Duration>)>,
}

/// Runs a query many times on prompts that differ.
pub fn timed(workers: u64, blocks: u64, mut run: impl FnMut(&[u64]) -> u64) -> (Vec<Duration>, u64) {
    let mut checksum = 0;
    let times = (0..QUERIES as u64)
        .map(|n| {
            let names = query(n, workers, blocks);
            let started = Instant::now();
            let result = run(&names);
            let took = started.elapsed();
            checksum += result;
            took
        })
        .collect();
    (times, checksum)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let number = |at: usize| args.get(at).and_then(|arg| arg.parse::<u64>().ok());
    let (Some(index), Some(workers), Some(blocks)) = (args.get(1), number(2), number(3)) else {
        eprintln!("usage: router-bench baton|radix|compressed|positional WORKERS BLOCKS [EVENT_BLOCKS]");
        std::process::exit(2);
    };
    let event_blocks = number(4).unwrap_or(32);
    let before = alloc::bytes();
    let mut bytes = 0;
    let mut full = || bytes = alloc::bytes() - before;
    let report = match index.as_str() {
        "baton" => baton::run(workers, blocks, event_blocks, &mut full),
        "radix" => dynamo::radix(workers, blocks, event_blocks, &mut full),
        "compressed" => dynamo::compressed(workers, blocks, event_blocks, &mut full),
        "positional" => dynamo::positional(workers, blocks, event_blocks, &mut full),
        other => panic!("no index {other:?}"),
    };
    print!(
        "index={index} workers={workers} blocks_per_worker={blocks} blocks_per_event={event_blocks} pairs={} events={} \
         ingest_s={:.3} pairs_per_s={:.0} events_per_s={:.0} bytes_per_pair={:.1} checksum={}",
        report.pairs,
        report.events,
        report.ingest.as_secs_f64(),
        report.pairs as f64 / report.ingest.as_secs_f64(),
        report.events as f64 / report.ingest.as_secs_f64(),
        bytes as f64 / report.pairs as f64,
        report.checksum,
    );
    for (name, mut times) in report.times {
        times.sort();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_nanos() as f64 / 1000.0;
        print!(
            " {name}_p50_us={:.1} {name}_p99_us={:.1} {name}_p999_us={:.1} {name}_max_us={:.1}",
            at(0.5),
            at(0.99),
            at(0.999),
            at(1.0)
        );
    }
    println!();
}
