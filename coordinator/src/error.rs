//! Why a coordinator cannot start or go on, each with the way out.

use std::net::SocketAddr;

/// Why [`run`](crate::run) ended with an error.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// A setting makes no sense.
    #[error("the coordinator's configuration is wrong: {0}")]
    Config(String),
    /// An address could not be taken.
    #[error("cannot listen on {addr} ({purpose}): {source}; stop what uses it, or configure another address")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// "API" or "cluster".
        purpose: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The certificate or key is unusable.
    #[error(transparent)]
    Identity(#[from] baton_identity::IdentityError),
    /// The durable state cannot be opened or written.
    #[error(transparent)]
    Store(#[from] baton_raftstore::RaftStoreError),
    /// The HTTP front end cannot start or failed.
    #[error(transparent)]
    Gateway(#[from] baton_gateway::GatewayError),
    /// The gRPC server failed.
    #[error("the cluster's gRPC server failed: {0}")]
    Cluster(String),
}
