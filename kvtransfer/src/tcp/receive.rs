//! Accepts connections and lands the pushes that arrive: a task per connection, one lane at a time on it.

use super::channel::{Broken, Channel};
use super::frame::Frame;
use super::tls::Tls;
use crate::hello::Hello;
use crate::incoming::Incoming;
use crate::window_table::WindowTable;
use crate::wire::Reply;
use crate::{AbortReason, Refusal, TransferLimits, WindowError};
use bytes::BytesMut;
use rustls::ServerConfig;
use rustls::server::UnbufferedServerConnection;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long a connection may lie idle between two pushes before this side closes it.
pub(super) const IDLE_MAX: Duration = Duration::from_secs(60);

/// Pause after a failed accept: out of descriptors, most likely, which passes when connections end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the tasks of all connections share.
pub(super) struct Receiver {
    pub(super) server: Arc<ServerConfig>,
    pub(super) hello: Arc<Hello>,
    pub(super) table: Arc<WindowTable>,
    pub(super) limits: Arc<TransferLimits>,
}

/// Accepts connections until `closing`.
pub(super) async fn accept(
    listener: TcpListener,
    shared: Arc<Receiver>,
    tasks: TaskTracker,
    closing: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(shared.limits.connections_max));
    while let Some(accepted) = closing.run_until_cancelled(listener.accept()).await {
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept kv transfer connections");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!(%peer, max = shared.limits.connections_max,
                "kv transfer connection refused: too many connections");
            continue;
        };
        let (shared, closing) = (shared.clone(), closing.clone());
        tasks.spawn(async move {
            closing.run_until_cancelled(serve(socket, peer, &shared)).await;
            drop(slot);
        });
    }
}

/// Counts a connection while it lives.
struct Counted<'a>(&'a WindowTable);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.counters().connections_in.sub(1);
    }
}

/// Says hello and lands pushes until the connection ends.
async fn serve(socket: TcpStream, peer: SocketAddr, shared: &Receiver) {
    let Receiver { table, limits, .. } = shared;
    let session = match UnbufferedServerConnection::new(shared.server.clone()) {
        Ok(session) => session,
        Err(error) => return tracing::warn!(%peer, %error, "kv transfer connection failed"),
    };
    let mut channel = Channel::new(socket, Tls::server(session), limits);
    let theirs = match timeout(limits.handshake_timeout, channel.introduce(&shared.hello, false)).await {
        Ok(Ok(theirs)) => theirs,
        Ok(Err(broken)) => return tracing::warn!(%peer, %broken, "kv transfer connection failed"),
        Err(_) => return tracing::warn!(%peer, "kv transfer connection failed: no hello in time"),
    };
    if let Some(mismatch) = shared.hello.mismatch(&theirs) {
        tracing::warn!(%peer, mismatch, "kv transfer connection refused");
        // The peer has this side's hello, compares too and closes.
        return channel.farewell().await;
    }
    table.counters().connections_in.add(1);
    let _counted = Counted(table);
    let name: Arc<str> = format!("{} ({peer})", theirs.name).into();
    let fresh = || Incoming::new(table.clone(), name.clone());
    let mut incoming = fresh();
    let refusal = match land(&mut channel, &mut incoming, fresh, limits).await {
        End::Idle => return,
        End::Aborted(reason @ AbortReason::LaneReplaced) => {
            return incoming.broken(reason.to_string(), Instant::now());
        }
        End::Aborted(reason) => return incoming.lost(WindowError::Aborted(reason)),
        End::Lost(detail) => return incoming.broken(detail, Instant::now()),
        End::Breach(refusal) => {
            incoming.refuse(refusal);
            refusal
        }
        End::Refused(refusal) => refusal,
    };
    tracing::debug!(peer = %name, %refusal, "kv push refused");
    // A lane that was refused has bytes under way that nobody wants: its connection ends with it.
    let told = async {
        answer(&mut channel, Reply::Refused(refusal)).ok()?;
        channel.flush().await.ok()
    };
    if let Ok(Some(())) = timeout(limits.stall_timeout, told).await {
        channel.farewell().await;
    }
}

