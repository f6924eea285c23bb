//! `baton coordinator` and `baton worker`: configuration in, the crate's `run` called, its end turned into an exit code.

use crate::cli::ServeArgs;
use crate::process::{Report, Reporter, follow_supervisor, shutdown_token};
use crate::{config_file, telemetry};
use anyhow::Context;
use baton_coordinator::CoordinatorConfig;
use baton_worker::{Startup, WorkerConfig};
use std::future::Future;
use std::process::ExitCode;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Environment variables that override a coordinator's file.
const COORDINATOR_ENV: &str = "BATON_COORDINATOR_";
/// Environment variables that override a worker's file.
const WORKER_ENV: &str = "BATON_WORKER_";

/// Runs a coordinator until it is told to stop.
pub fn coordinator(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    serve(
        args,
        "coordinator",
        COORDINATOR_ENV,
        |config: CoordinatorConfig, reporter, shutdown| async move {
            let (ready, is_ready) = tokio::sync::oneshot::channel();
            tokio::spawn(async move {
                if let Ok(baton_coordinator::Ready {
                    http_addr,
                    cluster_addr,
                }) = is_ready.await
                {
                    reporter.send(&Report::Serving {
                        http_addr,
                        cluster_addr,
                    });
                }
            });
            Ok(baton_coordinator::run(config, ready, shutdown).await?)
        },
    )
}

/// Runs a worker until it is told to stop.
pub fn worker(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    serve(
        args,
        "worker",
        WORKER_ENV,
        |config: WorkerConfig, reporter, shutdown| async move {
            let startup = move |startup| {
                reporter.send(&match startup {
                    Startup::Loading { done, total } => Report::Loading { done, total },
                    Startup::Listening { .. } => Report::Listening,
                    Startup::Registered { .. } => Report::Registered,
                });
            };
            Ok(baton_worker::run(config, Arc::new(startup), shutdown).await?)
        },
    )
}

/// The frame around both: supervision, configuration, telemetry, runtime, signals, and the sentence at the end.
fn serve<C, F>(
    args: &ServeArgs,
    service: &'static str,
    env_prefix: &str,
    run: impl FnOnce(C, Arc<Reporter>, CancellationToken) -> F,
) -> anyhow::Result<ExitCode>
where
    C: serde::de::DeserializeOwned,
    F: Future<Output = anyhow::Result<()>>,
{
    if let Some(supervisor) = args.supervisor {
        follow_supervisor(supervisor);
    }
    let supervised = args.supervisor.is_some();
    let reporter = Arc::new(Reporter::new(supervised));
    let attempt = || {
        // A supervisor's file is complete; what a user exports for other processes must not bend it.
        let config: C = config_file::load(&args.config, (!supervised).then_some(env_prefix))?;
        let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
        runtime.block_on(async {
            let _telemetry = telemetry::start(service)?;
            let shutdown = shutdown_token(supervised).context("cannot listen for signals")?;
            run(config, reporter.clone(), shutdown).await
        })
    };
    match attempt() {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            let message = crate::sentence(&error);
            tracing::error!(%message, "ended");
            reporter.send(&Report::Failed { message });
            Err(error)
        }
    }
}
