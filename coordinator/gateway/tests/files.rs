//! `/v1/files` over real connections: uploads in any order and size, lists and pages, contents, what is refused, and whose
//! files are whose.

mod support;

use baton_gateway::{FilesConfig, GatewayConfig};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use support::{Answer, TestGateway};

const BOUNDARY: &str = "xYzZY";

/// A multipart body of parts: name, file name, content.
fn multipart(parts: &[(&str, Option<&str>, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, filename, content) in parts {
        let filename = filename.map_or(String::new(), |filename| format!("; filename=\"{filename}\""));
        body.extend_from_slice(
            format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"{filename}\r\n\r\n").as_bytes(),
        );
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    body
}

async fn post(gateway: &TestGateway, key: &str, body: &[u8]) -> Answer {
    let (bearer, kind) = (
        format!("Bearer {key}"),
        format!("multipart/form-data; boundary={BOUNDARY}"),
    );
    let headers = [("authorization", bearer.as_str()), ("content-type", kind.as_str())];
    gateway.request("POST", "/v1/files", &headers, body).await
}

async fn upload(gateway: &TestGateway, key: &str, name: &str, content: &[u8]) -> Value {
    let body = multipart(&[("purpose", None, b"batch"), ("file", Some(name), content)]);
    let answer = post(gateway, key, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

async fn get(gateway: &TestGateway, key: &str, path: &str) -> Answer {
    gateway.ask(key, "GET", path, &[], &Value::Null).await
}

#[tokio::test]
async fn a_file_comes_back_byte_for_byte() {
    let (gateway, _) = TestGateway::with_accounts().await;
    let (_, _, key) = gateway.project_key(json!({}), json!({})).await;
    // Three chunks, the last one short; with what looks like lines and boundaries.
    let content: Vec<u8> = (0..9_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let body = multipart(&[
        ("file", Some("../in.jsonl"), &content),
        ("expires_after[seconds]", None, b"3600"),
        ("expires_after[anchor]", None, b"created_at"),
        ("purpose", None, b"batch"),
    ]);
    let answer = post(&gateway, &key, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let file = answer.json();
    let id = file["id"].as_str().unwrap();
    assert!(id.starts_with("file-"), "{file}");
    assert_eq!(
        (&file["bytes"], &file["filename"], &file["purpose"], &file["object"]),
        (
            &json!(content.len()),
            &json!("in.jsonl"),
            &json!("batch"),
            &json!("file")
        )
    );
    let life = file["expires_at"].as_u64().unwrap() - file["created_at"].as_u64().unwrap();
    assert_eq!(life, 3600);
    assert_eq!(get(&gateway, &key, &format!("/v1/files/{id}")).await.json(), file);
    let answer = get(&gateway, &key, &format!("/v1/files/{id}/content")).await;
    assert_eq!(answer.status, 200);
    assert!(answer.body == content, "{} bytes", answer.body.len());
    assert_eq!(answer.header("content-disposition"), Some("attachment"));

    // Nobody else's.
    let (_, _, other) = gateway.project_key(json!({}), json!({})).await;
    for path in [format!("/v1/files/{id}"), format!("/v1/files/{id}/content")] {
        assert_eq!(get(&gateway, &other, &path).await.status, 404);
    }
    let path = format!("/v1/files/{id}");
    assert_eq!(
        gateway.ask(&other, "DELETE", &path, &[], &Value::Null).await.status,
        404
    );
    let deleted = gateway.ask(&key, "DELETE", &path, &[], &Value::Null).await;
    assert_eq!(deleted.json(), json!({"id": id, "object": "file", "deleted": true}));
    assert_eq!(get(&gateway, &key, &path).await.status, 404);
    // An empty one is a file too.
    let empty = upload(&gateway, &key, "empty", b"").await;
    let path = format!("/v1/files/{}/content", empty["id"].as_str().unwrap());
    assert_eq!(get(&gateway, &key, &path).await.body, b"");
}

#[tokio::test]
async fn lists_go_by_time_and_in_pages() {
    let (gateway, _) = TestGateway::with_accounts().await;
    let (_, _, key) = gateway.project_key(json!({}), json!({})).await;
    let mut ids = Vec::new();
    for n in 0..5 {
        ids.push(upload(&gateway, &key, &format!("{n}"), b"{}").await["id"].clone());
    }
    let list = async |query: &str| get(&gateway, &key, &format!("/v1/files?{query}")).await.json();
    let of = |page: &Value| -> Vec<Value> {
        page["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|file| file["id"].clone())
            .collect()
    };
    let newest: Vec<Value> = ids.iter().rev().cloned().collect();
    assert_eq!(of(&list("").await), newest);
    let page = list("limit=2").await;
    assert_eq!((of(&page), &page["has_more"]), (newest[..2].to_vec(), &json!(true)));
    let after = page["last_id"].as_str().unwrap();
    assert_eq!(of(&list(&format!("limit=2&after={after}")).await), newest[2..4]);
    let page = list("limit=5&order=asc&purpose=batch").await;
    assert_eq!((of(&page), &page["has_more"]), (ids, &json!(false)));
    assert_eq!(of(&list("purpose=fine-tune").await), [] as [Value; 0]);
    for wrong in ["limit=0", "limit=10001", "order=up", "odd=1"] {
        assert_eq!(
            get(&gateway, &key, &format!("/v1/files?{wrong}")).await.status,
            400,
            "{wrong}"
        );
    }
}

#[tokio::test]
async fn what_is_refused() {
    let config = GatewayConfig {
        api_key: Some(support::OPERATOR.into()),
        files: FilesConfig {
            file_bytes_max: 1000,
            project_files_max: 2,
            project_bytes_max: 1500,
            ..FilesConfig::default()
        },
        ..GatewayConfig::default()
    };
    let backend = std::sync::Arc::new(support::MockBackend::default());
    assert!(backend.store.set(std::sync::Arc::default()).is_ok());
    let gateway = TestGateway::over(config, backend).await;
    let (_, _, key) = gateway.project_key(json!({}), json!({})).await;
    let file: (&str, Option<&str>, &[u8]) = ("file", Some("f"), b"{}");
    let purpose: (&str, Option<&str>, &[u8]) = ("purpose", None, b"batch");
    let large = [b'x'; 1001];
    let text = [b'x'; 1025];
    for (parts, status, param) in [
        (vec![file], 400, "purpose"),
        (vec![purpose], 400, "file"),
        (vec![purpose, purpose, file], 400, "purpose"),
        (vec![purpose, file, file], 400, "file"),
        (vec![("purpose", None, b"vision".as_slice()), file], 400, "purpose"),
        (vec![("purpose", None, text.as_slice()), file], 400, "purpose"),
        (vec![("purpose", None, b"\xff".as_slice()), file], 400, "purpose"),
        (vec![purpose, file, ("odd", None, b"")], 400, "odd"),
        (
            vec![purpose, file, ("expires_after[seconds]", None, b"3600")],
            400,
            "expires_after[anchor]",
        ),
        (vec![purpose, ("file", Some("f"), large.as_slice())], 413, "file"),
    ] {
        let answer = post(&gateway, &key, &multipart(&parts)).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["param"]), (status, &json!(param)), "{error}");
    }
    let torn = multipart(&[purpose, file]);
    assert_eq!(post(&gateway, &key, &torn[..torn.len() - 20]).await.status, 400);
    let answer = gateway
        .ask(&key, "POST", "/v1/files", &[], &json!({"purpose": "batch"}))
        .await;
    assert_eq!(answer.status, 415);
    assert_eq!(gateway.request("POST", "/v1/files", &[], b"").await.status, 401);
    let (_, _, reader) = gateway.project_key(json!({}), json!({"scopes": ["usage"]})).await;
    assert_eq!(get(&gateway, &reader, "/v1/files").await.status, 403);
    // A project's room, by bytes and by number, and a disk's.
    upload(&gateway, &key, "a", &[b'x'; 900]).await;
    let body = multipart(&[purpose, ("file", Some("b"), &[b'x'; 700])]);
    assert_eq!(post(&gateway, &key, &body).await.status, 400);
    gateway.backend.chunks.full.store(true, Ordering::SeqCst);
    assert_eq!(post(&gateway, &key, &multipart(&[purpose, file])).await.status, 503);
    gateway.backend.chunks.full.store(false, Ordering::SeqCst);
    upload(&gateway, &key, "b", b"x").await;
    assert_eq!(post(&gateway, &key, &multipart(&[purpose, file])).await.status, 400);
    gateway.is_well_as(&key).await;
}
