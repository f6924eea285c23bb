//! Both network transports of one agent, on the same port number: QUIC over UDP and TLS over TCP. Both take pushes;
//! [`Network`] says which one carries the pushes that start here.

use crate::hello::Hello;
use crate::limits::Network;
use crate::push::Outgoing;
use crate::quic::QuicTransport;
use crate::tcp::TcpTransport;
use crate::transport::Transport;
use crate::window_table::WindowTable;
use crate::{SetupError, TransferLimits};
use baton_identity::Identity;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

/// Free ports tried when none is asked for: the one that UDP gets may be taken for TCP, seldom twice in a row.
const PORT_ATTEMPTS: usize = 16;

/// QUIC and TCP side by side.
pub(crate) struct NetworkTransport {
    quic: QuicTransport,
    tcp: TcpTransport,
    preferred: Network,
}

impl NetworkTransport {
    /// Binds both. Must be called inside a tokio runtime.
    pub(crate) fn bind(
        addr: SocketAddr,
        identity: &Identity,
        hello: &Hello,
        table: &Arc<WindowTable>,
        limits: &Arc<TransferLimits>,
    ) -> Result<Self, SetupError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let quic = QuicTransport::bind(addr, identity, hello.clone(), table.clone(), limits.clone())?;
            let both = quic.local_addr();
            match TcpTransport::bind(both, identity, hello.clone(), table.clone(), limits.clone()) {
                Ok(tcp) => {
                    return Ok(Self {
                        quic,
                        tcp,
                        preferred: limits.network,
                    });
                }
                Err(SetupError::Bind { source, .. })
                    if addr.port() == 0
                        && source.kind() == std::io::ErrorKind::AddrInUse
                        && attempts < PORT_ATTEMPTS =>
                {
                    drop(quic.close());
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Transport for NetworkTransport {
    fn local_addr(&self) -> SocketAddr {
        self.quic.local_addr()
    }

    fn carry(&self, peer: SocketAddr, push: Arc<Outgoing>) {
        match self.preferred {
            Network::Quic => self.quic.carry(peer, push),
            Network::Tcp => self.tcp.carry(peer, push),
        }
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let (quic, tcp) = (self.quic.close(), self.tcp.close());
        Box::pin(async move {
            tokio::join!(quic, tcp);
        })
    }
}
