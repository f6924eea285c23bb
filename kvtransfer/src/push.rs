//! The sender's handles on a push, and what a transport sees of it: an [`Outgoing`] and its [`Lane`]s.
//!
//! Two locks with two jobs. The *queue* lock guards the state machine and is held for moments only, so that
//! [`PushWriter::write`], called by compute between two layers, never waits for memory or network. The *fence* lock is
//! held (shared between lanes) while bytes are copied out of the memory; ending a push takes it alone, so that
//! afterwards nothing reads the blocks any more and they may be reused.
//!
//! A transport opens a lane per slot it wants to use, drives it until it ends, and reports a lane that broke with
//! [`Lane::broke`]; the answer says when to open the slot again. It never decides by itself that a push has failed
//! because of a lane.

use crate::limits::{LANE_BACKLOG_BYTES, SEND_CHUNK_BYTES};
use crate::push_state::{After, PushLimits, PushReport, PushState};
use crate::ranges::Descriptor;
use crate::stats::Counters;
use crate::storage::Memory;
use crate::transport::TransportKind;
use crate::window_table::lock;
use crate::wire::{FrameEncoder, Integrity, LaneKey, Reply};
use crate::{AbortReason, PushError};
use bytes::{Bytes, BytesMut};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// One push, shared by its owner, its writers and the transport that carries it.
#[derive(Debug)]
pub(crate) struct Outgoing {
    window: u64,
    /// Random; by it the receiver knows that lanes belong together.
    id: u64,
    memory: Memory,
    state: Mutex<PushState>,
    /// True once nothing may be read from the memory any more.
    fence: RwLock<bool>,
    /// Something to send, for each slot's lane.
    work: Mutex<Vec<Arc<Notify>>>,
    /// Much is queued.
    crowded: Notify,
    /// Settled.
    settled: Notify,
    counters: Arc<Counters>,
}

/// What a transport is to do next.
pub(crate) enum Next {
    /// Send these bytes, then ask again.
    Send(Bytes),
    /// Send these bytes; they are the last of the lane.
    Last(Bytes),
    /// Wait for [`Lane::work`].
    Wait,
    /// The push is over, or another lane has taken this one's place; stop.
    Over,
}

impl Outgoing {
    /// A push of bytes of `memory` into `window`. `id` is random.
    pub(crate) fn new(window: u64, id: u64, memory: Memory, limits: PushLimits, counters: Arc<Counters>) -> Self {
        counters.pushes_open.add(1);
        Self {
            window,
            id,
            state: Mutex::new(PushState::new(memory.len(), limits)),
            memory,
            fence: RwLock::new(false),
            work: Mutex::default(),
            crowded: Notify::new(),
            settled: Notify::new(),
            counters,
        }
    }

    /// A lane for `slot`, to be called again after the time that [`Lane::broke`] says. `None`: the push is over, or
    /// the slot may not be used (any more).
    pub(crate) fn lane(self: &Arc<Self>, slot: u16, integrity: Integrity) -> Option<Lane> {
        let key = lock(&self.state).open(slot)?;
        let work = {
            let mut all = lock(&self.work);
            while all.len() <= usize::from(slot) {
                all.push(Arc::default());
            }
            all[usize::from(slot)].clone()
        };
        Some(Lane {
            encoder: FrameEncoder::new(integrity),
            replies: LaneReplies {
                push: self.clone(),
                key,
                work,
            },
        })
    }

    /// Runs `read` unless the push is over; nothing ends it meanwhile.
    pub(crate) fn reading<T>(&self, read: impl FnOnce(&Memory) -> T) -> Option<T> {
        let fenced = self.fence.read().unwrap_or_else(PoisonError::into_inner);
        (!*fenced).then(|| read(&self.memory))
    }

    /// Resolves once so much is queued that `lanes` lanes are too few.
    pub(crate) async fn crowded(&self, lanes: u16) {
        let mut crowded = std::pin::pin!(self.crowded.notified());
        loop {
            crowded.as_mut().enable();
            if lock(&self.state).queued_bytes() > LANE_BACKLOG_BYTES * u64::from(lanes) {
                return;
            }
            crowded.as_mut().await;
            crowded.set(self.crowded.notified());
        }
    }

