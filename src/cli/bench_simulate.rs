//! `baton bench simulate`: flags to simulations, one after another, and their table.

use super::bench_engine::Output;
use super::mock::profile;
use super::size;
use anyhow::Context;
use baton_engine::MockProfile;
use baton_loadtest::Trace;
use baton_loadtest::simulate::{PolicyKind, SimulationOptions, simulate, table};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Flags of `baton bench simulate`.
#[derive(Debug, Clone, Args)]
pub struct BenchSimulateArgs {
    /// Trace to replay (Mooncake .jsonl, whose block ids say what prompts share, or Azure .csv, which share nothing)
    #[arg(long, value_name = "FILE")]
    pub trace: PathBuf,
    /// Routing policies to compare [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub policy: Vec<PolicyKind>,
    /// Requests of the trace at most [default: all]
    #[arg(long, short = 'n', value_name = "M")]
    pub requests: Option<usize>,
    /// Replay this many times faster than recorded
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    pub speed: f64,
    /// Shorten arrivals and steps by this factor, but not the delays of heartbeats and block events: what a live replay does
    /// when `baton bench` and `baton mock` have this speed
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    pub time_scale: f64,
    /// How much cached blocks hold a request to their worker, for cache-aware: the coordinator's setting `stay`
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    pub stay: f64,
    /// Seed of the policies
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Workers, each both computing prompts and streaming
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Cluster")]
    pub workers: usize,
    /// The machine each worker is: instant, h100-llama3-8b, 8xh100-llama3-70b, or a TOML file with such a profile
    #[arg(long, value_name = "NAME|FILE", default_value = "8xh100-llama3-70b", value_parser = profile, help_heading = "Cluster")]
    pub profile: MockProfile,
    /// KV memory per worker; several sizes are simulated one after another [default: the profile's]
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = size::parse, help_heading = "Cluster")]
    pub kv_mem: Vec<u64>,
    /// Tokens per KV block
    #[arg(long, value_name = "TOKENS", default_value_t = 16, help_heading = "Cluster")]
    pub block_size: usize,
    /// Most tokens computed in one step
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, help_heading = "Cluster")]
    pub batch_tokens_max: usize,
    /// Most sequences in one step
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Cluster")]
    pub seqs_max: usize,
    /// Time until the router knows of blocks that were stored or evicted, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 10, help_heading = "Cluster")]
    pub event_delay: u64,

    /// A good request has its first token within this many milliseconds ...
    #[arg(long, value_name = "MS", default_value_t = 2000, help_heading = "Report")]
    pub ttft_target: u64,
    /// ... and needs at most this many, on average, for each further one
    #[arg(long, value_name = "MS", default_value_t = 100, help_heading = "Report")]
    pub tpot_target: u64,
    #[command(flatten)]
    pub output: Output,
}

/// Runs the simulations.
pub fn run(args: BenchSimulateArgs) -> anyhow::Result<ExitCode> {
    let trace = Trace::load(&args.trace)?;
    let policies = match args.policy.is_empty() {
        true => PolicyKind::ALL.to_vec(),
        false => args.policy.clone(),
    };
    let memories = match args.kv_mem.is_empty() {
        true => vec![args.profile.kv_bytes],
        false => args.kv_mem.clone(),
    };
    let mut reports = Vec::new();
    for kv_bytes in memories {
        for kind in &policies {
            let options = SimulationOptions {
                workers: args.workers,
                profile: args.profile,
                kv_bytes,
                block_size: args.block_size,
                batch_tokens_max: args.batch_tokens_max,
                seqs_max: args.seqs_max,
                speed: args.speed,
                time_scale: args.time_scale,
                stay: args.stay,
                requests_max: args.requests.unwrap_or(usize::MAX),
                event_delay: Duration::from_millis(args.event_delay),
                ttft_target: Duration::from_millis(args.ttft_target),
                tpot_target: Duration::from_millis(args.tpot_target),
                seed: args.seed,
            };
            let label = format!("{}, {} of KV", kind.name(), size::format(kv_bytes));
            let mut display = Display::new(label, args.output.quiet);
            let mut policy = kind.build(&options);
            let report = simulate(&trace, &options, kind.name(), &mut *policy, &mut |done, all| {
                display.show(done, all);
            });
            reports.push(report.context("the simulation ended early")?);
        }
    }
    let text = match args.output.json {
        true => serde_json::to_string_pretty(&reports)? + "\n",
        false => table(&reports),
    };
    // A reader that has gone (`| head`) is no failure of the run.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    Ok(ExitCode::SUCCESS)
}

/// A bar on a terminal, a line per simulation elsewhere.
struct Display {
    label: String,
    quiet: bool,
    bar: Option<ProgressBar>,
    started: Instant,
}

impl Display {
    fn new(label: String, quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(0).with_message(label.clone());
            if let Ok(style) = ProgressStyle::with_template("{bar:32} {pos}/{len} {msg} [{elapsed} < {eta}]") {
                bar.set_style(style);
            }
            bar
        });
        let started = Instant::now();
        Self {
            label,
            quiet,
            bar,
            started,
        }
    }

    fn show(&mut self, done: usize, all: usize) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(all as u64);
                bar.set_position(done as u64);
                if done == all {
                    bar.finish_and_clear();
                }
            }
            None if !self.quiet && done == all => {
                let seconds = self.started.elapsed().as_secs_f64();
                eprintln!("{}: {all} requests simulated in {seconds:.1} s", self.label);
            }
            None => {}
        }
    }
}
