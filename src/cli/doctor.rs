//! `baton doctor`: the report of `baton-cuda`, printed.

use clap::Args;
use std::io::Write;
use std::process::ExitCode;

/// Flags of `baton doctor`.
#[derive(Debug, Clone, Copy, Args)]
pub struct DoctorArgs {
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

/// Examines the machine.
pub fn run(args: DoctorArgs) -> anyhow::Result<ExitCode> {
    let report = baton_cuda::doctor::examine();
    let text = match args.json {
        true => serde_json::to_string_pretty(&report)? + "\n",
        false => report.to_string(),
    };
    // A reader that has gone (`| head`) is no failure.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    Ok(match report.usable() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}