    /// Grows with every acknowledgement.
    pub(crate) fn progress(&self) -> u64 {
        lock(&self.state).progress()
    }

    /// Ends the push with `error`, unless it is settled. When this returns the memory is not read any more.
    pub(crate) fn fail(&self, error: PushError) {
        let failed = lock(&self.state).fail(error);
        self.shut();
        if failed {
            self.counters.pushes_open.sub(1);
            self.counters.pushes_failed.add(1);
            self.settled.notify_waiters();
        }
    }

    /// Resolves once the push is settled.
    pub(crate) async fn settled(&self) -> Result<PushReport, PushError> {
        let mut settled = std::pin::pin!(self.settled.notified());
        loop {
            // Listen first, look second: a change in between is not missed.
            settled.as_mut().enable();
            if let Some(result) = self.result() {
                return result;
            }
            settled.as_mut().await;
            settled.set(self.settled.notified());
        }
    }

    /// How the push ended, once it has.
    pub(crate) fn result(&self) -> Option<Result<PushReport, PushError>> {
        lock(&self.state).settled().cloned()
    }

    pub(crate) fn write(&self, local: Range<usize>, remote: usize, now: Instant) -> Result<(), PushError> {
        lock(&self.state).write(local, remote, now)?;
        self.wake();
        Ok(())
    }

    pub(crate) fn finish(&self, payload: Bytes, notify: bool, now: Instant) -> Result<(), PushError> {
        lock(&self.state).finish(payload, notify, now)?;
        self.wake();
        Ok(())
    }

    /// There is something for the lanes.
    fn wake(&self) {
        self.crowded.notify_waiters();
        for lane in lock(&self.work).iter() {
            lane.notify_one();
        }
    }

    /// From here on nothing is read.
    fn shut(&self) {
        *self.fence.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    fn error(&self) -> Option<PushError> {
        self.result().and_then(Result::err)
    }
}

/// One ordered, reliable byte stream of a push.
#[derive(Debug)]
pub(crate) struct Lane {
    encoder: FrameEncoder,
    replies: LaneReplies,
}

/// The receiving half of a lane's owner: what its replies do to the push.
#[derive(Debug, Clone)]
pub(crate) struct LaneReplies {
    push: Arc<Outgoing>,
    key: LaneKey,
    work: Arc<Notify>,
}

impl Lane {
    /// Whether it takes the place of one that broke.
    pub(crate) fn again(&self) -> bool {
        self.replies.key.generation > 0
    }

    /// A handle for whoever reads the replies.
    pub(crate) fn replies(&self) -> LaneReplies {
        self.replies.clone()
    }

    /// The frame that names the window, the push and the lane: the first bytes of the stream.
    pub(crate) fn opening(&mut self) -> Bytes {
        let mut out = BytesMut::with_capacity(64);
        let LaneReplies { push, key, .. } = &self.replies;
        self.encoder.open(&mut out, push.window, push.id, *key);
        out.freeze()
    }

    /// The next writes, as descriptors: for transports that move bytes by themselves, between [`Outgoing::reading`].
    pub(crate) fn take(&self, batch: &mut Vec<Descriptor>) -> After {
        lock(&self.replies.push.state).take_batch(self.replies.key, batch)
    }

