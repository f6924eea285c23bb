//! The bytes on a link, sans-IO. Integers are little-endian.
//!
//! ```text
//! every frame: tag u8, id u32, length u32, body. The id names a region for tags 1, 2, 7, 132 and 133, a push for the rest.
//!
//! sender to receiver                                    receiver to sender
//! 1 REGION len u64; a descriptor comes along            129 LANDED  bytes u64           one for each PULL
//! 2 FORGET                                              130 DONE    bytes u64           the last of a push
//! 3 OPEN   window u64, push u64, slot u16,              131 REFUSED code u8, a u64, b u64   the last of a push
//!          generation u32, region u32                   132 REGION_TAKEN
//! 4 PULL   n × (local u64, remote u64, len u32)         133 REGION_REFUSED sentence
//! 5 FINISH total u64, notify u8, payload
//! 6 ABORT  reason u32
//! 7 REGION_AT base u64, len u64, metadata: in place of REGION where memory is reached by address
//! ```
//!
//! What a frame means is the business of [`super::landing`] and [`super::flow`].

use crate::Refusal;
use crate::limits::PAYLOAD_BYTES_MAX;
use crate::ranges::Descriptor;
use crate::window_state::Finish;
use crate::wire::{LaneKey, Reply};
use bytes::{Buf, BufMut, Bytes, BytesMut};

const REGION: u8 = 1;
const FORGET: u8 = 2;
const OPEN: u8 = 3;
const PULL: u8 = 4;
const FINISH: u8 = 5;
const ABORT: u8 = 6;
const REGION_AT: u8 = 7;
const LANDED: u8 = 129;
const DONE: u8 = 130;
const REFUSED: u8 = 131;
const REGION_TAKEN: u8 = 132;
const REGION_REFUSED: u8 = 133;

/// Tag, id, length.
const HEADER_BYTES: usize = 9;
/// The longest body: that of FINISH.
const BODY_BYTES_MAX: usize = FINISH_BYTES + PAYLOAD_BYTES_MAX;
/// REGION_AT without its metadata.
const REGION_AT_BYTES: usize = 16;
/// Most metadata of a REGION_AT: those of a few dozen regions on as many network devices.
pub(crate) const METADATA_BYTES_MAX: usize = 48 << 10;
const _: () = assert!(REGION_AT_BYTES + METADATA_BYTES_MAX <= BODY_BYTES_MAX);
/// FINISH without its payload.
const FINISH_BYTES: usize = 9;
const OPEN_BYTES: usize = 26;
/// One piece of a PULL.
const PIECE_BYTES: usize = 20;
/// Most pieces of a PULL: 20 KiB of frame, a MiB of pieces of a KiB.
pub(crate) const PULL_PIECES_MAX: usize = 1024;
const _: () = assert!(PULL_PIECES_MAX * PIECE_BYTES <= BODY_BYTES_MAX);

fn put_header(out: &mut BytesMut, tag: u8, id: u32, len: usize) {
    out.put_u8(tag);
    out.put_u32_le(id);
    // No body is longer than BODY_BYTES_MAX.
    out.put_u32_le(len as u32);
}

pub(crate) fn put_region(out: &mut BytesMut, id: u32, len: u64) {
    put_header(out, REGION, id, 8);
    out.put_u64_le(len);
}

/// At most [`METADATA_BYTES_MAX`] bytes of metadata.
pub(crate) fn put_region_at(out: &mut BytesMut, id: u32, base: u64, len: u64, metadata: &[u8]) {
    put_header(out, REGION_AT, id, REGION_AT_BYTES + metadata.len());
    out.put_u64_le(base);
    out.put_u64_le(len);
    out.put_slice(metadata);
}

pub(crate) fn put_forget(out: &mut BytesMut, id: u32) {
    put_header(out, FORGET, id, 0);
}

pub(crate) fn put_open(out: &mut BytesMut, id: u32, open: Open) {
    put_header(out, OPEN, id, OPEN_BYTES);
    out.put_u64_le(open.window);
    out.put_u64_le(open.push);
    out.put_u16_le(open.lane.slot);
    out.put_u32_le(open.lane.generation);
    out.put_u32_le(open.region);
}

/// At most [`PULL_PIECES_MAX`] pieces, each at most [`FRAME_BYTES_MAX`](crate::limits::FRAME_BYTES_MAX) long.
pub(crate) fn put_pull(out: &mut BytesMut, id: u32, pieces: &[Descriptor]) {
    put_header(out, PULL, id, pieces.len() * PIECE_BYTES);
    for piece in pieces {
        out.put_u64_le(piece.local as u64);
        out.put_u64_le(piece.remote as u64);
        out.put_u32_le(piece.len as u32);
    }
}

pub(crate) fn put_finish(out: &mut BytesMut, id: u32, finish: &Finish) {
    put_header(out, FINISH, id, FINISH_BYTES + finish.payload.len());
    out.put_u64_le(finish.total);
    out.put_u8(u8::from(finish.notify));
    out.put_slice(&finish.payload);
}

