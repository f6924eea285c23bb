//! The receiving end of one push on a link: queues what it asks for and copies it into the window.
//!
//! ```text
//!   landing ── FINISH, or the last byte, and the window is complete ──► over, DONE sent
//!      └── refusal, closed window ──► over, REFUSED sent;   ABORT, lost link ──► over, nothing sent
//! ```
//!
//! Batches are copied in the order they came, one at a time, and each is answered by LANDED. Every copy is made under
//! the window's lock, which is the fence, and lets go of it soon after somebody else wants it. Whoever makes the window over makes the push over; the last
//! reply is sent once. A link that is lost ends the lane, not the window: the push may go on over another.

use super::flow::PULLS_AHEAD;
use super::frames::{Pieces, put_reply};
use super::socket::Socket;
use super::source::{Part, Source};
use crate::incoming::given_up;
use crate::limits::FRAME_BYTES_MAX;
use crate::window_state::{Finish, Phase};
use crate::window_table::{WindowCell, WindowTable, lock};
use crate::wire::{LaneKey, Reply};
use crate::{Refusal, WindowError};
use bytes::BytesMut;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// A push that lands.
pub(crate) struct Landing {
    id: u32,
    window: Arc<WindowCell>,
    lane: LaneKey,
    peer: Arc<str>,
    table: Arc<WindowTable>,
    source: Arc<Source>,
    socket: Arc<Socket>,
    queue: Mutex<Queue>,
    over: AtomicBool,
}

#[derive(Default)]
struct Queue {
    batches: VecDeque<Pieces>,
    landed: u64,
    /// Somebody copies, or will.
    busy: bool,
}