    /// The next bytes of the stream. `batch` is scratch space, kept by the caller between calls.
    pub(crate) fn next(&mut self, batch: &mut Vec<Descriptor>) -> Next {
        let after = self.take(batch);
        match after {
            After::Over => return Next::Over,
            After::Idle => return Next::Wait,
            After::More | After::Mark | After::Finish { .. } => {}
        }
        let data: usize = batch.iter().map(|piece| piece.len).sum();
        let mut out = BytesMut::with_capacity(data + FrameEncoder::overhead(batch.len() + 2));
        let encoder = &mut self.encoder;
        let copied = self.replies.push.reading(|memory| {
            for piece in batch.iter() {
                debug_assert!(piece.len <= SEND_CHUNK_BYTES);
                let copied = encoder.write(&mut out, piece.remote as u64, piece.len, |to| {
                    // Inside the memory, checked when it was written; a file may still fail.
                    memory.copy_out(piece.local, to)
                });
                if !copied {
                    return Err(PushError::MemoryFailed {
                        local: piece.local,
                        len: piece.len,
                    });
                }
            }
            Ok(())
        });
        match copied {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                self.replies.push.fail(error);
                return Next::Over;
            }
            None => return Next::Over,
        }
        self.replies.push.counters.bytes_out.add(data as u64);
        match after {
            After::Finish { total, payload, notify } => {
                self.encoder.finish(&mut out, total, &payload, notify);
                Next::Last(out.freeze())
            }
            After::Mark => {
                self.encoder.mark(&mut out);
                Next::Send(out.freeze())
            }
            After::More | After::Idle | After::Over => Next::Send(out.freeze()),
        }
    }

    /// Waits for something to send.
    pub(crate) async fn work(&self) {
        self.replies.work.notified().await;
    }

    /// See [`LaneReplies::broke`].
    pub(crate) fn broke(&self, error: PushError) -> Option<Duration> {
        self.replies.broke(error)
    }
}

impl LaneReplies {
    /// Hands over the receiver's reply.
    ///
    /// # Errors
    /// What the lane ends with: give it to [`Lane::broke`].
    pub(crate) fn reply(&self, reply: Reply) -> Result<(), PushError> {
        self.reply_at(reply, Instant::now())
    }

    /// [`Lane::reply`] at a given time.
    pub(crate) fn reply_at(&self, reply: Reply, now: Instant) -> Result<(), PushError> {
        let push = &self.push;
        let settled = {
            let mut state = lock(&push.state);
            let open = state.settled().is_none();
            state.reply(self.key, reply, now)?;
            open && state.settled().is_some()
        };
        if settled {
            // Another lane may just be sending again what has landed already.
            push.shut();
            push.counters.pushes_open.sub(1);
            push.counters.pushes_completed.add(1);
            push.settled.notify_waiters();
        } else {
            // There may be room in flight again.
            self.work.notify_one();
        }
        Ok(())
    }

    /// The lane ended with `error`: what it carried goes back to the others. How long to wait before opening the slot
    /// again; `None` if that is not to be done. Has failed the push if the error is not about the lane only, or if no
    /// lane is left.
    pub(crate) fn broke(&self, error: PushError) -> Option<Duration> {
        self.broke_at(error, Instant::now())
    }

    /// [`LaneReplies::broke`], and what the receiver is to be told of it.
    pub(crate) fn give_up(&self, error: PushError) -> (Option<Duration>, AbortReason) {
        let (lane_only, reason) = (error.lane_only(), error.abort_reason());
        let wait = self.broke(error);
        let reason = match self.push.result() {
            _ if !lane_only => reason,
            // This lane was the last hope.
            Some(Err(error)) => error.abort_reason(),
            _ => AbortReason::LaneReplaced,
        };
        (wait, reason)
    }

    /// [`LaneReplies::broke`] at a given time.
    pub(crate) fn broke_at(&self, error: PushError, now: Instant) -> Option<Duration> {
        let push = &self.push;
        let (wait, over) = {
            let mut state = lock(&push.state);
            if state.settled().is_some() {
                return None;
            }
            let wait = state.broke(self.key, error, now);
            (wait, state.settled().is_some())
        };
        if over {
            push.shut();
            push.counters.pushes_open.sub(1);
            push.counters.pushes_failed.add(1);
            push.settled.notify_waiters();
        } else {
            push.counters.lanes_broken.add(1);
            push.wake();
        }
        wait
    }
}

