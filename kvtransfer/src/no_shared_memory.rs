//! In place of shared memory on systems that have no sealed memory files: never available, so the network carries everything.

use crate::hello::{Hello, HostId, Offer};
use crate::push::Outgoing;
use crate::window_table::WindowTable;
use crate::{PushError, TransferLimits};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::runtime::Handle;

/// There is none.
pub(crate) struct SharedMemory(Infallible);
/// There is none.
pub(crate) struct Link(Infallible);
/// There is none.
pub(crate) struct Invitation;
/// What became of a push that a link was asked to carry; see the real one.
#[allow(dead_code)]
pub(crate) enum Carried {
    NotShared,
    Over,
    Broke(std::time::Duration),
}

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

impl Link {
    pub(crate) fn alive(&self) -> bool {
        match self.0 {}
    }

    pub(crate) async fn carry(&self, _: &Arc<Outgoing>) -> Carried {
        match self.0 {}
    }
}
