//! The receiver's side: lands the pushes that arrive on a link. A task per link reads frames and never waits for a copy.

use super::copiers::Copiers;
use super::frames::{Body, Frame, FrameDecoder, Open, put_region_reply, put_reply};
use super::landing::Landing;
use super::socket::{READ_BYTES, Socket};
use super::source::Source;
use super::stopped;
use crate::nixl::{Nixl, NixlPeer};
use crate::shared_memory::Mapping;
use crate::transport::TransportKind;
use crate::window_table::{Claimed, WindowTable};
use crate::wire::Reply;
use crate::{AbortReason, Refusal, TransferLimits, WindowError};
use bytes::{Bytes, BytesMut};
use rustix::fd::OwnedFd;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use tokio::sync::watch;

/// Regions one link may have mapped: a worker has one.
pub(crate) const REGIONS_MAX: usize = 64;

/// Batches up to this long are copied at once by the task that reads them; waking a thread would take as long.
const INLINE_BYTES_MAX: u64 = 256 << 10;

/// What receiving takes.
#[derive(Clone)]
pub(crate) struct Receiving {
    pub(crate) copiers: Arc<Copiers>,
    pub(crate) table: Arc<WindowTable>,
    pub(crate) limits: Arc<TransferLimits>,
    /// Set for links whose regions are reached by address.
    pub(crate) nixl: Option<Arc<Nixl>>,
    pub(crate) stop: watch::Receiver<bool>,
}

/// Lands pushes until the link ends, or `void` resolves: the connection it belongs to is gone.
pub(crate) async fn serve(
    socket: Arc<Socket>,
    peer: Arc<str>,
    kind: TransportKind,
    void: impl Future<Output = ()>,
    receiving: Receiving,
) {
    tracing::info!(%peer, %kind, "kv blocks can arrive from this peer over a link");
    let mut inbound = Inbound {
        socket: socket.clone(),
        peer: peer.clone(),
        kind,
        receiving: receiving.clone(),
        nixl_peer: None,
        regions: HashMap::new(),
        landings: HashMap::new(),
    };
    let detail = tokio::select! {
        biased;
        () = stopped(receiving.stop.clone()) => "this agent was closed".to_owned(),
        error = inbound.read() => error,
        error = socket.flush() => error.to_string(),
        () = void => "its connection ended".to_owned(),
    };
    tracing::debug!(%peer, %kind, detail, "link ended");
    for landing in inbound.landings.into_values() {
        landing.broken(detail.clone());
    }
}

/// One link, as its reader sees it.
struct Inbound {
    socket: Arc<Socket>,
    peer: Arc<str>,
    kind: TransportKind,
    receiving: Receiving,
    /// The process that the regions are in, where they are reached by address.
    nixl_peer: Option<Arc<NixlPeer>>,
    regions: HashMap<u32, Arc<Source>>,
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
                let taken = match decoder.next() {
                    Ok(Some(Frame {
                        id,
                        body: Body::RegionAt { base, len, metadata },
                    })) => self.region_at(id, base, len, metadata).await,
                    Ok(Some(frame)) => self.take(frame, &mut descriptors),
                    Ok(None) => break,
                    Err(breach) => Err(breach),
                };
                if let Err(breach) = taken {
                    tracing::warn!(breach, kind = %self.kind, "link ended: the peer broke the protocol");
                    return breach.into();
                }
                if self.nixl_peer.as_ref().is_some_and(|peer| !peer.usable()) {
                    return "its memory cannot be read any more".into();
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
                let source = Mapping::new(&file, len).map(Source::Mapping);
                self.region(id, source)
            }
            // Taken where there is time to wait.
            Body::RegionAt { .. } => Ok(()),
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
                        self.receiving.copiers.submit(landing.clone());
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

    /// A region by its address: the library learns of it on a thread that may wait.
    async fn region_at(&mut self, id: u32, base: u64, len: u64, metadata: Bytes) -> Result<(), &'static str> {
        let nixl = self.receiving.nixl.clone();
        let nixl = nixl.ok_or("it names a region by its address on a link for shared memory")?;
        let known = self.nixl_peer.clone();
        let loaded = tokio::task::spawn_blocking(move || nixl.peer(&metadata, known)).await;
        let source = match loaded {
            Ok(Ok(peer)) => {
                self.nixl_peer = Some(peer.clone());
                Source::remote(peer, base, len)
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("this agent was closed".into()),
        };
        self.region(id, source)
    }

    fn region(&mut self, id: u32, source: Result<Source, String>) -> Result<(), &'static str> {
        if self.regions.contains_key(&id) {
            return Err("it names two regions alike");
        }
        let source = match source {
            Ok(_) if self.regions.len() >= REGIONS_MAX => Err(format!("{REGIONS_MAX} regions are mapped, the most")),
            other => other,
        };
        let mut out = BytesMut::new();
        match source {
            Ok(source) => {
                self.regions.insert(id, Arc::new(source));
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
        let source = self
            .regions
            .get(&region)
            .ok_or("it pushes from a region that it has not named")?;
        // A refused push is forgotten by the sender's next word, or here.
        let max = self.receiving.limits.pushes_per_connection_max as usize;
        if self.landings.len() >= max {
            self.landings.retain(|_, landing| !landing.over());
        }
        if self.landings.len() >= max {
            return Err("it has more pushes in flight than it may");
        }
        if self.landings.contains_key(&id) {
            return Err("it names two pushes alike");
        }
        let table = &self.receiving.table;
        match table.claim(window, push, lane) {
            Ok(Claimed::Window(cell)) => {
                let landing = Landing::new(
                    id,
                    (cell, lane),
                    self.peer.clone(),
                    table.clone(),
                    source.clone(),
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