impl Landing {
    /// The landing of push `id`, whose `lane` has claimed `window` and which reads from `source`.
    pub(crate) fn new(
        id: u32,
        (window, lane): (Arc<WindowCell>, LaneKey),
        peer: Arc<str>,
        table: Arc<WindowTable>,
        source: Arc<Source>,
        socket: Arc<Socket>,
    ) -> Self {
        Self {
            id,
            window,
            lane,
            peer,
            table,
            source,
            socket,
            queue: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    /// Queues a batch. True if the caller must now have it copied: nobody else is at it.
    ///
    /// # Errors
    /// A breach of the protocol: more batches than a push may ask for at once.
    pub(crate) fn queue(&self, pieces: Pieces) -> Result<bool, &'static str> {
        let mut queue = lock(&self.queue);
        if queue.batches.len() >= PULLS_AHEAD {
            return Err("it asks for more at once than a push may");
        }
        queue.batches.push_back(pieces);
        Ok(!std::mem::replace(&mut queue.busy, true))
    }

    /// Copies one batch and answers it. True if another waits, and the caller is to go on.
    pub(crate) fn copy_next(&self) -> bool {
        let next = {
            let mut queue = lock(&self.queue);
            let next = queue.batches.pop_front();
            queue.busy = next.is_some();
            next
        };
        let Some(pieces) = next else { return false };
        match self.copy(&pieces) {
            Ok((bytes, complete)) => {
                let landed = {
                    let mut queue = lock(&self.queue);
                    queue.landed += bytes;
                    queue.landed
                };
                match complete {
                    Some(total) => self.complete(total),
                    None if !self.over() => self.reply(Reply::Landed(landed)),
                    None => {}
                }
            }
            Err(refusal) => self.refuse(refusal),
        }
        // Only now may somebody else copy, so that the answers leave in order.
        let mut queue = lock(&self.queue);
        queue.busy = !queue.batches.is_empty();
        queue.busy
    }

    /// Bytes copied, and the push's total if they complete its window.
    fn copy(&self, pieces: &Pieces) -> Result<(u64, Option<u64>), Refusal> {
        self.source.prepare(&self.window.memory())?;
        let (parts, bytes) = self.parts(pieces)?;
        let (mut rest, mut complete) = (&parts[..], None);
        while !rest.is_empty() {
            let mut held = 0;
            // Never empty: no part is longer than what one hold may bring.
            let run = rest.iter().take_while(|part| {
                held += part.len;
                held <= self.source.hold_bytes()
            });
            let run = &rest[..run.count()];
            let places = run.iter().map(|part| (part.target, part.len));
            let copy = |memory: &_, wanted: &dyn Fn() -> bool| self.source.copy_to(run, memory, wanted);
            let landed = self.window.land_with(self.lane, self.source.transport(), places, copy);
            let (copied, total) = landed?;
            complete = total.or(complete);
            rest = &rest[copied..];
        }
        Ok((bytes, complete))
    }

    /// What to copy for `pieces`, all of it inside source and window, and its bytes.
    fn parts(&self, pieces: &Pieces) -> Result<(Vec<Part>, u64), Refusal> {
        let (mut parts, mut bytes) = (Vec::new(), 0);
        let chunk = self.source.chunk_bytes();
        for piece in pieces.iter() {
            let len = u64::from(piece.len);
            if piece.len as usize > FRAME_BYTES_MAX {
                let max = FRAME_BYTES_MAX as u64;
                return Err(Refusal::FrameTooLong { len, max });
            }
            let start = self.window.admit(self.lane, piece.remote, len)?;
            if !self.source.contains(piece.local, len) {
                return Err(Refusal::OutOfRange {
                    offset: piece.local,
                    len,
                });
            }
            for done in (0..piece.len as usize).step_by(chunk) {
                parts.push(Part {
                    local: piece.local + done as u64,
                    target: start + done,
                    len: chunk.min(piece.len as usize - done),
                });
            }
            bytes += len;
        }
        Ok((parts, bytes))
    }

    /// The push says it is complete.
    pub(crate) fn finish(&self, finish: Finish) {
        let complete = matches!(self.window.phase(), Phase::Completed(_));
        let room = if finish.notify && !complete {
            self.table.inbox().room()
        } else {
            Ok(())
        };
        match room.and_then(|()| self.window.finish(self.lane, finish)) {
            Ok(Some(total)) => self.complete(total),
            // Another lane still carries some of it, and will be told.
            Ok(None) => {}
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// The window is complete: the last word, by whoever sees it first.
    fn complete(&self, total: u64) {
        if self.end() {
            if let Some(payload) = self.window.notification() {
                self.table.inbox().notify(&self.peer, payload);
            }
            self.reply(Reply::Done(total));
        }
    }

    /// The push ended for `cause`, and its window with it. Nothing is said of it.
    pub(crate) fn lost(&self, cause: WindowError) {
        self.end();
        self.window.fail(cause);
    }

    /// The link ended, or this lane of the push, which may go on over another.
    pub(crate) fn broken(&self, detail: String) {
        self.end();
        let peer = self.peer.to_string();
        let cause = WindowError::PeerLost { peer, detail };
        self.window.lane_broke(self.lane, cause, Instant::now());
    }

    /// Says at once if the window is given up on this side. Resolves when the window is over.
    pub(crate) async fn watch(self: Arc<Self>) {
        let refusal = self
            .window
            .until(|phase| match phase {
                // The end of the link tells of a closed agent, and that it is that.
                Phase::Completed(_) | Phase::Failed(WindowError::AgentClosed) => Some(None),
                phase => given_up(phase).map(Some),
            })
            .await;
        if let Some(refusal) = refusal
            && self.end()
        {
            self.reply(Reply::Refused(refusal));
        }
    }

    fn refuse(&self, refusal: Refusal) {
        let first = self.end();
        if first && refusal != Refusal::WindowClosed {
            self.table.counters().refusals.add(1);
        }
        if refusal.lane_only() {
            self.broken(refusal.to_string());
        } else {
            self.window.fail(WindowError::Refused(refusal));
        }
        if first {
            self.reply(Reply::Refused(refusal));
        }
    }

    /// Whether the last word is spoken.
    pub(crate) fn over(&self) -> bool {
        self.over.load(Relaxed)
    }

    /// True for the first to call it, who says the last word.
    fn end(&self) -> bool {
        !self.over.swap(true, Relaxed)
    }

    fn reply(&self, reply: Reply) {
        let mut out = BytesMut::with_capacity(32);
        put_reply(&mut out, self.id, reply);
        self.socket.send(out.freeze());
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        // Only if the runtime stops in the middle, or the link was lost; otherwise the window is over by now.
        if !self.over() {
            self.broken("its lane ended without a word".into());
        }
    }
}
