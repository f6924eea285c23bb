//! What can go wrong between a model's name and its first forward pass. Every message says what happened and what to
//! do about it, in one sentence fit to be shown to whoever started the process.

use std::path::{Path, PathBuf};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Neither a directory nor something that looks like a hub id.
    #[error(
        "no model at `{spec}`: it is neither a directory on this machine nor a hub id of the form `org/name` or \
         `org/name@revision`"
    )]
    NotFound {
        /// What was asked for.
        spec: String,
    },
    /// A single weights file was given where a model directory is needed, or a format that is not read yet.
    #[error("`{path}` {reason}")]
    UnsupportedFormat {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and the way out.
        reason: String,
    },
    /// Downloading from the hub failed.
    #[error("could not download {what} of `{repo}` from the hub: {reason}")]
    Hub {
        /// `org/name@revision`.
        repo: String,
        /// File or listing.
        what: String,
        /// Cause and way out.
        reason: String,
    },
    /// A file could not be read.
    #[error("could not read `{path}`: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// `config.json` or `generation_config.json` is not what it should be.
    #[error("`{path}` is not a usable model configuration: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A GGUF file is damaged.
    #[error("`{path}` is not a usable GGUF file: {reason}; the download may be incomplete")]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The model is of a kind, or uses a feature, that this engine does not compute.
    #[error("this model is not supported: {reason}")]
    Unsupported {
        /// The cause, and what is supported.
        reason: String,
    },
    /// The weight files are damaged or do not match the configuration.
    #[error("`{path}` does not hold the weights the configuration asks for: {reason}")]
    Weights {
        /// File or directory.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Weights, KV cache and scratch do not fit the memory at hand.
    #[error("{0}")]
    DoesNotFit(String),
    /// A model, or the threads at hand, cannot be divided among that many tensor-parallel ranks.
    #[error("cannot run tensor-parallel: {0}")]
    TensorParallel(String),
    /// A tensor-parallel rank failed, and the others with it: the model computes nothing any more.
    #[error("tensor-parallel rank {rank} failed: {reason}; the worker must be started again")]
    Rank {
        /// The first that failed.
        rank: usize,
        /// Why.
        reason: String,
    },
    /// The device failed: it computes nothing for this process any more.
    #[error("{0}")]
    Device(String),
    /// A batch the decoder cannot compute; a bug of the caller, reported instead of computed wrongly.
    #[error("cannot run this batch: {0}")]
    Batch(String),
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        ModelError::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn weights(path: &Path, reason: impl Into<String>) -> Self {
        ModelError::Weights {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn gguf(path: &Path, reason: impl Into<String>) -> Self {
        ModelError::Gguf {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn unsupported(reason: impl Into<String>) -> Self {
        ModelError::Unsupported { reason: reason.into() }
    }

    pub(crate) fn batch(reason: impl Into<String>) -> Self {
        ModelError::Batch(reason.into())
    }
}
