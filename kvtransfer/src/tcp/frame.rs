//! What travels inside the TLS stream of a connection after the hellos, both ways, sans-IO. Integers are
//! little-endian.
//!
//! ```text
//! 1 DATA   len u32, len bytes    bytes of the lane's stream, or of its replies (`wire` says what they mean)
//! 2 ABORT  code u32              the sender gave the lane up; the connection ends with it
//! 3 PING   0 u32                 nothing to say, but alive
//! 4 END    0 u32                 nothing more of this lane; the next DATA is the next lane's. The receiver answers with
//!                                its own, after its last reply
//! ```

/// Bytes before the data of a frame.
pub(super) const HEADER_BYTES: usize = 5;

const DATA: u8 = 1;
const ABORT: u8 = 2;
const PING: u8 = 3;
const END: u8 = 4;

/// The header of a DATA frame with `len` bytes. `len` is that of one hand-over from a push, so far below `u32::MAX`.
pub(super) fn data(len: usize) -> [u8; HEADER_BYTES] {
    header(DATA, u32::try_from(len).unwrap_or(u32::MAX))
}

/// A whole ABORT frame.
pub(super) fn abort(code: u32) -> [u8; HEADER_BYTES] {
    header(ABORT, code)
}

/// A whole PING frame.
pub(super) fn ping() -> [u8; HEADER_BYTES] {
    header(PING, 0)
}

/// A whole END frame.
pub(super) fn end() -> [u8; HEADER_BYTES] {
    header(END, 0)
}

fn header(tag: u8, number: u32) -> [u8; HEADER_BYTES] {
    let [a, b, c, d] = number.to_le_bytes();
    [tag, a, b, c, d]
}

/// A frame, or as much of its data as is there.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame<'a> {
    /// The next bytes of the lane's stream; never empty.
    Data(&'a [u8]),
    /// The lane is given up.
    Abort { code: u32 },
    /// The peer lives.
    Ping,
    /// Nothing more of this lane.
    End,
}

/// Cuts the plaintext into frames. Takes it in any split and holds no more than a header.
#[derive(Debug, Default)]
pub(super) struct FrameReader {
    header: [u8; HEADER_BYTES],
    have: usize,
    /// Bytes of the current DATA frame still to come.
    left: usize,
}

impl FrameReader {
    /// Takes the next frame off the front of `input`; `None` once it needs more.
    ///
    /// # Errors
    /// An unknown tag; the connection is unusable.
    pub(super) fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Frame<'a>>, &'static str> {
        while !input.is_empty() {
            if self.left > 0 {
                let bytes = take(input, self.left);
                self.left -= bytes.len();
                return Ok(Some(Frame::Data(bytes)));
            }
            let part = take(input, HEADER_BYTES - self.have);
            self.header[self.have..self.have + part.len()].copy_from_slice(part);
            self.have += part.len();
            if self.have < HEADER_BYTES {
                break;
            }
            self.have = 0;
            let [tag, number @ ..] = self.header;
            let number = u32::from_le_bytes(number);
            match tag {
                DATA => self.left = number as usize,
                ABORT => return Ok(Some(Frame::Abort { code: number })),
                PING => return Ok(Some(Frame::Ping)),
                END => return Ok(Some(Frame::End)),
                _ => return Err("it sent an unknown frame"),
            }
        }
        Ok(None)
    }
}

fn take<'a>(input: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (front, rest) = input.split_at(most.min(input.len()));
    *input = rest;
    front
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever the split, the data comes out whole and in order, and the other frames in their places.
        #[test]
        fn any_split_gives_the_same_frames(
            parts in prop::collection::vec((0u8..4, prop::collection::vec(any::<u8>(), 0..50)), 0..20),
            split in 1usize..30,
        ) {
            let (mut wire, mut expected) = (Vec::new(), Vec::new());
            for (kind, bytes) in &parts {
                match kind {
                    0 => {
                        wire.extend(data(bytes.len()));
                        wire.extend(bytes);
                        expected.extend(bytes.iter().map(|&byte| i64::from(byte)));
                    }
                    1 => {
                        wire.extend(abort(bytes.len() as u32));
                        expected.push(1000 + bytes.len() as i64);
                    }
                    2 => {
                        wire.extend(ping());
                        expected.push(-1);
                    }
                    _ => {
                        wire.extend(end());
                        expected.push(-2);
                    }
                }
            }
            let (mut reader, mut seen) = (FrameReader::default(), Vec::new());
            for mut part in wire.chunks(split) {
                while let Some(frame) = reader.next(&mut part).unwrap() {
                    match frame {
                        Frame::Data(bytes) => {
                            prop_assert!(!bytes.is_empty());
                            seen.extend(bytes.iter().map(|&byte| i64::from(byte)));
                        }
                        Frame::Abort { code } => seen.push(1000 + i64::from(code)),
                        Frame::Ping => seen.push(-1),
                        Frame::End => seen.push(-2),
                    }
                }
                prop_assert!(part.is_empty());
            }
            prop_assert_eq!((reader.have, reader.left), (0, 0));
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn arbitrary_bytes_never_panic(noise in prop::collection::vec(any::<u8>(), 0..200)) {
            let (mut reader, mut input) = (FrameReader::default(), &noise[..]);
            while let Ok(Some(_)) = reader.next(&mut input) {}
        }
    }
}
