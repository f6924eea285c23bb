//! What can go wrong with identities, each with the way out.

use std::path::PathBuf;

/// Why an identity could not be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file could not be read or written.
    #[error("cannot {action} {path}: {source}; check that the directory exists and belongs to this user")]
    File {
        /// "read" or "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is there but holds no usable certificate or key.
    #[error("{path} holds no usable {what}; delete the identity directory and let `baton up` issue a new one")]
    Malformed {
        /// The file, or what it was read from.
        path: String,
        /// "certificate" or "private key".
        what: &'static str,
    },
    /// Making a certificate failed.
    #[error("cannot issue a certificate for {name}: {reason}")]
    Issue {
        /// The process name.
        name: String,
        /// What the library said.
        reason: String,
    },
    /// rustls refused the certificate or key.
    #[error("cannot build a TLS configuration: {0}; issue the identity anew")]
    Tls(String),
    /// A process name that is not a plain file name.
    #[error("{0:?} is not a process name: use 1 to 64 letters, digits, '-', '_' or '.', not starting with '.'")]
    Name(String),
}
