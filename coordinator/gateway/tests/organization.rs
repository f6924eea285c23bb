//! Administration, and reading usage and costs, over the real state machine. The shapes are held against OpenAI's own
//! description where that file is at hand.

mod support;

use std::collections::BTreeMap;

use baton_proto::state::{SettleUsage, UsageRecord, UsageStatus, command::Kind};
use baton_state::view;
use serde_json::{Value, json};
use support::memory_store::MemoryStore;
use support::{OPERATOR, TestGateway};

/// 2026-01-01 00:00 UTC.
const DAY: u64 = 1_767_225_600;

/// Settles a request at a time, as another member would.
fn settle(store: &MemoryStore, id: &str, at_s: u64, change: impl FnOnce(&mut UsageRecord)) {
    let mut record = UsageRecord {
        request_id: id.into(),
        model: "m".into(),
        status: UsageStatus::Completed.into(),
        prompt_tokens: 100,
        cached_tokens: 40,
        completion_tokens: 10,
        sampled_tokens: 10,
        started_unix_ms: at_s * 1000,
        settled_unix_ms: at_s * 1000,
        project_id: "proj_a".into(),
        key_id: "key_a".into(),
        user: "u1".into(),
        service_tier: "default".into(),
        ..UsageRecord::default()
    };
    change(&mut record);
    let mut command = baton_gateway::command("", Kind::SettleUsage(SettleUsage { record: Some(record) }));
    command.at_unix_ms = at_s * 1000;
    store.apply(&command).unwrap();
}

/// A price from the beginning of time, which the API would refuse.
fn price(store: &MemoryStore) {
    let price = baton_proto::state::Price {
        model: "m".into(),
        service_tier: "default".into(),
        currency: "USD".into(),
        input_nano_per_mtok: 20_000_000_001,
        cached_input_nano_per_mtok: 2_000_000_000,
        output_nano_per_mtok: 80_000_000_000,
        ..Default::default()
    };
    let kind = Kind::PutPrice(baton_proto::state::PutPrice { price: Some(price) });
    let mut command = baton_gateway::command("test", kind);
    command.at_unix_ms = DAY * 1000;
    store.apply(&command).unwrap();
}

async fn ledger() -> (TestGateway, std::sync::Arc<MemoryStore>) {
    let (gateway, store) = TestGateway::with_accounts().await;
    price(&store);
    settle(&store, "r1", DAY + 10, |_| {});
    settle(&store, "r2", DAY + 70, |record| record.user = "u2".into());
    settle(&store, "r3", DAY + 3700, |record| {
        record.key_id = "key_b".into();
        record.service_tier = "batch".into();
    });
    settle(&store, "r4", DAY + 2 * 86_400 + 5, |record| {
        record.project_id = "proj_b".into()
    });
    (gateway, store)
}

