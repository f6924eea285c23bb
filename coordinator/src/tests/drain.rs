//! Workers that are taken out of service while they have requests.

use super::fake_worker::expected;
use super::{Coordinator, job, read, until};
use baton_gateway::{Backend, BackendError, WorkerState};
use baton_proto::cluster::Role;
use baton_proto::worker::FinishReason;
use std::sync::atomic::Ordering;
use std::time::Duration;

const PROMPT: [u32; 4] = [5, 6, 7, 8];
const DEADLINE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn requests_move_off_a_drained_worker_without_a_trace() {
    let coordinator = Coordinator::start().await;
    let backend = &coordinator.backend;
    let unknown = backend.drain("a", DEADLINE);
    assert!(
        matches!(unknown, Err(BackendError::UnknownWorker { .. })),
        "{unknown:?}"
    );
    // The first choice by id.
    let first = coordinator.stalling("a", Role::Decode, 7);
    coordinator.wait_ready("a").await;
    let second = coordinator.worker("b", Role::Decode);
    coordinator.wait_ready("b").await;
    let mut generation = backend.generate(job(&PROMPT, 50)).await.unwrap();
    let (mut tokens, _) = read(&mut generation, 7).await;

    let status = backend.drain("a", DEADLINE).unwrap();
    assert_eq!(status.state, WorkerState::Draining);
    let (rest, finish) = read(&mut generation, usize::MAX).await;
    tokens.extend(rest);
    assert_eq!(tokens, expected(&PROMPT, 50));
    let finish = finish.unwrap();
    assert_eq!((finish.reason(), finish.completion_tokens), (FinishReason::Length, 50));
    let placement = generation.placement();
    assert_eq!((placement.decode_worker_id.as_str(), placement.attempts), ("b", 2));
    assert_eq!(second.controls.generates.lock().unwrap()[0].prompt.len(), 4 + 7);
    until("it frees what it had", || {
        first.controls.cancels.load(Ordering::SeqCst) == 1
    })
    .await;
    until("it is told to leave", || {
        *first.controls.ordered_to_drain.lock().unwrap() == Some(30_000)
    })
    .await;
    // A move is no failure, and nothing new goes there, again and again.
    let mut text = String::new();
    let mut registry = prometheus_client::registry::Registry::default();
    backend.register_metrics(&mut registry);
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in ["baton:request_replays_total 0", "baton:request_moves_total 1"] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    for _ in 0..5 {
        let generation = backend.generate(job(&PROMPT, 5)).await.unwrap();
        assert_eq!(generation.placement().decode_worker_id, "b");
    }
    assert_eq!(backend.drain("a", DEADLINE).unwrap().state, WorkerState::Draining);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_nobody_else_requests_end_where_they_are_or_move_when_somebody_comes() {
    let coordinator = Coordinator::start().await;
    let worker = coordinator.stalling("a", Role::Decode, 4);
    coordinator.wait_ready("a").await;
    let mut stays = coordinator.backend.generate(job(&PROMPT, 20)).await.unwrap();
    read(&mut stays, 4).await;
    coordinator.backend.drain("a", DEADLINE).unwrap();
    assert!(matches!(
        coordinator.backend.generate(job(&PROMPT, 5)).await,
        Err(BackendError::NoWorker { .. })
    ));
    // Past several looks for another worker.
    tokio::time::sleep(Duration::from_millis(600)).await;
    worker.controls.allow(3);
    read(&mut stays, 3).await;
    assert_eq!(stays.placement().attempts, 1);

    let _second = coordinator.worker("b", Role::Decode);
    let (rest, finish) = read(&mut stays, usize::MAX).await;
    assert_eq!(rest, expected(&PROMPT, 20)[7..]);
    assert_eq!(finish.unwrap().reason(), FinishReason::Length);
    assert_eq!(
        (stays.placement().decode_worker_id.as_str(), stays.placement().attempts),
        ("b", 2)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_says_itself_that_it_drains_is_believed() {
    let coordinator = Coordinator::start().await;
    let first = coordinator.stalling("a", Role::Decode, 7);
    coordinator.wait_ready("a").await;
    let _second = coordinator.worker("b", Role::Decode);
    coordinator.wait_ready("b").await;
    let mut generation = coordinator.backend.generate(job(&PROMPT, 20)).await.unwrap();
    read(&mut generation, 7).await;
    first.controls.draining.store(true, Ordering::SeqCst);
    let (rest, _) = read(&mut generation, usize::MAX).await;
    assert_eq!(rest, expected(&PROMPT, 20)[7..]);
    assert_eq!(generation.placement().decode_worker_id, "b");
    assert_eq!(coordinator.status("a").unwrap().state, WorkerState::Draining);
}
