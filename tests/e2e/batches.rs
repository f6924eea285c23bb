//! Files and batches through the binary: with curl and the official Python package; and with a coordinator that is killed in
//! the middle, alone and in a group. Whatever dies, each line has one answer and one charge, at half the price.

use super::support::cluster::{Cluster, baton};
use super::support::http::{chat_body, request_with};
use super::support::programs::{have, run_openai_script};
use super::support::{eventually, signal};
use hyper::{Method, StatusCode};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

const ROOT: &str = "sk-operator-for-this-test";
const LONG: Duration = Duration::from_secs(90);
/// Enough that a step is told long before the last: the demo model takes seconds for them.
const LINES: usize = 600;

#[tokio::test(flavor = "multi_thread")]
async fn curl_and_the_openai_package() {
    let cluster = Cluster::start(&["--prefill", "0"]).await;
    run_openai_script("tests/python/openai_batches.py", &cluster.url);
    if have("curl", &["--version"]) {
        let input = cluster.data().join("in.jsonl");
        std::fs::write(&input, lines(3, 4)).expect("written");
        let curl = |args: &[&str]| -> Value {
            let output = Command::new("curl")
                .args(["-sS", "--max-time", "60"])
                .args(args)
                .output()
                .expect("curl runs");
            assert!(output.status.success(), "{args:?}: {output:?}");
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {output:?}"))
        };
        let at = |path: &str| format!("{}{path}", cluster.url);
        let file = curl(&[
            "-F",
            "purpose=batch",
            "-F",
            &format!("file=@{}", input.display()),
            &at("/v1/files"),
        ]);
        let asked =
            json!({"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"});
        let asked = asked.to_string();
        let made = curl(&["-H", "content-type: application/json", "-d", &asked, &at("/v1/batches")]);
        let path = at(&format!("/v1/batches/{}", made["id"].as_str().expect("an id")));
        let over = eventually("it is over", LONG, || {
            let batch = curl(&[&path]);
            async move { (batch["status"] == "completed").then_some(batch) }
        });
        assert_eq!(
            over.await["request_counts"],
            json!({"total": 3, "completed": 3, "failed": 0})
        );
    } else {
        eprintln!("skipped: curl is not installed");
    }
    cluster.assert_nothing_leaked().await;
    assert!(cluster.stop().await.success());
}

/// Requests that differ.
fn lines(count: usize, max_tokens: usize) -> String {
    let line = |n: usize| {
        let body = chat_body(
            &format!("Count to {n}."),
            json!({"max_tokens": max_tokens, "ignore_eos": true, "temperature": 1}),
        );
        json!({"custom_id": format!("r{n}"), "method": "POST", "url": "/v1/chat/completions", "body": body})
    };
    (0..count).map(|n| format!("{}\n", line(n))).collect()
}

