//! The smaller APIs: tokens and text, SageMaker, KServe; and the description of all of them.

mod support;

use std::sync::atomic::Ordering;

use baton_gateway::GatewayConfig;
use baton_proto::worker::FinishReason;
use serde_json::{Value, json};
use support::{CHAT, Script, TestGateway, hi, ids, turn};

#[tokio::test]
async fn text_and_conversations_become_tokens_and_back() {
    let gateway = TestGateway::start().await;
    let answer = gateway
        .post(
            "/tokenize",
            &json!({"model": "m", "prompt": "hé<|im_end|>", "return_token_strs": true}),
        )
        .await;
    let tokens = [ids("hé"), vec![257]].concat();
    let json = answer.json();
    assert_eq!(
        (&json["count"], &json["max_model_len"], &json["tokens"]),
        (&json!(4), &json!(256), &json!(tokens))
    );
    assert_eq!(json["token_strs"].as_array().map(Vec::len), Some(4));
    let back = gateway.post("/detokenize", &json!({"tokens": tokens})).await;
    assert_eq!(back.json(), json!({"prompt": "hé<|im_end|>"}));

    let count = async |extra: Value| {
        gateway.post("/tokenize", &hi(extra)).await.json()["count"]
            .as_u64()
            .unwrap()
    };
    let open = "user\nhi\nassistant\n".len() as u64 + 3;
    assert_eq!(count(json!({})).await, open);
    let closed = count(json!({"add_generation_prompt": false})).await;
    assert!(closed < open, "{closed}");
    for (path, bad, param) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": "x", "odd": 1}), "odd"),
        ("/tokenize", json!({"prompt": "x", "messages": []}), "messages"),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({"tokens": [9999]}), "tokens"),
        ("/detokenize", json!({"tokens": ["x"]}), "tokens"),
    ] {
        let answer = gateway.post(path, &bad).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!(param)), "{bad}");
    }
    assert!(gateway.backend.records().is_empty());
}

#[tokio::test]
async fn sagemaker_invokes_by_the_bodys_shape() {
    let gateway = TestGateway::start().await;
    assert_eq!(gateway.get("/ping").await.status, 200);
    let chat = gateway.post("/invocations", &hi(json!({}))).await;
    assert_eq!(chat.json()["object"], "chat.completion");
    let completion = gateway
        .post("/invocations", &json!({"model": "m", "prompt": "x"}))
        .await;
    assert_eq!(completion.json()["object"], "text_completion");
    assert_eq!(gateway.post("/invocations", &json!({"inputs": "x"})).await.status, 400);
    let endpoints: Vec<String> = gateway
        .backend
        .records()
        .into_iter()
        .map(|record| record.endpoint)
        .collect();
    assert_eq!(endpoints, ["/invocations", "/invocations"]);
    gateway.backend.no_worker.store(true, Ordering::SeqCst);
    assert_eq!(gateway.get("/ping").await.status, 503);
}

#[tokio::test]
async fn kserve_tells_its_state_and_generates() {
    let gateway = TestGateway::start().await;
    assert_eq!(gateway.get("/v2").await.json()["name"], "baton");
    assert_eq!(gateway.get("/v2/health/live").await.json(), json!({"live": true}));
    assert_eq!(gateway.get("/v2/health/ready").await.json(), json!({"ready": true}));
    assert_eq!(gateway.get("/v2/models/m").await.json()["versions"], json!(["r1"]));
    assert_eq!(
        gateway.get("/v2/models/m/ready").await.json(),
        json!({"name": "m", "ready": true})
    );
    let missing = gateway.get("/v2/models/org%2Fnope").await;
    assert_eq!(missing.status, 404);
    assert!(
        missing.json()["error"].as_str().unwrap().contains("org/nope"),
        "a string in this protocol"
    );

    gateway.backend.script(turn("hey"));
    let path = "/v2/models/m/generate";
    let body =
        json!({"id": "7", "text_input": "x", "parameters": {"max_tokens": 9, "temperature": 0, "details": true}});
    let whole = gateway.post(path, &body).await.json();
    let details = json!({"finish_reason": "eos_token", "prompt_tokens": 1, "generated_tokens": 4});
    assert_eq!(
        whole,
        json!({"id": "7", "model_name": "m", "text_output": "hey", "details": details})
    );
    assert_eq!(gateway.backend.last_job().prompt.to_vec(), ids("x"));
    assert_eq!(
        gateway
            .post(path, &json!({"text_input": "x", "parameters": {"odd": 1}}))
            .await
            .status,
        400
    );

    gateway.backend.script(Script::Say(ids("hey"), FinishReason::Length));
    let answer = gateway.post("/v2/models/m/generate_stream", &body).await;
    let parts: Vec<Value> = answer
        .events()
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    let text: String = parts.iter().map(|part| part["text_output"].as_str().unwrap()).collect();
    assert_eq!(text, "hey");
    assert_eq!(parts.last().unwrap()["details"]["finish_reason"], "length");
    assert_eq!(gateway.backend.records()[1].endpoint, "/v2/models/generate_stream");
    gateway.backend.no_worker.store(true, Ordering::SeqCst);
    assert_eq!(gateway.get("/v2/models/m/ready").await.status, 503);
}

