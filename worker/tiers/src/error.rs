//! Why a tier could not be opened. Once open, a tier has no errors: what fails is a miss or a dropped write.

use std::path::PathBuf;

/// Errors of opening a tier.
#[derive(Debug, thiserror::Error)]
pub enum TierError {
    /// The directory cannot be used.
    #[error("cannot keep KV blocks in {}: {source}; give a writable directory", path.display())]
    Directory {
        /// The directory or a file in it.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another process keeps its blocks there.
    #[error("{} is in use by another worker; give each worker a directory of its own", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The budget does not hold one block.
    #[error("{budget} bytes of disk hold no KV block of {block} bytes; give more or none")]
    TooSmall {
        /// What was granted.
        budget: u64,
        /// What one block takes there.
        block: u64,
    },
    /// The object store cannot be used.
    #[error(
        "object store {url}: {reason}; give s3://bucket/prefix or file:///directory, credentials in AWS_* variables"
    )]
    Object {
        /// As configured.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
}
