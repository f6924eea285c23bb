//! Tests of [`super`].

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
