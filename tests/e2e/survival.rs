//! Killed processes: what clients notice (nothing), what is restarted, and what must not be left behind.

use super::support::cluster::{Cluster, assert_all_gone};
use super::support::http::{Chat, ChatStream, chat, chat_body};
use super::support::{eventually, is_alive, signal};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::task::JoinHandle;

/// Time for a killed process to be back in the cluster.
const BACK_MAX: Duration = Duration::from_secs(60);

fn long_prompt(salt: usize, words: usize) -> String {
    (0..words).map(|i| format!("{} ", (i * 7 + salt * 13) % 97)).collect()
}

async fn wait_until_back(cluster: &Cluster, worker: &str, old_pid: u32) {
    eventually("the worker is back", BACK_MAX, || async {
        let back = |w: &Value| w["id"] == worker && w["state"] == "ready" && w["pid"].as_u64() != Some(old_pid.into());
        cluster.workers().await.iter().any(back).then_some(())
    })
    .await;
    assert_ne!(cluster.pid(worker), old_pid, "ready.json follows");
}

/// Sends all requests at once, streaming.
fn send_all(cluster: &Cluster, bodies: &[Value]) -> Vec<JoinHandle<Chat>> {
    let send = |body: &Value| {
        let (url, body) = (cluster.url.clone(), body.clone());
        tokio::spawn(async move { ChatStream::start(&url, &body).await.finish().await })
    };
    bodies.iter().map(send).collect()
}

/// Every request succeeds, and gives what it gives when nobody is killed.
async fn assert_unharmed(
    cluster: &Cluster,
    bodies: &[Value],
    running: Vec<JoinHandle<Chat>>,
    wait_until_well: impl Future,
) {
    let mut first = Vec::new();
    for request in running {
        first.push(request.await.expect("no request fails"));
    }
    wait_until_well.await;
    for (body, first) in bodies.iter().zip(&first) {
        let again = chat(&cluster.url, body).await;
        assert_eq!(
            (&again.text, &again.finish_reason),
            (&first.text, &first.finish_reason),
            "the kill changed the tokens"
        );
        for count in ["prompt_tokens", "completion_tokens"] {
            assert_eq!(again.count(count), first.count(count), "{count}");
        }
    }
    cluster.assert_nothing_leaked().await;
}

fn long_prompts(salt: u64, count: u64) -> Vec<Value> {
    let extra = |seed| json!({"max_tokens": 8, "ignore_eos": true, "temperature": 0.8, "seed": seed});
    (salt..salt + count)
        .map(|seed| chat_body(&long_prompt(seed as usize, 450), extra(seed)))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_worker_killed_in_the_middle_of_prompts_fails_no_request() {
    // Every prompt is handed over, whatever the rates say of it.
    let cluster = Cluster::start(&["--prefill-threshold", "0"]).await;

    // At work on them: long enough for the first prompts to be under way, short enough for the last not to be done.
    let bodies = long_prompts(0, 8);
    let old_pid = cluster.pid("prefill-0");
    let running = send_all(&cluster, &bodies);
    tokio::time::sleep(Duration::from_millis(60)).await;
    signal(old_pid, Signal::KILL);
    assert_unharmed(
        &cluster,
        &bodies,
        running,
        wait_until_back(&cluster, "prefill-0", old_pid),
    )
    .await;

    // Holding them and getting nowhere: it stands still before they arrive, so none can have been done.
    let bodies = long_prompts(100, 4);
    let old_pid = cluster.pid("prefill-0");
    signal(old_pid, Signal::STOP);
    let running = send_all(&cluster, &bodies);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(
        running.iter().all(|request| !request.is_finished()),
        "they wait for the prefill worker"
    );
    signal(old_pid, Signal::KILL);
    assert_unharmed(
        &cluster,
        &bodies,
        running,
        wait_until_back(&cluster, "prefill-0", old_pid),
    )
    .await;

    assert!(cluster.stop().await.success());
}

/// With another decode worker left, answers go on there; without one, they go on when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_decode_worker_killed_in_the_middle_of_answers_fails_no_request() {
    for decode in ["2", "1"] {
        let cluster = Cluster::start(&["--decode", decode]).await;
        let extra = |seed: u64| json!({"max_tokens": 300, "ignore_eos": true, "temperature": 1.0, "seed": seed});
        let bodies: Vec<Value> = (0..8)
            .map(|seed| chat_body(&long_prompt(seed as usize, 20), extra(seed)))
            .collect();
        let old_pid = cluster.pid("decode-0");
        let mut watched = ChatStream::start(&cluster.url, &bodies[0]).await;
        let running = send_all(&cluster, &bodies);
        for _ in 0..10 {
            watched.next().await.expect("the answer goes on");
        }
        signal(old_pid, Signal::KILL);
        watched.finish().await;
        assert_unharmed(
            &cluster,
            &bodies,
            running,
            wait_until_back(&cluster, "decode-0", old_pid),
        )
        .await;
        assert!(cluster.stop().await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_decode_worker_and_coordinator_come_back() {
    let cluster = Cluster::start(&[]).await;
    let body = chat_body("hello", json!({"max_tokens": 4, "ignore_eos": true}));
    let before = chat(&cluster.url, &body).await;

    let old_pid = cluster.pid("decode-0");
    signal(old_pid, Signal::KILL);
    wait_until_back(&cluster, "decode-0", old_pid).await;
    assert_eq!(chat(&cluster.url, &body).await.text, before.text);

    let old_pid = cluster.pid("coordinator-0");
    signal(old_pid, Signal::KILL);
    eventually("the coordinator is replaced", BACK_MAX, || async {
        let pid = cluster.pid("coordinator-0");
        (pid != 0 && pid != old_pid && is_alive(pid) && tokio::net::TcpStream::connect(&cluster.url[7..]).await.is_ok())
            .then_some(())
    })
    .await;
    eventually("the workers have found it", BACK_MAX, || async {
        let workers = cluster.workers().await;
        (workers.iter().filter(|w| w["state"] == "ready").count() == 2).then_some(())
    })
    .await;
    assert_eq!(chat(&cluster.url, &body).await.text, before.text, "at the same address");
    assert!(cluster.stop().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn up_killed_leaves_no_child() {
    let cluster = Cluster::start(&[]).await;
    let pids = cluster.pids();
    assert_eq!(pids.len(), 4);
    signal(cluster.up.id(), Signal::KILL);
    assert_all_gone(&pids[1..]).await;
}
