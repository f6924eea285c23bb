//! Puts a coordinator together and takes it apart: store, cluster gRPC, HTTP gateway, ticks.

use std::net::SocketAddr;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use crate::{CoordinatorConfig, CoordinatorError};

/// Where a coordinator serves, once it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// The OpenAI API.
    pub http_addr: SocketAddr,
    /// The gRPC service that workers join.
    pub cluster_addr: SocketAddr,
}

/// x
pub async fn run(_config: CoordinatorConfig, _ready: oneshot::Sender<Ready>, _shutdown: CancellationToken) -> Result<(), CoordinatorError> { Ok(()) }
