//! Requests: streamed, cancelled, and carried on when their worker is lost.

use super::fake_worker::{CACHED, STOP, STOP_AT, expected, logprobs};
use super::{Coordinator, job, read, until};
use baton_gateway::{Backend, BackendError};
use baton_proto::cluster::Role;
use baton_proto::state::{UsageRecord, UsageStatus};
use baton_proto::worker::FinishReason;
use std::sync::atomic::Ordering;

const PROMPT: [u32; 4] = [1, 2, 3, 4];

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_streamed_and_its_record_settled_once() {
    let coordinator = Coordinator::start().await;
    let backend = &coordinator.backend;
    assert!(!backend.models()[0].served);
    assert!(matches!(
        backend.generate(job(&PROMPT, 3)).await,
        Err(BackendError::NoWorker { .. })
    ));
    let _worker = coordinator.worker("w", Role::Combined);
    coordinator.wait_ready("w").await;
    assert!(backend.models()[0].served && backend.models()[0].context_length == 1024);

    let mut generation = backend.generate(job(&PROMPT, 20)).await.unwrap();
    let (tokens, finish) = read(&mut generation, usize::MAX).await;
    assert_eq!(tokens, expected(&PROMPT, 20));
    let finish = finish.unwrap();
    assert_eq!(finish.reason(), FinishReason::Length);
    assert_eq!(
        (finish.prompt_tokens, finish.cached_tokens, finish.completion_tokens),
        (4, CACHED, 20)
    );
    assert_eq!(generation.placement().attempts, 1);
    assert!(generation.next().await.is_none());

    let mut unknown = job(&PROMPT, 1);
    unknown.model = "other".into();
    assert!(matches!(
        backend.generate(unknown).await,
        Err(BackendError::UnknownModel { .. })
    ));

    let record = UsageRecord {
        request_id: "r-20".into(),
        status: UsageStatus::Completed.into(),
        completion_tokens: 20,
        sampled_tokens: 21,
        ..UsageRecord::default()
    };
    backend.settle(record.clone()).await.unwrap();
    backend.settle(record.clone()).await.unwrap();
    let other = UsageRecord {
        completion_tokens: 21,
        ..record
    };
    assert!(backend.settle(other).await.is_err());
    assert_eq!(coordinator.cluster.store.position().unwrap().settled, 1);

    let mut registry = prometheus_client::registry::Registry::default();
    backend.register_metrics(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in [
        "baton:router_placements_total{prefill=\"local\"} 1",
        "baton:request_replays_total 0",
        "baton:raft_proposals_total ",
        "baton:raft_leader 1",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_share_a_link_and_a_stop_token_ends_one() {
    let coordinator = Coordinator::start().await;
    let worker = coordinator.worker("w", Role::Combined);
    coordinator.wait_ready("w").await;
    let mut running = Vec::new();
    for i in 0..40u32 {
        let prompt = vec![i; STOP_AT - 10 - i as usize % 5];
        let mut generation = coordinator.backend.generate(job(&prompt, 200)).await.unwrap();
        running.push(tokio::spawn(async move {
            let (tokens, finish) = read(&mut generation, usize::MAX).await;
            assert_eq!(tokens, expected(&prompt, 200));
            assert_eq!(*tokens.last().unwrap(), STOP);
            assert_eq!(finish.unwrap().reason(), FinishReason::Stop);
        }));
    }
    for task in running {
        task.await.unwrap();
    }
    assert_eq!(worker.controls.attaches.load(Ordering::SeqCst), 1);
    // Every place is given back.
    until("no load", || {
        coordinator
            .cluster
            .registry()
            .workers(0)
            .all(|(worker, _)| worker.assigned == 0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_generation_reaches_the_worker_as_a_cancel() {
    let coordinator = Coordinator::start().await;
    let worker = coordinator.stalling("w", Role::Decode, 3);
    coordinator.wait_ready("w").await;
    let mut generation = coordinator.backend.generate(job(&PROMPT, 100)).await.unwrap();
    assert_eq!(read(&mut generation, 3).await.0, expected(&PROMPT, 3));
    drop(generation);
    until("the cancel", || worker.controls.cancels.load(Ordering::SeqCst) == 1).await;

    // Stopping tells the exact counts.
    worker.controls.allow(5);
    let mut generation = coordinator.backend.generate(job(&PROMPT, 100)).await.unwrap();
    read(&mut generation, 5).await;
    let finish = generation.stop(super::PATIENCE).await.unwrap();
    assert_eq!(finish.reason(), FinishReason::Cancelled);
    assert_eq!((finish.prompt_tokens, finish.completion_tokens), (4, 5));
    // An answered request is not cancelled afterwards.
    worker.controls.allow(-1);
    let mut generation = coordinator.backend.generate(job(&PROMPT, 5)).await.unwrap();
    read(&mut generation, usize::MAX).await;
    drop(generation);
    let mut generation = coordinator.backend.generate(job(&PROMPT, 5)).await.unwrap();
    read(&mut generation, usize::MAX).await;
    assert_eq!(worker.controls.cancels.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_is_a_pause_and_nothing_else() {
    let coordinator = Coordinator::start().await;
    // The first choice by id; it stops in the middle and is killed there.
    let first = coordinator.stalling("a", Role::Decode, 7);
    coordinator.wait_ready("a").await;
    let second = coordinator.worker("b", Role::Decode);
    coordinator.wait_ready("b").await;
    let mut generation = coordinator.backend.generate(job(&PROMPT, 50)).await.unwrap();
    let (mut tokens, _) = read(&mut generation, 7).await;
    assert_eq!(generation.placement().decode_worker_id, "a");
    first.kill();
    let (rest, finish) = read(&mut generation, usize::MAX).await;
    tokens.extend(rest);
    assert_eq!(tokens, expected(&PROMPT, 50));
    let finish = finish.unwrap();
    assert_eq!(finish.reason(), FinishReason::Length);
    assert_eq!((finish.prompt_tokens, finish.completion_tokens), (4, 50));
    let placement = generation.placement();
    assert_eq!((placement.decode_worker_id.as_str(), placement.attempts), ("b", 2));
    let replayed = second.controls.generates.lock().unwrap()[0].clone();
    assert_eq!((replayed.prompt.len(), replayed.max_tokens), (4 + 7, 43));
    coordinator.wait_lost("a").await;
    until("a removed", || coordinator.cluster.store.workers().unwrap().len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logprobs_come_one_for_each_token_across_workers() {
    let coordinator = Coordinator::start().await;
    let first = coordinator.stalling("a", Role::Decode, 7);
    coordinator.wait_ready("a").await;
    // This one tells none although it is asked: what it sends is void, and the next goes on.
    let _silent = coordinator.worker("b", Role::Decode);
    coordinator.wait_ready("b").await;
    let third = coordinator.worker("c", Role::Decode);
    coordinator.wait_ready("c").await;
    for worker in [&first, &third] {
        worker.controls.tells_logprobs.store(true, Ordering::SeqCst);
    }
    let mut asking = job(&PROMPT, 30);
    asking.sampling.top_logprobs = Some(1);
    let mut generation = coordinator.backend.generate(asking).await.unwrap();
    let (mut tokens, mut told) = (Vec::new(), Vec::new());
    let reading = async {
        let mut killed = Some(first);
        while let Some(event) = generation.next().await {
            assert_eq!(event.tokens.len(), event.logprobs.len());
            tokens.extend(event.tokens);
            told.extend(event.logprobs);
            if tokens.len() >= 7
                && let Some(first) = killed.take()
            {
                first.kill();
            }
        }
    };
    tokio::time::timeout(super::PATIENCE, reading).await.expect("an end");
    assert_eq!(tokens, expected(&PROMPT, 30));
    assert_eq!(told, tokens.iter().map(|token| logprobs(*token)).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_worker_can_take_is_not_tried_again() {
    let coordinator = Coordinator::start().await;
    let worker = coordinator.worker("w", Role::Decode);
    coordinator.wait_ready("w").await;
    worker.controls.refuses_grammars.store(true, Ordering::SeqCst);
    let mut generation = coordinator.backend.generate(job(&PROMPT, 5)).await.unwrap();
    let (tokens, finish) = read(&mut generation, usize::MAX).await;
    let finish = finish.unwrap();
    assert!(tokens.is_empty() && finish.reason() == FinishReason::Error);
    assert_eq!((&finish.invalid_field[..], finish.retryable), ("grammar", false));
    assert_eq!(worker.controls.generates.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_waits_for_a_worker_when_all_are_gone() {
    let coordinator = Coordinator::start_with(|config| config.worker_wait_ms = 20_000).await;
    let first = coordinator.stalling("a", Role::Decode, 2);
    coordinator.wait_ready("a").await;
    let mut generation = coordinator.backend.generate(job(&PROMPT, 10)).await.unwrap();
    let (mut tokens, _) = read(&mut generation, 2).await;
    first.kill();
    coordinator.wait_lost("a").await;
    let _second = coordinator.worker("b", Role::Prefill);
    let (rest, finish) = read(&mut generation, usize::MAX).await;
    tokens.extend(rest);
    assert_eq!(tokens, expected(&PROMPT, 10));
    assert_eq!(finish.unwrap().completion_tokens, 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_left_in_time_is_a_retryable_failure_with_exact_counts() {
    let coordinator = Coordinator::start_with(|config| config.worker_wait_ms = 50).await;
    let worker = coordinator.stalling("a", Role::Decode, 2);
    coordinator.wait_ready("a").await;
    let mut generation = coordinator.backend.generate(job(&PROMPT, 10)).await.unwrap();
    read(&mut generation, 2).await;
    worker.kill();
    let (_, finish) = read(&mut generation, usize::MAX).await;
    let finish = finish.unwrap();
    assert!(finish.reason() == FinishReason::Error && finish.retryable);
    assert_eq!(finish.completion_tokens, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_goes_to_another_worker_and_is_bounded() {
    let coordinator = Coordinator::start().await;
    let first = coordinator.worker("a", Role::Decode);
    let second = coordinator.worker("b", Role::Decode);
    coordinator.wait_ready("a").await;
    coordinator.wait_ready("b").await;
    first.controls.refuse.store(true, Ordering::SeqCst);
    let mut generation = coordinator.backend.generate(job(&PROMPT, 5)).await.unwrap();
    assert_eq!(read(&mut generation, usize::MAX).await.0, expected(&PROMPT, 5));
    assert_eq!(generation.placement().decode_worker_id, "b");

    second.controls.refuse.store(true, Ordering::SeqCst);
    let mut generation = coordinator.backend.generate(job(&PROMPT, 5)).await.unwrap();
    let finish = read(&mut generation, usize::MAX).await.1.unwrap();
    assert!(
        finish.retryable && finish.error.contains("queue is full"),
        "{}",
        finish.error
    );
    assert_eq!(generation.placement().attempts, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_names_a_prefill_worker() {
    let coordinator = Coordinator::start().await;
    let decode = coordinator.worker("d", Role::Decode);
    let _prefill = coordinator.worker("p", Role::Prefill);
    coordinator.wait_ready("d").await;
    coordinator.wait_ready("p").await;
    for len in [8u32, 9] {
        let prompt: Vec<u32> = (0..len).collect();
        let mut generation = coordinator.backend.generate(job(&prompt, 3)).await.unwrap();
        read(&mut generation, usize::MAX).await;
        assert_eq!(generation.placement().decode_worker_id, "d");
    }
    let generates = decode.controls.generates.lock().unwrap().clone();
    assert_eq!(generates[0].prefill_peer, None);
    let peer = generates[1].prefill_peer.clone().unwrap();
    let status = coordinator.status("p").unwrap();
    assert_eq!(
        (peer.worker_id, peer.epoch, peer.addr),
        (status.id, status.epoch, status.addr)
    );
    assert_eq!(generates[1].cache_salt, b"salt"[..]);
}