#[tokio::test]
async fn usage_is_told_as_openai_tells_it() {
    let (gateway, _) = ledger().await;
    let get = async |query: &str| {
        gateway
            .admin(
                "GET",
                &format!("/v1/organization/usage/completions?{query}"),
                Value::Null,
            )
            .await
    };
    let whole = get(&format!("start_time={DAY}&end_time={}", DAY + 3 * 86_400)).await;
    assert_eq!(
        (&whole["object"], &whole["has_more"], &whole["next_page"]),
        (&json!("page"), &json!(false), &Value::Null)
    );
    let buckets = whole["data"].as_array().unwrap();
    assert_eq!(buckets.len(), 3);
    let first = &buckets[0]["results"][0];
    assert_eq!(
        (&first["num_model_requests"], &first["input_tokens"]),
        (&json!(3), &json!(300))
    );
    assert_eq!(
        (&first["input_cached_tokens"], &first["output_tokens"]),
        (&json!(120), &json!(30))
    );
    assert_eq!((&first["project_id"], &first["model"]), (&Value::Null, &Value::Null));
    assert_eq!(buckets[1]["results"], json!([]));
    assert_eq!(buckets[0]["start_time"], json!(DAY));

    // Grouped and filtered.
    let grouped = get(&format!(
        "start_time={DAY}&end_time={}&bucket_width=1h&group_by[]=user_id&group_by[]=batch&user_ids=u1&limit=2",
        DAY + 86_400
    ))
    .await;
    let buckets = grouped["data"].as_array().unwrap();
    assert_eq!((buckets.len(), &grouped["has_more"]), (2, &json!(true)));
    assert_eq!(buckets[0]["results"][0]["user_id"], "u1");
    assert_eq!(buckets[0]["results"][0]["batch"], json!(false));
    assert_eq!(buckets[1]["results"][0]["batch"], json!(true));
    let page = grouped["next_page"].as_str().unwrap();
    let next = get(&format!(
        "start_time={DAY}&end_time={}&bucket_width=1h&group_by=user_id&user_ids=u1&limit=24&page={page}",
        DAY + 86_400
    ))
    .await;
    assert_eq!(next["data"].as_array().unwrap().len(), 22);
    let batch = get(&format!("start_time={DAY}&end_time={}&batch=true", DAY + 86_400)).await;
    assert_eq!(batch["data"][0]["results"][0]["num_model_requests"], json!(1));
    let minutes = get(&format!("start_time={DAY}&end_time={}&bucket_width=1m", DAY + 120)).await;
    assert_eq!(minutes["data"].as_array().unwrap().len(), 2);

    for wrong in [
        String::new(),
        format!("start_time={DAY}&limit=32"),
        format!("start_time={DAY}&bucket_width=1h&limit=169"),
        format!("start_time={DAY}&bucket_width=1w"),
        format!("start_time={DAY}&group_by=colour"),
        format!("start_time={DAY}&colour=red"),
        format!("start_time={DAY}&end_time=1"),
        format!("start_time={DAY}&page=page_1"),
        "start_time=x".to_owned(),
    ] {
        let path = format!("/v1/organization/usage/completions?{wrong}");
        let answer = gateway.ask(OPERATOR, "GET", &path, &[], &Value::Null).await;
        assert_eq!(answer.status, 400, "{wrong}");
        answer.error();
    }
}

#[tokio::test]
async fn costs_are_the_ledgers_to_the_nano_unit() {
    let (gateway, store) = ledger().await;
    let path = format!("/v1/organization/costs?start_time={DAY}&end_time={}", DAY + 3 * 86_400);
    let sum = |page: &Value| -> i128 {
        let buckets = page["data"].as_array().unwrap().iter();
        let results = buckets.flat_map(|bucket| bucket["results"].as_array().unwrap());
        results
            .map(|result| result["amount"]["nano"].as_str().unwrap().parse::<i128>().unwrap())
            .sum()
    };
    let rows = view::rows_after(&store.view(), 0, 100).unwrap();
    let total: u128 = rows
        .iter()
        .map(|row| baton_ledger::charge::total(row.charge.as_ref().unwrap()))
        .sum();
    assert!(total > 0);
    let costs = gateway.admin("GET", &path, Value::Null).await;
    assert_eq!(sum(&costs), total as i128);
    assert_eq!(costs["data"][0]["results"][0]["amount"]["currency"], "usd");
    let items = gateway
        .admin(
            "GET",
            &format!("{path}&group_by=line_item&group_by=project_id"),
            Value::Null,
        )
        .await;
    assert_eq!(sum(&items), total as i128);
    let first = &items["data"][0]["results"][0];
    assert_eq!(
        (&first["line_item"], &first["quantity_unit"]),
        (&json!("m, input"), &json!("tokens"))
    );
    assert_eq!(
        (&first["project_id"], &first["quantity"]),
        (&json!("proj_a"), &json!(180))
    );
    let one = gateway
        .admin(
            "GET",
            &format!("{path}&api_key_ids=key_b&group_by=api_key_id"),
            Value::Null,
        )
        .await;
    assert_eq!(one["data"][0]["results"][0]["api_key_id"], "key_b");

    // The feed has the same rows.
    let mut reader = baton_ledger::feed::Reader::new(0, None);
    let mut charged = 0;
    loop {
        let page = gateway.admin("GET", &reader.path(3), Value::Null).await;
        let page: baton_ledger::feed::Page = serde_json::from_value(page).unwrap();
        let more = page.has_more;
        for item in reader.take(page).unwrap() {
            if let baton_ledger::feed::Item::Row(row) = item {
                charged += baton_ledger::charge::total(row.charge.as_ref().unwrap());
            }
        }
        if !more {
            break;
        }
    }
    assert_eq!((reader.after(), charged), (4, total));

    // A correction is in the costs of its own time.
    let body = json!({"id": "c1", "request_id": "r1", "reason": "refund", "output_nano": -800});
    let corrected = gateway
        .admin("POST", "/v1/organization/corrections", body.clone())
        .await;
    assert_eq!((&corrected["sequence"], &corrected["corrects"]), (&json!(5), &json!(1)));
    assert_eq!(
        gateway.admin("POST", "/v1/organization/corrections", body).await,
        corrected
    );
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let today = gateway
        .admin("GET", &format!("/v1/organization/costs?start_time={now}"), Value::Null)
        .await;
    assert_eq!(sum(&today), -800);
}

