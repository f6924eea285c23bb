//! The bytes of a push stream, sans-IO. Integers are little-endian.
//!
//! ```text
//! sender to receiver                         receiver to sender
//! 1 OPEN   window u64                        129 LANDED  bytes u64      everything before a MARK is in memory
//! 2 WRITE  offset u64, len u32, len bytes    130 DONE    bytes u64      FINISH was delivered; the last reply
//! 3 MARK                                     131 REFUSED code u8, a u64, b u64                 the last reply
//! 4 FINISH total u64, len u32, payload
//! ```
//!
//! OPEN comes first and once, FINISH last. The decoders take bytes in any split and never hold more than a header or
//! a payload; the bytes of a WRITE pass through uncopied. What a frame *means* (is that window open, is that offset
//! inside) is the business of [`crate::incoming`] and [`crate::push_state`].

use crate::Refusal;
use crate::limits::{FRAME_BYTES_MAX, PAYLOAD_BYTES_MAX};
use bytes::{BufMut, Bytes, BytesMut};

const OPEN: u8 = 1;
const WRITE: u8 = 2;
const MARK: u8 = 3;
const FINISH: u8 = 4;
const LANDED: u8 = 129;
const DONE: u8 = 130;
const REFUSED: u8 = 131;

/// Tag, u64, u32: the longest header of [`FrameDecoder`].
const HEADER_BYTES_MAX: usize = 13;
/// Tag, u8, u64, u64: the longest reply.
const REPLY_BYTES_MAX: usize = 18;

/// Bytes of a WRITE frame before its data.
pub(crate) const WRITE_HEADER_BYTES: usize = HEADER_BYTES_MAX;

pub(crate) fn put_open(out: &mut BytesMut, window: u64) {
    out.put_u8(OPEN);
    out.put_u64_le(window);
}

/// The header of a write; the caller appends the `len` bytes.
pub(crate) fn put_write(out: &mut BytesMut, offset: u64, len: u32) {
    out.put_u8(WRITE);
    out.put_u64_le(offset);
    out.put_u32_le(len);
}

pub(crate) fn put_mark(out: &mut BytesMut) {
    out.put_u8(MARK);
}

/// The payload is at most [`PAYLOAD_BYTES_MAX`] long; its length is checked where it enters.
pub(crate) fn put_finish(out: &mut BytesMut, total: u64, payload: &[u8]) {
    out.put_u8(FINISH);
    out.put_u64_le(total);
    out.put_u32_le(payload.len() as u32);
    out.put_slice(payload);
}

/// One step of a decoded push stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// The push names its window.
    Open { window: u64 },
    /// A write begins; `len` bytes follow as [`Piece::Bytes`].
    Write { offset: u64, len: u32 },
    /// The next bytes of the current write.
    Bytes(&'a [u8]),
    /// The sender asks how much has landed.
    Mark,
    /// The push is complete.
    Finish { total: u64, payload: Bytes },
}

/// Cuts a push stream into [`Piece`]s.
#[derive(Debug, Default)]
pub(crate) struct FrameDecoder {
    header: [u8; HEADER_BYTES_MAX],
    header_len: usize,
    body: Body,
    opened: bool,
    finished: bool,
}

#[derive(Debug, Default)]
enum Body {
    /// Between frames, or within a header.
    #[default]
    None,
    /// Bytes of the current write still to come.
    Write { left: usize },
    /// The finishing payload so far.
    Finish { total: u64, len: usize, payload: BytesMut },
}

