//! Workers that hang while their connections stand, and slow ones that do not.

use super::fake_worker::{FakeWorker, expected};
use super::{Coordinator, job, read, until};
use baton_gateway::Backend;
use baton_proto::cluster::Role;
use baton_proto::worker::FinishReason;
use std::sync::atomic::Ordering;
use std::time::Duration;

const PROMPT: [u32; 4] = [5, 6, 7, 8];

fn pulsing(coordinator: &Coordinator, id: &str, cached: u64) -> FakeWorker {
    let identity = coordinator.worker_identity(id);
    FakeWorker::start_with(id, Role::Decode, coordinator.cluster_addr, identity, |controls| {
        controls.pulsing.store(true, Ordering::SeqCst);
        controls.cached.store(cached, Ordering::SeqCst);
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stands_still_is_a_pause_and_is_used_again_when_it_wakes() {
    // Long, so that nothing but the watchdog can have found it.
    let coordinator = Coordinator::start_with(|config| config.lost_after_ms = 60_000).await;
    let first = pulsing(&coordinator, "a", 2);
    coordinator.wait_ready("a").await;
    first.controls.allow(7);
    let second = pulsing(&coordinator, "b", 4);
    coordinator.wait_ready("b").await;
    let mut generation = coordinator.backend.generate(job(&PROMPT, 50)).await.unwrap();
    let (mut tokens, _) = read(&mut generation, 7).await;
    assert_eq!(generation.placement().decode_worker_id, "a");
    first.controls.frozen.store(true, Ordering::SeqCst);
    let (rest, finish) = read(&mut generation, usize::MAX).await;
    tokens.extend(rest);
    assert_eq!(tokens, expected(&PROMPT, 50));
    let finish = finish.unwrap();
    assert_eq!(finish.reason(), FinishReason::Length);
    // The counts are those of the first attempt, although its worker never came to its end.
    assert_eq!((finish.cached_tokens, finish.completion_tokens), (2, 50));
    let placement = generation.placement();
    assert_eq!((placement.decode_worker_id.as_str(), placement.attempts), ("b", 2));
    until("the abandoned attempt is cancelled", || {
        first.controls.cancels.load(Ordering::SeqCst) == 1
    })
    .await;

    // Awake, under the same epoch and on the same stream, it takes what only it can take.
    first.controls.frozen.store(false, Ordering::SeqCst);
    first.controls.allow(-1);
    second.kill();
    coordinator.wait_lost("b").await;
    let begin = std::time::Instant::now();
    loop {
        match coordinator.backend.generate(job(&PROMPT, 5)).await {
            Ok(generation) if generation.placement().decode_worker_id == "a" => break,
            _ => assert!(begin.elapsed() < Duration::from_secs(20), "it is not heard again"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut generation = coordinator.backend.generate(job(&PROMPT, 5)).await.unwrap();
    assert_eq!(read(&mut generation, usize::MAX).await.0, expected(&PROMPT, 5));
    assert_eq!(first.controls.attaches.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_worker_that_stands_still_is_waited_for() {
    let coordinator = Coordinator::start_with(|config| {
        config.lost_after_ms = 60_000;
        config.worker_wait_ms = 20_000;
    })
    .await;
    let worker = pulsing(&coordinator, "a", 2);
    coordinator.wait_ready("a").await;
    worker.controls.allow(3);
    let mut generation = coordinator.backend.generate(job(&PROMPT, 20)).await.unwrap();
    let (mut tokens, _) = read(&mut generation, 3).await;
    worker.controls.frozen.store(true, Ordering::SeqCst);
    until("it is given up", || worker.controls.cancels.load(Ordering::SeqCst) == 1).await;
    // More than the attempts that a request has: it is not sent there again and again.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    worker.controls.frozen.store(false, Ordering::SeqCst);
    worker.controls.allow(-1);
    let (rest, finish) = read(&mut generation, usize::MAX).await;
    tokens.extend(rest);
    assert_eq!(tokens, expected(&PROMPT, 20));
    assert_eq!(finish.unwrap().reason(), FinishReason::Length);
    assert_eq!(generation.placement().attempts, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_worker_that_lives_is_not_abandoned() {
    let coordinator = Coordinator::start().await;
    let worker = pulsing(&coordinator, "a", 2);
    coordinator.wait_ready("a").await;
    worker.controls.allow(3);
    let _other = pulsing(&coordinator, "b", 2);
    coordinator.wait_ready("b").await;
    let mut generation = coordinator.backend.generate(job(&PROMPT, 6)).await.unwrap();
    read(&mut generation, 3).await;
    // Twice what a silent one is given.
    tokio::time::sleep(Duration::from_millis(2200)).await;
    worker.controls.allow(-1);
    read(&mut generation, usize::MAX).await;
    let placement = generation.placement();
    assert_eq!((placement.decode_worker_id.as_str(), placement.attempts), ("a", 1));
    assert_eq!(worker.controls.cancels.load(Ordering::SeqCst), 0);
}
