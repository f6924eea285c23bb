//! Accounts through the binary: an operator makes project, key, price and budget with the command line, clients spend until
//! the budget refuses, and usage, costs, budget and the ledger's rows tell the same to the nano-unit.

use super::support::cluster::{Cluster, baton};
use super::support::eventually;
use super::support::http::{Answer, chat_body, request_with};
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use std::time::Duration;

const ROOT: &str = "sk-operator-for-this-test";

/// Runs a command of the binary with `--json`.
fn ask(url: &str, key: &str, args: &[&str]) -> Value {
    let output = baton()
        .args(args)
        .args(["--json", "--url", url])
        .env("BATON_API_KEY", key)
        .output()
        .expect("the binary runs");
    assert!(output.status.success(), "{args:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {output:?}"))
}

async fn chat_as(url: &str, key: &str, body: &Value) -> Answer {
    let bearer = format!("Bearer {key}");
    let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
    request_with(Method::POST, url, "/v1/chat/completions", &headers, body.to_string()).await
}

/// The ledger's rows, as whoever bills reads them.
fn rows(url: &str, key: &str) -> Vec<Value> {
    let export = baton()
        .args(["ledger", "export", "--url", url])
        .env("BATON_API_KEY", key)
        .output()
        .expect("the binary runs");
    assert!(export.status.success(), "{export:?}");
    let lines = String::from_utf8(export.stdout).expect("UTF-8");
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    lines
        .filter_map(|line| {
            let whole = line.get("charge").is_some().then(|| line.clone());
            line.get("row").cloned().or(whole)
        })
        .collect()
}

/// What rows charge, in nano-units.
fn charged(rows: &[Value]) -> i128 {
    let classes = ["input_nano", "cached_input_nano", "output_nano"];
    rows.iter()
        .flat_map(|row| classes.map(|class| nano(&row["charge"][class])))
        .sum()
}

