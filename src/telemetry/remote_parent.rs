//! Puts spans into the trace that a request carries. A request crosses processes with a W3C `traceparent`; the crates
//! that handle it know nothing of OpenTelemetry and only record that text as a field of their span. This layer reads the
//! field and makes it the span's parent, then leaves everything to the layer it wraps.

use opentelemetry::Context as OtelContext;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use std::fmt::Debug;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Name of the field that carries the trace context.
const FIELD: &str = "traceparent";

/// A layer whose spans join the traces that their `traceparent` fields name.
pub struct RemoteParent<L> {
    inner: L,
}

impl<L> RemoteParent<L> {
    /// Wraps an OpenTelemetry layer.
    pub fn new(inner: L) -> Self {
        Self { inner }
    }
}

impl<S: Subscriber, L: Layer<S>> Layer<S> for RemoteParent<L> {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, ctx: Context<'_, S>) {
        let mut found = Traceparent::default();
        attributes.record(&mut found);
        // Until the guard is dropped, a span without a local parent gets this one.
        let _guard = found
            .0
            .map(|parent| OtelContext::new().with_remote_span_context(parent).attach());
        self.inner.on_new_span(attributes, id, ctx);
    }

    fn on_record(&self, span: &Id, values: &Record<'_>, ctx: Context<'_, S>) {
        self.inner.on_record(span, values, ctx);
    }

    fn on_follows_from(&self, span: &Id, follows: &Id, ctx: Context<'_, S>) {
        self.inner.on_follows_from(span, follows, ctx);
    }

    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        self.inner.on_event(event, ctx);
    }

    fn on_enter(&self, id: &Id, ctx: Context<'_, S>) {
        self.inner.on_enter(id, ctx);
    }

    fn on_exit(&self, id: &Id, ctx: Context<'_, S>) {
        self.inner.on_exit(id, ctx);
    }

    fn on_close(&self, id: Id, ctx: Context<'_, S>) {
        self.inner.on_close(id, ctx);
    }
}

#[derive(Default)]
struct Traceparent(Option<SpanContext>);

impl Visit for Traceparent {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == FIELD {
            self.0 = parse(value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == FIELD {
            self.0 = parse(&format!("{value:?}"));
        }
    }
}

/// `00-<trace id>-<span id>-<flags>`, and nothing that is not exactly that.
fn parse(text: &str) -> Option<SpanContext> {
    let [version, trace, span, flags]: [&str; 4] = text.split('-').collect::<Vec<_>>().try_into().ok()?;
    if version.len() != 2 || trace.len() != 32 || span.len() != 16 || flags.len() != 2 {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?);
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let context = SpanContext::new(trace, span, flags, true, TraceState::default());
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::error::OTelSdkResult;
    use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::layer::SubscriberExt;

    #[derive(Debug, Clone, Default)]
    struct Collected(Arc<Mutex<Vec<SpanData>>>);

    impl SpanExporter for Collected {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().expect("no test panics with it").extend(batch);
            Ok(())
        }
    }

    const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn spans_join_the_requests_trace() {
        let exporter = Collected::default();
        let provider = SdkTracerProvider::builder()
            .with_simple_exporter(exporter.clone())
            .build();
        let layer = RemoteParent::new(tracing_opentelemetry::layer().with_tracer(provider.tracer("test")));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let request = tracing::info_span!("request", traceparent = %TRACEPARENT);
            let _entered = request.enter();
            drop(tracing::info_span!("step"));
        });
        let spans = exporter.0.lock().expect("no test panics with it");
        let find = |name: &str| spans.iter().find(|span| span.name == name).expect("it was exported");
        let (request, step) = (find("request"), find("step"));
        assert_eq!(
            request.span_context.trace_id().to_string(),
            "0af7651916cd43dd8448eb211c80319c"
        );
        assert_eq!(request.parent_span_id.to_string(), "b7ad6b7169203331");
        assert_eq!(step.parent_span_id, request.span_context.span_id());
    }

    #[test]
    fn only_real_traceparents_count() {
        assert!(parse(TRACEPARENT).is_some());
        for wrong in [
            "",
            "00-x",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            &TRACEPARENT[1..],
            "a-b-c-d-e",
        ] {
            assert!(parse(wrong).is_none(), "{wrong}");
        }
    }
}
