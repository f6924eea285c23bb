//! `baton gpu-check`: the rows of `baton_cuda::check`, a process each, and the table.

use crate::demo;
use anyhow::Context as _;
use baton_cuda::check::{self, Context, Outcome};
use baton_cuda::{CudaDriver, doctor};
use clap::Args;
use std::fmt::Write as _;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// How often a row's process is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Most of a row's answer, or of what it said when it died, that is read.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// Flags of `baton gpu-check`.
#[derive(Debug, Clone, Args)]
pub struct GpuCheckArgs {
    /// GPU to check, as the driver numbers them
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub device: usize,
    /// Only rows whose name contains this
    #[arg(long, value_name = "TEXT")]
    pub row: Option<String>,
    /// Leave out the rows that measure speed
    #[arg(long)]
    pub no_speed: bool,
    /// Seed of all inputs [default: the time]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Layers of the models whose speed is measured; all of them need 16 GB of --scratch for the largest
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub layers: usize,
    /// Tokens of the greedy row
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub greedy_tokens: usize,
    /// Folder for random weights, removed afterwards [default: the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// Longest a row may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub timeout: u64,
    /// Run this one row in this process and print its outcome as JSON
    #[arg(long, value_name = "NAME", hide = true)]
    pub only: Option<String>,
}

/// Runs the check.
pub fn run(args: &GpuCheckArgs) -> anyhow::Result<ExitCode> {
    let scratch = args.scratch.clone().unwrap_or_else(std::env::temp_dir);
    if let Some(row) = &args.only {
        let outcome = one(args, row, &scratch);
        println!("{}", serde_json::to_string(&outcome)?);
        return Ok(ExitCode::SUCCESS);
    }
    let report = doctor::examine();
    println!("{report}");
    if !report.usable() {
        return Ok(ExitCode::FAILURE);
    }
    let seed = args.seed.unwrap_or_else(|| {
        let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        time.map_or(0, |t| t.as_secs())
    });
    println!("seed {seed}\n");
    let wanted = |name: &str, speed: bool| {
        !(speed && args.no_speed) && args.row.as_ref().is_none_or(|text| name.contains(text.as_str()))
    };
    let rows: Vec<&str> = check::names()
        .into_iter()
        .filter(|(n, s)| wanted(n, *s))
        .map(|(n, _)| n)
        .collect();
    anyhow::ensure!(!rows.is_empty(), "no row has that in its name");
    let mut failed = Vec::new();
    for name in rows {
        let start = Instant::now();
        let outcome = in_a_process(args, name, seed, &scratch)?;
        let mark = match outcome.passed {
            Some(true) => "pass",
            Some(false) => "FAIL",
            None => "    ",
        };
        println!(
            "{mark}  {name:20} {:6.1} s  {}",
            start.elapsed().as_secs_f64(),
            outcome.detail
        );
        if outcome.passed == Some(false) {
            failed.push(name);
        }
    }
    match failed.is_empty() {
        true => println!("\nnothing failed"),
        false => println!("\nfailed: {}", failed.join(", ")),
    }
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// One row, in this process.
fn one(args: &GpuCheckArgs, row: &str, scratch: &Path) -> Outcome {
    let failure = |detail: String| Outcome {
        passed: Some(false),
        detail,
    };
    let folder = scratch.join(format!("baton-gpu-check-{}", std::process::id()));
    let outcome = match demo::extract(&folder) {
        Err(error) => failure(format!("the demo model cannot be unpacked: {error:#}")),
        Ok(model) => {
            let open = || CudaDriver::open(args.device);
            let context = Context {
                open: &open,
                seed: args.seed.unwrap_or(0),
                model,
                scratch: scratch.to_owned(),
                layers: args.layers,
                greedy_tokens: args.greedy_tokens,
            };
            check::run(row, &context).unwrap_or_else(|error| failure(error.to_string()))
        }
    };
    // What cannot be removed is only the little demo model.
    let _ = std::fs::remove_dir_all(&folder);
    outcome
}

/// One row in a process of its own, killed when its time is up.
fn in_a_process(args: &GpuCheckArgs, name: &str, seed: u64, scratch: &Path) -> anyhow::Result<Outcome> {
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let mut child = Command::new(program)
        .arg("gpu-check")
        .args(["--only", name, "--seed", &seed.to_string()])
        .args([
            "--device",
            &args.device.to_string(),
            "--layers",
            &args.layers.to_string(),
        ])
        .args(["--greedy-tokens", &args.greedy_tokens.to_string()])
        .arg("--scratch")
        .arg(scratch)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start a process for a row")?;
    // Read meanwhile, so that a talkative row does not wait for its reader.
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (out, err) = (reader(out), reader(err));
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    let status = loop {
        if let Some(status) = child.try_wait().context("cannot wait for a row")? {
            break Some(status);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(LOOK);
    };
    let text = |thread: std::thread::JoinHandle<String>| thread.join().unwrap_or_default();
    let (out, err) = (text(out), text(err));
    let failure = |detail: String| Outcome {
        passed: Some(false),
        detail,
    };
    let Some(status) = status else {
        return Ok(failure(format!("killed after {} s", args.timeout)));
    };
    let answer = out.lines().last().and_then(|line| serde_json::from_str(line).ok());
    Ok(answer.unwrap_or_else(|| {
        let mut detail = format!("the process ended with {status}");
        let last: Vec<&str> = err.lines().rev().take(3).collect();
        for line in last.iter().rev() {
            let _ = write!(detail, "; {line}");
        }
        failure(detail)
    }))
}

fn reader(stream: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(stream) = stream {
            let mut limited = stream.take(ANSWER_BYTES_MAX);
            let _ = limited.read_to_end(&mut bytes);
            // The rest is read and thrown away.
            let _ = std::io::copy(&mut limited.into_inner(), &mut std::io::sink());
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
