//! Keys, rates, budgets, idempotency and what is billed, over the real state machine and scripted workers.

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_proto::state::{UsageStatus, ledger_row::Body};
use baton_proto::worker::FinishReason;
use baton_state::view;
use serde_json::{Value, json};
use support::{CHAT, OPERATOR, Script, TestGateway, hi, ids, turn};

/// $20 and $80 per million tokens: 20,000 and 80,000 nano-units a token.
async fn price(gateway: &TestGateway) -> Value {
    let body = json!({"model": "m", "input": "20", "cached_input": 2, "output": "80"});
    gateway.admin("POST", "/v1/organization/prices", body).await
}

async fn budget(gateway: &TestGateway, project: &str, limit: &str) -> String {
    let body = json!({"project_id": project, "limit": limit, "period": "total"});
    let budget = gateway.admin("POST", "/v1/organization/budgets", body).await;
    budget["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_record_says_everything_of_its_request() {
    let (gateway, store) = TestGateway::with_accounts().await;
    let price = price(&gateway).await;
    let (project, key, secret) = gateway.project_key(json!({}), json!({})).await;
    gateway.backend.script(turn("hello"));
    let body = hi(json!({"safety_identifier": "user-7", "max_tokens": 50}));
    let answer = gateway.ask(&secret, "POST", CHAT, &[], &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());

    let row = view::row(&store.view(), 1).unwrap().expect("a row");
    let Some(Body::Usage(record)) = row.body else {
        panic!("a usage row")
    };
    assert_eq!(
        (record.project_id.as_str(), record.key_id.as_str()),
        (project.as_str(), key.as_str())
    );
    assert_eq!((record.user.as_str(), record.revision.as_str()), ("user-7", "r1"));
    assert_eq!(
        (record.endpoint.as_str(), record.service_tier.as_str()),
        (CHAT, "default")
    );
    assert_eq!(record.organization_id, "org-default");
    assert_eq!(json!(record.price_id), price["id"]);
    assert_eq!((record.completion_tokens, record.sampled_tokens), (6, 6));
    let [attempt] = record.attempt_list.as_slice() else {
        panic!("one attempt")
    };
    assert_eq!(
        (attempt.decode_worker_id.as_str(), attempt.prefill_worker_id.as_str()),
        ("decode-0", "prefill-0")
    );
    assert_eq!((attempt.decode_epoch, attempt.tokens), (1, 6));
    let charge = row.charge.unwrap();
    let uncached = u64::from(record.prompt_tokens - record.cached_tokens);
    assert_eq!(charge.input_nano, uncached * 20_000);
    assert_eq!(charge.cached_input_nano, u64::from(record.cached_tokens) * 2_000);
    assert_eq!(charge.output_nano, 6 * 80_000);
}

/// The rule of docs/billing.md for requests that do not end well.
#[tokio::test]
async fn what_was_delivered_is_billed_and_nothing_else() {
    let (gateway, store) = TestGateway::with_accounts().await;
    price(&gateway).await;
    let (_, _, secret) = gateway.project_key(json!({}), json!({})).await;
    let stream = hi(json!({"stream": true, "max_tokens": 60}));
    let settled = |count: usize| {
        let store = store.clone();
        move |_: &support::MockBackend| view::settled(&store.view()).unwrap() == count as u64
    };

    // Cancelled after three tokens: those, and the prompt.
    gateway.backend.script(Script::SayThenHang(ids("abc")));
    let bearer = format!("Bearer {secret}");
    let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
    let mut wire = gateway.connect().await;
    wire.send("POST", CHAT, &headers, stream.to_string().as_bytes()).await;
    wire.read_until("abc").await;
    drop(wire);
    gateway.backend.until("the first row", settled(1)).await;

    // Broken after two tokens were shown: those, and the prompt.
    gateway.backend.script(Script::SayThenVanish(ids("de")));
    let answer = gateway.ask(&secret, "POST", CHAT, &[], &stream).await;
    assert!(answer.text().contains("lost before it finished"), "{}", answer.text());
    gateway.backend.until("the second row", settled(2)).await;

    // Failed with nothing shown: nothing, though tokens were sampled.
    gateway.backend.script(Script::SayThenVanish(ids("fgh")));
    let answer = gateway
        .ask(&secret, "POST", CHAT, &[], &hi(json!({"max_tokens": 60})))
        .await;
    assert_eq!(answer.status, 503);
    gateway.backend.until("the third row", settled(3)).await;

    // Refused before it ran: no row.
    gateway
        .backend
        .script(Script::Refuse(baton_gateway::BackendError::NoWorker {
            model: "m".into(),
        }));
    assert_eq!(gateway.ask(&secret, "POST", CHAT, &[], &stream).await.status, 503);

    let tables = store.view();
    let rows = view::rows_after(&tables, 0, 10).unwrap();
    assert_eq!(rows.len(), 3);
    let expected = [
        (UsageStatus::Cancelled, 3, 3, 3 * 80_000),
        (UsageStatus::Failed, 2, 2, 2 * 80_000),
        (UsageStatus::Failed, 0, 3, 0),
    ];
    for (row, (status, delivered, sampled, output)) in rows.into_iter().zip(expected) {
        let charge = row.charge.unwrap();
        let Some(Body::Usage(record)) = row.body else {
            panic!("usage")
        };
        assert_eq!(record.status(), status);
        assert_eq!(
            (record.completion_tokens, record.sampled_tokens),
            (delivered, sampled),
            "{status:?}"
        );
        assert_eq!(charge.output_nano, output);
        assert_eq!(charge.input_nano == 0, delivered == 0);
    }
}

#[tokio::test]
async fn keys_open_what_they_may_and_nothing_else() {
    let (gateway, _) = TestGateway::with_accounts().await;
    let (project, key, secret) = gateway.project_key(json!({}), json!({"models": ["other"]})).await;
    let ask = async |key: &str, method: &str, path: &str, body: Value| gateway.ask(key, method, path, &[], &body).await;

    // Not this model: 403, and it is not listed.
    let answer = ask(&secret, "POST", CHAT, hi(json!({}))).await;
    assert_eq!(
        (answer.status, answer.error()["code"].as_str()),
        (403, Some("model_not_found"))
    );
    assert_eq!(
        ask(&secret, "GET", "/v1/models", Value::Null).await.json()["data"],
        json!([])
    );
    assert_eq!(ask(&secret, "GET", "/v1/models/m", Value::Null).await.status, 404);

    // Not these routes.
    for path in [
        "/v1/organization/projects",
        "/v1/organization/costs?start_time=0",
        "/v1/ledger/rows",
        "/metrics",
        "/cluster/workers",
        "/cluster/snapshot",
    ] {
        let answer = ask(&secret, "GET", path, Value::Null).await;
        assert_eq!(
            (answer.status, answer.error()["code"].as_str()),
            (403, Some("missing_scope")),
            "{path}"
        );
    }
    // A key for reading reads and does not call.
    let (_, _, reader) = gateway.project_key(json!({}), json!({"scopes": ["usage"]})).await;
    assert_eq!(ask(&reader, "GET", "/v1/ledger/rows", Value::Null).await.status, 200);
    assert_eq!(ask(&reader, "POST", "/v1/ledger/seal", Value::Null).await.status, 403);
    assert_eq!(ask(&reader, "POST", CHAT, hi(json!({}))).await.status, 403);
    // One for administration administers and reads.
    let admin = gateway
        .admin("POST", "/v1/organization/admin_api_keys", json!({"name": "root"}))
        .await;
    let root = admin["value"].as_str().unwrap();
    assert_eq!(
        ask(root, "GET", "/v1/organization/projects", Value::Null).await.status,
        200
    );
    assert_eq!(ask(root, "GET", "/metrics", Value::Null).await.status, 200);
    assert_eq!(ask(root, "POST", CHAT, hi(json!({}))).await.status, 403);

    // Nobody and strangers.
    assert_eq!(gateway.get("/v1/models").await.status, 401);
    assert_eq!(ask("sk-proj-wrong", "GET", "/v1/models", Value::Null).await.status, 401);
    // The secret is shown once.
    let path = format!("/v1/organization/projects/{project}/api_keys");
    let listed = gateway.admin("GET", &path, Value::Null).await;
    assert!(!listed.to_string().contains(&secret), "{listed}");
    assert_eq!(listed["data"][0]["id"], json!(key));

    // Revoked: refused at once, and no longer listed.
    gateway.admin("DELETE", &format!("{path}/{key}"), Value::Null).await;
    let answer = ask(&secret, "GET", "/v1/models", Value::Null).await;
    assert_eq!(
        (answer.status, answer.error()["code"].as_str()),
        (401, Some("invalid_api_key"))
    );
    assert_eq!(gateway.admin("GET", &path, Value::Null).await["data"], json!([]));

    // An archived project's keys too; and one that has expired.
    let (project, _, secret) = gateway.project_key(json!({}), json!({})).await;
    assert_eq!(ask(&secret, "GET", "/v1/models", Value::Null).await.status, 200);
    gateway
        .admin(
            "POST",
            &format!("/v1/organization/projects/{project}/archive"),
            Value::Null,
        )
        .await;
    assert_eq!(ask(&secret, "GET", "/v1/models", Value::Null).await.status, 401);
    let (_, _, secret) = gateway.project_key(json!({}), json!({"expires_in_seconds": 1})).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(ask(&secret, "GET", "/v1/models", Value::Null).await.status, 401);
}

#[tokio::test]
async fn an_open_server_closes_with_the_first_key_for_administration() {
    let backend = std::sync::Arc::new(support::MockBackend::default());
    assert!(backend.store.set(std::sync::Arc::default()).is_ok());
    let gateway = TestGateway::over(baton_gateway::GatewayConfig::default(), backend).await;
    assert_eq!(gateway.get("/v1/organization/projects").await.status, 200);
    let body = json!({"name": "p"}).to_string();
    let json_type = [("content-type", "application/json")];
    let made = gateway
        .request("POST", "/v1/organization/projects", &json_type, body.as_bytes())
        .await;
    let project = made.json()["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/organization/projects/{project}/api_keys");
    let key = gateway.request("POST", &path, &json_type, body.as_bytes()).await.json();
    // Still open, also to clients that send some key, as their libraries want one.
    assert_eq!(
        gateway
            .ask("sk-anything", "GET", "/v1/organization/projects", &[], &Value::Null)
            .await
            .status,
        200
    );
    let admin = gateway
        .request("POST", "/v1/organization/admin_api_keys", &json_type, body.as_bytes())
        .await
        .json();
    assert_eq!(gateway.get("/v1/organization/projects").await.status, 401);
    assert_eq!(gateway.chat(&hi(json!({}))).await.status, 401);
    let secret = key["value"].as_str().unwrap();
    assert_eq!(gateway.ask(secret, "POST", CHAT, &[], &hi(json!({}))).await.status, 200);
    let root = admin["value"].as_str().unwrap();
    assert_eq!(
        gateway
            .ask(root, "GET", "/v1/organization/projects", &[], &Value::Null)
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn a_hard_budget_is_never_overrun() {
    let (gateway, store) = TestGateway::with_accounts().await;
    price(&gateway).await;
    let (project, _, secret) = gateway.project_key(json!({}), json!({})).await;
    // A request of about 30 prompt tokens and at most 10 completion tokens costs at most 1.4 million nano-units.
    let budget = budget(&gateway, &project, "0.01").await;
    let body = hi(json!({"max_tokens": 10}));
    let (mut served, mut refused) = (0, None);
    for _ in 0..60 {
        let asks = (0..4).map(|_| gateway.ask(&secret, "POST", CHAT, &[], &body));
        for answer in futures_util::future::join_all(asks).await {
            match answer.status {
                200 => served += 1,
                _ => refused = Some(answer),
            }
        }
        if refused.is_some() {
            break;
        }
    }
    let refused = refused.expect("the budget ends");
    assert_eq!(refused.status, 429, "{}", refused.text());
    let error = refused.error();
    assert_eq!(
        (error["type"].as_str(), error["code"].as_str()),
        (Some("insufficient_quota"), Some("insufficient_quota"))
    );
    assert_eq!(refused.header("x-should-retry"), Some("false"));
    assert!(served > 3, "{served}");

    let shown = gateway
        .admin("GET", &format!("/v1/organization/budgets/{budget}"), Value::Null)
        .await;
    let tables = store.view();
    let rows = view::rows_after(&tables, 0, 1000).unwrap();
    let total: u128 = rows
        .iter()
        .map(|row| baton_ledger::charge::total(row.charge.as_ref().unwrap()))
        .sum();
    assert_eq!(rows.len(), served);
    assert!(total <= 10_000_000, "{total}");
    assert_eq!(
        shown["spent"],
        json!(baton_ledger::money::Nano(total as i128).to_string())
    );
    let window = view::window(&tables, &budget, 0).unwrap().unwrap();
    assert_eq!(window.posted_nano, total);
    assert_eq!(
        window.reserved_nano,
        window.posted_nano + window.voided_nano + window.expired_nano + window.open_nano
    );
    // Few of them had to ask.
    assert!(
        store.count("LeaseSlice") < served,
        "{} for {served}",
        store.count("LeaseSlice")
    );

    // Raised, it goes on; and a gateway that ends returns what it holds.
    let posted = window.posted_nano;
    let raised = json!({"id": budget, "project_id": project, "limit": "1", "period": "total"});
    gateway.admin("POST", "/v1/organization/budgets", raised).await;
    assert_eq!(gateway.ask(&secret, "POST", CHAT, &[], &body).await.status, 200);
    gateway.shutdown.cancel();
    gateway.task.await.unwrap();
    let window = view::window(&store.view(), &budget, 0).unwrap().unwrap();
    assert_eq!((window.open_nano, window.slices), (0, 0), "{window:?}");
    assert!(window.posted_nano > posted && window.voided_nano > 0, "{window:?}");
}

#[tokio::test]
async fn a_budget_that_only_counts_refuses_nobody() {
    let (gateway, store) = TestGateway::with_accounts().await;
    price(&gateway).await;
    let (project, key, secret) = gateway.project_key(json!({}), json!({})).await;
    let body = json!({"project_id": project, "key_id": key, "limit": "0.000001", "period": "month", "hard": false});
    let budget = gateway.admin("POST", "/v1/organization/budgets", body).await;
    for _ in 0..2 {
        let answer = gateway.ask(&secret, "POST", CHAT, &[], &hi(json!({}))).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let shown = gateway.admin("GET", "/v1/organization/budgets", Value::Null).await;
    let total: u128 = view::rows_after(&store.view(), 0, 10)
        .unwrap()
        .iter()
        .map(|row| baton_ledger::charge::total(row.charge.as_ref().unwrap()))
        .sum();
    assert_eq!(shown["data"][0]["id"], budget["id"]);
    assert_eq!(
        shown["data"][0]["spent"],
        json!(baton_ledger::money::Nano(total as i128).to_string())
    );
    assert_eq!(store.count("LeaseSlice"), 0);
}

#[tokio::test]
async fn a_member_that_is_cut_off_spends_nothing_it_does_not_have() {
    let (gateway, store) = TestGateway::with_accounts().await;
    price(&gateway).await;
    let (project, _, secret) = gateway.project_key(json!({}), json!({})).await;
    budget(&gateway, &project, "1").await;
    store.cut_off.store(true, Ordering::SeqCst);
    let answer = gateway
        .ask(&secret, "POST", CHAT, &[], &hi(json!({"max_tokens": 5})))
        .await;
    assert_eq!(answer.status, 503, "{}", answer.text());
    assert!(gateway.backend.jobs.lock().unwrap().is_empty(), "nothing was placed");
}

#[tokio::test]
async fn a_running_request_is_stopped_when_its_money_cannot_be_kept_aside() {
    let backend = std::sync::Arc::new(support::MockBackend::default());
    let store = std::sync::Arc::new(support::memory_store::MemoryStore::default());
    assert!(backend.store.set(store.clone()).is_ok());
    let config = baton_gateway::GatewayConfig {
        api_key: Some(OPERATOR.into()),
        budget_lease_ms: 2400,
        ..Default::default()
    };
    let gateway = TestGateway::over(config, backend).await;
    price(&gateway).await;
    let (project, _, secret) = gateway.project_key(json!({}), json!({})).await;
    let budget = budget(&gateway, &project, "1").await;
    // It goes on past several leases while the group answers.
    gateway.backend.script(Script::SayThenHang(ids("ab")));
    let bearer = format!("Bearer {secret}");
    let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
    let mut wire = gateway.connect().await;
    let stream = hi(json!({"stream": true, "max_tokens": 60}));
    wire.send("POST", CHAT, &headers, stream.to_string().as_bytes()).await;
    wire.read_until("ab").await;
    tokio::time::sleep(Duration::from_millis(2600)).await;
    assert!(store.count("LeaseSlice") >= 3, "{}", store.count("LeaseSlice"));
    assert_eq!(gateway.backend.cancelled.load(Ordering::SeqCst), 0);
    store.cut_off.store(true, Ordering::SeqCst);
    wire.read_until("budget").await;
    store.cut_off.store(false, Ordering::SeqCst);
    let settled = |_: &support::MockBackend| view::settled(&store.view()).unwrap() == 1;
    gateway.backend.until("the row", settled).await;

    // What was delivered is charged to the slice that was set aside for it.
    let row = view::row(&store.view(), 1).unwrap().unwrap();
    let charged = baton_ledger::charge::total(&row.charge.unwrap());
    let Some(Body::Usage(record)) = row.body else {
        panic!("usage")
    };
    assert_eq!((record.status(), record.completion_tokens), (UsageStatus::Failed, 2));
    assert!(charged > 0);
    assert_eq!(
        view::window(&store.view(), &budget, 0).unwrap().unwrap().posted_nano,
        charged
    );
}

#[tokio::test]
async fn rates_are_told_and_kept() {
    let (gateway, _) = TestGateway::with_accounts().await;
    let (_, _, secret) = gateway
        .project_key(
            json!({"requests_per_min": 2}),
            json!({"limits": {"tokens_per_min": 5000}}),
        )
        .await;
    let body = hi(json!({"max_tokens": 10}));
    let first = gateway.ask(&secret, "POST", CHAT, &[], &body).await;
    assert_eq!(first.status, 200, "{}", first.text());
    assert_eq!(first.header("x-ratelimit-limit-requests"), Some("2"));
    assert_eq!(first.header("x-ratelimit-remaining-requests"), Some("1"));
    assert!(
        first
            .header("x-ratelimit-reset-requests")
            .is_some_and(|reset| reset.ends_with('s'))
    );
    assert_eq!(first.header("x-ratelimit-limit-tokens"), Some("5000"));
    assert_eq!(gateway.ask(&secret, "POST", CHAT, &[], &body).await.status, 200);
    let third = gateway.ask(&secret, "POST", CHAT, &[], &body).await;
    assert_eq!(
        (third.status, third.error()["code"].as_str()),
        (429, Some("rate_limit_exceeded"))
    );
    assert_eq!(third.error()["type"], "requests");
    let wait: u64 = third.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=30).contains(&wait), "{wait}");
    assert_eq!(third.header("x-ratelimit-remaining-requests"), Some("0"));
    // The operator's key has no limits.
    let other = gateway.ask(OPERATOR, "POST", CHAT, &[], &body).await;
    assert_eq!((other.status, other.header("x-ratelimit-limit-requests")), (200, None));
}

#[tokio::test]
async fn what_other_members_serve_counts_too() {
    let (gateway, store) = TestGateway::with_accounts().await;
    let (project, key, secret) = gateway.project_key(json!({"requests_per_min": 100}), json!({})).await;
    let models = async || gateway.ask(&secret, "GET", "/v1/models", &[], &Value::Null).await;
    assert_eq!(models().await.header("x-ratelimit-remaining-requests"), Some("100"));
    // The task has looked once before it counts.
    tokio::time::sleep(Duration::from_millis(600)).await;
    for number in 0..50 {
        let record = baton_proto::state::UsageRecord {
            request_id: format!("elsewhere-{number}"),
            model: "m".into(),
            status: UsageStatus::Completed.into(),
            project_id: project.clone(),
            key_id: key.clone(),
            started_unix_ms: 1,
            ..Default::default()
        };
        let settle = baton_proto::state::SettleUsage { record: Some(record) };
        let kind = baton_proto::state::command::Kind::SettleUsage(settle);
        store.apply(&baton_gateway::command("", kind)).unwrap();
    }
    let counted = async {
        loop {
            let left: u64 = models()
                .await
                .header("x-ratelimit-remaining-requests")
                .unwrap()
                .parse()
                .unwrap();
            if left <= 60 {
                return left;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let left = tokio::time::timeout(support::LONG, counted)
        .await
        .expect("others are counted");
    assert!(left >= 50, "{left}: each is counted once");
}

#[tokio::test]
async fn a_repeated_request_is_one_request() {
    let (gateway, store) = TestGateway::with_accounts().await;
    price(&gateway).await;
    let (_, _, secret) = gateway.project_key(json!({}), json!({})).await;
    let key = [("idempotency-key", "order-17")];
    let body = hi(json!({"max_tokens": 20}));
    let ask = async |body: &Value| gateway.ask(&secret, "POST", CHAT, &key, body).await;

    // Failed: the key is free again.
    gateway.backend.script(Script::SayThenVanish(ids("x")));
    assert_eq!(ask(&body).await.status, 503);
    let one = |_: &support::MockBackend| view::settled(&store.view()).unwrap() == 1;
    gateway.backend.until("the failed row", one).await;
    let first = ask(&body).await;
    assert_eq!(
        (first.status, first.header("idempotent-replayed")),
        (200, None),
        "{}",
        first.text()
    );
    let seed = gateway.backend.last_job().sampling.seed;
    let settled = view::settled(&store.view()).unwrap();
    assert_eq!(settled, 2);

    // Repeated: the same tokens are asked for, under the same id, and nothing is settled.
    let again = ask(&body).await;
    assert_eq!(
        (again.status, again.header("idempotent-replayed")),
        (200, Some("true")),
        "{}",
        again.text()
    );
    assert_eq!(again.json()["id"], first.json()["id"]);
    assert_eq!(gateway.backend.last_job().sampling.seed, seed);
    assert_eq!(view::settled(&store.view()).unwrap(), settled);

    // Another body, and another key holder.
    let other = ask(&hi(json!({"max_tokens": 21}))).await;
    assert_eq!(
        (other.status, other.error()["code"].as_str()),
        (422, Some("idempotency_key_reused"))
    );
    let (_, _, stranger) = gateway.project_key(json!({}), json!({})).await;
    let theirs = gateway.ask(&stranger, "POST", CHAT, &key, &body).await;
    assert_eq!((theirs.status, theirs.header("idempotent-replayed")), (200, None));
    assert_ne!(gateway.backend.last_job().sampling.seed, seed);

    // While it runs.
    gateway.backend.script(Script::SayThenHang(ids("y")));
    let bearer = format!("Bearer {secret}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
        ("idempotency-key", "two"),
    ];
    let mut wire = gateway.connect().await;
    let stream = hi(json!({"max_tokens": 20, "stream": true}));
    wire.send("POST", CHAT, &headers, stream.to_string().as_bytes()).await;
    wire.read_until("y").await;
    let two = [("idempotency-key", "two")];
    let busy = gateway.ask(&secret, "POST", CHAT, &two, &stream).await;
    assert_eq!(
        (busy.status, busy.error()["code"].as_str()),
        (409, Some("idempotency_key_in_use"))
    );
    assert_eq!(gateway.ask(&secret, "POST", CHAT, &two, &body).await.status, 422);
    let long = "k".repeat(256);
    let answer = gateway
        .ask(&secret, "POST", CHAT, &[("idempotency-key", &long)], &body)
        .await;
    assert_eq!(answer.status, 400);
    // A finish reason of length ends well, too.
    gateway.backend.script(Script::Say(ids("zz"), FinishReason::Length));
    let three = [("idempotency-key", "three")];
    assert_eq!(gateway.ask(&secret, "POST", CHAT, &three, &body).await.status, 200);
    let replayed = gateway.ask(&secret, "POST", CHAT, &three, &body).await;
    assert_eq!(replayed.header("idempotent-replayed"), Some("true"));
}

/// Two members that share the replicated state get one key.
#[tokio::test]
async fn a_key_runs_on_one_member_at_a_time() {
    let (one, store) = TestGateway::with_accounts().await;
    let backend = std::sync::Arc::new(support::MockBackend::default());
    assert!(backend.store.set(store.clone()).is_ok());
    let config = baton_gateway::GatewayConfig {
        api_key: Some(OPERATOR.into()),
        ..Default::default()
    };
    let two = TestGateway::over(config, backend).await;
    price(&one).await;
    let (_, key_id, secret) = one.project_key(json!({}), json!({})).await;
    let body = hi(json!({"max_tokens": 20}));
    let key = [("idempotency-key", "k")];
    let code = |answer: &support::Answer| (answer.status, answer.error()["code"].as_str().map(str::to_owned));
    let in_use = (409, Some("idempotency_key_in_use".to_owned()));

    // It runs on one: the other refuses, and takes it once the first has given up.
    one.backend.script(Script::SayThenHang(ids("y")));
    let bearer = format!("Bearer {secret}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
        key[0],
    ];
    let mut wire = one.connect().await;
    let stream = hi(json!({"max_tokens": 20, "stream": true}));
    wire.send("POST", CHAT, &headers, stream.to_string().as_bytes()).await;
    wire.read_until("y").await;
    assert_eq!(code(&two.ask(&secret, "POST", CHAT, &key, &stream).await), in_use);
    let other = two.ask(&secret, "POST", CHAT, &key, &body).await;
    assert_eq!(code(&other), (422, Some("idempotency_key_reused".to_owned())));
    drop(wire);
    let released = async {
        while store.count("ReleaseIdempotency") == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(support::LONG, released)
        .await
        .expect("the key is given back");
    let rows = view::settled(&store.view()).unwrap();
    assert_eq!(two.ask(&secret, "POST", CHAT, &key, &body).await.status, 200);
    assert_eq!(view::settled(&store.view()).unwrap(), rows + 1);

    // At the same moment: one row, and one answer or a refusal that says why.
    for at in 0..8 {
        let name = format!("both-{at}");
        let key = [("idempotency-key", name.as_str())];
        let rows = view::settled(&store.view()).unwrap();
        let (a, b) = tokio::join!(
            one.ask(&secret, "POST", CHAT, &key, &body),
            two.ask(&secret, "POST", CHAT, &key, &body)
        );
        assert_eq!(view::settled(&store.view()).unwrap(), rows + 1);
        let (won, lost) = if a.status == 200 { (a, b) } else { (b, a) };
        assert_eq!(won.status, 200, "{}", won.text());
        if lost.status == 200 {
            assert_eq!(lost.json()["id"], won.json()["id"]);
        } else {
            assert_eq!(code(&lost), in_use);
        }
    }

    // Its member dies: the key is free once the claim's time is over.
    let sha256 = |bytes: &[u8]| ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().to_vec();
    let claim = baton_proto::state::ClaimIdempotency {
        key_id: key_id.clone(),
        idempotency_key_sha256: sha256(b"dead").into(),
        request_sha256: sha256(body.to_string().as_bytes()).into(),
        request_id: "of a member that died".into(),
        lease_ms: 15_000,
    };
    let kind = baton_proto::state::command::Kind::ClaimIdempotency(claim);
    store.apply(&baton_gateway::command("", kind)).unwrap();
    let dead = [("idempotency-key", "dead")];
    assert_eq!(code(&two.ask(&secret, "POST", CHAT, &dead, &body).await), in_use);
    let mut tick = baton_gateway::command("", baton_proto::state::command::Kind::Tick(Default::default()));
    tick.at_unix_ms += 15_001;
    store.apply(&tick).unwrap();
    assert_eq!(two.ask(&secret, "POST", CHAT, &dead, &body).await.status, 200);

    // Without a key nobody is asked.
    let claims = store.count("ClaimIdempotency");
    assert_eq!(two.ask(&secret, "POST", CHAT, &[], &body).await.status, 200);
    assert_eq!(store.count("ClaimIdempotency"), claims);
}
