//! `baton bench`: flags to options, report to stdout, exit code. Without a subcommand it loads a URL.

use super::Remote;
use super::bench_engine::{self, BenchEngineArgs, BenchMachineArgs};
use super::bench_simulate::{self, BenchSimulateArgs};
use anyhow::Context;
use baton_loadtest::{BenchOptions, Lengths, Load, ProgressStyle, Stop, Trace};
use clap::{Args, Subcommand};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// `baton bench` measures a URL; its subcommands measure without one.
#[derive(Debug, Clone, Subcommand)]
pub enum BenchCommand {
    /// Measures the engine alone, in this process: prefill and decode in the definitions of llama.cpp's benchmarks.
    Engine(BenchEngineArgs),
    /// Measures what this machine can do at most: memory bandwidth and arithmetic.
    Machine(BenchMachineArgs),
    /// Replays a trace against a simulated cluster in virtual time: real scheduler and routing, no model, no network.
    ///
    /// Prints hit rates of the prefix cache beside what an infinite one would have, latencies and goodput for each routing
    /// policy and each size of KV memory.
    Simulate(BenchSimulateArgs),
}

/// Flags of `baton bench`.
#[derive(Debug, Clone, Args)]
#[command(args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
pub struct BenchArgs {
    /// What to measure instead of a URL.
    #[command(subcommand)]
    pub command: Option<BenchCommand>,
    #[command(flatten)]
    pub remote: Remote,
    /// Model to ask for [default: the first one the server lists]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,

    /// Closed loop: this many clients, each sends its next request when its last is answered
    #[arg(long, short, value_name = "N", default_value_t = 8, help_heading = "Arrivals")]
    pub concurrency: usize,
    /// Open loop instead: Poisson arrivals, requests per second on average
    #[arg(
        long,
        short,
        value_name = "PER SECOND",
        conflicts_with = "concurrency",
        help_heading = "Arrivals"
    )]
    pub rate: Option<f64>,
    /// Open loop instead: replay a trace (Mooncake .jsonl or Azure .csv)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["concurrency", "rate"], help_heading = "Arrivals")]
    pub trace: Option<PathBuf>,
    /// Replay this many times faster than recorded
    #[arg(
        long,
        value_name = "FACTOR",
        default_value_t = 1.0,
        requires = "trace",
        help_heading = "Arrivals"
    )]
    pub speed: f64,
    /// Scale the recorded lengths, for models with a shorter context
    #[arg(
        long,
        value_name = "FACTOR",
        default_value_t = 1.0,
        requires = "trace",
        help_heading = "Arrivals"
    )]
    pub length_scale: f64,
    /// Requests in flight at most in an open loop; past it sending waits, and the wait counts as latency
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Arrivals")]
    pub in_flight_max: usize,
    /// Stop sending after this many requests [default: 100, unless --duration or --trace is given]
    #[arg(long, short = 'n', value_name = "M", help_heading = "Arrivals")]
    pub requests: Option<u64>,
    /// Stop sending after this many seconds
    #[arg(long, short, value_name = "SECONDS", value_parser = seconds, help_heading = "Arrivals")]
    pub duration: Option<Duration>,
    /// Requests before the clock starts, not counted
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Arrivals")]
    pub warmup: usize,

    /// Prompt length in words, about one token each
    #[arg(long, value_name = "WORDS", default_value_t = 128, help_heading = "Requests")]
    pub input_words: usize,
    /// Leading words that all prompts share
    #[arg(long, value_name = "WORDS", default_value_t = 0, help_heading = "Requests")]
    pub shared_prefix_words: usize,
    /// Send the shared words as a system message of their own, as an agent's instructions are
    #[arg(long, requires = "shared_prefix_words", help_heading = "Requests")]
    pub shared_system: bool,
    /// max_tokens of a request
    #[arg(long, value_name = "TOKENS", default_value_t = 64, help_heading = "Requests")]
    pub output_tokens: u32,
    /// Vary both lengths uniformly by this share in either direction
    #[arg(long, value_name = "0..1", default_value_t = 0.0, help_heading = "Requests")]
    pub length_jitter: f64,
    /// Words sent for each recorded token of a trace
    #[arg(
        long,
        value_name = "FACTOR",
        default_value_t = 1.0,
        requires = "trace",
        help_heading = "Requests"
    )]
    pub words_per_token: f64,
    /// Cut prompts at this many words
    #[arg(long, value_name = "WORDS", help_heading = "Requests")]
    pub input_words_max: Option<usize>,
    /// Cut max_tokens at this
    #[arg(long, value_name = "TOKENS", help_heading = "Requests")]
    pub output_tokens_max: Option<u32>,
    /// Ask for answers of exactly max_tokens (an extension that vLLM and baton know)
    #[arg(long, help_heading = "Requests")]
    pub ignore_eos: bool,
    /// Sampling temperature; 0 is greedy
    #[arg(long, default_value_t = 0.0, help_heading = "Requests")]
    pub temperature: f64,
    /// Seed of prompts, arrivals and sampling
    #[arg(long, default_value_t = 0, help_heading = "Requests")]
    pub seed: u64,
    /// A request that takes longer has failed
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "600", help_heading = "Requests")]
    pub request_timeout: Duration,

    /// A good request has its first token within this many milliseconds ...
    #[arg(long, value_name = "MS", value_parser = millis, help_heading = "Report")]
    pub ttft_target: Option<Duration>,
    /// ... and needs at most this many, on average, for each further one
    #[arg(long, value_name = "MS", value_parser = millis, help_heading = "Report")]
    pub tpot_target: Option<Duration>,
    /// Tokens per KV block of the server, for what an infinite cache would have hit of a trace
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 16,
        requires = "trace",
        help_heading = "Report"
    )]
    pub block_size: usize,
    /// Print the report as JSON
    #[arg(long, help_heading = "Report")]
    pub json: bool,
    /// Exit with 1 if any request failed, not only if all did
    #[arg(long, help_heading = "Report")]
    pub fail_on_error: bool,
    /// No progress on stderr
    #[arg(long, short, help_heading = "Report")]
    pub quiet: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "give a positive number of seconds".to_owned())
}

