//! The main job: start, chat, look, stop.

use super::support::cluster::{Cluster, baton};
use super::support::eventually;
use super::support::http::{Chat, ChatStream, chat, chat_body, get};
use hyper::StatusCode;
use serde_json::{Value, json};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn up_serves_chat_and_stops_cleanly() {
    let cluster = Cluster::start(&["--prefill-threshold", "0"]).await;
    let url = cluster.url.clone();

    assert_eq!(get(&url, "/health").await.status, StatusCode::OK);
    assert_eq!(get(&url, "/ready").await.status, StatusCode::OK);
    let models = get(&url, "/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], "baton-demo", "{models}");

    // Whole and streamed answers are the same, and usage is exact.
    let body = chat_body(
        "What is baton, and what does a prefill worker do for a decode worker?",
        json!({"max_tokens": 12, "ignore_eos": true}),
    );
    let whole = chat(&url, &body).await;
    assert_eq!(whole.finish_reason, "length");
    assert_eq!(whole.count("completion_tokens"), 12);
    assert_eq!(whole.count("total_tokens"), whole.count("prompt_tokens") + 12);
    let streamed = ChatStream::start(&url, &body).await.finish().await;
    assert_eq!(
        (&streamed.text, &streamed.finish_reason),
        (&whole.text, &whole.finish_reason)
    );
    assert_eq!(streamed.count("completion_tokens"), 12);
    assert_eq!(streamed.count("prompt_tokens"), whole.count("prompt_tokens"));
    let cached = |chat: &Chat| {
        chat.usage["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .expect("cached_tokens")
    };
    assert!(cached(&streamed) <= streamed.count("prompt_tokens"));

    // The prompt was long enough to be computed on the other worker: its blocks travelled.
    eventually(
        "the prefill worker has sent KV blocks",
        Duration::from_secs(10),
        || async {
            let workers = cluster.workers().await;
            let sent = |w: &Value| w["role"] == "prefill" && w["transferred_bytes_total"].as_u64() > Some(0);
            workers.iter().any(sent).then_some(())
        },
    )
    .await;
    cluster.assert_nothing_leaked().await;

    status_shows_the_workers(&cluster);
    let metrics = get(&url, "/metrics").await;
    assert!(
        String::from_utf8_lossy(&metrics.body).contains("baton:"),
        "metrics carry our prefix"
    );
    let printed = cluster.output("stdout");
    assert!(
        printed.contains(&format!("{url}/v1")) && printed.contains("curl") && printed.contains("baton status"),
        "{printed}"
    );

    assert!(cluster.stop().await.success());
}

fn status_shows_the_workers(cluster: &Cluster) {
    let status = |args: &[&str]| {
        let output = baton()
            .arg("status")
            .args(["--url", &cluster.url])
            .args(args)
            .output()
            .expect("the binary runs");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let workers: Vec<Value> = serde_json::from_str(&status(&["--json"])).expect("an array");
    let mut seen: Vec<_> = workers
        .iter()
        .map(|w| (w["role"].as_str(), w["state"].as_str(), w["pid"].as_u64()))
        .collect();
    seen.sort_unstable();
    let pid = |name| Some(u64::from(cluster.pid(name)));
    assert_eq!(
        seen,
        [
            (Some("decode"), Some("ready"), pid("decode-0")),
            (Some("prefill"), Some("ready"), pid("prefill-0"))
        ]
    );
    let table = status(&[]);
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(
        table.contains("decode-0") && table.contains(&cluster.pid("prefill-0").to_string()),
        "{table}"
    );
}

/// State outlives a run: a second start on the same directory serves, with the same certificate authority.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_finds_the_first_ones_state() {
    let first = Cluster::start(&["--prefill", "0"]).await;
    let before = chat(&first.url, &chat_body("hello", json!({}))).await;
    let authority = std::fs::read(first.data().join("identity/ca.pem")).expect("a CA");
    let directory = first.stop_and_keep().await;

    let second = Cluster::start_in(directory, &["--prefill", "0"]).await;
    let after = chat(&second.url, &chat_body("hello", json!({}))).await;
    assert_eq!((before.text, before.finish_reason), (after.text, after.finish_reason));
    assert_eq!(
        std::fs::read(second.data().join("identity/ca.pem")).expect("a CA"),
        authority
    );
    assert!(second.stop().await.success());
}

/// A client that hangs up ends the work on every worker; nobody computes an answer that nobody reads.
#[tokio::test(flavor = "multi_thread")]
async fn hanging_up_ends_the_work() {
    const ASKED: u64 = 1900;
    let cluster = Cluster::start(&["--prefill-threshold", "4"]).await;
    let body = chat_body(
        "count as far as you can",
        json!({"max_tokens": ASKED, "ignore_eos": true}),
    );
    let mut stream = ChatStream::start(&cluster.url, &body).await;
    for _ in 0..3 {
        stream.next().await.expect("the answer has begun");
    }
    drop(stream);
    cluster.assert_nothing_leaked().await;
    let workers = cluster.workers().await;
    let generated: u64 = workers
        .iter()
        .filter_map(|w| w["generation_tokens_total"].as_u64())
        .sum();
    assert!((1..ASKED).contains(&generated), "{generated} tokens were computed");
    assert!(cluster.stop().await.success());
}

/// Beyond loopback a key is needed, for people and for our own commands.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_guards_the_api() {
    const KEY: &str = "sk-test-0123456789abcdef";
    let cluster = Cluster::start(&["--prefill", "0", "--host", "0.0.0.0", "--api-key", KEY]).await;
    assert!(
        cluster.url.starts_with("http://127.0.0.1:"),
        "{}: an address one can connect to",
        cluster.url
    );
    for path in ["/v1/models", "/cluster/workers", "/metrics"] {
        assert_eq!(get(&cluster.url, path).await.status, StatusCode::UNAUTHORIZED, "{path}");
    }
    let status = |args: &[&str]| {
        let output = baton()
            .args(["status", "--json", "--url", &cluster.url])
            .args(args)
            .output();
        output.expect("the binary runs")
    };
    assert!(status(&["--api-key", KEY]).status.success());
    let refused = status(&[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("BATON_API_KEY"),
        "{refused:?}"
    );
    let printed = cluster.output("stdout");
    assert!(
        printed.contains("$BATON_API_KEY") && !printed.contains(KEY),
        "the key is not printed: {printed}"
    );
    assert!(cluster.stop().await.success());
}