#[tokio::test]
async fn every_described_route_exists_and_needs_a_key() {
    let config = GatewayConfig {
        api_key: Some("sk-0123456789abcdef".into()),
        ..GatewayConfig::default()
    };
    let closed = TestGateway::with(config).await;
    let (gateway, _) = TestGateway::with_accounts().await;
    let operator = format!("Bearer {}", support::OPERATOR);
    let key = [
        ("authorization", operator.as_str()),
        ("content-type", "application/json"),
    ];
    let document = gateway.request("GET", "/openapi.json", &key, b"").await.json();
    assert_eq!(document["openapi"], "3.1.0");
    let mut routes = 0;
    // The scripted cluster has no state to save, and breaks the backup off.
    let paths = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .filter(|(path, _)| *path != "/cluster/snapshot");
    for (path, operations) in paths {
        let sent = path
            .replace("{model}", "nope")
            .replace("{id}", "nope")
            .replace(['{', '}'], "");
        for (method, operation) in operations.as_object().unwrap() {
            routes += 1;
            let method = method.to_uppercase();
            let answer = gateway.request(&method, &sent, &key, b"").await;
            assert!(
                answer.status != 405 && !answer.text().contains("unknown_url"),
                "{method} {path} is described and not there: {}",
                answer.text()
            );
            assert!(
                operation["responses"][answer.status.to_string()].is_object(),
                "{method} {path} answers {} and does not say so",
                answer.status
            );
            if !path.starts_with("/v1/organization") && !path.starts_with("/v1/ledger") {
                let open = operation["tags"][0] == "health";
                let answer = closed.request(&method, &sent, &[], b"").await;
                assert_eq!(answer.status != 401, open, "{method} {path}: {}", answer.status);
            }
        }
    }
    assert!(routes > 40, "{routes}");
    let page = gateway.request("GET", "/docs", &key, b"").await;
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(page.text().contains(CHAT) && !page.text().contains("<script"));
    assert!(
        gateway
            .request("GET", "/", &key, b"")
            .await
            .text()
            .contains("/v1/messages/count_tokens")
    );
}

/// The table of routes in `docs/api.md` is what `/openapi.json` says.
#[tokio::test]
async fn the_book_lists_the_routes() {
    let (gateway, _) = TestGateway::with_accounts().await;
    let document = gateway
        .ask(support::OPERATOR, "GET", "/openapi.json", &[], &Value::Null)
        .await
        .json();
    let mut table = String::from("| route | what it is |\n|---|---|\n");
    for tag in ["inference", "reading", "administration", "health"] {
        for (path, operations) in document["paths"].as_object().unwrap() {
            for (method, operation) in operations.as_object().unwrap() {
                if operation["tags"][0] == tag {
                    let summary = operation["summary"].as_str().unwrap();
                    table += &format!("| `{} {path}` | {summary} |\n", method.to_uppercase());
                }
            }
        }
    }
    let (begin, end) = ("<!-- routes -->\n", "<!-- end of routes -->");
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/api.md");
    let book = std::fs::read_to_string(&path).unwrap();
    let from = book.find(begin).unwrap() + begin.len();
    let to = book.find(end).unwrap();
    if std::env::var_os("BATON_UPDATE_DOCS").is_some() {
        std::fs::write(&path, [&book[..from], &table, &book[to..]].concat()).unwrap();
    } else {
        assert!(
            book[from..to] == table,
            "docs/api.md is not what the routes are; run: BATON_UPDATE_DOCS=1 cargo test -p baton-gateway --test compat"
        );
    }
}
