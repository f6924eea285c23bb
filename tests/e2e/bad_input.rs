//! Input that no server should take: each a 4xx in OpenAI's shape with a sentence, and the server well afterwards.

use super::support::cluster::Cluster;
use super::support::http::{chat, chat_body, get, post};
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_and_the_server_stays_well() {
    let cluster = Cluster::start(&["--prefill", "0"]).await;
    let url = &cluster.url;
    let good = chat_body("hello", json!({"max_tokens": 4, "ignore_eos": true}));
    let before = chat(url, &good).await;

    let with = |extra: Value| chat_body("hello", extra).to_string().into_bytes();
    let text = good.to_string();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty body", vec![]),
        ("not JSON", b"hello".to_vec()),
        ("cut JSON", text.as_bytes()[..text.len() - 5].to_vec()),
        ("an array", b"[]".to_vec()),
        ("deep nesting", "[".repeat(100_000).into_bytes()),
        (
            "invalid UTF-8",
            text.replace("hello", "he\u{1}llo")
                .into_bytes()
                .iter()
                .map(|b| if *b == 1 { 0xff } else { *b })
                .collect(),
        ),
        ("unknown model", with(json!({"model": "gpt-17"}))),
        ("no model", with(json!({"model": null}))),
        ("no messages", with(json!({"messages": []}))),
        ("messages of the wrong kind", with(json!({"messages": "hello"}))),
        (
            "a role nobody has",
            with(json!({"messages": [{"role": "oracle", "content": "x"}]})),
        ),
        (
            "content of the wrong kind",
            with(json!({"messages": [{"role": "user", "content": 7}]})),
        ),
        (
            "a prompt longer than the context",
            with(json!({"messages": [{"role": "user", "content": "word ".repeat(20_000)}]})),
        ),
        ("max_tokens 0", with(json!({"max_tokens": 0}))),
        ("max_tokens -1", with(json!({"max_tokens": -1}))),
        ("max_tokens 10^12", with(json!({"max_tokens": 1_000_000_000_000u64}))),
        ("max_tokens of the wrong kind", with(json!({"max_tokens": "many"}))),
        (
            "temperature NaN",
            text.replace("\"temperature\":0", "\"temperature\":NaN").into_bytes(),
        ),
        ("temperature \"NaN\"", with(json!({"temperature": "NaN"}))),
        ("temperature -1", with(json!({"temperature": -1}))),
        (
            "temperature 1e999",
            text.replace("\"temperature\":0", "\"temperature\":1e999").into_bytes(),
        ),
        ("top_p 2", with(json!({"top_p": 2}))),
        (
            "10 MB",
            with(json!({"messages": [{"role": "user", "content": "x".repeat(10_000_000)}]})),
        ),
    ];
    for (what, body) in cases {
        let answer = post(url, "/v1/chat/completions", body).await;
        assert!(
            answer.status.is_client_error(),
            "{what}: {} {:?}",
            answer.status,
            answer.body
        );
        let json = answer.json();
        let message = json["error"]["message"].as_str().unwrap_or_default();
        assert!(message.len() > 10, "{what}: {json}");
        assert!(json["error"]["type"].is_string(), "{what}: {json}");
    }
    for path in ["/nowhere", "/v1/chat/completions/x", "/v1/models/none"] {
        assert!(get(url, path).await.status.is_client_error(), "{path}");
    }
    assert_eq!(get(url, "/v1/chat/completions").await.status, 405);

    let after = chat(url, &good).await;
    assert_eq!(before.text, after.text, "the server is well");
    cluster.assert_nothing_leaked().await;
    assert!(cluster.stop().await.success());
}