fn nano(value: &Value) -> i128 {
    value.as_str().expect("text").parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_ends_and_everything_adds_up_to_the_nano_unit() {
    let cluster = Cluster::start(&["--prefill", "0", "--api-key", ROOT]).await;
    let url = cluster.url.clone();
    let root = |args: &[&str]| ask(&url, ROOT, args);
    let project = root(&["projects", "create", "e2e"])["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let made = root(&["keys", "create", "client", "--project", &project]);
    let (key, secret) = (
        made["id"].as_str().expect("an id"),
        made["value"].as_str().expect("a secret"),
    );
    let changed = root(&[
        "keys",
        "update",
        key,
        "--project",
        &project,
        "--weight",
        "3",
        "--priority-min",
        "-2",
    ]);
    assert_eq!(
        (&changed["weight"], &changed["priority_min"]),
        (&json!(3), &json!(-2)),
        "{changed}"
    );
    let reader = root(&["keys", "create", "billing", "--project", &project, "--scope", "usage"]);
    let reader = reader["value"].as_str().expect("a secret");
    root(&[
        "prices",
        "set",
        "baton-demo",
        "--input",
        "20",
        "--cached-input",
        "2",
        "--output",
        "80",
    ]);
    let budget = root(&["budgets", "set", "0.01", "--project", &project, "--period", "total"]);

    let mut served = Vec::new();
    let refused = loop {
        let body = chat_body(
            &format!("Count to {}.", served.len()),
            json!({"max_tokens": 12, "user": "u"}),
        );
        let answer = chat_as(&url, secret, &body).await;
        if answer.status != StatusCode::OK {
            break answer;
        }
        served.push(answer.json()["usage"].clone());
        assert!(served.len() < 200, "the budget never ends");
    };
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(
        refused.json()["error"]["code"],
        "insufficient_quota",
        "{}",
        refused.json()
    );
    assert!(served.len() > 2, "{}", served.len());

    let rows = rows(&url, reader);
    assert_eq!(rows.len(), served.len());
    let charged = charged(&rows);
    for (row, usage) in rows.iter().zip(&served) {
        let record = &row["usage"];
        assert_eq!(record["prompt_tokens"], usage["prompt_tokens"]);
        assert_eq!(record["completion_tokens"], usage["completion_tokens"]);
        assert_eq!(record["cached_tokens"], usage["prompt_tokens_details"]["cached_tokens"]);
        assert_eq!((&record["user"], &record["key_id"]), (&json!("u"), &json!(key)));
        assert_eq!(record["attempt_list"][0]["tokens"], record["sampled_tokens"]);
        assert!(
            record["revision"].as_str().is_some_and(|revision| revision.len() == 64),
            "{record}"
        );
    }
    // 0.01 USD is ten million nano-units.
    assert!(charged > 0 && charged <= 10_000_000, "{charged}");

    // Costs and usage say the same, with and without groups.
    for group in [
        &[][..],
        &["--group-by", "line_item"],
        &["--group-by", "api_key_id", "--group-by", "project_id"],
    ] {
        let args = [&["costs"][..], group].concat();
        let buckets = ask(&url, reader, &args);
        let results = buckets
            .as_array()
            .expect("buckets")
            .iter()
            .flat_map(|bucket| bucket["results"].as_array().expect("results"));
        assert_eq!(
            results.map(|result| nano(&result["amount"]["nano"])).sum::<i128>(),
            charged,
            "{group:?}"
        );
    }
    let buckets = ask(&url, reader, &["usage", "--bucket", "1h", "--days", "1", "--key", key]);
    let results: Vec<&Value> = buckets
        .as_array()
        .expect("buckets")
        .iter()
        .flat_map(|bucket| bucket["results"].as_array().expect("results"))
        .collect();
    let sum = |name: &str| {
        results
            .iter()
            .map(|result| result[name].as_u64().expect("a count"))
            .sum::<u64>()
    };
    let told = |name: &str| {
        served
            .iter()
            .map(|usage| usage[name].as_u64().expect("a count"))
            .sum::<u64>()
    };
    assert_eq!(sum("num_model_requests"), served.len() as u64);
    assert_eq!(
        (sum("input_tokens"), sum("output_tokens")),
        (told("prompt_tokens"), told("completion_tokens"))
    );
    let budgets = root(&["budgets", "list"]);
    assert_eq!(budgets[0]["id"], budget["id"]);
    assert_eq!(
        budgets[0]["spent"],
        json!(baton_ledger::money::Nano(charged).to_string())
    );

    // Signed on demand, and the log knows who did what.
    let bearer = format!("Bearer {ROOT}");
    let headers = [("authorization", bearer.as_str())];
    let sealed = request_with(Method::POST, &url, "/v1/ledger/seal", &headers, "")
        .await
        .json();
    assert_eq!(sealed["checkpoint"]["last_sequence"], json!(rows.len()), "{sealed}");
    let log = root(&["audit"]);
    let types: Vec<&str> = log
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| row["type"].as_str().expect("a type"))
        .collect();
    assert!(
        types.contains(&"price.created") && types.contains(&"api_key.created"),
        "{types:?}"
    );

    // Revoked: refused with the next request.
    root(&["keys", "revoke", key, "--project", &project]);
    assert_eq!(
        chat_as(&url, secret, &chat_body("Hi", json!({}))).await.status,
        StatusCode::UNAUTHORIZED
    );
    assert!(cluster.stop().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_holds_whichever_coordinators_are_asked() {
    let cluster = Cluster::start(&[
        "--coordinators",
        "3",
        "--prefill",
        "0",
        "--decode",
        "1",
        "--threads",
        "1",
        "--api-key",
        ROOT,
    ])
    .await;
    let urls = super::group::urls(&cluster);
    let at = |index: usize, args: &[&str]| ask(&urls[index], ROOT, args);
    let project = at(0, &["projects", "create", "group"])["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let known = |url: String, secret: String, status: StatusCode| async move {
        let told = format!("{url} answers {status}");
        eventually(&told, Duration::from_secs(20), || async {
            let bearer = format!("Bearer {secret}");
            let answer = request_with(Method::GET, &url, "/v1/models", &[("authorization", &bearer)], "").await;
            (answer.status == status).then_some(())
        })
        .await;
    };
    let made = at(0, &["keys", "create", "client", "--project", &project]);
    let key = made["id"].as_str().expect("an id").to_owned();
    let secret = made["value"].as_str().expect("a secret").to_owned();
    at(0, &["prices", "set", "baton-demo", "--input", "20", "--output", "80"]);
    at(
        0,
        &["budgets", "set", "0.02", "--project", &project, "--period", "total"],
    );
    for url in &urls {
        known(url.clone(), secret.clone(), StatusCode::OK).await;
    }
    // Known everywhere once the last change is.
    for index in 0..3 {
        let there =
            || async { (!at(index, &["budgets", "list"]).as_array().expect("a list").is_empty()).then_some(()) };
        eventually("the budget is there", Duration::from_secs(20), there).await;
    }

    // A repeated request finds its row through any member.
    let body = chat_body("Say it again.", json!({"max_tokens": 8, "temperature": 1.0}));
    let bearer = format!("Bearer {secret}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
        ("idempotency-key", "once"),
    ];
    let first = request_with(
        Method::POST,
        &urls[0],
        "/v1/chat/completions",
        &headers,
        body.to_string(),
    )
    .await;
    assert_eq!(first.status, StatusCode::OK, "{}", first.json());
    let replayed = eventually("the row is there", Duration::from_secs(20), || async {
        let answer = request_with(
            Method::POST,
            &urls[1],
            "/v1/chat/completions",
            &headers,
            body.to_string(),
        )
        .await;
        answer.header("idempotent-replayed").is_some().then_some(answer)
    });
    let replayed = replayed.await.json();
    let first = first.json();
    assert_eq!(
        (&replayed["id"], &replayed["choices"]),
        (&first["id"], &first["choices"])
    );

    // Everybody spends through a member of its own until that refuses.
    let spend = |url: String, secret: String| async move {
        for number in 0..100 {
            let answer = chat_as(
                &url,
                &secret,
                &chat_body(&format!("Count to {number}."), json!({"max_tokens": 12})),
            )
            .await;
            if answer.status == StatusCode::TOO_MANY_REQUESTS {
                assert_eq!(answer.json()["error"]["code"], "insufficient_quota");
                return number;
            }
            assert_eq!(answer.status, StatusCode::OK, "{}", answer.json());
        }
        panic!("the budget never ends");
    };
    let [a, b, c] = [0, 1, 2].map(|index| tokio::spawn(spend(urls[index].clone(), secret.clone())));
    let served = a.await.expect("a") + b.await.expect("b") + c.await.expect("c");
    assert!(served >= 3, "{served}");
    let rows = eventually("all rows are there", Duration::from_secs(20), || async {
        let rows = rows(&urls[2], ROOT);
        // The repeated request is one; its first repetition may have come before its row.
        (rows.len() > served).then_some(rows)
    })
    .await;
    let charged = charged(&rows);
    assert!(
        charged > 0 && charged <= 20_000_000,
        "{charged} of 20,000,000 nano-units in {served} requests"
    );
    let spent = &at(2, &["budgets", "list"])[0]["spent"];
    assert_eq!(*spent, json!(baton_ledger::money::Nano(charged).to_string()));

    // Revoked through one, refused by all.
    at(1, &["keys", "revoke", &key, "--project", &project]);
    let refused = chat_as(&urls[1], &secret, &body).await;
    assert_eq!(refused.status, StatusCode::UNAUTHORIZED, "at once where it was revoked");
    for url in &urls {
        known(url.clone(), secret.clone(), StatusCode::UNAUTHORIZED).await;
    }
    assert!(cluster.stop().await.success());
}
