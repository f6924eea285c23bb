//! The sender's side: a link, and the pushes that it carries. What a push may send next is decided by [`super::flow`];
//! whoever brings news, the push's owner or the link's reader, moves it on at once.

use super::flow::{Flow, Step};
use super::frames::{
    Body, FrameDecoder, METADATA_BYTES_MAX, Open, put_abort, put_finish, put_forget, put_open, put_pull, put_region,
    put_region_at,
};
use super::receive::REGIONS_MAX;
use super::socket::{READ_BYTES, Socket};
use super::stopped;
use crate::PushError;
use crate::memory::Region;
use crate::nixl::NixlAgent;
use crate::push::{self, Outgoing};
use crate::ranges::Descriptor;
use crate::storage::Memory;
use crate::transport::TransportKind;
use crate::window_table::lock;
use crate::wire::{Integrity, Reply};
use bytes::BytesMut;
use rustix::fd::OwnedFd;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{sleep_until, timeout};

/// How long the end of a link waits for the peer's goodbye on the connection, which tells a closed agent from a dead one.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(50);

/// A link to one peer.
pub(crate) struct Link {
    socket: Arc<Socket>,
    peer: SocketAddr,
    /// What regions are registered with to be read by address; without, they go out as descriptors.
    nixl: Option<Arc<NixlAgent>>,
    stall_timeout: Duration,
    /// Pushes that may be in flight.
    slots: Semaphore,
    lanes: Mutex<Lanes>,
    regions: Mutex<Regions>,
}

#[derive(Default)]
struct Lanes {
    open: HashMap<u32, Arc<Lane>>,
    next_id: u32,
    /// Why the link is over.
    over: Option<PushError>,
}

/// The regions this link has told the peer of, by their id in this process.
#[derive(Default)]
struct Regions {
    told: HashMap<u64, Told>,
    next_id: u32,
}

/// How the peer reaches a region.
enum Access {
    /// By mapping it.
    File(OwnedFd),
    /// By its address, and what the library says of the memory that is registered.
    Address(Vec<u8>),
}

struct Told {
    id: u32,
    /// What the peer said, once it has.
    taken: watch::Sender<Option<bool>>,
}

/// One push on a link: a lane of it.
struct Lane {
    id: u32,
    push: Arc<Outgoing>,
    lane: push::Lane,
    kind: TransportKind,
    state: Mutex<(Flow, Vec<Descriptor>)>,
    /// Why the lane is over, if the reader of the link knows, and the news of it.
    broke: Mutex<Option<PushError>>,
    broken: Notify,
}

/// What became of a push that a link was asked to carry.
pub(crate) enum Carried {
    /// Its memory cannot be shared with the peer; nothing was done.
    NotShared,
    /// It is settled.
    Over,
    /// Its lane broke; another may be opened after this time.
    Broke(Duration),
}

impl Link {
    pub(crate) fn new(
        socket: Socket,
        peer: SocketAddr,
        nixl: Option<Arc<NixlAgent>>,
        pushes_max: u32,
        stall_timeout: Duration,
    ) -> Arc<Self> {
        Arc::new(Self {
            socket: Arc::new(socket),
            peer,
            nixl,
            stall_timeout,
            slots: Semaphore::new(pushes_max as usize),
            lanes: Mutex::default(),
            regions: Mutex::default(),
        })
    }

    /// What the link carries pushes by.
    pub(crate) fn kind(&self) -> TransportKind {
        match self.nixl {
            Some(_) => TransportKind::Nixl,
            None => TransportKind::SharedMemory,
        }
    }

    /// Whether pushes can still be carried.
    pub(crate) fn alive(&self) -> bool {
        lock(&self.lanes).over.is_none()
    }

