//! Everything a stranger may send: each a 4xx with a sentence in OpenAI's shape, and the server still well.

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_gateway::GatewayConfig;
use serde_json::{Value, json};
use support::{CHAT, Script, TestGateway, hi};

/// The request is refused and nothing reached the cluster.
async fn refused(gateway: &TestGateway, body: &[u8], status: u16) -> Value {
    let answer = gateway.chat_bytes(body).await;
    assert_eq!(
        answer.status,
        status,
        "{}: {}",
        String::from_utf8_lossy(&body[..body.len().min(200)]),
        answer.text()
    );
    answer.error()
}

#[tokio::test]
async fn bad_bodies() {
    let gateway = TestGateway::start().await;
    let deep = format!("{{\"model\": \"m\", \"messages\": {}", "[".repeat(1_000_000));
    let deep_closed = format!("{}{}", "[".repeat(50_000), "]".repeat(50_000));
    let bodies: [&[u8]; 9] = [
        b"",
        b"{",
        b"[1, 2]",
        b"\"hi\"",
        b"{\"model\": \"m\", \"messages\": [{\"role\": \"user\", \"content\": \"\xff\xfe\"}]}",
        b"{\"model\": \"m\", \"messages\": [{\"role\": \"user\", \"content\": \"\\ud800\"}]}",
        b"{\"model\": \"m\", \"temperature\": NaN, \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}",
        deep.as_bytes(),
        deep_closed.as_bytes(),
    ];
    for body in bodies {
        assert_eq!(refused(&gateway, body, 400).await["type"], "invalid_request_error");
    }
    gateway.is_well().await;
    assert_eq!(
        gateway.backend.jobs.lock().unwrap().len(),
        1,
        "only the check was placed"
    );
}