pub(crate) fn put_abort(out: &mut BytesMut, id: u32, reason: u32) {
    put_header(out, ABORT, id, 4);
    out.put_u32_le(reason);
}

pub(crate) fn put_reply(out: &mut BytesMut, id: u32, reply: Reply) {
    match reply {
        Reply::Landed(bytes) => {
            put_header(out, LANDED, id, 8);
            out.put_u64_le(bytes);
        }
        Reply::Done(bytes) => {
            put_header(out, DONE, id, 8);
            out.put_u64_le(bytes);
        }
        Reply::Refused(refusal) => {
            let (code, a, b) = refusal.to_wire();
            put_header(out, REFUSED, id, 17);
            out.put_u8(code);
            out.put_u64_le(a);
            out.put_u64_le(b);
        }
    }
}

pub(crate) fn put_region_reply(out: &mut BytesMut, id: u32, result: Result<(), &str>) {
    match result {
        Ok(()) => put_header(out, REGION_TAKEN, id, 0),
        Err(sentence) => {
            let sentence = &sentence.as_bytes()[..sentence.len().min(256)];
            put_header(out, REGION_REFUSED, id, sentence.len());
            out.put_slice(sentence);
        }
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) id: u32,
    pub(crate) body: Body,
}

/// What a frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    Region { len: u64 },
    RegionAt { base: u64, len: u64, metadata: Bytes },
    Forget,
    Open(Open),
    Pull(Pieces),
    Finish(Finish),
    Abort { reason: u32 },
    Reply(Reply),
    RegionTaken,
    RegionRefused { sentence: String },
}

/// A push, or another lane of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Open {
    pub(crate) window: u64,
    pub(crate) push: u64,
    pub(crate) lane: LaneKey,
    pub(crate) region: u32,
}

/// The pieces of a PULL, as they came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pieces(Bytes);

/// One piece of a PULL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) local: u64,
    pub(crate) remote: u64,
    pub(crate) len: u32,
}

impl Pieces {
    pub(crate) fn iter(&self) -> impl Iterator<Item = Piece> + '_ {
        self.0.as_chunks::<PIECE_BYTES>().0.iter().map(|piece| {
            let mut piece: &[u8] = piece;
            Piece {
                local: piece.get_u64_le(),
                remote: piece.get_u64_le(),
                len: piece.get_u32_le(),
            }
        })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.iter().map(|piece| u64::from(piece.len)).sum()
    }
}

/// Cuts what arrives into frames; never holds more than a frame and what came with it.
#[derive(Debug, Default)]
pub(crate) struct FrameDecoder {
    buffer: BytesMut,
}

impl FrameDecoder {
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next frame, once it is whole. After an error the link is unusable.
    pub(crate) fn next(&mut self) -> Result<Option<Frame>, &'static str> {
        let Some((header, rest)) = self.buffer.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let [tag, i0, i1, i2, i3, l0, l1, l2, l3] = *header;
        let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if len > BODY_BYTES_MAX {
            return Err("it sends a frame that is too long");
        }
        if rest.len() < len {
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        let body = parse(tag, self.buffer.split_to(len).freeze())?;
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        Ok(Some(Frame { id, body }))
    }
}

