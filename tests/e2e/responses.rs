//! `/v1/responses` through the binary: with the official Python package, over a restart, and with a coordinator that is
//! killed while it runs one in the background.

use super::support::cluster::Cluster;
use super::support::http::{Answer, request_with};
use super::support::programs::run_openai_script;
use super::support::{eventually, signal};
use hyper::{Method, StatusCode};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(90);
const JSON: &[(&str, &str)] = &[("content-type", "application/json")];

async fn post(url: &str, body: Value) -> Answer {
    request_with(Method::POST, url, "/v1/responses", JSON, body.to_string()).await
}

async fn get(url: &str, id: &Value) -> Answer {
    let path = format!("/v1/responses/{}", id.as_str().expect("an id"));
    request_with(Method::GET, url, &path, JSON, String::new()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_openai_package_and_a_restart() {
    let cluster = Cluster::start(&["--prefill", "0"]).await;
    run_openai_script("tests/python/openai_responses.py", &cluster.url);
    let body = json!({"model": "baton-demo", "input": "hi", "max_output_tokens": 4});
    let made = post(&cluster.url, body).await;
    assert_eq!(made.status, StatusCode::OK, "{}", made.json());
    let made = made.json();
    cluster.assert_nothing_leaked().await;
    let directory = cluster.stop_and_keep().await;
    let cluster = Cluster::start_in(directory, &["--prefill", "0"]).await;
    let found = get(&cluster.url, &made["id"]).await;
    assert_eq!((found.status, found.json()), (StatusCode::OK, made));
    assert!(cluster.stop().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_coordinator_leaves_a_response_that_failed() {
    let cluster = Cluster::start(&["--prefill", "0"]).await;
    // To the end of the context: longer than it takes to kill it.
    let body = json!({"model": "baton-demo", "input": "hi", "background": true, "ignore_eos": true});
    let begun = post(&cluster.url, body).await;
    assert_eq!(begun.status, StatusCode::OK, "{}", begun.json());
    let id = begun.json()["id"].clone();
    let old = cluster.pid("coordinator-0");
    signal(old, Signal::KILL);
    // What supervises it starts it again, on the same disk.
    let url = eventually("another process serves", LONG, || async {
        let ready = cluster.ready()?;
        let pid = ready["coordinators"][0]["pid"].as_u64()?;
        let url = ready["url"].as_str()?.to_owned();
        let there = tokio::net::TcpStream::connect(url.trim_start_matches("http://"))
            .await
            .is_ok();
        (pid != u64::from(old) && there).then_some(url)
    })
    .await;
    let ended = eventually("it is told how it ended", LONG, || async {
        let answer = get(&url, &id).await;
        // The group may have no leader yet.
        (answer.status == StatusCode::OK).then(|| answer.json())
    })
    .await;
    assert_eq!(
        (&ended["status"], &ended["error"]["code"]),
        (&json!("failed"), &json!("server_error")),
        "{ended}"
    );
    assert!(cluster.stop().await.success());
}
