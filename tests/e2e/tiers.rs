//! KV blocks on disk outlive the worker: killed and started again, it loads a known prompt instead of computing it, and
//! answers the same. The router knows whose disk has a prompt, and says so ahead when that worker is busy.

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

/// Two prompts with one beginning are computed on one of two workers, which is killed. Asked again at once, they go
/// where their blocks are on disk, and those of the second are read by the router's hint.
#[tokio::test(flavor = "multi_thread")]
async fn prompts_go_to_the_disk_that_has_them_and_are_read_ahead() {
    let cluster = Cluster::start(&["--prefill", "0", "--decode", "2", "--kv-disk", "64MiB"]).await;
    let words = |from: u32, to: u32| (from..to).map(|i| format!("{} ", i * i % 89)).collect::<String>();
    let body = |text: &str, tokens: u32| chat_body(text, json!({"max_tokens": tokens, "ignore_eos": true}));
    let (one, other) = (words(0, 300), words(0, 100) + &words(1000, 1200));
    let first = [
        chat(&cluster.url, &body(&one, 300)).await,
        chat(&cluster.url, &body(&other, 300)).await,
    ];
    let writer = |w: &Value| w["kv_tiers"]["disk"]["writes_total"].as_u64() > Some(0);
    let blocks = first[0].count("prompt_tokens").max(first[1].count("prompt_tokens")) / 16;
    let id = eventually("both are on one disk", Duration::from_secs(30), || async {
        let workers = cluster.workers().await;
        let with: Vec<&Value> = workers.iter().filter(|w| writer(w)).collect();
        let enough = |w: &&Value| w["kv_tiers"]["disk"]["writes_total"].as_u64() >= Some(blocks + blocks / 2);
        (with.len() == 1)
            .then(|| with.into_iter().find(enough)?["id"].as_str().map(str::to_owned))
            .flatten()
    })
    .await;
    let old_pid = cluster.pid(&id);
    signal(old_pid, Signal::KILL);
    let worker = || async {
        let workers = cluster.workers().await;
        workers.into_iter().find(|w| w["id"] == id.as_str()).unwrap_or_default()
    };
    eventually("the worker is back", Duration::from_secs(60), || async {
        let worker = worker().await;
        (worker["state"] == "ready" && worker["pid"].as_u64() != Some(old_pid.into())).then_some(())
    })
    .await;
    // Its first events may be a moment behind its first heartbeat.
    tokio::time::sleep(Duration::from_millis(300)).await;

    // Whichever comes second finds the other one there.
    let (one, other) = (body(&one, 300), body(&other, 300));
    let (one, other) = tokio::join!(chat(&cluster.url, &one), chat(&cluster.url, &other));
    for (before, after) in first.iter().zip([&one, &other]) {
        assert_eq!(
            (&after.text, &after.finish_reason),
            (&before.text, &before.finish_reason)
        );
        let blocks = before.count("prompt_tokens") / 16;
        let cached = after.usage["prompt_tokens_details"]["cached_tokens"].as_u64();
        assert!(cached >= Some((blocks - 1) * 16), "{cached:?} of {blocks} blocks");
    }
    eventually("the hint was of use", Duration::from_secs(10), || async {
        (worker().await["kv_tiers"]["ahead_hits_total"].as_u64() > Some(0)).then_some(())
    })
    .await;
    cluster.assert_nothing_leaked().await;
    assert!(cluster.stop().await.success());
}
