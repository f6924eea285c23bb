//! The `baton` binary: argument parsing and wiring. What the commands do lives in the crates; the one thing that lives
//! here is `baton up`, which runs the other commands as child processes (module [`up`]).
//!
//! Errors end here: each is one line on stderr, and the exit code is 1 (2 for arguments that clap refuses).
#![forbid(unsafe_code)]

mod cli;
mod config_file;
mod demo;
mod process;
mod serve;
mod status;
mod telemetry;
mod up;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::parse();
    let result = match cli.command {
        cli::Command::Up(args) => up::run(args),
        cli::Command::Coordinator(args) => serve::coordinator(&args),
        cli::Command::Worker(args) => serve::worker(&args),
        cli::Command::Status(args) => status::run(&args),
        cli::Command::Bench(args) => cli::bench::run(args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("baton: {}", one_line(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

/// Errors of libraries may span lines (TOML shows the spot); a sentence does not.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
