//! Workers that are told to go, and prefill workers that stand still: nothing is lost, nobody waits long.

mod support;

use baton_proto::worker::{FinishReason, Generate};
use baton_worker::WorkerRole;
use std::time::{Duration, Instant};
use support::{Cell, request, slow_engine as engine, within};

fn long(n: u64, tokens: u32) -> Generate {
    Generate {
        max_tokens: tokens,
        stop_token_ids: Vec::new(),
        ..request(n)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_worker_takes_nothing_new_ends_what_it_has_and_goes() {
    let cell = Cell::new().await;
    let mut node = cell
        .worker("w", WorkerRole::Combined, engine(Duration::from_millis(5)))
        .await;
    let gateway = cell.gateway(&node).await;
    let (_, running) = gateway.submit(long(4, 200)).await;
    within("it runs", async {
        while cell.heartbeat("w").running == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    cell.drain("w", Duration::from_secs(50));
    within("it says so", async {
        while !cell.heartbeat("w").draining {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let refused = gateway.generate(request(1)).await;
    assert!(refused.finish.reason() == FinishReason::Error && refused.finish.retryable);
    assert!(refused.finish.error.contains("drained"), "{}", refused.finish.error);
    let answer = within("the end of what runs", running).await.unwrap();
    assert_eq!(
        (answer.tokens.len(), answer.finish.reason()),
        (200, FinishReason::Length)
    );
    node.ended().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_ends_what_nobody_takes() {
    let cell = Cell::new().await;
    let mut node = cell
        .worker("w", WorkerRole::Combined, engine(Duration::from_millis(20)))
        .await;
    let gateway = cell.gateway(&node).await;
    // Half a minute of work.
    let (_, running) = gateway.submit(long(4, 1500)).await;
    within("it runs", async {
        while cell.heartbeat("w").running == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let started = Instant::now();
    cell.drain("w", Duration::from_millis(300));
    node.ended().await;
    assert!(started.elapsed() >= Duration::from_millis(300));
    node.kill();
    assert!(within("the stream breaks", running).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_worker_that_drains_finishes_its_pushes() {
    let cell = Cell::new().await;
    let lone = cell.worker("lone", WorkerRole::Combined, engine(Duration::ZERO)).await;
    let expected = cell.gateway(&lone).await.generate(request(7)).await;
    let decode = cell.worker("decode", WorkerRole::Decode, engine(Duration::ZERO)).await;
    // 333 tokens in chunks of 64 at 50 ms each.
    let mut prefill = cell
        .worker("prefill", WorkerRole::Prefill, engine(Duration::from_millis(50)))
        .await;
    let gateway = cell.gateway(&decode).await;
    let with_peer = |n| Generate {
        prefill_peer: Some(prefill.peer()),
        ..request(n)
    };
    let (first, second) = (with_peer(7), with_peer(15));
    let (_, under_way) = gateway.submit(first).await;
    within("it is under way", async {
        while cell.heartbeat("prefill").running == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    cell.drain("prefill", Duration::from_secs(50));
    let answer = within("an answer", under_way).await.unwrap();
    assert_eq!(answer.finish.prefill_worker_id, "prefill", "the push was finished");
    assert_eq!(answer.tokens, expected.tokens);
    // Too late: computed by the decode worker itself, at once.
    let answer = gateway.generate(second).await;
    assert_eq!(answer.finish.prefill_worker_id, "");
    prefill.ended().await;
    cell.at_rest("decode").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_worker_that_stands_still_is_given_up_and_frees_what_it_had_when_it_wakes() {
    const FROZEN: Duration = Duration::from_secs(3);
    let cell = Cell::new().await;
    let lone = cell.worker("lone", WorkerRole::Combined, engine(Duration::ZERO)).await;
    let decode = cell.worker("decode", WorkerRole::Decode, engine(Duration::ZERO)).await;
    let slow = engine(Duration::from_millis(30));
    let prefill = cell.worker("prefill", WorkerRole::Prefill, slow).await;
    let (alone, gateway) = (cell.gateway(&lone).await, cell.gateway(&decode).await);
    let with_peer = |n| Generate {
        prefill_peer: Some(prefill.peer()),
        ..request(n)
    };
    // The link is up, and one prompt in the middle of its transfer.
    let warm = gateway.generate(with_peer(6)).await;
    assert_eq!(warm.finish.prefill_worker_id, "prefill");
    let (_, in_transfer) = gateway.submit(with_peer(7)).await;
    tokio::time::sleep(Duration::from_millis(60)).await;
    prefill.freeze(FROZEN);
    let frozen = Instant::now();
    let (_, not_begun) = gateway.submit(with_peer(14)).await;
    for (n, answer) in [(7, in_transfer), (14, not_begun)] {
        let answer = within("an answer", answer).await.unwrap();
        assert_eq!(answer.tokens, alone.generate(request(n)).await.tokens);
        assert_eq!(answer.finish.prefill_worker_id, "", "computed here");
    }
    // It cannot have been the prefill worker's word.
    assert!(frozen.elapsed() < FROZEN, "{:?}", frozen.elapsed());
    for id in ["decode", "prefill"] {
        let load = cell.at_rest(id).await;
        assert_eq!(load.free_blocks + load.cached_blocks, 512, "{id}");
    }
}