#[tokio::test]
async fn projects_keys_prices_and_the_log_of_changes() {
    let (gateway, _) = TestGateway::with_accounts().await;
    let (project, key, _) = gateway.project_key(json!({}), json!({})).await;
    let path = format!("/v1/organization/projects/{project}");
    let renamed = gateway
        .admin("POST", &path, json!({"name": "q", "limits": {"tokens_per_min": 9}}))
        .await;
    assert_eq!(
        (&renamed["name"], &renamed["limits"]["tokens_per_min"]),
        (&json!("q"), &json!(9))
    );
    assert_eq!(gateway.admin("GET", &path, Value::Null).await, renamed);
    for number in 0..4 {
        gateway
            .admin(
                "POST",
                "/v1/organization/projects",
                json!({"name": format!("p{number}")}),
            )
            .await;
    }
    let first = gateway
        .admin("GET", "/v1/organization/projects?limit=3", Value::Null)
        .await;
    assert_eq!(
        (first["data"].as_array().unwrap().len(), &first["has_more"]),
        (3, &json!(true))
    );
    let last = first["last_id"].as_str().unwrap();
    let rest = gateway
        .admin("GET", &format!("/v1/organization/projects?after={last}"), Value::Null)
        .await;
    assert_eq!(
        (rest["data"].as_array().unwrap().len(), &rest["has_more"]),
        (2, &json!(false))
    );

    let price = gateway
        .admin(
            "POST",
            "/v1/organization/prices",
            json!({"model": "m", "input": 0.15, "output": "0.6"}),
        )
        .await;
    assert_eq!(
        (&price["input"], &price["cached_input"], &price["output"]),
        (&json!("0.15"), &json!("0.15"), &json!("0.6"))
    );
    let listed = gateway.admin("GET", "/v1/organization/prices", Value::Null).await["data"].clone();
    let listed = listed.as_array().unwrap();
    assert!(listed.contains(&price), "{listed:?}");
    let batch: Vec<&Value> = listed.iter().filter(|listed| **listed != price).collect();
    assert_eq!(batch.len(), 1, "and that of batches");
    assert_eq!(
        (&batch[0]["service_tier"], &batch[0]["input"], &batch[0]["output"]),
        (&json!("batch"), &json!("0.075"), &json!("0.3"))
    );
    let refused = async |path: &str, body: Value, status: u16| {
        let answer = gateway.ask(OPERATOR, "POST", path, &[], &body).await;
        assert_eq!(answer.status, status, "{body}: {}", answer.text());
        answer.error();
    };
    refused(
        "/v1/organization/prices",
        json!({"model": "m", "input": "-1", "output": 1}),
        400,
    )
    .await;
    refused("/v1/organization/prices", json!({"model": "m", "input": 1}), 400).await;
    refused(
        "/v1/organization/prices",
        json!({"model": "m", "input": 1, "output": 1, "effective_from_unix_ms": 1}),
        400,
    )
    .await;
    refused(
        "/v1/organization/budgets",
        json!({"project_id": "proj_x", "limit": 1, "period": "day"}),
        404,
    )
    .await;
    refused(
        "/v1/organization/budgets",
        json!({"project_id": project, "limit": 1, "period": "year"}),
        400,
    )
    .await;
    refused(
        &format!("{path}/api_keys"),
        json!({"name": "k", "scopes": ["root"]}),
        400,
    )
    .await;
    refused(
        "/v1/organization/admin_api_keys",
        json!({"name": "k", "scopes": ["usage"]}),
        400,
    )
    .await;
    refused(
        "/v1/organization/corrections",
        json!({"id": "c", "request_id": "none", "reason": "x"}),
        404,
    )
    .await;

    gateway
        .admin("DELETE", &format!("{path}/api_keys/{key}"), Value::Null)
        .await;
    let log = gateway
        .admin("GET", "/v1/organization/audit_logs?limit=2", Value::Null)
        .await;
    let newest = &log["data"][0];
    assert_eq!(
        (&newest["type"], &newest["subject"]),
        (&json!("api_key.deleted"), &json!(key))
    );
    assert_eq!(newest["actor"]["api_key"]["id"], "operator");
    assert_eq!(log["has_more"], json!(true));
    let after = log["last_id"].as_str().unwrap();
    let older = gateway
        .admin(
            "GET",
            &format!("/v1/organization/audit_logs?after={after}"),
            Value::Null,
        )
        .await;
    assert_eq!(older["data"].as_array().unwrap().len(), 7, "{older}");
    let keys = gateway
        .admin(
            "GET",
            "/v1/organization/audit_logs?event_types[]=api_key.created",
            Value::Null,
        )
        .await;
    assert_eq!(keys["data"].as_array().unwrap().len(), 1);
}

