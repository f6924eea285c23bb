//! `baton up`: a real little cluster on this machine.
//!
//! ```text
//! flags ─▶ lock data dir ─▶ port free? ─▶ model found, supported, fits? ─▶ identities ─▶ coordinator serves
//!                                                                                           │
//!    exit ◀─ workers stopped ◀─ coordinator stopped ◀─ signal ─ serving, restarting ◀─ /ready ◀─ workers registered
//! ```
//!
//! Until the cluster serves, any failure ends everything with one sentence. Once it serves, a process that dies is
//! restarted (`restart.rs`), and only when nothing is left to serve with does `up` give up. However `up` ends, its
//! children end with it: see `process.rs`.
//!
//! The supervisor runs on one thread, the main one, on purpose: the kernel kills a child when the *thread* that made
//! it ends.

mod announce;
mod child;
mod coordinators;
mod data_dir;
mod log_file;
mod memory;
pub mod mock;
mod plan;
mod progress;
mod restart;
mod supervisor;

use crate::cli::UpArgs;
use crate::process::{Report, StopSignals};
use announce::{Ready, ReadyProcess};
use anyhow::{Context, anyhow, bail};
use baton_identity::{Authority, Role as IdentityRole};
use baton_loadtest::{Client, Target, Trust};
use child::ChildSpec;
use data_dir::{DataDir, write_private};
use log_file::LogFile;
use plan::{BATCH_TOKENS_MAX, BLOCK_TOKENS, Plan, SEQUENCES_MAX};
use progress::Progress;
pub use progress::{print, say};
use restart::Verdict;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use supervisor::{Event, Slot, Supervisor};
use tokio::time::{Instant, sleep, timeout};

/// Name of the first coordinator.
const COORDINATOR: &str = "coordinator-0";
/// Time for a coordinator to replay its log and listen.
const COORDINATOR_START_MAX: Duration = Duration::from_secs(60);
/// Time for the workers to load and register. Large models from a slow disk take minutes.
const WORKERS_START_MAX: Duration = Duration::from_secs(1800);
/// Time from the last registration to a coordinator that takes requests.
const READY_MAX: Duration = Duration::from_secs(30);
/// Pause between two looks at `/ready`.
const READY_POLL: Duration = Duration::from_millis(25);

/// Runs a cluster until it is told to stop.
pub fn run(args: UpArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let result = runtime.block_on(async {
        let mut signals = StopSignals::new().context("cannot listen for signals")?;
        up(args, &mut signals).await
    });
    // A download that was interrupted may still sit in a blocking thread.
    runtime.shutdown_background();
    result
}

async fn up(args: UpArgs, signals: &mut StopSignals) -> anyhow::Result<ExitCode> {
    let data = DataDir::open(args.data_dir.clone())?;
    let http_addr = Plan::check_flags(&args)?;
    let mut progress = Progress::new();

    let planning = tokio::task::spawn_blocking(move || {
        let plan = Plan::make(&args, http_addr, &data, &mut progress);
        plan.map(|plan| (plan, data, progress))
    });
    let (plan, data, mut progress) = tokio::select! {
        planned = planning => planned.context("planning ended unexpectedly")??,
        () = signals.recv() => return Ok(interrupted()),
    };
    issue_identities(&data, &plan)?;

    let mut supervisor = Supervisor::new();
    let outcome = tokio::select! {
        outcome = start_and_serve(&plan, &data, &mut supervisor, &mut progress) => outcome,
        () = signals.recv() => Ok(()),
    };
    progress.close();
    let serving = std::fs::remove_file(data.ready_file()).is_ok();
    if outcome.is_ok() {
        say("stopping; once more forces");
    }
    supervisor.stop(signals.recv()).await;
    match outcome {
        Ok(()) if serving => {
            say("stopped");
            Ok(ExitCode::SUCCESS)
        }
        Ok(()) => Ok(interrupted()),
        Err(error) => Err(error),
    }
}

/// The shell's code for "ended by Ctrl-C": the cluster never served.
fn interrupted() -> ExitCode {
    ExitCode::from(130)
}

