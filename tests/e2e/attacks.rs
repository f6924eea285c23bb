//! The attack suite: everything at once against a running server, while somebody else is served.
//!
//! `cargo test --test e2e attacks` is the short one of the gate. With `BATON_ATTACK_SECONDS=60` it attacks for so long and
//! prints how long usual requests took with and without the attack, and what a wrong key's time says of it; with
//! `BATON_ATTACK_CONNECTIONS=3900` it opens so many idle connections, as far as the limit on open files allows.
//!
//! New bombs (grammars, schemas, patterns) go into [`bombs`].

use super::support::cluster::Cluster;
use super::support::eventually;
use super::support::http::{chat, chat_body, get, post, request_with};
use hyper::Method;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Memory the coordinator may grow by under all of it: bodies have 256 MiB together, parsing and 1500 connections the rest.
const GROWTH_BYTES_MAX: u64 = 768 << 20;

/// Idle connections at most: the server has 4096 places, and loopback, from where all of this comes, may take every one.
const IDLE_MAX: u64 = 3_900;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// Bodies for the chat route, each to be refused or answered, and cheap either way.
fn bombs() -> Vec<(&'static str, Vec<u8>)> {
    let hello = |extra: Value| chat_body("hello", extra).to_string().into_bytes();
    let raw =
        |messages: &str| format!("{{\"model\":\"baton-demo\",\"max_tokens\":1,\"messages\":{messages}}}").into_bytes();
    vec![
        ("deep arrays", raw(&"[".repeat(1_000_000))),
        ("deep objects", raw(&"{\"a\":".repeat(500_000))),
        ("many numbers", raw(&format!("[{}0]", "0,".repeat(1_900_000)))),
        ("many objects", raw(&format!("[{}0]", "{\"\":0},".repeat(500_000)))),
        ("a long number", raw(&"9".repeat(3_000_000))),
        (
            "a long string",
            hello(json!({"messages": [{"role": "user", "content": "x".repeat(3 << 20)}]})),
        ),
        (
            "escapes",
            raw(&format!(
                "[{{\"role\":\"user\",\"content\":\"{}\"}}]",
                "\\u0041".repeat(500_000)
            )),
        ),
        ("too large", vec![b' '; 5 << 20]),
        ("n of a million", hello(json!({"n": 1_000_000}))),
        (
            "numbers out of range",
            hello(json!({"max_tokens": 1e300, "temperature": -1e300, "seed": 1e300})),
        ),
        (
            "top_logprobs",
            hello(json!({"logprobs": true, "top_logprobs": 1_000_000_000})),
        ),
        ("many stops", hello(json!({"stop": vec!["x"; 100_000]}))),
        (
            "many messages",
            hello(json!({"messages": vec![json!({"role": "user", "content": "x"}); 50_000]})),
        ),
        (
            "a template in a message",
            hello(json!({"max_tokens": 1, "messages": [{"role": "user",
                "content": "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}"}]})),
        ),
        (
            "a template as a field",
            hello(json!({"chat_template": "{{ range(10**12) | list }}"})),
        ),
        (
            "a file to fetch",
            hello(json!({"messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}]})),
        ),
        ("lone surrogate", raw(r#"[{"role":"user","content":"\ud800"}]"#)),
        (
            "not UTF-8",
            [b"{\"model\":\"".as_slice(), &[0xff; 1000], b"\"}"].concat(),
        ),
        ("NaN", raw("NaN")),
    ]
}

struct Attack {
    address: String,
    over: AtomicBool,
    done: AtomicU64,
}

impl Attack {
    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }

    /// Connects and sends, over and over; each connection held until the server closes it or for `hold`.
    async fn repeat(self: Arc<Self>, bytes: Vec<u8>, drip: bool, hold: Duration) {
        while self.goes_on() {
            let Ok(mut stream) = TcpStream::connect(&self.address).await else {
                continue;
            };
            let until = Instant::now() + hold;
            let mut sink = [0u8; 4096];
            let mut left = bytes.as_slice();
            while Instant::now() < until && self.goes_on() {
                let (now, later) = left.split_at(if drip { left.len().min(1) } else { left.len() });
                left = later;
                if stream.write_all(now).await.is_err() {
                    break;
                }
                // Slow readers of whatever comes, so that resets and floods do not end in our own buffers.
                let read = tokio::time::timeout(Duration::from_millis(20), stream.read(&mut sink)).await;
                if matches!(read, Ok(Ok(0) | Err(_))) {
                    break;
                }
            }
            self.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn bombard(self: Arc<Self>, url: String) {
        while self.goes_on() {
            for (what, body) in bombs() {
                let answer = post(&url, "/v1/chat/completions", body).await;
                assert!(answer.status.as_u16() < 500, "{what}: {answer:?}");
                self.done.fetch_add(1, Ordering::Relaxed);
                if !self.goes_on() {
                    return;
                }
            }
        }
    }
}

/// Streams opened and taken back at once, 64 at a time.
fn rapid_reset() -> Vec<u8> {
    let frame = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes()[..], payload].concat()
    };
    // GET, http, /, all from the static table of HPACK.
    let get = [0x82, 0x86, 0x84, 0x01, 0x01, b'h'];
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    for stream in (1..4096).step_by(2) {
        bytes.extend(frame(1, 5, stream, &get));
        bytes.extend(frame(3, 0, stream, &8u32.to_be_bytes()));
    }
    bytes
}

/// How long usual requests take, one after the other, for so long.
async fn usual(url: &str, time: Duration) -> Vec<Duration> {
    let (began, mut took) = (Instant::now(), Vec::new());
    let body = chat_body("hello", json!({"max_tokens": 4, "ignore_eos": true}));
    while began.elapsed() < time {
        let sent = Instant::now();
        chat(url, &body).await;
        took.push(sent.elapsed());
    }
    took.sort();
    took
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}

fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("Linux");
    let kib: u64 = line
        .split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse().ok())
        .expect("a number");
    kib << 10
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attacks_harm_nobody_else() {
    let time = Duration::from_secs(setting("BATON_ATTACK_SECONDS", 4));
    let idle_wanted = setting("BATON_ATTACK_CONNECTIONS", 1_500).min(IDLE_MAX);
    let cluster = Cluster::start_mock(&["--workers", "2"]).await;
    let url = cluster.url.clone();
    let pid = cluster.pid("coordinator-0");
    chat(&url, &chat_body("hello", json!({"max_tokens": 4}))).await;
    let before = usual(&url, time / 4).await;
    let resident = resident_bytes(pid);

    let address = url.strip_prefix("http://").expect("http").to_owned();
    let mut idle = Vec::new();
    for _ in 0..idle_wanted {
        match TcpStream::connect(&address).await {
            Ok(stream) => idle.push(stream),
            Err(error) => {
                eprintln!(
                    "only {} idle connections: {error}; raise the limit on open files",
                    idle.len()
                );
                break;
            }
        }
    }
    let attack = Arc::new(Attack {
        address,
        over: AtomicBool::new(false),
        done: AtomicU64::new(0),
    });
    let mut attackers = JoinSet::new();
    let post_head = "POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n";
    let stream = chat_body("hello", json!({"stream": true, "max_tokens": 2000, "ignore_eos": true})).to_string();
    let unread = format!("{post_head}content-length: {}\r\n\r\n{stream}", stream.len());
    let injected = "GET /v1/models HTTP/1.1\r\nhost: t\r\nx-request-id: a\rx: b\r\ntraceparent: \0\r\n\r\n";
    let hold = Duration::from_secs(60);
    for (bytes, drip, hold) in [
        (
            b"GET / HTTP/1.1\r\nx-slow: xxxxxxxxxxxxxxxxxxxxxxxxxxxx".to_vec(),
            true,
            hold,
        ),
        (
            format!("{post_head}content-length: 99\r\n\r\n{}", " ".repeat(90)).into_bytes(),
            true,
            hold,
        ),
        (
            format!("{post_head}transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n").into_bytes(),
            false,
            hold,
        ),
        (
            format!(
                "{post_head}transfer-encoding: chunked\r\n\r\n{}",
                "1\r\n \r\n".repeat(10_000)
            )
            .into_bytes(),
            false,
            hold,
        ),
        (unread.into_bytes(), false, Duration::from_millis(100)),
        (injected.as_bytes().to_vec(), false, hold),
        (rapid_reset(), false, Duration::from_millis(200)),
        (vec![0xff; 100_000], false, hold),
    ] {
        attackers.spawn(attack.clone().repeat(bytes, drip, hold));
    }
    attackers.spawn(attack.clone().bombard(url.clone()));
    let during = usual(&url, time).await;
    attack.over.store(true, Ordering::Relaxed);
    let grown = resident_bytes(pid).saturating_sub(resident);
    while let Some(ended) = attackers.join_next().await {
        ended.expect("no attack was answered with a 5xx");
    }
    println!(
        "{} attacks, {} idle connections, {} MiB more memory; usual requests p50/p99: {:?}/{:?} before ({}), {:?}/{:?} during ({})",
        attack.done.load(Ordering::Relaxed),
        idle.len(),
        grown >> 20,
        percentile(&before, 50),
        percentile(&before, 99),
        before.len(),
        percentile(&during, 50),
        percentile(&during, 99),
        during.len()
    );
    assert!(!during.is_empty() && attack.done.load(Ordering::Relaxed) > 10);
    assert!(grown < GROWTH_BYTES_MAX, "{} MiB more", grown >> 20);
    assert_eq!(cluster.pid("coordinator-0"), pid, "it did not start anew");
    drop(idle);
    eventually("all connections are gone", Duration::from_secs(30), || async {
        let metrics = String::from_utf8_lossy(&get(&url, "/metrics").await.body).into_owned();
        let open = metrics
            .lines()
            .find(|line| line.contains("connections") && !line.starts_with('#'));
        let open = open.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        (open? < 50.0).then_some(())
    })
    .await;
    chat(&url, &chat_body("hello", json!({"max_tokens": 4}))).await;
    assert!(cluster.stop().await.success());
}

/// What the time of a refusal says of a key: printed when asked for, because clocks prove nothing in a gate.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn timing_of_key_checks() {
    if std::env::var_os("BATON_ATTACK_SECONDS").is_none() {
        eprintln!("skipped: set BATON_ATTACK_SECONDS to measure");
        return;
    }
    let key = "sk-0123456789abcdef0123456789abcdef";
    let cluster = Cluster::start(&["--prefill", "0", "--api-key", key]).await;
    let wrong_last = format!("{}0", &key[..key.len() - 1]);
    let mut times: [Vec<Duration>; 2] = Default::default();
    for round in 0..4_000 {
        let which = round % 2;
        let bearer = format!(
            "Bearer {}",
            if which == 0 {
                &wrong_last
            } else {
                "xx-0123456789abcdef0123456789abcdef"
            }
        );
        let sent = Instant::now();
        let answer = request_with(
            Method::GET,
            &cluster.url,
            "/v1/models",
            &[("authorization", &bearer)],
            "",
        )
        .await;
        times[which].push(sent.elapsed());
        assert_eq!(answer.status, 401);
    }
    for (name, times) in ["all but the last character right", "all wrong"].iter().zip(&mut times) {
        times.sort();
        println!(
            "{name}: p50 {:?}, p90 {:?}",
            percentile(times, 50),
            percentile(times, 90)
        );
    }
    assert!(cluster.stop().await.success());
}