    /// Carries `push` to its end, or to the end of its lane on this link.
    pub(crate) async fn carry(self: &Arc<Self>, push: &Arc<Outgoing>) -> Carried {
        let ready = async {
            let Memory::Host(region) = push.memory() else {
                return None;
            };
            let region = self.share(region).await?;
            // Waits while as many pushes are in flight as the peer takes; it is given back with the lane.
            let slot = timeout(self.stall_timeout, self.slots.acquire()).await;
            Some((region, slot))
        };
        let ready = tokio::select! {
            biased;
            _ = push.settled() => return Carried::Over,
            ready = ready => ready,
        };
        let Some((region, slot)) = ready else {
            return Carried::NotShared;
        };
        let stalled = PushError::Stalled {
            limit: self.stall_timeout,
        };
        let Ok(Ok(_slot)) = slot else {
            push.fail(stalled);
            return Carried::Over;
        };
        // Memory that both map is what it is, and a fabric checks what it moves: nothing to check here.
        let Some(first) = push.lane(0, Integrity::of(true)) else {
            return Carried::Over;
        };
        push.carried_by(self.kind());
        let replies = first.replies();
        let lane = match self.open(push, first, region) {
            Ok(lane) => lane,
            Err(error) => return replies.broke(error).map_or(Carried::Over, Carried::Broke),
        };
        let outcome = tokio::select! {
            biased;
            result = push.settled() => result.map(|_| ()),
            error = self.drive(&lane.0) => Err(error),
        };
        let Err(error) = outcome else { return Carried::Over };
        let (wait, reason) = replies.give_up(error);
        // A link that is over has told the peer by its end.
        if self.alive() {
            let mut out = BytesMut::new();
            put_abort(&mut out, lane.0.id, reason.code());
            self.socket.send(out.freeze());
        }
        wait.map_or(Carried::Over, Carried::Broke)
    }

    /// The id under which the peer knows `region`; `None` if it does not take it.
    async fn share(self: &Arc<Self>, region: &Arc<Region>) -> Option<u32> {
        if !self.alive() {
            return None;
        }
        let find = |regions: &Regions| {
            let told = regions.told.get(&region.id())?;
            Some((told.id, told.taken.subscribe()))
        };
        let told = find(&lock(&self.regions));
        let (id, mut taken) = match told {
            Some(told) => told,
            None => {
                let access = self.access(region).await?;
                let mut regions = lock(&self.regions);
                // Another push may have been as fast.
                match find(&regions) {
                    Some(told) => told,
                    None => self.tell(&mut regions, region, access)?,
                }
            }
        };
        // Without an answer, or a link, QUIC is the way; if the peer is dead QUIC says so.
        let answer = timeout(self.stall_timeout, taken.wait_for(Option::is_some))
            .await
            .ok()?;
        answer.ok()?.unwrap_or(false).then_some(id)
    }

    /// What to tell the peer of `region`; `None` if it cannot be shared.
    async fn access(&self, region: &Arc<Region>) -> Option<Access> {
        let Some(nixl) = self.nixl.clone() else {
            return Some(Access::File(region.file()?.try_clone_to_owned().ok()?));
        };
        let registered = region.clone();
        // Pinning memory takes its time.
        let metadata = tokio::task::spawn_blocking(move || {
            nixl.register(&registered)?;
            nixl.metadata()
        });
        match metadata.await.ok()? {
            Ok(metadata) if metadata.len() <= METADATA_BYTES_MAX => Some(Access::Address(metadata)),
            Ok(metadata) => {
                let (bytes, max) = (metadata.len(), METADATA_BYTES_MAX);
                tracing::warn!(
                    bytes,
                    max,
                    "what NIXL says of its memory is too long to send; QUIC carries the pushes"
                );
                None
            }
            Err(error) => {
                tracing::warn!(%error, "a region cannot be registered with NIXL; QUIC carries its pushes");
                None
            }
        }
    }

    fn tell(
        self: &Arc<Self>,
        regions: &mut Regions,
        region: &Arc<Region>,
        access: Access,
    ) -> Option<(u32, watch::Receiver<Option<bool>>)> {
        if regions.told.len() >= REGIONS_MAX || !self.alive() {
            return None;
        }
        regions.next_id += 1;
        let id = regions.next_id;
        let (sender, taken) = watch::channel(None);
        regions.told.insert(region.id(), Told { id, taken: sender });
        let mut out = BytesMut::new();
        let len = region.len() as u64;
        let file = match access {
            Access::File(file) => {
                put_region(&mut out, id, len);
                Some(file)
            }
            Access::Address(metadata) => {
                put_region_at(&mut out, id, region.address() as u64, len, &metadata);
                None
            }
        };
        self.socket.send_with(out.freeze(), file);
        // The peer's mapping holds the memory; it is to go when the region goes.
        let (link, key, freed) = (Arc::downgrade(self), region.id(), region.freed());
        tokio::spawn(async move {
            freed.await;
            if let Some(link) = link.upgrade() {
                lock(&link.regions).told.remove(&key);
                let mut out = BytesMut::new();
                put_forget(&mut out, id);
                link.socket.send(out.freeze());
            }
        });
        Some((id, taken))
    }

