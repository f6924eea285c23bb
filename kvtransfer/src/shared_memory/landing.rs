//! The receiving end of one push on a link: queues what it asks for and copies it into the window.
//!
//! ```text
//!   landing ── FINISH ──► over, DONE sent
//!      └── refusal, closed window ──► over, REFUSED sent;   ABORT, lost link ──► over, nothing sent
//! ```
//!
//! Batches are copied in the order they came, one at a time, and each is answered by LANDED. Every copy is made under
//! the window's lock, which is the fence, a chunk at a time. Whoever makes the window over makes the push over; the last
//! reply is sent once.

use super::flow::PULLS_AHEAD;
use super::frames::{Pieces, put_reply};
use super::mapping::Mapping;
use super::socket::Socket;
use crate::limits::FRAME_BYTES_MAX;
use crate::window_state::Phase;
use crate::window_table::{WindowCell, WindowTable, lock};
use crate::wire::Reply;
use crate::{Refusal, WindowError};
use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

/// Bytes copied under one hold of the window's lock: closing a window waits for no more, some tens of µs.
const CHUNK_BYTES: usize = 256 << 10;

/// A push that lands.
pub(super) struct Landing {
    id: u32,
    window: Arc<WindowCell>,
    table: Arc<WindowTable>,
    mapping: Arc<Mapping>,
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
    /// The landing of push `id`, which has claimed `window` and reads from `mapping`.
    pub(super) fn new(
        id: u32,
        window: Arc<WindowCell>,
        table: Arc<WindowTable>,
        mapping: Arc<Mapping>,
        socket: Arc<Socket>,
    ) -> Self {
        Self {
            id,
            window,
            table,
            mapping,
            socket,
            queue: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    /// Queues a batch. True if the caller must now have it copied: nobody else is at it.
    ///
    /// # Errors
    /// A breach of the protocol: more batches than a push may ask for at once.
    pub(super) fn queue(&self, pieces: Pieces) -> Result<bool, &'static str> {
        let mut queue = lock(&self.queue);
        if queue.batches.len() >= PULLS_AHEAD {
            return Err("it asks for more at once than a push may");
        }
        queue.batches.push_back(pieces);
        Ok(!std::mem::replace(&mut queue.busy, true))
    }

    /// Copies one batch and answers it. True if another waits, and the caller is to go on.
    pub(super) fn copy_next(&self) -> bool {
        let next = {
            let mut queue = lock(&self.queue);
            let next = queue.batches.pop_front();
            queue.busy = next.is_some();
            next
        };
        let Some(pieces) = next else { return false };
        match self.copy(&pieces) {
            Ok(bytes) => {
                let landed = {
                    let mut queue = lock(&self.queue);
                    queue.landed += bytes;
                    queue.landed
                };
                if !self.over() {
                    self.reply(Reply::Landed(landed));
                }
            }
            Err(refusal) => self.refuse(refusal),
        }
        // Only now may somebody else copy, so that the answers leave in order.
        let mut queue = lock(&self.queue);
        queue.busy = !queue.batches.is_empty();
        queue.busy
    }

    fn copy(&self, pieces: &Pieces) -> Result<u64, Refusal> {
        let mut bytes = 0;
        for piece in pieces.iter() {
            let len = u64::from(piece.len);
            if piece.len as usize > FRAME_BYTES_MAX {
                let max = FRAME_BYTES_MAX as u64;
                return Err(Refusal::FrameTooLong { len, max });
            }
            let start = self.window.admit(piece.remote, len)?;
            let out_of_range = Refusal::OutOfRange {
                offset: piece.local,
                len,
            };
            if !self.mapping.contains(piece.local, len) {
                return Err(out_of_range);
            }
            for done in (0..piece.len as usize).step_by(CHUNK_BYTES) {
                let part = CHUNK_BYTES.min(piece.len as usize - done);
                self.window.land_with(start + done, part, |region| {
                    self.mapping
                        .copy_to(piece.local + done as u64, region, start + done, part)
                })?;
            }
            bytes += len;
        }
        Ok(bytes)
    }

    /// The push says it is complete.
    pub(super) fn finish(&self, total: u64, payload: Bytes) {
        match self.window.finish(total, payload) {
            Ok(landed) => {
                if self.end() {
                    self.reply(Reply::Done(landed));
                }
            }
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// The push, or the link, ended for `cause`. Nothing is said of it.
    pub(super) fn lost(&self, cause: WindowError) {
        self.end();
        self.window.fail(cause);
    }

    /// Says at once if the window is given up on this side. Resolves when the window is over.
    pub(super) async fn watch(self: Arc<Self>) {
        let given_up = self
            .window
            .until(|phase| match phase {
                Phase::Open | Phase::Receiving => None,
                Phase::Completed(_) => Some(false),
                Phase::Failed(_) | Phase::Closed => Some(true),
            })
            .await;
        if given_up && self.end() {
            self.reply(Reply::Refused(Refusal::WindowClosed));
        }
    }

    fn refuse(&self, refusal: Refusal) {
        let first = self.end();
        if first && refusal != Refusal::WindowClosed {
            self.table.counters().refusals.add(1);
        }
        self.window.fail(WindowError::Refused(refusal));
        if first {
            self.reply(Reply::Refused(refusal));
        }
    }

    /// Whether the last word is spoken.
    pub(super) fn over(&self) -> bool {
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
        // Only if the runtime stops in the middle; otherwise the window is over by now.
        self.window.fail(WindowError::AgentClosed);
    }
}
