//! `baton bench engine`: how fast an engine prefills and decodes, in the definitions of llama.cpp's own benchmarks, and
//! what fraction of the machine's limits that is.
//!
//! - [`BenchPlan`]: what to measure. Prefill of N tokens in chunks (`llama-bench -p N`), decode of one sequence at a depth
//!   (`llama-bench -n .. -d ..`), decode of a batch of sequences (`S_TG t/s` of `llama-batched-bench`).
//! - [`open`]: a model from its path, with what one step of it reads and computes ([`Costs`]).
//! - [`measure`]: runs the plan on any [`Engine`](crate::Engine).
//! - [`Report`]: the figures, as JSON and as a table.
//!
//! It drives the engine directly: no scheduler, no network. `baton bench` measures a whole cluster. Not here: drawing
//! progress (the caller is told), the machine's limits (`baton_kernels::limits`).

mod costs;
mod load;
mod report;
mod run;

pub use baton_kernels::Limits;
pub use costs::Costs;
pub use load::{OpenOptions, Opened, open};
pub use report::{Figure, Report};
pub use run::measure;

use std::fmt;

use serde::Serialize;
use thiserror::Error;

use crate::error::EngineError;
use baton_model::ModelError;

/// Most sequences of a batch figure: far beyond what one CPU serves.
const BATCH_MAX: usize = 4096;
/// Most tokens of one sequence, and most tokens generated: beyond every context in use.
const TOKENS_MAX: usize = 1 << 24;
/// Most repeats of a figure.
const REPEATS_MAX: usize = 1000;

/// One thing to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Workload {
    /// A prompt of so many tokens, from nothing to its first sampled token.
    Prefill {
        /// Tokens of the prompt.
        tokens: usize,
    },
    /// One token at a time for each of `batch` sequences, which have `depth` tokens each to begin with.
    Decode {
        /// Sequences.
        batch: usize,
        /// Tokens of each sequence before the clock starts.
        depth: usize,
    },
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Workload::Prefill { tokens } => write!(f, "prefill {tokens}"),
            Workload::Decode { batch: 1, depth } => write!(f, "decode at {depth}"),
            Workload::Decode { batch, depth } => write!(f, "decode {batch} x at {depth}"),
        }
    }
}

/// What to measure, and how often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BenchPlan {
    /// In this order.
    pub workloads: Vec<Workload>,
    /// Tokens that each sequence of a decode figure generates per repeat.
    pub decode_tokens: usize,
    /// Most prompt tokens of one step.
    pub chunk_tokens: usize,
    /// Measured runs of each figure, after one that only warms up; the median is reported.
    pub repeats: usize,
    /// Seed of the tokens.
    pub seed: u64,
}

impl BenchPlan {
    /// Tokens the longest sequence reaches, and sequences of the widest batch.
    fn extent(&self, workload: Workload) -> (usize, usize) {
        match workload {
            Workload::Prefill { tokens } => (tokens, 1),
            Workload::Decode { batch, depth } => (depth + self.decode_tokens, batch),
        }
    }

    /// KV blocks the most demanding workload needs.
    pub fn blocks_needed(&self, block_size: usize) -> usize {
        let blocks = |workload: &Workload| {
            let (tokens, sequences) = self.extent(*workload);
            tokens.div_ceil(block_size) * sequences
        };
        self.workloads.iter().map(blocks).max().unwrap_or(0)
    }

    /// Sequences of the widest workload.
    pub fn batch_max(&self) -> usize {
        let batches = self.workloads.iter().map(|workload| self.extent(*workload).1);
        batches.max().unwrap_or(1)
    }

    /// Refuses what cannot run on a model with this context.
    ///
    /// # Errors
    /// [`BenchError::Plan`], naming the number.
    pub fn check(&self, context_length: usize) -> Result<(), BenchError> {
        let within = |what: &str, value: usize, max: usize| match value {
            0 => Err(BenchError::Plan(format!("{what} is 0; give at least 1"))),
            _ if value > max => Err(BenchError::Plan(format!("{what} is {value}; give at most {max}"))),
            _ => Ok(()),
        };
        within("the number of generated tokens", self.decode_tokens, TOKENS_MAX)?;
        within("the chunk size", self.chunk_tokens, TOKENS_MAX)?;
        within("the number of repeats", self.repeats, REPEATS_MAX)?;
        for workload in &self.workloads {
            match *workload {
                Workload::Prefill { tokens } => within("the prompt length", tokens, TOKENS_MAX)?,
                Workload::Decode { batch, depth } => {
                    within("the batch size", batch, BATCH_MAX)?;
                    within("the depth", depth.max(1), TOKENS_MAX)?;
                }
            }
            let (tokens, _) = self.extent(*workload);
            if tokens > context_length {
                return Err(BenchError::Plan(format!(
                    "`{workload}` needs sequences of {tokens} tokens and the model's context has {context_length}"
                )));
            }
        }
        Ok(())
    }
}

/// A benchmark that cannot be run.
#[derive(Debug, Error)]
pub enum BenchError {
    /// The plan makes no sense for this model.
    #[error("{0}")]
    Plan(String),
    /// The model cannot be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A step failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}