    fn open<'a>(&'a self, push: &Arc<Outgoing>, first: push::Lane, region: u32) -> Result<OpenLane<'a>, PushError> {
        let open = Open {
            window: push.window(),
            push: push.id(),
            lane: first.key(),
            region,
        };
        let lane = {
            let mut lanes = lock(&self.lanes);
            if let Some(error) = &lanes.over {
                return Err(error.clone());
            }
            // Used up after four thousand million pushes on one link; the few in flight by then are recent.
            lanes.next_id = lanes.next_id.wrapping_add(1);
            let lane = Arc::new(Lane::new(lanes.next_id, push.clone(), first, self.kind()));
            lanes.open.insert(lane.id, lane.clone());
            lane
        };
        let mut out = BytesMut::new();
        put_open(&mut out, lane.id, open);
        self.socket.send(out.freeze());
        lane.advance(&self.socket);
        Ok(OpenLane(lane, self))
    }

    /// Moves a push on whenever its owner has written, and ends when the peer makes no progress.
    async fn drive(&self, lane: &Lane) -> PushError {
        loop {
            let waiting = lock(&lane.state).0.waiting_since();
            let deadline = waiting.map(|since| since + self.stall_timeout);
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return PushError::Stalled {
                    limit: self.stall_timeout,
                };
            }
            if let Some(error) = lock(&lane.broke).take() {
                return error;
            }
            tokio::select! {
                () = lane.lane.work() => lane.advance(&self.socket),
                // A permit is kept if nobody waits.
                () = lane.broken.notified() => {}
                () = sleep_until(deadline.unwrap_or_else(Instant::now).into()), if deadline.is_some() => {}
            }
        }
    }

    /// Reads what the peer says until there is a reason to stop.
    async fn read(&self) -> String {
        let (mut buffer, mut decoder) = (vec![0; READ_BYTES], FrameDecoder::default());
        let mut descriptors = VecDeque::new();
        loop {
            match self.socket.receive(&mut buffer, &mut descriptors).await {
                Ok(0) => return "it closed the link, or died".into(),
                Ok(count) => decoder.feed(&buffer[..count]),
                Err(error) => return error.to_string(),
            }
            // A receiver has none to give.
            descriptors.clear();
            loop {
                let (id, body) = match decoder.next() {
                    Ok(Some(frame)) => (frame.id, frame.body),
                    Ok(None) => break,
                    Err(breach) => return breach.into(),
                };
                match body {
                    Body::Reply(reply) => self.reply(id, reply),
                    Body::RegionTaken => self.answered(id, true),
                    Body::RegionRefused { sentence } => {
                        tracing::warn!(peer = %self.peer, sentence, "the peer does not take a region; QUIC carries it");
                        self.answered(id, false);
                    }
                    _ => return "it sends what only a sender sends".into(),
                }
            }
        }
    }

    fn reply(&self, id: u32, reply: Reply) {
        // A push that is unknown here is over, and the news is on its way to the peer.
        let lane = lock(&self.lanes).open.get(&id).cloned();
        let Some(lane) = lane else { return };
        let counted = match reply {
            Reply::Landed(bytes) => lock(&lane.state)
                .0
                .landed(bytes, Instant::now())
                .map_err(PushError::Protocol),
            Reply::Done(_) | Reply::Refused(_) => Ok(()),
        };
        match counted.and_then(|()| lane.lane.replies().reply(reply)) {
            Ok(()) => lane.advance(&self.socket),
            // Wakes the push's task, which tells the peer.
            Err(error) => lane.end(error),
        }
    }

    fn answered(&self, id: u32, taken: bool) {
        let regions = lock(&self.regions);
        if let Some(told) = regions.told.values().find(|told| told.id == id) {
            told.taken.send_replace(Some(taken));
        }
    }

    fn end(&self, error: &PushError) {
        let open = {
            let mut lanes = lock(&self.lanes);
            lanes.over.get_or_insert_with(|| error.clone());
            std::mem::take(&mut lanes.open)
        };
        for lane in open.into_values() {
            lane.end(error.clone());
        }
        // Whoever waits for an answer gets none.
        lock(&self.regions).told.clear();
    }
}