impl FrameDecoder {
    /// Takes the next piece off the front of `input`; `None` once it needs more. After an error the stream is
    /// unusable.
    pub(crate) fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Piece<'a>>, Refusal> {
        loop {
            match &mut self.body {
                Body::Write { left: 0 } => self.body = Body::None,
                Body::Write { left } => {
                    let bytes = take(input, *left);
                    *left -= bytes.len();
                    return Ok((!bytes.is_empty()).then_some(Piece::Bytes(bytes)));
                }
                Body::Finish { total, len, payload } => {
                    payload.extend_from_slice(take(input, *len - payload.len()));
                    if payload.len() < *len {
                        return Ok(None);
                    }
                    let (total, payload) = (*total, std::mem::take(payload).freeze());
                    self.body = Body::None;
                    self.finished = true;
                    return Ok(Some(Piece::Finish { total, payload }));
                }
                Body::None => {
                    let Some(&first) = self.header[..self.header_len].first().or(input.first()) else {
                        return Ok(None);
                    };
                    let needed = self.header_bytes(first)?;
                    let part = take(input, needed - self.header_len);
                    self.header[self.header_len..self.header_len + part.len()].copy_from_slice(part);
                    self.header_len += part.len();
                    if self.header_len < needed {
                        return Ok(None);
                    }
                    self.header_len = 0;
                    if let Some(piece) = self.begin()? {
                        return Ok(Some(piece));
                    }
                }
            }
        }
    }

    /// Length of the header that starts with `tag`, if that frame may come now.
    fn header_bytes(&self, tag: u8) -> Result<usize, Refusal> {
        match tag {
            OPEN if !self.opened => Ok(9),
            WRITE | FINISH if self.opened && !self.finished => Ok(13),
            MARK if self.opened && !self.finished => Ok(1),
            _ => Err(Refusal::Malformed { tag }),
        }
    }

    /// Acts on a complete header.
    fn begin(&mut self) -> Result<Option<Piece<'static>>, Refusal> {
        let [tag, rest @ ..] = self.header;
        let (number, len) = rest.split_at(8);
        let number = u64::from_le_bytes(fixed(number));
        let len = u32::from_le_bytes(fixed(len));
        match tag {
            OPEN => {
                self.opened = true;
                Ok(Some(Piece::Open { window: number }))
            }
            WRITE if len as usize > FRAME_BYTES_MAX => Err(Refusal::FrameTooLong {
                len: len.into(),
                max: FRAME_BYTES_MAX as u64,
            }),
            WRITE => {
                self.body = Body::Write { left: len as usize };
                Ok(Some(Piece::Write { offset: number, len }))
            }
            MARK => Ok(Some(Piece::Mark)),
            _ if len as usize > PAYLOAD_BYTES_MAX => Err(Refusal::PayloadTooLong {
                len: len.into(),
                max: PAYLOAD_BYTES_MAX as u64,
            }),
            _ => {
                self.body = Body::Finish {
                    total: number,
                    len: len as usize,
                    payload: BytesMut::new(),
                };
                Ok(None)
            }
        }
    }
}

/// A receiver's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reply {
    /// This many bytes are in memory.
    Landed(u64),
    /// All bytes are in memory and the payload is delivered.
    Done(u64),
    /// The push is refused.
    Refused(Refusal),
}

impl Reply {
    pub(crate) fn put(self, out: &mut BytesMut) {
        match self {
            Self::Landed(bytes) => {
                out.put_u8(LANDED);
                out.put_u64_le(bytes);
            }
            Self::Done(bytes) => {
                out.put_u8(DONE);
                out.put_u64_le(bytes);
            }
            Self::Refused(refusal) => {
                let (code, a, b) = refusal.to_wire();
                out.put_u8(REFUSED);
                out.put_u8(code);
                out.put_u64_le(a);
                out.put_u64_le(b);
            }
        }
    }
}

/// Cuts a reply stream into [`Reply`]s.
#[derive(Debug, Default)]
pub(crate) struct ReplyDecoder {
    buffer: [u8; REPLY_BYTES_MAX],
    len: usize,
}

impl ReplyDecoder {
    /// Takes the next reply off the front of `input`; `None` once it needs more.
    pub(crate) fn next(&mut self, input: &mut &[u8]) -> Result<Option<Reply>, &'static str> {
        let Some(&tag) = self.buffer[..self.len].first().or(input.first()) else {
            return Ok(None);
        };
        let needed = match tag {
            LANDED | DONE => 9,
            REFUSED => REPLY_BYTES_MAX,
            _ => return Err("unknown reply tag"),
        };
        let part = take(input, needed - self.len);
        self.buffer[self.len..self.len + part.len()].copy_from_slice(part);
        self.len += part.len();
        if self.len < needed {
            return Ok(None);
        }
        self.len = 0;
        let number = |at: usize| u64::from_le_bytes(fixed(&self.buffer[at..at + 8]));
        Ok(Some(match tag {
            LANDED => Reply::Landed(number(1)),
            DONE => Reply::Done(number(1)),
            _ => Reply::Refused(Refusal::from_wire(self.buffer[1], number(2), number(10))),
        }))
    }
}

/// At most `count` bytes off the front.
fn take<'a>(input: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (front, rest) = input.split_at(count.min(input.len()));
    *input = rest;
    front
}

