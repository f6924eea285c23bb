//! The owner's side: accepts connections on the Unix socket, checks who they are, and lands the pushes that arrive. A
//! task per link reads frames and never waits for a copy.

use super::copiers::Copiers;
use super::frames::{Body, Frame, FrameDecoder, Open, put_region_reply, put_reply};
use super::landing::Landing;
use super::mapping::Mapping;
use super::socket::{READ_BYTES, Socket};
use super::ticket::{Ticket, Tickets};
use super::{ASK_BYTES, MAGIC, same_user, stopped};
use crate::window_table::{Claimed, WindowTable};
use crate::wire::Reply;
use crate::{AbortReason, Refusal, TransferLimits, WindowError};
use bytes::BytesMut;
use rustix::fd::OwnedFd;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

/// Regions one link may have mapped: a worker has one.
pub(super) const REGIONS_MAX: usize = 64;

/// Batches up to this long are copied at once by the task that reads them; waking a thread would take as long.
const INLINE_BYTES_MAX: u64 = 256 << 10;

/// What accepting takes.
#[derive(Clone)]
pub(super) struct Accepting {
    pub(super) tickets: Arc<Tickets>,
    pub(super) copiers: Arc<Copiers>,
    pub(super) table: Arc<WindowTable>,
    pub(super) limits: Arc<TransferLimits>,
    pub(super) stop: watch::Receiver<bool>,
}