/// What OpenAI's file says of one schema: its properties with their types, and which must be there.
struct Schema {
    types: BTreeMap<String, Vec<String>>,
    required: Vec<String>,
}

impl Schema {
    /// Reads it out of the file by its indentation, which is that of a printed YAML document.
    fn find(yaml: &str, name: &str) -> Self {
        let lines = yaml.lines().skip_while(|line| *line != format!("    {name}:")).skip(1);
        let block: Vec<&str> = lines.take_while(|line| line.starts_with("     ")).collect();
        assert!(!block.is_empty(), "{name} is not in the file");
        let (mut types, mut required) = (BTreeMap::<String, Vec<String>>::new(), Vec::new());
        let (mut section, mut property) = ("", String::new());
        for line in block {
            let indent = line.len() - line.trim_start().len();
            let text = line.trim_start();
            match indent {
                6 if !text.starts_with('-') => section = text.trim_end_matches(':'),
                8 if section == "properties" => {
                    property = text.trim_end_matches(':').to_owned();
                    types.insert(property.clone(), Vec::new());
                }
                8 if section == "required" => required.extend(text.strip_prefix("- ").map(str::to_owned)),
                10 | 12 if section == "properties" => {
                    let text = text.strip_prefix("- ").unwrap_or(text);
                    // What is described elsewhere is not looked up.
                    let kind = if text.starts_with("$ref") {
                        Some("any")
                    } else {
                        text.strip_prefix("type: ")
                    };
                    types
                        .get_mut(&property)
                        .expect("a property")
                        .extend(kind.map(|kind| kind.trim_matches('"').to_owned()));
                }
                _ => {}
            }
        }
        Self { types, required }
    }

