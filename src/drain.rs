//! `baton drain`: asks a coordinator to take a worker out of service, and waits until it has left.

use crate::cli::{DrainArgs, Remote};
use crate::up::{print, say};
use anyhow::{Context, anyhow, bail};
use baton_loadtest::{Client, Failure, FailureKind, Target};
use serde::{Deserialize, Serialize};
use std::process::ExitCode;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Longest wait for an answer; a coordinator answers from memory.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(200);
/// Time beyond the worker's own deadline for its goodbye, or for its loss to be noticed.
const GOODBYE_MAX: Duration = Duration::from_secs(10);

/// The worker, as far as draining is concerned.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Worker {
    id: String,
    epoch: u64,
    state: String,
    running: u64,
    waiting: u64,
    transferring: u64,
}

impl Worker {
    fn requests(&self) -> u64 {
        self.running + self.waiting + self.transferring
    }
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    worker: &'a str,
    epoch: u64,
    /// Requests it had when it was asked.
    requests: u64,
    /// Whether it has left.
    left: bool,
    took_ms: u128,
}

/// Drains a worker.
pub fn run(args: &DrainArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(drain(args))
}

async fn drain(args: &DrainArgs) -> anyhow::Result<ExitCode> {
    let Remote { url, api_key } = &args.remote;
    let client = Client::new(Target::parse(url)?, api_key.clone(), ANSWER_MAX);
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if args.worker.is_empty() || !args.worker.chars().all(plain) {
        bail!("{:?} is no worker id; `baton status` lists them", args.worker);
    }
    let started = Instant::now();
    let body = format!("{{\"deadline_ms\": {}}}", u64::from(args.timeout) * 1000);
    let path = format!("/cluster/workers/{}/drain", args.worker);
    let answer = client
        .post(&path, body)
        .await
        .map_err(|failure| explain(url, &failure))?;
    let asked: Worker = serde_json::from_slice(&answer)
        .map_err(|_| anyhow!("{url} answers, but not as a baton coordinator does; name its address with --url"))?;
    if !args.json {
        say(&format!("draining {}: {} requests on it", asked.id, asked.requests()));
    }
    let deadline = started + Duration::from_secs(args.timeout.into()) + GOODBYE_MAX;
    let mut left = false;
    while !left && Instant::now() < deadline {
        sleep(LOOK).await;
        // A coordinator that is gone for a moment does not change what the worker does.
        let Ok(body) = client.get("/cluster/workers").await else {
            continue;
        };
        let workers: Vec<Worker> = serde_json::from_slice(&body).context("the list of workers is not readable")?;
        // Gone, lost, or another life under the same name.
        let here = |worker: &Worker| worker.id == asked.id && worker.epoch == asked.epoch && worker.state != "lost";
        left = !workers.iter().any(here);
    }
    let took = started.elapsed();
    if args.json {
        let outcome = Outcome {
            worker: &asked.id,
            epoch: asked.epoch,
            requests: asked.requests(),
            left,
            took_ms: took.as_millis(),
        };
        print(&(serde_json::to_string(&outcome)? + "\n"));
    } else if left {
        print(&format!("{} has left after {:.1} s\n", asked.id, took.as_secs_f64()));
    }
    if !left {
        bail!(
            "{} is still there {:.0} s after it was told to leave; see its log",
            asked.id,
            took.as_secs_f64()
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn explain(url: &str, failure: &Failure) -> anyhow::Error {
    match failure.kind {
        FailureKind::Connect | FailureKind::Timeout => {
            anyhow!("nothing answers at {url}; name the cluster's address with --url or BATON_URL")
        }
        FailureKind::Status(401 | 403) => {
            anyhow!(
                "{url} wants a key: {}; give it with --api-key or BATON_API_KEY",
                failure.message
            )
        }
        _ => anyhow!("the worker is not drained: {}", failure.message),
    }
}
