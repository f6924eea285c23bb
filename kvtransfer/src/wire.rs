//! The bytes of a lane, sans-IO. Integers are little-endian.
//!
//! ```text
//! sender to receiver                                             receiver to sender
//! 1 OPEN   window u64, push u64, slot u16, generation u32        129 LANDED  bytes u64    of this lane are in memory
//! 2 WRITE  offset u64, len u32, len bytes                        130 DONE    bytes u64    all of the push; the last
//! 3 MARK                                                         131 REFUSED code u8, a u64, b u64    the last reply
//! 4 FINISH total u64, len u32, flags u8, payload
//! ```
//!
//! OPEN comes first and once, FINISH last. The decoders take bytes in any split and never hold more than a header or
//! a payload; the bytes of a WRITE pass through uncopied. What a frame *means* (is that window open, is that offset
//! inside) is the business of [`crate::incoming`] and [`crate::push_state`].
//!
//! Where the transport does not authenticate, every frame and reply is followed by eight bytes: the XXH3-64 hash of
//! the frame, seeded with its number on the lane, so that damaged, lost, repeated and swapped frames all show. Then a
//! WRITE is held back until its hash is checked, because a damaged repetition must not spoil what has landed.

use crate::Refusal;
use crate::limits::{CONTROL_BYTES_MAX, FRAME_BYTES_MAX, PAYLOAD_BYTES_MAX};
use bytes::{BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::xxh3_64_with_seed;

const OPEN: u8 = 1;
const WRITE: u8 = 2;
const MARK: u8 = 3;
const FINISH: u8 = 4;
const LANDED: u8 = 129;
const DONE: u8 = 130;
const REFUSED: u8 = 131;

/// Tag, u64, u64, u16, u32: the longest header of [`FrameDecoder`].
const HEADER_BYTES_MAX: usize = OPEN_BYTES;
const OPEN_BYTES: usize = 23;
const FINISH_BYTES: usize = 14;
/// Tag, u8, u64, u64: the longest reply, without its hash.
const REPLY_BYTES_MAX: usize = 18;
/// A hash.
const HASH_BYTES: usize = 8;

/// Bytes of a WRITE frame before its data.
pub(crate) const WRITE_HEADER_BYTES: usize = 13;

/// FINISH flag: the payload is also delivered as a notification.
const FLAG_NOTIFY: u8 = 1;

/// The window id of control messages; no window has it.
pub(crate) const CONTROL_WINDOW: u64 = 0;

/// Who vouches that bytes arrive as they were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Integrity {
    /// The transport authenticates: TLS, or memory that both sides map.
    Transport,
    /// Nobody else does: frames carry hashes.
    Checksum,
}

impl Integrity {
    /// What a transport needs that does or does not authenticate.
    pub(crate) fn of(authenticates: bool) -> Self {
        if authenticates { Self::Transport } else { Self::Checksum }
    }
}

/// Which lane of a push: a place among its parallel lanes, and how often that place was filled before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct LaneKey {
    pub(crate) slot: u16,
    /// A larger one takes the place of a smaller one.
    pub(crate) generation: u32,
}

/// Writes the frames of one lane, with hashes if it needs them.
#[derive(Debug)]
pub(crate) struct FrameEncoder {
    integrity: Integrity,
    number: u64,
}

impl FrameEncoder {
    pub(crate) fn new(integrity: Integrity) -> Self {
        Self { integrity, number: 0 }
    }

    /// Bytes that `frames` frames take beyond their data, at most.
    pub(crate) fn overhead(frames: usize) -> usize {
        frames * (WRITE_HEADER_BYTES + HASH_BYTES)
    }

    pub(crate) fn open(&mut self, out: &mut BytesMut, window: u64, push: u64, lane: LaneKey) {
        self.frame(out, |out| {
            out.put_u8(OPEN);
            out.put_u64_le(window);
            out.put_u64_le(push);
            out.put_u16_le(lane.slot);
            out.put_u32_le(lane.generation);
        });
    }

