//! The `baton` binary: argument parsing and wiring. What the commands do lives in the crates; the one thing that lives
//! here is `baton up`, which runs the other commands as child processes (module [`up`]).
//!
//! Errors end here: each is one line on stderr, and the exit code is 1 (2 for arguments that clap refuses).
#![forbid(unsafe_code)]

mod accounts;
mod cli;
mod config_file;
mod coordinators;
mod demo;
mod drain;
mod ledger;
mod model_dir;
mod prices;
mod process;
mod serve;
mod snapshot;
mod status;
mod telemetry;
mod up;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::parse();
    let result = match cli.command {
        cli::Command::Up(args) => up::run(*args),
        cli::Command::Coordinator(args) => serve::coordinator(&args),
        cli::Command::Worker(args) => serve::worker(&args),
        cli::Command::Coordinators(args) => coordinators::run(&args.action),
        cli::Command::Snapshot(args) => snapshot::run(&args.action),
        cli::Command::Status(args) => status::run(&args),
        cli::Command::Drain(args) => drain::run(&args),
        cli::Command::Ledger(command) => ledger::run(&command),
        cli::Command::Prices(command) => prices::run(&command),
        cli::Command::Keys(command) => accounts::keys(&command),
        cli::Command::Projects(command) => accounts::projects(&command),
        cli::Command::Deployments(command) => accounts::deployments(&command),
        cli::Command::Budgets(command) => accounts::budgets(&command),
        cli::Command::Usage(args) => accounts::usage(&args),
        cli::Command::Costs(args) => accounts::costs(&args),
        cli::Command::Audit(args) => accounts::audit(&args),
        cli::Command::ConvertTokenizer(args) => {
            model_dir::convert_tokenizer(&args.file, &args.directory).map(|()| ExitCode::SUCCESS)
        }
        cli::Command::Mock(args) => up::mock::run(*args),
        cli::Command::Doctor(args) => cli::doctor::run(args),
        cli::Command::GpuCheck(args) => cli::gpu_check::run(&args),
        cli::Command::Bench(args) => cli::bench::run(*args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            up::say(&format!("baton: {}", sentence(&error)));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes as one line. Many messages already quote their cause, and some span lines (TOML shows the
/// spot); a sentence does neither twice nor that.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_sentence_says_everything_once() {
        let cause = || std::io::Error::other("no such\n  file");
        let outer = Err::<(), _>(cause()).context("cannot read x");
        assert_eq!(sentence(&outer.expect_err("is one")), "cannot read x: no such file");
        let quoting = Err::<(), _>(cause()).context("cannot read x: no such file; make one");
        assert_eq!(
            sentence(&quoting.expect_err("is one")),
            "cannot read x: no such file; make one"
        );
    }
}
