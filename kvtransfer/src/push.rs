//! The sender's handles on a push, and what a transport sees of it.
//!
//! Two locks with two jobs. The *queue* lock guards the state machine and is held for moments only, so that
//! [`PushWriter::write`], called by compute between two layers, never waits for memory or network. The *fence* lock is
//! held while bytes are copied out of the region; dropping or aborting a push takes it, so that afterwards nothing
//! reads the blocks any more and they may be reused.

use crate::limits::SEND_CHUNK_BYTES;
use crate::push_state::{After, PushReport, PushState};
use crate::ranges::Descriptor;
use crate::stats::Counters;
use crate::transport::TransportKind;
use crate::window_table::lock;
use crate::wire::{Reply, WRITE_HEADER_BYTES, put_finish, put_mark, put_open, put_write};
use crate::{AbortReason, PushError, Region};
use bytes::{Bytes, BytesMut};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::sync::Notify;

/// One push, shared by its owner, its writers and the transport that carries it.
#[derive(Debug)]
pub(crate) struct Outgoing {
    window: u64,
    region: Arc<Region>,
    state: Mutex<PushState>,
    /// True once nothing may be read from the region any more.
    fence: Mutex<bool>,
    /// Something to send.
    work: Notify,
    /// Settled.
    settled: Notify,
    counters: Arc<Counters>,
}

/// What a transport is to do next.
pub(crate) enum Next {
    /// Send these bytes, then ask again.
    Send(Bytes),
    /// Send these bytes; they are the last.
    Last(Bytes),
    /// Wait for [`Outgoing::work`].
    Wait,
    /// The push is over; stop.
    Over,
}

impl Outgoing {
    pub(crate) fn new(window: u64, region: Arc<Region>, descriptors_max: usize, counters: Arc<Counters>) -> Self {
        counters.pushes_open.add(1);
        Self {
            window,
            state: Mutex::new(PushState::new(region.len(), descriptors_max)),
            region,
            fence: Mutex::new(false),
            work: Notify::new(),
            settled: Notify::new(),
            counters,
        }
    }

    /// The frame that names the window.
    pub(crate) fn opening(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(16);
        put_open(&mut out, self.window);
        out.freeze()
    }

    /// The next bytes of the stream. `batch` is scratch space, kept by the caller between calls.
    pub(crate) fn next(&self, batch: &mut Vec<Descriptor>) -> Next {
        let after = lock(&self.state).take_batch(batch);
        match after {
            After::Over => return Next::Over,
            After::Idle => return Next::Wait,
            After::More | After::Mark | After::Finish { .. } => {}
        }
        let data: usize = batch.iter().map(|piece| piece.len).sum();
        let mut out = BytesMut::with_capacity(data + (batch.len() + 2) * WRITE_HEADER_BYTES);
        let fenced = lock(&self.fence);
        if *fenced {
            return Next::Over;
        }
        for piece in batch.iter() {
            debug_assert!(piece.len <= SEND_CHUNK_BYTES);
            put_write(&mut out, piece.remote as u64, piece.len as u32);
            let start = out.len();
            out.resize(start + piece.len, 0);
            // Inside the region: checked when it was written.
            let copied = self.region.copy_out(piece.local, &mut out[start..]);
            debug_assert!(copied);
        }
        drop(fenced);
        self.counters.bytes_out.add(data as u64);
        match after {
            After::Finish { total, payload } => {
                put_finish(&mut out, total, &payload);
                Next::Last(out.freeze())
            }
            After::Mark => {
                put_mark(&mut out);
                Next::Send(out.freeze())
            }
            After::More | After::Idle | After::Over => Next::Send(out.freeze()),
        }
    }

    /// Waits for something to send.
    pub(crate) async fn work(&self) {
        self.work.notified().await;
    }

    /// Hands over the receiver's reply.
    pub(crate) fn reply(&self, reply: Reply) -> Result<(), PushError> {
        let settled = {
            let mut state = lock(&self.state);
            let open = state.settled().is_none();
            state.reply(reply, Instant::now())?;
            // A late word on a push that is over changes nothing.
            open && state.settled().is_some()
        };
        if settled {
            self.counters.pushes_open.sub(1);
            self.counters.pushes_completed.add(1);
            self.settled.notify_waiters();
        }
        Ok(())
    }

    /// Ends the push with `error`, unless it is settled. When this returns the region is not read any more.
    pub(crate) fn fail(&self, error: PushError) {
        let failed = lock(&self.state).fail(error);
        *lock(&self.fence) = true;
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
            if let Some(result) = lock(&self.state).settled() {
                return result.clone();
            }
            settled.as_mut().await;
            settled.set(self.settled.notified());
        }
    }

    fn error(&self) -> Option<PushError> {
        lock(&self.state)
            .settled()
            .and_then(|result| result.as_ref().err().cloned())
    }
}

/// What a transport needs that lets the receiver fetch the bytes: descriptors instead of bytes.
impl Outgoing {
    /// The window that is pushed to.
    pub(crate) fn window(&self) -> u64 {
        self.window
    }

    /// Where the bytes are.
    pub(crate) fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Whether the push is still under way. If it is, the bytes that were to be read have not been given back yet.
    pub(crate) fn live(&self) -> bool {
        lock(&self.state).settled().is_none()
    }

    /// The next descriptors, for the receiver to fetch; see [`PushState::take_batch`].
    pub(crate) fn take(&self, batch: &mut Vec<Descriptor>) -> After {
        let after = lock(&self.state).take_batch(batch);
        let bytes: usize = batch.iter().map(|piece| piece.len).sum();
        self.counters.bytes_out.add(bytes as u64);
        self.counters.shared_memory_bytes_out.add(bytes as u64);
        after
    }

    /// Says which transport carries the push, for its report.
    pub(crate) fn carried_by(&self, transport: TransportKind) {
        lock(&self.state).carried_by(transport);
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
        lock(&self.out.state).finish(payload, Instant::now())?;
        self.out.work.notify_one();
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
    /// blocks. The bytes are read later: they must stay untouched until the push is settled.
    ///
    /// # Errors
    /// Misuse (nothing is queued), or the push's own failure, after which no write can succeed.
    pub fn write(&self, local: Range<usize>, remote_offset: usize) -> Result<(), PushError> {
        lock(&self.out.state).write(local, remote_offset, Instant::now())?;
        self.out.work.notify_one();
        Ok(())
    }
}