fn ask(url: &str, args: &[&str]) -> Value {
    let output = baton()
        .args(args)
        .args(["--json", "--url", url])
        .env("BATON_API_KEY", ROOT)
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{args:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {output:?}"))
}

/// A caller and what it sees.
struct Client {
    url: String,
    key: String,
}

impl Client {
    /// Of a new project, with a price for what it calls.
    fn new(url: &str) -> Self {
        let project = ask(url, &["projects", "create", "batches"])["id"]
            .as_str()
            .expect("an id")
            .to_owned();
        let made = ask(url, &["keys", "create", "client", "--project", &project]);
        ask(
            url,
            &[
                "prices",
                "set",
                "baton-demo",
                "--input",
                "20",
                "--cached-input",
                "2",
                "--output",
                "80",
            ],
        );
        Self {
            url: url.to_owned(),
            key: made["value"].as_str().expect("a secret").to_owned(),
        }
    }

    fn at(&self, url: &str) -> Self {
        Self {
            url: url.to_owned(),
            key: self.key.clone(),
        }
    }

    async fn send(&self, method: Method, path: &str, kind: &str, body: String) -> super::support::http::Answer {
        let bearer = format!("Bearer {}", self.key);
        let headers = [("authorization", bearer.as_str()), ("content-type", kind)];
        request_with(method, &self.url, path, &headers, body).await
    }

    async fn get(&self, path: &str) -> super::support::http::Answer {
        self.send(Method::GET, path, "application/json", String::new()).await
    }

    /// Uploads lines and has them run.
    async fn begin(&self, lines: &str) -> String {
        let body = format!(
            "--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
             --b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"in\"\r\n\r\n{lines}\r\n--b--\r\n"
        );
        let file = self
            .send(Method::POST, "/v1/files", "multipart/form-data; boundary=b", body)
            .await;
        assert_eq!(file.status, StatusCode::OK, "{}", file.json());
        let asked =
            json!({"input_file_id": file.json()["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"});
        let made = self
            .send(Method::POST, "/v1/batches", "application/json", asked.to_string())
            .await;
        assert_eq!(made.status, StatusCode::OK, "{}", made.json());
        made.json()["id"].as_str().expect("an id").to_owned()
    }

    async fn batch(&self, id: &str) -> Value {
        self.get(&format!("/v1/batches/{id}")).await.json()
    }

    /// Waits until so many lines are done and told.
    async fn progress(&self, id: &str, least: u64) -> u64 {
        eventually("it goes on", LONG, || async {
            // A member that has just started may not know of it yet.
            let done = self.batch(id).await["request_counts"]["completed"].as_u64()?;
            (done >= least).then_some(done)
        })
        .await
    }

    /// Waits for the end and checks everything about it.
    async fn check(&self, id: &str, total: usize) {
        let over = eventually("it is over", LONG, || async {
            let batch = self.batch(id).await;
            assert!(batch.get("errors").is_none(), "{batch}");
            (batch["status"] == "completed").then_some(batch)
        })
        .await;
        assert_eq!(
            over["request_counts"],
            json!({"total": total, "completed": total, "failed": 0})
        );
        let path = format!("/v1/files/{}/content", over["output_file_id"].as_str().expect("a file"));
        let answer = self.get(&path).await;
        assert_eq!(answer.status, StatusCode::OK);
        let text = String::from_utf8(answer.body.to_vec()).expect("UTF-8");
        let answers: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        let by_id: BTreeMap<&str, &Value> = answers
            .iter()
            .map(|line| (line["custom_id"].as_str().expect("an id"), &line["response"]["body"]))
            .collect();
        assert_eq!((answers.len(), by_id.len()), (total, total), "every line once");
        let sum = |pointer: &str| -> u64 {
            by_id
                .values()
                .map(|body| body.pointer(pointer).and_then(Value::as_u64).expect("a count"))
                .sum()
        };
        let (input, cached, output) = (
            sum("/usage/prompt_tokens"),
            sum("/usage/prompt_tokens_details/cached_tokens"),
            sum("/usage/completion_tokens"),
        );
        let usage = &over["usage"];
        assert_eq!(
            (&usage["input_tokens"], &usage["output_tokens"]),
            (&json!(input), &json!(output))
        );

        // One row with tokens for each line. A line that was run again may have found more cached than the row says, which
        // stands as it was settled first.
        let rows = self.rows();
        let billed: Vec<&Value> = rows
            .iter()
            .filter(|row| row["usage"]["completion_tokens"] != 0)
            .collect();
        assert_eq!(billed.len(), total, "every line is billed once");
        let counted = |name: &str| -> u64 {
            billed
                .iter()
                .map(|row| row["usage"][name].as_u64().expect("a count"))
                .sum()
        };
        assert_eq!(
            (counted("prompt_tokens"), counted("completion_tokens")),
            (input, output)
        );
        assert!(cached <= input);
        for row in &billed {
            let record = &row["usage"];
            assert_eq!(record["service_tier"], "batch");
            let tokens = |name: &str| record[name].as_u64().expect("a count");
            let uncached = tokens("prompt_tokens") - tokens("cached_tokens");
            let charge = |name: &str| {
                row["charge"][name]
                    .as_str()
                    .expect("text")
                    .parse::<u64>()
                    .expect("a number")
            };
            // 20, 2 and 80 USD per million, halved.
            assert_eq!(charge("input_nano"), uncached * 10_000);
            assert_eq!(charge("cached_input_nano"), tokens("cached_tokens") * 1_000);
            assert_eq!(charge("output_nano"), tokens("completion_tokens") * 40_000);
        }
        for row in rows.iter().filter(|row| row["usage"]["completion_tokens"] == 0) {
            assert_eq!(row["charge"]["input_nano"], "0", "who got nothing pays nothing: {row}");
        }
        let usage = ask(&self.url, &["usage", "--bucket", "1h", "--days", "1"]);
        let told: u64 = usage
            .as_array()
            .expect("buckets")
            .iter()
            .flat_map(|bucket| bucket["results"].as_array().expect("results").clone())
            .map(|result| result["output_tokens"].as_u64().expect("a count"))
            .sum();
        assert_eq!(told, output);
    }

    fn rows(&self) -> Vec<Value> {
        let export = baton()
            .args(["ledger", "export", "--url", &self.url])
            .env("BATON_API_KEY", ROOT)
            .output();
        let export = export.expect("the binary runs");
        assert!(export.status.success(), "{export:?}");
        let text = String::from_utf8(export.stdout).expect("UTF-8");
        let parsed = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        parsed
            .filter_map(|line| {
                let whole = line.get("charge").is_some().then(|| line.clone());
                line.get("row").cloned().or(whole)
            })
            .collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_coordinator_is_killed_in_the_middle() {
    let cluster = Cluster::start(&["--prefill", "0", "--api-key", ROOT]).await;
    let client = Client::new(&cluster.url);
    let id = client.begin(&lines(LINES, 48)).await;
    let before = client.progress(&id, 2).await;
    assert!(before < LINES as u64, "it was over before it could be killed");
    let old = cluster.pid("coordinator-0");
    signal(old, Signal::KILL);
    eventually("another process serves", LONG, || async {
        let ready = cluster.ready()?;
        let pid = ready["coordinators"][0]["pid"].as_u64()?;
        (pid != u64::from(old)).then_some(())
    })
    .await;
    let client = client.at(cluster.ready().expect("it serves")["url"].as_str().expect("a URL"));
    eventually("it answers", LONG, || async {
        let probe = tokio::time::timeout(Duration::from_secs(5), reachable(&client.url)).await;
        probe.is_ok_and(|there| there).then_some(())
    })
    .await;
    assert!(client.progress(&id, before).await >= before, "what was told is kept");
    client.check(&id, LINES).await;
    assert!(cluster.stop().await.success());
}

/// Whether somebody listens there.
async fn reachable(url: &str) -> bool {
    let addr = url.trim_start_matches("http://");
    tokio::net::TcpStream::connect(addr).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn another_member_goes_on_with_a_batch() {
    let cluster = Cluster::start(&[
        "--coordinators",
        "3",
        "--prefill",
        "0",
        "--decode",
        "1",
        "--threads",
        "1",
        "--api-key",
        ROOT,
    ])
    .await;
    let urls = super::group::urls(&cluster);
    let clients: Vec<Client> = {
        let first = Client::new(&urls[0]);
        urls.iter().map(|url| first.at(url)).collect()
    };
    let id = clients[0].begin(&lines(LINES, 48)).await;
    let before = clients[0].progress(&id, 2).await;
    assert!(before < LINES as u64, "it was over before it could be killed");
    // Whoever runs it says so in its log.
    let runner = (0..3)
        .find(|n| {
            let log = std::fs::read_to_string(cluster.data().join(format!("logs/coordinator-{n}.log")));
            log.unwrap_or_default().contains("running a batch")
        })
        .expect("one of them runs it");
    signal(cluster.pid(&format!("coordinator-{runner}")), Signal::KILL);
    let other = &clients[(runner + 1) % 3];
    other.check(&id, LINES).await;
    assert!(cluster.stop().await.success());
}
