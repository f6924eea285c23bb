//! Prefill on one worker, decode on another, over real sockets: the same tokens as one worker alone, whatever is
//! cancelled or killed on the way, and no block left behind.

mod support;

use baton_engine::{MockConfig, MockEngine};
use baton_proto::worker::{FinishReason, Generate};
use baton_worker::WorkerRole;
use std::collections::HashMap;
use std::time::Duration;
use support::{Answer, Cell, Gateway, request, slow_engine, within};

const REQUESTS: u64 = 300;

fn engine() -> MockEngine {
    slow_engine(Duration::ZERO)
}

async fn run_all(gateway: &Gateway, requests: impl Iterator<Item = Generate>) -> HashMap<String, Answer> {
    let mut pending = Vec::new();
    for request in requests {
        let name = request.request_id.clone();
        pending.push((name, gateway.submit(request).await.1));
    }
    let mut answers = HashMap::new();
    for (name, answer) in pending {
        answers.insert(name, within("an answer", answer).await.expect("the stream stays up"));
    }
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disaggregated_equals_monolithic_with_cancels() {
    let cell = Cell::new().await;
    let lone = cell.worker("lone", WorkerRole::Combined, engine()).await;
    let decode = cell.worker("decode", WorkerRole::Decode, engine()).await;
    let prefill = cell.worker("prefill", WorkerRole::Prefill, engine()).await;

    let expected = run_all(&cell.gateway(&lone).await, (0..REQUESTS).map(request)).await;

    let gateway = cell.gateway(&decode).await;
    let mut pending = Vec::new();
    let mut cancelled = Vec::new();
    for n in 0..REQUESTS {
        let with_peer = Generate {
            prefill_peer: Some(prefill.peer()),
            ..request(n)
        };
        pending.push((format!("request-{n}"), gateway.submit(with_peer.clone()).await.1));
        if n % 3 == 0 {
            // A twin that nobody waits for, cancelled somewhere on its way.
            let (id, answer) = gateway.submit(with_peer).await;
            cancelled.push(answer);
            if n % 2 == 0 {
                tokio::time::sleep(Duration::from_millis(n % 5)).await;
            }
            gateway.cancel(id).await;
        }
    }
    let mut handed_over = 0;
    for (name, answer) in pending {
        let answer = within("an answer", answer).await.unwrap();
        let alone = &expected[&name];
        assert_eq!(answer.tokens, alone.tokens, "{name}");
        assert_eq!(answer.finish.reason, alone.finish.reason, "{name}");
        assert_eq!(answer.finish.prompt_tokens, alone.finish.prompt_tokens);
        assert_eq!(answer.finish.completion_tokens as usize, answer.tokens.len());
        handed_over += u64::from(answer.finish.prefill_worker_id == "prefill");
    }
    for answer in cancelled {
        let answer = within("the end of a cancelled request", answer).await.unwrap();
        assert_ne!(answer.finish.reason(), FinishReason::Error, "{}", answer.finish.error);
    }
    assert!(
        handed_over > REQUESTS / 2,
        "only {handed_over} of {REQUESTS} prompts were computed by the prefill worker"
    );
    for node in [&lone, &decode, &prefill] {
        let load = cell.at_rest(&node.id).await;
        assert_eq!(load.free_blocks + load.cached_blocks, 512, "{}", node.id);
    }
    prefill.stop().await;
    decode.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_of_other_block_sizes_understand_each_other() {
    let cell = Cell::new().await;
    let lone = cell.worker("lone", WorkerRole::Combined, engine()).await;
    let expected = run_all(&cell.gateway(&lone).await, (0..60).map(request)).await;
    let decode = cell.worker("decode", WorkerRole::Decode, engine()).await;
    let gateway = cell.gateway(&decode).await;
    for (name, block_size) in [("small", 4), ("large", 64)] {
        let sized = MockEngine::new(MockConfig {
            block_size,
            total_blocks: 512,
            ..MockConfig::default()
        });
        let prefill = cell
            .worker(name, WorkerRole::Prefill, sized.expect("a valid mock"))
            .await;
        let requests = (0..60).map(|n| Generate {
            prefill_peer: Some(prefill.peer()),
            // Nothing is found in the cache of an earlier round.
            cache_salt: name.as_bytes().into(),
            ..request(n)
        });
        let mut handed_over = 0;
        for (id, answer) in run_all(&gateway, requests).await {
            assert_eq!(answer.tokens, expected[&id].tokens, "{id}");
            handed_over += u64::from(answer.finish.prefill_worker_id == name);
        }
        assert!(
            handed_over > 30,
            "only {handed_over} of 60 prompts were computed by {name}"
        );
        cell.at_rest(&prefill.id).await;
        prefill.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_prefill_worker_costs_time_only() {
    let cell = Cell::new().await;
    let lone = cell.worker("lone", WorkerRole::Combined, engine()).await;
    let expected = run_all(&cell.gateway(&lone).await, (0..40).map(request)).await;
    let decode = cell.worker("decode", WorkerRole::Decode, engine()).await;
    let gateway = cell.gateway(&decode).await;
    // Slow steps, so that the kill falls into the middle of prompts.
    let slow = slow_engine(Duration::from_millis(5));
    let mut prefill = cell.worker("prefill", WorkerRole::Prefill, slow).await;

    let peer = prefill.peer();
    let mut pending = Vec::new();
    for n in 0..40 {
        pending.push((
            n,
            gateway
                .submit(Generate {
                    prefill_peer: Some(peer.clone()),
                    ..request(n)
                })
                .await
                .1,
        ));
    }
    tokio::time::sleep(Duration::from_millis(40)).await;
    prefill.kill();
    for (n, answer) in pending {
        let answer = within("an answer after the kill", answer).await.unwrap();
        assert_eq!(answer.tokens, expected[&format!("request-{n}")].tokens, "request {n}");
    }
    // A peer that was never there is no different.
    let answer = gateway
        .generate(Generate {
            prefill_peer: Some(peer),
            ..request(7)
        })
        .await;
    assert_eq!(answer.tokens, expected["request-7"].tokens);
    let load = cell.at_rest("decode").await;
    assert_eq!(load.free_blocks + load.cached_blocks, 512);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_hangs_up_cancels_everywhere() {
    let cell = Cell::new().await;
    let decode = cell
        .worker("decode", WorkerRole::Decode, slow_engine(Duration::from_millis(5)))
        .await;
    let prefill = cell
        .worker("prefill", WorkerRole::Prefill, slow_engine(Duration::from_millis(5)))
        .await;
    let gateway = cell.gateway(&decode).await;
    for n in 0..60 {
        let long = Generate {
            max_tokens: 10_000,
            prefill_peer: Some(prefill.peer()),
            ..request(n)
        };
        gateway
            .submit(Generate {
                stop_token_ids: vec![],
                ..long
            })
            .await;
    }
    tokio::time::sleep(Duration::from_millis(30)).await;
    drop(gateway);
    for id in ["decode", "prefill"] {
        let load = cell.at_rest(id).await;
        assert_eq!(load.free_blocks + load.cached_blocks, 512, "{id}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_model_or_epoch_is_refused_and_computed_locally() {
    let cell = Cell::new().await;
    let decode = cell.worker("decode", WorkerRole::Decode, engine()).await;
    let other = cell
        .worker_of_model("other", WorkerRole::Prefill, engine(), [8; 32])
        .await;
    let gateway = cell.gateway(&decode).await;
    let alone = gateway.generate(request(5)).await;
    let mut wrong_epoch = other.peer();
    wrong_epoch.epoch = 99;
    for peer in [other.peer(), wrong_epoch] {
        let answer = gateway
            .generate(Generate {
                prefill_peer: Some(peer),
                ..request(5)
            })
            .await;
        assert_eq!(answer.tokens, alone.tokens);
        assert_eq!(answer.finish.prefill_worker_id, "");
    }
    // A worker may not pose as a gateway.
    let worker = baton_identity::Identity::load(cell.identity_dir(), "decode").unwrap();
    let as_worker = Gateway::attach(&worker, decode.addr).await;
    assert!(as_worker.is_err(), "without the right KV digest");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_cannot_run_are_refused_in_words() {
    let cell = Cell::new().await;
    let node = cell.worker("lone", WorkerRole::Combined, engine()).await;
    let gateway = cell.gateway(&node).await;
    let too_long = Generate {
        prompt: vec![1; 200_000],
        ..request(0)
    };
    let unknown_token = Generate {
        prompt: vec![u32::MAX],
        ..request(0)
    };
    let nothing = Generate {
        max_tokens: 0,
        ..request(0)
    };
    let mut hot = request(0);
    hot.sampling.as_mut().unwrap().temperature = f32::NAN;
    for bad in [too_long, unknown_token, nothing, hot] {
        let answer = gateway.generate(bad).await;
        assert_eq!(answer.finish.reason(), FinishReason::Error);
        assert!(!answer.finish.error.is_empty());
    }
    assert_eq!(
        gateway.generate(request(1)).await.finish.reason(),
        gateway.generate(request(1)).await.finish.reason()
    );
}
