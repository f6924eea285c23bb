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
mod tests {
    use super::*;
    use crate::ranges::RangeSet;
    use crate::stats::Counters;
    use crate::storage::Memory;
    use crate::wire::FrameEncoder;
    use crate::{Region, SetupError, TransferLimits};
    use bytes::{BufMut, BytesMut};
    use proptest::prelude::*;
    use std::ops::Range;

    const LEN: usize = 512;

    struct Fixture {
        table: Arc<WindowTable>,
        region: Arc<Region>,
        next_id: u64,
    }

    impl Fixture {
        fn new() -> Self {
            Self {
                table: Arc::new(WindowTable::new(
                    &TransferLimits {
                        windows_max: 4,
                        ..TransferLimits::default()
                    },
                    Arc::new(Counters::default()),
                )),
                region: Region::new(LEN).unwrap(),
                next_id: 0,
            }
        }

        fn open(&mut self, ranges: Vec<Range<usize>>) -> Result<Arc<WindowCell>, SetupError> {
            let ranges = RangeSet::new(ranges, LEN, 8)?;
            let next_id = &mut self.next_id;
            self.table.open(&Memory::from(&self.region), ranges, 1 << 20, || {
                *next_id += 1;
                Ok(*next_id)
            })
        }

        fn incoming(&self) -> Incoming {
            Incoming::new(self.table.clone(), "tester".into())
        }

        fn memory(&self) -> Vec<u8> {
            let mut all = vec![0; LEN];
            assert!(self.region.copy_out(0, &mut all));
            all
        }
    }

    /// One lane being written.
    struct Lane {
        wire: BytesMut,
        encoder: FrameEncoder,
    }

    impl Lane {
        fn open(window: u64, push: u64, slot: u16, generation: u32) -> Self {
            Self::with(Integrity::Transport, window, push, slot, generation)
        }

        fn with(integrity: Integrity, window: u64, push: u64, slot: u16, generation: u32) -> Self {
            let (mut wire, mut encoder) = (BytesMut::new(), FrameEncoder::new(integrity));
            encoder.open(&mut wire, window, push, LaneKey { slot, generation });
            Self { wire, encoder }
        }

        fn write(&mut self, offset: u64, bytes: &[u8]) -> &mut Self {
            self.encoder
                .write(&mut self.wire, offset, bytes.len(), |to| to.copy_from_slice(bytes));
            self
        }

        fn mark(&mut self) -> &mut Self {
            self.encoder.mark(&mut self.wire);
            self
        }

        fn finish(&mut self, total: u64, payload: &[u8], notify: bool) -> &mut Self {
            self.encoder.finish(&mut self.wire, total, payload, notify);
            self
        }

        fn take(&mut self) -> BytesMut {
            self.wire.split()
        }
    }

    #[test]
    fn a_push_in_one_byte_steps_completes_its_window() {
        let mut fixture = Fixture::new();
        let cell = fixture.open(vec![0..64, 128..192]).unwrap();
        let mut lane = Lane::open(cell.id(), 5, 0, 0);
        lane.write(128, &[7; 64])
            .mark()
            .write(8, &[9; 16])
            .finish(80, b"token 5", false);
        let mut incoming = fixture.incoming();
        let mut replies = Vec::new();
        for byte in lane.take().iter() {
            replies.extend(incoming.feed(std::slice::from_ref(byte)).unwrap());
        }
        assert_eq!(replies, [Reply::Landed(64), Reply::Done(80)]);
        drop(incoming);
        assert_eq!(cell.phase(), Phase::Completed(Bytes::from_static(b"token 5")));
        let memory = fixture.memory();
        assert!(memory[128..192].iter().all(|&byte| byte == 7) && memory[8..24].iter().all(|&byte| byte == 9));
        assert_eq!(memory.iter().filter(|&&byte| byte != 0).count(), 80);
    }

