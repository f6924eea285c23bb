//! Test only: both ends of a push over a fake stream, sans-IO. A random schedule decides when compute writes, when the
//! transport sends, how much of the stream arrives and when either side gives up; proptest prints and shrinks it.

use crate::limits::SEND_CHUNK_BYTES;
use crate::push::{Lane, Next, Outgoing, Push};
use crate::push_state::PushLimits;
use crate::ranges::RangeSet;
use crate::stats::Counters;
use crate::storage::Memory;
use crate::window_state::Phase;
use crate::window_table::{WindowCell, WindowTable};
use crate::wire::{Integrity, LaneKey, Reply, ReplyDecoder};
use crate::{AbortReason, PushError, PushReport, Refusal, Region, TransferLimits, WindowError, incoming::Incoming};
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

const LEN: usize = 2 << 20;
const SLOT: usize = LEN / 32;

/// A stream each way, in order, as QUIC gives it; resets and stops overtake.
struct Pair {
    source: Arc<Region>,
    target: Arc<Region>,
    table: Arc<WindowTable>,
    cell: Arc<WindowCell>,
    out: Arc<Outgoing>,
    lane: Lane,
    push: Option<Push>,
    finishing: Option<BoxFuture<'static, Result<PushReport, PushError>>>,
    incoming: Option<Incoming>,
    forward: VecDeque<u8>,
    backward: VecDeque<u8>,
    replies: ReplyDecoder,
    expected: Vec<u8>,
    last_sent: bool,
    outcome: Option<Result<PushReport, PushError>>,
}

#[derive(Debug, Clone, Copy)]
enum Event {
    /// Compute finishes a slot.
    Write(usize),
    /// Compute finishes everything.
    Finish,
    /// The sending task runs once.
    Send,
    /// That many bytes arrive.
    Deliver(usize),
    /// That many bytes of replies arrive.
    Answer(usize),
    /// The sender drops the push.
    Drop,
    /// The receiver closes the window.
    Close,
    /// The connection dies.
    Cut,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => (0usize..32).prop_map(Event::Write),
        2 => Just(Event::Finish),
        10 => Just(Event::Send),
        10 => (1usize..2 * SEND_CHUNK_BYTES).prop_map(Event::Deliver),
        5 => (1usize..30).prop_map(Event::Answer),
    ]
}

fn ending() -> impl Strategy<Value = Option<(usize, Event)>> {
    let how = prop_oneof![Just(Event::Drop), Just(Event::Close), Just(Event::Cut)];
    prop::option::of((0usize..80, how))
}

