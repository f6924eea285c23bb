//! What a client says of priority, latency and who it is, and what it is told when it is refused for load.

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_gateway::{BackendError, GatewayConfig, LatencyTargets, TenantConfig};
use serde_json::{Value, json};
use support::{CHAT, Script, TestGateway, hi};

const JSON: (&str, &str) = ("content-type", "application/json");

#[tokio::test]
async fn a_refusal_names_its_reason_and_when_to_retry() {
    let gateway = TestGateway::start().await;
    for (word, retry_after_ms, header) in [
        ("ttft_target", 2100, "3"),
        ("tenant_share", 1, "1"),
        ("itl_target", 60_000, "60"),
    ] {
        gateway.backend.script(Script::Refuse(BackendError::Overloaded {
            word,
            reason: "there is too much to do".into(),
            retry_after: Duration::from_millis(retry_after_ms),
        }));
        // Streamed or not, it is an HTTP error.
        let answer = gateway.chat(&hi(json!({"stream": word == "ttft_target"}))).await;
        assert_eq!(answer.status, 429);
        assert_eq!(answer.header("x-baton-reject-reason"), Some(word));
        assert_eq!(answer.header("retry-after"), Some(header));
        let error = answer.error();
        assert_eq!(
            (&error["type"], &error["code"]),
            (&json!("rate_limit_error"), &json!("rate_limit_exceeded"))
        );
        let message = error["message"].as_str().unwrap();
        assert!(
            message.contains("too much to do") && message.contains(&format!("{header} s")),
            "{message}"
        );
    }
    gateway
        .backend
        .script(Script::Refuse(BackendError::NoWorker { model: "m".into() }));
    let answer = gateway.chat(&hi(json!({}))).await;
    assert_eq!(
        (answer.status, answer.header("x-baton-reject-reason")),
        (503, Some("no_worker"))
    );
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert!(gateway.backend.records().is_empty(), "a refused request has no record");
    gateway.is_well().await;
}

#[tokio::test]
async fn priority_and_targets_reach_the_job() {
    let gateway = TestGateway::start().await;
    gateway.is_well().await;
    let job = gateway.backend.last_job();
    assert_eq!(
        (job.priority, job.targets, job.tenant.as_ref()),
        (0, LatencyTargets::default(), "default")
    );
    let headers = [JSON, ("x-baton-ttft-target-ms", "250"), ("X-Baton-ITL-Target-Ms", "40")];
    let body = hi(json!({"priority": 3})).to_string();
    let answer = gateway.request("POST", CHAT, &headers, body.as_bytes()).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let job = gateway.backend.last_job();
    // vLLM's lower is first; a job's higher is.
    assert_eq!(job.priority, -3);
    let targets = LatencyTargets {
        ttft: Some(Duration::from_millis(250)),
        itl: Some(Duration::from_millis(40)),
    };
    assert_eq!(job.targets, targets);
    for (name, value) in [("x-baton-ttft-target-ms", "fast"), ("x-baton-itl-target-ms", "0")] {
        let answer = gateway
            .request("POST", CHAT, &[JSON, (name, value)], body.as_bytes())
            .await;
        assert_eq!((answer.status, answer.error()["param"].as_str()), (400, Some(name)));
    }
}

#[tokio::test]
async fn a_key_says_whose_request_it_is() {
    let tenant = |name: &str, key: &str| TenantConfig {
        name: name.into(),
        api_key: key.into(),
        weight: 1,
        priority_min: 0,
    };
    let gateway = TestGateway::with(GatewayConfig {
        api_key: Some("sk-0123456789abcdef".into()),
        tenants: vec![tenant("red", "sk-red-red-red-red"), tenant("blue", "sk-blue-blue-blue")],
        ..GatewayConfig::default()
    })
    .await;
    let body = hi(json!({})).to_string();
    let mut salts = Vec::new();
    for (key, tenant) in [
        ("Bearer sk-0123456789abcdef", "default"),
        ("Bearer sk-red-red-red-red", "red"),
        ("Bearer sk-blue-blue-blue", "blue"),
    ] {
        let answer = gateway
            .request("POST", CHAT, &[JSON, ("authorization", key)], body.as_bytes())
            .await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let job = gateway.backend.last_job();
        assert_eq!(job.tenant.as_ref(), tenant);
        assert!(!salts.contains(&job.cache_salt), "tenants share no prefix cache");
        salts.push(job.cache_salt);
    }
    let answer = gateway
        .request(
            "POST",
            CHAT,
            &[JSON, ("authorization", "Bearer sk-green")],
            body.as_bytes(),
        )
        .await;
    assert_eq!(answer.status, 401);
    assert_eq!(gateway.get("/health").await.status, 200);
    assert_eq!(gateway.get("/metrics").await.status, 401);
}

/// What `docs/admission.md` says of a configured tenant holds for a key of the state, as made and as changed.
#[tokio::test]
async fn a_key_of_the_state_brings_its_share() {
    let (gateway, _) = TestGateway::with_accounts().await;
    let (project, key, secret) = gateway
        .project_key(json!({}), json!({"weight": 3, "priority_min": -5}))
        .await;
    let share = async || {
        let answer = gateway.ask(&secret, "POST", CHAT, &[], &hi(json!({}))).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let job = gateway.backend.last_job();
        assert_eq!(job.tenant.as_ref(), project, "metrics tell projects apart");
        assert_eq!(job.share.name.as_ref(), key, "keys of one project do not share");
        (job.share.weight, job.share.priority_min)
    };
    assert_eq!(share().await, (3, -5));
    let path = format!("/v1/organization/projects/{project}/api_keys/{key}");
    let changed = gateway.admin("POST", &path, json!({"weight": 7})).await;
    assert_eq!((&changed["weight"], &changed["priority_min"]), (&json!(7), &json!(-5)));
    assert_eq!(share().await, (7, -5));
    let shown = gateway.admin("GET", &path, Value::Null).await;
    assert_eq!((&shown["weight"], &shown["name"]), (&json!(7), &json!("k")));
    for wrong in [0, 1001] {
        let answer = gateway
            .ask(support::OPERATOR, "POST", &path, &[], &json!({"weight": wrong}))
            .await;
        assert_eq!((answer.status, answer.error()["param"].as_str()), (400, Some("weight")));
    }
    let (_, _, usual) = gateway.project_key(json!({}), json!({})).await;
    assert_eq!(gateway.ask(&usual, "POST", CHAT, &[], &hi(json!({}))).await.status, 200);
    assert_eq!(gateway.backend.last_job().share.weight, 1);
}

#[tokio::test]
async fn a_client_that_hangs_up_leaves_the_queue() {
    let gateway = TestGateway::start().await;
    gateway.backend.script(Script::Queue);
    let mut wire = gateway.connect().await;
    wire.post(&hi(json!({"stream": true}))).await;
    gateway
        .backend
        .until("it waits", |backend| backend.jobs.lock().unwrap().len() == 1)
        .await;
    assert_eq!(gateway.backend.left.load(Ordering::SeqCst), 0);
    drop(wire);
    gateway
        .backend
        .until("it has left", |backend| backend.left.load(Ordering::SeqCst) == 1)
        .await;
    gateway.is_well().await;
    assert_eq!(
        gateway.backend.records().len(),
        1,
        "only the one that was placed has a record"
    );
}