/// What a transport needs that lets the receiver fetch the bytes: descriptors instead of bytes.
impl Outgoing {
    /// The window that is pushed to.
    pub(crate) fn window(&self) -> u64 {
        self.window
    }

    /// By which the receiver knows that lanes belong together.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Where the bytes are.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Whether the push is still under way. If it is, the bytes that were to be read have not been given back yet.
    pub(crate) fn live(&self) -> bool {
        lock(&self.state).settled().is_none()
    }

    /// Says which transport carries the push, for its report.
    pub(crate) fn carried_by(&self, transport: TransportKind) {
        lock(&self.state).carried_by(transport);
    }
}

/// The same of a lane.
impl Lane {
    /// Which one it is.
    pub(crate) fn key(&self) -> LaneKey {
        self.replies.key
    }

    /// The next descriptors, for the receiver to fetch; see [`PushState::take_batch`].
    pub(crate) fn take_to_fetch(&self, batch: &mut Vec<Descriptor>, transport: TransportKind) -> After {
        let after = self.take(batch);
        let bytes: usize = batch.iter().map(|piece| piece.len).sum();
        let counters = &self.replies.push.counters;
        counters.bytes_out.add(bytes as u64);
        match transport {
            TransportKind::SharedMemory => counters.shared_memory_bytes_out.add(bytes as u64),
            TransportKind::Nixl => counters.nixl_bytes_out.add(bytes as u64),
            TransportKind::Quic | TransportKind::Tcp => {}
        }
        after
    }
}

/// A push in progress. Dropping it before [`Push::finish`] has resolved aborts it: the receiver is told at once, and
/// nothing reads the region any more.
#[derive(Debug)]
pub struct Push {
    out: Arc<Outgoing>,
}

impl Push {
    pub(crate) fn new(out: Arc<Outgoing>) -> Self {
        Self { out }
    }

    /// What a transport carries.
    pub(crate) fn outgoing(&self) -> &Arc<Outgoing> {
        &self.out
    }

    /// A handle for the computing thread.
    pub fn writer(&self) -> PushWriter {
        PushWriter { out: self.out.clone() }
    }

    /// No more writes. Resolves once the receiver has acknowledged that every byte has landed and that `payload` is
    /// delivered. The blocks must stay untouched until then. Cancelling it aborts the push.
    ///
    /// # Errors
    /// Any [`PushError`]; the receiver then sees its window fail.
    pub async fn finish(self, payload: Bytes) -> Result<PushReport, PushError> {
        self.out.finish(payload, false, Instant::now())?;
        self.out.settled().await
    }

    /// Resolves with the reason if the push fails before it is finished, so that compute for it can be stopped.
    pub async fn failed(&self) -> PushError {
        match self.out.settled().await {
            Err(error) => error,
            // Unreachable while the push is not finished; then there is nothing to report.
            Ok(_) => std::future::pending().await,
        }
    }

    /// The reason if the push has failed already.
    pub fn error(&self) -> Option<PushError> {
        self.out.error()
    }

    /// Gives the push up and tells the receiver why.
    pub fn abort(self, reason: AbortReason) {
        self.out.fail(PushError::Aborted(reason));
    }
}

impl Drop for Push {
    fn drop(&mut self) {
        self.out.fail(PushError::Aborted(AbortReason::Dropped));
    }
}

/// Queues the writes of a push. Cheap to clone; usable from any thread.
#[derive(Debug, Clone)]
pub struct PushWriter {
    out: Arc<Outgoing>,
}

impl PushWriter {
    /// Queues the bytes of `local` in the pushing region to be written to `remote_offset` in the receiver's. Never
    /// blocks. The bytes are read later: they must stay untouched until the push is settled. Writes travel over several
    /// lanes and may be repeated, so two writes to one place must carry the same bytes.
    ///
    /// # Errors
    /// Misuse (nothing is queued), or the push's own failure, after which no write can succeed.
    pub fn write(&self, local: Range<usize>, remote_offset: usize) -> Result<(), PushError> {
        self.out.write(local, remote_offset, Instant::now())
    }
}
