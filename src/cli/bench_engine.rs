//! `baton bench engine` and `baton bench machine`: flags to a plan, progress on stderr, the report on stdout.

use anyhow::Context;
use baton_engine::bench::{BenchPlan, Limits, OpenOptions, Report, Workload, measure, open};
use baton_model::{LoadOptions, Quantization, Stage};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Limits are a few kilobytes; a file larger than this is another file.
const LIMITS_BYTES_MAX: u64 = 1 << 20;
/// A log line this often where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Flags of `baton bench engine`.
#[derive(Debug, Clone, Args)]
pub struct BenchEngineArgs {
    /// Model to load: a directory with config.json and *.safetensors
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Compute threads [default: the cores of this machine]
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: Option<u16>,
    /// What the weights become in memory, as for `baton up`
    #[arg(long, value_name = "none|int8|int4", default_value = "none")]
    pub quantize: Quantization,
    /// Tokens per KV block
    #[arg(long, value_name = "TOKENS", default_value_t = 16)]
    pub block_size: usize,

    /// Prompt lengths to prefill [default, if no figure is chosen: 512,2048]
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', help_heading = "Figures")]
    pub prefill: Vec<usize>,
    /// Depths at which one sequence decodes [default, if no figure is chosen: 0,4096]
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', help_heading = "Figures")]
    pub decode_depth: Vec<usize>,
    /// Numbers of sequences that decode together [default, if no figure is chosen: 16,32]
    #[arg(long, value_name = "N", value_delimiter = ',', help_heading = "Figures")]
    pub decode_batch: Vec<usize>,
    /// Tokens of each sequence before a --decode-batch figure begins
    #[arg(long, value_name = "TOKENS", default_value_t = 128, help_heading = "Figures")]
    pub batch_prompt: usize,
    /// Tokens each sequence of a decode figure generates
    #[arg(long, value_name = "TOKENS", default_value_t = 64, help_heading = "Figures")]
    pub decode_tokens: usize,
    /// Most prompt tokens of one step
    #[arg(long, value_name = "TOKENS", default_value_t = 512, help_heading = "Figures")]
    pub chunk: usize,
    /// Measured runs of each figure, after one that warms up; the median is reported
    #[arg(long, short, value_name = "N", default_value_t = 5, help_heading = "Figures")]
    pub repeat: usize,
    /// Seed of the tokens
    #[arg(long, default_value_t = 0, help_heading = "Figures")]
    pub seed: u64,

    /// Limits of the machine, as `baton bench machine --json` prints them [default: measured first]
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    pub limits: Option<PathBuf>,
    /// State no fractions of the machine's limits
    #[arg(long, conflicts_with = "limits", help_heading = "Report")]
    pub no_limits: bool,
    #[command(flatten)]
    pub output: Output,
}

/// Flags of `baton bench machine`.
#[derive(Debug, Clone, Args)]
pub struct BenchMachineArgs {
    /// Threads that measure together [default: the cores of this machine]
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: Option<u16>,
    #[command(flatten)]
    pub output: Output,
}

/// How a local benchmark reports.
#[derive(Debug, Clone, Copy, Args)]
pub struct Output {
    /// Print the report as JSON
    #[arg(long, help_heading = "Report")]
    pub json: bool,
    /// No progress on stderr
    #[arg(long, short, help_heading = "Report")]
    pub quiet: bool,
}

impl BenchEngineArgs {
    fn plan(&self) -> BenchPlan {
        let chosen = [&self.prefill, &self.decode_depth, &self.decode_batch];
        let all = chosen.iter().all(|list| list.is_empty());
        let or = |list: &Vec<usize>, defaults: [usize; 2]| if all { defaults.to_vec() } else { list.clone() };
        let (batch_prompt, one) = (self.batch_prompt, 1);
        let prefill = or(&self.prefill, [512, 2048]).into_iter();
        let depths = or(&self.decode_depth, [0, 4096]).into_iter();
        let batches = or(&self.decode_batch, [16, 32]).into_iter();
        BenchPlan {
            workloads: prefill
                .map(|tokens| Workload::Prefill { tokens })
                .chain(depths.map(|depth| Workload::Decode { batch: one, depth }))
                .chain(batches.map(|batch| Workload::Decode {
                    batch,
                    depth: batch_prompt,
                }))
                .collect(),
            decode_tokens: self.decode_tokens,
            chunk_tokens: self.chunk,
            repeats: self.repeat,
            seed: self.seed,
        }
    }
}

