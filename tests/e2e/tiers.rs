//! KV blocks on disk outlive the worker: killed and started again, it loads a known prompt instead of computing it, and
//! answers the same.

use super::support::cluster::Cluster;
use super::support::http::{chat, chat_body, get};
use super::support::{eventually, signal};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::time::Duration;

async fn disk(cluster: &Cluster, field: &str) -> u64 {
    let workers = cluster.workers().await;
    let decode = workers
        .iter()
        .find(|w| w["role"] == "decode")
        .cloned()
        .unwrap_or_default();
    decode["kv_tiers"]["disk"][field].as_u64().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_finds_its_prefixes_on_disk() {
    let cluster = Cluster::start(&["--prefill", "0", "--kv-disk", "64MiB", "--kv-host-mem", "8MiB"]).await;
    let prompt: String = (0..400).map(|i| format!("{} ", i * i % 89)).collect();
    let body = chat_body(&prompt, json!({"max_tokens": 12, "ignore_eos": true}));
    let first = chat(&cluster.url, &body).await;
    let blocks = first.count("prompt_tokens") / 16;
    eventually("the prompt is on disk", Duration::from_secs(30), || async {
        (disk(&cluster, "writes_total").await >= blocks).then_some(())
    })
    .await;

    let old_pid = cluster.pid("decode-0");
    signal(old_pid, Signal::KILL);
    eventually("the worker is back", Duration::from_secs(60), || async {
        let back = |w: &Value| w["state"] == "ready" && w["pid"].as_u64() != Some(old_pid.into());
        cluster.workers().await.iter().any(back).then_some(())
    })
    .await;
    let again = chat(&cluster.url, &body).await;
    assert_eq!((&again.text, &again.finish_reason), (&first.text, &first.finish_reason));
    let cached = again.usage["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert!(cached >= Some((blocks - 1) * 16), "{:?} of {blocks} blocks", cached);
    let metrics = get(&cluster.url, "/metrics").await;
    let text = String::from_utf8_lossy(&metrics.body).into_owned();
    let hits = text
        .lines()
        .find(|l| l.starts_with("baton:kv_tier_hits") && l.contains("tier=\"disk\""));
    assert!(hits.is_some(), "{text}");
    cluster.assert_nothing_leaked().await;
    assert!(cluster.stop().await.success());
}
