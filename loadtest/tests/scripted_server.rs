//! Runs the load generator against a server that follows a script, so that every number of the report is known.

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use baton_loadtest::{BenchError, BenchOptions, Load, Report, Stop, Trace, run};
use futures_util::stream::{self, StreamExt};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

type Answer = Arc<dyn Fn(usize, &Value) -> Response + Send + Sync>;

#[derive(Clone)]
struct Script {
    answer: Answer,
    seen: Arc<Mutex<Vec<Value>>>,
    in_flight: Arc<AtomicUsize>,
    in_flight_max: Arc<AtomicUsize>,
}

struct Server {
    url: String,
    script: Script,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start(answer: impl Fn(usize, &Value) -> Response + Send + Sync + 'static) -> Self {
        let script = Script {
            answer: Arc::new(answer),
            seen: Arc::default(),
            in_flight: Arc::default(),
            in_flight_max: Arc::default(),
        };
        let app = Router::new()
            .route("/v1/chat/completions", post(chat))
            .route(
                "/v1/models",
                get(|| async { axum::Json(json!({"data": [{"id": "scripted"}]})) }),
            )
            .with_state(script.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a loopback port");
        let url = format!("http://{}/v1", listener.local_addr().expect("it is bound"));
        let task = tokio::spawn(async move { axum::serve(listener, app).await.expect("serves until aborted") });
        Self { url, script, task }
    }

    fn options(&self) -> BenchOptions {
        BenchOptions {
            lengths: baton_loadtest::Lengths {
                input_words: 12,
                output_tokens: 5,
                ..Default::default()
            },
            request_timeout: Duration::from_secs(20),
            ..BenchOptions::new(&self.url)
        }
    }

    fn seen(&self) -> Vec<Value> {
        self.script.seen.lock().expect("no test thread panics with it").clone()
    }
}

async fn chat(State(script): State<Script>, body: Bytes) -> Response {
    let request: Value = serde_json::from_slice(&body).expect("the generator sends JSON");
    let number = {
        let mut seen = script.seen.lock().expect("no test thread panics with it");
        seen.push(request.clone());
        seen.len() - 1
    };
    let now = script.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
    script.in_flight_max.fetch_max(now, Ordering::SeqCst);
    let guard = InFlight(script.in_flight.clone());
    let response = (script.answer)(number, &request);
    let (parts, body) = response.into_parts();
    let body = body.into_data_stream().map(move |piece| {
        let _held_to_the_end = &guard;
        piece
    });
    Response::from_parts(parts, Body::from_stream(body))
}

struct InFlight(Arc<AtomicUsize>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn pieces(parts: Vec<Vec<u8>>, pause: Duration) -> Response {
    let body = stream::iter(parts).then(move |piece| async move {
        tokio::time::sleep(pause).await;
        Ok::<_, std::io::Error>(Bytes::from(piece))
    });
    ([("content-type", "text/event-stream")], Body::from_stream(body)).into_response()
}

/// A well-behaved answer of `tokens` chunks, cut into pieces that do not respect events.
fn answer(tokens: u64, usage: bool, pause: Duration) -> Response {
    let mut text = String::from(
        ": hello\n\ndata: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
    );
    for i in 0..tokens {
        text += &format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"w{i} \"}}}}]}}\r\n\r\n");
    }
    text += "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"length\"}]}\n\n";
    if usage {
        let usage = json!({"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": tokens * 2,
            "prompt_tokens_details": {"cached_tokens": 16}}});
        text += &format!("data: {usage}\n\n");
    }
    text += "data: [DONE]\n\n";
    pieces(text.as_bytes().chunks(37).map(<[u8]>::to_vec).collect(), pause)
}

async fn bench(options: BenchOptions) -> Report {
    run(options, std::future::pending())
        .await
        .expect("the options are valid")
}