/// Runs `baton bench engine`.
pub fn engine(args: BenchEngineArgs) -> anyhow::Result<ExitCode> {
    let plan = args.plan();
    let threads = threads(args.threads);
    let limits = match (&args.limits, args.no_limits) {
        (Some(path), _) => Some(read_limits(path)?),
        (None, true) => None,
        (None, false) => Some(measure_limits(threads, args.output.quiet)?),
    };
    let options = OpenOptions {
        path: args.model.clone(),
        load: LoadOptions {
            quantization: args.quantize,
            ..LoadOptions::threads(threads)
        },
        block_size: args.block_size,
    };
    let display = Display::new(args.output.quiet);
    let show_loading = |stage: Stage<'_>, done, total| display.show(&stage.to_string(), done, total);
    let mut opened = open(&options, &plan, &show_loading)?;
    let show = &mut |workload: Workload, done: usize, total: usize| {
        display.show(&workload.to_string(), done as u64, total as u64);
    };
    let figures = measure(&mut opened.engine, &opened.costs, limits.as_ref(), &plan, show)?;
    display.clear();
    let report = Report {
        model: args.model.display().to_string(),
        threads,
        load_s: opened.load_s,
        weight_bytes: opened.costs.weight_bytes,
        chunk_tokens: plan.chunk_tokens,
        decode_tokens: plan.decode_tokens,
        repeats: plan.repeats,
        limits,
        figures,
    };
    print(args.output, &report)
}

/// Runs `baton bench machine`.
pub fn machine(args: BenchMachineArgs) -> anyhow::Result<ExitCode> {
    print(args.output, &measure_limits(threads(args.threads), args.output.quiet)?)
}

fn threads(asked: Option<u16>) -> usize {
    match asked {
        Some(threads) => threads.into(),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    }
}

fn measure_limits(threads: usize, quiet: bool) -> anyhow::Result<Limits> {
    let display = Display::new(quiet);
    let show = &mut |done: usize, total: usize| display.show("measuring the machine", done as u64, total as u64);
    let limits = Limits::measure(threads, show).context("cannot measure the machine; try --no-limits")?;
    display.clear();
    Ok(limits)
}

fn read_limits(path: &Path) -> anyhow::Result<Limits> {
    let advice = || format!("{} is not what `baton bench machine --json` prints", path.display());
    let size = std::fs::metadata(path)
        .with_context(|| format!("cannot read {}", path.display()))?
        .len();
    anyhow::ensure!(size <= LIMITS_BYTES_MAX, advice());
    serde_json::from_slice(&std::fs::read(path)?).with_context(advice)
}

fn print(output: Output, report: &(impl serde::Serialize + std::fmt::Display)) -> anyhow::Result<ExitCode> {
    let text = match output.json {
        true => serde_json::to_string_pretty(report)? + "\n",
        false => report.to_string(),
    };
    // A reader that has gone (`| head`) is no failure of the run.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    Ok(ExitCode::SUCCESS)
}

/// Progress on stderr: a bar on a terminal, a line now and then in a log.
struct Display {
    bar: Option<ProgressBar>,
    /// When the last line was printed, and of what; only where there is no terminal.
    printed: Option<std::sync::Mutex<(String, Instant)>>,
}

impl Display {
    fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = (!quiet && terminal).then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) = ProgressStyle::with_template("{msg:24} {bar:32} {percent} % [{elapsed}]") {
                bar.set_style(style);
            }
            bar
        });
        let printed = (!quiet && !terminal).then(|| (String::new(), Instant::now()).into());
        Display { bar, printed }
    }

    fn show(&self, what: &str, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            if bar.message() != what {
                bar.set_message(what.to_owned());
            }
            bar.set_length(total);
            bar.set_position(done);
        }
        let Some(mut printed) = self.printed.as_ref().and_then(|printed| printed.lock().ok()) else {
            return;
        };
        if printed.0 != what || printed.1.elapsed() >= LINE_INTERVAL {
            eprintln!("{what}: {} %", 100 * done / total.max(1));
            *printed = (what.to_owned(), Instant::now());
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Wrapper {
        #[command(flatten)]
        args: BenchEngineArgs,
    }

    fn workloads(flags: &[&str]) -> Vec<String> {
        let args = ["x", "--model", "m"].iter().chain(flags);
        let parsed = Wrapper::try_parse_from(args).expect("valid flags");
        parsed.args.plan().workloads.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn choosing_one_figure_leaves_out_the_others() {
        assert_eq!(workloads(&[]).len(), 6);
        assert_eq!(workloads(&["--prefill", "7,8"]), ["prefill 7", "prefill 8"]);
        let mixed = workloads(&["--decode-depth", "5", "--decode-batch", "4", "--batch-prompt", "9"]);
        assert_eq!(mixed, ["decode at 5", "decode 4 x at 9"]);
    }
}
