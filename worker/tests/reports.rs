//! What a worker tells its coordinator of its prefix cache and its speed.

mod support;

use baton_engine::{MockConfig, MockEngine, MockTiming};
use baton_proto::block_hash::{cache_root, chain, short};
use baton_proto::worker::Generate;
use baton_worker::WorkerRole;
use std::collections::HashSet;
use std::time::Duration;
use support::{Cell, request, within};

fn engine(total_blocks: u32) -> MockEngine {
    let timing = MockTiming {
        step: Duration::from_millis(1),
        token: Duration::from_micros(20),
        ..MockTiming::default()
    };
    MockEngine::new(MockConfig {
        total_blocks,
        timing,
        ..MockConfig::default()
    })
    .expect("a valid mock")
}

/// A prompt of `blocks` blocks and a token, of which one token is generated.
fn prompt(salt: u32, blocks: u32) -> Generate {
    Generate {
        request_id: format!("prompt-{salt}"),
        prompt: (0..blocks * 16 + 1).map(|i| (salt + i * i) % 90).collect(),
        max_tokens: 1,
        stop_token_ids: Vec::new(),
        cache_salt: b"tenant".to_vec().into(),
        ..request(1)
    }
}

fn names(request: &Generate) -> Vec<u64> {
    let root = cache_root(&[7; 32], b"tenant");
    chain(&root, &request.prompt, 16).iter().map(short).collect()
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    within(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_coordinator_knows_every_block_after_evictions_and_a_resync() {
    let cell = Cell::new().await;
    let worker = cell.worker("w", WorkerRole::Combined, engine(64)).await;
    let gateway = cell.gateway(&worker).await;
    until("a first telling", || cell.heard("w", |heard| heard.resets) == 1).await;
    let first = prompt(1, 10);
    gateway.generate(first.clone()).await;
    let expected: HashSet<u64> = names(&first).into_iter().collect();
    assert_eq!(expected.len(), 10);
    until("ten blocks", || cell.heard("w", |heard| heard.blocks == expected)).await;

    // Twenty prompts through 64 blocks: most are evicted again.
    for salt in 2..22 {
        gateway.generate(prompt(salt, 10)).await;
    }
    let load = cell.at_rest("w").await;
    // The arena was full before, so the count alone may be right while the last prompt's events are still on their way.
    let last = names(&prompt(21, 10));
    until("as many names as cached blocks, the last prompt's among them", || {
        cell.heard("w", |heard| {
            heard.blocks.len() == load.cached_blocks as usize && last.iter().all(|name| heard.blocks.contains(name))
        })
    })
    .await;
    let known = cell.heard("w", |heard| heard.blocks.clone());
    assert_eq!(cell.heard("w", |heard| heard.resets), 1, "nothing was lost on the way");

    cell.resync("w").await;
    until("all of it anew", || {
        cell.heard("w", |heard| heard.resets == 2 && heard.blocks == known)
    })
    .await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rates_are_measured_and_pending_tokens_counted() {
    let cell = Cell::new().await;
    let worker = cell.worker("w", WorkerRole::Combined, engine(512)).await;
    let gateway = cell.gateway(&worker).await;
    let long = Generate {
        max_tokens: 40,
        ..prompt(5, 20)
    };
    gateway.generate(long.clone()).await;
    let load = cell.at_rest("w").await;
    assert!(
        load.prefill_tokens_per_s > 0.0 && load.prefill_tokens_per_s < 50_000.0,
        "{load:?}"
    );
    assert!(load.decode_step_us >= 1000, "{load:?}");
    assert_eq!((load.pending_prompt_tokens, load.transfer_bytes_per_s), (0, 0.0));

    // 4,000 tokens at some 30 us each: they are pending for a while, but what is cached is not.
    let mut answers = Vec::new();
    for salt in 10..20 {
        answers.push(gateway.submit(prompt(salt, 25)).await.1);
    }
    let pending = || {
        cell.heard("w", |heard| {
            heard.heartbeat.map_or(0, |load| load.pending_prompt_tokens)
        })
    };
    until("pending tokens", || pending() > 0).await;
    assert!(pending() <= 10 * 401);
    for answer in answers {
        within("an answer", answer).await.expect("the stream stays up");
    }
    until("none pending", || pending() == 0).await;
    worker.stop().await;
}