impl Pair {
    fn new() -> Self {
        let counters = Arc::new(Counters::default());
        let table = Arc::new(WindowTable::new(&TransferLimits::default(), counters.clone()));
        let (source, target) = (Region::new(LEN).unwrap(), Region::new(LEN).unwrap());
        let pattern: Vec<u8> = (0..LEN).map(|at| (at % 251) as u8 + 1).collect();
        assert!(source.copy_in(0, &pattern));
        let ranges = RangeSet::new((0..32).map(|slot| slot * SLOT..(slot + 1) * SLOT).collect(), LEN, 32).unwrap();
        let cell = table.open(&Memory::from(&target), ranges, u64::MAX, || Ok(9)).unwrap();
        let limits = PushLimits {
            descriptors_max: 1024,
            payload_max: 64,
            retries_max: 0,
            backoff: Duration::ZERO,
            grace: Duration::ZERO,
        };
        let out = Arc::new(Outgoing::new(9, 5, Memory::from(&source), limits, counters));
        let mut lane = out.lane(0, Integrity::Transport).unwrap();
        Self {
            forward: lane.opening().into_iter().collect(),
            incoming: Some(Incoming::new(table.clone(), "pair".into())),
            push: Some(Push::new(out.clone())),
            finishing: None,
            backward: VecDeque::new(),
            replies: ReplyDecoder::default(),
            expected: vec![0; LEN],
            last_sent: false,
            outcome: None,
            source,
            target,
            table,
            cell,
            out,
            lane,
        }
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Write(slot) => {
                // Reversed on the other side, so that adjacent writes do not always merge.
                let (local, remote) = (slot * SLOT, (31 - slot) * SLOT);
                let Some(push) = &self.push else { return };
                if push.writer().write(local..local + SLOT, remote).is_ok() {
                    let to = &mut self.expected[remote..remote + SLOT];
                    assert!(self.source.copy_out(local, to));
                }
            }
            Event::Finish => {
                if let Some(push) = self.push.take() {
                    self.finishing = Some(Box::pin(push.finish(Bytes::from_static(b"payload"))));
                }
            }
            Event::Send => match self.lane.next(&mut Vec::new()) {
                Next::Send(bytes) => self.forward.extend(bytes),
                Next::Last(bytes) => {
                    assert!(!std::mem::replace(&mut self.last_sent, true), "FINISH leaves once");
                    self.forward.extend(bytes);
                }
                Next::Wait | Next::Over => {}
            },
            Event::Deliver(count) => {
                let part: Vec<u8> = self.forward.drain(..count.min(self.forward.len())).collect();
                let Some(incoming) = &mut self.incoming else { return };
                let mut reply = BytesMut::new();
                match incoming.feed(&part) {
                    Ok(answer) => answer.into_iter().for_each(|answer| answer.put(&mut reply)),
                    Err(refusal) => {
                        Reply::Refused(refusal).put(&mut reply);
                        self.incoming = None;
                    }
                }
                self.backward.extend(reply);
            }
            Event::Answer(count) => {
                let part: Vec<u8> = self.backward.drain(..count.min(self.backward.len())).collect();
                let mut input = &part[..];
                while let Some(reply) = self.replies.next(&mut input).unwrap() {
                    if let Err(error) = self.lane.replies().reply(reply) {
                        assert_eq!(self.lane.broke(error), None);
                    }
                }
            }
            Event::Drop => {
                self.push = None;
                self.finishing = None;
                if let Some(incoming) = &mut self.incoming {
                    incoming.lost(WindowError::Aborted(AbortReason::Dropped));
                }
                self.incoming = None;
                // From here on the sender's blocks belong to somebody else.
                assert!(self.source.copy_in(0, &vec![0; LEN]));
                assert!(matches!(self.lane.next(&mut Vec::new()), Next::Over));
            }
            Event::Close => self.table.close(&self.cell),
            Event::Cut => {
                self.incoming = None;
                self.out.fail(PushError::AgentClosed);
            }
        }
        if let Some(finishing) = &mut self.finishing
            && let Some(outcome) = finishing.now_or_never()
        {
            self.outcome = Some(outcome);
            self.finishing = None;
        }
    }

    fn memory(&self) -> Vec<u8> {
        let mut all = vec![0; LEN];
        assert!(self.target.copy_out(0, &mut all));
        all
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Either both sides end well and every byte is right, or both end ill; and after a close memory stays.
    #[test]
    fn both_sides_agree_on_the_outcome(events in prop::collection::vec(event(), 0..80), ending in ending()) {
        let mut pair = Pair::new();
        let mut fenced = None;
        for (at, event) in events.into_iter().enumerate() {
            if let Some((_, last)) = ending.filter(|(when, _)| *when == at) {
                pair.step(last);
                fenced = (!matches!(pair.cell.phase(), Phase::Open | Phase::Receiving)).then(|| pair.memory());
            }
            pair.step(event);
        }
        // Whatever is left runs to its end.
        pair.step(Event::Finish);
        for _ in 0..2 * LEN / SEND_CHUNK_BYTES {
            pair.step(Event::Send);
            pair.step(Event::Deliver(usize::MAX));
            pair.step(Event::Answer(usize::MAX));
        }
        if let Some(deadline) = pair.cell.deadline() {
            pair.cell.expire(deadline);
        }
        let memory = pair.memory();
        if let Some(fenced) = fenced {
            prop_assert!(memory == fenced, "a byte landed behind the fence");
        }
        match pair.cell.phase() {
            Phase::Completed(payload) => {
                prop_assert_eq!(payload, "payload");
                prop_assert!(memory == pair.expected, "the window differs from what was written");
                // The acknowledgement may have been lost with the sender, but it is never denied.
                let denied = matches!(pair.outcome, Some(Err(PushError::Refused(_))));
                prop_assert!(!denied, "{:?}", pair.outcome);
            }
            // A push that died before it named its window leaves it untouched, to expire.
            Phase::Open => prop_assert!(memory == vec![0; LEN] && pair.incoming.is_none()),
            Phase::Receiving => prop_assert!(false, "the window is not settled"),
            Phase::Failed(_) | Phase::Closed => {
                let succeeded = matches!(pair.outcome, Some(Ok(_)));
                prop_assert!(!succeeded, "the sender believes in a push that failed");
            }
        }
    }
}

#[test]
fn the_undisturbed_pair_succeeds() {
    let mut pair = Pair::new();
    (0..32).for_each(|slot| pair.step(Event::Write(slot)));
    pair.step(Event::Finish);
    for _ in 0..64 {
        pair.step(Event::Send);
        pair.step(Event::Deliver(usize::MAX));
        pair.step(Event::Answer(usize::MAX));
    }
    let report = pair.outcome.clone().unwrap().unwrap();
    assert_eq!((report.bytes, report.frames), (LEN as u64, 32));
    assert!(pair.memory() == pair.expected);
    let refused = Refusal::UnknownWindow;
    pair.table.close(&pair.cell);
    let lane = LaneKey { slot: 0, generation: 0 };
    assert_eq!(pair.table.claim(9, 6, lane).unwrap_err(), refused);
}
