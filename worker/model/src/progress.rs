//! How long work (downloading, hashing, loading) tells whoever started it how far it is. Draws nothing.

use std::fmt;
use std::sync::{Mutex, PoisonError};

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage<'a> {
    /// Downloading this file from the hub; bytes.
    Download(&'a str),
    /// Reading weights to compute the model's digest; bytes.
    Digest,
    /// Bringing weights into memory; bytes.
    Load,
}

impl fmt::Display for Stage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stage::Download(file) => write!(f, "downloading {file}"),
            Stage::Digest => f.write_str("checking weights"),
            Stage::Load => f.write_str("loading weights"),
        }
    }
}

/// Receives progress. Called often (at most every mebibyte or so): do not block.
pub trait Progress: Send + Sync {
    /// `done` of `total` bytes; the last call of a stage has `done == total`.
    fn update(&self, stage: Stage<'_>, done: u64, total: u64);
}

/// Says nothing to nobody.
impl Progress for () {
    fn update(&self, _: Stage<'_>, _: u64, _: u64) {}
}

impl<F: Fn(Stage<'_>, u64, u64) + Send + Sync> Progress for F {
    fn update(&self, stage: Stage<'_>, done: u64, total: u64) {
        self(stage, done, total)
    }
}

/// Several ranks that do the same work at once, seen as one: their mean.
pub(crate) struct SharedProgress<'a> {
    progress: &'a dyn Progress,
    /// Bytes each rank has done. Held while telling, so that what is told only grows.
    done: Mutex<Vec<u64>>,
}

impl<'a> SharedProgress<'a> {
    pub fn new(progress: &'a dyn Progress, ranks: usize) -> Self {
        SharedProgress {
            progress,
            done: Mutex::new(vec![0; ranks]),
        }
    }

    /// The progress of one rank, all of whose stages have the same total.
    pub fn rank(&self, rank: usize) -> impl Progress {
        move |stage: Stage<'_>, done: u64, total: u64| {
            let mut all = self.done.lock().unwrap_or_else(PoisonError::into_inner);
            all[rank] = done;
            let sum: u128 = all.iter().map(|d| u128::from(*d)).sum();
            let mean = u64::try_from(sum / all.len() as u128).unwrap_or(u64::MAX);
            self.progress.update(stage, mean, total);
        }
    }
}
