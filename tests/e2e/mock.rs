//! `baton mock`: a cluster of mock workers in one process, over the real wire.

use super::support::cluster::Cluster;
use super::support::http::{chat, chat_body, get};
use serde_json::json;
use std::collections::HashSet;

#[tokio::test]
async fn forty_workers_answer_with_hand_overs_and_stop() {
    // A slow machine at a hundred times its speed: steps take some time, the test little.
    let args = [
        "--prefill",
        "8",
        "--decode",
        "32",
        "--profile",
        "h100-llama3-8b",
        "--speed",
        "100",
        "--prefill-threshold",
        "0",
    ];
    let cluster = Cluster::start_mock(&args).await;
    let ready = cluster.ready().expect("it serves");
    assert_eq!(ready["workers"].as_array().map(Vec::len), Some(40));

    // The same question, answered by many workers: the same answer, of the asked length, with the usage of a model.
    let url = cluster.url.clone();
    let body = chat_body(
        "what is the capital of france, and of all its neighbours?",
        json!({"max_tokens": 20}),
    );
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..80 {
        let (url, body) = (url.clone(), body.clone());
        asking.spawn(async move { chat(&url, &body).await });
    }
    let answers = asking.join_all().await;
    assert!(
        answers
            .iter()
            .all(|a| a.finish_reason == "length" && a.count("completion_tokens") == 20)
    );
    let texts: HashSet<&str> = answers.iter().map(|a| a.text.as_str()).collect();
    assert_eq!(texts.len(), 1, "{texts:?}");

    cluster.assert_nothing_leaked().await;
    let workers = cluster.workers().await;
    assert_eq!(workers.len(), 40);
    let busy = |role: &str, field: &str| {
        let of_role = workers.iter().filter(|w| w["role"] == role);
        of_role.filter(|w| w[field].as_u64().expect("a count") > 0).count()
    };
    let decoded = busy("decode", "generation_tokens_total");
    assert!(decoded > 16, "only {decoded} decode workers streamed");
    let prefilled = busy("prefill", "generation_tokens_total");
    assert!(prefilled > 4, "only {prefilled} prefill workers computed prompts");
    assert!(cluster.stop().await.success());
}

/// A replayed trace reaches the live cluster to the token: prompts have the lengths recorded and share the blocks recorded.
#[tokio::test]
async fn a_replayed_trace_hits_what_an_infinite_cache_would() {
    // Conversations of three turns, far enough apart for each turn to be in the cache before the next.
    let line = |i: u64| {
        let (turn, who) = (i / 4, i % 4);
        let ids: Vec<u64> = (0..=turn).map(|t| who * 10 + t).collect();
        let (at, tokens) = (turn * 6000 + who * 20, turn * 512 + 100 + who);
        let line = json!({"timestamp": at, "input_length": tokens, "output_length": 4, "hash_ids": ids});
        (line.to_string() + "\n", tokens)
    };
    let (lines, tokens): (Vec<_>, Vec<_>) = (0..12).map(line).unzip();
    let trace = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(trace.path(), lines.concat()).expect("writable");
    let args = "--workers 4 --word-model --profile h100-llama3-8b --speed 4";
    let cluster = Cluster::start_mock(&args.split(' ').collect::<Vec<_>>()).await;
    let args = "bench --json -q --ignore-eos --speed 4 --trace";
    let bench = tokio::process::Command::new(env!("CARGO_BIN_EXE_baton"))
        .args(args.split(' '))
        .arg(trace.path())
        .args(["--url", &cluster.url])
        .output()
        .await
        .expect("it runs");
    let report: serde_json::Value = serde_json::from_slice(&bench.stdout).expect("a report");
    assert_eq!(report["requests_completed"], 12, "{report}");
    // One for each word, and none of a template.
    assert_eq!(report["input_tokens"], tokens.iter().sum::<u64>());
    let rate = |name: &str| report[name].as_f64().expect("a share");
    let (hit, bound) = (rate("hit_rate"), rate("hit_rate_bound"));
    assert!(bound > 0.3 && hit <= bound && hit > 0.8 * bound, "{hit} of {bound}");
    let metrics = get(&cluster.url, "/metrics").await.body;
    let outside = "baton:time_to_first_token_outside_workers_seconds_count{model_name=\"words\"} 12\n";
    assert!(String::from_utf8_lossy(&metrics).contains(outside));
    assert!(cluster.stop().await.success());
}