/// Accepts until told to stop.
pub(super) async fn accept(listener: UnixListener, accepting: Accepting) {
    let slots = Arc::new(Semaphore::new(accepting.limits.connections_max));
    let mut stop = std::pin::pin!(stopped(accepting.stop.clone()));
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
                max = accepting.limits.connections_max,
                "a connection for shared memory was refused: too many"
            );
            continue;
        };
        let accepting = accepting.clone();
        tokio::spawn(async move {
            let limit = accepting.limits.handshake_timeout;
            match tokio::time::timeout(limit, admit(stream, &accepting)).await {
                Ok(Ok((stream, ticket))) => serve(stream, ticket, accepting).await,
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
    answer.extend_from_slice(&accepting.limits.pushes_per_connection_max.to_le_bytes());
    stream.write_all(&answer).await?;
    Ok((stream, ticket))
}

/// Lands pushes until the link ends.
async fn serve(stream: UnixStream, mut ticket: Ticket, accepting: Accepting) {
    let peer = ticket.peer.clone();
    tracing::info!(%peer, "kv blocks arrive from this peer by shared memory");
    let socket = Arc::new(Socket::new(stream));
    let mut inbound = Inbound {
        socket: socket.clone(),
        peer: ticket.peer.clone(),
        accepting: accepting.clone(),
        regions: HashMap::new(),
        landings: HashMap::new(),
    };
    let detail = tokio::select! {
        biased;
        () = stopped(accepting.stop.clone()) => "this agent was closed".to_owned(),
        error = inbound.read() => error,
        error = socket.flush() => error.to_string(),
        () = ticket.void() => "its connection ended".to_owned(),
    };
    tracing::debug!(%peer, detail, "shared memory link ended");
    for landing in inbound.landings.into_values() {
        landing.broken(detail.clone());
    }
}

/// One link, as its reader sees it.
struct Inbound {
    socket: Arc<Socket>,
    peer: Arc<str>,
    accepting: Accepting,
    regions: HashMap<u32, Arc<Mapping>>,
    landings: HashMap<u32, Arc<Landing>>,
}

impl Inbound {
    /// Reads frames until there is a reason to stop.
    async fn read(&mut self) -> String {
        let (mut buffer, mut decoder) = (vec![0; READ_BYTES], FrameDecoder::default());
        let mut descriptors = VecDeque::new();
        loop {
            match self.socket.receive(&mut buffer, &mut descriptors).await {
                Ok(0) => return "it closed the link, or died".into(),
                Ok(count) => decoder.feed(&buffer[..count]),
                Err(error) => return error.to_string(),
            }
            loop {
                let taken = decoder.next().and_then(|frame| match frame {
                    Some(frame) => self.take(frame, &mut descriptors).map(|()| true),
                    None => Ok(false),
                });
                match taken {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(breach) => {
                        tracing::warn!(breach, "shared memory link ended: the peer broke the protocol");
                        return breach.into();
                    }
                }
            }
        }
    }

    fn take(&mut self, frame: Frame, descriptors: &mut VecDeque<OwnedFd>) -> Result<(), &'static str> {
        let id = frame.id;
        match frame.body {
            Body::Region { len } => {
                let file = descriptors
                    .pop_front()
                    .ok_or("it names a region and sends no descriptor")?;
                self.region(id, &file, len)
            }
            Body::Forget => {
                self.regions.remove(&id);
                Ok(())
            }
            Body::Open(open) => self.open(id, open),
            // A push that is unknown here is over: it was refused, and the news is on its way.
            Body::Pull(pieces) => match self.landings.get(&id) {
                Some(landing) => {
                    let small = pieces.bytes() <= INLINE_BYTES_MAX;
                    let idle = landing.queue(pieces)?;
                    if idle && (!small || landing.copy_next()) {
                        self.accepting.copiers.submit(landing.clone());
                    }
                    Ok(())
                }
                None => Ok(()),
            },
            Body::Finish(finish) => {
                if let Some(landing) = self.landings.get(&id) {
                    landing.finish(finish);
                    if landing.over() {
                        self.landings.remove(&id);
                    }
                }
                Ok(())
            }
            Body::Abort { reason } => {
                if let Some(landing) = self.landings.remove(&id) {
                    match AbortReason::from_code(reason.into()) {
                        reason @ AbortReason::LaneReplaced => landing.broken(reason.to_string()),
                        reason => landing.lost(WindowError::Aborted(reason)),
                    }
                }
                Ok(())
            }
            Body::Reply(_) | Body::RegionTaken | Body::RegionRefused { .. } => {
                Err("it sends what only a receiver sends")
            }
        }
    }

    fn region(&mut self, id: u32, file: &OwnedFd, len: u64) -> Result<(), &'static str> {
        if self.regions.contains_key(&id) {
            return Err("it names two regions alike");
        }
        let mapping = match Mapping::new(file, len) {
            Ok(_) if self.regions.len() >= REGIONS_MAX => Err(format!("{REGIONS_MAX} regions are mapped, the most")),
            other => other,
        };
        let mut out = BytesMut::new();
        match mapping {
            Ok(mapping) => {
                self.regions.insert(id, Arc::new(mapping));
                put_region_reply(&mut out, id, Ok(()));
            }
            Err(sentence) => {
                tracing::warn!(sentence, "a peer's region is not taken; its pushes go over QUIC");
                put_region_reply(&mut out, id, Err(&sentence));
            }
        }
        self.socket.send(out.freeze());
        Ok(())
    }

    fn open(&mut self, id: u32, open: Open) -> Result<(), &'static str> {
        let Open {
            window,
            push,
            lane,
            region,
        } = open;
        let mapping = self
            .regions
            .get(&region)
            .ok_or("it pushes from a region that it has not named")?;
        // A refused push is forgotten by the sender's next word, or here.
        let max = self.accepting.limits.pushes_per_connection_max as usize;
        if self.landings.len() >= max {
            self.landings.retain(|_, landing| !landing.over());
        }
        if self.landings.len() >= max {
            return Err("it has more pushes in flight than it may");
        }
        if self.landings.contains_key(&id) {
            return Err("it names two pushes alike");
        }
        let table = &self.accepting.table;
        match table.claim(window, push, lane) {
            Ok(Claimed::Window(cell)) => {
                let landing = Landing::new(
                    id,
                    (cell, lane),
                    self.peer.clone(),
                    table.clone(),
                    mapping.clone(),
                    self.socket.clone(),
                );
                let landing = Arc::new(landing);
                tokio::spawn(landing.clone().watch());
                self.landings.insert(id, landing);
            }
            // The acknowledgement of an earlier lane must have been lost.
            Ok(Claimed::Done(total)) => {
                let mut out = BytesMut::new();
                put_reply(&mut out, id, Reply::Done(total));
                self.socket.send(out.freeze());
            }
            Err(refusal) => {
                table.counters().refusals.add(1);
                self.refuse(id, refusal);
            }
        }
        Ok(())
    }

    fn refuse(&self, id: u32, refusal: Refusal) {
        let mut out = BytesMut::new();
        put_reply(&mut out, id, Reply::Refused(refusal));
        self.socket.send(out.freeze());
    }
}
