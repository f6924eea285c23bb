//! Random and mutated requests to every route: whatever comes, the answer is no 5xx, is in OpenAI's shape, and tells nothing
//! of the inside. Every case is derived from a printed seed. `BATON_FUZZ_CASES` sets how many (600 by default),
//! `BATON_FUZZ_SEED` where they start.

mod support;

use std::sync::Arc;

use baton_gateway::GatewayConfig;
use serde_json::{Value, json};
use support::{MockBackend, OPERATOR, TestGateway, hi, route_list};

/// SplitMix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// What no field should be.
fn odd(random: &mut Random) -> Value {
    let odd = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1_000_000),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e308),
        json!(-0.0),
        json!(1e-320),
        json!(""),
        json!("\u{0}\u{ffff}\u{202e}"),
        json!("x".repeat(5000)),
        json!([]),
        json!({}),
        json!([[[[[[[[[[]]]]]]]]]]),
        json!({"a": {"b": {"c": [1, null, "x"]}}}),
        json!(["", "", "", "", "", "", "", ""]),
        json!("<|im_start|>system\n<|im_end|>"),
        json!("{{ ''.__class__ }}{% for i in range(1000000000) %}x{% endfor %}"),
        json!("../../../../etc/passwd"),
        json!("a\r\nx-injected: 1"),
    ];
    random.pick(&odd).clone()
}

/// Bodies that some route takes.
fn valid() -> Vec<Value> {
    vec![
        hi(json!({"max_tokens": 3})),
        hi(
            json!({"stream": true, "stream_options": {"include_usage": true}, "stop": ["x"], "temperature": 0.5, "n": 1}),
        ),
        hi(
            json!({"seed": 7, "top_p": 0.9, "top_k": 4, "user": "u", "priority": 1, "logit_bias": {"1": 1.0}, "logprobs": true}),
        ),
        hi(
            json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "tool_choice": "auto"}),
        ),
        hi(
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}}),
        ),
        json!({"model": "m", "prompt": "hi", "max_tokens": 3}),
        json!({"model": "m", "input": "hi"}),
        json!({"name": "p", "limits": {"requests_per_minute": 5}}),
        json!({"deadline_ms": 1000}),
        json!({"id": 4, "name": "c", "cluster_addr": "127.0.0.1:1", "api_url": "http://127.0.0.1:1"}),
        json!({"model": "m", "input_per_million": "1.5", "output_per_million": "2", "currency": "usd"}),
        json!({}),
    ]
}

fn mutate(value: &mut Value, random: &mut Random) {
    match value {
        Value::Object(object) if !object.is_empty() && random.below(4) != 0 => {
            let at = random.below(object.len());
            let key = object.keys().nth(at).cloned().unwrap();
            match random.below(6) {
                0 => {
                    object.remove(&key);
                }
                1 => {
                    let moved = object.remove(&key).unwrap();
                    object.insert(format!("{key}\u{0}"), moved);
                }
                2 => {
                    object.insert(key, odd(random));
                }
                _ => mutate(&mut object[&key], random),
            }
        }
        Value::Array(array) if !array.is_empty() && random.below(4) != 0 => {
            let at = random.below(array.len());
            match random.below(4) {
                0 => {
                    array.remove(at);
                }
                1 => {
                    let one = array[at].clone();
                    array.extend(std::iter::repeat_n(one, random.next() as usize % 3000));
                }
                _ => mutate(&mut array[at], random),
            }
        }
        other => *other = odd(random),
    }
}

/// A body: mutated JSON, then perhaps mutated bytes.
fn body(random: &mut Random) -> Vec<u8> {
    if random.below(8) == 0 {
        return (0..random.below(300)).map(|_| random.next() as u8).collect();
    }
    let mut value = random.pick(&valid()).clone();
    for _ in 0..random.below(4) {
        mutate(&mut value, random);
    }
    let mut bytes = value.to_string().into_bytes();
    for _ in 0..[0, 0, 0, 1, 3][random.below(5)] {
        let at = random.below(bytes.len());
        match random.below(4) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.next() as u8),
            2 => bytes.extend_from_within(at..),
            _ if bytes.is_empty() => {}
            _ => bytes[at] = random.next() as u8,
        }
    }
    bytes
}

/// A path of the route, its parameters filled, with a query perhaps.
fn path(route: &str, random: &mut Random) -> String {
    let mut path = String::new();
    for (at, segment) in route.split('/').enumerate() {
        if at > 0 {
            path.push('/');
        }
        if segment.starts_with('{') {
            let fills = [
                "m",
                "proj_1",
                "..",
                "%2e%2e%2f",
                "%00",
                "%ff%fe",
                "a%0d%0ab",
                "decode-0",
                "%7B%7B7*7%7D%7D",
                "-1",
                "x",
            ];
            path.push_str(fills[random.below(fills.len())]);
        } else {
            path.push_str(segment);
        }
    }
    let queries = [
        "",
        "",
        "?limit=-1",
        "?limit=99999999999999999999",
        "?after=%00",
        "?start_time=NaN&end_time=-1",
        "?start_time=1",
        "?group_by[]=model&group_by[]=x",
        "?%ff=%ff",
        "?a&&=&b",
        "?bucket_width=1s&start_time=0&limit=1000000",
    ];
    path + queries[random.below(queries.len())]
}

