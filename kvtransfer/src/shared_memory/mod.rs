//! Shared memory between agents on one host: the receiver copies straight out of the sender's region, once.
//!
//! ```text
//! sender                                          receiver
//! QUIC: mutual TLS, hello {host}        ──►
//!                                       ◄──       hello {host, offer: socket, ticket, two secrets}
//! Unix socket: ticket, asker's secret   ──►       same user? right secret? then
//!                                       ◄──       owner's secret; the link stands
//! REGION id + descriptor (SCM_RIGHTS)   ──►       sealed? then map it, read-only, once for the link's life
//! OPEN push, window, region             ──►       claims the window
//! PULL [(local, remote, len), …]        ──►       copies mapping → region under the window's fence
//!                                       ◄──       LANDED bytes
//! FINISH total, payload                 ──►       completes the window
//!                                       ◄──       DONE
//! ```
//!
//! # The states
//!
//! A *link* ([`crate::pull`]) is here a Unix socket between two agents, for pushes in one direction. It is made right
//! after a QUIC connection is and ends with it, so that a peer that hangs is found as over QUIC; a peer that dies is
//! found at once, by the socket's hang-up.
//!
//! # The invariants
//!
//! 1. **Who.** A link is given only to whoever was handed a ticket inside the authenticated QUIC connection, once, and
//!    runs as the same user; and the one who asks learns that it reached the owner of the ticket before it sends any
//!    descriptor. A region goes out as a descriptor that cannot be written through.
//! 2. **No fault.** A mapping is made only of a memory file sealed against shrinking, at least as long as claimed, so
//!    reading it cannot fault.
//! 3. **Bounded.** Links, and what may wait to become one, are limited.
//!
//! The fences are those of [`crate::pull`].
//!
//! Deliberately not here: choosing between transports ([`crate::transport`]), and what a window allows.

mod accept;
#[allow(unsafe_code)]
mod mapping;
#[cfg(test)]
mod tests;
mod ticket;

pub(crate) use mapping::Mapping;
pub(crate) use ticket::Invitation;

use crate::hello::{Hello, HostId, Offer};
use crate::pull::{Copiers, Link, Receiving, Socket, send};
use crate::window_table::WindowTable;
use crate::{PushError, TransferLimits};
use std::io;
use std::net::SocketAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net as unix;
use std::sync::Arc;
use std::time::Duration;
use ticket::Tickets;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Handle;
use tokio::sync::watch;

/// Longest the making of a link may take. It is a matter of microseconds on one host; then the network carries the pushes.
const JOIN_TIMEOUT: Duration = Duration::from_millis(500);

/// First bytes on a link.
const MAGIC: [u8; 4] = *b"BTSM";
/// Magic, ticket, the asker's secret.
const ASK_BYTES: usize = 4 + 16 + 32;
/// The owner's secret, pushes the owner takes at once.
const ANSWER_BYTES: usize = 32 + 4;

/// What an agent needs for shared memory with others on its host.
pub(crate) struct SharedMemory {
    host: HostId,
    socket: [u8; 16],
    tickets: Arc<Tickets>,
    limits: Arc<TransferLimits>,
    runtime: Handle,
    /// Dropped or set to end every link and the listener.
    stop: watch::Sender<bool>,
}

impl SharedMemory {
    /// Opens the socket that peers on this host connect to and begins to serve it. `None`, with a line in the log, if
    /// the system does not have what that takes.
    pub(crate) fn bind(table: Arc<WindowTable>, limits: Arc<TransferLimits>, runtime: Handle) -> Option<Arc<Self>> {
        let unavailable = |what: &str, error: &dyn std::fmt::Display| {
            tracing::info!(%error, "no shared memory for kv transfers: {what}");
        };
        let host = host_id()
            .map_err(|error| unavailable("the host has no boot id", &error))
            .ok()?;
        let socket = random().ok()?;
        let listener = listen(&socket)
            .map_err(|error| unavailable("no unix socket", &error))
            .ok()?;
        let tickets = Arc::new(Tickets::default());
        let stop = watch::Sender::new(false);
        let receiving = Receiving {
            copiers: Arc::new(Copiers::new(runtime.clone())),
            table,
            limits: limits.clone(),
            nixl: None,
            stop: stop.subscribe(),
        };
        let accepting = accept::Accepting {
            tickets: tickets.clone(),
            receiving,
        };
        runtime.spawn(accept::accept(listener, accepting));
        Some(Arc::new(Self {
            host,
            socket,
            tickets,
            limits,
            runtime,
            stop,
        }))
    }