    #[test]
    fn two_lanes_complete_a_window_together_and_once() {
        let mut fixture = Fixture::new();
        let cell = fixture.open(vec![0..128]).unwrap();
        let (mut one, mut two) = (Lane::open(cell.id(), 5, 0, 0), Lane::open(cell.id(), 5, 1, 0));
        let (mut first, mut second) = (fixture.incoming(), fixture.incoming());
        two.finish(128, b"x", true);
        assert_eq!(second.feed(&two.take()), Ok(Some(Reply::Landed(0))));
        assert!(!second.complete());
        one.write(0, &[1; 64]).write(64, &[2; 64]);
        let bytes = one.take();
        let (front, back) = bytes.split_at(bytes.len() - 1);
        assert_eq!(first.feed(front), Ok(None));
        assert_eq!(
            first.feed(back),
            Ok(Some(Reply::Done(128))),
            "the last byte completes it"
        );
        assert!(first.done() && second.complete());
        one.finish(128, b"x", true);
        assert_eq!(first.feed(&one.take()), Ok(Some(Reply::Done(128))));
        let told = fixture.table.inbox().next();
        let told = futures_util::FutureExt::now_or_never(told).flatten().unwrap();
        assert_eq!((told.peer.as_str(), &told.payload[..]), ("tester", &b"x"[..]));
        let again = futures_util::FutureExt::now_or_never(fixture.table.inbox().next());
        assert_eq!(again, None, "notified once");
        // The acknowledgement was lost and the window is gone: the retry is still told.
        fixture.table.close(&cell);
        let mut retry = Lane::open(cell.id(), 5, 0, 1);
        retry.write(0, &[1; 64]).finish(128, b"x", true);
        assert_eq!(fixture.incoming().feed(&retry.take()), Ok(Some(Reply::Done(128))));
        let mut stranger = Lane::open(cell.id(), 6, 0, 0);
        assert_eq!(fixture.incoming().feed(&stranger.take()), Err(Refusal::UnknownWindow));
    }

    #[test]
    fn damage_ends_the_lane_not_the_push() {
        let mut fixture = Fixture::new();
        let cell = fixture.open(vec![0..64]).unwrap();
        let checked =
            |fixture: &Fixture| Incoming::with_integrity(fixture.table.clone(), "tester".into(), Integrity::Checksum);
        let mut lane = Lane::with(Integrity::Checksum, cell.id(), 5, 0, 0);
        let mut incoming = checked(&fixture);
        assert_eq!(incoming.feed(&lane.take()), Ok(None));
        let mut damaged = lane.write(0, &[3; 64]).take();
        damaged[20] ^= 1;
        assert_eq!(incoming.feed(&damaged), Err(Refusal::Corrupt));
        assert_eq!(cell.phase(), Phase::Receiving);
        assert_eq!(fixture.memory(), vec![0; LEN], "nothing of it has landed");
        let mut again = Lane::with(Integrity::Checksum, cell.id(), 5, 0, 1);
        again.write(0, &[3; 64]).finish(64, b"", false);
        assert_eq!(checked(&fixture).feed(&again.take()), Ok(Some(Reply::Done(64))));
    }

    #[test]
    fn control_messages_are_taken_once() {
        let fixture = Fixture::new();
        let taken = Arc::new(std::sync::Mutex::new(Vec::new()));
        let log = taken.clone();
        fixture.table.inbox().serve(Box::new(move |peer, message| {
            log.lock().unwrap().push((peer.to_owned(), message));
            Ok(())
        }));
        for generation in 0..2 {
            let mut lane = Lane::open(CONTROL_WINDOW, 5, 0, generation);
            lane.finish(0, b"hello", false);
            assert_eq!(fixture.incoming().feed(&lane.take()), Ok(Some(Reply::Done(0))));
        }
        assert_eq!(
            *taken.lock().unwrap(),
            [("tester".to_owned(), Bytes::from_static(b"hello"))]
        );
        let mut bytes = Lane::open(CONTROL_WINDOW, 6, 0, 0);
        bytes.write(0, &[1; 8]);
        assert!(matches!(
            fixture.incoming().feed(&bytes.take()),
            Err(Refusal::OutOfRange { .. })
        ));
    }

