//! `baton mock`: a coordinator as its own process, and any number of mock workers in this one.
//!
//! Everything between them is real: identities and mutual TLS, registration, heartbeats, request streams, hand-overs
//! between prefill and decode workers. Only the engines are mocks, so that hundreds of workers fit one machine. For load
//! tests and for looking at a large cluster's behaviour; nothing is restarted, and the answers mean nothing.

use super::announce::{Ready, ReadyProcess};
use super::data_dir::DataDir;
use super::progress::{self, Progress, say};
use super::supervisor::{Event, Supervisor};
use super::{COORDINATOR, COORDINATOR_START_MAX, READY_MAX, child, coordinator_serves, is_ready, reachable, utf8};
use crate::cli::mock::MockArgs;
use crate::process::StopSignals;
use crate::{demo, model_dir};
use anyhow::{Context, anyhow, bail};
use baton_identity::{Authority, Role};
use baton_loadtest::{Client, Target};
use baton_model::gguf::gguf_file;
use baton_worker::{Startup, WorkerConfig, WorkerError, WorkerRole};
use serde_json::json;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Name of the model in which a word is a token.
const WORD_MODEL: &str = "words";
/// Name of the workers' line in the progress display.
const WORKERS: &str = "workers";
/// Time for a registration; they run side by side, so hundreds take a few seconds in all.
const REGISTER_MAX: Duration = Duration::from_secs(120);
/// Time for all workers to say goodbye.
const WORKERS_STOP: Duration = Duration::from_secs(5);
/// Redraw interval while workers register.
const REGISTER_POLL: Duration = Duration::from_millis(100);

