//! What `/metrics` shows, under vLLM's names and meanings where it has them, prefixed `baton:`. Counts requests as this
//! gateway saw them; the cluster's gauges are read from the backend when scraped.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::backend::{ClusterSnapshot, WorkerState};
use crate::tier_metrics::TierMetrics;

/// `model_name`, as vLLM labels.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabel {
    model_name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FinishLabel {
    model_name: String,
    finished_reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HttpLabel {
    route: String,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerLabel {
    model_name: String,
    role: String,
    state: String,
}

/// Bucket bounds in seconds.
#[derive(Clone, Copy)]
struct Buckets(&'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

const TTFT_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Fine where a front end's own time lies; the upper end is a wait for admission.
const OUTSIDE_S: &[f64] = &[
    0.0001, 0.00015, 0.0002, 0.00025, 0.0003, 0.00035, 0.0004, 0.00045, 0.0005, 0.0006, 0.0007, 0.0008, 0.0009, 0.001,
    0.0015, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0,
];
const ITL_S: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
];
const E2E_S: &[f64] = &[
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0,
];

type ByModel<M> = Family<ModelLabel, M>;
type HistogramByModel = Family<ModelLabel, Histogram, Buckets>;

/// All metrics of one gateway.
pub(crate) struct Metrics {
    registry: Registry,
    running: ByModel<Gauge>,
    waiting: ByModel<Gauge>,
    kv_usage: Family<ModelLabel, Gauge<f64, AtomicU64>>,
    workers: Family<WorkerLabel, Gauge>,
    preemptions: ByModel<Gauge>,
    tiers: TierMetrics,
    ttft: HistogramByModel,
    outside: HistogramByModel,
    itl: HistogramByModel,
    e2e: HistogramByModel,
    prompt_tokens: ByModel<Counter>,
    generation_tokens: ByModel<Counter>,
    prefix_queries: ByModel<Counter>,
    prefix_hits: ByModel<Counter>,
    success: Family<FinishLabel, Counter>,
    http_responses: Family<HttpLabel, Counter>,
    /// Chat requests in work in this gateway.
    pub in_flight: Gauge,
    /// Open HTTP connections.
    pub connections: Gauge,
    /// Usage records that could not be settled.
    pub settle_failures: Counter,
}

impl Metrics {
    /// `registry` may hold others' metrics already.
    pub fn new(mut registry: Registry) -> Self {
        let mut this = Self {
            tiers: TierMetrics::new(&mut registry),
            registry,
            running: Family::default(),
            waiting: Family::default(),
            kv_usage: Family::default(),
            workers: Family::default(),
            preemptions: Family::default(),
            ttft: Family::new_with_constructor(Buckets(TTFT_S)),
            outside: Family::new_with_constructor(Buckets(OUTSIDE_S)),
            itl: Family::new_with_constructor(Buckets(ITL_S)),
            e2e: Family::new_with_constructor(Buckets(E2E_S)),
            prompt_tokens: Family::default(),
            generation_tokens: Family::default(),
            prefix_queries: Family::default(),
            prefix_hits: Family::default(),
            success: Family::default(),
            http_responses: Family::default(),
            in_flight: Gauge::default(),
            connections: Gauge::default(),
            settle_failures: Counter::default(),
        };
        let registry = &mut this.registry;
        // The encoder ends a help text with a full stop and a counter's name with `_total` by itself.
        registry.register(
            "baton:num_requests_running",
            "Sequences in batches, over all live workers",
            this.running.clone(),
        );
        registry.register(
            "baton:num_requests_waiting",
            "Sequences queued, over all live workers",
            this.waiting.clone(),
        );
        registry.register(
            "baton:kv_cache_usage_perc",
            "KV blocks held, 1 means all",
            this.kv_usage.clone(),
        );
        registry.register(
            "baton:workers",
            "Registered workers by role and state",
            this.workers.clone(),
        );
        registry.register(
            "baton:num_preemptions",
            "Preemptions of the live workers since each started",
            this.preemptions.clone(),
        );
        registry.register(
            "baton:time_to_first_token_seconds",
            "From the request's arrival to its first token",
            this.ttft.clone(),
        );
        registry.register(
            "baton:time_to_first_token_outside_workers_seconds",
            "Of the time to first token of ended requests, what no worker's queue or prefill took: gateway, admission, wire",
            this.outside.clone(),
        );
        registry.register(
            "baton:inter_token_latency_seconds",
            "Between two engine steps of one request",
            this.itl.clone(),
        );
        registry.register(
            "baton:e2e_request_latency_seconds",
            "From the request's arrival to its last token",
            this.e2e.clone(),
        );
        registry.register(
            "baton:prompt_tokens",
            "Prompt tokens of ended requests",
            this.prompt_tokens.clone(),
        );
        registry.register(
            "baton:generation_tokens",
            "Tokens generated for clients",
            this.generation_tokens.clone(),
        );
        registry.register(
            "baton:prefix_cache_queries",
            "Prompt tokens looked up in prefix caches",
            this.prefix_queries.clone(),
        );
        registry.register(
            "baton:prefix_cache_hits",
            "Prompt tokens found in prefix caches",
            this.prefix_hits.clone(),
        );
        registry.register(
            "baton:request_success",
            "Ended requests by reason",
            this.success.clone(),
        );
        registry.register(
            "baton:http_responses",
            "Responses by route and status",
            this.http_responses.clone(),
        );
        registry.register(
            "baton:gateway_requests_in_flight",
            "Chat requests in work in this gateway",
            this.in_flight.clone(),
        );
        registry.register(
            "baton:gateway_connections",
            "Open HTTP connections",
            this.connections.clone(),
        );
        registry.register(
            "baton:settle_failures",
            "Usage records that could not be settled",
            this.settle_failures.clone(),
        );
        this
    }

    pub fn first_token(&self, model: &str, after: Duration) {
        self.ttft.get_or_create(&label(model)).observe(after.as_secs_f64());
    }

    /// The first token of an ended request came `after` its arrival, of which its workers had it for `at_workers`.
    pub fn outside_workers(&self, model: &str, after: Duration, at_workers: Duration) {
        let outside = after.saturating_sub(at_workers);
        self.outside.get_or_create(&label(model)).observe(outside.as_secs_f64());
    }

    pub fn next_tokens(&self, model: &str, after: Duration) {
        self.itl.get_or_create(&label(model)).observe(after.as_secs_f64());
    }

    /// A request ended with `reason`: `stop`, `length`, `abort` or `error`.
    pub fn ended(&self, model: &str, reason: &'static str, counts: Counts, after: Duration) {
        let label = label(model);
        self.e2e.get_or_create(&label).observe(after.as_secs_f64());
        self.prompt_tokens.get_or_create(&label).inc_by(counts.prompt.into());
        self.generation_tokens
            .get_or_create(&label)
            .inc_by(counts.completion.into());
        self.prefix_queries.get_or_create(&label).inc_by(counts.prompt.into());
        self.prefix_hits.get_or_create(&label).inc_by(counts.cached.into());
        let finish = FinishLabel {
            model_name: label.model_name,
            finished_reason: reason,
        };
        self.success.get_or_create(&finish).inc();
    }

    pub fn responded(&self, route: &str, status: u16) {
        self.http_responses
            .get_or_create(&HttpLabel {
                route: route.to_owned(),
                status,
            })
            .inc();
    }

    /// The exposition, with the cluster's gauges as of `snapshot`.
    pub fn render(&self, snapshot: &ClusterSnapshot) -> Result<String, std::fmt::Error> {
        #[derive(Default)]
        struct Sums {
            running: i64,
            waiting: i64,
            preemptions: i64,
            held: u64,
            total: u64,
        }
        self.tiers.update(snapshot);
        self.workers.clear();
        let mut sums: BTreeMap<&str, Sums> = BTreeMap::new();
        for worker in &snapshot.workers {
            let label = WorkerLabel {
                model_name: worker.model.clone(),
                role: format!("{:?}", worker.role).to_lowercase(),
                state: format!("{:?}", worker.state).to_lowercase(),
            };
            self.workers.get_or_create(&label).inc();
            let sum = sums.entry(&worker.model).or_default();
            if worker.state == WorkerState::Lost {
                continue;
            }
            sum.running += i64::from(worker.running);
            sum.waiting += i64::from(worker.waiting);
            sum.preemptions += i64::try_from(worker.preemptions_total).unwrap_or(i64::MAX);
            sum.held += u64::from(worker.held_blocks);
            sum.total += u64::from(worker.total_blocks);
        }
        for (model, sum) in sums {
            let label = label(model);
            self.running.get_or_create(&label).set(sum.running);
            self.waiting.get_or_create(&label).set(sum.waiting);
            self.preemptions.get_or_create(&label).set(sum.preemptions);
            self.kv_usage
                .get_or_create(&label)
                .set(sum.held as f64 / sum.total.max(1) as f64);
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// A request's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub prompt: u32,
    pub cached: u32,
    pub completion: u32,
    /// Of the completion, tokens of thought.
    pub reasoning: u32,
}

fn label(model: &str) -> ModelLabel {
    ModelLabel {
        model_name: model.to_owned(),
    }
}