    /// A write whose `len` bytes `fill` puts in place; what `fill` says is handed back.
    pub(crate) fn write<T>(
        &mut self,
        out: &mut BytesMut,
        offset: u64,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> T,
    ) -> T {
        self.frame(out, |out| {
            out.put_u8(WRITE);
            out.put_u64_le(offset);
            // At most SEND_CHUNK_BYTES.
            out.put_u32_le(len as u32);
            let start = out.len();
            out.resize(start + len, 0);
            fill(&mut out[start..])
        })
    }

    pub(crate) fn mark(&mut self, out: &mut BytesMut) {
        self.frame(out, |out| out.put_u8(MARK));
    }

    /// The length of the payload is checked where it enters.
    pub(crate) fn finish(&mut self, out: &mut BytesMut, total: u64, payload: &[u8], notify: bool) {
        self.frame(out, |out| {
            out.put_u8(FINISH);
            out.put_u64_le(total);
            out.put_u32_le(payload.len() as u32);
            out.put_u8(if notify { FLAG_NOTIFY } else { 0 });
            out.put_slice(payload);
        });
    }

    fn frame<T>(&mut self, out: &mut BytesMut, put: impl FnOnce(&mut BytesMut) -> T) -> T {
        let start = out.len();
        let result = put(out);
        if self.integrity == Integrity::Checksum {
            let hash = xxh3_64_with_seed(&out[start..], self.number);
            out.put_u64_le(hash);
            self.number += 1;
        }
        result
    }
}

/// One step of a decoded lane.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// The lane names its window and itself.
    Open { window: u64, push: u64, lane: LaneKey },
    /// A write begins; `len` bytes follow as [`Piece::Bytes`].
    Write { offset: u64, len: u32 },
    /// The next bytes of the current write.
    Bytes(&'a [u8]),
    /// A whole write whose hash is right; instead of the two above where frames carry hashes.
    Whole { offset: u64, bytes: Bytes },
    /// The sender asks how much has landed.
    Mark,
    /// The push is complete once `total` different bytes have landed.
    Finish { total: u64, payload: Bytes, notify: bool },
}

/// Cuts a lane into [`Piece`]s.
#[derive(Debug)]
pub(crate) struct FrameDecoder {
    integrity: Integrity,
    /// Frames whose hash was right.
    number: u64,
    header: [u8; HEADER_BYTES_MAX],
    header_len: usize,
    body: Body,
    opened: Option<u64>,
    finished: bool,
}

#[derive(Debug)]
enum Body {
    /// Between frames, or within a header.
    None,
    /// Bytes of the current write still to come.
    Write { left: usize },
    /// Everything after a header that must be held back: a payload, a checked write, a hash.
    Held { len: usize, held: BytesMut },
}

impl Default for FrameDecoder {
    fn default() -> Self {
        Self::new(Integrity::Transport)
    }
}

impl FrameDecoder {
    pub(crate) fn new(integrity: Integrity) -> Self {
        Self {
            integrity,
            number: 0,
            header: [0; HEADER_BYTES_MAX],
            header_len: 0,
            body: Body::None,
            opened: None,
            finished: false,
        }
    }