    fn check(&self, value: &Value, ours: &[&str]) {
        let object = value.as_object().expect("an object");
        for name in &self.required {
            assert!(object.contains_key(name), "{name} is missing in {value}");
        }
        for (name, value) in object {
            let Some(types) = self.types.get(name) else {
                assert!(
                    ours.contains(&name.as_str()),
                    "{name} is neither theirs nor known as ours"
                );
                continue;
            };
            let is = |kind: &str| match kind {
                "string" => value.is_string(),
                "integer" => value.is_i64() || value.is_u64(),
                "number" => value.is_number(),
                "boolean" => value.is_boolean(),
                "array" => value.is_array(),
                "object" => value.is_object(),
                "null" => value.is_null(),
                "any" => true,
                _ => false,
            };
            assert!(
                types.is_empty() || types.iter().any(|kind| is(kind)),
                "{name}: {value} is none of {types:?}"
            );
        }
    }
}

#[tokio::test]
async fn shapes_are_those_of_openais_own_description() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/openai-openapi.yaml");
    let Ok(yaml) = std::fs::read_to_string(path) else {
        eprintln!("skipped: {path} is not here");
        return;
    };
    let (gateway, _) = ledger().await;
    let until = DAY + 3 * 86_400;
    let groups =
        "group_by=project_id&group_by=user_id&group_by=api_key_id&group_by=model&group_by=batch&group_by=service_tier";
    for (path, result, ours) in [
        (
            format!("usage/completions?start_time={DAY}&end_time={until}"),
            "UsageCompletionsResult",
            [].as_slice(),
        ),
        (
            format!("usage/completions?start_time={DAY}&end_time={until}&{groups}"),
            "UsageCompletionsResult",
            &[],
        ),
        (format!("costs?start_time={DAY}&end_time={until}"), "CostsResult", &[]),
        (
            format!(
                "costs?start_time={DAY}&end_time={until}&group_by=project_id&group_by=line_item&group_by=api_key_id"
            ),
            "CostsResult",
            &[],
        ),
    ] {
        let page = gateway
            .admin("GET", &format!("/v1/organization/{path}"), Value::Null)
            .await;
        Schema::find(&yaml, "UsageResponse").check(&page, &[]);
        let mut results = 0;
        for bucket in page["data"].as_array().unwrap() {
            Schema::find(&yaml, "UsageTimeBucket").check(bucket, &[]);
            for one in bucket["results"].as_array().unwrap() {
                Schema::find(&yaml, result).check(one, ours);
                results += 1;
            }
        }
        assert!(results > 1, "{path}");
    }
    let (project, _, _) = gateway.project_key(json!({}), json!({})).await;
    let shown = gateway
        .admin("GET", &format!("/v1/organization/projects/{project}"), Value::Null)
        .await;
    Schema::find(&yaml, "Project").check(&shown, &["organization_id", "limits"]);
    let ours = [
        "expires_at",
        "project_id",
        "scopes",
        "models",
        "limits",
        "revoked",
        "value",
        "owner_project_access",
    ];
    let keys = gateway
        .admin(
            "GET",
            &format!("/v1/organization/projects/{project}/api_keys"),
            Value::Null,
        )
        .await;
    Schema::find(&yaml, "ProjectApiKeyListResponse").check(&keys, &[]);
    Schema::find(&yaml, "ProjectApiKey").check(&keys["data"][0], &ours);
    let admin = gateway
        .admin("POST", "/v1/organization/admin_api_keys", json!({"name": "a"}))
        .await;
    Schema::find(&yaml, "AdminApiKey").check(&admin, &ours);
    let log = gateway.admin("GET", "/v1/organization/audit_logs", Value::Null).await;
    for row in log["data"].as_array().unwrap() {
        Schema::find(&yaml, "AuditLog").check(row, &["action", "subject", "sequence", "raft_index"]);
    }
    // Held against the wrong one, it would be seen.
    let wrong = std::panic::catch_unwind(|| Schema::find(&yaml, "CostsResult").check(&keys, &[]));
    assert!(wrong.is_err());
}
