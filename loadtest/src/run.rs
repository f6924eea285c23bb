//! Drives a run: starts clients or arrivals, collects outcomes, stops at the limit or when told to.

use crate::client::{Client, Completion, Failure};
use crate::options::{BenchOptions, Load};
use crate::progress::{Counts, Progress};
use crate::report::{Heading, Report};
use crate::schedule::{Arrivals, Planned, Workload};
use crate::tally::{Tally, Targets};
use crate::trace_prompts::CacheBound;
use crate::{BenchError, Target};
use bytes::Bytes;
use serde_json::json;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep_until};

/// Bodies of an open loop that are made and not yet sent, beyond those in flight: more than traces have arriving at once, and
/// some 10 MB of long prompts.
const BODIES_AHEAD: usize = 64;

/// Runs a benchmark to its end, or until `stop` resolves: then the report covers what there is.
pub async fn run(options: BenchOptions, stop: impl Future<Output = ()>) -> Result<Report, BenchError> {
    options.check()?;
    let target = Target::parse(&options.url)?;
    if target.tls {
        return Err(BenchError::Url {
            url: options.url.clone(),
            reason: "https is not measured, so that the server is and not its TLS; give its http:// address".into(),
        });
    }
    let client = Client::new(target, options.api_key.clone(), options.request_timeout);
    let model = match &options.model {
        Some(model) => model.clone(),
        None => client.first_model().await.map_err(|failure| BenchError::NoModel {
            url: options.url.clone(),
            reason: failure.message,
        })?,
    };
    let heading = Heading {
        url: options.url.clone(),
        model: model.clone(),
        load: describe(&options),
        seed: options.seed,
        hit_rate_bound: hit_rate_bound(&options),
    };
    let targets = Targets {
        ttft: options.ttft_target,
        tpot: options.tpot_target,
    };
    let shared = Arc::new(Shared {
        workload: Workload::new(&options),
        client,
        model,
        options,
        tally: Mutex::new(Tally::new(targets)),
        next: AtomicU64::new(0),
    });
    tokio::pin!(stop);

    for number in 0..shared.options.warmup as u64 {
        let body = shared.body(&shared.workload.warmup(number));
        tokio::select! {
            // A failing warm-up shows in the run itself.
            _ = shared.client.chat(body, Instant::now()) => {}
            () = &mut stop => return Ok(Report::new(heading, &Tally::default(), Duration::ZERO, true)),
        }
    }

    let total = shared.total();
    let mut progress = Progress::new(shared.options.progress, total);
    let started = Instant::now();
    let mut load = AbortOnDrop(tokio::spawn(drive(shared.clone(), started)));
    let mut ticks = interval(progress.interval());
    let interrupted = loop {
        tokio::select! {
            _ = &mut load.0 => break false,
            () = &mut stop => break true,
            _ = ticks.tick() => progress.show(shared.counts()),
        }
    };
    let elapsed = started.elapsed();
    let report = Report::new(heading, &shared.tally(), elapsed, interrupted);
    Ok(report)
}

/// Stops the load, and with it every request in flight, when the run ends early.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Shared {
    options: BenchOptions,
    client: Client,
    model: String,
    workload: Workload,
    tally: Mutex<Tally>,
    next: AtomicU64,
}

