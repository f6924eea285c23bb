//! Logs and traces of a serving process. Logs go to stderr as text, or as JSON with `BATON_LOG_FORMAT=json`; `BATON_LOG` (or
//! `RUST_LOG`) filters them. Spans go to an OpenTelemetry collector over OTLP (gRPC, plain http) when
//! `OTEL_EXPORTER_OTLP_ENDPOINT` is set, under the trace that the request itself carries (`remote_parent.rs`).

mod remote_parent;

use anyhow::Context;
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use remote_parent::RemoteParent;
use std::io::IsTerminal;
use std::time::Duration;
use tracing::Subscriber;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// What is logged when nobody says otherwise: our own at info, libraries at warn.
const DEFAULT_FILTER: &str = "warn,baton=info,baton_coordinator=info,baton_gateway=info,baton_raftstore=info,\
                              baton_worker=info,baton_engine=info,baton_model=info,baton_kvtransfer=info";
/// Either turns the export of spans on; both are OpenTelemetry's own names.
const ENDPOINT_VARIABLES: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
/// Time for the last spans to leave when the process ends. A collector that is away must not hold a stop up.
const FLUSH_MAX: Duration = Duration::from_secs(2);

/// Sends what is left when dropped.
pub struct Telemetry(Option<SdkTracerProvider>);

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(provider) = &self.0 {
            // What did not leave in time is lost, as spans may be.
            let _ = provider.shutdown_with_timeout(FLUSH_MAX);
        }
    }
}

/// Starts logging, and tracing where configured, for `service` ("coordinator", "worker"). To be called in a runtime.
pub fn start(service: &'static str) -> anyhow::Result<Telemetry> {
    let endpoint = ENDPOINT_VARIABLES
        .iter()
        .find(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
    let provider = endpoint.map(|name| provider(service, name)).transpose()?;
    let spans = provider.as_ref().map(|provider| {
        let tracer = provider.tracer("baton");
        RemoteParent::new(tracing_opentelemetry::layer().with_tracer(tracer))
    });
    tracing_subscriber::registry()
        .with(filter()?)
        .with(logs())
        .with(spans)
        .try_init()
        .context("cannot start logging")?;
    Ok(Telemetry(provider))
}

fn logs<S: Subscriber + for<'a> LookupSpan<'a>>() -> Box<dyn Layer<S> + Send + Sync> {
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match std::env::var("BATON_LOG_FORMAT").is_ok_and(|format| format == "json") {
        true => layer.json().boxed(),
        false => layer.with_ansi(std::io::stderr().is_terminal()).boxed(),
    }
}

fn provider(service: &'static str, variable: &str) -> anyhow::Result<SdkTracerProvider> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .build()
        .with_context(|| {
            format!("{variable} is not usable; give a collector such as http://127.0.0.1:4317, or unset it")
        })?;
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(
            Resource::builder()
                .with_service_name(format!("baton-{service}"))
                .build(),
        )
        .build())
}

fn filter() -> anyhow::Result<EnvFilter> {
    let set = ["BATON_LOG", "RUST_LOG"]
        .iter()
        .find_map(|name| Some((name, std::env::var(name).ok()?)));
    match set {
        Some((name, text)) => {
            EnvFilter::try_new(&text).with_context(|| format!("{name}={text:?} is not a log filter; try {name}=info"))
        }
        None => EnvFilter::try_new(DEFAULT_FILTER).context("the default log filter"),
    }
}
