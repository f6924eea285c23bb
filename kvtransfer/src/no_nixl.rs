//! In place of NIXL on systems that its library does not exist for: never available.

use crate::pull::Link;
use crate::window_table::WindowTable;
use crate::{PushError, TransferLimits};
use quinn::{RecvStream, SendStream};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::runtime::Handle;

/// There is none.
pub(crate) struct Nixl(Infallible);

impl Nixl {
    pub(crate) fn open(_: &str, _: Arc<WindowTable>, _: Arc<TransferLimits>, _: Handle) -> Option<Arc<Self>> {
        tracing::warn!("NIXL is turned on and cannot be used: there is none for this system");
        None
    }

    pub(crate) fn join(
        &self,
        _: SendStream,
        _: RecvStream,
        _: SocketAddr,
        _: u32,
        _: impl Future<Output = PushError> + Send + 'static,
    ) -> Arc<Link> {
        match self.0 {}
    }

    pub(crate) fn serve(self: &Arc<Self>, _: SendStream, _: RecvStream, _: Arc<str>) {
        match self.0 {}
    }

    pub(crate) fn close(&self) {
        match self.0 {}
    }
}