    /// Takes the next piece off the front of `input`; `None` once it needs more. After an error the lane is unusable.
    pub(crate) fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Piece<'a>>, Refusal> {
        let result = self.step(input);
        match self.integrity {
            Integrity::Transport => result,
            // What looks like a breach may be damage; only the hash could tell, and it does not come any more.
            Integrity::Checksum => result.map_err(|_| Refusal::Corrupt),
        }
    }

    fn step<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Piece<'a>>, Refusal> {
        loop {
            match &mut self.body {
                Body::Write { left: 0 } => self.clear(),
                Body::Write { left } => {
                    let bytes = take(input, *left);
                    *left -= bytes.len();
                    return Ok((!bytes.is_empty()).then_some(Piece::Bytes(bytes)));
                }
                Body::Held { len, held } => {
                    held.extend_from_slice(take(input, *len - held.len()));
                    if held.len() < *len {
                        return Ok(None);
                    }
                    let held = std::mem::take(held).freeze();
                    let piece = self.complete(held)?;
                    self.clear();
                    return Ok(Some(piece));
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
                    if let Some(piece) = self.begin()? {
                        return Ok(Some(piece));
                    }
                }
            }
        }
    }

    fn clear(&mut self) {
        self.body = Body::None;
        self.header_len = 0;
    }

    /// Length of the header that starts with `tag`, if that frame may come now.
    fn header_bytes(&self, tag: u8) -> Result<usize, Refusal> {
        let running = self.opened.is_some() && !self.finished;
        match tag {
            OPEN if self.opened.is_none() => Ok(OPEN_BYTES),
            WRITE if running => Ok(WRITE_HEADER_BYTES),
            FINISH if running => Ok(FINISH_BYTES),
            MARK if running => Ok(1),
            _ => Err(Refusal::Malformed { tag }),
        }
    }

    /// The first number of a header, and the length at the place where WRITE and FINISH have it.
    fn numbers(&self) -> (u64, u32) {
        (u64_at(&self.header, 1), u32::from_le_bytes(fixed(&self.header[9..13])))
    }

    /// Acts on a complete header: checks lengths, and says what follows it.
    fn begin(&mut self) -> Result<Option<Piece<'static>>, Refusal> {
        let (number, len) = self.numbers();
        let payload_max = match self.opened {
            Some(CONTROL_WINDOW) => CONTROL_BYTES_MAX,
            _ => PAYLOAD_BYTES_MAX,
        };
        let body = match self.header[0] {
            WRITE if len as usize > FRAME_BYTES_MAX => {
                return Err(Refusal::FrameTooLong {
                    len: len.into(),
                    max: FRAME_BYTES_MAX as u64,
                });
            }
            FINISH if len as usize > payload_max => {
                return Err(Refusal::PayloadTooLong {
                    len: len.into(),
                    max: payload_max as u64,
                });
            }
            WRITE if self.integrity == Integrity::Transport => {
                self.body = Body::Write { left: len as usize };
                return Ok(Some(Piece::Write { offset: number, len }));
            }
            WRITE | FINISH => len as usize,
            _ => 0,
        };
        let hash = match self.integrity {
            Integrity::Transport => 0,
            Integrity::Checksum => HASH_BYTES,
        };
        self.body = Body::Held {
            len: body + hash,
            held: BytesMut::new(),
        };
        Ok(None)
    }

    /// Acts on a complete frame.
    fn complete(&mut self, mut held: Bytes) -> Result<Piece<'static>, Refusal> {
        let header = &self.header[..self.header_len];
        if self.integrity == Integrity::Checksum {
            let hash = held.split_off(held.len().saturating_sub(HASH_BYTES));
            let mut hasher = xxhash_rust::xxh3::Xxh3::with_seed(self.number);
            hasher.update(header);
            hasher.update(&held);
            if hash[..] != hasher.digest().to_le_bytes() {
                return Err(Refusal::Corrupt);
            }
            self.number += 1;
        }
        let (number, _) = self.numbers();
        match self.header[0] {
            OPEN => {
                self.opened = Some(number);
                Ok(Piece::Open {
                    window: number,
                    push: u64_at(&self.header, 9),
                    lane: LaneKey {
                        slot: u16::from_le_bytes(fixed(&self.header[17..19])),
                        generation: u32::from_le_bytes(fixed(&self.header[19..23])),
                    },
                })
            }
            WRITE => Ok(Piece::Whole {
                offset: number,
                bytes: held,
            }),
            MARK => Ok(Piece::Mark),
            _ => {
                self.finished = true;
                Ok(Piece::Finish {
                    total: number,
                    payload: held,
                    notify: self.header[13] & FLAG_NOTIFY != 0,
                })
            }
        }
    }
}

