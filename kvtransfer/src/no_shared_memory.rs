//! In place of shared memory on systems that have no sealed memory files: never available, so the network carries everything.

use crate::hello::{Hello, HostId, Offer};
use crate::pull::Link;
use crate::window_table::WindowTable;
use crate::{PushError, TransferLimits};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::runtime::Handle;

/// There is none.
pub(crate) struct SharedMemory(Infallible);
/// There is none.
pub(crate) struct Invitation;
impl SharedMemory {
    pub(crate) fn bind(_: Arc<WindowTable>, _: Arc<TransferLimits>, _: Handle) -> Option<Arc<Self>> {
        None
    }

    pub(crate) fn host(&self) -> HostId {
        match self.0 {}
    }

    pub(crate) fn offer(&self, _: &Hello, _: &str) -> Option<(Offer, Invitation)> {
        match self.0 {}
    }

    pub(crate) async fn join(
        &self,
        _: &Offer,
        _: SocketAddr,
        _: impl Future<Output = PushError> + Send + 'static,
    ) -> Option<Arc<Link>> {
        match self.0 {}
    }

    pub(crate) fn close(&self) {
        match self.0 {}
    }
}