/// Runs the cluster until it is told to stop.
pub fn run(args: MockArgs) -> anyhow::Result<ExitCode> {
    if args.workers().is_empty() {
        bail!("there would be no worker; give --workers, or --prefill and --decode");
    }
    let root = match &args.data_dir {
        Some(root) => root.clone(),
        None => DataDir::default_place()?.join("mock"),
    };
    let data = DataDir::open(Some(root))?;
    // The supervisor's thread must be this one (see the parent module), the workers want several.
    let workers = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    let supervisor = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let result = supervisor.block_on(async {
        let mut signals = StopSignals::new().context("cannot listen for signals")?;
        let mut processes = Supervisor::new();
        let mut hosted = Hosted::new(workers.handle().clone());
        let outcome = tokio::select! {
            outcome = serve(&args, &data, &mut processes, &mut hosted) => outcome,
            () = signals.recv() => Ok(()),
        };
        let _ = std::fs::remove_file(data.ready_file());
        if outcome.is_ok() {
            say("stopping; once more forces");
        }
        processes.stop(signals.recv()).await;
        hosted.stop().await;
        outcome
    });
    workers.shutdown_background();
    supervisor.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

/// Mock workers that run in this process.
struct Hosted {
    runtime: tokio::runtime::Handle,
    tasks: JoinSet<(String, Result<(), WorkerError>)>,
    registered: Arc<AtomicUsize>,
    shutdown: CancellationToken,
}

impl Hosted {
    fn new(runtime: tokio::runtime::Handle) -> Self {
        Self {
            runtime,
            tasks: JoinSet::new(),
            registered: Arc::default(),
            shutdown: CancellationToken::new(),
        }
    }

    fn start(&mut self, config: WorkerConfig) {
        let (name, registered, shutdown) = (config.worker_id.clone(), self.registered.clone(), self.shutdown.clone());
        let first = std::sync::Once::new();
        let startup = Arc::new(move |event| {
            if let Startup::Registered { .. } = event {
                first.call_once(|| {
                    registered.fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        let task = async move { (name, baton_worker::run(config, startup, shutdown).await) };
        self.tasks.spawn_on(task, &self.runtime);
    }

    /// Returns when a worker has ended, which none should by itself.
    async fn failed(&mut self) -> anyhow::Error {
        match self.tasks.join_next().await {
            Some(Ok((name, Err(error)))) => anyhow!("{name} ended: {error}"),
            Some(Ok((name, Ok(())))) => anyhow!("{name} was told to stop by the coordinator"),
            Some(Err(error)) => anyhow!("a worker ended: {error}"),
            None => std::future::pending().await,
        }
    }

    async fn stop(mut self) {
        self.shutdown.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        let _ = timeout(WORKERS_STOP, all).await;
    }
}

async fn serve(args: &MockArgs, data: &DataDir, processes: &mut Supervisor, hosted: &mut Hosted) -> anyhow::Result<()> {
    let workers = args.workers();
    let (model_path, default_name) = match &args.model {
        None if args.word_model => {
            let files = baton_loadtest::word_model::files();
            let files = files.each_ref().map(|(name, text)| (*name, text.as_bytes()));
            (
                model_dir::place(&data.models(), WORD_MODEL, &files)?,
                WORD_MODEL.to_owned(),
            )
        }
        None => (demo::extract(&data.models())?, demo::NAME.to_owned()),
        Some(path) => (path.clone(), super::plan::model_name(&path.to_string_lossy(), path)),
    };
    // The mock needs config.json, the coordinator the tokenizer: of a GGUF file both come from the directory made of it.
    let model_path = match gguf_file(&model_path)? {
        Some(file) => model_dir::place_gguf_text(&file, &data.models())?,
        None => model_path,
    };
    let model_name = args.model_name.clone().unwrap_or(default_name);
    let authority = Authority::load_or_create(&data.identity())?;
    let issue = |role, name: &str| authority.issue(role, name)?.save(&data.identity(), name);
    issue(Role::Coordinator, COORDINATOR)?;
    for (name, _) in &workers {
        issue(Role::Worker, name)?;
    }

    let mut display = Progress::new();
    display.begin(COORDINATOR, "starting");
    let mut config = json!({
        "name": COORDINATOR,
        "data_dir": utf8(&data.state(COORDINATOR)),
        "http_addr": SocketAddr::from(([127, 0, 0, 1], args.port)),
        "cluster_addr": SocketAddr::from(([127, 0, 0, 1], 0)),
        "identity_dir": utf8(&data.identity()),
        "models": [{"name": model_name, "path": utf8(&model_path)}],
    });
    config["routing"] = json!(args.routing);
    if let Some(tokens) = args.prefill_threshold {
        config["prefill_threshold_tokens"] = json!(tokens);
    }
    let coordinator = processes.start(child(data, COORDINATOR, "coordinator", &config)?)?;
    let (_, http_addr, cluster_addr) = timeout(COORDINATOR_START_MAX, coordinator_serves(processes, &mut display))
        .await
        .map_err(|_| anyhow!("the coordinator did not start in time; see its log"))??;
    display.done(COORDINATOR, &format!("listening on {http_addr}"));

    display.begin(WORKERS, "starting");
    for (name, role) in &workers {
        hosted.start(worker_config(
            args,
            data,
            name,
            *role,
            &model_path,
            &model_name,
            cluster_addr,
        ));
    }
    registered(hosted, processes, &mut display, workers.len()).await?;
    let url = format!("http://{}", reachable(http_addr));
    let client = Client::new(Target::parse(&url)?, None, READY_MAX);
    is_ready(client, processes).await?;
    display.close();

    let ready = Ready {
        url,
        model: model_name,
        pid: std::process::id(),
        coordinators: vec![super::process(processes, coordinator, "coordinator")],
        workers: workers
            .iter()
            .map(|(name, role)| ReadyProcess {
                name: name.clone(),
                role: role_name(*role),
                pid: std::process::id(),
                url: None,
            })
            .collect(),
    };
    ready.write(&data.ready_file())?;
    progress::print(&ready.welcome(&data.logs(), false));
    tokio::select! {
        error = hosted.failed() => Err(error),
        error = coordinator_died(processes) => Err(error),
    }
}

async fn coordinator_died(processes: &mut Supervisor) -> anyhow::Error {
    loop {
        if let Event::Died { why, .. } = processes.next().await {
            return anyhow!("the coordinator died: {why}");
        }
    }
}

async fn registered(
    hosted: &mut Hosted,
    processes: &mut Supervisor,
    display: &mut Progress,
    count: usize,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + REGISTER_MAX;
    let mut shown = usize::MAX;
    loop {
        let done = hosted.registered.load(Ordering::Relaxed);
        // On a terminal every change, in a log every tenth of them.
        if shown == usize::MAX || done == count || done >= shown + count.div_ceil(10) {
            display.update(WORKERS, &format!("{done} of {count} registered"));
            shown = done;
        }
        if done == count {
            display.done(WORKERS, &format!("{count} registered"));
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!(
                "only {done} of {count} workers registered within {} s; this machine may be too small for so many",
                REGISTER_MAX.as_secs()
            );
        }
        tokio::select! {
            () = sleep(REGISTER_POLL) => {}
            error = hosted.failed() => return Err(error),
            error = coordinator_died(processes) => return Err(error),
        }
    }
}

fn worker_config(
    args: &MockArgs,
    data: &DataDir,
    name: &str,
    role: WorkerRole,
    model_path: &std::path::Path,
    model_name: &str,
    coordinator: SocketAddr,
) -> WorkerConfig {
    let config = WorkerConfig::new(
        name.to_owned(),
        model_path.to_owned(),
        model_name.to_owned(),
        vec![coordinator],
        data.identity(),
    );
    WorkerConfig {
        worker_id: name.to_owned(),
        role,
        engine: baton_worker::EngineKind::Mock,
        mock: baton_worker::MockSettings {
            profile: args.profile,
            speed: args.speed,
            answers: baton_worker::MockAnswers::Cheap,
        },
        kv_bytes: args.kv_mem.unwrap_or(args.profile.kv_bytes),
        batch_tokens_max: args.batch_tokens_max,
        seqs_max: args.seqs_max,
        // The pace of streams is that of the machine pretended to be.
        step_target_ms: match args.speed > 0.0 {
            true => ((config.step_target_ms as f64 / args.speed).round() as u64).max(1),
            false => config.step_target_ms,
        },
        ..config
    }
}

fn role_name(role: WorkerRole) -> &'static str {
    match role {
        WorkerRole::Prefill => "prefill",
        WorkerRole::Decode => "decode",
        WorkerRole::Combined => "combined",
    }
}