/// Why landing stopped.
enum End {
    /// No lane came, or its push is complete; the connection is closed.
    Idle,
    /// The sender gave the lane up, or the push with it.
    Aborted(AbortReason),
    /// The connection is gone.
    Lost(String),
    /// Refused by the session; the window knows already.
    Refused(Refusal),
    /// A breach that only the transport sees.
    Breach(Refusal),
}

/// Lands one lane after another, each in an `Incoming` of its own, until something ends the connection.
async fn land(
    channel: &mut Channel,
    incoming: &mut Incoming,
    fresh: impl Fn() -> Incoming,
    limits: &TransferLimits,
) -> End {
    let too_slow = |limit: Duration| {
        End::Breach(Refusal::TooSlow {
            limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
        })
    };
    let mut waiting_since = Instant::now();
    // Set when the first byte of the lane is here.
    let mut begun: Option<Instant> = None;
    loop {
        let (mut reply, mut end, mut ended) = (None, None, 0);
        let received = channel.receive(|frame| {
            match frame {
                Frame::Data(bytes) => {
                    begun.get_or_insert_with(Instant::now);
                    match incoming.feed(bytes) {
                        Ok(asked) => reply = asked.or(reply),
                        Err(refusal) => end = Some(End::Refused(refusal)),
                    }
                }
                Frame::Abort { code } => end = Some(End::Aborted(AbortReason::from_code(code.into()))),
                Frame::Ping => {}
                // A sender lets go of its other lanes when one has brought the last acknowledgement. The next lane's first
                // bytes may be right behind.
                Frame::End if incoming.done() || incoming.complete() => {
                    *incoming = fresh();
                    (reply, begun, waiting_since) = (None, None, Instant::now());
                    ended += 1;
                }
                Frame::End => end = Some(End::Breach(Refusal::Unfinished)),
            }
            end.is_none()
        });
        if let Some(end) = end {
            return end;
        }
        let now = Instant::now();
        let result = received.and_then(|()| {
            for _ in 0..ended {
                channel.end()?;
            }
            if let Some(reply) = reply {
                answer(channel, reply)?;
            } else if begun.is_some() && channel.flushed() && now - channel.said >= limits.keep_alive {
                channel.ping()?;
            }
            channel.try_flush()
        });
        if let Err(broken) = result {
            return if begun.is_none() || incoming.complete() {
                End::Idle
            } else {
                End::Lost(broken.to_string())
            };
        }
        if !channel.flushed() && now - channel.progressed > limits.stall_timeout {
            return too_slow(limits.stall_timeout);
        }
        match begun {
            None if waiting_since.elapsed() > IDLE_MAX => return End::Idle,
            Some(since) if !incoming.opened() && since.elapsed() > limits.handshake_timeout => {
                return too_slow(limits.handshake_timeout);
            }
            Some(_) if now - channel.heard > limits.idle_timeout => {
                let detail = format!("nothing heard for {:?}", limits.idle_timeout);
                return if incoming.complete() {
                    End::Idle
                } else {
                    End::Lost(detail)
                };
            }
            _ => {}
        }
        let tick = if begun.is_some() { limits.keep_alive } else { IDLE_MAX };
        tokio::select! {
            biased;
            refusal = incoming.interrupted(), if !incoming.done() => return End::Refused(refusal),
            ready = channel.ready() => if let Err(broken) = ready {
                return End::Lost(broken.to_string());
            },
            () = sleep(tick) => {}
        }
    }
}

fn answer(channel: &mut Channel, reply: Reply) -> Result<(), Broken> {
    let mut bytes = BytesMut::with_capacity(32);
    reply.put(&mut bytes);
    channel.say(&bytes)
}