/// The task of a link: reads and writes until it is over, and then fails what it carries.
pub(crate) async fn run(link: Arc<Link>, lost: impl Future<Output = PushError> + Send, stop: watch::Receiver<bool>) {
    tracing::info!(peer = %link.peer, kind = %link.kind(), "kv blocks go to this peer over a link");
    /// Ends the link if the runtime stops, too.
    struct End(Arc<Link>);
    impl Drop for End {
        fn drop(&mut self) {
            self.0.end(&PushError::AgentClosed);
        }
    }
    let link = End(link);
    let lost_link = |detail: String| PushError::PeerLost {
        peer: link.0.peer,
        detail,
    };
    let mut lost = std::pin::pin!(lost);
    let broken = tokio::select! {
        biased;
        () = stopped(stop) => Ok(PushError::AgentClosed),
        error = &mut lost => Ok(error),
        detail = link.0.read() => Err(detail),
        error = link.0.socket.flush() => Err(error.to_string()),
    };
    let error = match broken {
        Ok(error) => error,
        // A peer that closed its agent says so on the connection at about the same time.
        Err(detail) => timeout(GOODBYE_TIMEOUT, lost)
            .await
            .unwrap_or_else(|_| lost_link(detail)),
    };
    tracing::debug!(peer = %link.0.peer, kind = %link.0.kind(), %error, "link ended");
    link.0.end(&error);
}

/// A lane that is forgotten when its push's task ends.
struct OpenLane<'a>(Arc<Lane>, &'a Link);

impl Drop for OpenLane<'_> {
    fn drop(&mut self) {
        lock(&self.1.lanes).open.remove(&self.0.id);
    }
}

impl Lane {
    fn new(id: u32, push: Arc<Outgoing>, lane: push::Lane, kind: TransportKind) -> Self {
        Self {
            id,
            push,
            lane,
            kind,
            state: Mutex::new((Flow::new(Instant::now()), Vec::new())),
            broke: Mutex::default(),
            broken: Notify::new(),
        }
    }

    fn end(&self, error: PushError) {
        lock(&self.broke).get_or_insert(error);
        self.broken.notify_one();
    }

    /// Sends what may be sent now.
    fn advance(&self, socket: &Socket) {
        let mut state = lock(&self.state);
        let (flow, pieces) = &mut *state;
        loop {
            let step = flow.next(pieces, Instant::now(), |batch| {
                self.lane.take_to_fetch(batch, self.kind)
            });
            let mut out = BytesMut::new();
            match step {
                Step::Pull => put_pull(&mut out, self.id, pieces),
                // Alive now means that every byte landed while the push was: nothing can have been overwritten before
                // it was read.
                Step::Finish(finish) if self.push.live() => put_finish(&mut out, self.id, &finish),
                Step::Finish(_) | Step::Wait => return,
            }
            // While the state is locked, so that frames leave in order.
            socket.send(out.freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::push::Push;
    use crate::push_state::PushLimits;
    use bytes::Bytes;
    use tokio::net::UnixStream;

    /// A push that is given up while the receiver copies: its blocks may be overwritten by then, so the answer that
    /// would have let it finish must not.
    #[tokio::test]
    async fn a_push_given_up_never_finishes() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (socket, theirs) = (Socket::new(ours), Socket::new(theirs));
        let (mut buffer, mut decoder) = (vec![0; READ_BYTES], FrameDecoder::default());
        for given_up in [false, true] {
            let region = Region::new(64).unwrap();
            let limits = PushLimits {
                descriptors_max: 8,
                payload_max: 8,
                retries_max: 0,
                backoff: Duration::ZERO,
                grace: Duration::ZERO,
            };
            let out = Arc::new(Outgoing::new(1, 2, region.into(), limits, Arc::default()));
            let first = out.lane(0, Integrity::of(true)).unwrap();
            let push = Push::new(out.clone());
            push.writer().write(0..64, 0).unwrap();
            let mut finishing = Box::pin(push.finish(Bytes::new()));
            assert!(futures_util::poll!(&mut finishing).is_pending());
            let lane = Lane::new(1, out, first, TransportKind::SharedMemory);
            lane.advance(&socket);
            if given_up {
                drop(finishing);
            }
            lock(&lane.state).0.landed(64, Instant::now()).unwrap();
            lane.advance(&socket);
            // What ends the wait below, whatever was sent before.
            let mut out = BytesMut::new();
            put_forget(&mut out, 7);
            socket.send(out.freeze());
            let mut heard = Vec::new();
            while heard.last() != Some(&Body::Forget) {
                let count = theirs.receive(&mut buffer, &mut VecDeque::new()).await.unwrap();
                decoder.feed(&buffer[..count]);
                while let Some(frame) = decoder.next().unwrap() {
                    heard.push(frame.body);
                }
            }
            let finished = heard.iter().any(|body| matches!(body, Body::Finish { .. }));
            assert!(matches!(heard[0], Body::Pull(_)) && finished != given_up, "{heard:?}");
        }
    }
}