impl Shared {
    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn total(&self) -> Option<u64> {
        match (self.options.stop.requests, self.workload.len()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// The next request's number, unless the run is over.
    fn next(&self, now: Instant, started: Instant) -> Option<u64> {
        if self
            .options
            .stop
            .duration
            .is_some_and(|limit| now.duration_since(started) >= limit)
        {
            return None;
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        (self.total().is_none_or(|total| number < total)).then_some(number)
    }

    fn body(&self, planned: &Planned) -> Bytes {
        let system = planned
            .system
            .iter()
            .map(|text| json!({"role": "system", "content": text}));
        let user = json!({"role": "user", "content": planned.prompt});
        let messages: Vec<_> = system.chain([user]).collect();
        let mut body = json!({
            "model": self.model,
            "messages": messages,
            "max_tokens": planned.output_tokens,
            "temperature": self.options.temperature,
            "seed": planned.seed,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if self.options.ignore_eos {
            // Not part of OpenAI's API, so only sent when asked for.
            body["ignore_eos"] = json!(true);
        }
        body.to_string().into()
    }

    async fn send(&self, body: Bytes, intended: Instant) {
        self.tally().sent(Instant::now().saturating_duration_since(intended));
        let outcome: Result<Completion, Failure> = self.client.chat(body, intended).await;
        self.tally().ended(&outcome);
    }

    fn counts(&self) -> Counts {
        let tally = self.tally();
        let ended = tally.completed + tally.failed();
        Counts {
            ended,
            failed: tally.failed(),
            in_flight: tally.sent - ended,
            output_tokens: tally.output_tokens,
        }
    }
}

async fn drive(shared: Arc<Shared>, started: Instant) {
    match (&shared.options.load, Arrivals::new(&shared.options)) {
        (Load::Closed { concurrency }, _) => closed(&shared, *concurrency, started).await,
        (Load::Poisson { in_flight_max, .. } | Load::Replay { in_flight_max, .. }, Some(arrivals)) => {
            open(&shared, arrivals, *in_flight_max, started).await;
        }
        // Arrivals exist for every open loop.
        (_, None) => {}
    }
}

async fn closed(shared: &Arc<Shared>, concurrency: usize, started: Instant) {
    let mut clients = JoinSet::new();
    for _ in 0..concurrency {
        let shared = shared.clone();
        clients.spawn(async move {
            while let Some(number) = shared.next(Instant::now(), started) {
                let body = shared.body(&shared.workload.request(number));
                shared.send(body, Instant::now()).await;
            }
        });
    }
    while clients.join_next().await.is_some() {}
}

async fn open(shared: &Arc<Shared>, arrivals: Arrivals, in_flight_max: usize, started: Instant) {
    let slots = Arc::new(Semaphore::new(in_flight_max));
    let mut requests = JoinSet::new();
    // Made before their time comes, several ahead, so that making them delays none, not even those that arrive at once.
    let (made, mut bodies) = mpsc::channel(BODIES_AHEAD);
    let maker = shared.clone();
    let making = tokio::task::spawn_blocking(move || {
        for at in arrivals {
            let intended = started + at;
            let Some(number) = maker.next(intended, started) else {
                break;
            };
            let body = maker.body(&maker.workload.request(number));
            if made.blocking_send((intended, body)).is_err() {
                break;
            }
        }
    });
    while let Some((intended, body)) = bodies.recv().await {
        sleep_until(intended).await;
        let Ok(slot) = slots.clone().acquire_owned().await else {
            break;
        };
        let shared = shared.clone();
        requests.spawn(async move {
            shared.send(body, intended).await;
            drop(slot);
        });
        // Finished tasks leave the set, which therefore holds at most `in_flight_max` and a few.
        while requests.try_join_next().is_some() {}
    }
    // It has made all, or cannot give any more away.
    drop(bodies);
    let _ = making.await;
    while requests.join_next().await.is_some() {}
}

/// What an infinite cache would hit, where the prompts sent are those of the trace.
fn hit_rate_bound(options: &BenchOptions) -> Option<f64> {
    let Load::Replay {
        trace, length_scale, ..
    } = &options.load
    else {
        return None;
    };
    let lengths = &options.lengths;
    let as_recorded = *length_scale == 1.0 && lengths.words_per_token == 1.0 && options.stop.duration.is_none();
    let requests = options
        .stop
        .requests
        .map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
    let requests = requests.min(trace.requests.len());
    let whole = trace.requests[..requests]
        .iter()
        .all(|r| r.input_tokens as usize <= lengths.input_words_max);
    (as_recorded && whole).then(|| CacheBound::of(trace, requests, options.block_size).rate())
}

fn describe(options: &BenchOptions) -> String {
    let limit = match (options.stop.requests, options.stop.duration) {
        (Some(requests), Some(time)) => format!("{requests} requests or {} s", time.as_secs_f64()),
        (Some(requests), None) => format!("{requests} requests"),
        (None, Some(time)) => format!("{} s", time.as_secs_f64()),
        (None, None) => "to its end".into(),
    };
    match &options.load {
        Load::Closed { concurrency } => format!("closed loop, {concurrency} clients, {limit}"),
        Load::Poisson { rate, .. } => format!("Poisson open loop, {rate} requests/s, {limit}"),
        Load::Replay {
            speed, length_scale, ..
        } => format!("trace replay, speed {speed}, lengths x {length_scale}, {limit}"),
    }
}
