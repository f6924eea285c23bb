//! The routes beside chat, HTTP/2, and what keeps a gateway from starting.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use baton_gateway::{GatewayConfig, GatewayError};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::json;
use support::{Mock, MockBackend, TestGateway, hi, turn};

#[tokio::test]
async fn models_are_listed_as_openai_does() {
    let gateway = TestGateway::start().await;
    let card =
        json!({"id": "m", "object": "model", "created": 1_700_000_000, "owned_by": "baton", "max_model_len": 256});
    assert_eq!(
        gateway.get("/v1/models").await.json(),
        json!({"object": "list", "data": [card]})
    );
    assert_eq!(gateway.get("/v1/models/m").await.json(), card);
}

#[tokio::test]
async fn ready_follows_the_workers_and_health_does_not() {
    let gateway = TestGateway::start().await;
    assert_eq!(gateway.get("/ready").await.status, 200);
    gateway.backend.no_worker.store(true, Ordering::SeqCst);
    let answer = gateway.get("/ready").await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    answer.error();
    assert_eq!(gateway.get("/health").await.status, 200);
}

#[tokio::test]
async fn workers_are_an_array_with_the_agreed_names() {
    let gateway = TestGateway::start().await;
    let workers = gateway.get("/cluster/workers").await.json();
    let first = &workers.as_array().unwrap()[0];
    assert_eq!(
        (&first["id"], &first["role"], &first["state"]),
        (&json!("decode-0"), &json!("decode"), &json!("ready"))
    );
    for name in [
        "pid",
        "model",
        "running",
        "waiting",
        "total_blocks",
        "held_blocks",
        "heartbeat_age_ms",
    ] {
        assert!(first[name].is_u64() || first[name].is_string(), "{name}: {first}");
    }
}

#[tokio::test]
async fn a_worker_is_drained_by_a_post_of_json_only() {
    let gateway = TestGateway::start().await;
    let json = [("content-type", "application/json")];
    let post = async |path: &str, headers: &[(&str, &str)], body: &str| {
        gateway.request("POST", path, headers, body.as_bytes()).await
    };
    let path = "/cluster/workers/decode-0/drain";
    let answer = post(path, &json, "{\"deadline_ms\": 1500}").await;
    assert_eq!(answer.status, 202);
    let worker = answer.json();
    assert_eq!(
        (&worker["id"], &worker["state"]),
        (&json!("decode-0"), &json!("draining"))
    );
    assert_eq!(post(path, &json, "{}").await.status, 202);
    let drained = gateway.backend.drained.lock().unwrap().clone();
    let expected = [1_500, 60_000].map(|ms| ("decode-0".to_owned(), std::time::Duration::from_millis(ms)));
    assert_eq!(drained, expected);

    // A form that a foreign page may send is not taken.
    let form = [("content-type", "application/x-www-form-urlencoded")];
    for (path, headers, body, status) in [
        (path, &form[..], "{}", 415),
        (path, &[], "{}", 415),
        (path, &json, "", 400),
        (path, &json, "[]", 400),
        (path, &json, "{\"deadline\": 1}", 400),
        (path, &json, "{\"deadline_ms\": -1}", 400),
        (path, &json, "{\"deadline_ms\": 99999999999}", 400),
        ("/cluster/workers/nobody/drain", &json, "{}", 404),
    ] {
        let answer = post(path, headers, body).await;
        assert_eq!(answer.status, status, "{path} {body}");
        answer.error();
    }
    assert_eq!(gateway.request("GET", path, &[], b"").await.status, 405);
    assert_eq!(gateway.backend.drained.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn metrics_have_vllms_names() {
    let gateway = TestGateway::start().await;
    gateway.backend.script(turn("hello"));
    gateway.is_well().await;
    let text = gateway.get("/metrics").await.text();
    for line in [
        "baton:num_requests_running{model_name=\"m\"} 4\n",
        "baton:num_requests_waiting{model_name=\"m\"} 2\n",
        "baton:kv_cache_usage_perc{model_name=\"m\"} 0.25\n",
        "baton:time_to_first_token_seconds_count{model_name=\"m\"} 1\n",
        "baton:time_to_first_token_outside_workers_seconds_count{model_name=\"m\"} 1\n",
        "baton:inter_token_latency_seconds_count{model_name=\"m\"} 5\n",
        "baton:e2e_request_latency_seconds_count{model_name=\"m\"} 1\n",
        "baton:prompt_tokens_total{model_name=\"m\"} 21\n",
        "baton:generation_tokens_total{model_name=\"m\"} 6\n",
        "baton:prefix_cache_queries_total{model_name=\"m\"} 21\n",
        "baton:prefix_cache_hits_total{model_name=\"m\"} 16\n",
        "baton:request_success_total{model_name=\"m\",finished_reason=\"stop\"} 1\n",
        "baton:http_responses_total{route=\"/v1/chat/completions\",status=\"200\"} 1\n",
    ] {
        assert!(text.contains(line), "{line} not in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
}

#[tokio::test]
async fn http_2_and_kept_connections_work() {
    let gateway = TestGateway::start().await;
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let request = hyper::Request::post(format!("http://{}{}", gateway.addr, support::CHAT))
        .header("content-type", "application/json")
        .body(Full::new(bytes::Bytes::from(hi(json!({"stream": true})).to_string())))
        .unwrap();
    let response = client.request(request).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), response.version()),
        (200, hyper::Version::HTTP_2)
    );
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert!(body.ends_with(b"data: [DONE]\n\n"));

    let mut wire = gateway.connect().await;
    for _ in 0..3 {
        wire.post(&hi(json!({}))).await;
        assert_eq!(wire.answer().await.status, 200);
    }
}

#[tokio::test]
async fn an_open_gateway_is_not_served_to_a_network() {
    let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let backend = Arc::new(Mock(Arc::new(MockBackend::default())));
    let error = baton_gateway::serve(listener, GatewayConfig::default(), backend, vec![], Default::default()).await;
    assert!(matches!(error, Err(GatewayError::OpenToAll { .. })));
}
