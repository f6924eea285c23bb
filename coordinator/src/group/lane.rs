//! The task that carries one member's messages: connects, streams, and connects again with a growing pause. While there is no
//! connection messages are thrown away, since by then Raft has newer ones.

use super::outbox::Peering;
use baton_identity::Role;
use baton_proto::raft::raft_client::RaftClient;
use baton_proto::raft::{RaftMessages, SnapshotPiece};
use baton_proto::state::Member;
use baton_raftstore::{Message, OutgoingSnapshot};
use prost::Message as _;
use protobuf::Message as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

/// Time to connect. Members are near each other: an election timeout is well below a second.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// A connection is probed this often, and given up after as long again: after a cut of the network the lane must not wait for
/// the system's retransmissions.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// First pause after a failure; doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// Longest pause: a member that comes back is heard again within this.
const PAUSE_MAX: Duration = Duration::from_millis(300);
/// Bytes after which a batch is full; the message that fills it may be as long as an append, so a batch is at most some
/// 2 MiB. See [`BATCH_BYTES_MAX`].
const BATCH_BYTES: usize = 1 << 20;
/// Largest batch that is taken: a full one and the longest message, with room for framing.
pub(crate) const BATCH_BYTES_MAX: usize = 4 << 20;
/// Longest message. An append is up to 1 MiB, or one entry if that is longer; a snapshot goes another way.
const MESSAGE_BYTES_MAX: usize = 2 << 20;
/// Longest time for a whole snapshot: a state of many GB on a slow network.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(1800);
/// Batches on their way.
const BATCHES_MAX: usize = 2;

/// Carries what comes through `queue` to the member `id`, until the queue is closed.
pub(super) async fn carry(peering: Arc<Peering>, id: u64, mut queue: mpsc::Receiver<Message>) {
    let mut pause = PAUSE_MIN;
    let mut changes = peering.book.changes();
    while let Some(first) = queue.recv().await {
        changes.mark_unchanged();
        let Some(member) = peering.book.get(id) else { continue };
        match connect(&peering, &member).await {
            Err(error) => tracing::debug!(member = %member.name, %error, "a member cannot be reached"),
            Ok(channel) => {
                tracing::info!(member = %member.name, addr = %member.cluster_addr, "connected to a member");
                pause = PAUSE_MIN;
                let reason = tokio::select! {
                    reason = stream(&peering, channel, first, &mut queue) => reason,
                    // Its address may be another now.
                    _ = moved(&peering, &member, &mut changes) => "its address changed".into(),
                };
                tracing::info!(member = %member.name, %reason, "the connection to a member ended");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
        while queue.try_recv().is_ok() {}
    }
}

async fn moved(peering: &Peering, member: &Member, changes: &mut tokio::sync::watch::Receiver<u64>) {
    loop {
        // The sender lives in the book.
        let _ = changes.changed().await;
        if peering
            .book
            .get(member.id)
            .is_none_or(|now| now.cluster_addr != member.cluster_addr)
        {
            return;
        }
    }
}

/// A connection to this very member: another coordinator at its address is refused by its certificate.
pub(super) async fn connect(peering: &Peering, member: &Member) -> Result<Channel, String> {
    let tls = peering.identity.tonic_client_of(Role::Coordinator, &member.name);
    let tls = tls.ok_or_else(|| format!("{:?} cannot be a member's name", member.name))?;
    let endpoint = Endpoint::from_shared(format!("https://{}", member.cluster_addr))
        .and_then(|endpoint| endpoint.tls_config(tls))
        .map_err(|error| error.to_string())?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true);
    // tonic's own limit covers the TCP handshake only.
    match tokio::time::timeout(2 * CONNECT_TIMEOUT, endpoint.connect()).await {
        Ok(connected) => connected.map_err(|error| error.to_string()),
        Err(_) => Err("no TLS handshake in time".into()),
    }
}

/// Streams until the connection breaks; returns why.
async fn stream(
    peering: &Arc<Peering>,
    channel: Channel,
    first: Message,
    queue: &mut mpsc::Receiver<Message>,
) -> String {
    let (batches, sending) = mpsc::channel(BATCHES_MAX);
    let mut client = RaftClient::new(channel.clone());
    let call = client.messages(ReceiverStream::new(sending));
    let feed = async {
        let mut from = Some(peering.book.me().clone());
        let mut group = peering.group();
        let mut next = Some(first);
        loop {
            let mut batch = RaftMessages {
                from: from.take(),
                group: group.take(),
                messages: Vec::new(),
            };
            let mut bytes = 0;
            while let Some(message) = next.take() {
                match message.write_to_bytes() {
                    Ok(encoded) if encoded.len() > MESSAGE_BYTES_MAX => {
                        tracing::warn!(bytes = encoded.len(), "a Raft message is too long to be sent");
                    }
                    Ok(encoded) => {
                        bytes += encoded.len();
                        batch.messages.push(encoded.into());
                    }
                    Err(error) => tracing::warn!(%error, "a Raft message cannot be encoded"),
                }
                if bytes < BATCH_BYTES {
                    next = queue.try_recv().ok();
                }
            }
            if batches.send(batch).await.is_err() {
                return;
            }
            match queue.recv().await {
                Some(message) => next = Some(message),
                None => return,
            }
        }
    };
    tokio::pin!(feed);
    tokio::select! {
        ended = call => match ended {
            Ok(_) => "the member ended it".into(),
            Err(status) => status.message().to_owned(),
        },
        () = &mut feed => "the stream closed".into(),
    }
}

/// Sends a whole state, beside the stream, so that heartbeats do not wait for it. Dropping it tells Raft that it failed.
pub(super) async fn send_snapshot(peering: Arc<Peering>, snapshot: OutgoingSnapshot) {
    let (to, index) = (snapshot.to(), snapshot.index());
    let Some(member) = peering.book.get(to) else { return };
    let sent = tokio::time::timeout(SNAPSHOT_TIMEOUT, stream_snapshot(&peering, &member, snapshot)).await;
    match sent {
        Ok(Ok(())) => tracing::info!(member = %member.name, index, "a member has the snapshot"),
        Ok(Err(reason)) => tracing::warn!(member = %member.name, index, %reason, "a snapshot was not taken"),
        Err(_) => tracing::warn!(member = %member.name, index, "a snapshot was not taken in time"),
    }
}

async fn stream_snapshot(peering: &Peering, member: &Member, mut snapshot: OutgoingSnapshot) -> Result<(), String> {
    let channel = connect(peering, member).await?;
    let header = snapshot.message().write_to_bytes().map_err(|error| error.to_string())?;
    let (pieces, sending) = mpsc::channel(BATCHES_MAX);
    let first = SnapshotPiece {
        from: Some(peering.book.me().clone()),
        data: header.into(),
        group: peering.group(),
    };
    // It blocks on the disk.
    let reading = tokio::task::spawn_blocking(move || {
        if pieces.blocking_send(first).is_err() {
            return Err("the stream closed".to_owned());
        }
        while let Some(chunk) = snapshot.next_chunk().map_err(|error| error.to_string())? {
            let piece = SnapshotPiece {
                from: None,
                group: None,
                data: chunk.encode_to_vec().into(),
            };
            if pieces.blocking_send(piece).is_err() {
                return Err("the stream closed".to_owned());
            }
        }
        Ok(snapshot)
    });
    let answer = RaftClient::new(channel).snapshot(ReceiverStream::new(sending)).await;
    let snapshot = reading.await.map_err(|error| error.to_string())?;
    answer.map_err(|status| status.message().to_owned())?;
    snapshot?.delivered();
    Ok(())
}
