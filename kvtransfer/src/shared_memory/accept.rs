//! Accepts connections on the Unix socket and checks who they are. What is let in is served by [`crate::pull`].

use super::ticket::{Ticket, Tickets};
use super::{ASK_BYTES, MAGIC, same_user};
use crate::pull::{Receiving, Socket, receive, stopped};
use crate::transport::TransportKind;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

/// What accepting takes.
#[derive(Clone)]
pub(super) struct Accepting {
    pub(super) tickets: Arc<Tickets>,
    pub(super) receiving: Receiving,
}

/// Accepts until told to stop.
pub(super) async fn accept(listener: UnixListener, accepting: Accepting) {
    let slots = Arc::new(Semaphore::new(accepting.receiving.limits.connections_max));
    let mut stop = std::pin::pin!(stopped(accepting.receiving.stop.clone()));
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut stop => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection for shared memory could not be accepted");
                // Out of descriptors, as a rule; accepting again at once would spin.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!(
                max = accepting.receiving.limits.connections_max,
                "a connection for shared memory was refused: too many"
            );
            continue;
        };
        let accepting = accepting.clone();
        tokio::spawn(async move {
            let limit = accepting.receiving.limits.handshake_timeout;
            match tokio::time::timeout(limit, admit(stream, &accepting)).await {
                Ok(Ok((stream, mut ticket))) => {
                    let socket = Arc::new(Socket::new(stream));
                    let (peer, kind) = (ticket.peer.clone(), TransportKind::SharedMemory);
                    receive::serve(socket, peer, kind, ticket.void(), accepting.receiving).await;
                }
                Ok(Err(error)) => tracing::warn!(%error, "a connection for shared memory was refused"),
                Err(_) => {
                    tracing::warn!("a connection for shared memory was refused: it did not say who it is in time")
                }
            }
            drop(slot);
        });
    }
}

/// Lets in whoever runs as the same user and has a ticket.
async fn admit(mut stream: UnixStream, accepting: &Accepting) -> io::Result<(UnixStream, Ticket)> {
    if !same_user(&stream)? {
        return Err(io::Error::other("it runs as another user"));
    }
    let mut question = [0; ASK_BYTES];
    stream.read_exact(&mut question).await?;
    let ticket = question
        .split_first_chunk()
        .filter(|(magic, _)| **magic == MAGIC)
        .and_then(|(_, rest)| rest.split_first_chunk::<16>())
        .and_then(|(ticket, rest)| accepting.tickets.redeem(ticket, rest.try_into().ok()?))
        .ok_or_else(|| io::Error::other("it has no valid ticket"))?;
    let mut answer = ticket.owner_secret.to_vec();
    answer.extend_from_slice(&accepting.receiving.limits.pushes_per_connection_max.to_le_bytes());
    stream.write_all(&answer).await?;
    Ok((stream, ticket))
}
