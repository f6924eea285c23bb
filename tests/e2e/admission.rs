//! More asked for than can be done: who is served, and what the others are told.

use super::support::cluster::Cluster;
use super::support::eventually;
use super::support::http::{Answer, LIMIT, chat_body, get, request_with};
use hyper::{Method, StatusCode};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Requests of the flood: several times what workers hold at once before coordinators make others wait.
const FLOOD: usize = 200;

async fn chat(url: &str, headers: &[(&str, &str)], prompt: &str, max_tokens: u32) -> Answer {
    let body = chat_body(prompt, json!({"max_tokens": max_tokens, "ignore_eos": true})).to_string();
    request_with(Method::POST, url, "/v1/chat/completions", headers, body).await
}

/// A value of `/metrics`, 0 where it is not there.
async fn metric(url: &str, headers: &[(&str, &str)], line: &str) -> u64 {
    let text = request_with(Method::GET, url, "/metrics", headers, "").await.body;
    let text = String::from_utf8_lossy(&text).into_owned();
    let value = text.lines().find_map(|l| l.strip_prefix(line)?.trim().parse().ok());
    value.unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_tenants_flood_leaves_another_its_share() {
    let flood_key = [("authorization", "Bearer sk-flood-flood-flood")];
    let meek_key = [("authorization", "Bearer sk-meek-meek-meek")];
    let tenants = [
        "--tenant",
        "flood=sk-flood-flood-flood",
        "--tenant",
        "meek:2=sk-meek-meek-meek",
    ];
    let cluster = Cluster::start(&tenants).await;
    let url = cluster.url.clone();
    assert_eq!(get(&url, "/v1/models").await.status, StatusCode::UNAUTHORIZED);

    let ended = Arc::new(AtomicUsize::new(0));
    let flood: Vec<_> = (0..FLOOD)
        .map(|i| {
            let (url, ended) = (url.clone(), ended.clone());
            tokio::spawn(async move {
                let answer = chat(&url, &flood_key, &format!("What is {i} and {i}?"), 64).await;
                ended.fetch_add(1, Ordering::SeqCst);
                answer
            })
        })
        .collect();
    let queued = "baton:num_requests_queued{model_name=\"baton-demo\"} ";
    eventually("the flood waits", LIMIT, || async {
        (metric(&url, &meek_key, queued).await >= FLOOD as u64 / 4).then_some(())
    })
    .await;
    let answer = chat(&url, &meek_key, "What is baton?", 1).await;
    let before = ended.load(Ordering::SeqCst);
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    let left = metric(&url, &meek_key, queued).await;
    assert!(
        left > 0 && before < FLOOD,
        "{before} of a flood of {FLOOD} went before one request of another tenant, {left} wait"
    );
    for request in flood {
        let answer = request.await.expect("no request fails");
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    }
    for (tenant, count) in [("flood", FLOOD as u64), ("meek", 1)] {
        let line = format!(
            "baton:admission_decisions_total{{model_name=\"baton-demo\",tenant=\"{tenant}\",outcome=\"admitted\"}} "
        );
        assert_eq!(metric(&url, &meek_key, &line).await, count, "{tenant}");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_miss_its_target_is_refused_early_with_a_reason() {
    let cluster = Cluster::start(&["--prefill", "0"]).await;
    let url = cluster.url.clone();
    let prompt = |i: usize| format!("{i} {}", "what is the code of the list ".repeat(12));
    let target = [("x-baton-ttft-target-ms", "1")];
    // A cluster that has measured nothing refuses nothing; it learns from what it serves.
    let mut served = 0;
    let refused = loop {
        let answer = chat(&url, &target, &prompt(served), 1).await;
        if answer.status != StatusCode::OK {
            break answer;
        }
        served += 1;
        assert!(
            served < 500,
            "nothing was ever predicted to take longer than a millisecond"
        );
    };
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS, "{refused:?}");
    assert_eq!(refused.header("x-baton-reject-reason"), Some("ttft_target"));
    let retry_after = refused.header("retry-after").and_then(|text| text.parse::<u64>().ok());
    assert!(retry_after.is_some_and(|seconds| seconds >= 1), "{refused:?}");
    let json = refused.json();
    assert_eq!(json["error"]["code"], "rate_limit_exceeded", "{json}");
    // The same request without a target, or with one that can be met, is served; the refused one reached no worker.
    let generous = [("x-baton-ttft-target-ms", "3600000")];
    assert_eq!(chat(&url, &generous, &prompt(served), 1).await.status, StatusCode::OK);
    cluster.assert_nothing_leaked().await;
    let generated = cluster.workers().await[0]["generation_tokens_total"].as_u64();
    assert_eq!(
        generated,
        Some(served as u64 + 1),
        "one token for each request that was served"
    );
    cluster.stop().await;
}
