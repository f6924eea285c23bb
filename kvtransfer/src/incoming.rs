//! The receiving end of one push, sans-IO: bytes of the stream in, writes to the window and replies out.
//!
//! A transport feeds it whatever arrives, in any split, and tells it how the stream ended. Whatever happens, a window
//! that was claimed is settled: completed by FINISH, failed by a refusal or by [`Incoming::lost`], and a dropped
//! `Incoming` counts as a lost peer.

use crate::window_state::Phase;
use crate::window_table::{WindowCell, WindowTable};
use crate::wire::{FrameDecoder, Piece, Reply};
use crate::{Refusal, WindowError};
use std::sync::Arc;

/// The receiving end of one push.
#[derive(Debug)]
pub(crate) struct Incoming {
    table: Arc<WindowTable>,
    peer: Arc<str>,
    decoder: FrameDecoder,
    window: Option<Arc<WindowCell>>,
    /// Where the next bytes of the current write go.
    cursor: usize,
    landed: u64,
    done: bool,
}

impl Incoming {
    pub(crate) fn new(table: Arc<WindowTable>, peer: Arc<str>) -> Self {
        Self {
            table,
            peer,
            decoder: FrameDecoder::default(),
            window: None,
            cursor: 0,
            landed: 0,
            done: false,
        }
    }

    /// Takes the next bytes of the stream. The reply to send, if they ask for one; only the latest counts, so one is
    /// enough however many were asked for.
    ///
    /// # Errors
    /// The refusal to send as the last reply; the window, if there is one, has failed with it.
    pub(crate) fn feed(&mut self, input: &[u8]) -> Result<Option<Reply>, Refusal> {
        let result = self.step(input);
        if let Err(refusal) = result {
            self.refuse(refusal);
        }
        result
    }

    /// Fails the window for a breach that the transport noticed.
    pub(crate) fn refuse(&mut self, refusal: Refusal) {
        self.table.counters().refusals.add(1);
        if let Some(window) = &self.window {
            window.fail(WindowError::Refused(refusal));
        }
    }

    /// The stream ended for `cause`.
    pub(crate) fn lost(&mut self, cause: WindowError) {
        if let Some(window) = &self.window {
            window.fail(cause);
        }
    }

    /// The push has named its window.
    pub(crate) fn opened(&self) -> bool {
        self.window.is_some()
    }

    /// FINISH was taken; what follows changes nothing.
    pub(crate) fn done(&self) -> bool {
        self.done
    }

    /// Resolves once the window is given up on this side; never without a window, nor after FINISH.
    pub(crate) async fn interrupted(&self) -> Refusal {
        let Some(window) = &self.window else {
            return std::future::pending().await;
        };
        window
            .until(|phase| match phase {
                Phase::Closed | Phase::Failed(_) => Some(Refusal::WindowClosed),
                Phase::Open | Phase::Receiving | Phase::Completed(_) => None,
            })
            .await
    }

    fn step(&mut self, mut input: &[u8]) -> Result<Option<Reply>, Refusal> {
        let mut reply = None;
        while let Some(piece) = self.decoder.next(&mut input)? {
            // OPEN comes first, the decoder sees to it; a window is missing only if it was refused before.
            let window = match (&self.window, &piece) {
                (_, Piece::Open { window }) => {
                    self.window = Some(self.table.claim(*window)?);
                    continue;
                }
                (Some(window), _) => window,
                (None, _) => return Err(Refusal::UnknownWindow),
            };
            match piece {
                Piece::Open { .. } => {}
                Piece::Write { offset, len } => self.cursor = window.admit(offset, len.into())?,
                Piece::Bytes(bytes) => {
                    window.land(self.cursor, bytes)?;
                    self.cursor += bytes.len();
                    self.landed += bytes.len() as u64;
                }
                Piece::Mark => reply = Some(Reply::Landed(self.landed)),
                Piece::Finish { total, payload } => {
                    reply = Some(Reply::Done(window.finish(total, payload)?));
                    self.done = true;
                }
            }
        }
        Ok(reply)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        let peer = self.peer.to_string();
        self.lost(WindowError::PeerLost {
            peer,
            detail: "its push ended without a word".into(),
        });
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // windows over one range are what is meant
mod tests {
    use super::*;
    use crate::ranges::RangeSet;
    use crate::stats::Counters;
    use crate::wire::{put_finish, put_mark, put_open, put_write};
    use crate::{Region, SetupError};
    use bytes::{BufMut, Bytes, BytesMut};
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
                table: Arc::new(WindowTable::new(4, Arc::new(Counters::default()))),
                region: Region::new(LEN).unwrap(),
                next_id: 0,
            }
        }

