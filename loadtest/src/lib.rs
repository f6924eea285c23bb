//! `baton bench`: streaming load against any OpenAI-compatible URL, and an honest report of what the clients saw.
//!
//! A run is a [`BenchOptions`]; [`run`] drives it and returns a [`Report`], which prints as a table or as JSON.
//! Three ways of arriving: closed loop (N clients, each waits for its answer), Poisson open loop (requests come when
//! they come, whether the server keeps up or not) and replay of recorded traces. Open-loop latencies count from the
//! moment a request *should* have been sent, so a server that stalls cannot hide behind a generator that waits for it
//! (coordinated omission).
//!
//! [`simulate`] replays a trace against a whole cluster in virtual time instead. Both make their prompts in one place,
//! `trace_prompts`, and say what an infinite cache would have hit.
//!
//! Deliberately absent: TLS in measurements (measure the server, not its TLS; [`Client`] speaks it for administration), HTTP/2 (one connection per request in
//! flight is what OpenAI clients do and keeps requests independent), and, outside of [`simulate`], any knowledge of
//! baton's own internals.
#![forbid(unsafe_code)]

mod client;
mod error;
mod options;
mod progress;
mod prompt;
mod report;
mod run;
mod schedule;
pub mod simulate;
mod sse;
mod tally;
mod target;
mod tls;
mod trace;
mod trace_prompts;
pub mod word_model;

pub use client::{Client, Completion, Failure, FailureKind, Usage};
pub use error::BenchError;
pub use options::{BenchOptions, Lengths, Load, ProgressStyle, Stop};
pub use report::{ErrorCount, Latency, Report};
pub use run::run;
pub use sse::{SseError, SseParser};
pub use target::Target;
pub use tls::Trust;
pub use trace::{Trace, TraceFormat, TraceRequest, parse_trace};
pub use trace_prompts::CacheBound;
