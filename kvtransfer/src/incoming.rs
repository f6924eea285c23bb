//! The receiving end of one lane, sans-IO: bytes of the stream in, writes to the window and replies out.
//!
//! ```text
//!   Opening ── OPEN ──► Landing ── FINISH, window incomplete ──► Finished ──► Done
//!      │                   └─ FINISH or last bytes, window complete ────────►
//!      └── refused ──► Over ◄── refuse / lost / broken ──┘
//! ```
//!
//! A transport feeds it whatever arrives, in any split, and tells it how the stream ended:
//!
//! * [`Incoming::lost`]: the push is over, and with it the window (an abort, a closed agent);
//! * [`Incoming::broken`]: only this lane is over; the push may go on over another, within the window's grace. A
//!   dropped `Incoming` counts as broken.
//!
//! A lane to the control window carries no bytes, and its FINISH is a message for the agent.

use crate::window_state::{Finish, Phase};
use crate::window_table::{Claimed, WindowCell, WindowTable};
use crate::wire::{CONTROL_WINDOW, FrameDecoder, Integrity, LaneKey, Piece, Reply};
use crate::{Refusal, WindowError};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Instant;

/// The receiving end of one lane.
#[derive(Debug)]
pub(crate) struct Incoming {
    table: Arc<WindowTable>,
    peer: Arc<str>,
    decoder: FrameDecoder,
    target: Target,
    /// Where the next bytes of the current write go, and where it began and ends.
    cursor: usize,
    begun: usize,
    end: usize,
    /// Bytes of this lane's completed writes, repetitions included: what LANDED says.
    landed: u64,
    finished: bool,
    done: bool,
}

/// What the lane writes to.
#[derive(Debug)]
enum Target {
    /// Not named yet.
    None,
    Window(Arc<WindowCell>, LaneKey),
    /// The agent; the push, to know a repetition.
    Control(u64),
    /// A push that was completed before, with this total.
    Done(u64),
}

impl Incoming {
    /// The receiving end of a lane over a transport that authenticates.
    pub(crate) fn new(table: Arc<WindowTable>, peer: Arc<str>) -> Self {
        Self::with_integrity(table, peer, Integrity::Transport)
    }

    pub(crate) fn with_integrity(table: Arc<WindowTable>, peer: Arc<str>, integrity: Integrity) -> Self {
        Self {
            table,
            peer,
            decoder: FrameDecoder::new(integrity),
            target: Target::None,
            cursor: 0,
            begun: 0,
            end: 0,
            landed: 0,
            finished: false,
            done: false,
        }
    }

    /// Takes the next bytes of the stream. The reply to send, if they ask for one; only the latest counts, so one is
    /// enough however many were asked for.
    ///
    /// # Errors
    /// The refusal to send as the last reply; the window, if there is one, has failed with it, or lost this lane if the
    /// refusal is about the lane only.
    pub(crate) fn feed(&mut self, input: &[u8]) -> Result<Option<Reply>, Refusal> {
        self.feed_at(input, Instant::now())
    }

    /// [`Incoming::feed`] at a given time.
    pub(crate) fn feed_at(&mut self, input: &[u8], now: Instant) -> Result<Option<Reply>, Refusal> {
        let result = self.step(input);
        if let Err(refusal) = result {
            self.refuse_at(refusal, now);
        }
        result
    }

    /// Fails the window for a breach that the transport noticed; ends the lane if that is all it means.
    pub(crate) fn refuse(&mut self, refusal: Refusal) {
        self.refuse_at(refusal, Instant::now());
    }

    fn refuse_at(&mut self, refusal: Refusal, now: Instant) {
        self.table.counters().refusals.add(1);
        if refusal.lane_only() {
            self.broken(refusal.to_string(), now);
        } else if let Target::Window(window, _) = &self.target {
            window.fail(WindowError::Refused(refusal));
        }
    }

    /// The stream ended for `cause`, and the push with it.
    pub(crate) fn lost(&mut self, cause: WindowError) {
        if let Target::Window(window, _) = &self.target {
            window.fail(cause);
        }
    }

    /// The stream ended, but the push may go on over another lane.
    pub(crate) fn broken(&mut self, detail: String, now: Instant) {
        if let Target::Window(window, lane) = &self.target {
            let peer = self.peer.to_string();
            window.lane_broke(*lane, WindowError::PeerLost { peer, detail }, now);
        }
    }

    /// The lane has named its window.
    pub(crate) fn opened(&self) -> bool {
        !matches!(self.target, Target::None)
    }

    /// The push is complete; what follows changes nothing.
    pub(crate) fn done(&self) -> bool {
        self.done
    }

    /// Whether the push is complete, if by another lane: a stream that ends now has ended well.
    pub(crate) fn complete(&self) -> bool {
        match &self.target {
            Target::Window(window, _) => matches!(window.phase(), Phase::Completed(_)),
            Target::Done(_) => true,
            Target::Control(_) => self.done,
            Target::None => false,
        }
    }

