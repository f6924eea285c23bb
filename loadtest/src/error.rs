//! What stops a run before it starts. Failures of single requests are not errors here: they are counted and reported.

use std::path::PathBuf;

/// Why a run could not start.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The URL cannot be used.
    #[error("cannot use the URL {url:?}: {reason}")]
    Url {
        /// As given.
        url: String,
        /// What is wrong with it and what would do.
        reason: String,
    },
    /// An option is out of range.
    #[error("{option} is {value}: {expected}")]
    Option {
        /// The option's flag.
        option: &'static str,
        /// As given.
        value: String,
        /// What would do.
        expected: &'static str,
    },
    /// The trace file cannot be read.
    #[error("cannot read the trace {path}: {source}")]
    TraceFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line of the trace is not what its format promises.
    #[error("line {line} of the trace is unusable: {reason}")]
    TraceLine {
        /// One-based.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The simulated workers cannot be.
    #[error("the workers cannot be simulated: {0}")]
    Simulation(String),
    /// No model was named and the server could not be asked for one.
    #[error(
        "no model was given and asking {url} for its models failed: {reason}; start the server or name one with --model"
    )]
    NoModel {
        /// The URL asked.
        url: String,
        /// Why it failed.
        reason: String,
    },
}