fn parse(tag: u8, mut body: Bytes) -> Result<Body, &'static str> {
    let exact = |len: usize| {
        if body.len() == len {
            Ok(())
        } else {
            Err("it sends a frame of the wrong length")
        }
    };
    match tag {
        REGION | LANDED | DONE => exact(8)?,
        FORGET | REGION_TAKEN => exact(0)?,
        OPEN => exact(OPEN_BYTES)?,
        ABORT => exact(4)?,
        REFUSED => exact(17)?,
        PULL if body.is_empty() || !body.len().is_multiple_of(PIECE_BYTES) => exact(PIECE_BYTES)?,
        PULL if body.len() > PULL_PIECES_MAX * PIECE_BYTES => exact(PULL_PIECES_MAX * PIECE_BYTES)?,
        FINISH if body.len() < FINISH_BYTES => exact(FINISH_BYTES)?,
        REGION_AT if body.len() < REGION_AT_BYTES => exact(REGION_AT_BYTES)?,
        REGION_AT if body.len() > REGION_AT_BYTES + METADATA_BYTES_MAX => exact(REGION_AT_BYTES)?,
        REGION_REFUSED | PULL | FINISH | REGION_AT => {}
        _ => return Err("it sends a frame of an unknown kind"),
    }
    Ok(match tag {
        REGION => Body::Region { len: body.get_u64_le() },
        REGION_AT => Body::RegionAt {
            base: body.get_u64_le(),
            len: body.get_u64_le(),
            metadata: body,
        },
        FORGET => Body::Forget,
        OPEN => Body::Open(Open {
            window: body.get_u64_le(),
            push: body.get_u64_le(),
            lane: LaneKey {
                slot: body.get_u16_le(),
                generation: body.get_u32_le(),
            },
            region: body.get_u32_le(),
        }),
        PULL => Body::Pull(Pieces(body)),
        FINISH => Body::Finish(Finish {
            total: body.get_u64_le(),
            notify: body.get_u8() != 0,
            payload: body,
        }),
        ABORT => Body::Abort {
            reason: body.get_u32_le(),
        },
        LANDED => Body::Reply(Reply::Landed(body.get_u64_le())),
        DONE => Body::Reply(Reply::Done(body.get_u64_le())),
        REFUSED => {
            let code = body.get_u8();
            let (a, b) = (body.get_u64_le(), body.get_u64_le());
            Body::Reply(Reply::Refused(Refusal::from_wire(code, a, b)))
        }
        REGION_TAKEN => Body::RegionTaken,
        _ => Body::RegionRefused {
            sentence: String::from_utf8_lossy(&body)
                .chars()
                .filter(|c| !c.is_control())
                .collect(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_frame_survives_any_split() {
        let pieces =
            [(0, 8, 16), (1 << 40, 1 << 41, 1 << 18)].map(|(local, remote, len)| Descriptor { local, remote, len });
        let mut wire = BytesMut::new();
        put_region(&mut wire, 1, 1 << 35);
        put_forget(&mut wire, 2);
        let open = Open {
            window: u64::MAX,
            push: 12,
            lane: LaneKey { slot: 1, generation: 2 },
            region: 4,
        };
        put_open(&mut wire, 3, open);
        put_pull(&mut wire, 5, &pieces);
        let finish = Finish {
            total: 99,
            payload: Bytes::from_static(b"token"),
            notify: true,
        };
        put_finish(&mut wire, 6, &finish);
        put_abort(&mut wire, 7, 2);
        let replies = [
            Reply::Landed(5),
            Reply::Done(6),
            Reply::Refused(Refusal::OutOfRange { offset: 1, len: 2 }),
        ];
        replies.iter().for_each(|&reply| put_reply(&mut wire, 8, reply));
        put_region_reply(&mut wire, 9, Ok(()));
        put_region_reply(&mut wire, 10, Err("no"));
        put_region_at(&mut wire, 11, 1 << 44, 1 << 35, b"where");
        for split in [1, 2, 7, 1000] {
            let (mut decoder, mut frames) = (FrameDecoder::default(), Vec::new());
            for part in wire.chunks(split) {
                decoder.feed(part);
                while let Some(frame) = decoder.next().unwrap() {
                    frames.push(frame);
                }
            }
            let ids: Vec<_> = frames.iter().map(|frame| frame.id).collect();
            assert_eq!(ids, [1, 2, 3, 5, 6, 7, 8, 8, 8, 9, 10, 11]);
            let Body::Pull(sent) = &frames[3].body else {
                panic!("{frames:?}")
            };
            let found: Vec<_> = sent
                .iter()
                .map(|piece| (piece.local, piece.remote, piece.len))
                .collect();
            assert_eq!(found, [(0, 8, 16), (1 << 40, 1 << 41, 1 << 18)]);
            assert_eq!(sent.bytes(), 16 + (1 << 18));
            let bodies: Vec<_> = frames.into_iter().map(|frame| frame.body).collect();
            assert_eq!(bodies[0], Body::Region { len: 1 << 35 });
            assert_eq!(bodies[2], Body::Open(open));
            assert_eq!(bodies[4], Body::Finish(finish.clone()));
            assert_eq!(bodies[5], Body::Abort { reason: 2 });
            assert_eq!(bodies[6..9], replies.map(Body::Reply));
            assert_eq!(bodies[10], Body::RegionRefused { sentence: "no".into() });
            let (base, len, metadata) = (1 << 44, 1 << 35, Bytes::from_static(b"where"));
            assert_eq!(bodies[11], Body::RegionAt { base, len, metadata });
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic_nor_pile_up(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..64),
        ) {
            let mut decoder = FrameDecoder::default();
            for part in parts {
                decoder.feed(&part);
                while let Ok(Some(frame)) = decoder.next() {
                    if let Body::Pull(pieces) = frame.body {
                        prop_assert!(pieces.iter().count() <= PULL_PIECES_MAX);
                    }
                }
            }
        }

        #[test]
        fn lengths_are_bounded(tag in any::<u8>(), len in any::<u32>()) {
            let mut decoder = FrameDecoder::default();
            let mut wire = BytesMut::new();
            wire.put_u8(tag);
            wire.put_u32_le(0);
            wire.put_u32_le(len);
            decoder.feed(&wire);
            if len as usize > BODY_BYTES_MAX {
                prop_assert!(decoder.next().is_err());
            }
        }
    }
}