    /// Resolves once the window is given up on this side, with the reason to send; never without a window, nor after
    /// FINISH.
    pub(crate) async fn interrupted(&self) -> Refusal {
        match &self.target {
            Target::Window(window, _) => window.until(given_up).await,
            _ => std::future::pending().await,
        }
    }

    /// The reason to send, if the window is given up on this side.
    #[cfg(test)]
    pub(crate) fn given_up(&self) -> Option<Refusal> {
        match &self.target {
            Target::Window(window, _) => given_up(&window.phase()),
            _ => None,
        }
    }

    fn step(&mut self, mut input: &[u8]) -> Result<Option<Reply>, Refusal> {
        let mut reply = None;
        while let Some(piece) = self.decoder.next(&mut input)? {
            match piece {
                Piece::Open { window, push, lane } => self.open(window, push, lane)?,
                Piece::Write { offset, len } => self.begin(offset, len.into())?,
                Piece::Bytes(bytes) => {
                    if let Some(total) = self.land(bytes)? {
                        reply = Some(self.acknowledge(total));
                    }
                }
                Piece::Whole { offset, bytes } => {
                    self.begin(offset, bytes.len() as u64)?;
                    if let Some(total) = self.land(&bytes)? {
                        reply = Some(self.acknowledge(total));
                    }
                }
                Piece::Mark if self.done => {}
                Piece::Mark => reply = Some(Reply::Landed(self.landed)),
                Piece::Finish { total, payload, notify } => {
                    self.finished = true;
                    reply = Some(match self.finish(total, payload, notify)? {
                        Some(total) => self.acknowledge(total),
                        None => Reply::Landed(self.landed),
                    });
                }
            }
        }
        Ok(reply)
    }

    fn open(&mut self, window: u64, push: u64, lane: LaneKey) -> Result<(), Refusal> {
        self.target = if window == CONTROL_WINDOW {
            Target::Control(push)
        } else {
            match self.table.claim(window, push, lane)? {
                Claimed::Window(cell) => Target::Window(cell, lane),
                Claimed::Done(total) => Target::Done(total),
            }
        };
        Ok(())
    }

    fn begin(&mut self, offset: u64, len: u64) -> Result<(), Refusal> {
        self.begun = match &self.target {
            Target::Window(window, lane) => window.admit(*lane, offset, len)?,
            // Repetitions; only counted.
            Target::Done(_) => 0,
            Target::Control(_) | Target::None => return Err(Refusal::OutOfRange { offset, len }),
        };
        self.cursor = self.begun;
        // Cannot overflow: admitted, or at most a frame.
        self.end = self.begun + len as usize;
        Ok(())
    }

    /// The push's total, if these bytes complete it.
    fn land(&mut self, bytes: &[u8]) -> Result<Option<u64>, Refusal> {
        if let Target::Window(window, lane) = &self.target {
            window.land(*lane, self.cursor, bytes)?;
        }
        self.cursor += bytes.len();
        if self.cursor < self.end {
            return Ok(None);
        }
        self.landed += (self.end - self.begun) as u64;
        match &self.target {
            Target::Window(window, lane) => {
                let total = window.cover(*lane, self.begun..self.end)?;
                if total.is_some() {
                    self.announce();
                }
                Ok(total)
            }
            _ => Ok(None),
        }
    }

    fn finish(&mut self, total: u64, payload: Bytes, notify: bool) -> Result<Option<u64>, Refusal> {
        match &self.target {
            Target::Window(window, lane) => {
                let complete = matches!(window.phase(), Phase::Completed(_));
                if notify && !complete {
                    self.table.inbox().room()?;
                }
                let finish = Finish { total, payload, notify };
                let total = window.finish(*lane, finish)?;
                if total.is_some() && !complete {
                    self.announce();
                }
                Ok(total)
            }
            Target::Done(total) => Ok(Some(*total)),
            Target::Control(push) => {
                if !self.table.control_taken(*push) {
                    self.table.inbox().control(&self.peer, payload)?;
                    self.table.remember_control(*push);
                }
                Ok(Some(0))
            }
            Target::None => Err(Refusal::UnknownWindow),
        }
    }

    /// The window was completed a moment ago.
    fn announce(&self) {
        if let Target::Window(window, _) = &self.target
            && let Some(payload) = window.notification()
        {
            self.table.inbox().notify(&self.peer, payload);
        }
    }

    fn acknowledge(&mut self, total: u64) -> Reply {
        self.done = true;
        Reply::Done(total)
    }
}

/// What a sender is told of a window in this phase, if it is over without success.
pub(crate) fn given_up(phase: &Phase) -> Option<Refusal> {
    match phase {
        Phase::Failed(WindowError::Refused(refusal)) if !refusal.lane_only() => Some(*refusal),
        Phase::Failed(WindowError::AgentClosed) => Some(Refusal::AgentClosed),
        Phase::Closed | Phase::Failed(_) => Some(Refusal::WindowClosed),
        Phase::Open | Phase::Receiving | Phase::Completed(_) => None,
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.done {
            self.broken("its lane ended without a word".into(), Instant::now());
        }
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // windows over one range are what is meant
mod tests;