/// Starts everything, then serves; returns only with an error.
async fn start_and_serve(
    plan: &Plan,
    data: &DataDir,
    supervisor: &mut Supervisor,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    let (coordinators, seats) = coordinators::start(plan, data, supervisor, progress).await?;
    let cluster_addrs: Vec<SocketAddr> = seats.iter().map(|seat| seat.cluster_addr).collect();

    let mut workers = Vec::new();
    for (name, role) in &plan.workers {
        progress.begin(name, "starting");
        let config = worker_config(plan, data, name, role.name(), &cluster_addrs);
        workers.push(supervisor.start(child(data, name, "worker", &config)?)?);
    }
    timeout(WORKERS_START_MAX, workers_register(supervisor, progress, &workers))
        .await
        .map_err(|_| {
            anyhow!(
                "the workers did not start within {} minutes; see their logs",
                WORKERS_START_MAX.as_secs() / 60
            )
        })??;

    let url = seats[0].url();
    for seat in &seats {
        is_ready(client(&seat.url(), plan)?, supervisor).await?;
    }
    progress.close();

    let ready = |supervisor: &Supervisor| Ready {
        url: url.clone(),
        model: plan.model_name.clone(),
        pid: std::process::id(),
        coordinators: coordinators
            .iter()
            .zip(&seats)
            .map(|(slot, seat)| ReadyProcess {
                url: Some(seat.url()),
                ..process(supervisor, *slot, "coordinator")
            })
            .collect(),
        workers: workers
            .iter()
            .zip(&plan.workers)
            .map(|(slot, (_, role))| process(supervisor, *slot, role.name()))
            .collect(),
    };
    let now = ready(supervisor);
    now.write(&data.ready_file())?;
    print(&now.welcome(&data.logs(), plan.api_key.is_some() || !plan.tenants.is_empty()));
    loop {
        match supervisor.next().await {
            Event::Report(slot, Report::Serving { .. } | Report::Registered) => {
                say(&format!("{} is up", supervisor.describe(slot).0));
            }
            Event::Report(..) => {}
            Event::Restarted => ready(supervisor).write(&data.ready_file())?,
            Event::Left(slot) => {
                let name = supervisor.describe(slot).0;
                if coordinators.iter().all(|slot| supervisor.is_out(*slot)) {
                    bail!("{name} was told to stop, and without a coordinator nothing is served");
                }
                say(&format!("{name} has left, as it was told to; it is not started again"));
                if workers.contains(&slot) && workers.iter().all(|w| supervisor.is_out(*w)) {
                    say("no worker is left; requests are refused until `baton up` is started anew");
                }
                ready(supervisor).write(&data.ready_file())?;
            }
            Event::Died { slot, why, verdict } => {
                let name = supervisor.describe(slot).0;
                match verdict {
                    Verdict::RestartAfter(pause) => {
                        say(&format!(
                            "{name} died: {why}; starting it again in {:.1} s",
                            pause.as_secs_f64()
                        ));
                    }
                    Verdict::GiveUp => {
                        let sentence = format!(
                            "{name} died {} times in a row and is left dead: {why}",
                            restart::FAST_DEATHS_MAX + 1
                        );
                        let nothing_left = coordinators.iter().all(|c| supervisor.is_out(*c))
                            || workers.iter().all(|w| supervisor.is_out(*w));
                        if nothing_left {
                            bail!(sentence);
                        }
                        say(&sentence);
                    }
                }
                ready(supervisor).write(&data.ready_file())?;
            }
        }
    }
}

fn process(supervisor: &Supervisor, slot: Slot, role: &'static str) -> ReadyProcess {
    let (name, pid) = supervisor.describe(slot);
    ReadyProcess {
        name: name.to_owned(),
        role,
        pid,
        url: None,
    }
}

/// A starting process died: that ends the start.
fn start_failed(supervisor: &Supervisor, slot: Slot, why: &str) -> anyhow::Error {
    anyhow!("{} could not start: {why}", supervisor.describe(slot).0)
}

async fn coordinator_serves(
    supervisor: &mut Supervisor,
    progress: &mut Progress,
) -> anyhow::Result<(Slot, SocketAddr, SocketAddr)> {
    loop {
        match supervisor.next().await {
            Event::Report(
                slot,
                Report::Serving {
                    http_addr,
                    cluster_addr,
                },
            ) => return Ok((slot, http_addr, cluster_addr)),
            Event::Died { slot, why, .. } => return Err(start_failed(supervisor, slot, &why)),
            Event::Report(..) | Event::Restarted | Event::Left(_) => progress.update(COORDINATOR, "starting"),
        }
    }
}

async fn workers_register(
    supervisor: &mut Supervisor,
    progress: &mut Progress,
    workers: &[Slot],
) -> anyhow::Result<()> {
    while !workers.iter().all(|slot| supervisor.is_up(*slot)) {
        match supervisor.next().await {
            Event::Report(slot, report) => {
                let name = supervisor.describe(slot).0.to_owned();
                match report {
                    Report::Loading { done, total } => progress.bytes(&name, "loading the model", done, total),
                    Report::Listening => progress.update(&name, "loaded, registering"),
                    Report::Registered => progress.done(&name, "registered"),
                    Report::Serving { .. } | Report::Failed { .. } => {}
                }
            }
            Event::Died { slot, why, .. } => return Err(start_failed(supervisor, slot, &why)),
            Event::Left(slot) => return Err(start_failed(supervisor, slot, "it was told to stop")),
            Event::Restarted => {}
        }
    }
    Ok(())
}