#[tokio::test]
async fn closed_loop_counts_everything() {
    let server =
        Server::start(|_, request| answer(request["max_tokens"].as_u64().unwrap_or(0), true, Duration::ZERO)).await;
    let report = bench(BenchOptions {
        load: Load::Closed { concurrency: 4 },
        stop: Stop {
            requests: Some(40),
            duration: None,
        },
        warmup: 2,
        ignore_eos: true,
        ..server.options()
    })
    .await;
    assert_eq!(
        (report.requests_sent, report.requests_completed, report.requests_failed),
        (40, 40, 0)
    );
    assert_eq!(
        (report.input_tokens, report.cached_tokens, report.output_tokens),
        (800, 640, 400),
        "usage wins over chunks"
    );
    assert_eq!(
        (report.ttft_ms.count, report.e2e_ms.count, report.itl_ms.count),
        (40, 40, 160)
    );
    assert!(report.ttft_ms.max <= report.e2e_ms.max);
    assert_eq!(report.model, "scripted", "the server was asked for its model");
    assert!(server.script.in_flight_max.load(Ordering::SeqCst) <= 4);
    let seen = server.seen();
    assert_eq!(seen.len(), 42, "two warm-ups, not counted");
    for request in &seen {
        assert_eq!(request["stream"], true);
        assert_eq!(request["ignore_eos"], true);
        assert_eq!(request["stream_options"]["include_usage"], true);
        let prompt = request["messages"][0]["content"].as_str().expect("a prompt");
        assert_eq!(prompt.split(' ').count(), 12);
    }
}

#[tokio::test]
async fn chunks_are_counted_without_usage() {
    let server = Server::start(|_, _| answer(5, false, Duration::ZERO)).await;
    let report = bench(server.options()).await;
    assert_eq!((report.output_tokens, report.answers_without_usage), (5, 1));
    assert!(server.seen()[0].get("ignore_eos").is_none(), "only sent when asked for");
    assert!(report.to_string().contains("their chunks were counted"));
}

#[tokio::test]
async fn failures_are_told_apart() {
    let server = Server::start(|number, _| match number {
        0 => (
            StatusCode::TOO_MANY_REQUESTS,
            axum::Json(json!({"error": {"message": "try later"}})),
        )
            .into_response(),
        1 => pieces(
            vec![b"data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n".to_vec()],
            Duration::ZERO,
        ),
        2 => pieces(
            vec![b"data: {\"error\":{\"message\":\"lost\"}}\n\n".to_vec()],
            Duration::ZERO,
        ),
        3 => pieces(vec![b"data: not json\n\n".to_vec()], Duration::ZERO),
        _ => answer(3, true, Duration::ZERO),
    })
    .await;
    let report = bench(BenchOptions {
        stop: Stop {
            requests: Some(6),
            duration: None,
        },
        ..server.options()
    })
    .await;
    assert_eq!((report.requests_completed, report.requests_failed), (2, 4));
    let kinds: Vec<_> = report.errors.iter().map(|e| (e.kind.as_str(), e.count)).collect();
    assert_eq!(
        kinds,
        [("http_429", 1), ("cut", 1), ("stream_error", 1), ("malformed", 1)]
    );
    assert_eq!(report.errors[0].example, "try later");
    let json = serde_json::to_value(&report).expect("a report is JSON");
    assert_eq!(json["requests_failed"], 4);
}