    /// What to say of the host in a hello.
    pub(crate) fn host(&self) -> HostId {
        self.host
    }

    /// An offer for the peer that has said `theirs`, if it is on this host. The link that comes of it ends when the
    /// invitation is dropped.
    pub(crate) fn offer(&self, theirs: &Hello, peer: &str) -> Option<(Offer, Invitation)> {
        if theirs.host != Some(self.host) {
            return None;
        }
        let offer = Offer {
            socket: self.socket,
            ticket: random().ok()?,
            asker_secret: random().ok()?,
            owner_secret: random().ok()?,
        };
        Some((offer, self.tickets.issue(&offer, peer)))
    }

    /// Makes the link that `offer` is for. It ends, and its pushes fail, when `lost` resolves. `None` if there is no
    /// way; the reason is in the log.
    pub(crate) async fn join(
        &self,
        offer: &Offer,
        peer: SocketAddr,
        lost: impl Future<Output = PushError> + Send + 'static,
    ) -> Option<Arc<Link>> {
        let asked = tokio::time::timeout(JOIN_TIMEOUT, ask(offer)).await;
        let result = asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        match result {
            Ok((stream, pushes_max)) => {
                let pushes_max = pushes_max.min(self.limits.pushes_per_connection_max);
                let link = Link::new(Socket::new(stream), peer, None, pushes_max, self.limits.stall_timeout);
                self.runtime.spawn(send::run(link.clone(), lost, self.stop.subscribe()));
                Some(link)
            }
            Err(error) => {
                tracing::info!(%peer, %error, "no shared memory with this peer; its pushes go over the network");
                None
            }
        }
    }

    /// Ends the listener and every link.
    pub(crate) fn close(&self) {
        self.stop.send_replace(true);
    }
}

/// Connects to the owner of an offer, both proving who they are.
async fn ask(offer: &Offer) -> io::Result<(UnixStream, u32)> {
    let address = unix::SocketAddr::from_abstract_name(socket_name(&offer.socket))?;
    // A Unix socket connects or refuses at once. A full backlog is a refusal, too.
    let stream = unix::UnixStream::connect_addr(&address)?;
    stream.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(stream)?;
    if !same_user(&stream)? {
        return Err(io::Error::other("the socket belongs to another user"));
    }
    let mut question = [0; ASK_BYTES];
    let (magic, rest) = question.split_at_mut(MAGIC.len());
    let (ticket, secret) = rest.split_at_mut(offer.ticket.len());
    magic.copy_from_slice(&MAGIC);
    ticket.copy_from_slice(&offer.ticket);
    secret.copy_from_slice(&offer.asker_secret);
    stream.write_all(&question).await?;
    let mut answer = [0; ANSWER_BYTES];
    stream.read_exact(&mut answer).await?;
    let [secret @ .., a, b, c, d] = answer;
    if !ticket::same(&secret, &offer.owner_secret) {
        return Err(io::Error::other("whoever answers does not own the offer"));
    }
    Ok((stream, u32::from_le_bytes([a, b, c, d])))
}

/// Whether the process at the other end runs as this one's user.
fn same_user(stream: &UnixStream) -> io::Result<bool> {
    Ok(stream.peer_cred()?.uid() == rustix::process::geteuid().as_raw())
}

fn listen(socket: &[u8; 16]) -> io::Result<UnixListener> {
    let address = unix::SocketAddr::from_abstract_name(socket_name(socket))?;
    let listener = unix::UnixListener::bind_addr(&address)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// The abstract name of a socket: it vanishes with the process and exists in this network namespace only.
fn socket_name(socket: &[u8; 16]) -> String {
    format!("baton-kv-{:032x}", u128::from_be_bytes(*socket))
}

/// The kernel's boot id: one for all processes and containers of a host until it is restarted.
fn host_id() -> io::Result<HostId> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.trim().chars().filter(|&digit| digit != '-').collect();
    let id = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
    Ok(id.to_be_bytes())
}

fn random<const N: usize>() -> Result<[u8; N], rustls::crypto::GetRandomFailed> {
    let mut bytes = [0; N];
    rustls::crypto::ring::default_provider()
        .secure_random
        .fill(&mut bytes)?;
    Ok(bytes)
}