/// The array of a slice whose length the caller has fixed; shorter ones are padded with zeros, never a panic.
fn fixed<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    for (to, from) in array.iter_mut().zip(bytes) {
        *to = *from;
    }
    array
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Frame {
        Write(u64, Vec<u8>),
        Mark,
    }

    fn frames() -> impl Strategy<Value = Vec<Frame>> {
        let write = (any::<u64>(), prop::collection::vec(any::<u8>(), 0..50)).prop_map(|(at, b)| Frame::Write(at, b));
        prop::collection::vec(prop_oneof![4 => write, 1 => Just(Frame::Mark)], 0..12)
    }

    /// Decodes everything, joining the bytes of each write.
    fn decode(input: &[u8], splits: &[usize]) -> Result<Vec<String>, Refusal> {
        let mut decoder = FrameDecoder::default();
        let (mut seen, mut data) = (Vec::new(), Vec::new());
        let (mut rest, mut splits) = (input, splits.iter().cycle());
        while !rest.is_empty() {
            let mut part = take(&mut rest, *splits.next().unwrap_or(&usize::MAX));
            while let Some(piece) = decoder.next(&mut part)? {
                if !matches!(piece, Piece::Bytes(_)) && !data.is_empty() {
                    seen.push(format!("{data:?}"));
                    data.clear();
                }
                match piece {
                    Piece::Bytes(bytes) => data.extend_from_slice(bytes),
                    other => seen.push(format!("{other:?}")),
                }
            }
            assert!(part.is_empty(), "a decoder without an error takes all input");
        }
        Ok(seen)
    }

    proptest! {
        #[test]
        fn any_split_decodes_the_same(
            frames in frames(), payload in prop::collection::vec(any::<u8>(), 0..40),
            splits in prop::collection::vec(1usize..20, 1..10),
        ) {
            let mut wire = BytesMut::new();
            put_open(&mut wire, 7);
            let mut expected = vec![format!("{:?}", Piece::Open { window: 7 })];
            for frame in &frames {
                match frame {
                    Frame::Write(offset, bytes) => {
                        put_write(&mut wire, *offset, bytes.len() as u32);
                        wire.put_slice(bytes);
                        expected.push(format!("{:?}", Piece::Write { offset: *offset, len: bytes.len() as u32 }));
                        if !bytes.is_empty() {
                            expected.push(format!("{bytes:?}"));
                        }
                    }
                    Frame::Mark => {
                        put_mark(&mut wire);
                        expected.push(format!("{:?}", Piece::Mark));
                    }
                }
            }
            put_finish(&mut wire, 99, &payload);
            expected.push(format!("{:?}", Piece::Finish { total: 99, payload: payload.into() }));
            prop_assert_eq!(decode(&wire, &splits).unwrap(), expected.clone());
            prop_assert_eq!(decode(&wire, &[1]).unwrap(), expected);
        }

        #[test]
        fn arbitrary_bytes_never_panic(input in prop::collection::vec(any::<u8>(), 0..400), split in 1usize..9) {
            let _ = decode(&input, &[split]);
            let mut opened = vec![OPEN, 0, 0, 0, 0, 0, 0, 0, 0];
            opened.extend(&input);
            let _ = decode(&opened, &[split]);
            let mut replies = ReplyDecoder::default();
            for mut part in input.chunks(split) {
                while let Ok(Some(_)) = replies.next(&mut part) {}
            }
        }

        #[test]
        fn replies_survive_any_split(code in any::<u8>(), a in any::<u64>(), b in any::<u64>(), split in 1usize..19) {
            let refusal = Refusal::from_wire(code, a, b);
            let sent = [Reply::Landed(a), Reply::Refused(refusal), Reply::Done(b)];
            let mut wire = BytesMut::new();
            sent.iter().for_each(|reply| reply.put(&mut wire));
            let (mut decoder, mut seen) = (ReplyDecoder::default(), Vec::new());
            for mut part in wire.chunks(split) {
                while let Some(reply) = decoder.next(&mut part).unwrap() {
                    seen.push(reply);
                }
            }
            prop_assert_eq!(&seen[..], &sent[..]);
        }
    }

    #[test]
    fn order_and_size_are_enforced() {
        let refused = |bytes: &[u8]| decode(bytes, &[usize::MAX]).unwrap_err();
        assert_eq!(refused(&[MARK]), Refusal::Malformed { tag: MARK });
        assert_eq!(refused(&[0]), Refusal::Malformed { tag: 0 });
        let mut twice = BytesMut::new();
        put_open(&mut twice, 1);
        put_open(&mut twice, 1);
        assert_eq!(refused(&twice), Refusal::Malformed { tag: OPEN });
        let mut after = BytesMut::new();
        put_open(&mut after, 1);
        put_finish(&mut after, 0, b"");
        put_mark(&mut after);
        assert_eq!(refused(&after), Refusal::Malformed { tag: MARK });
        let mut long = BytesMut::new();
        put_open(&mut long, 1);
        put_write(&mut long, 0, FRAME_BYTES_MAX as u32 + 1);
        assert!(matches!(refused(&long), Refusal::FrameTooLong { .. }));
        let mut heavy = BytesMut::new();
        put_open(&mut heavy, 1);
        heavy.put_u8(FINISH);
        heavy.put_u64_le(0);
        heavy.put_u32_le(u32::MAX);
        assert!(matches!(refused(&heavy), Refusal::PayloadTooLong { .. }));
    }
}