/// Waits until the coordinator itself says that it takes requests.
/// Asks a coordinator just started.
fn client(url: &str, plan: &Plan) -> anyhow::Result<Client> {
    let mut client = Client::new(Target::parse(url)?, plan.api_key.clone(), READY_MAX);
    if let Some((cert, _)) = &plan.tls {
        // Whose root and which names are the user's business; that it is the server just started is all to know here.
        let pem = std::fs::read(cert).with_context(|| format!("cannot read {}", cert.display()))?;
        client = client.trusting(Trust::pinned(&pem).map_err(anyhow::Error::msg)?);
    }
    Ok(client)
}

async fn is_ready(client: Client, supervisor: &mut Supervisor) -> anyhow::Result<()> {
    let deadline = Instant::now() + READY_MAX;
    loop {
        let failure = tokio::select! {
            answer = client.get("/ready") => match answer {
                Ok(_) => return Ok(()),
                Err(failure) => failure,
            },
            event = supervisor.next() => match event {
                Event::Died { slot, why, .. } => return Err(start_failed(supervisor, slot, &why)),
                Event::Left(slot) => return Err(start_failed(supervisor, slot, "it was told to stop")),
                _ => continue,
            },
        };
        if Instant::now() >= deadline {
            bail!(
                "the cluster started but does not take requests: {}; see the logs",
                failure.message
            );
        }
        sleep(READY_POLL).await;
    }
}

/// How this machine reaches a listening address: a wildcard is no destination.
fn reachable(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => SocketAddr::from(([127, 0, 0, 1], v4.port())),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], v6.port())),
        addr => addr,
    }
}

fn issue_identities(data: &DataDir, plan: &Plan) -> anyhow::Result<()> {
    let authority = Authority::load_or_create(&data.identity())?;
    let workers = plan
        .workers
        .iter()
        .map(|(name, _)| (name.as_str(), IdentityRole::Worker));
    for (name, role) in workers {
        authority.issue(role, name)?.save(&data.identity(), name)?;
    }
    for index in 0..plan.coordinators {
        let name = coordinators::name(index);
        authority
            .issue(IdentityRole::Coordinator, &name)?
            .save(&data.identity(), &name)?;
    }
    Ok(())
}

fn child(data: &DataDir, name: &str, command: &'static str, config: &Value) -> anyhow::Result<ChildSpec> {
    let log = data.logs().join(format!("{name}.log"));
    LogFile::truncate(&log).with_context(|| format!("cannot write the log {}", log.display()))?;
    Ok(ChildSpec {
        name: name.to_owned(),
        command,
        config: write_config(data, name, config)?,
        log,
    })
}

fn write_config(data: &DataDir, name: &str, config: &Value) -> anyhow::Result<std::path::PathBuf> {
    let path = data.config().join(format!("{name}.toml"));
    let text = toml::to_string(config).context("a configuration could not be written as TOML")?;
    write_private(
        &path,
        &format!("# Written by `baton up` at every start; changes are lost.\n{text}"),
    )?;
    Ok(path)
}

fn utf8(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A worker's settings, likewise.
fn worker_config(plan: &Plan, data: &DataDir, name: &str, role: &str, coordinators: &[SocketAddr]) -> Value {
    let mut tiers = json!({"host": plan.kv_host_bytes});
    if plan.kv_disk_bytes > 0 {
        tiers["disk_dir"] = json!(utf8(&data.state(name).join("kv")));
        tiers["disk"] = json!(plan.kv_disk_bytes);
    }
    if let Some(url) = &plan.kv_object_url {
        tiers["object_url"] = json!(url);
    }
    let mut config = json!({
        "worker_id": name,
        "role": role,
        "model_path": utf8(&plan.model_path),
        "model_name": plan.model_name,
        "coordinator_addrs": coordinators,
        "identity_dir": utf8(&data.identity()),
        "threads": plan.threads,
        "tensor_parallel": plan.tensor_parallel,
        "quantization": plan.quantization,
        "kv_compression": plan.kv_compression,
        "cores_shared": plan.cores_shared,
        "kv_bytes": plan.kv_bytes,
        "block_size": BLOCK_TOKENS,
        "batch_tokens_max": BATCH_TOKENS_MAX,
        "seqs_max": SEQUENCES_MAX,
        "tiers": tiers,
    });
    if let Some(step_target_ms) = plan.step_target_ms {
        config["step_target_ms"] = step_target_ms.into();
    }
    config
}
