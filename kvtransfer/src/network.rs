//! What crosses a network: QUIC over UDP and TLS over TCP, side by side on one port number, and a push's lanes on them.
//!
//! ```text
//! slot   connect TCP, if that is to be tried ──► lane over TCP ── broke ──┐
//!             └── no connection ───────────────► lane over QUIC ◄─────────┘ after the backoff; stays there
//!                                                    └── broke: after the backoff, another one
//! ```
//!
//! TCP is measured to be faster and cheaper wherever it connects; QUIC passes where only UDP does, and is known to work,
//! as the session with the peer is on it. So whatever TCP fails at goes over QUIC: a connection that cannot be made
//! costs the push some time and the peer's later pushes none, and one that breaks costs a lane.

use crate::hello::Hello;
use crate::limits::LANES_MAX;
use crate::nixl::Nixl;
use crate::push::Outgoing;
use crate::quic::{QuicTransport, Session};
use crate::shared_memory::SharedMemory;
use crate::tcp::TcpTransport;
use crate::window_table::WindowTable;
use crate::wire::Integrity;
use crate::{PushError, SetupError, TransferLimits};
use baton_identity::Identity;
use futures_util::future::join_all;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::time::sleep;

/// Free ports tried when none is asked for: the one that UDP gets may be taken for TCP, seldom twice in a row.
const PORT_ATTEMPTS: usize = 16;

/// Both network transports of one agent.
pub(crate) struct Network {
    quic: QuicTransport,
    tcp: Option<TcpTransport>,
    lanes: u16,
}

impl Network {
    /// Binds UDP, and TCP if `hello` says so. Must be called inside a tokio runtime.
    pub(crate) fn bind(
        addr: SocketAddr,
        identity: &Identity,
        hello: &Hello,
        table: &Arc<WindowTable>,
        limits: &Arc<TransferLimits>,
        shared_memory: Option<&Arc<SharedMemory>>,
        nixl: Option<&Arc<Nixl>>,
    ) -> Result<Self, SetupError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let quic = QuicTransport::bind(
                addr,
                identity,
                hello.clone(),
                table.clone(),
                limits.clone(),
                shared_memory.cloned(),
                nixl.cloned(),
            )?;
            let both = quic.local_addr();
            let tcp = hello
                .tcp
                .then(|| TcpTransport::bind(both, identity, hello.clone(), table.clone(), limits.clone()))
                .transpose();
            match tcp {
                Ok(tcp) => {
                    return Ok(Self {
                        quic,
                        tcp,
                        lanes: limits.lanes_per_push.clamp(1, LANES_MAX),
                    });
                }
                Err(SetupError::Bind { source, .. })
                    if addr.port() == 0 && source.kind() == ErrorKind::AddrInUse && attempts < PORT_ATTEMPTS =>
                {
                    drop(quic.close());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Where peers reach this agent.
    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.quic.local_addr()
    }

    /// The authenticated connection to `peer` that pushes start from.
    pub(crate) async fn session(&self, peer: SocketAddr) -> Result<Arc<Session>, PushError> {
        self.quic.session(peer).await
    }

    /// Carries a push to its end, on as many lanes as it fills. Over TCP where `session` is given and says that the
    /// peer takes that.
    pub(crate) async fn carry(&self, peer: SocketAddr, push: &Arc<Outgoing>, session: Option<&Session>) {
        join_all((0..self.lanes).map(|slot| self.carry_slot(peer, push, slot, session))).await;
    }

    /// Carries what one slot's lanes take, until the push is settled or the slot is used up.
    async fn carry_slot(&self, peer: SocketAddr, push: &Arc<Outgoing>, slot: u16, mut session: Option<&Session>) {
        if slot > 0 {
            // Most pushes are too small to gain from it.
            tokio::select! {
                biased;
                _ = push.settled() => return,
                () = push.crowded(slot) => {}
            }
        }
        loop {
            let over_tcp = match (&self.tcp, session) {
                (Some(tcp), Some(session)) if session.try_tcp() => tokio::select! {
                    biased;
                    _ = push.settled() => return,
                    connection = tcp.connect(peer) => match connection {
                        Ok(connection) => Some((tcp, session, connection)),
                        Err(error) => {
                            tracing::info!(%peer, %error, "no tcp to this peer; its pushes go over QUIC for 15 s, then tcp is tried again");
                            session.tcp_failed();
                            None
                        }
                    },
                },
                _ => None,
            };
            // TLS authenticates every record and QUIC every packet.
            let Some(mut lane) = push.lane(slot, Integrity::of(true)) else {
                return;
            };
            let wait = match over_tcp {
                Some((tcp, session, connection)) => tcp.carry(connection, session, push, &mut lane).await,
                None => self.quic.carry(peer, push, &mut lane).await,
            };
            let Some(wait) = wait else { return };
            tracing::debug!(%peer, slot, ?wait, "a lane of a kv push broke; it is opened again");
            // What broke one TCP connection may break the next.
            session = None;
            tokio::select! {
                biased;
                _ = push.settled() => return,
                () = sleep(wait) => {}
            }
        }
    }

    /// Closes everything at once. The future resolves when the peers have been told, or after a bounded time.
    pub(crate) fn close(&self) -> impl Future<Output = ()> + Send + use<> {
        // QUIC first: it says that the agent is closed, where TCP only ends.
        let quic = self.quic.close();
        let tcp = self.tcp.as_ref().map(TcpTransport::close);
        async move {
            tokio::join!(quic, async {
                if let Some(tcp) = tcp {
                    tcp.await;
                }
            });
        }
    }
}