#[tokio::test]
async fn bad_fields() {
    let gateway = TestGateway::start().await;
    let cases = [
        (json!({"model": "nope"}), 404, "model", json!("model_not_found")),
        (json!({"messages": []}), 400, "messages", Value::Null),
        (json!({"max_tokens": 0}), 400, "max_tokens", Value::Null),
        (json!({"max_tokens": -1}), 400, "max_tokens", Value::Null),
        (
            json!({"max_tokens": 1_000_000_000_000u64}),
            400,
            "max_tokens",
            Value::Null,
        ),
        (json!({"max_tokens": 1e12}), 400, "max_tokens", Value::Null),
        (
            json!({"max_completion_tokens": 250}),
            400,
            "max_completion_tokens",
            json!("context_length_exceeded"),
        ),
        (json!({"temperature": -1}), 400, "temperature", Value::Null),
        (json!({"temperature": "NaN"}), 400, "temperature", Value::Null),
        (json!({"top_p": 0}), 400, "top_p", Value::Null),
        (json!({"n": 0}), 400, "n", Value::Null),
        (json!({"n": 1_000_000}), 400, "n", Value::Null),
        (
            json!({"tools": [{"type": "web_search"}]}),
            400,
            "tools[0].type",
            json!("unsupported_parameter"),
        ),
        (json!({"tools": vec![1; 129]}), 400, "tools", Value::Null),
        (json!({"tool_choice": "required"}), 400, "tool_choice", Value::Null),
        (
            json!({"response_format": {"type": "xml"}}),
            400,
            "response_format.type",
            Value::Null,
        ),
        (json!({"logprobs": 1}), 400, "logprobs", Value::Null),
        (
            json!({"logprobs": true, "top_logprobs": 21}),
            400,
            "top_logprobs",
            Value::Null,
        ),
        (json!({"frequency_penalty": 3}), 400, "frequency_penalty", Value::Null),
        (json!({"logit_bias": {"x": 1}}), 400, "logit_bias", Value::Null),
        (json!({"logit_bias": {"99999": 1}}), 400, "logit_bias", Value::Null),
        (
            json!({"audio": {"voice": "x"}}),
            400,
            "audio",
            json!("unsupported_parameter"),
        ),
        (json!({"surprise": 1}), 400, "surprise", json!("unsupported_parameter")),
    ];
    for (extra, status, param, code) in cases {
        let error = refused(&gateway, hi(extra.clone()).to_string().as_bytes(), status).await;
        assert_eq!(
            (&error["param"], &error["code"]),
            (&json!(param), &code),
            "{extra}: {error}"
        );
    }
    let tool_calls = json!([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f"}}]}]);
    let error = refused(
        &gateway,
        hi(json!({"messages": tool_calls})).to_string().as_bytes(),
        400,
    )
    .await;
    assert_eq!(error["param"], "messages[1].tool_calls", "a call without arguments");
    gateway.is_well().await;
}

#[tokio::test]
async fn a_prompt_that_does_not_fit_is_told_both_numbers() {
    let gateway = TestGateway::start().await;
    for words in [300, 200_000] {
        let long = json!({"messages": [{"role": "user", "content": "x".repeat(words)}]});
        let error = refused(&gateway, hi(long).to_string().as_bytes(), 400).await;
        assert_eq!(error["code"], "context_length_exceeded");
        let message = error["message"].as_str().unwrap();
        let tokens = (words + "user\n\nassistant\n".len() + 3).to_string();
        // 256 is what the workers allow; the model's files would allow 4096.
        assert!(message.contains("256 tokens") && message.contains(&tokens), "{message}");
    }
    gateway.is_well().await;
}

#[tokio::test]
async fn large_bodies() {
    let gateway = TestGateway::start().await;
    let error = refused(&gateway, &vec![b' '; 10_000_000], 413).await;
    assert!(error["message"].as_str().unwrap().contains("4194304"), "{error}");
    // Chunked, so not announced.
    let mut wire = gateway.connect().await;
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    tokio::io::AsyncWriteExt::write_all(&mut wire.stream, head.as_bytes())
        .await
        .unwrap();
    let chunk = [b"100000\r\n".as_slice(), &vec![b' '; 1 << 20], b"\r\n"].concat();
    for _ in 0..6 {
        tokio::io::AsyncWriteExt::write_all(&mut wire.stream, &chunk)
            .await
            .unwrap();
    }
    tokio::io::AsyncWriteExt::write_all(&mut wire.stream, b"0\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(wire.answer().await.status, 413);
    gateway.is_well().await;
}

#[tokio::test]
async fn wrong_routes_methods_and_types() {
    let gateway = TestGateway::start().await;
    let cases = [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/%ff%00", 404, "unknown_url"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/nope", 404, "model_not_found"),
    ];
    for (method, path, status, code) in cases {
        let answer = gateway.request(method, path, &[], b"").await;
        assert_eq!(
            (answer.status, &answer.error()["code"]),
            (status, &json!(code)),
            "{method} {path}"
        );
    }
    for kind in ["text/plain", "application/x-www-form-urlencoded", "application/jsonx"] {
        let answer = gateway
            .request(
                "POST",
                CHAT,
                &[("content-type", kind)],
                hi(json!({})).to_string().as_bytes(),
            )
            .await;
        assert_eq!(answer.status, 415);
        answer.error();
    }
    let odd = gateway
        .request("GET", "/health", &[("x-request-id", "a b\tc")], b"")
        .await;
    assert!(odd.status == 200 && !odd.header("x-request-id").unwrap().contains(' '));
    gateway.is_well().await;
}

#[tokio::test]
async fn every_route_but_two_needs_the_key() {
    let key = "sk-0123456789abcdef";
    let config = GatewayConfig {
        api_key: Some(key.into()),
        ..GatewayConfig::default()
    };
    let gateway = TestGateway::with(config).await;
    let routes = [
        ("GET", "/"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/m"),
        ("GET", "/metrics"),
        ("GET", "/cluster/workers"),
        ("POST", CHAT),
        ("GET", "/nothing"),
        ("PUT", "/health/x"),
    ];
    for (method, path) in routes {
        for headers in [
            &[][..],
            &[("authorization", "Bearer sk-wrong")][..],
            &[("authorization", "Basic c2s=")][..],
        ] {
            let answer = gateway.request(method, path, headers, b"").await;
            assert_eq!(
                (answer.status, &answer.error()["code"]),
                (401, &json!("invalid_api_key")),
                "{method} {path}"
            );
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        }
    }
    for open in ["/health", "/ready"] {
        assert_eq!(gateway.get(open).await.status, 200);
    }
    let bearer = format!("Bearer {key}");
    let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
    let answer = gateway
        .request("POST", CHAT, &headers, hi(json!({})).to_string().as_bytes())
        .await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn slow_clients_are_cut_and_others_served() {
    let config = GatewayConfig {
        header_timeout_ms: 150,
        body_timeout_ms: 150,
        ..GatewayConfig::default()
    };
    let gateway = TestGateway::with(config).await;
    let heads = ["", "P", "PRI * HTTP/2.0\r\n", "GET / HTTP/1.1\r\nhost: t\r\nx-slow: "];
    for head in heads {
        let mut wire = gateway.connect().await;
        tokio::io::AsyncWriteExt::write_all(&mut wire.stream, head.as_bytes())
            .await
            .unwrap();
        while wire.fill().await > 0 {}
    }
    let mut wire = gateway.connect().await;
    let head =
        format!("POST {CHAT} HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{");
    tokio::io::AsyncWriteExt::write_all(&mut wire.stream, head.as_bytes())
        .await
        .unwrap();
    assert_eq!(wire.answer().await.status, 408);
    gateway.is_well().await;
}

#[tokio::test]
async fn caps_answer_at_once() {
    let config = GatewayConfig {
        in_flight_max: 1,
        connections_max: 3,
        ..GatewayConfig::default()
    };
    let gateway = TestGateway::with(config).await;
    gateway.backend.script(Script::SayThenHang(vec![]));
    let mut busy = gateway.connect().await;
    busy.post(&hi(json!({}))).await;
    gateway
        .backend
        .until("a job", |backend| !backend.jobs.lock().unwrap().is_empty())
        .await;
    let answer = gateway.chat(&hi(json!({}))).await;
    assert_eq!((answer.status, answer.header("retry-after")), (429, Some("1")));
    answer.error();

    // Connections beyond the cap are told so and closed; closing some makes room again.
    let mut open = vec![busy];
    let full = loop {
        let mut wire = gateway.connect().await;
        wire.send("GET", "/health", &[], b"").await;
        let answer = wire.answer().await;
        if answer.status != 200 {
            break answer;
        }
        open.push(wire);
        assert!(open.len() <= 4);
    };
    assert_eq!(
        (full.status, full.error()["code"].as_str()),
        (503, Some("too_many_connections"))
    );
    drop(open);
    gateway
        .backend
        .until("cancelled", |backend| backend.cancelled.load(Ordering::SeqCst) == 1)
        .await;
    gateway
        .backend
        .until("settled", |backend| backend.records().len() == 1)
        .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    gateway.is_well().await;
}
