//! Pushes that succeed, byte for byte, between real agents over loopback.

#![allow(clippy::single_range_in_vec_init)] // windows over one range are what is meant

mod common;

use baton_identity::Role;
use baton_kvtransfer::{Agent, FileMemory, Region, TransferLimits};
use bytes::Bytes;
use common::{Cluster, eventually, filled, image, within};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use std::ops::Range;
use std::sync::Arc;

/// Pushes `pieces` (local word, remote word, words) and checks the result byte for byte.
async fn push_and_check(from: &Agent, to: &Agent, pieces: &[(usize, usize, usize)], seed: u64) {
    const LEN: usize = 1 << 20;
    let (source, target) = (filled(LEN, seed), Region::new(LEN).unwrap());
    let ranges = pieces
        .iter()
        .map(|&(_, remote, words)| remote * 8..(remote + words) * 8)
        .collect();
    let window = to.open_window(&target, ranges).unwrap();
    let push = from.push(to.local_addr(), window.id(), source.clone());
    let writer = push.writer();
    let (before, mut expected) = (image(&source), vec![0; LEN]);
    for &(local, remote, words) in pieces {
        writer.write(local * 8..(local + words) * 8, remote * 8).unwrap();
        expected[remote * 8..(remote + words) * 8].copy_from_slice(&before[local * 8..(local + words) * 8]);
    }
    let payload = Bytes::from(seed.to_le_bytes().to_vec());
    let (report, received) = within(async { tokio::join!(push.finish(payload.clone()), window.wait()) }).await;
    let report = report.unwrap();
    assert_eq!(received.unwrap(), payload);
    let bytes: usize = pieces.iter().map(|piece| piece.2 * 8).sum();
    assert_eq!((report.bytes, window.landed()), (bytes as u64, bytes as u64));
    assert_eq!(report.transport, common::transport());
    assert!(report.first_write <= report.finished && report.finished <= report.last_ack);
    assert!((0.0..=1.0).contains(&report.overlap));
    assert!(image(&target) == expected, "the target differs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_ranges_arrive_byte_for_byte() {
    let cluster = Cluster::new();
    let (from, to) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    // Disjoint remote slots of 2048 words in random order, from random local places.
    let slots = Just((0..64usize).collect::<Vec<_>>()).prop_shuffle();
    let pieces = (
        slots,
        prop::collection::vec((0usize..120_000, 0usize..1024, 1usize..1024), 1..64),
    );
    for seed in 0..20 {
        let (slots, raw) = pieces.new_tree(&mut runner).unwrap().current();
        let pieces: Vec<_> = raw
            .into_iter()
            .zip(slots)
            .map(|((local, at, words), slot)| (local, slot * 2048 + at, words))
            .collect();
        push_and_check(&from, &to, &pieces, seed).await;
    }
    assert_eq!(from.stats().pushes_completed, 20);
    assert_eq!(to.stats().windows_completed, 20);
    assert_eq!(from.stats().bytes_out, to.stats().bytes_in);
}

#[tokio::test]
async fn a_push_without_bytes_delivers_its_payload() {
    let cluster = Cluster::new();
    let (from, to) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let region = Region::new(4096).unwrap();
    let window = to.open_window(&region, vec![0..64]).unwrap();
    let push = from.push(to.local_addr(), window.id(), Region::new(64).unwrap());
    let report = within(push.finish(Bytes::from_static(b"token"))).await.unwrap();
    assert_eq!((report.bytes, report.frames), (0, 0));
    assert_eq!(within(window.wait()).await.unwrap(), "token");
    assert_eq!(
        within(window.wait()).await.unwrap(),
        "token",
        "asking again gives the same"
    );
}

/// Layer by layer from a plain thread, as compute does it, with adjacent writes that merge.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compute_thread_pushes_layer_by_layer() {
    const LAYERS: usize = 12;
    const LAYER: usize = 64 << 10;
    let cluster = Cluster::new();
    let (from, to) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let source = filled(LAYERS * LAYER, 3);
    let target = Region::new(LAYERS * LAYER).unwrap();
    let window = to.open_window(&target, vec![0..LAYERS * LAYER]).unwrap();
    // Also without a runtime in the thread: the agent brings its own.
    let (peer, id, region) = (to.local_addr(), window.id(), source.clone());
    let agent = from.clone();
    let push = std::thread::spawn(move || {
        let push = agent.push(peer, id, region);
        let writer = push.writer();
        for layer in 0..LAYERS {
            for half in 0..16 {
                let start = layer * LAYER + half * LAYER / 16;
                writer.write(start..start + LAYER / 16, start).unwrap();
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        push
    })
    .join()
    .unwrap();
    let window_landed = || window.landed() == (LAYERS * LAYER) as u64;
    eventually("layers land before finish is called", window_landed).await;
    let report = within(push.finish(Bytes::new())).await.unwrap();
    within(window.wait()).await.unwrap();
    assert!(image(&target) == image(&source));
    assert!(
        report.frames < (LAYERS * 16) as u64,
        "adjacent writes were not merged: {report:?}"
    );
    assert!(report.overlap > 0.0, "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_concurrent_pushes_between_three_agents() {
    const LEN: usize = 4 << 20;
    const SHARE: usize = 128 << 10;
    let cluster = Cluster::new();
    let agents: Vec<Agent> = (0..3).map(|at| cluster.agent(&format!("worker-{at}"))).collect();
    let regions: Vec<Arc<Region>> = (0..3).map(|_| Region::new(LEN).unwrap()).collect();
    let mut tasks = tokio::task::JoinSet::new();
    for slot in 0..32 {
        for to in 0..3 {
            let (from, receiver, region) = (
                agents[(to + 1 + slot % 2) % 3].clone(),
                agents[to].clone(),
                regions[to].clone(),
            );
            tasks.spawn(async move {
                let range: Range<usize> = slot * SHARE..(slot + 1) * SHARE;
                let source = filled(SHARE, (slot * 3 + to) as u64);
                let window = receiver.open_window(&region, vec![range.clone()]).unwrap();
                let push = from.push(receiver.local_addr(), window.id(), source.clone());
                let writer = push.writer();
                for piece in (0..SHARE).step_by(SHARE / 8).rev() {
                    writer.write(piece..piece + SHARE / 8, range.start + piece).unwrap();
                    tokio::task::yield_now().await;
                }
                push.finish(Bytes::new()).await.unwrap();
                window.wait().await.unwrap();
                let mut landed = vec![0; SHARE];
                assert!(region.copy_out(range.start, &mut landed));
                assert!(landed == image(&source), "slot {slot} of {to} differs");
            });
        }
    }
    within(async {
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    })
    .await;
    for agent in &agents {
        let stats = agent.stats();
        assert_eq!((stats.windows_open, stats.pushes_open, stats.refusals), (0, 0, 0));
        assert_eq!((stats.windows_completed, stats.pushes_completed), (32, 32));
    }
}

/// One push over several lanes: the same bytes, counted once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_lanes_carry_one_push() {
    const LEN: usize = 24 << 20;
    let cluster = Cluster::new();
    let limits = TransferLimits {
        lanes_per_push: 4,
        ..common::limits()
    };
    let from = cluster.agent_with("prefill-0", Role::Worker, [7; 32], limits);
    let to = cluster.agent("decode-0");
    for round in 0..3 {
        let (source, target) = (filled(LEN, round), Region::new(LEN).unwrap());
        let window = to.open_window(&target, vec![0..LEN]).unwrap();
        let push = from.push(to.local_addr(), window.id(), source.clone());
        let writer = push.writer();
        for start in (0..LEN).step_by(LEN / 64).rev() {
            writer.write(start..start + LEN / 64, start).unwrap();
        }
        let report = within(push.finish(Bytes::from_static(b"x"))).await.unwrap();
        assert_eq!((report.bytes, window.landed()), (LEN as u64, LEN as u64));
        assert_eq!(within(window.wait()).await.unwrap(), "x");
        assert!(image(&target) == image(&source));
    }
    assert_eq!((to.stats().refusals, from.stats().lanes_broken), (0, 0));
}

/// A file as source and as target.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_memory_too() {
    const LEN: usize = 1 << 20;
    let cluster = Cluster::new();
    let (from, to) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let dir = tempfile::tempdir().unwrap();
    let file = FileMemory::open(&dir.path().join("blocks"), LEN).unwrap();
    let (source, target) = (filled(LEN, 9), Region::new(LEN).unwrap());
    let into_file = to.open_window(file.clone(), vec![0..LEN]).unwrap();
    let push = from.push(to.local_addr(), into_file.id(), source.clone());
    push.writer().write(0..LEN, 0).unwrap();
    within(push.finish(Bytes::new())).await.unwrap();
    within(into_file.wait()).await.unwrap();
    file.sync().unwrap();
    assert!(std::fs::read(dir.path().join("blocks")).unwrap() == image(&source));
    let window = from.open_window(&target, vec![0..LEN]).unwrap();
    let push = to.push(from.local_addr(), window.id(), file);
    push.writer().write(0..LEN, 0).unwrap();
    within(push.finish(Bytes::new())).await.unwrap();
    within(window.wait()).await.unwrap();
    assert!(image(&target) == image(&source));
}