fn millis(text: &str) -> Result<Duration, String> {
    let ms = text.parse::<f64>().ok();
    ms.and_then(|ms| Duration::try_from_secs_f64(ms / 1e3).ok())
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "give a positive number of milliseconds".to_owned())
}

impl BenchArgs {
    fn options(self) -> anyhow::Result<BenchOptions> {
        let defaults = Lengths::default();
        let ended = self.duration.is_some() || self.trace.is_some();
        let load = match (&self.trace, self.rate) {
            (Some(path), _) => Load::Replay {
                trace: Trace::load(path)?,
                speed: self.speed,
                length_scale: self.length_scale,
                in_flight_max: self.in_flight_max,
            },
            (None, Some(rate)) => Load::Poisson {
                rate,
                in_flight_max: self.in_flight_max,
            },
            (None, None) => Load::Closed {
                concurrency: self.concurrency,
            },
        };
        Ok(BenchOptions {
            url: self.remote.url,
            api_key: self.remote.api_key,
            model: self.model,
            load,
            stop: Stop {
                requests: self.requests.or((!ended).then_some(100)),
                duration: self.duration,
            },
            lengths: Lengths {
                input_words: self.input_words,
                shared_prefix_words: self.shared_prefix_words,
                shared_system: self.shared_system,
                output_tokens: self.output_tokens,
                jitter: self.length_jitter,
                words_per_token: self.words_per_token,
                input_words_max: self.input_words_max.unwrap_or(defaults.input_words_max),
                output_tokens_max: self.output_tokens_max.unwrap_or(defaults.output_tokens_max),
            },
            ignore_eos: self.ignore_eos,
            temperature: self.temperature,
            seed: self.seed,
            ttft_target: self.ttft_target,
            tpot_target: self.tpot_target,
            block_size: self.block_size,
            warmup: self.warmup,
            request_timeout: self.request_timeout,
            progress: match (self.quiet, std::io::stderr().is_terminal()) {
                (true, _) => ProgressStyle::Silent,
                (false, true) => ProgressStyle::Bar,
                (false, false) => ProgressStyle::Lines,
            },
        })
    }
}

/// Runs the benchmark.
pub fn run(mut args: BenchArgs) -> anyhow::Result<ExitCode> {
    match args.command.take() {
        Some(BenchCommand::Engine(engine)) => return bench_engine::engine(engine),
        Some(BenchCommand::Machine(machine)) => return bench_engine::machine(machine),
        Some(BenchCommand::Simulate(simulate)) => return bench_simulate::run(simulate),
        None => {}
    }
    let (json, fail_on_error) = (args.json, args.fail_on_error);
    let options = args.options()?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    let report = runtime.block_on(baton_loadtest::run(options, async {
        if tokio::signal::ctrl_c().await.is_err() {
            // Without signals the run ends by its own limits.
            std::future::pending::<()>().await;
        }
    }))?;
    let text = match json {
        true => serde_json::to_string_pretty(&report)? + "\n",
        false => report.to_string(),
    };
    // A reader that has gone (`| head`) is no failure of the run.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    let none_succeeded = report.requests_completed == 0;
    let failed = none_succeeded || (fail_on_error && report.requests_failed > 0);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
