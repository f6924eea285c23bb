//! `/v1/batches` over real connections and a scripted cluster: whole lives, what the lines come to, who pays, and how much.

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use baton_gateway::BackendError;
use baton_proto::worker::FinishReason;
use serde_json::{Value, json};
use support::{LONG, Script, TestGateway, hi, ids, turn};

const CHAT: &str = "/v1/chat/completions";

async fn upload(gateway: &TestGateway, key: &str, lines: &str) -> String {
    let body = format!(
        "--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
         --b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"in.jsonl\"\r\n\r\n{lines}\r\n--b--\r\n"
    );
    let bearer = format!("Bearer {key}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "multipart/form-data; boundary=b"),
    ];
    let answer = gateway.request("POST", "/v1/files", &headers, body.as_bytes()).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["id"].as_str().unwrap().to_owned()
}

fn line(id: &str, extra: Value) -> String {
    format!(
        "{}\n",
        json!({"custom_id": id, "method": "POST", "url": CHAT, "body": hi(extra)})
    )
}

async fn create(gateway: &TestGateway, key: &str, input: &str) -> Value {
    let body =
        json!({"input_file_id": input, "endpoint": CHAT, "completion_window": "24h", "metadata": {"job": "nightly"}});
    let answer = gateway.ask(key, "POST", "/v1/batches", &[], &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

async fn batch(gateway: &TestGateway, key: &str, id: &str) -> Value {
    gateway
        .ask(key, "GET", &format!("/v1/batches/{id}"), &[], &Value::Null)
        .await
        .json()
}

/// Waits for a status.
async fn until(gateway: &TestGateway, key: &str, id: &str, status: &str) -> Value {
    let deadline = std::time::Instant::now() + LONG;
    loop {
        let batch = batch(gateway, key, id).await;
        if batch["status"] == status {
            return batch;
        }
        assert!(std::time::Instant::now() < deadline, "never {status}: {batch}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The lines of a file, by custom id.
async fn lines(gateway: &TestGateway, key: &str, file: &Value) -> BTreeMap<String, Value> {
    let path = format!("/v1/files/{}/content", file.as_str().expect("a file's id"));
    let answer = gateway.ask(key, "GET", &path, &[], &Value::Null).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let text = answer.text();
    let parsed: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let by_id: BTreeMap<String, Value> = parsed
        .iter()
        .map(|line| (line["custom_id"].as_str().unwrap().to_owned(), line.clone()))
        .collect();
    assert_eq!(by_id.len(), parsed.len(), "a line is there twice");
    by_id
}

#[tokio::test]
async fn every_line_is_answered_at_half_the_price() {
    let (gateway, store) = TestGateway::with_accounts().await;
    let (project, key_id, key) = gateway.project_key(json!({}), json!({})).await;
    let price = json!({"model": "m", "currency": "USD", "input": "20", "output": "80"});
    gateway.admin("POST", "/v1/organization/prices", price).await;
    let text: String = (0..20)
        .map(|n| {
            line(
                &format!("r{n}"),
                if n == 7 {
                    json!({"temperature": 9})
                } else {
                    json!({"user": "u"})
                },
            )
        })
        .collect();
    // Without the last line's end, and with an empty line.
    let input = upload(&gateway, &key, &format!("\n{}", text.trim_end())).await;
    let made = create(&gateway, &key, &input).await;
    let id = made["id"].as_str().unwrap();
    assert!(id.starts_with("batch_"));
    assert_eq!(
        (&made["object"], &made["input_file_id"], &made["metadata"]),
        (&json!("batch"), &json!(input), &json!({"job": "nightly"}))
    );
    assert_eq!(
        made["expires_at"].as_u64().unwrap() - made["created_at"].as_u64().unwrap(),
        86_400
    );
    let over = until(&gateway, &key, id, "completed").await;
    assert_eq!(
        over["request_counts"],
        json!({"total": 20, "completed": 19, "failed": 1})
    );
    assert_eq!(over["model"], "m");
    for time in ["in_progress_at", "finalizing_at", "completed_at"] {
        assert!(over[time].is_u64(), "{time}: {over}");
    }
    assert!(
        over.get("errors").is_none() && over.get("failed_at").is_none(),
        "{over}"
    );

    let answered = lines(&gateway, &key, &over["output_file_id"]).await;
    assert_eq!(answered.len(), 19);
    let mut tokens = (0, 0);
    for line in answered.values() {
        assert!(line["id"].as_str().unwrap().starts_with("batch_req_") && line["error"].is_null());
        assert_eq!(line["response"]["status_code"], 200);
        let body = &line["response"]["body"];
        assert_eq!(body["choices"][0]["message"]["content"], "hello");
        tokens.0 += body["usage"]["prompt_tokens"].as_u64().unwrap();
        tokens.1 += body["usage"]["completion_tokens"].as_u64().unwrap();
    }
    let told = (&over["usage"]["input_tokens"], &over["usage"]["output_tokens"]);
    assert_eq!(told, (&json!(tokens.0), &json!(tokens.1)));
    let refused = lines(&gateway, &key, &over["error_file_id"]).await;
    assert_eq!(refused["r7"]["response"]["status_code"], 400);
    assert_eq!(refused["r7"]["response"]["body"]["error"]["param"], "temperature");

    // Every line is one row, of its creator, at exactly half.
    let rows = baton_state::view::rows_after(&store.view(), 0, 1000).unwrap();
    assert_eq!(rows.len(), 19);
    let nano = |tokens: u64, per_mtok: u64| tokens * per_mtok / 1_000_000;
    for row in &rows {
        let Some(baton_proto::state::ledger_row::Body::Usage(record)) = &row.body else {
            panic!("{row:?}")
        };
        assert_eq!((record.service_tier.as_str(), record.user.as_str()), ("batch", "u"));
        assert_eq!((&record.key_id, &record.project_id), (&key_id, &project));
        let charge = row.charge.as_ref().unwrap();
        let uncached = u64::from(record.prompt_tokens - record.cached_tokens);
        assert_eq!(charge.input_nano, nano(uncached, 10_000_000_000));
        assert_eq!(
            charge.output_nano,
            nano(record.completion_tokens.into(), 40_000_000_000)
        );
    }
    let jobs = gateway.backend.jobs.lock().unwrap().clone();
    assert!(
        jobs.iter()
            .all(|job| job.priority == -100 && job.tenant.starts_with("batch ")),
        "{jobs:?}"
    );
    assert!(jobs.iter().all(|job| job.cache_salt == jobs[0].cache_salt));
    let usage = "/v1/organization/usage/completions?start_time=0&group_by=batch";
    let start = rows[0].at_unix_ms / 1000 - 10;
    let usage = gateway
        .admin("GET", &usage.replace("=0", &format!("={start}")), Value::Null)
        .await;
    let of = |result: &Value| {
        result["data"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|bucket| bucket["results"].as_array().unwrap().clone())
            .collect::<Vec<_>>()
    };
    let results = of(&usage);
    assert_eq!((results.len(), &results[0]["batch"]), (1, &json!(true)), "{usage}");
    assert_eq!(results[0]["num_model_requests"], 19);

    // Another project sees nothing of it.
    let (_, _, other) = gateway.project_key(json!({}), json!({})).await;
    assert_eq!(batch(&gateway, &other, id).await["error"]["code"], "not_found");
    let list = gateway
        .ask(&other, "GET", "/v1/batches", &[], &Value::Null)
        .await
        .json();
    assert_eq!(list["data"], json!([]));
    let list = gateway
        .ask(&key, "GET", "/v1/batches?limit=1", &[], &Value::Null)
        .await
        .json();
    assert_eq!((&list["data"][0], &list["has_more"]), (&over, &json!(false)));
}

#[tokio::test]
async fn an_invalid_file_runs_nothing() {
    let (gateway, _) = TestGateway::with_accounts().await;
    let (_, _, key) = gateway.project_key(json!({}), json!({})).await;
    let text = [
        line("a", json!({})),
        "{\n".into(),
        line("a", json!({})),
        line("b", json!({"stream": true})),
    ]
    .concat();
    let input = upload(&gateway, &key, &text).await;
    let id = create(&gateway, &key, &input).await["id"].as_str().unwrap().to_owned();
    let failed = until(&gateway, &key, &id, "failed").await;
    let errors: Vec<(&str, u64)> = failed["errors"]["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|error| (error["code"].as_str().unwrap(), error["line"].as_u64().unwrap()))
        .collect();
    assert_eq!(
        errors,
        [
            ("invalid_json_line", 2),
            ("duplicate_custom_id", 3),
            ("invalid_body", 4)
        ]
    );
    assert!(
        failed["failed_at"].is_u64() && failed.get("output_file_id").is_none(),
        "{failed}"
    );
    assert!(gateway.backend.jobs.lock().unwrap().is_empty());
    let cancel = format!("/v1/batches/{id}/cancel");
    assert_eq!(gateway.ask(&key, "POST", &cancel, &[], &Value::Null).await.status, 409);

    // And what is no batch at all.
    let good = json!({"input_file_id": input, "endpoint": CHAT, "completion_window": "24h"});
    for (field, value, status) in [
        ("input_file_id", json!("file-none"), 404),
        ("endpoint", json!("/v1/embeddings"), 400),
        ("completion_window", json!("1h"), 400),
        ("metadata", json!({"k": "v".repeat(513)}), 400),
        (
            "output_expires_after",
            json!({"anchor": "created_at", "seconds": 1}),
            400,
        ),
        ("odd", json!(1), 400),
    ] {
        let mut body = good.clone();
        body[field] = value;
        let answer = gateway.ask(&key, "POST", "/v1/batches", &[], &body).await;
        assert_eq!(answer.status, status, "{field}: {}", answer.text());
    }
    let answer = gateway
        .ask(&key, "GET", "/v1/batches/batch_none", &[], &Value::Null)
        .await;
    assert_eq!(answer.status, 404);
}

#[tokio::test]
async fn a_cancelled_batch_keeps_what_it_has() {
    let (gateway, store) = TestGateway::with_accounts().await;
    let (_, _, key) = gateway.project_key(json!({}), json!({})).await;
    gateway.backend.script(turn("done"));
    for _ in 0..2 {
        gateway.backend.script(Script::SayThenHang(ids("x")));
    }
    let text: String = (0..3).map(|n| line(&format!("r{n}"), json!({}))).collect();
    let input = upload(&gateway, &key, &text).await;
    let id = create(&gateway, &key, &input).await["id"].as_str().unwrap().to_owned();
    // Progress is told although the batch is not over.
    let deadline = std::time::Instant::now() + LONG;
    while batch(&gateway, &key, &id).await["request_counts"]["completed"] != 1 {
        assert!(std::time::Instant::now() < deadline, "never told");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let path = format!("/v1/files/{input}");
    assert_eq!(
        gateway.ask(&key, "DELETE", &path, &[], &Value::Null).await.status,
        409,
        "in use"
    );
    let cancel = format!("/v1/batches/{id}/cancel");
    let answer = gateway.ask(&key, "POST", &cancel, &[], &Value::Null).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let over = until(&gateway, &key, &id, "cancelled").await;
    assert_eq!(over["request_counts"], json!({"total": 3, "completed": 1, "failed": 0}));
    assert_eq!(
        lines(&gateway, &key, &over["output_file_id"]).await["r0"]["response"]["status_code"],
        200
    );
    assert!(over["cancelling_at"].is_u64() && over["cancelled_at"].is_u64() && over.get("error_file_id").is_none());
    gateway
        .backend
        .until("both are stopped", |backend| backend.records().len() == 3)
        .await;
    let rows = baton_state::view::rows_after(&store.view(), 0, 10).unwrap();
    let delivered = rows.iter().filter_map(|row| match &row.body {
        Some(baton_proto::state::ledger_row::Body::Usage(record)) => Some(record.completion_tokens),
        _ => None,
    });
    assert_eq!(
        delivered.filter(|tokens| *tokens > 0).count(),
        1,
        "who got nothing pays nothing"
    );
    assert_eq!(gateway.ask(&key, "DELETE", &path, &[], &Value::Null).await.status, 200);
}

#[tokio::test]
async fn load_is_waited_out_and_a_lost_key_is_not() {
    let (gateway, _) = TestGateway::with_accounts().await;
    let (project, key_id, key) = gateway.project_key(json!({}), json!({})).await;
    gateway
        .backend
        .script(Script::Refuse(BackendError::Unavailable { reason: "busy".into() }));
    gateway.backend.script(Script::SayThenVanish(ids("x")));
    gateway.backend.script(turn("one"));
    gateway.backend.script(turn("two"));
    let text: String = (0..2).map(|n| line(&format!("r{n}"), json!({}))).collect();
    let input = upload(&gateway, &key, &text).await;
    let id = create(&gateway, &key, &input).await["id"].as_str().unwrap().to_owned();
    let over = until(&gateway, &key, &id, "completed").await;
    assert_eq!(over["request_counts"], json!({"total": 2, "completed": 2, "failed": 0}));

    // Revoked while it waits: the lines say so, each of them.
    for _ in 0..1000 {
        gateway
            .backend
            .script(Script::Refuse(BackendError::NoWorker { model: "m".into() }));
    }
    let before = gateway.backend.jobs.lock().unwrap().len();
    let input = upload(&gateway, &key, &text).await;
    let path = format!("/v1/organization/projects/{project}/api_keys");
    let made = gateway.admin("POST", &path, json!({"name": "second"})).await;
    let second = made["value"].as_str().unwrap().to_owned();
    let id = create(&gateway, &key, &input).await["id"].as_str().unwrap().to_owned();
    gateway
        .backend
        .until("a line is tried", |backend| backend.jobs.lock().unwrap().len() > before)
        .await;
    let path = format!("/v1/organization/projects/{project}/api_keys/{key_id}");
    gateway.admin("DELETE", &path, Value::Null).await;
    let over = until(&gateway, &second, &id, "completed").await;
    assert_eq!(over["request_counts"], json!({"total": 2, "completed": 0, "failed": 2}));
    for line in lines(&gateway, &second, &over["error_file_id"]).await.values() {
        assert_eq!(line["response"]["status_code"], 401, "{line}");
    }
}

#[tokio::test]
async fn a_length_is_an_answer_too() {
    let (gateway, _) = TestGateway::with_accounts().await;
    gateway.backend.script(Script::Say(ids("abc"), FinishReason::Length));
    let input = upload(&gateway, support::OPERATOR, &line("only", json!({"max_tokens": 3}))).await;
    let id = create(&gateway, support::OPERATOR, &input).await["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let over = until(&gateway, support::OPERATOR, &id, "completed").await;
    let line = &lines(&gateway, support::OPERATOR, &over["output_file_id"]).await["only"];
    assert_eq!(line["response"]["body"]["choices"][0]["finish_reason"], "length");
    assert_eq!(gateway.backend.records()[0].key_id, "operator");
}
