//! `/v1/messages` over a real loopback listener.

mod support;

use std::sync::atomic::Ordering;

use baton_gateway::GatewayConfig;
use baton_proto::state::UsageStatus;
use baton_proto::worker::FinishReason;
use serde_json::{Value, json};
use support::{Answer, Script, TestGateway, ids, turn};

const PATH: &str = "/v1/messages";

fn hi(extra: Value) -> Value {
    let mut body = json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// Events as (name, data); the data must repeat the name.
fn events(answer: &Answer) -> Vec<(String, Value)> {
    let text = answer.text();
    let blocks = text
        .split("\n\n")
        .filter(|block| !block.is_empty() && !block.starts_with(':'));
    blocks
        .map(|block| {
            let (name, data) = block.split_once('\n').expect(block);
            let name = name.strip_prefix("event: ").expect(block).to_owned();
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").expect(block)).unwrap();
            assert_eq!(data["type"], name.as_str());
            (name, data)
        })
        .collect()
}

#[tokio::test]
async fn a_whole_message_has_anthropics_shape_and_is_settled() {
    let gateway = TestGateway::start().await;
    gateway.backend.script(turn("hello"));
    let answer = gateway.post(PATH, &hi(json!({"metadata": {"user_id": "u"}}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json = answer.json();
    let prompt = "user\nhi\nassistant\n".len() + 3;
    let usage = json!({"input_tokens": prompt - 16, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 16,
        "output_tokens": 6});
    let id = json["id"].as_str().unwrap();
    assert!(id.starts_with("msg_"));
    assert_eq!(
        json,
        json!({"id": id, "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
            "stop_sequence": null, "usage": usage, "content": [{"type": "text", "text": "hello", "citations": null}]})
    );
    assert_eq!(answer.header("request-id"), Some(id));
    let records = gateway.backend.records();
    assert_eq!(
        (records.len(), records[0].endpoint.as_str(), records[0].user.as_str()),
        (1, PATH, "u")
    );
    assert_eq!(
        (records[0].status(), records[0].completion_tokens),
        (UsageStatus::Completed, 6)
    );
    assert_eq!(gateway.backend.last_job().max_tokens, 9);
}

#[tokio::test]
async fn a_stream_is_start_blocks_delta_stop() {
    let gateway = TestGateway::start().await;
    gateway.backend.script(Script::Say(ids("one"), FinishReason::Length));
    let answer = gateway.post(PATH, &hi(json!({"stream": true}))).await;
    let events = events(&answer);
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    let deltas = ["content_block_delta"; 3];
    let expected = [
        &["message_start", "ping", "content_block_start"][..],
        &deltas,
        &["content_block_stop", "message_delta", "message_stop"],
    ];
    assert_eq!(names, expected.concat());
    let text: String = events
        .iter()
        .filter_map(|(_, data)| data["delta"]["text"].as_str())
        .collect();
    assert_eq!(text, "one");
    assert_eq!(events[0].1["message"]["content"], json!([]));
    let (_, end) = &events[events.len() - 2];
    assert_eq!(
        (&end["delta"]["stop_reason"], &end["usage"]["output_tokens"]),
        (&json!("max_tokens"), &json!(3))
    );
    assert_eq!(gateway.backend.records().len(), 1);
}

#[tokio::test]
async fn a_stop_sequence_is_told() {
    let gateway = TestGateway::start().await;
    gateway.backend.script(Script::SayThenHang(ids("a;b")));
    let json = gateway.post(PATH, &hi(json!({"stop_sequences": [";"]}))).await.json();
    assert_eq!(
        (&json["stop_reason"], &json["stop_sequence"]),
        (&json!("stop_sequence"), &json!(";"))
    );
    assert_eq!(json["content"][0]["text"], "a");
}

/// The test model's template knows no tools: they are told of in the system message, in Hermes' format.
#[tokio::test]
async fn calls_are_blocks() {
    for stream in [false, true] {
        let gateway = TestGateway::start().await;
        // The description of the tool takes room.
        gateway.backend.context_length.store(4096, Ordering::SeqCst);
        let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>";
        gateway.backend.script(turn(call));
        let tools = json!([{"name": "f", "description": "d", "input_schema": {"type": "object"}}]);
        let body = hi(json!({"tools": tools, "stream": stream, "max_tokens": 90}));
        let answer = gateway.post(PATH, &body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        if !stream {
            let json = answer.json();
            let block = json["content"].as_array().unwrap().last().unwrap();
            assert_eq!(json["stop_reason"], "tool_use", "{json}");
            assert_eq!(
                (&block["type"], &block["name"], &block["input"]),
                (&json!("tool_use"), &json!("f"), &json!({"x": 1}))
            );
            continue;
        }
        let events = events(&answer);
        let parts = events
            .iter()
            .filter_map(|(_, data)| data["delta"]["partial_json"].as_str());
        let input: String = parts.collect();
        assert_eq!(serde_json::from_str::<Value>(&input).unwrap(), json!({"x": 1}));
        assert!(
            events
                .iter()
                .any(|(_, data)| data["content_block"]["type"] == "tool_use")
        );
        assert_eq!(events[events.len() - 2].1["delta"]["stop_reason"], "tool_use");
    }
}

#[tokio::test]
async fn tokens_are_counted_without_a_generation() {
    let gateway = TestGateway::start().await;
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    let answer = gateway.post("/v1/messages/count_tokens", &body).await;
    assert_eq!(
        answer.json(),
        json!({"input_tokens": "user\nhi\nassistant\n".len() + 3})
    );
    assert!(gateway.backend.jobs.lock().unwrap().is_empty() && gateway.backend.records().is_empty());
}

#[tokio::test]
async fn errors_are_anthropics_and_the_key_may_come_its_way() {
    let key = "sk-0123456789abcdef";
    let config = GatewayConfig {
        api_key: Some(key.into()),
        ..GatewayConfig::default()
    };
    let gateway = TestGateway::with(config).await;
    let ask = async |headers: &[(&str, &str)], body: Value| {
        let headers = [&[("content-type", "application/json")], headers].concat();
        gateway
            .request("POST", PATH, &headers, body.to_string().as_bytes())
            .await
    };
    let told = |answer: &Answer, status: u16, kind: &str| {
        let json = answer.json();
        assert_eq!(
            (answer.status, &json["type"], &json["error"]["type"]),
            (status, &json!("error"), &json!(kind)),
            "{json}"
        );
        assert_eq!(json["request_id"].as_str(), answer.header("request-id"));
    };
    told(&ask(&[], hi(json!({}))).await, 401, "authentication_error");
    told(
        &ask(&[("x-api-key", "sk-wrong-wrong-wrong")], hi(json!({}))).await,
        401,
        "authentication_error",
    );
    let mine = ("x-api-key", key);
    assert_eq!(ask(&[mine], hi(json!({}))).await.status, 200);
    assert_eq!(
        ask(&[("authorization", &format!("Bearer {key}"))], hi(json!({})))
            .await
            .status,
        200
    );
    assert_eq!(
        ask(&[mine, ("anthropic-version", "2023-06-01")], hi(json!({})))
            .await
            .status,
        200
    );
    told(
        &ask(&[mine, ("anthropic-version", "1999-01-01")], hi(json!({}))).await,
        400,
        "invalid_request_error",
    );
    told(
        &ask(&[mine], hi(json!({"model": "nope"}))).await,
        404,
        "not_found_error",
    );
    let image = json!({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]});
    let answer = ask(&[mine], hi(image)).await;
    told(&answer, 400, "invalid_request_error");
    assert!(
        answer.text().contains("messages[0].content[0].type"),
        "{}",
        answer.text()
    );
}

#[tokio::test]
async fn a_break_midway_is_an_error_event() {
    let gateway = TestGateway::start().await;
    gateway.backend.script(Script::SayThenVanish(ids("ab")));
    let answer = gateway.post(PATH, &hi(json!({"stream": true}))).await;
    let events = events(&answer);
    let (name, data) = events.last().unwrap();
    assert_eq!(
        (name.as_str(), &data["error"]["type"]),
        ("error", &json!("overloaded_error"))
    );
    assert!(events.iter().all(|(name, _)| name != "message_stop"));
}