        fn open(&mut self, ranges: Vec<Range<usize>>) -> Result<Arc<WindowCell>, SetupError> {
            let ranges = RangeSet::new(ranges, LEN, 8)?;
            let next_id = &mut self.next_id;
            self.table.open(&self.region, ranges, 1 << 20, || {
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

    fn write(out: &mut BytesMut, offset: u64, bytes: &[u8]) {
        put_write(out, offset, bytes.len() as u32);
        out.put_slice(bytes);
    }

    #[test]
    fn a_push_in_one_byte_steps_completes_its_window() {
        let mut fixture = Fixture::new();
        let cell = fixture.open(vec![0..64, 128..192]).unwrap();
        let mut wire = BytesMut::new();
        put_open(&mut wire, cell.id());
        write(&mut wire, 128, &[7; 64]);
        put_mark(&mut wire);
        write(&mut wire, 8, &[9; 16]);
        put_finish(&mut wire, 80, b"token 5");
        let mut incoming = fixture.incoming();
        let mut replies = Vec::new();
        for byte in wire.iter() {
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
    fn unknown_taken_and_closed_windows_are_refused() {
        let mut fixture = Fixture::new();
        let open = |fixture: &Fixture, id| {
            let mut wire = BytesMut::new();
            put_open(&mut wire, id);
            let mut incoming = fixture.incoming();
            let result = incoming.feed(&wire);
            (incoming, result)
        };
        assert_eq!(open(&fixture, 77).1, Err(Refusal::UnknownWindow));
        let cell = fixture.open(vec![0..64]).unwrap();
        let (mut first, result) = open(&fixture, cell.id());
        assert_eq!(result, Ok(None));
        assert_eq!(open(&fixture, cell.id()).1, Err(Refusal::WindowTaken));
        assert_eq!(
            cell.phase(),
            Phase::Receiving,
            "a refused second push does the first no harm"
        );
        fixture.table.close(&cell);
        let mut late = BytesMut::new();
        write(&mut late, 0, &[1; 8]);
        assert_eq!(first.feed(&late), Err(Refusal::WindowClosed));
        assert_eq!(open(&fixture, cell.id()).1, Err(Refusal::UnknownWindow));
        assert_eq!(fixture.memory(), vec![0; LEN]);
    }

    #[test]
    fn a_vanished_push_fails_its_window() {
        let mut fixture = Fixture::new();
        let cell = fixture.open(vec![0..64]).unwrap();
        let mut wire = BytesMut::new();
        put_open(&mut wire, cell.id());
        let mut incoming = fixture.incoming();
        incoming.feed(&wire).unwrap();
        drop(incoming);
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
            let mut wire = BytesMut::new();
            put_open(&mut wire, cell.id());
            let mut total = 0;
            for (kind, offset, words) in ops {
                match kind {
                    0 => put_mark(&mut wire),
                    1 => put_finish(&mut wire, total, &noise),
                    2 => wire.put_slice(&noise),
                    _ => {
                        write(&mut wire, offset, &vec![0xee; words * 8]);
                        total += words as u64 * 8;
                    }
                }
            }
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
