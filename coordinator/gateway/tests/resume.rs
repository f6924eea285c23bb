//! A stream whose connection breaks goes on where it stopped, for its owner, once, and for a time.

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_gateway::GatewayConfig;
use serde_json::{Value, json};
use support::{CHAT, Script, TestGateway, Wire, hi, ids, turn};

const RESUME: (&str, &str) = ("x-stream-resume", "true");

async fn open(gateway: &TestGateway) -> Wire {
    let mut wire = gateway.connect().await;
    let body = hi(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let headers = [("content-type", "application/json"), RESUME];
    wire.send("POST", CHAT, &headers, body.to_string().as_bytes()).await;
    wire
}

/// The id of the stream, from the head of its answer.
async fn stream_id(wire: &mut Wire) -> String {
    wire.read_until("\r\n\r\n").await;
    let head = wire.seen();
    let line = head.lines().find_map(|line| line.strip_prefix("x-stream-id: "));
    line.unwrap_or_else(|| panic!("no id: {head}")).to_owned()
}

/// Numbers and data of the events.
fn events(text: &str, id: &str) -> Vec<(u64, String)> {
    let events = text
        .split("\n\n")
        .filter(|event| !event.is_empty() && !event.starts_with(':'));
    let prefix = format!("id: {id}:");
    events
        .map(|event| {
            let (number, data) = event.split_once("\ndata: ").expect(event);
            (
                number.strip_prefix(&prefix).expect(event).parse().unwrap(),
                data.to_owned(),
            )
        })
        .collect()
}

fn content(events: &[(u64, String)]) -> String {
    let chunks = events
        .iter()
        .filter_map(|(_, data)| serde_json::from_str::<Value>(data).ok());
    chunks
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
        .collect()
}

#[tokio::test]
async fn every_cut_leaves_the_same_stream() {
    let gateway = TestGateway::start().await;
    let said = "the quick brown fox jumps over the lazy dog";
    gateway.backend.script(turn(said));
    let mut wire = open(&gateway).await;
    let id = stream_id(&mut wire).await;
    let all = events(&wire.answer().await.text(), &id);
    assert_eq!(content(&all), said);
    assert_eq!(all.last().unwrap().1, "[DONE]");
    assert!(
        all.iter().map(|(number, _)| *number).eq(1..=all.len() as u64),
        "numbered without a gap"
    );
    // What was lost may be anything, up to all of it.
    for cut in 0..=all.len() {
        let last = format!("{id}:{cut}");
        let path = format!("/v1/streams/{id}");
        let answer = gateway.request("GET", &path, &[("last-event-id", &last)], b"").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(events(&answer.text(), &id), all[cut..]);
    }
    let path = format!("/v1/streams/{id}");
    let beyond = format!("{id}:{}", all.len() + 1);
    for (last, status) in [(beyond.as_str(), 410), ("nonsense", 400), ("0.chatcmpl-other:1", 400)] {
        let answer = gateway.request("GET", &path, &[("last-event-id", last)], b"").await;
        assert_eq!(answer.status, status);
        answer.error();
    }
    assert_eq!(gateway.get("/v1/streams/0.chatcmpl-0").await.status, 404);
    assert_eq!(gateway.backend.records().len(), 1, "one request, one record");
}

#[tokio::test]
async fn a_connection_lost_on_the_way_cancels_nothing_and_bills_once() {
    let gateway = TestGateway::start().await;
    gateway.backend.script(Script::SayThenHang(ids("hello")));
    let mut wire = open(&gateway).await;
    let id = stream_id(&mut wire).await;
    wire.read_until("hello").await;
    drop(wire);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(gateway.backend.cancelled.load(Ordering::SeqCst), 0);

    // A second reader takes over from a first that is still there.
    let path = format!("/v1/streams/{id}");
    let mut second = gateway.connect().await;
    second.send("GET", &path, &[], b"").await;
    second.read_until("hello").await;
    let mut third = gateway.connect().await;
    third.send("GET", &path, &[], b"").await;
    third.read_until("hello").await;
    while second.fill().await > 0 {}
    assert_eq!(gateway.backend.cancelled.load(Ordering::SeqCst), 0);
    assert!(gateway.backend.records().is_empty());
}

#[tokio::test]
async fn nobody_comes_back_and_it_is_cancelled_and_settled() {
    let gateway = TestGateway::with(GatewayConfig {
        stream_resume_ms: 150,
        ..GatewayConfig::default()
    })
    .await;
    gateway.backend.script(Script::SayThenHang(ids("hello")));
    let mut wire = open(&gateway).await;
    let id = stream_id(&mut wire).await;
    wire.read_until("hello").await;
    drop(wire);
    let backend = &gateway.backend;
    backend.until("settled", |backend| backend.records().len() == 1).await;
    assert_eq!(backend.cancelled.load(Ordering::SeqCst), 1);
    assert_eq!(backend.records()[0].completion_tokens, 5, "what was handed out");
    assert_eq!(gateway.get(&format!("/v1/streams/{id}")).await.status, 404);
}

#[tokio::test]
async fn who_did_not_ask_cancels_by_hanging_up() {
    let gateway = TestGateway::start().await;
    gateway.backend.script(Script::SayThenHang(ids("hello")));
    let mut wire = gateway.connect().await;
    wire.post(&hi(json!({"stream": true}))).await;
    wire.read_until("hello").await;
    assert!(!wire.seen().contains("x-stream-id") && !wire.seen().contains("id: 0."));
    drop(wire);
    let backend = &gateway.backend;
    backend.until("settled", |backend| backend.records().len() == 1).await;
    let odd = [("content-type", "application/json"), ("x-stream-resume", "maybe")];
    assert_eq!(gateway.request("POST", CHAT, &odd, b"{}").await.status, 400);
}

#[tokio::test]
async fn a_stream_is_its_owners_and_ends_with_the_server() {
    let (gateway, _) = TestGateway::with_accounts().await;
    let (_, _, mine) = gateway.project_key(json!({}), json!({})).await;
    let (_, _, other) = gateway.project_key(json!({}), json!({})).await;
    gateway.backend.script(Script::SayThenHang(ids("hello")));
    let mut wire = gateway.connect().await;
    let bearer = format!("Bearer {mine}");
    let headers = [
        ("content-type", "application/json"),
        RESUME,
        ("authorization", bearer.as_str()),
    ];
    let body = hi(json!({"stream": true})).to_string();
    wire.send("POST", CHAT, &headers, body.as_bytes()).await;
    let id = stream_id(&mut wire).await;
    wire.read_until("hello").await;
    drop(wire);
    let path = format!("/v1/streams/{id}");
    for key in [other.as_str(), support::OPERATOR] {
        assert_eq!(gateway.ask(key, "GET", &path, &[], &Value::Null).await.status, 404);
    }
    assert_eq!(gateway.get(&path).await.status, 401);
    gateway.shutdown.cancel();
    let backend = gateway.backend.clone();
    backend.until("settled", |backend| backend.records().len() == 1).await;
    tokio::time::timeout(support::LONG, gateway.task)
        .await
        .expect("it ends")
        .unwrap();
}