/// A receiver's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reply {
    /// This many bytes of the lane are in memory.
    Landed(u64),
    /// All bytes are in memory, each counted once, and the payload is delivered.
    Done(u64),
    /// The lane, and unless the refusal is about the lane only, the push, is refused.
    Refused(Refusal),
}

impl Reply {
    /// Writes a reply of a transport that authenticates.
    pub(crate) fn put(self, out: &mut BytesMut) {
        self.put_with(out, Integrity::Transport);
    }

    /// Writes a reply, with its hash if it needs one. Unlike frames, replies are not numbered: a lost or repeated one
    /// says nothing that the next does not.
    pub(crate) fn put_with(self, out: &mut BytesMut, integrity: Integrity) {
        let start = out.len();
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
        if integrity == Integrity::Checksum {
            let hash = xxh3_64_with_seed(&out[start..], 0);
            out.put_u64_le(hash);
        }
    }
}

/// Why a reply cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadReply {
    #[error("unknown reply tag")]
    UnknownTag,
    #[error("damaged reply")]
    Corrupt,
}

impl From<BadReply> for crate::PushError {
    fn from(bad: BadReply) -> Self {
        match bad {
            BadReply::UnknownTag => Self::Protocol("unknown reply tag"),
            BadReply::Corrupt => Self::Corrupt,
        }
    }
}

/// Cuts a reply stream into [`Reply`]s.
#[derive(Debug)]
pub(crate) struct ReplyDecoder {
    integrity: Integrity,
    buffer: [u8; REPLY_BYTES_MAX + HASH_BYTES],
    len: usize,
}

impl Default for ReplyDecoder {
    fn default() -> Self {
        Self::new(Integrity::Transport)
    }
}

impl ReplyDecoder {
    pub(crate) fn new(integrity: Integrity) -> Self {
        Self {
            integrity,
            buffer: [0; REPLY_BYTES_MAX + HASH_BYTES],
            len: 0,
        }
    }

    /// Takes the next reply off the front of `input`; `None` once it needs more.
    pub(crate) fn next(&mut self, input: &mut &[u8]) -> Result<Option<Reply>, BadReply> {
        let Some(&tag) = self.buffer[..self.len].first().or(input.first()) else {
            return Ok(None);
        };
        let checked = self.integrity == Integrity::Checksum;
        let body = match tag {
            LANDED | DONE => 9,
            REFUSED => REPLY_BYTES_MAX,
            _ if checked => return Err(BadReply::Corrupt),
            _ => return Err(BadReply::UnknownTag),
        };
        let needed = if checked { body + HASH_BYTES } else { body };
        let part = take(input, needed - self.len);
        self.buffer[self.len..self.len + part.len()].copy_from_slice(part);
        self.len += part.len();
        if self.len < needed {
            return Ok(None);
        }
        self.len = 0;
        if checked && xxh3_64_with_seed(&self.buffer[..body], 0) != u64_at(&self.buffer, body) {
            return Err(BadReply::Corrupt);
        }
        Ok(Some(match tag {
            LANDED => Reply::Landed(u64_at(&self.buffer, 1)),
            DONE => Reply::Done(u64_at(&self.buffer, 1)),
            _ => Reply::Refused(Refusal::from_wire(
                self.buffer[1],
                u64_at(&self.buffer, 2),
                u64_at(&self.buffer, 10),
            )),
        }))
    }
}

/// At most `count` bytes off the front.
fn take<'a>(input: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (front, rest) = input.split_at(count.min(input.len()));
    *input = rest;
    front
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(fixed(&bytes[at..]))
}

/// The first bytes of a slice as an array; shorter ones are padded with zeros, never a panic.
fn fixed<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    for (to, from) in array.iter_mut().zip(bytes) {
        *to = *from;
    }
    array
}

#[cfg(test)]
mod tests;