#[tokio::test]
async fn nobody_listening_is_a_connect_error() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a loopback port");
    let url = format!("http://{}", listener.local_addr().expect("it is bound"));
    drop(listener);
    let report = bench(BenchOptions {
        model: Some("m".into()),
        ..BenchOptions::new(&url)
    })
    .await;
    assert_eq!((report.requests_failed, report.errors[0].kind.as_str()), (1, "connect"));
    let refused = run(BenchOptions::new(&url), std::future::pending()).await;
    assert!(matches!(refused, Err(BenchError::NoModel { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_slow_answer_times_out() {
    let server = Server::start(|_, _| answer(5, true, Duration::from_secs(60))).await;
    let report = bench(BenchOptions {
        request_timeout: Duration::from_millis(50),
        model: Some("m".into()),
        ..server.options()
    })
    .await;
    assert_eq!(report.errors[0].kind, "timeout");
}

/// One slot and a server that needs a while: later requests wait, and the wait is in their latency.
#[tokio::test]
async fn open_loop_latency_counts_from_the_intended_time() {
    let server = Server::start(|_, _| answer(1, true, Duration::from_millis(10))).await;
    let report = bench(BenchOptions {
        load: Load::Poisson {
            rate: 10_000.0,
            in_flight_max: 1,
        },
        stop: Stop {
            requests: Some(10),
            duration: None,
        },
        ..server.options()
    })
    .await;
    assert_eq!(report.requests_completed, 10);
    assert_eq!(server.script.in_flight_max.load(Ordering::SeqCst), 1);
    // Each answer takes at least 80 ms (it is cut into more than eight pieces), one after the other, and all
    // should have been sent at once.
    assert!(
        report.e2e_ms.max >= 10.0 * 80.0,
        "the last waited for nine others: {}",
        report.e2e_ms.max
    );
    assert!(report.send_delay_ms.max >= 9.0 * 80.0);
}

#[tokio::test]
async fn a_trace_is_replayed_with_its_lengths() {
    let server =
        Server::start(|_, request| answer(request["max_tokens"].as_u64().unwrap_or(0), false, Duration::ZERO)).await;
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("trace.csv");
    std::fs::write(
        &path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.0,8,3\n2023-11-16 18:15:56.0,6,2\n",
    )
    .expect("writable");
    let report = bench(BenchOptions {
        load: Load::Replay {
            trace: Trace::load(&path).expect("well formed"),
            speed: 1000.0,
            length_scale: 1.0,
            in_flight_max: 8,
        },
        stop: Stop::default(),
        ..server.options()
    })
    .await;
    assert_eq!((report.requests_completed, report.output_tokens), (2, 5));
    let words: Vec<_> = server
        .seen()
        .iter()
        .map(|r| {
            r["messages"][0]["content"]
                .as_str()
                .unwrap_or_default()
                .split(' ')
                .count()
        })
        .collect();
    assert_eq!(words, [8, 6]);
}

#[tokio::test]
async fn an_interrupt_reports_what_there_is() {
    let server = Server::start(|number, _| match number {
        0..3 => answer(2, true, Duration::ZERO),
        _ => answer(2, true, Duration::from_secs(60)),
    })
    .await;
    let script = server.script.clone();
    let stop = async move {
        while script.seen.lock().expect("no test thread panics with it").len() < 4 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let options = BenchOptions {
        stop: Stop {
            requests: Some(1000),
            duration: None,
        },
        ..server.options()
    };
    let report = run(options, stop).await.expect("the options are valid");
    assert!(report.interrupted);
    assert_eq!((report.requests_completed, report.requests_unfinished), (3, 1));
    // Its connection is closed, so the server is not left working.
    while server.script.in_flight.load(Ordering::SeqCst) > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_duration_ends_the_run() {
    let server = Server::start(|_, _| answer(2, true, Duration::ZERO)).await;
    let report = bench(BenchOptions {
        load: Load::Closed { concurrency: 2 },
        stop: Stop {
            requests: None,
            duration: Some(Duration::from_millis(200)),
        },
        ..server.options()
    })
    .await;
    assert!(report.requests_completed > 0 && report.requests_unfinished == 0);
}

#[tokio::test]
async fn options_out_of_range_name_their_flag() {
    let flag = |options: BenchOptions| async move {
        match run(options, std::future::pending()).await {
            Err(BenchError::Option { option, .. }) => option,
            other => panic!("{other:?}"),
        }
    };
    let base = || BenchOptions::new("http://127.0.0.1:1");
    let load = |load| BenchOptions { load, ..base() };
    assert_eq!(flag(load(Load::Closed { concurrency: 0 })).await, "--concurrency");
    let poisson = |rate| Load::Poisson { rate, in_flight_max: 1 };
    assert_eq!(flag(load(poisson(f64::NAN))).await, "--rate");
    assert_eq!(flag(load(poisson(-1.0))).await, "--rate");
    let mut endless = base();
    endless.stop = Stop::default();
    assert_eq!(flag(endless).await, "--requests");
    let mut prefix = base();
    prefix.lengths.shared_prefix_words = 10_000;
    assert_eq!(flag(prefix).await, "--shared-prefix-words");
}