    #[test]
    fn unknown_taken_and_closed_windows_are_refused() {
        let mut fixture = Fixture::new();
        let open = |fixture: &Fixture, id, push| {
            let mut lane = Lane::open(id, push, 0, 0);
            let mut incoming = fixture.incoming();
            let result = incoming.feed(&lane.take());
            (incoming, lane, result)
        };
        assert_eq!(open(&fixture, 77, 1).2, Err(Refusal::UnknownWindow));
        let cell = fixture.open(vec![0..64]).unwrap();
        let (mut first, mut lane, result) = open(&fixture, cell.id(), 1);
        assert_eq!(result, Ok(None));
        assert_eq!(open(&fixture, cell.id(), 2).2, Err(Refusal::WindowTaken));
        assert_eq!(
            cell.phase(),
            Phase::Receiving,
            "a refused second push does the first no harm"
        );
        fixture.table.close(&cell);
        assert_eq!(first.feed(&lane.write(0, &[1; 8]).take()), Err(Refusal::WindowClosed));
        assert_eq!(open(&fixture, cell.id(), 1).2, Err(Refusal::UnknownWindow));
        assert_eq!(fixture.memory(), vec![0; LEN]);
    }

    #[test]
    fn a_vanished_push_fails_its_window_after_its_grace() {
        let mut fixture = Fixture::new();
        let cell = fixture.open(vec![0..64]).unwrap();
        let mut incoming = fixture.incoming();
        incoming.feed(&Lane::open(cell.id(), 1, 0, 0).take()).unwrap();
        drop(incoming);
        assert_eq!(cell.phase(), Phase::Receiving);
        cell.expire(cell.deadline().unwrap());
        assert!(matches!(cell.phase(), Phase::Failed(WindowError::PeerLost { peer, .. }) if peer == "tester"));
    }

    #[test]
    fn windows_are_bounded_and_never_overlap() {
        let mut fixture = Fixture::new();
        let first = fixture.open(vec![0..64]).unwrap();
        assert!(matches!(
            fixture.open(vec![56..72]),
            Err(SetupError::WindowOverlap { range }) if range == (56..64)
        ));
        let _others: Vec<_> = (1..4)
            .map(|at| fixture.open(vec![at * 64..at * 64 + 64]).unwrap())
            .collect();
        assert!(matches!(
            fixture.open(vec![256..264]),
            Err(SetupError::Windows { max: 4 })
        ));
        fixture.table.close(&first);
        fixture.open(vec![56..64]).unwrap();
        fixture.table.shut();
        assert!(matches!(fixture.open(vec![256..264]), Err(SetupError::AgentClosed)));
    }

    proptest! {
        /// A peer that sends anything at all after a valid OPEN: no panic, nothing outside of the window changes, and
        /// the window is settled when the stream is gone.
        #[test]
        fn arbitrary_streams_stay_inside_the_window(
            ops in prop::collection::vec(
                (0u8..6, prop_oneof![(0u64..64).prop_map(|word| word * 8), any::<u64>()], 0usize..10), 0..30),
            noise in prop::collection::vec(any::<u8>(), 0..20), split in 1usize..40, close_at in 0usize..400,
        ) {
            let mut fixture = Fixture::new();
            let cell = fixture.open(vec![64..128, 256..320]).unwrap();
            let mut lane = Lane::open(cell.id(), 1, 0, 0);
            let mut total = 0;
            for (kind, offset, words) in ops {
                match kind {
                    0 => { lane.mark(); },
                    1 => { lane.finish(total, &noise, false); },
                    2 => lane.wire.put_slice(&noise),
                    _ => {
                        lane.write(offset, &vec![0xee; words * 8]);
                        total += words as u64 * 8;
                    }
                }
            }
            let wire = lane.take();
            let mut incoming = fixture.incoming();
            let mut fenced = None;
            for (index, part) in wire.chunks(split).enumerate() {
                if index * split >= close_at && fenced.is_none() {
                    fixture.table.close(&cell);
                    fenced = Some(fixture.memory());
                }
                if incoming.feed(part).is_err() {
                    break;
                }
            }
            drop(incoming);
            if let Some(deadline) = cell.deadline() {
                cell.expire(deadline);
            }
            prop_assert!(!matches!(cell.phase(), Phase::Open | Phase::Receiving));
            let memory = fixture.memory();
            if let Some(fenced) = fenced {
                prop_assert_eq!(&memory, &fenced, "a byte landed after close");
            }
            let outside = memory[..64].iter().chain(&memory[128..256]).chain(&memory[320..]);
            prop_assert!(outside.copied().all(|byte| byte == 0));
        }
    }
}
