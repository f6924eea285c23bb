//! What the tiers' media do with blocks of a given size, one after another: copy, checksum, disk, and a directory as a store.
//!
//! `cargo run --release -p baton-tiers --example media -- BLOCK_KIB BLOCKS DIR`. Reads come from the system's page cache
//! unless DIR is larger than memory: that is what a worker sees after a restart, too.

use std::collections::VecDeque;
use std::time::Instant;

use baton_tiers::record::{Entry, Shape};
use baton_tiers::{DiskTier, ObjectTier, Pool, Read};

const BUFFERS: usize = 512;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: usize| args.get(at).and_then(|a| a.parse().ok()).unwrap_or(default);
    let (block_bytes, blocks) = (number(0, 192) << 10, number(1, 1000));
    let dir = args
        .get(2)
        .map_or_else(std::env::temp_dir, Into::into)
        .join("baton-media");
    let shape = Shape {
        kv_digest: [1; 32],
        block_bytes,
    };
    let name = |n: usize| {
        *blake3::hash(&n.to_le_bytes())
            .as_bytes()
            .first_chunk()
            .expect("32 bytes")
    };
    let source: Vec<u8> = (0..block_bytes).map(|i| (i * 31) as u8).collect();
    let pool = Pool::new(block_bytes, BUFFERS);
    let fill = |to: &mut [u8]| {
        to.copy_from_slice(&source);
        true
    };
    println!("{blocks} blocks of {} KiB", block_bytes >> 10);
    let report = |what: &str, started: Instant, good: usize| {
        let seconds = started.elapsed().as_secs_f64();
        let rate = (blocks * block_bytes) as f64 / seconds / 1e9;
        println!(
            "{what:24} {:8.1} us/block {rate:7.2} GB/s {good} good",
            seconds * 1e6 / blocks as f64
        );
    };

    // All buffers in turn, so that copies leave the caches as a worker's do.
    let kept: Vec<_> = (0..BUFFERS).filter_map(|_| pool.fill(fill)).collect();
    let mut ring: VecDeque<_> = kept.into();
    let (started, mut good) = (Instant::now(), 0);
    for _ in 0..blocks {
        ring.pop_front();
        ring.extend(pool.fill(fill));
        good += 1;
    }
    drop(ring);
    report("copy (warm buffers)", started, good);
    let started = Instant::now();
    let sums = (0..blocks).filter(|n| {
        let (name, stamp) = (name(*n), *n as u64);
        shape.header(Entry { name, parent: 0, stamp }, &source)[96] != 0
    });
    report("header and checksum", started, sums.count());

    let budget = (blocks * (block_bytes + 1024)) as u64;
    let (disk, _) = DiskTier::open(&dir.join("disk"), budget, shape).expect("a usable directory");
    let started = Instant::now();
    let written = (0..blocks).filter(|n| disk.write(*n as u32, name(*n), 0, &source));
    report("disk write", started, written.count());
    let started = Instant::now();
    let read = (0..blocks).filter(|n| matches!(disk.read(*n as u32, &name(*n), &pool), Read::Found(_)));
    report("disk read, verified", started, read.count());
    drop(disk);
    let started = Instant::now();
    let (_disk, found) = DiskTier::open(&dir.join("disk"), budget, shape).expect("a usable directory");
    report("disk scan on opening", started, found.len());

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let url = format!("file://{}", dir.join("store").display());
        let store = ObjectTier::open(&url, shape, []).expect("a usable directory");
        let (started, mut good) = (Instant::now(), 0);
        for n in 0..blocks {
            good += usize::from(store.put(name(n), 0, pool.fill(fill).expect("a buffer")).await);
        }
        report("store put (directory)", started, good);
        let (started, mut good) = (Instant::now(), 0);
        for n in 0..blocks {
            good += usize::from(matches!(store.get(name(n), &pool).await, Read::Found(_)));
        }
        report("store get, verified", started, good);
    });
    let _ = std::fs::remove_dir_all(&dir);
}
