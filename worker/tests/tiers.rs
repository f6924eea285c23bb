//! Prefixes that left the arena come back from host memory, from disk after a restart, and from a store that another
//! worker filled: with the same tokens, counted as cached, and with every block accounted for. What was damaged
//! meanwhile is a miss. The engine is a `MockEngine`, whose tokens are wrong as soon as one byte of KV is.

mod support;

use baton_engine::{MockConfig, MockEngine, MockTiming};
use baton_proto::block_hash::{BlockHash, cache_root, chain, root, short};
use baton_proto::cluster::{KvTiers, Tier};
use baton_proto::worker::Generate;
use baton_worker::{TierConfig, WorkerRole};
use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;
use support::{Answer, Cell, Gateway, request, within};

/// An arena that one of the long prompts below fills by half; so slow that loading pays even on a machine that stutters.
fn engine() -> MockEngine {
    let config = MockConfig {
        total_blocks: 24,
        timing: MockTiming {
            token: Duration::from_micros(500),
            ..MockTiming::default()
        },
        ..MockConfig::default()
    };
    MockEngine::new(config).expect("a valid mock")
}

/// A prompt of twelve blocks and a bit.
fn long(n: u32) -> Generate {
    Generate {
        request_id: format!("long-{n}"),
        prompt: (0..200).map(|i| (n * 101 + i * 7 + i * i % 13) % 500).collect(),
        max_tokens: 10,
        ..request(0)
    }
}

/// The names of its full blocks but the one with the last token, and the short name of what precedes them.
fn names(request: &Generate) -> (u64, Vec<BlockHash>) {
    let salted = cache_root(&[7; 32], &request.cache_salt);
    (short(&root(&salted)), chain(&salted, &request.prompt[..192], 16))
}

async fn worker(cell: &Cell, id: &str, tiers: TierConfig) -> (support::Node, Gateway) {
    let config = baton_worker::WorkerConfig {
        tiers,
        ..cell.config(id, WorkerRole::Combined)
    };
    let node = cell.worker_with(config, engine(), [7; 32]).await;
    let gateway = cell.gateway(&node).await;
    (node, gateway)
}

fn sizes(host: u64, disk: Option<&Path>, object: Option<&Path>) -> TierConfig {
    TierConfig {
        host,
        disk_dir: disk.map(Path::to_owned),
        disk: if disk.is_some() { 8 << 20 } else { 0 },
        object_url: object.map(|dir| format!("file://{}", dir.display())),
    }
}