const HEADERS: [(&str, &str); 14] = [
    ("x-request-id", "a b"),
    ("x-request-id", "\t\u{e9}"),
    ("traceparent", "00-zz-zz-zz"),
    (
        "traceparent",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-extra",
    ),
    ("idempotency-key", "\u{e9}"),
    ("idempotency-key", "k"),
    ("last-event-id", "a\tb:7"),
    ("last-event-id", "chatcmpl-0:-1"),
    ("x-stream-resume", "true"),
    ("x-baton-ttft-target-ms", "NaN"),
    ("accept-encoding", "gzip;q=-1"),
    ("expect", "100-continue"),
    ("range", "bytes=0-18446744073709551615"),
    ("content-type", "text/plain"),
];

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_comes_makes_a_5xx() {
    let backend = Arc::new(MockBackend::default());
    assert!(backend.store.set(Arc::default()).is_ok());
    let config = GatewayConfig {
        api_key: Some(OPERATOR.into()),
        ..GatewayConfig::default()
    };
    let gateway = TestGateway::over(config, backend).await;
    // The scripted cluster has no state to save, so its backup breaks off.
    let routes = route_list::routes()
        .into_iter()
        .filter(|route| route != "/cluster/snapshot");
    let routes: Vec<String> = routes.collect();
    let bearer = format!("Bearer {OPERATOR}");
    let first = setting("BATON_FUZZ_SEED", 1);
    let mut unread = 0;
    for seed in first..first + setting("BATON_FUZZ_CASES", 600) {
        let random = &mut Random(seed);
        let route = random.pick(&routes).clone();
        let (path, body) = (path(&route, random), body(random));
        let method = *random.pick(&["GET", "POST", "POST", "POST", "DELETE", "PUT", "PATCH"]);
        let mut headers = vec![("authorization", bearer.as_str())];
        if random.below(8) != 0 {
            headers.push(("content-type", "application/json"));
        }
        if random.below(3) == 0 {
            headers.push(*random.pick(&HEADERS));
        }
        headers.push(("connection", "close"));
        let mut connection = gateway.connect().await;
        connection.send(method, &path, &headers, &body).await;
        let answer = match connection.try_answer().await {
            Some(answer) if answer.status == 100 => connection.try_answer().await,
            answer => answer,
        };
        let Some(answer) = answer else {
            // Refused before the body was read: the system may drop the answer with what was still on its way.
            assert!(
                body.len() > 2048,
                "BATON_FUZZ_SEED={seed} {method} {path} {headers:?}: no answer"
            );
            unread += 1;
            continue;
        };
        let shown = format!(
            "BATON_FUZZ_SEED={seed} {method} {path} {headers:?} {} -> {} {}",
            String::from_utf8_lossy(&body[..body.len().min(400)]),
            answer.status,
            answer.text().chars().take(400).collect::<String>()
        );
        let unavailable_here = route.starts_with("/cluster/") && answer.status == 503;
        assert!(answer.status < 500 || unavailable_here, "{shown}");
        assert!(answer.header("x-injected").is_none(), "{shown}");
        if answer.status >= 400 {
            // Each API has its own shape of errors.
            let error = match route.as_str() {
                kserve if kserve.starts_with("/v2") => json!({"message": answer.json()["error"]}),
                anthropic if anthropic.starts_with("/v1/messages") => answer.json()["error"].clone(),
                _ => answer.error(),
            };
            let message = error["message"]
                .as_str()
                .unwrap_or_else(|| panic!("no message: {shown}"));
            for inside in [
                "panicked",
                ".rs:",
                "/root",
                "/home",
                "/tmp",
                "127.0.0.1",
                "called `",
                "thread '",
            ] {
                // What the client sent itself may come back to it.
                let echoed = path.contains(inside) || String::from_utf8_lossy(&body).contains(inside);
                assert!(!message.contains(inside) || echoed, "{inside}: {shown}");
            }
        }
    }
    assert!(!gateway.task.is_finished());
    assert!(
        unread < setting("BATON_FUZZ_CASES", 600) / 4,
        "{unread} without an answer"
    );
    gateway.ask(OPERATOR, "POST", support::CHAT, &[], &hi(json!({}))).await;
}

#[tokio::test]
async fn every_route_wants_a_key() {
    let backend = Arc::new(MockBackend::default());
    assert!(backend.store.set(Arc::default()).is_ok());
    let config = GatewayConfig {
        api_key: Some(OPERATOR.into()),
        ..GatewayConfig::default()
    };
    let gateway = TestGateway::over(config, backend).await;
    let mut wire = gateway.connect().await;
    let random = &mut Random(0);
    for route in route_list::routes() {
        for method in ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
            for headers in [&[][..], &[("authorization", "Bearer sk-operator-0123456788")][..]] {
                let path = path(&route, random);
                wire.send(method, &path, headers, b"").await;
                let answer = wire.answer().await;
                match route.as_str() {
                    "/health" | "/ready" | "/ping" | "/v2/health/live" | "/v2/health/ready" => {
                        assert_ne!(answer.status, 401)
                    }
                    _ => assert_eq!(answer.status, 401, "{method} {path}"),
                }
            }
        }
    }
}
