//! Why a worker could not start or go on.

use std::net::SocketAddr;

/// Errors of the worker process. Failures of single requests are not here: they travel in `Finish.error`.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The configuration contradicts itself.
    #[error("worker configuration: {0}")]
    Config(String),
    /// An address could not be bound.
    #[error("cannot listen on {addr}: {source}; choose another address or stop what holds it")]
    Bind {
        /// The configured address.
        addr: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// Certificates.
    #[error(transparent)]
    Identity(#[from] baton_identity::IdentityError),
    /// The model could not be loaded.
    #[error(transparent)]
    Model(#[from] baton_model::ModelError),
    /// The engine could not be built, or a step failed for good.
    #[error("engine: {0}")]
    Engine(String),
    /// The KV transfer agent could not start.
    #[error("KV transfer: {0}")]
    Transfer(String),
    /// A tier for KV blocks could not be opened.
    #[error(transparent)]
    Tier(#[from] baton_tiers::TierError),
    /// The gRPC server failed.
    #[error("worker server: {0}")]
    Server(String),
    /// A coordinator refused this worker.
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
}