/// The worker's tiers once `enough` of them.
async fn eventually(cell: &Cell, id: &str, enough: impl Fn(&KvTiers) -> bool) -> KvTiers {
    within("the tiers", async {
        loop {
            let tiers = cell.at_rest(id).await.kv_tiers.expect("there are tiers");
            if enough(&tiers) {
                return tiers;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

async fn all(gateway: &Gateway, numbers: impl Iterator<Item = u32>) -> Vec<Answer> {
    let mut answers = Vec::new();
    for n in numbers {
        answers.push(gateway.generate(long(n)).await);
    }
    answers
}

fn assert_same_tokens(before: &[Answer], after: &[Answer]) {
    for (n, (before, after)) in before.iter().zip(after).enumerate() {
        assert_eq!(before.tokens, after.tokens, "prompt {n}");
        assert_eq!(before.finish.prompt_tokens, after.finish.prompt_tokens);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn evicted_prefixes_come_back_from_host_memory() {
    let cell = Cell::new().await;
    let (_bare, alone) = worker(&cell, "bare", TierConfig::default()).await;
    let (_node, gateway) = worker(&cell, "host", sizes(1 << 20, None, None)).await;
    let expected = all(&alone, 0..8).await;
    let first = all(&gateway, 0..8).await;
    assert!(
        first.iter().all(|answer| answer.finish.cached_tokens == 0),
        "nothing is shared"
    );
    let again = all(&gateway, 0..8).await;
    assert_same_tokens(&expected, &first);
    assert_same_tokens(&expected, &again);
    for answer in &again {
        assert_eq!(
            answer.finish.cached_tokens, 192,
            "every full block but the one that holds the last token"
        );
    }
    // Without tiers the arena has long forgotten.
    assert_eq!(alone.generate(long(0)).await.finish.cached_tokens, 0);
    // A heartbeat may be older than the last answer.
    let enough = |t: &KvTiers| t.host.is_some_and(|host| host.hits_total >= 6 * 12);
    let tiers = eventually(&cell, "host", enough).await;
    let host = tiers.host.expect("host memory");
    assert!(tiers.disk.is_none(), "{tiers:?}");
    assert!(
        host.blocks > 50 && host.blocks <= host.blocks_max && host.blocks_max == 1024,
        "{host:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_worker_finds_its_prefixes_on_disk_and_damaged_ones_are_misses() {
    let cell = Cell::new().await;
    let dir = tempfile::tempdir().unwrap();
    let tiers = || sizes(0, Some(dir.path()), None);
    let (node, gateway) = worker(&cell, "disk", tiers()).await;
    let first = all(&gateway, 0..6).await;
    eventually(&cell, "disk", |t| t.disk.is_some_and(|disk| disk.blocks >= 6 * 12)).await;
    node.stop().await;

    let (node, gateway) = worker(&cell, "disk", tiers()).await;
    // A router hears of what is on the disk before anybody asks.
    let expected: HashSet<u64> = (0..6)
        .flat_map(|n| names(&long(n)).1)
        .map(|name| short(&name))
        .collect();
    within("the telling", async {
        while !cell.heard("disk", |heard| {
            heard
                .lower
                .get(&Tier::Disk)
                .is_some_and(|disk| disk.is_superset(&expected))
        }) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(
        cell.heard("disk", |heard| heard.blocks.len()),
        0,
        "and that nothing is in the pool"
    );
    let again = all(&gateway, 0..6).await;
    assert_same_tokens(&first, &again);
    assert!(
        again.iter().all(|answer| answer.finish.cached_tokens == 192),
        "{again:?}"
    );
    let seen = eventually(&cell, "disk", |t| t.loads_total >= 6).await;
    assert!(seen.loads_total == 6 && seen.load_us_total > 0, "{seen:?}");
    assert_eq!(seen.disk.unwrap().broken_total, 0);
    assert!(seen.disk.unwrap().load_bytes_per_s > 0.0, "{seen:?}");
    node.stop().await;

    // A byte here and there: most blocks are no longer what they were.
    let file = dir.path().join("seg-00000.kv");
    let mut bytes = std::fs::read(&file).unwrap();
    for at in (300..bytes.len()).step_by(700) {
        bytes[at] ^= 4;
    }
    std::fs::write(&file, bytes).unwrap();
    let (node, gateway) = worker(&cell, "disk", tiers()).await;
    let damaged = all(&gateway, 0..6).await;
    assert_same_tokens(&first, &damaged);
    let cached: u32 = damaged.iter().map(|answer| answer.finish.cached_tokens).sum();
    assert!(cached < 6 * 192, "{cached}");
    eventually(&cell, "disk", |t| t.disk.is_some_and(|disk| disk.broken_total > 0)).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_share_an_object_store() {
    let cell = Cell::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (_one, first) = worker(&cell, "one", sizes(0, None, Some(dir.path()))).await;
    let expected = all(&first, 0..3).await;
    eventually(&cell, "one", |t| {
        t.object.is_some_and(|object| object.writes_total >= 3 * 12)
    })
    .await;
    let (_two, second) = worker(&cell, "two", sizes(0, None, Some(dir.path()))).await;
    let found = all(&second, 0..3).await;
    assert_same_tokens(&expected, &found);
    assert!(
        found.iter().all(|answer| answer.finish.cached_tokens == 192),
        "{found:?}"
    );
    // Another tenant's request with the same tokens finds nothing.
    let other = Generate {
        cache_salt: vec![9].into(),
        ..long(0)
    };
    let other = second.generate(other).await;
    assert_eq!(
        (other.tokens, other.finish.cached_tokens),
        (expected[0].tokens.clone(), 0)
    );
}

/// Many at once, some cancelled while they wait, over all tiers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_over_all_tiers_leaves_nothing_behind() {
    let cell = Cell::new().await;
    let (dir, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let tiers = sizes(40 << 10, Some(dir.path()), Some(store.path()));
    let (_bare, alone) = worker(&cell, "bare", TierConfig::default()).await;
    let (_node, gateway) = worker(&cell, "all", tiers).await;
    let expected = all(&alone, 0..10).await;
    for round in 0..6 {
        let mut pending = Vec::new();
        for at in 0..10 {
            // To and fro: what came last is the likeliest still to be in memory.
            let n = if round % 2 == 0 { at } else { 9 - at };
            let (id, answer) = gateway.submit(long(n)).await;
            if (n + round) % 4 == 0 {
                tokio::time::sleep(Duration::from_millis(u64::from(n % 3))).await;
                gateway.cancel(id).await;
            } else {
                pending.push((n, answer));
            }
        }
        for (n, answer) in pending {
            let answer = within("an answer", answer).await.expect("the stream stays up");
            assert_eq!(answer.tokens, expected[n as usize].tokens, "prompt {n}, round {round}");
        }
    }
    let load = cell.at_rest("all").await;
    assert_eq!(load.free_blocks + load.cached_blocks, 24);
    let hit = |t: &KvTiers| t.host.is_some_and(|h| h.hits_total > 0) && t.disk.is_some_and(|d| d.hits_total > 0);
    let seen = eventually(&cell, "all", hit).await;
    assert_eq!(
        (seen.disk.unwrap().broken_total, seen.object.unwrap().broken_total),
        (0, 0)
    );
}

/// A hint is read while nobody asks, so that who asks then does not wait; a resync tells of every tier, and evictions below the
/// pool are told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hint_is_read_before_the_request_comes() {
    let cell = Cell::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (_node, gateway) = worker(&cell, "ahead", sizes(16 << 10, Some(dir.path()), None)).await;
    let first = all(&gateway, 0..6).await;
    eventually(&cell, "ahead", |t| t.disk.is_some_and(|disk| disk.blocks >= 6 * 12)).await;
    let (parent, wanted) = names(&long(0));
    gateway.read_ahead(parent, &wanted).await;
    // Of another tenant nobody has a block.
    let (parent, others) = names(&Generate {
        cache_salt: vec![1].into(),
        ..long(0)
    });
    gateway.read_ahead(parent, &others).await;
    let seen = eventually(&cell, "ahead", |t| t.ahead_read_total > 0).await;
    assert_eq!((seen.ahead_hits_total, seen.loads_total), (0, 0), "{seen:?}");
    let again = gateway.generate(long(0)).await;
    assert_same_tokens(&first[..1], std::slice::from_ref(&again));
    assert_eq!(again.finish.cached_tokens, 192);
    let seen = eventually(&cell, "ahead", |t| t.ahead_hits_total > 0).await;
    assert_eq!((seen.ahead_hits_total, seen.ahead_read_total), (12, 12), "{seen:?}");
    assert_eq!(
        (seen.loads_total, seen.ahead_wasted_total, seen.ahead_refused_total),
        (0, 0, 0),
        "nobody waited: {seen:?}"
    );

    // What is believed of each tier is what it has.
    let told = |tier| cell.heard("ahead", |heard| heard.lower.get(&tier).map_or(0, HashSet::len) as u64);
    let agrees = || async {
        within("agreement", async {
            loop {
                let tiers = cell.at_rest("ahead").await.kv_tiers.expect("there are tiers");
                let (host, disk) = (tiers.host.unwrap().blocks, tiers.disk.unwrap().blocks);
                if (told(Tier::Host), told(Tier::Disk)) == (host, disk) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    };
    agrees().await;
    assert!(told(Tier::Host) > 0 && told(Tier::Disk) >= 6 * 12);
    let resets = cell.heard("ahead", |heard| heard.resets);
    cell.resync("ahead").await;
    within("a telling", async {
        while cell.heard("ahead", |heard| heard.resets) == resets {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    agrees().await;
}
